"""The operations that a network runs, and how their sizes depend on its open units: read off smaller networks.

Every group of units is thinned out in turn, the smaller network is run, and the shapes and sizes of its operations
are compared with the dense network's. So any operation is known, whatever rules say about it: convolutions and matrix
products, norms, activations, additions, concatenations. A random network checks at the end that what was found holds.

A network with choices is run with other candidates, too, as often as it takes for each to be the chosen one. What runs
inside a candidate is an operation of that candidate; all else must run whichever is chosen.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nas_gate.removal import MENDS, name_before, parents, smaller
from nas_gate.structure import CHOICE, Axis, Group, Structure
from nas_gate.structure.trace import mode_of, unchanged

POINTS = 5
"""Grid points of a width: with all combinations of two, 25."""

MOST_WIDTHS = 2
"""An operation with more widths is measured at equal shares of all of them only, as a function of their sum."""

Ints = npt.NDArray[np.int64]
Key = tuple[str, str, int]
"""Of an operation: the place of the module that runs it, its name, and how often that module had run it before."""

Progress = Callable[[str, int, int], None]
"""Told of work that takes its time: what, how much of it is done, of how much in all."""


@dataclass(frozen=True)
class Sizes:
    """A tensor argument: its shape, its dimensions from the slowest to the quickest in memory, its type."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Ran:
    """One operation of one run: where it stands, and its arguments with tensors as `Sizes`."""

    key: Key
    op: Any
    leaves: tuple[Any, ...]
    spec: Any

    def numbers(self) -> Ints:
        """All sizes and whole numbers among the arguments in order."""
        return np.array([n for leaf in self.leaves for n in _numbers(leaf)], dtype=np.int64)


@dataclass(frozen=True)
class Sized:
    """One operation with its arguments as functions of its widths: number = offset + factor * its width."""

    ran: Ran
    widths: tuple[Axis, ...]
    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    offset: tuple[int, ...]
    factor: tuple[int, ...]
    width: tuple[int, ...]
    """The index of the width that each number depends on; -1 for a number that depends on none."""
    needs: tuple[int, ...]

    def name(self) -> str:
        """The operation with its sizes, equal for equal ones; widths are a, b, ..."""
        numbers = [
            str(o) if w < 0 else f"{o}+{f}{chr(97 + w)}" if o else f"{f}{chr(97 + w)}" if f > 1 else chr(97 + w)
            for o, f, w in zip(self.offset, self.factor, self.width)
        ]
        told = [f"{chr(97 + i)}={a}..{b}" for i, (a, b) in enumerate(zip(self.lowest, self.highest))]
        return " ".join([f"{self.ran.op}({_told(self.ran.leaves, numbers)})", *told])

    def points(self) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, ...]]]:
        """The grid points along every axis, and the widths at all of their combinations in C order."""
        each = [_points(a, b) for a, b in zip(self.lowest, self.highest)]
        if len(each) <= MOST_WIDTHS:
            return tuple(each), [tuple(c) for c in _product(each)]
        parts = np.linspace(0, 1, POINTS)
        low, high = np.array(self.lowest), np.array(self.highest)
        together = list(dict.fromkeys(tuple(np.rint(low + p * (high - low)).astype(int).tolist()) for p in parts))
        return (tuple(sum(c) for c in together),), together

    def axes(self) -> tuple[Axis, ...]:
        """The axes of `points` as functions of the open units."""
        if len(self.widths) <= MOST_WIDTHS:
            return self.widths
        total: Counter[int] = Counter()
        for width in self.widths:
            total.update(dict(width.groups))
        return (Axis(0, tuple(sorted(total.items()))),)

    def call(self, widths: Sequence[int]) -> Callable[[], Any]:
        """The operation on tensors of ones, ready to be run, at these widths."""
        numbers = iter(o if w < 0 else o + f * widths[w] for o, f, w in zip(self.offset, self.factor, self.width))
        args, kwargs = pytree.tree_unflatten([_made(leaf, numbers) for leaf in self.ran.leaves], self.ran.spec)
        return partial(self.ran.op, *args, **kwargs)


def read(
    model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any], progress: Progress
) -> list[Sized]:
    """All operations that the model runs on its example inputs in evaluation mode, but views, which move nothing.

    With choices those of all candidates; each needs the groups of the candidates that it is inside of. Raises
    ValueError where sizes are no whole multiples of open units, or depend on a choice from outside its candidates.
    """
    model, keeps = _as_cut(model), architectures(structure)
    runs = [_run_removed(model, structure, keep, args, kwargs) for keep in keeps]
    known: dict[Key, Ran] = {}
    for of in runs:
        known |= {key: ran for key, ran in of.items() if key not in known}
    around = {key: _candidates_around(structure, key[0]) for key in known}
    for keep, of in zip(keeps, runs):
        _check_choices(keep, of, known, around)
    numbers = {key: ran.numbers() for key, ran in known.items()}
    slopes = {key: np.zeros((len(n), len(structure.groups)), dtype=np.int64) for key, n in numbers.items()}
    group_of = structure.group_of_unit()
    needs = {key: {int(group_of[unit]) for unit in units} for key, units in around.items()}
    steps = [(keep, of, index) for keep, of in zip(keeps, runs) for index in _thinned(structure, keep)]
    for step, (keep, of, index) in enumerate(steps):
        progress("reading operations", step, len(steps))
        group = structure.groups[index]
        closed = max(1, group.size // 2)
        thinner = keep.clone()
        thinner[group.start : group.start + closed] = False
        small = _run_removed(model, structure, thinner, args, kwargs)
        for key in of:
            if key not in small:
                needs[key].add(index)
                continue
            after = small[key].numbers()
            _alike(key, numbers[key], after)
            slopes[key][:, index], rest = np.divmod(numbers[key] - after, closed)
            _require(not rest.any(), key, f"does not shrink by whole slots with the units of {group.name}")
            _require((slopes[key] >= 0).all(), key, f"grows while units of {group.name} go")
    random = np.random.default_rng(0)
    for _ in keeps:
        _check(model, structure, args, kwargs, numbers, slopes, random)
    sizes = np.array([g.size for g in structure.groups])
    return [_sized(ran, slopes[key], sizes, tuple(sorted(needs[key]))) for key, ran in known.items()]


def architectures(structure: Structure) -> list[Tensor]:
    """Keeps, shape (units,), of all widths and branches, in which every candidate of every choice is chosen once.

    The first is the dense network's, and the only one without choices.
    """
    place = {part.unit: part.modules[0][0] for part in structure.parts}
    left = {unit for choice in structure.choices for unit in choice.units}
    keeps: list[Tensor] = []
    while left or not keeps:
        keep = structure.dense()
        waiting = {path for unit in left for path in parents(place[unit])}
        for choice in structure.choices:
            keep[list(choice.units)] = False
            keep[next((unit for unit in choice.units if place[unit] in waiting), choice.units[0])] = True
        closed = {place[unit] for choice in structure.choices for unit in choice.units if not keep[unit]}
        left = {unit for unit in left if not closed.isdisjoint(parents(place[unit]))}
        keeps.append(keep)
    return keeps


def _thinned(structure: Structure, keep: Tensor) -> list[int]:
    """The groups, but candidates, that have slots in the network that `keep` leaves."""
    gone = {tensor for part in structure.parts if not keep[part.unit] for tensor in part.tensors}

    def stands(group: Group) -> bool:
        return group.kind != CHOICE and any(member.tensor not in gone for member in group.members)

    return [index for index, group in enumerate(structure.groups) if stands(group)]


def _candidates_around(structure: Structure, path: str) -> list[int]:
    """The units of the candidates that a module is inside of."""
    rivals = {unit for choice in structure.choices for unit in choice.units}
    inside = set(parents(path))
    return [part.unit for part in structure.parts if part.unit in rivals and part.modules[0][0] in inside]


def _check_choices(
    keep: Tensor, ran: Mapping[Key, Ran], known: Mapping[Key, Ran], around: Mapping[Key, Sequence[int]]
) -> None:
    """Raise ValueError unless the network of `keep` runs what is inside its candidates, and all that is in none."""
    for key, first in known.items():
        expected = bool(keep[list(around[key])].all())
        _require(expected == (key in ran), key, "depends on the candidates of a Choice, but is inside of none")
        if expected:
            _alike(key, first.numbers(), ran[key].numbers())
            same = (first.numbers() == ran[key].numbers()).all()
            _require(same, key, "has other sizes with other candidates of a Choice")


def _as_cut(model: nn.Module) -> nn.Module:
    """A copy of the model with the attention of cut networks, which runs other operations than PyTorch's own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            MENDS[nn.MultiheadAttention](module, module, None)
    return model


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Ran]:
    """The operations of one run of the model in evaluation mode, in order, without views.

    Layers of transformers are not fused into one operation, for those of a cut network are not.
    """
    fused, ran = torch.backends.mha.get_fastpath_enabled(), list[Ran]()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            unchanged(model),
            mode_of(model, training=False),
            torch.no_grad(),
            _place(model) as place,
            _Recorder(place, ran),
        ):
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return ran


def run_all(model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Ran]:
    """The operations of all `architectures`."""
    for keep in architectures(structure):
        yield from _run_removed(model, structure, keep, args, kwargs).values()


def _run_removed(
    model: nn.Module, structure: Structure, keep: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[Key, Ran]:
    """What the smaller network runs; places are those of the whole model."""
    small, cut = smaller(model, structure, keep, args, kwargs)
    ran = (replace(r, key=(name_before(cut, r.key[0]), *r.key[1:])) for r in run(small, args, kwargs))
    return {r.key: r for r in ran}


@contextmanager
def _place(model: nn.Module) -> Iterator[Callable[[], str]]:
    """The path of the module that runs now, by the modules that called it: one with several places has each."""
    names: dict[nn.Module, dict[nn.Module, str]] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]

    def inside(module: nn.Module) -> dict[nn.Module, str]:
        if module not in names:
            names[module] = {m: name for name, m in module.named_modules()}
        return names[module]

    def enter(module: nn.Module, args: Any) -> None:
        path, caller = stack[-1]
        name = inside(caller).get(module)
        path = inside(model).get(module, path) if name is None else f"{path}.{name}".strip(".")
        stack.append((path, module))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    with ExitStack() as exits:
        exits.callback(register_module_forward_pre_hook(enter).remove)
        exits.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield lambda: stack[-1][0]


class _Recorder(TorchDispatchMode):
    def __init__(self, place: Callable[[], str], ran: list[Ran]) -> None:
        super().__init__()
        self._place, self._ran = place, ran
        self._seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            leaves, spec = pytree.tree_flatten((args, kwargs or {}))
            where = self._place(), str(func)
            self._ran.append(Ran((*where, self._seen[where]), func, tuple(map(_leaf, leaves)), spec))
            self._seen[where] += 1
        return func(*args, **(kwargs or {}))


def _leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    order = sorted(range(leaf.dim()), key=leaf.stride, reverse=True)
    return Sizes(tuple(leaf.shape), tuple(order), leaf.dtype)


def _numbers(leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, Sizes):
        return leaf.shape
    return (leaf,) if isinstance(leaf, int) and not isinstance(leaf, bool) else ()


def _made(leaf: Any, numbers: Any) -> Any:
    """The argument with its sizes taken from `numbers`. Integers are 0, which is a valid index everywhere."""
    if isinstance(leaf, Sizes):
        shape = [next(numbers) for _ in leaf.shape]
        value = 1 if leaf.dtype.is_floating_point or leaf.dtype.is_complex else 0
        return torch.empty_permuted(shape, leaf.order, dtype=leaf.dtype).fill_(value)
    return next(numbers) if _numbers(leaf) else leaf


def _told(leaves: Sequence[Any], numbers: Sequence[str]) -> str:
    left, told = iter(numbers), []
    for leaf in leaves:
        if isinstance(leaf, Sizes):
            order = "" if leaf.order == tuple(range(len(leaf.order))) else f"@{''.join(map(str, leaf.order))}"
            told.append(f"{str(leaf.dtype).removeprefix('torch.')}[{','.join(next(left) for _ in leaf.shape)}]{order}")
        else:
            told.append(next(left) if _numbers(leaf) else str(leaf))
    return ", ".join(told)


def _points(low: int, high: int) -> tuple[int, ...]:
    """Quarters of the highest width, which are multiples of what hardware likes where it is, and the lowest."""
    inner = (round(high * i / (POINTS - 1)) for i in range(1, POINTS - 1))
    return tuple(sorted({low, high, *(p for p in inner if low < p < high)}))


def _product(axes: Sequence[Sequence[int]]) -> list[list[int]]:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)).tolist() if axes else [[]]


def _sized(ran: Ran, slopes: Ints, sizes: Ints, needs: tuple[int, ...]) -> Sized:
    """Numbers whose slopes are multiples of one another share a width."""
    known: dict[tuple[int, ...], int] = {}
    width, factor, offset = [], [], []
    for number, slope in zip(ran.numbers().tolist(), slopes):
        common = int(np.gcd.reduce(slope)) if slope.any() else 0
        width.append(known.setdefault(tuple((slope // common).tolist()), len(known)) if common else -1)
        factor.append(common)
        offset.append(number - int(slope @ sizes))
    directions = [np.array(d, dtype=np.int64) for d in known]
    return Sized(
        ran,
        tuple(Axis(0, tuple((int(g), int(d[g])) for g in np.flatnonzero(d))) for d in directions),
        tuple(int(d.sum()) for d in directions),
        tuple(int(d @ sizes) for d in directions),
        tuple(offset),
        tuple(factor),
        tuple(width),
        needs,
    )


def _check(
    model: nn.Module,
    structure: Structure,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    numbers: Mapping[Key, Ints],
    slopes: Mapping[Key, Ints],
    random: np.random.Generator,
) -> None:
    """Raise ValueError unless a random network runs operations of the sizes that were found."""
    keep = torch.from_numpy(random.random(structure.units) < 0.5)
    for group in structure.groups:
        keep[group.stop - 1] = True
    for choice in structure.choices:
        keep[list(choice.units)] = False
        keep[int(random.choice(choice.units))] = True
    closed = np.array([g.size for g in structure.groups]) - structure.open_units(keep)
    for key, ran in _run_removed(model, structure, keep, args, kwargs).items():
        if key in numbers:
            _alike(key, numbers[key], ran.numbers())
            expected = numbers[key] - slopes[key] @ closed
            _require((expected == ran.numbers()).all(), key, "has sizes that are no sums of open units")


def _alike(key: Key, before: Ints, after: Ints) -> None:
    _require(len(before) == len(after), key, "takes other arguments in a smaller network")


def _require(condition: bool | np.bool_, key: Key, what: str) -> None:
    if not condition:
        raise ValueError(f"the latency of every operation must follow from its widths, but {key[1]} in {key[0]} {what}")
