"""Units of depth and of choice, found in the dataflow of the run: residual branches, candidates of a `Choice`.

A *branch* is one operand of an addition that is computed from the other one, the shortcut (or a summand of it), of
equal shape, by operations whose results go nowhere else. Closing it leaves the shortcut. Two things are needed for
that, and what lacks one is not offered, with the reason:

- a gate: parameters at the branch's end whose product with 0 makes it exactly zero (the weight and bias of its last
  norm, convolution or linear layer, a layer scale), through operations that leave zeros zero: `VANISHES` says for
  every operation which arguments have to be zero.
- a cut: modules that run inside the branch alone. They give way to `Zero`, all of their parameters go, and parameters
  of other modules that only the branch uses (a layer scale) go with them. Nothing outside of those modules may cost
  multiply-accumulates, for it would go on running.

A candidate of a choice goes as a whole, and its gate is the choice's own: nothing of this is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from nas_gate.modules import Choice
from nas_gate.structure.graph import Graph, Ref, under
from nas_gate.structure.trace import BRANCH, CHOICE, Findings, Switch

aten = torch.ops.aten


ADDITIONS = (aten.add, aten.add_)


class Unfit(Exception):
    """Why a branch cannot be a unit."""


@dataclass(frozen=True)
class Zeros:
    """An operation's result is zero when one of its arguments `factors` is (if it has any) and all of `summands` are.

    A summand that is None is zero, a factor that is None is none. An argument that is a list is zero when all of it is.
    """

    factors: tuple[str, ...] = ()
    summands: tuple[str, ...] = ()


def _vanishes() -> dict[Any, Zeros]:
    table: dict[Any, Zeros] = {}

    def add(zeros: Zeros, *names: str) -> None:
        for name in names:
            for twin in (name, f"{name}_"):
                if (packet := getattr(aten, twin, None)) is not None:
                    table[packet] = zeros

    add(Zeros(("self",)), "relu", "leaky_relu", "hardtanh", "hardswish", "gelu", "silu", "tanh", "elu", "mish", "neg")
    add(Zeros(("self",)), "clone", "_to_copy", "detach", "alias", "contiguous", "view", "_unsafe_view", "reshape")
    add(Zeros(("self",)), "squeeze", "unsqueeze", "flatten", "unflatten", "permute", "transpose", "t", "expand", "roll")
    add(Zeros(("self",)), "select", "slice", "index", "index_select", "unbind", "split", "split_with_sizes", "flip")
    add(Zeros(("self",)), "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "as_strided", "div", "glu")
    add(Zeros(("self",)), "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices")
    add(Zeros(("self",)), "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "upsample_nearest2d")
    add(Zeros(("self",)), "upsample_bilinear2d", "abs", "_prelu_kernel")
    add(Zeros(("input",)), "native_dropout", "native_channel_shuffle")
    add(Zeros(("other", "self")), "mul")
    add(Zeros(("mat2", "self")), "mm", "bmm")
    add(Zeros((), ("self", "other")), "add", "sub")
    add(Zeros((), ("tensors",)), "cat", "stack")
    add(Zeros(("mat2", "mat1"), ("self",)), "addmm")
    add(Zeros(("batch2", "batch1"), ("self",)), "baddbmm")
    add(Zeros(("weight", "input"), ("bias",)), "linear", "convolution")
    add(Zeros(("weight", "input")), "_fused_rms_norm")
    add(Zeros(("weight",), ("bias",)), "native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm")
    add(Zeros(("weight",), ("bias",)), "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update")
    add(Zeros(("weight",), ("bias",)), "native_layer_norm", "native_group_norm")
    add(Zeros(("g",)), "_weight_norm_interface")
    return table


VANISHES: dict[Any, Zeros] = _vanishes()
"""Which arguments of an operation have to be zero for its result to be; users add their own."""


def add_switches(findings: Findings, model: nn.Module, depth: bool) -> None:
    """Put the units of the model's choices, and with `depth` those of its residual branches, into the findings.

    Raises ValueError for a choice that the example inputs do not reach, or that another one's candidates share.
    """
    names = _Names(model)
    for path, module in model.named_modules():
        if isinstance(module, Choice):
            findings.switches += _candidates(findings, names, path, module)
    if depth:
        branches, kept = _branches(findings, names)
        findings.switches += branches
        findings.kept += kept


class _Names:
    """The tensors and modules of a model under all their names."""

    def __init__(self, model: nn.Module) -> None:
        self.choices = {path for path, m in model.named_modules() if isinstance(m, Choice)}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.all: dict[str, list[str]] = {}
        """Every name of a tensor, by its first."""
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = [*self.parameters.items(), *model.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        for name, tensor in tensors:
            self.all.setdefault(first.setdefault(id(tensor), name), []).append(name)

    def gone(self, modules: Sequence[str], loose: Sequence[str] = ()) -> tuple[str, ...]:
        """The tensors (by first name) none of whose names is left without these modules and loose parameters."""

        def cut(name: str) -> bool:
            return name in loose or any(under(name, path) for path in modules)

        return tuple(first for first, names in self.all.items() if all(map(cut, names)))

    def aliases(self, path: str) -> tuple[str, ...]:
        """Every path of the module at `path`."""
        module = self._modules[path]
        return tuple(p for p, m in self._modules.items() if m is module)


def _candidates(findings: Findings, names: _Names, path: str, choice: Choice) -> Iterator[Switch]:
    graph = findings.graph
    if not path:
        raise ValueError("a Choice must be a part of the model, but is the model itself")
    if path not in graph.tuples:
        raise ValueError(f"every Choice must run on the example inputs, but {path!r} does not")
    if len(paths := names.aliases(path)) > 1:
        raise ValueError(f"a Choice must have one place in the model, but one has the places {paths}")
    for index in range(len(choice.candidates)):
        inside = f"{path}.candidates.{index}"
        yield Switch(
            CHOICE, f"{path}:{index}", path, findings.switch(), ((inside, None),), (), names.gone([inside]), (),
            _prices(graph, [inside]),
        )  # fmt: skip


def _prices(graph: Graph, modules: Sequence[str]) -> frozenset[int]:
    """The indices of all prices of these modules' operations."""
    nodes = [n for n in graph.nodes if n.prices and any(under(n.where, path) for path in modules)]
    return frozenset(i for n in nodes for i in n.prices)


def _branches(findings: Findings, names: _Names) -> tuple[list[Switch], list[tuple[str, str, str]]]:
    """The branches that can be units, and (kind, name, reason) of those that cannot."""
    graph = findings.graph
    switches, kept = [], []
    taken: Counter[str] = Counter()
    for index, last, through in _residuals(graph, names):
        inside = graph.only_for(last, index)
        modules = _modules(graph, inside)
        where = _common(graph.nodes[n].where for n in through)
        where = next((m for m in modules if under(where, m)), where)
        taken[where] += 1
        name = f"{where}:branch" if taken[where] == 1 else f"{where}:branch#{taken[where]}"
        try:
            if outside := sorted(through - inside):
                raise Unfit(f"{_named(graph, outside[0])} in it is used outside of it, too")
            switches.append(_branch(findings, names, name, where, last, inside, modules))
        except Unfit as error:
            kept.append((BRANCH, name, str(error)))
    return switches, kept


def _residuals(graph: Graph, names: _Names) -> Iterator[tuple[int, int, set[int]]]:
    """(addition, end of the branch, what lies between shortcut and end) of every residual branch.

    The shortcut is the other operand, or where that is a sum one of its summands: x in (x + a(x)) + b(x).
    """
    for index in sorted(graph.live()):
        node = graph.nodes[index]
        if node.op not in ADDITIONS or node.where in names.choices:
            continue
        sides = [side.node for n in ("self", "other") if isinstance(side := node.arguments.get(n), Ref)]
        if len(sides) < 2 or any(node.outputs[0] not in graph.nodes[side].outputs for side in sides):
            continue
        for other, last in (sides, sides[::-1]):
            through = next((t for s in _summands(graph, other) if (t := graph.between(s, last))), None)
            if through:
                yield index, last, through


def _summands(graph: Graph, node: int) -> Iterator[int]:
    """The node, and what it is the sum of."""
    yield node
    if graph.nodes[node].op in ADDITIONS:
        for source in graph.nodes[node].sources:
            if graph.nodes[source].outputs == graph.nodes[node].outputs:
                yield from _summands(graph, source)


def _branch(
    findings: Findings, names: _Names, name: str, path: str, last: int, inside: set[int], modules: Sequence[str]
) -> Switch:
    graph = findings.graph
    weights = sorted(_weights(graph, names, last, inside))
    if not modules:
        raise Unfit("no module runs inside it alone")
    loose = []
    for i in sorted(inside):
        leaf, where = graph.nodes[i].leaf, graph.nodes[i].where
        if graph.nodes[i].macs and not any(under(where, m) for m in modules):
            raise Unfit(f"{_named(graph, i)} belongs to no module that runs inside it alone")
        if leaf in names.parameters and not any(under(leaf, m) for m in modules):
            loose.append(leaf)
    replaced: list[tuple[str, int | None]] = []
    for module in modules:
        outputs = graph.tuples[module]
        if isinstance(outputs, str):
            raise Unfit(f"{module} {outputs}")
        replaced += [(alias, outputs) for alias in names.aliases(module)]
    gone = names.gone([module for module, _ in replaced], loose)
    prices = _prices(graph, modules)
    missing = next((w for w in weights if w not in gone), None)
    if missing is not None:
        raise Unfit(f"{missing} at its end has another name outside of it")
    sized = tuple((w, names.parameters[w].shape[0] if names.parameters[w].dim() else 1) for w in weights)
    return Switch(
        BRANCH, name, path, findings.switch(), tuple(replaced), tuple(loose), gone, sized, prices
    )  # fmt: skip


def _weights(graph: Graph, names: _Names, last: int, inside: set[int]) -> set[str]:
    """Parameters inside the branch that make its end zero when they are. Raises Unfit where there are none."""
    if last not in inside:
        raise Unfit(f"{_named(graph, last)} at its end is used elsewhere, too")
    node = graph.nodes[last]
    if node.leaf is not None:
        if node.leaf in names.parameters:
            return {node.leaf}
        raise Unfit(f"{node.leaf or 'a constant'} at its end is no parameter")
    zeros = VANISHES.get(node.op)
    if zeros is None:
        raise Unfit(f"{_named(graph, last)} at its end does not leave zeros zero")
    found: set[str] = set()
    failed: Unfit | None = None
    for factor in sorted(zeros.factors, key=lambda f: not _is_leaf(graph, node.arguments.get(f))):
        try:
            found |= _of_argument(graph, names, node.arguments.get(factor), last, inside)
            break
        except Unfit as error:
            failed = error
    else:
        if failed is not None:
            raise failed
    for summand in zeros.summands:
        if node.arguments.get(summand) is not None:
            found |= _of_argument(graph, names, node.arguments[summand], last, inside)
    return found


def _of_argument(graph: Graph, names: _Names, argument: Any, node: int, inside: set[int]) -> set[str]:
    if isinstance(argument, Ref):
        return _weights(graph, names, argument.node, inside)
    if isinstance(argument, (list, tuple)):
        return set().union(*(_of_argument(graph, names, a, node, inside) for a in argument))
    raise Unfit(f"{_named(graph, node)} at its end has no parameter that could close it")


def _is_leaf(graph: Graph, argument: Any) -> bool:
    return isinstance(argument, Ref) and graph.nodes[argument.node].leaf is not None


def _modules(graph: Graph, inside: set[int]) -> list[str]:
    """The outermost modules that ran and all of whose operations that matter lie inside the branch."""
    candidates: set[str] = set()
    outside: set[str] = set()
    for i in graph.live():
        node = graph.nodes[i]
        if node.leaf is None:
            (candidates if i in inside else outside).update(_upwards(node.where))
    whole = (candidates & graph.tuples.keys()) - outside - {""}
    result = [path for path in whole if not any(parent in whole for parent in _upwards(path) if parent != path)]
    return sorted(result)


def _upwards(path: str) -> Iterator[str]:
    """The path itself and those of all modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _common(paths: Iterable[str]) -> str:
    """The innermost module around all of these."""
    parts = zip(*(path.split(".") for path in paths))
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))


def _named(graph: Graph, index: int) -> str:
    node = graph.nodes[index]
    if node.leaf is not None:
        return node.leaf or "a constant"
    return f"{node.op} in {node.where}" if node.where else str(node.op)
