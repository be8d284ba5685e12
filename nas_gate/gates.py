"""Gates: trainable functions from gate weights to keep.

A gate weight is one real number per unit; `keep` is what the unit is multiplied by. A unit is open where
its gate weight is above 0. The trainable gate is the method of this package; the others are the estimators
of the literature that it is compared with, behind the same interface (`Gate`).

All gates work entry by entry, so weights of any shape are taken; (n,) is what the package uses.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

_Entry = TypeVar("_Entry")

Shape = Callable[[Tensor], Tensor]
"""A gradient shape g: gate weights (n,) -> the derivative that the gate is to have there (n,)."""


class Gate(Protocol):
    """What every gate offers; each one here is also an `nn.Module`, without parameters of its own."""

    training: bool

    @property
    def hard(self) -> bool:
        """Whether keep is exactly 0 or 1 in training mode."""
        ...

    @property
    def initial(self) -> float:
        """Gate weight at which a unit starts: open, yet where the gate still has a gradient."""
        ...

    def __call__(self, weight: Tensor, /) -> Tensor:
        """Gate weights (n,) -> keep (n,), in the weights' dtype.

        In training mode it may draw from torch's global generator. In eval mode it is deterministic, and
        above 1/2 exactly where the weight is above 0 (to the dtype's resolution); hard gates give b(w).
        """
        ...

    def set_progress(self, progress: float) -> None:
        """Say what share of gate training is done, 0 to 1; sets the temperature of gates that have one.

        Raises:
            ValueError: progress lies outside [0, 1].
        """
        ...


def constant(weight: Tensor) -> Tensor:
    """g(w) = 1; in the limit form the straight-through estimator."""
    return torch.ones_like(weight)


def sigmoid(weight: Tensor) -> Tensor:
    """g(w) = sigmoid'(w) = sigmoid(w) (1 - sigmoid(w)), 1/4 at its top; not rescaled."""
    value = torch.sigmoid(weight)
    return value * (1 - value)


def triangle(weight: Tensor) -> Tensor:
    """g(w) = max(0, 1 - |w|); a gate whose weight leaves (-1, 1) learns no more."""
    return torch.relu(1 - weight.abs())


def gaussian(weight: Tensor) -> Tensor:
    """g(w) = exp(-w^2 / 2)."""
    return torch.exp(-weight.square() / 2)


SHAPES: dict[str, Shape] = {
    "constant": constant,
    "sigmoid": sigmoid,
    "triangle": triangle,
    "gaussian": gaussian,
}


class TrainableGate(nn.Module):
    """The trainable gate function, TG(w; g, M) = b(w) + s(w) g(w) (Kim et al., arXiv 1904.10921).

    b(w) = 1 if w > 0 else 0 is the step, s(w) = (M w - floor(M w)) / M a sawtooth in [0, 1/M] of slope 1,
    and g the gradient shape. As M grows, TG goes to b uniformly and its derivative g + s g' to g.

    Args:
        shape: name in `SHAPES`, or a function of your own: entry by entry, made of torch operations.
        form: "limit", value b(w) and derivative g(w) exactly; or "finite", the formula itself. The finite
            form is not hard: it lies off b(w) by s(w) g(w), at most |g(w)| / M, so above 1 by as much.
            Half-precision weights get that value rounded.
        m: M, the teeth per unit of gate weight; only the finite form uses it. Choose it well above
            2 max |g|, below which a closed unit's keep can pass 1/2. In float32, teeth narrower
            than the spacing of the weights leave the value at b(w) and the derivative at g(w).

    Raises:
        ValueError: unknown shape or form; m not positive and finite.
    """

    initial: ClassVar[float] = 0.5  # every shape has a gradient here; the triangle has none from 1 on

    def __init__(
        self,
        shape: str | Shape = "constant",
        form: Literal["limit", "finite"] = "limit",
        m: float = 1e5,
    ) -> None:
        super().__init__()
        if form not in ("limit", "finite"):
            raise ValueError(f"`form` must be 'limit' or 'finite', but got {form!r}.")
        _require_positive("m", m)
        self.shape = _named(SHAPES, "gradient shape", shape) if isinstance(shape, str) else shape
        self.form = form
        self.m = m

    @property
    def hard(self) -> bool:
        """True for the limit form; the finite form is off 0 and 1 by at most |g| / M."""
        return self.form == "limit"

    def forward(self, weight: Tensor) -> Tensor:
        """Gate weights (n,) -> keep (n,); the same in training and eval mode."""
        wide = _wide(weight)
        if self.form == "limit":
            keep: Tensor = _LimitGate.apply(wide, self.shape)
        else:
            keep = _step(wide) + _sawtooth(wide, self.m) * self.shape(wide)
        return keep.to(weight.dtype)

    def set_progress(self, progress: float) -> None:
        """Check the share of gate training done; nothing here depends on it."""
        _require_share(progress)

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        name = getattr(self.shape, "__name__", repr(self.shape))
        return f"shape={name}, form={self.form}" + ("" if self.hard else f", m={self.m:g}")


class GumbelSigmoid(nn.Module):
    """Straight-through Gumbel-sigmoid (Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712).

    Training: with L logistic noise (the difference of two Gumbel draws) and T the temperature, the value is
    b(w + L), so a unit is open with probability sigmoid(w); the gradient is that of sigmoid((w + L) / T).
    Eval: the same with L = 0. T falls geometrically from `temperature_start` to `temperature_end`.

    Raises:
        ValueError: `temperature_start >= temperature_end > 0` does not hold.
    """

    hard: ClassVar[bool] = True
    initial: ClassVar[float] = 3.0  # open in 95% of the draws
    progress: Tensor

    def __init__(self, temperature_start: float = 1.0, temperature_end: float = 0.5) -> None:
        super().__init__()
        _require_temperatures(temperature_start, temperature_end)
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        """Gate weights (n,) -> keep (n,), each entry 0 or 1."""
        logit = _wide(weight)
        if self.training:
            logit = logit + _logistic_noise(logit)
        temperature = _temperature(self.temperature_start, self.temperature_end, self.progress)
        soft = torch.sigmoid(logit / temperature)
        # The bracket is exactly 0: the value is the step's, the gradient is soft's.
        return (_step(logit) + (soft - soft.detach())).to(weight.dtype)

    def set_progress(self, progress: float) -> None:
        """Set the temperature for this share of gate training done."""
        self.progress.fill_(_require_share(progress))

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        return f"temperature_start={self.temperature_start}, temperature_end={self.temperature_end}"


class HardConcrete(nn.Module):
    """The hard concrete gate of L0 regularisation (Louizos et al., arXiv 1712.01312, section 2).

    The gate weight is the paper's log alpha. Training, with L logistic noise:
    clip((1 + 2 c) sigmoid((w + L) / beta) - c, 0, 1). Eval: the paper's estimate,
    clip((1 + 2 c) sigmoid(w) - c, 0, 1).

    Args:
        beta: the temperature; 2/3 in the paper.
        stretch: c, how far the interval reaches beyond 0 and 1; the paper's gamma = -0.1 and zeta = 1.1 are
            stretch = 0.1. One number for both sides keeps w > 0 the place where keep exceeds 1/2.

    Raises:
        ValueError: beta or stretch is not positive and finite.
    """

    hard: ClassVar[bool] = False
    initial: ClassVar[float] = 3.0  # in eval mode keep is exactly 1 from 2.4 on

    def __init__(self, beta: float = 2 / 3, stretch: float = 0.1) -> None:
        super().__init__()
        _require_positive("beta", beta)
        _require_positive("stretch", stretch)
        self.beta = beta
        self.stretch = stretch

    def forward(self, weight: Tensor) -> Tensor:
        """Gate weights (n,) -> keep (n,) in [0, 1]."""
        logit = _wide(weight)
        if self.training:
            logit = (logit + _logistic_noise(logit)) / self.beta
        # Stretched around 1/2 rather than from -c, so that rounding cannot move w = 0 off 1/2.
        stretched = 0.5 + (1 + 2 * self.stretch) * (torch.sigmoid(logit) - 0.5)
        return stretched.clamp(0, 1).to(weight.dtype)

    def set_progress(self, progress: float) -> None:
        """Check the share of gate training done; nothing here depends on it."""
        _require_share(progress)

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        return f"beta={self.beta:g}, stretch={self.stretch:g}"


class AnnealedSigmoid(nn.Module):
    """sigmoid(w / T) with T falling to near 0, so towards b(w) (Savarese et al., arXiv 1912.04427).

    Deterministic and the same in training and eval mode: soft throughout, and 0 or 1 to rounding only as far
    as T has fallen. T falls geometrically from `temperature_start` to `temperature_end`; the default end is
    the 1/200 of the paper.

    Raises:
        ValueError: `temperature_start >= temperature_end > 0` does not hold.
    """

    hard: ClassVar[bool] = False
    progress: Tensor

    def __init__(self, temperature_start: float = 1.0, temperature_end: float = 0.005) -> None:
        super().__init__()
        _require_temperatures(temperature_start, temperature_end)
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.register_buffer("progress", torch.zeros(()))

    @property
    def initial(self) -> float:
        """Four start temperatures: keep is sigmoid(4) = 0.98; much higher, and the gradient vanishes."""
        return 4 * self.temperature_start

    def forward(self, weight: Tensor) -> Tensor:
        """Gate weights (n,) -> keep (n,) in [0, 1]."""
        temperature = _temperature(self.temperature_start, self.temperature_end, self.progress)
        return torch.sigmoid(_wide(weight) / temperature).to(weight.dtype)

    def set_progress(self, progress: float) -> None:
        """Set the temperature for this share of gate training done."""
        self.progress.fill_(_require_share(progress))

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        return f"temperature_start={self.temperature_start}, temperature_end={self.temperature_end}"


GATES: dict[str, Callable[..., Gate]] = {
    "trainable": TrainableGate,
    "gumbel": GumbelSigmoid,
    "hard_concrete": HardConcrete,
    "annealed_sigmoid": AnnealedSigmoid,
}


def make_gate(name: str, **arguments: Any) -> Gate:
    """Build the gate that `GATES` holds under `name`.

    Args:
        name: key in `GATES`.
        arguments: passed to the gate.

    Raises:
        ValueError: unknown name, or an argument's value breaks one of the gate's rules.
        TypeError: the gate takes no such argument.
    """
    return _named(GATES, "gate", name)(**arguments)


class _LimitGate(torch.autograd.Function):
    """Value b(w), derivative g(w).

    No `jvp`: torch.compile does not trace functions that define one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, shape: Shape) -> Tensor:
        return _step(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Shape], output: Tensor) -> None:
        weight, ctx.shape = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * ctx.shape(weight), None


def _wide(weight: Tensor) -> Tensor:
    """At least float32. Enough for autocast too, which lowers matrix products only; gates have none."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _step(weight: Tensor) -> Tensor:
    return (weight > 0).to(weight.dtype)


def _sawtooth(weight: Tensor, m: float) -> Tensor:
    scaled = m * weight
    return (scaled - scaled.floor()) / m  # floor passes no gradient, so the slope is 1


def _logistic_noise(like: Tensor) -> Tensor:
    return torch.rand_like(like).logit()  # a draw of 0 gives -inf: keep 0 and gradient 0, no NaN


def _temperature(start: float, end: float, progress: Tensor) -> Tensor:
    temperature: Tensor = start * (end / start) ** progress
    return temperature


def _named(registry: dict[str, _Entry], kind: str, name: str) -> _Entry:
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted(registry))}.")
    return registry[name]


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`0 < {name} < inf` must hold, but got {name}={value}.")


def _require_temperatures(start: float, end: float) -> None:
    _require_positive("temperature_end", end)
    if not (start >= end and math.isfinite(start)):
        raise ValueError(
            "`temperature_end <= temperature_start < inf` must hold, but got "
            f"(temperature_start={start}, temperature_end={end})."
        )


def _require_share(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise ValueError(f"`0 <= progress <= 1` must hold, but got progress={progress}.")
    return progress
