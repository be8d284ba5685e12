"""Gates in a model: they multiply the input slots of the weights that consume a unit.

That gives exactly the function of the smaller network, whatever norm, bias or activation lies between a unit and
its consumers, and costs a product over a weight instead of one over an activation. The gate of a residual branch
multiplies the parameters at its end, so that the branch adds zero; a choice weighs its candidates itself. The weights
are replaced for one call by `torch.func.functional_call`, so the model keeps its class and its state names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from nas_gate.cost import CostModel, check_budgets
from nas_gate.gates import Gate, TrainableGate
from nas_gate.latency_table import LatencyTable
from nas_gate.modules import Choice, copied
from nas_gate.structure import Norm, Structure
from nas_gate.structure.trace import owner_of


class Factors(nn.Module):
    """From a keep vector to gated weights.

    All factors are gathered at once: one index for the whole network, split by weight and dimension.
    """

    _index: Tensor

    def __init__(self, structure: Structure, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        units = structure.units
        self._shapes: list[tuple[str, list[int], bool]] = []
        rows = {(norm.standardizes, norm.dim) for norm in structure.norms}
        index, sizes = [], []
        for gate in structure.gates:
            ids = torch.from_numpy(gate.units)
            index.append(torch.where(ids >= 0, ids, units))  # the last factor is the constant 1
            sizes.append(len(ids))
            shape = shapes[gate.tensor]
            by_row = (gate.tensor, gate.dim) in rows
            self._shapes.append((gate.tensor, [n if d == gate.dim else 1 for d, n in enumerate(shape)], by_row))
        self._sizes = sizes
        self.names = list(dict.fromkeys(name for name, *_ in self._shapes))
        self.register_buffer(
            "_index", torch.cat(index) if index else torch.zeros(0, dtype=torch.int64, device="cpu"), False
        )

    def forward(self, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """The gated ones among `tensors` (by name), multiplied by their factors; see `standardized` for some."""
        factors = torch.cat([keep, keep.new_ones(1)]).index_select(0, self._index).split(self._sizes)
        gated: dict[str, Tensor] = {}
        for (name, shape, by_row), factor in zip(self._shapes, factors):
            weight = gated.get(name, tensors[name])
            factor = factor.view(shape).to(weight.dtype)
            gated[name] = standardized(weight, factor) if by_row else weight * factor
        return gated


def standardized(weight: Tensor, keep: Tensor) -> Tensor:
    """A weight that its module standardises row by row, with slots closed along dimension 1 (where `keep` varies).

    Closed ones become the mean of the kept ones and all is stretched, as in `normalize_over_kept`. Standardised, closed
    ones are 0 and the others sqrt(C / K) times those of the smaller network; the module's input undoes that.
    """
    stretched = weight * (keep / keep.mean().sqrt())
    others = list(range(1, weight.dim()))
    mean = stretched.sum(others, keepdim=True) / (keep.sum() * weight[0, 0].numel())
    return torch.addcmul(stretched, mean, 1 - keep)


def normalize_over_kept(module: nn.Module, norm: Norm, kept: Tensor) -> None:
    """Let a norm take its statistics over the kept slots of its input; in place.

    Of C slots K are kept. Closed ones become 0, in a layer norm the mean of the kept ones, and all is stretched by
    sqrt(C / K): mean and variance (or mean square) over all C slots are then those of the kept ones. What scales the
    result undoes the stretch, its weight (see `Norms`) or a hook. PyTorch fuses no layer that has hooks. Where it is a
    weight that is standardised in the module (see `standardized`), its input undoes the weight's stretch.
    """
    module.register_buffer("kept", kept, persistent=False)
    module.kept_norm = norm  # type: ignore[assignment]
    module.register_forward_pre_hook(_stretched)
    if norm.weight is None and norm.standardizes is None:
        module.register_forward_hook(_as_it_was)


def _stretched(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    input, norm, kept = args[0], module.kept_norm, module.kept
    if norm.standardizes is not None:
        return (input * kept.mean().sqrt()).to(input.dtype), *args[1:]
    keep = kept.view([-1 if d == norm.dim else 1 for d in range(input.dim())])
    stretched = input * (keep / kept.mean().sqrt())
    if norm.groups:
        grouped, keep = (t.reshape(len(t), norm.groups, len(kept) // norm.groups, -1) for t in (stretched, keep))
        mean = grouped.sum((2, 3), keepdim=True) / (keep.sum(2, keepdim=True) * grouped.shape[3])
        stretched = torch.addcmul(grouped, mean, 1 - keep).view(input.shape)
    elif norm.centred:
        stretched = torch.addcmul(stretched, stretched.sum(norm.dim, keepdim=True) / kept.sum(), 1 - keep)
    return stretched.to(input.dtype), *args[1:]


def _as_it_was(module: Any, args: Any, out: Any) -> Any:
    return (out * module.kept.mean().sqrt()).to(out.dtype) if isinstance(out, Tensor) else out


def normalize_over_all(module: Any) -> None:
    """Undo `normalize_over_kept`."""
    remove_hooks(module, _stretched, _as_it_was)
    del module.kept, module.kept_norm


def remove_hooks(module: nn.Module, *hooks: Any) -> None:
    """Remove these from the module's forward hooks and pre-hooks."""
    for present in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in present.items() if hook in hooks]:
            del present[key]


def normalizes_over_kept(module: nn.Module) -> bool:
    """Whether `normalize_over_kept` holds for the module."""
    return _stretched in module._forward_pre_hooks.values()


def refuse_recomputing(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of gated modules: RuntimeError in a backward pass, where weights are without their gates.

    Activation checkpointing runs parts of a model again there.
    """
    # compiled code recomputes from the values that it began with
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"a gated model must not be run again in the backward pass, but a {type(module).__name__} is: its gates "
            "are in place for the forward pass only. Turn off activation checkpointing (torch.utils.checkpoint)"
        )


def plain(model: nn.Module) -> nn.Module:
    """The model as it was before gates: a copy that shares all tensors with the one given."""
    tensors = [*model.parameters(), *model.buffers()]
    model = copied(model, {id(t): t for t in tensors})
    for module in model.modules():
        remove_hooks(module, refuse_recomputing)
        if normalizes_over_kept(module):
            normalize_over_all(module)
        if isinstance(module, Choice):
            module.keep = None
    return model


class Norms(nn.Module):
    """From a keep vector to what norms over units need: their kept slots, and their weights."""

    _index: Tensor

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.paths = [n.path for n in structure.norms]
        self.weights = [n.weight for n in structure.norms]
        self._sizes = [len(n.units) for n in structure.norms]
        units = np.concatenate([*(n.units for n in structure.norms), np.zeros(0, np.int64)])
        index = torch.from_numpy(np.where(units >= 0, units, structure.units))
        self.register_buffer("_index", index, persistent=False)

    def forward(self, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """Buffers and weights by name; `tensors` has all `weights`."""
        kept = torch.cat([keep, keep.new_ones(1)]).index_select(0, self._index).split(self._sizes)
        replaced: dict[str, Tensor] = {}
        for path, weight, k in zip(self.paths, self.weights, kept):
            replaced[f"{path}.kept"] = k
            if weight is not None:
                replaced[weight] = tensors[weight] * k.mean().sqrt().to(tensors[weight].dtype)
        return replaced


class Gates(nn.Module):
    """Gate weights of all units, shape (units,), and the gate function that turns them into keep.

    The `minimum` highest gate weights of every group are held open, so that the network is never cut in two (not those
    of branches, without which it stays whole), and above `round_to` 1 as many more as make a multiple of it, so that
    whole blocks close. Of every choice the highest is held open and all others closed. What is held receives the
    gate's gradient all the same.
    """

    _set: Tensor
    _start: Tensor
    _least: Tensor
    _most: Tensor

    def __init__(self, structure: Structure, function: Gate, minimum: int = 1, round_to: int = 1) -> None:
        super().__init__()
        if minimum < 1 or round_to < 1:
            raise ValueError(f"`minimum >= 1` and `round_to >= 1` must hold, but got {minimum=}, {round_to=}")
        self.function = function
        self.weight = nn.Parameter(torch.full((structure.units,), float(function.initial), device="cpu"))
        for name, values in zip(("_set", "_start", "_least", "_most"), structure.rivals()):
            self.register_buffer(name, torch.from_numpy(values), persistent=False)
        self._least = torch.where(self._least > 0, self._least.clamp(min=minimum), 0).minimum(self._most)
        self.round_to = round_to

    def forward(self) -> Tensor:
        """Keep, shape (units,), in [0, 1]."""
        keep: Tensor = self.function(self.weight)
        rank = self.ranks()
        least = self._least
        if self.round_to > 1:
            open_units = torch.zeros_like(least).index_add(0, self._set, (keep > 0.5).to(least.dtype))
            least = (least.maximum(open_units) + self.round_to - 1) // self.round_to * self.round_to
        held = rank < least[self._set]
        keep = torch.where(held, keep + (1 - keep).detach(), keep)
        return torch.where(rank >= self._most[self._set], keep - keep.detach(), keep)

    def ranks(self) -> Tensor:
        """The rank of every unit among its rivals by gate weight, 0 for the highest (ties by position)."""
        return ranks(self.weight.detach(), self._set, self._start)


def ranks(scores: Tensor, group: Tensor, start: Tensor) -> Tensor:
    """Ranks by descending score within each group; units of a group are contiguous from `start[group]`."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[group]
    return rank


class GatedModel(nn.Module):
    """A copy of a model with gates on all its units; called like the model.

    `model` holds the weights under their own names, `gates.weight` the gate weights of all units as one parameter,
    `structure` the units, `cost` the cost model, `example_inputs` the arguments that the analysis ran on.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        function: Gate | None = None,
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
        round_to: int = 1,
    ) -> None:
        super().__init__()
        if not structure.groups:
            reasons = list(dict.fromkeys(f.reason for f in structure.fixed))[:5]
            raise ValueError(
                f"a model needs at least one removable unit to be gated, but {type(model).__name__} has none; "
                f"reasons: {'; '.join(reasons) or 'it has no parameters'}"
            )
        self.model = model
        self.structure = structure
        self.cost = CostModel(structure)
        self.gates = Gates(structure, TrainableGate() if function is None else function, round_to=round_to)
        self.factors = Factors(structure, {n: tuple(t.shape) for n, t in _named(model).items()})
        self.norms = Norms(structure)
        self.example_inputs = example_inputs
        device = next((t.device for t in _named(model).values()), None)
        for norm in structure.norms:
            normalize_over_kept(model.get_submodule(norm.path), norm, torch.ones(len(norm.units), device=device))
        dense = structure.dense().to(device, torch.float32)
        for choice in structure.choices:
            choice_at(model, choice.path).keep = dense[list(choice.units)]
        gated = {*map(owner_of, self.factors.names), *self.norms.paths, *(choice.path for choice in structure.choices)}
        for path in sorted(gated):
            model.get_submodule(path).register_forward_pre_hook(refuse_recomputing)
        for part in (self.cost, self.gates, self.factors, self.norms):
            part.to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes when its closed units are gone."""
        keep = self.gates()
        replaced = self.factors({name: _tensor(self.model, name) for name in self.factors.names}, keep)
        if self.norms.paths:
            weights = {name: replaced.get(name, _tensor(self.model, name)) for name in self.norms.weights if name}
            replaced |= self.norms(weights, keep)
        for choice in self.structure.choices:
            replaced[f"{choice.path}.keep"] = keep[choice.units[0] : choice.units[-1] + 1]
        return functional_call(self.model, replaced, args, kwargs)

    def keep(self) -> Tensor:
        """The gates' present keep, shape (units,)."""
        keep: Tensor = self.gates()
        return keep

    def cost_share(self, metric: str = "macs") -> Tensor:
        """The present keep's cost over the dense model's."""
        return self.cost.share(self.gates(), metric)

    def add_latency(self, table: LatencyTable) -> None:
        """From now on "latency_ms" is a metric, too; ValueError where the table belongs to another network."""
        self.cost = CostModel(self.structure, table).to(self.gates.weight.device)

    def gate_parameters(self) -> list[nn.Parameter]:
        """What the gates learn (give it its own learning rate, and no weight decay)."""
        return list(self.gates.parameters())

    def weight_parameters(self) -> list[nn.Parameter]:
        """What the model learns."""
        return list(self.model.parameters())


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor


def choice_at(model: nn.Module, path: str) -> Choice:
    """The choice at `path`."""
    module = model.get_submodule(path)
    assert isinstance(module, Choice)
    return module


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def penalty(
    gated: GatedModel,
    target: float,
    weight: float = 1.0,
    power: int = 2,
    metric: str = "macs",
    limits: Mapping[str, float] | None = None,
) -> Tensor:
    """`weight * |target - cost(keep) / cost(all)| ** power`, the loss of arXiv 1904.10921 on the discrete cost.

    `target` is the wanted share of the dense cost, in (0, 1]; for the metric "latency_ms" it is in milliseconds, and
    the loss is of its share of the dense latency all the same. Every one of `limits`, {metric: as a target of that
    metric}, adds such a term for what exceeds it; below it there is none.
    """
    limits = limits or {}
    check_budgets(target, metric, limits)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, but is {power}")
    if weight < 0:
        raise ValueError(f"`weight >= 0` must hold, but got weight={weight}")
    gap, *excesses = _gaps(gated, {metric: target, **limits})
    loss = gap.abs() ** power
    for excess in excesses:
        loss = loss + excess.clamp(min=0) ** power
    return (weight * loss).to(gated.gates.weight.dtype)


def _gaps(gated: GatedModel, wanted: Mapping[str, float]) -> list[Tensor]:
    """How far the share of each metric's dense cost is above what is wanted, for one sample of the gates."""
    keep, cost = gated.gates(), gated.cost
    return [cost.share(keep, m) - value * cost.unit(m) / cost.total(m) for m, value in wanted.items()]


class Lagrangian:
    """A budget controller that finds the penalty's weight itself (augmented Lagrangian for share <= target).

    The term is `multiplier * gap + rate / 2 * gap ** 2` with gap = share - target; after every step `update` adds
    `rate * gap` to the multiplier, which stays at least 0. See Nocedal and Wright, Numerical Optimization, ch. 17.

    Every one of `limits` (see `penalty`) has a multiplier of its own, which begins at 0, and the term for inequalities
    (section 17.4 there): `(max(0, multiplier + rate * gap) ** 2 - multiplier ** 2) / (2 * rate)`.
    """

    def __init__(
        self,
        target: float,
        rate: float = 0.1,
        metric: str = "macs",
        multiplier: float = 0.0,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self.limits = dict(limits or {})
        check_budgets(target, metric, self.limits)
        if rate <= 0 or multiplier < 0:
            raise ValueError(f"`rate > 0` and `multiplier >= 0` must hold, but got {rate=}, {multiplier=}")
        self.target, self.rate, self.metric = target, rate, metric
        # after an update they are tensors on the gates' device: to read them would be to wait for it, at every step
        self._multiplier: float | Tensor = multiplier
        self._multipliers: dict[str, float | Tensor] = {}

    @property
    def multiplier(self) -> float:
        """That of the target."""
        return float(self._multiplier)

    @property
    def multipliers(self) -> dict[str, float]:
        """Those of the limits; 0 before the first update."""
        return {name: float(self._multipliers.get(name, 0.0)) for name in self.limits}

    def __call__(self, gated: GatedModel) -> Tensor:
        """The loss term."""
        gap, *excesses = self._gaps(gated)
        term = self._multiplier * gap + self.rate / 2 * gap**2
        for name, excess in zip(self.limits, excesses):
            multiplier = self._multipliers.get(name, 0.0)
            term = term + ((multiplier + self.rate * excess).clamp(min=0) ** 2 - multiplier**2) / (2 * self.rate)
        return term.to(gated.gates.weight.dtype)

    @torch.no_grad()
    def update(self, gated: GatedModel) -> None:
        """Adapt the multipliers to the present gaps."""
        gap, *excesses = self._gaps(gated)
        self._multiplier = (self._multiplier + self.rate * gap).clamp(min=0)
        for name, excess in zip(self.limits, excesses):
            self._multipliers[name] = (self._multipliers.get(name, 0.0) + self.rate * excess).clamp(min=0)

    def _gaps(self, gated: GatedModel) -> list[Tensor]:
        return _gaps(gated, {self.metric: self.target, **self.limits})

    def state_dict(self) -> dict[str, Any]:
        """What changes during training."""
        return {
            "multiplier": self.multiplier,
            "target": self.target,
            "multipliers": self.multipliers,
            "limits": dict(self.limits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was taken."""
        self._multiplier, self.target = float(state["multiplier"]), float(state["target"])
        self._multipliers, self.limits = dict(state["multipliers"]), dict(state["limits"])


def check_optimizers(gated: GatedModel, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError unless some optimiser trains the gates: one built before `attach` never would."""
    trained = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    if id(gated.gates.weight) not in trained:
        raise ValueError(
            "the gates must be among the optimiser's parameters, but are not: build the optimiser after "
            "nas_gate.attach, from gated.parameters()"
        )


_left_behind: Any = WeakTensorKeyDictionary()


def refuse_optimizers_of(original: nn.Module) -> None:
    """From now on an optimiser that can only train `original`, of which a gated copy exists, is an error.

    Such an optimiser was built before the gates were attached: it holds none of the parameters that receive
    gradients, so that neither weights nor gates would learn. Training the original itself goes on working.
    """
    _watch_optimizers()
    for parameter in original.parameters():
        _left_behind[parameter] = type(original).__name__


@cache
def _watch_optimizers() -> None:
    # After the step, for a closure makes its gradients during the step; without any gradient it changed nothing.
    register_optimizer_step_post_hook(_refuse_left_behind)


def _refuse_left_behind(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    name = _left_behind.get(parameters[0]) if parameters and isinstance(parameters[0], Tensor) else None
    if name is not None and all(p.grad is None for p in parameters):
        raise RuntimeError(
            f"this optimiser holds the parameters of the original {name}, which receive no gradients: gates were "
            "attached to a copy. Build the optimiser after nas_gate.attach, from gated.parameters()"
        )
