"""Removal: a smaller model of the user's own class, and the proof that it computes what the gated one does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nas_gate.attention import HeadsAttention
from nas_gate.cost import METRICS, CostModel
from nas_gate.gating import choice_at, normalize_over_all, normalize_over_kept, standardized
from nas_gate.modules import Choice, Zero, copied, fresh
from nas_gate.structure import Structure
from nas_gate.structure.corrections import Corrections, Needs, correct, first_run
from nas_gate.structure.graph import found_in
from nas_gate.structure.trace import (
    gpus,
    macs_of,
    mode_of,
    output_tensors,
    owner_of,
    plain_operations,
    tensors_of,
    unchanged,
)

TOLERANCE = 1e-4
"""Largest allowed error between gated and removed model, relative to the largest output, in float32."""

AT_ONCE = 2**24
"""Elements of a tensor above which all its dimensions are cut at once; below, one after another is quicker."""

WIDE = 2**20
"""Elements of a linear layer's weight above which its closed columns are closed at the layer's input."""

DOUBT = 1e-5
"""A larger error is repeated in float64, where it must vanish below this: so rounding is told from a wrong cut."""


@dataclass(frozen=True)
class Cut:
    """What is kept, without reference to units: the slots of every cut dimension, and sizes without parameters.

    `slots` maps a parameter's or buffer's name to {dimension: kept indices}; `widths` maps the path of a module
    that keeps its input width as an attribute only to that width. `zeros` maps the path of a module of a closed
    branch to the size of the tuple that it gave (None: a tensor), `loose` names the branch's parameters in modules
    that stay, `choices` maps the path of a choice to the candidate that takes its place. `corrections` maps the path
    of a module, as it is after all that, to what its own code computes otherwise than the smaller model needs.
    """

    slots: Mapping[str, Mapping[int, tuple[int, ...]]]
    widths: Mapping[str, int]
    corrections: Mapping[str, Corrections] = field(default_factory=dict)
    zeros: Mapping[str, int | None] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    choices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Removed:
    """A removal: the smaller model, what was kept, its exact cost, and the largest relative error of the proof.

    The error is that of the model's own precision; where rounding alone exceeds `TOLERANCE` there (boxes that are
    sorted by nearly equal scores change places), it is that of float64.
    """

    model: nn.Module
    keep: Tensor
    cut: Cut
    macs: int
    params: int
    max_relative_error: float


Mend = Callable[[Any, Any, "int | None"], None]
"""(module after the cut, module before, kept width of its input or None): sets the sizes that the module keeps."""


def _mend_convolution(new: Any, old: Any, width: int | None) -> None:
    first, second = new.weight.shape[:2]
    groups = old.groups
    if groups > 1 and old.in_channels == groups:  # depthwise: whole groups go
        groups = first if old.transposed else first // (old.out_channels // groups)
    given, taken = (second * groups, first) if old.transposed else (first, second * groups)
    new.in_channels, new.out_channels, new.groups = taken, given, groups


def _mend_linear(new: Any, old: Any, width: int | None) -> None:
    new.out_features, new.in_features = new.weight.shape


def _mend_norm(new: Any, old: Any, width: int | None) -> None:
    known = new.weight if new.weight is not None else new.running_mean
    if known is not None:
        new.num_features = known.shape[0]
    elif width is not None:
        new.num_features = width


def _mend_group_norm(new: Any, old: Any, width: int | None) -> None:
    channels = width if new.weight is None else len(new.weight)
    if channels is not None:
        new.num_groups = channels if old.num_groups == old.num_channels else old.num_groups
        new.num_channels = channels


def _mend_layer_norm(new: Any, old: Any, width: int | None) -> None:
    if new.weight is not None:
        new.normalized_shape = tuple(new.weight.shape)
    elif width is not None:
        new.normalized_shape = (width,)


def _mend_embedding(new: Any, old: Any, width: int | None) -> None:
    new.num_embeddings, new.embedding_dim = new.weight.shape


def _mend_prelu(new: Any, old: Any, width: int | None) -> None:
    new.num_parameters = new.weight.shape[0]


def _mend_attention(new: Any, old: Any, width: int | None) -> None:
    packed = new.in_proj_weight is not None
    q, k, v = new.in_proj_weight.chunk(3) if packed else (new.q_proj_weight, new.k_proj_weight, new.v_proj_weight)
    new.embed_dim, new.kdim, new.vdim = q.shape[1], k.shape[1], v.shape[1]
    new.num_heads = len(q) // old.head_dim
    new._qkv_same_embed_dim = False  # keeps PyTorch's encoder layers from computing the attention themselves
    new.__class__ = HeadsAttention


def _mend_recurrent(new: Any, old: Any, width: int | None) -> None:
    new.input_size, new.hidden_size = new.weight_ih_l0.shape[1], new.weight_hh_l0.shape[1]
    if old.proj_size:
        new.proj_size, new.hidden_size = new.weight_hr_l0.shape


def _mend_cell(new: Any, old: Any, width: int | None) -> None:
    new.input_size, new.hidden_size = new.weight_ih.shape[1], new.weight_hh.shape[1]


def _mend_transformer(new: Any, old: Any, width: int | None) -> None:
    if isinstance(new.encoder, nn.TransformerEncoder):
        new.d_model = new.encoder.layers[0].linear1.weight.shape[1]


MENDS: dict[type[nn.Module], Mend] = {
    _ConvNd: _mend_convolution,
    nn.Linear: _mend_linear,
    _NormBase: _mend_norm,
    nn.GroupNorm: _mend_group_norm,
    nn.LayerNorm: _mend_layer_norm,
    nn.RMSNorm: _mend_layer_norm,
    nn.Embedding: _mend_embedding,
    nn.PReLU: _mend_prelu,
    nn.MultiheadAttention: _mend_attention,
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _mend_recurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _mend_cell),
    nn.Transformer: _mend_transformer,
}
"""How modules mend the sizes that they keep as attributes; users add their own types (subclasses are covered)."""

SIZED: tuple[type[nn.Module], ...] = (_InstanceNorm, nn.GroupNorm)
"""Modules that may keep their input width without any parameter of that size."""


def cut_of(structure: Structure, keep: Tensor) -> Cut:
    """The kept slots of every tensor for a boolean keep, shape (units,)."""
    structure.open_units(keep)  # checks shape and type
    kept = np.append(keep.cpu().numpy(), True)  # -1, the last entry: fixed slots stay
    closed = [part for part in structure.parts if not kept[part.unit]]
    gone = {tensor for part in closed for tensor in part.tensors}
    modules = {path: outputs for part in closed for path, outputs in part.modules}

    def stays(path: str) -> bool:
        return not any(parent in modules for parent in parents(path))

    slots: dict[str, dict[int, tuple[int, ...]]] = {}
    for s in structure.slots:
        index = np.flatnonzero(kept[s.units])
        if len(index) < len(s.units) and s.tensor not in gone:
            slots.setdefault(s.tensor, {})[s.dim] = tuple(index.tolist())
    rivals = {unit for choice in structure.choices for unit in choice.units}
    return Cut(
        slots,
        {w.tensor: int(kept[w.units].sum()) for w in structure.widths if not kept[w.units].all() and stays(w.tensor)},
        zeros={
            path: outputs
            for part in closed
            for path, outputs in part.modules
            if part.unit not in rivals and stays(path.rpartition(".")[0])
        },
        loose=tuple(name for part in closed for name in part.loose if stays(name)),
        choices={c.path: int(np.argmax(kept[list(c.units)])) for c in structure.choices if stays(c.path)},
    )


def parents(path: str) -> Iterator[str]:
    """The path itself, and those of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def cut_tensor(tensor: Tensor, slots: Mapping[int, Sequence[int]]) -> Tensor:
    """The kept slots of one tensor, a new tensor."""
    if not slots:
        return tensor.clone()
    kept = {d: torch.tensor(index, dtype=torch.int64, device=tensor.device) for d, index in slots.items()}
    if len(slots) == 1 or tensor.numel() <= AT_ONCE:
        for dim, index in kept.items():
            tensor = tensor.index_select(dim, index)
        return tensor
    # one gather over all cut dimensions: the weight is read once and nothing in between is allocated
    first, last = min(slots), max(slots)
    places = []
    for dim in range(first, last + 1):
        along = kept.get(dim, torch.arange(tensor.shape[dim], device=tensor.device))
        places.append(along.reshape([-1 if d == dim else 1 for d in range(first, last + 1)]))
    return tensor[(slice(None),) * first + tuple(places)]


def renamed(cut: Cut, name: str) -> str | None:
    """What a tensor or module is called after the cut; None where it is gone."""
    if name in cut.loose or any(path in cut.zeros for path in parents(name)):
        return None
    for path in sorted(cut.choices, key=len, reverse=True):  # the innermost first: paths are those before the cut
        inside = f"{path}.candidates."
        if name.startswith(inside):
            index, _, rest = name.removeprefix(inside).partition(".")
            if index != str(cut.choices[path]):
                return None
            name = f"{path}.{rest}" if rest else path
    return name


def name_before(cut: Cut, name: str) -> str:
    """What a module or tensor of the smaller model was called before the cut."""
    for path in sorted(cut.choices, key=len):  # the outermost first: paths are those before the cut
        if name == path or name.startswith(f"{path}."):
            name = f"{path}.candidates.{cut.choices[path]}{name.removeprefix(path)}"
    return name


def cut_model(model: nn.Module, cut: Cut) -> nn.Module:
    """A copy of the model with only the kept slots, and its modules' sizes mended. The model is left alone.

    Modules of closed branches are `Zero`, chosen candidates stand in their choices' places. Raises ValueError where
    the cut names a tensor or module that the model lacks or slots that it does not have.
    """
    tensors = _all_names(model)
    memo: dict[int, Any] = {}
    for name, slots in cut.slots.items():
        old = tensors.get(name)
        if old is None:
            raise ValueError(f"the cut names {name!r}, but {type(model).__name__} has no such parameter or buffer")
        for dim, index in slots.items():
            if not 0 <= dim < old.dim() or not index or min(index) < 0 or max(index) >= old.shape[dim]:
                raise ValueError(
                    f"the cut must keep slots that exist, but names dimension {dim} of {name!r} with slots up to "
                    f"{max(index, default=None)}, and its shape is {tuple(old.shape)}"
                )
        new = cut_tensor(old.detach(), slots)
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    small = copied(model, memo)
    before = dict(model.named_modules())
    with mode_of(small, training=False):  # reading a parametrized weight may change its buffers in training mode
        for path, module in small.named_modules():
            for kind in type(module).__mro__:
                if kind in MENDS:
                    MENDS[kind](module, before[path], cut.widths.get(path))
                    break
    if cut.zeros or cut.loose or cut.choices:
        small = _without(small, cut)
    for path, corrections in cut.corrections.items():
        correct(_module(small, path), corrections)
    return small


def _without(model: nn.Module, cut: Cut) -> nn.Module:
    """The model without closed branches and candidates that were not chosen; changed in place."""
    known = dict(model.named_modules(remove_duplicate=False))
    if strange := [p for p in (*cut.zeros, *cut.choices) if not p or p not in known]:
        raise ValueError(f"the cut names the module {strange[0]!r}, but {type(model).__name__} has none there")
    for name in cut.loose:
        path, _, attribute = name.rpartition(".")
        owner = known.get(path)
        if owner is None or (old := owner._parameters.pop(attribute, None)) is None:
            raise ValueError(f"the cut names {name!r}, but {type(model).__name__} has no such parameter")
        # of size 1 along every dimension: it only meets zeros, and has to broadcast with them
        owner.register_buffer(attribute, old.detach().new_zeros([1] * old.dim()), persistent=False)
    for path, outputs in cut.zeros.items():
        _put(model, path, Zero(outputs).train(model.training))
    for path in sorted(cut.choices, key=len, reverse=True):
        choice = known[path]
        if not isinstance(choice, Choice) or not 0 <= cut.choices[path] < len(choice.candidates):
            raise ValueError(f"the cut names candidate {cut.choices[path]} of {path!r}, but there is no such Choice")
        chosen = choice.candidates[cut.choices[path]]
        _put(model, path, chosen)
    return model


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._modules[name] = module


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the cut names the module {path!r}, but {type(model).__name__} has none") from None


def smaller(
    model: nn.Module, structure: Structure, keep: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, Cut]:
    """The smaller model for a boolean keep, shape (units,), and its cut, complete with corrections; without proof.

    Raises RemovalError where it does not run.
    """
    cut = cut_of(structure, keep)
    small = cut_model(model, cut)

    def run() -> Any:
        with _blaming(small):
            return _seeded(small, args, kwargs)

    with unchanged(small), mode_of(small, training=False), plain_operations():
        _, corrections = first_run(small, _needs(model, structure, cut, keep), run)
    return small, replace(cut, corrections=corrections)


def _needs(model: nn.Module, structure: Structure, cut: Cut, keep: Tensor) -> dict[str, Needs]:
    """By module of the model that `cut` leaves, the sizes and factors of its calls."""
    kept = np.append(keep.cpu().numpy(), True)  # -1, the last entry: fixed slots stay
    mended = {kind.forward for kind in MENDS}  # their own code gives the right sizes once they are mended
    sizes: dict[str, dict[str, list[int]]] = {}
    for given in structure.given:
        path, module = renamed(cut, given.path), model.get_submodule(given.path)
        if path is not None and ("forward" in vars(module) or type(module).forward not in mended):
            sizes.setdefault(path, {})[given.call] = [
                int(kept[given.units[i]].sum()) * (1 if n > 0 else -1) if i in given.units else n
                for i, n in enumerate(given.sizes)
            ]
    factors = {path: of for before, of in structure.factors.items() if (path := renamed(cut, before)) is not None}
    return {path: Needs(sizes.get(path, {}), factors.get(path, {})) for path in {**sizes, **factors}}


def _all_names(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def relative_error(a: Any, b: Any) -> float:
    """The largest difference of two outputs over the largest magnitude of `a`, tensor by tensor.

    inf where shapes differ, nan where an output is not finite.
    """
    left, right = output_tensors(a), output_tensors(b)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for x, y in zip(left, right):
        if x.numel() == 0:
            continue
        x, y = (t.double() if not t.is_complex() else torch.view_as_real(t).double() for t in (x, y))
        scale = float(x.abs().max())
        error = float((x - y).abs().max())
        if not np.isfinite(scale + error):
            return float("nan")
        worst = max(worst, error / scale if scale > 0 else error)
    return worst


def informative(model: nn.Module) -> dict[str, Tensor]:
    """Random values for the tensors of one constant value (fresh norms, zero-initialised branches), by name.

    Left as they are, a zero branch or a fresh batch norm would hide a wrong cut from a comparison of outputs.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {n for n, m in model.named_modules() if isinstance(m, _NormBase)}
    result = {}
    for name, tensor in tensors_of(model).items():
        learned = isinstance(tensor, nn.Parameter) or name.rpartition(".")[0] in norms
        if not learned or not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        value = tensor.detach()
        first = value.flatten()[0]
        if bool((value.flatten()[:8] == first).all()) and bool((value == first).all()):
            noise = torch.rand(tensor.shape, generator=generator, device="cpu").to(value)
            scale = float(first)
            result[name] = scale * (0.5 + noise) if abs(scale) > 1e-2 else 0.6 * noise - 0.3
    return result


@contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values in its tensors for a while."""
    own = tensors_of(model)
    before = {n: own[n].data for n in tensors}
    try:
        for name in before:
            own[name].data = tensors[name]
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


@dataclass(frozen=True)
class Trial:
    """A smaller model with its cut, compared with the gated one, and its counted cost.

    `error` is the relative error in the model's own precision, `exact` that in float64 where `error` raised a doubt
    and the model can compute in float64. `predicted` and `counted` are costs by metric; where `varies`, the gated
    model's own MACs are others than when it was analysed, for they depend on data (boxes found, experts chosen).
    `thin` are cuts that leave a single unit of a group: torch.einsum over one multiplies without counting.
    """

    model: nn.Module
    cut: Cut
    error: float
    exact: float | None
    predicted: Mapping[str, int]
    counted: Mapping[str, int]
    varies: bool
    thin: bool


class RemovalError(RuntimeError):
    """The removed model is not what the gated one promised; `path` is the module that failed, where one did."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


def try_cut(
    model: nn.Module,
    structure: Structure,
    cut: Cut,
    keep: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Trial:
    """Cut the model, find what its modules' own code needs corrected, and compare with the gated model.

    Both are compared in evaluation mode. Tensors without information are made random for both meanwhile, so that
    statistics of norms are never trivial. Raises RemovalError where the smaller model does not run, in evaluation mode
    or in training mode, in which only the model itself may fail as well (it may want targets then).
    """
    small = cut_model(model, cut)
    random, own = informative(model), tensors_of(small)
    names = {id(t): name for name, t in tensors_of(model).items()}
    smaller = {}
    for alias, tensor in _all_names(model).items():
        name, new = names[id(tensor)], renamed(cut, alias)
        if name in random and new in own:
            smaller[new] = cut_tensor(random[name], cut.slots.get(name, {}))

    def run() -> tuple[Any, int]:
        with _blaming(small), _Counter() as counter:
            return _seeded(small, args, kwargs), counter.macs

    with ExitStack() as exits:
        for network, tensors in ((model, random), (small, smaller)):
            exits.enter_context(_holding(network, tensors))
            exits.enter_context(unchanged(network))
            exits.enter_context(mode_of(network, training=False))
        with plain_operations():
            (got, macs), corrections = first_run(small, _needs(model, structure, cut, keep), run)
            _try_training(model, small, args, kwargs)
            with closed(model, structure, keep) as gated:
                error = relative_error(_seeded(model, args, kwargs, gated), got)
            exact = None if error <= DOUBT else _exact_error(model, small, structure, keep, args, kwargs)
            cost = CostModel(structure)
            predicted = {m: round(float(cost(keep.cpu(), m))) for m in METRICS}
            varies = macs != predicted["macs"] and _cost_now(model, structure, keep, args, kwargs) != cost.total()
        if cut.zeros:  # code that is only run where layers may be fused looks into modules that have gone
            with torch.no_grad(), _blaming(small):
                _seeded(small, args, kwargs)
    counted = {"macs": macs, "params": sum(p.numel() for p in small.parameters())}
    thin = 1 in structure.open_units(keep)
    return Trial(small, replace(cut, corrections=corrections), error, exact, predicted, counted, varies, thin)


def _cost_now(
    model: nn.Module, structure: Structure, keep: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int:
    """MACs of the gated model, which does not get smaller: those of the dense one unless they depend on data.

    Of a choice all candidates run, so there they cannot be told: those of the dense model, too.
    """
    if structure.choices:
        return round(CostModel(structure).total())
    with closed(model, structure, keep) as gated, _Counter() as counter:
        _seeded(model, args, kwargs, gated)
    return int(counter.macs)


def _try_training(model: nn.Module, small: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """RemovalError where the smaller model fails in training mode, and the model itself does not."""
    try:
        with mode_of(small, training=True), _blaming(small):
            _seeded(small, args, kwargs)
    except RemovalError:
        try:
            with mode_of(model, training=True):
                _seeded(model, args, kwargs)
        except Exception:  # nor does the model run so: it may want targets, and raise whatever it likes
            return
        raise


def _seeded(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], call: Callable[..., Any] | None = None
) -> Any:
    """What the model gives, or `call` in its place, from the same random state every time."""
    # not torch.manual_seed, which would also seed devices whose state nobody gives back
    for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in gpus(model))):
        generator.manual_seed(0)
    args, kwargs = fresh((tuple(args), dict(kwargs)))
    return (call or model)(*args, **kwargs)


def _exact_error(
    model: nn.Module,
    small: nn.Module,
    structure: Structure,
    keep: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> float | None:
    """The relative error in float64; None where one remains and the model does not compute in float64 throughout."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(wide, (tuple(args), dict(kwargs)))
    narrow = _Narrow()
    with ExitStack() as exits:
        for network in (model, small):
            exits.enter_context(_holding(network, {n: wide(t.data) for n, t in tensors_of(network).items()}))
        try:
            with narrow:
                got = _seeded(small, args, kwargs)
            with closed(model, structure, keep) as gated:
                expected = _seeded(model, args, kwargs, gated)
        except RuntimeError:  # operands of two precisions: the model makes tensors of its own
            return None
        error = relative_error(expected, got)
    return None if narrow.seen and not error <= DOUBT else error


class _Counter(TorchDispatchMode):
    """Counts multiply-accumulates as FlopCounterMode does, in less time than that takes for a sum by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.macs += macs_of(func, args, kwargs or {}, out)
        return out


class _Narrow(TorchDispatchMode):
    """Notes whether any operation gives floating-point numbers narrower than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                self.seen = True
        return out


@contextmanager
def closed(model: nn.Module, structure: Structure, keep: Tensor) -> Iterator[Callable[..., Any]]:
    """What the model's gated self computes for a boolean keep, shape (units,), to be called like the model.

    Weights are replaced as in training, so that a module which reads its own in another way shows.
    """
    own = tensors_of(model)
    kept = np.append(keep.cpu().numpy(), True)  # -1, the last entry: slots without a gate
    weights: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    norms = [(model.get_submodule(n.path), n, torch.from_numpy(kept[n.units])) for n in structure.norms]
    choices = [(choice_at(model, c.path), torch.from_numpy(kept[list(c.units)]).float()) for c in structure.choices]
    rows = {(n.standardizes, n.dim) for n in structure.norms}
    for gate in structure.gates:
        weight = weights.get(gate.tensor, own[gate.tensor].data)
        mask = torch.from_numpy(kept[gate.units]).to(weight)
        if gate.dim == 1 and weight.numel() > WIDE and type(model.get_submodule(owner_of(gate.tensor))) is nn.Linear:
            columns[gate.tensor] = mask
            continue
        mask = mask.reshape([-1 if d == gate.dim else 1 for d in range(weight.dim())])
        by_row = (gate.tensor, gate.dim) in rows
        weights[gate.tensor] = standardized(weight, mask) if by_row else weight * mask
    scales = {n.weight: over.double().mean().sqrt() for _, n, over in norms if n.weight is not None}
    for name, scale in scales.items():
        weight = weights.get(name, own[name].data)
        weights[name] = weight * scale.to(weight)
    inputs = _ClosedInputs({id(weights.get(name, own[name])): mask for name, mask in columns.items()})
    like = next((t for t in own.values() if t.is_floating_point()), torch.zeros((), device="cpu"))
    with ExitStack() as exits:
        for choice, open_ in choices:
            exits.callback(setattr, choice, "keep", choice.keep)
            choice.keep = open_.to(like.device)
        for module, norm, over in norms:
            normalize_over_kept(module, norm, over.to(like.device, torch.promote_types(like.dtype, torch.float32)))
            exits.callback(normalize_over_all, module)
        if inputs.masks:
            exits.callback(inputs.restore)
            exits.enter_context(inputs)
        yield lambda *args, **kwargs: functional_call(model, weights, args, kwargs)


class _ClosedInputs(TorchFunctionMode):
    """Closes columns of large weights at the input of their layers, which is quicker than a copy of the weight.

    With k the mask, x (W diag(k))^T = (x diag(k)) W^T. A weight that any other function takes is masked after all.
    """

    def __init__(self, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.masks = masks
        """By the identity of the weight, of shape (columns,)."""
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and id(args[1]) in self.masks and id(args[0]) not in self.masks:
            return func(args[0] * self.masks[id(args[1])], *args[1:], **kwargs)
        for leaf in found_in((*args, *kwargs.values()), Tensor):
            mask = self.masks.pop(id(leaf), None)
            if mask is not None:
                self._before.append((leaf, leaf.data))
                leaf.data = leaf.data * mask
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Give masked weights back as they were."""
        for weight, data in self._before:
            weight.data = data


@contextmanager
def _blaming(model: nn.Module) -> Iterator[None]:
    """Turn an exception into a RemovalError that names the innermost module that did not finish."""
    names = {m: n for n, m in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names.get(module, running[-1] if running else ""))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    with ExitStack() as exits:
        exits.callback(register_module_forward_pre_hook(enter).remove)
        exits.callback(register_module_forward_hook(leave).remove)
        try:
            yield
        except Exception as error:
            path = running[-1] if running else ""
            where = f" in {path}" if path else ""
            message = " ".join(str(error).split()) or "no message; sizes that a module keeps: see nas_gate.MENDS"
            raise RemovalError(
                f"the smaller model fails{where}: {type(error).__name__}: {message[:300]}", path
            ) from error


def check(trial: Trial) -> None:
    """Raise RemovalError unless the trial agrees with the gated model and with the predicted cost."""
    precision, error, allowed = "", trial.error, TOLERANCE
    if trial.exact is not None:
        precision, error, allowed = " in float64", trial.exact, DOUBT
    if not error <= allowed:
        raise RemovalError(
            f"the removed model must compute what the gated one does, but the largest relative error is "
            f"{error:.3g}{precision} (allowed: {allowed:g})"
        )
    predicted, counted = trial.predicted, trial.counted
    macs_may_differ = trial.varies or (trial.thin and counted["macs"] < predicted["macs"])
    if any(predicted[m] != counted[m] and not (m == "macs" and macs_may_differ) for m in METRICS):
        raise RemovalError(f"the removed model must cost what was predicted, but {predicted=} and {counted=}")


def remove_units(
    model: nn.Module, structure: Structure, keep: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Removed:
    """Remove what `keep`, boolean of shape (units,), leaves out, and prove it.

    The proof: gated and removed model agree on the example inputs (evaluation mode, non-trivial statistics), and the
    removed model costs exactly what the cost model says. Raises RemovalError otherwise. Where the cost depends on data
    (boxes found, experts chosen), it is that of the removed model, and a warning says so.
    """
    open_units = structure.open_units(keep)
    few = [f"{n} of {g.name} (at least {g.least})" for g, n in zip(structure.groups, open_units) if n < g.least]
    if few:
        raise ValueError(f"at least one unit of every group must be kept, of some more, but kept are {', '.join(few)}")
    wrong = [c.path for c in structure.choices if int(keep[list(c.units)].sum()) != 1]
    if wrong:
        raise ValueError(f"exactly one candidate of every choice must be kept, but that is not so in {wrong}")
    trial = try_cut(model, structure, cut_of(structure, keep), keep, args, kwargs)
    check(trial)
    if trial.varies:
        warnings.warn(
            f"nas-gate: the MACs of {type(model).__name__} depend on its data: {trial.predicted['macs']} were "
            f"predicted from the run that was analysed, {trial.counted['macs']} are those of the removed model now",
            stacklevel=2,
        )
    error = trial.error if trial.exact is None or trial.error <= TOLERANCE else trial.exact
    return Removed(trial.model, keep.cpu().clone(), trial.cut, trial.counted["macs"], trial.counted["params"], error)
