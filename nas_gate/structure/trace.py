"""One run of the model on its example inputs, with labels carried along by every ATen operation.

The run is eager, under a dispatch mode: any model that runs can be read, whatever its control flow. Rules only
*collect* what must hold (equalities, fixed labels, prices, places for gates); `units.py` solves it at once.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from nas_gate.modules import Choice
from nas_gate.structure import labels as lb
from nas_gate.structure.graph import Graph, Node, Ref, found_in
from nas_gate.structure.labels import Track, Value
from nas_gate.structure.sizes import CONSTANTS, Calls, watched, with_totals

KERNEL = "has it as the extent of its kernel"
"""The reason of kernel dimensions, which nobody would look for among the fixed channels."""


WIDTH, BRANCH, CHOICE = "width", "branch", "choice"
"""Kinds of units: slots of tensors, residual branches, candidates of choices."""


@dataclass(frozen=True)
class Labelled:
    """One labelled dimension of one parameter or buffer: slot i carries the label `start + i`."""

    name: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Price:
    """Multiply-accumulates of one operation: `coefficient` times the product of its axes' kept sizes.

    Every axis is (size, dimension, tracks that vary over that dimension).
    """

    where: str
    op: str
    coefficient: int
    axes: tuple[tuple[int, int, tuple[Track, ...]], ...]


@dataclass(frozen=True)
class Movement:
    """A movement whose arguments may not fit a cut tensor: `run(cut labels)` must equal the cut of `after`."""

    before: Tensor
    after: Tensor
    run: Callable[[Tensor], Tensor]
    reason: str


@dataclass(frozen=True)
class Crossing:
    """A value is joined with one that has labels over some of its dimensions only, and size 1 over the others.

    Where the units of the wide one run over those dimensions, the two are equal place by place; where other operations
    let them run over others alone (heads of attention), what is narrow meets all units alike: fixed with the reason.
    """

    wide: Tensor
    narrow: Tensor
    reason: str


@dataclass(frozen=True)
class Switch:
    """A branch, or a candidate of a choice: one unit, with what goes when it closes.

    `tensors` are the parameters and buffers that go, `weights` those whose product with the unit's gate makes its
    result zero (with their sizes along dimension 0), `prices` the indices in `Findings.prices` of its operations.
    `modules` go with the unit, each with the size of the tuple that it gives (None: a tensor), `loose` are parameters
    of modules that stay.
    """

    kind: str
    name: str
    path: str
    label: int
    modules: tuple[tuple[str, int | None], ...]
    loose: tuple[str, ...]
    tensors: tuple[str, ...]
    weights: tuple[tuple[str, int], ...]
    prices: frozenset[int]


@dataclass(frozen=True)
class Normed:
    """A module whose statistics run over the slots along dimension `dim` of its input.

    A layer norm is `centred` (its mean is taken away), an RMS norm is not. `weight` names the parameter that scales its
    result before anything is added to it; None where nothing is. `groups` are those of a group norm, whose statistics
    run over all places of a group, too (0: over the slots of one place).
    """

    dim: int
    labels: Tensor
    centred: bool
    weight: str | None
    groups: int = 0


@dataclass(frozen=True)
class Given:
    """The sizes that a module's own code gave to a call; for those of dimensions with labels, (dimension, tracks)."""

    path: str
    call: str
    sizes: tuple[int, ...]
    tracks: Mapping[int, tuple[int, tuple[Track, ...]]]


@dataclass
class Findings:
    """What one or several runs have found; labels are those of `slots`."""

    slots: list[Labelled] = field(default_factory=list)
    count: int = 0
    equal: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    tracks: list[Tensor] = field(default_factory=list)
    movements: list[Movement] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    gated: list[Tensor] = field(default_factory=list)
    prices: list[Price] = field(default_factory=list)
    widths: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Normed] = field(default_factory=dict)
    """Layer and RMS norms over units, by path."""
    standardized: set[str] = field(default_factory=set)
    """Weights that are used less the mean of every row (dimension 0), over its standard deviation."""
    normalized: set[str] = field(default_factory=set)
    """Weights that are used over the norm of every row."""
    means: list[tuple[str, Tensor, str]] = field(default_factory=list)
    """Means over units: of which module, over which labels, and why those are fixed if it is no centred norm."""
    entering: dict[str, Value] = field(default_factory=dict)
    """The input of every module that may be a norm: of every one without parts, and of norms with an activation."""
    given: list[Given] = field(default_factory=list)
    """Sizes that modules' own code gave to calls, in order."""
    factors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Numbers that tensors were multiplied by, by module and call."""
    parameters: dict[str, int] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)
    """The dataflow of the run in evaluation mode."""
    switches: list[Switch] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)
    """Branches that cannot be units: kind, name and reason."""
    macs: int = 0

    def label(self, name: str, shape: Sequence[int]) -> tuple[Track, ...]:
        """Fresh labels for every dimension of one tensor; a dimension of size 1 has nothing to choose."""
        self.slots += [
            Labelled(name, dim, self.count + sum(s for s in shape[:dim] if s > 1), size)
            for dim, size in enumerate(shape)
            if size > 1
        ]
        return self.labels(shape, weight=True)

    def labels(self, shape: Sequence[int], weight: bool = False) -> tuple[Track, ...]:
        """Fresh labels for every dimension of a value, without slots of their own."""
        tracks = []
        for dim, size in enumerate(shape):
            if size > 1:
                ids = torch.arange(self.count, self.count + size, device="cpu")
                self.count += size
                tracks.append(Track(ids.reshape([size if d == dim else 1 for d in range(len(shape))]), weight))
        return tuple(tracks)

    def switch(self) -> int:
        """The label of a new unit without slots; its gate is no weight's slots but whole weights."""
        self.count += 1
        self.gated.append(torch.tensor([self.count - 1], device="cpu"))
        return self.count - 1

    def fix(self, labels: Tensor, reason: str) -> None:
        """Declare that no slot among `labels` can be removed."""
        labels = labels[labels >= 0]
        if labels.numel():
            self.fixed.append((labels.flatten(), reason))

    def fix_below(self, path: str, reason: str) -> None:
        """Declare that no slot of the parameters of the module at `path` can be removed."""
        for s in self.slots:
            if s.name.startswith(f"{path}.") or not path:
                self.fix(torch.arange(s.start, s.start + s.size, device="cpu"), reason)

    def equate(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Declare that labels in the same place (after broadcasting) stand or fall together.

        Where only one of the two has a label, it is fixed with `reason`.
        """
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0)
        if bool(both.all()):
            self.equal.append((a.flatten(), b.flatten()))
            return
        self.equal.append((a[both], b[both]))
        self.fix(a[b < 0], reason)
        self.fix(b[a < 0], reason)


class Call:
    """One operation of the run, as its rule sees it: arguments by their schema names, values, and findings."""

    def __init__(
        self,
        op: Any,
        arguments: dict[str, Any],
        out: Any,
        where: str,
        values: _Values,
        findings: Findings,
        graph: Graph,
    ) -> None:
        self.op, self.arguments, self.out, self.where = op, arguments, out, where
        self._values, self.findings, self._graph = values, findings, graph

    @property
    def name(self) -> str:
        """The operation and the module that ran it, for reasons."""
        return f"{self.op.overloadpacket} in {self.where}" if self.where else str(self.op.overloadpacket)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def value(self, tensor: Any) -> Value:
        """The value of one tensor argument (without tracks when it is None)."""
        return Value(()) if tensor is None else self._values.of(tensor)

    def made(self, tensor: Tensor) -> Node:
        """The operation that gave a tensor argument, or its leaf."""
        return self._graph.made(tensor)

    def node(self, argument: Any) -> Node:
        """The operation that gave an argument of a node, or its leaf; an empty one for what is no tensor."""
        return self._graph.nodes[argument.node] if isinstance(argument, Ref) else Node()

    def tensors(self) -> list[Tensor]:
        """All tensor arguments in order."""
        return found_in(self.arguments.values(), Tensor)

    def outputs(self) -> list[Tensor]:
        """All tensor results in order."""
        return found_in((self.out,), Tensor)

    def fix(self, labels: Tensor, because: str) -> None:
        """Fix labels; `because` follows the operation's name in the reason."""
        self.findings.fix(labels, f"{self.name} {because}")

    def equate(self, a: Tensor, b: Tensor) -> None:
        """Equate labels place by place; a label that meets an element without one is fixed."""
        self.findings.equate(a, b, f"{self.name} joins it with a tensor that has no units there")

    def cross(self, wide: Tensor, narrow: Tensor) -> None:
        """Join labels with others that vary over some of the same dimensions only."""
        self.findings.crossings.append(Crossing(wide, narrow, f"{self.name} repeats it for every unit"))

    def gate(self, labels: Tensor) -> None:
        """Say that a gate on these slots of a weight removes what they consume."""
        self.findings.gated.append(labels.flatten())

    def price(self, coefficient: int, *axes: tuple[int, int, tuple[Track, ...]]) -> None:
        """Record the operation's multiply-accumulates."""
        self.findings.prices.append(Price(self.where, str(self.op.overloadpacket), coefficient, axes))

    def moves(self, before: Tensor, after: Tensor, run: Callable[[Tensor], Tensor], because: str) -> None:
        """Ask for a check that this movement commutes with cutting."""
        self.findings.movements.append(Movement(before, after, run, f"{self.name} {because}"))


Rule = Callable[[Call], "Sequence[Sequence[Track]]"]
"""An operator's rule: reads a call, declares what must hold, returns the tracks of every tensor result."""


class _Values:
    """Values of live tensors."""

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Value:
        value: Value | None = self._of.get(tensor)
        return Value(tuple(tensor.shape)) if value is None else value

    def set(self, tensor: Tensor, value: Value) -> None:
        self._of[tensor] = value


@cache
def _defaults(func: Any) -> dict[str, Any]:
    """The arguments of an ATen operation by their schema names, with what they are where none is given."""
    return {a.name: a.default_value for a in func._schema.arguments}


class _Recorder(TorchDispatchMode):
    """Runs every operation as it is, then its rule."""

    def __init__(
        self,
        values: _Values,
        findings: Findings,
        rules: Mapping[Any, Rule],
        default: Rule,
        where: Callable[[], str],
        touched: set[int],
        graph: Graph,
    ) -> None:
        super().__init__()
        self.values, self.findings, self.touched, self.graph = values, findings, touched, graph
        self.rules, self.default, self.where = rules, default, where
        self.demands: tuple[list[Any], ...] = (findings.fixed, findings.movements, findings.means)
        self.pending: Any = WeakTensorKeyDictionary()
        """What an operation has added to those, by its results: what nobody looks at demands nothing."""

    def used(self, tensor: Tensor) -> None:
        """A result is looked at: what it demands holds."""
        for demands, own in zip(self.demands, self.pending.pop(tensor, ())):
            demands += own
            own.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        defaults = _defaults(func)
        arguments = {**defaults, **dict(zip(defaults, args)), **kwargs}
        call = Call(func, arguments, None, self.where(), self.values, self.findings, self.graph)
        inputs = call.tensors()
        before = [self.values.of(t) for t in inputs]
        self.touched.update(map(id, inputs))
        references, first = self.graph.references(arguments), len(self.findings.prices)
        for tensor in inputs:
            self.used(tensor)
        known = [len(demands) for demands in self.demands]
        call.out = func(*args, **kwargs)
        packet = func.overloadpacket
        macs = macs_of(func, args, kwargs, call.out)
        self.findings.macs += macs
        outputs = call.outputs()
        if any(v.tracks for v in before) or packet.__name__ in CONSTANTS:
            rule = self.rules.get(func, self.rules.get(packet, self.default))
            try:
                results = rule(call)
            except Exception as error:
                if any(t.is_meta for t in inputs):
                    raise  # with values it may work
                # a defect of the rule, which the reason shows
                del self.findings.prices[first:]
                for track in (track for value in before for track in value.tracks):
                    call.fix(track.labels, f"has a rule that failed: {type(error).__name__}: {error}")
                results = [()] * len(outputs)
        else:
            results = [()] * len(outputs)
        if macs and len(self.findings.prices) == first:  # nothing is known of its units: it costs what it costs
            call.price(macs)
        prices = range(first, len(self.findings.prices))
        self.graph.record(packet, call.where, references, outputs, prices, macs)
        why = next((v.why for v in before if not v.tracks and v.why != Value(()).why), None)
        if any(v.tracks for v in before):
            why = f"{call.name} comes before"
        for tensor, tracks in zip(outputs, results):
            kept = tuple(self._lasting(t, call) for t in tracks)
            value = Value(tuple(tensor.shape), tuple(t for t in kept if t is not None))
            self.values.set(tensor, dataclasses.replace(value, why=why) if why else value)
        if outputs and not func._schema.is_mutable:
            own = tuple(demands[start:] for demands, start in zip(self.demands, known))
            for demands, start in zip(self.demands, known):
                del demands[start:]
            for tensor in outputs:
                self.pending[tensor] = own
        return call.out

    def _lasting(self, track: Track, call: Call) -> Track | None:
        """The track, unless it is the same label everywhere: what one unit alone decides is fixed."""
        labels = track.labels
        if labels.numel() == 0:
            return None
        if len(track.dims) == 0:
            call.fix(labels, "picks a single slot")
            return None
        if len(track.dims) > 1:
            self.findings.tracks.append(labels)
        return track


@contextmanager
def _paths(
    model: nn.Module,
    on_call: Callable[[str, nn.Module, tuple[Any, ...]], None],
    on_return: Callable[[str, Any], None],
) -> Iterator[Callable[[], str]]:
    """The path of the module that runs now, by hooks on all modules."""
    names = {m: n for n, m in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        stack.append(names.get(module, stack[-1] if stack else ""))
        on_call(stack[-1], module, args)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        on_return(stack.pop(), out)

    with ExitStack() as exits:
        exits.callback(register_module_forward_pre_hook(enter).remove)
        exits.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield lambda: stack[-1] if stack else ""


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model into evaluation or training mode (norms stay in evaluation mode) and back again."""
    before = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in before:
            m.training = training and not isinstance(m, _NormBase)
        yield
    finally:
        for m, was in before:
            m.training = was


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give buffers and the random state back as they were."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    objects = [(m._buffers, dict(m._buffers)) for m in model.modules() if m._buffers]  # a forward may assign new ones
    with torch.random.fork_rng(devices=gpus(model)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for table, entries in objects:
                table.update(entries)


def gpus(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that the model's tensors lie on."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


@contextmanager
def all_candidates(model: nn.Module) -> Iterator[None]:
    """Let every choice run all its candidates and give their sum."""
    before = [(m, m.keep) for m in model.modules() if isinstance(m, Choice)]
    try:
        for choice, _ in before:
            device = next((t.device for t in (*choice.parameters(), *model.parameters())), None)
            choice.keep = torch.ones(len(choice.candidates), device=device)
        yield
    finally:
        for choice, keep in before:
            choice.keep = keep


# not by the older flags, such as allow_tf32: PyTorch refuses to read them once anybody has set one of these
_FLOAT32: tuple[Any, ...] = tuple(
    getattr(backend, kind)
    for backend, kinds in (
        (torch.backends.cuda, ("matmul",)),
        (torch.backends.cudnn, ("conv", "rnn")),
        (torch.backends.mkldnn, ("matmul", "conv", "rnn")),
    )
    for kind in kinds
)


class _StepByStep(TorchFunctionMode):
    """Runs an LSTM as the operations that it consists of, not as the single one of oneDNN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "lstm":
            return func(*args, **(kwargs or {}))
        backend: Any = torch.backends.mkldnn
        before = backend.enabled
        backend.enabled = False
        try:
            return func(*args, **(kwargs or {}))
        finally:
            backend.enabled = before


@contextmanager
def plain_operations() -> Iterator[None]:
    """No gradients, attention and recurrence in parts: what runs are operations that the rules know, and are counted.

    Full float32 precision everywhere: TF32 and bfloat16 would hide small errors and make up others.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    precisions = [part.fp32_precision for part in _FLOAT32]
    torch.backends.mha.set_fastpath_enabled(False)
    for part in _FLOAT32:
        part.fp32_precision = "ieee"
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
            _StepByStep(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, precision in zip(_FLOAT32, precisions):
            part.fp32_precision = precision


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter and buffer by its first name."""
    seen: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=True), *model.named_buffers(remove_duplicate=True)]
    for name, tensor in named:
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            result[name] = tensor
    return result


def owner_of(name: str) -> str:
    """The path of the module that a tensor belongs to; a parametrized one belongs to the module that it is made for."""
    owner, parametrized, _ = f".{name}".partition(".parametrizations.")
    return owner[1:] if parametrized else name.rpartition(".")[0]


def macs_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-accumulates of one ATen call that gave `out`, by PyTorch's table; 0 where it has no entry."""
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) // 2 if count else 0


def output_tensors(out: Any) -> list[Tensor]:
    """All tensors of a model's output (nested tuples, lists, dicts, dataclasses).

    Raises TypeError for an object whose tensors cannot be found.
    """
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(output_tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)]))
        elif isinstance(leaf, Mapping):
            found.extend(output_tensors(list(leaf.values())))
        elif leaf is not None and not isinstance(leaf, (int, float, complex, str, bytes)):
            raise TypeError(
                f"the model's output holds a {type(leaf).__name__}, whose tensors cannot be found: return tensors in "
                "tuples, lists, dicts or dataclasses, or register the class with torch.utils._pytree"
            )
    return found


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output on its example inputs; a ValueError that says why where the model rejects them."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        got = [tuple(a.shape) for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        raise ValueError(
            f"the model must run on its example inputs, but {type(model).__name__} rejects tensors of shapes {got}: "
            f"{type(error).__name__}: {error}"
        ) from error


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rules: Mapping[Any, Rule],
    default: Rule,
    sized: tuple[type[nn.Module], ...] = (),
) -> Findings:
    """Run the model in evaluation mode and collect what its operations demand.

    Where that run leaves parameters unused, a second run in training mode adds what only training uses.
    `sized` names module types whose input width (dimension 1) is to be recorded.
    """
    findings = Findings()
    tensors = tensors_of(model)
    tracked = {n: findings.label(n, t.shape) for n, t in tensors.items() if t.is_floating_point()}

    def once(training: bool, graph: Graph) -> set[str]:
        values = _Values()
        for name, tensor in tensors.items():
            graph.leaf(tensor, name)
        for name, tracks in tracked.items():
            values.set(tensors[name], Value(tuple(tensors[name].shape), tracks))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                values.set(leaf, Value(tuple(leaf.shape), (), "it is an input of the model"))

        widths: dict[str, Tensor] = {}

        def width(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, sized) and inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 1:
                for track in values.of(inputs[0]).over(1):
                    widths[path] = track.labels  # looked at later: here `watched` would take it for the model's code
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or not module._modules:
                known = inputs and isinstance(inputs[0], Tensor)
                findings.entering[path] = values.of(inputs[0]) if known else Value(())

        def given(path: str, call: str, sizes: list[int], places: list[tuple[Tensor, int]]) -> None:
            tracks = {
                i: (dim, tuple(Track(lb.part(t.labels, dim, sizes[i])) for t in over))
                for i, (tensor, dim) in enumerate(places)
                if (over := values.of(tensor).over(dim))
            }
            findings.given.append(Given(path, call, tuple(sizes), tracks))

        def factor(path: str, call: str, value: float) -> float:
            findings.factors.setdefault(path, {}).setdefault(call, value)
            return value

        touched: set[int] = set()
        with ExitStack() as exits:
            for context in (unchanged(model), mode_of(model, training), all_candidates(model), plain_operations()):
                exits.enter_context(context)
            where = exits.enter_context(_paths(model, width, graph.module))
            if not training:
                exits.enter_context(watched(model, Calls(model, lambda path, call, sizes: sizes, factor, given)))
            recorder = exits.enter_context(_Recorder(values, findings, rules, default, where, touched, graph))
            out = run(model, args, kwargs)
        findings.widths.update({path: lb.axis(labels, 1) for path, labels in widths.items()})
        for tensor in output_tensors(out):
            graph.result(tensor)
            recorder.used(tensor)
            for track in values.of(tensor).tracks:
                findings.fix(track.labels, "it is an output of the model")
        return {n for n, t in tensors.items() if id(t) in touched}

    used = once(False, findings.graph)
    _name_calls(findings)
    findings.parameters = {n: p.numel() for n, p in model.named_parameters()}
    unused = findings.parameters.keys() - used
    if unused:
        macs, prices = findings.macs, list(findings.prices)
        try:
            used |= once(True, Graph())
        except ValueError as error:
            warnings.warn(
                f"nas-gate: {len(unused)} parameters are not used in evaluation mode, and the training mode "
                f"could not be read: {error}",
                stacklevel=2,
            )
        findings.macs, findings.prices = macs, prices
    _complete_norms(findings, model)
    for slots in findings.slots:
        if slots.name not in used:
            findings.fix(
                torch.arange(slots.start, slots.start + slots.size, device="cpu"), "the example inputs do not reach it"
            )
    return findings


def _name_calls(findings: Findings) -> None:
    """Let the names of calls say how many there are at their places."""
    calls: dict[str, list[str]] = {path: list(of) for path, of in findings.factors.items()}
    for given in findings.given:
        calls.setdefault(given.path, []).append(given.call)
    names = {path: with_totals(dict.fromkeys(of)) for path, of in calls.items()}
    findings.given = [dataclasses.replace(g, call=names[g.path][g.call]) for g in findings.given]
    findings.factors = {path: {names[path][c]: f for c, f in of.items()} for path, of in findings.factors.items()}


def _complete_norms(findings: Findings, model: nn.Module) -> None:
    """Of norms that are written out: fix means that belong to none, and find the weight where there is more than that.

    Without one all that a module gives is scaled, which is wrong where it adds a bias: then the trial fails.
    """
    for path, labels, reason in findings.means:
        if path not in findings.norms or not findings.norms[path].centred:
            findings.fix(labels, reason)
    for path, norm in findings.norms.items():
        own = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
        if norm.weight is None and len(own) > 1:
            scales = [name for name in own if findings.graph.multiplies(name)]
            if len(scales) == 1:
                findings.norms[path] = dataclasses.replace(norm, weight=scales[0])
