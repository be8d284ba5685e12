"""From findings to the structure: units, groups, priced terms, and why the rest is fixed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from nas_gate.structure import labels as lb
from nas_gate.structure.trace import CHOICE, KERNEL, WIDTH, Crossing, Findings, Movement, Switch, owner_of

Ints = npt.NDArray[np.int64]
FIXED = -1

LARGE = 4096
"""Equalities of one operation above which those that tell nothing new are taken out first."""


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group's units have slots in."""

    tensor: str
    dim: int
    slots: int
    """Slots that each unit has there."""


@dataclass(frozen=True)
class Group:
    """Units that are alike: units `start` to `start + size - 1` of the keep vector.

    `kind` is WIDTH (units with the same kinds of slots), BRANCH (one unit: a residual branch) or CHOICE (one unit: a
    candidate of a choice). `least` units at least stay open, for the network to stay whole.
    """

    name: str
    start: int
    size: int
    members: tuple[Member, ...]
    kind: str = WIDTH
    least: int = 1

    @property
    def stop(self) -> int:
        """One past the last unit."""
        return self.start + self.size


@dataclass(frozen=True)
class Fixed:
    """Slots of one dimension that cannot be removed, and why."""

    tensor: str
    dim: int
    slots: int
    size: int
    reason: str


@dataclass(frozen=True)
class Axis:
    """The kept size of one axis: `fixed` plus, for every (group, n), n times the group's open units."""

    fixed: int
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Term:
    """One priced thing: `coefficient` times the product of its axes' kept sizes."""

    where: str
    op: str
    coefficient: int
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Slots:
    """The unit of every slot along one dimension of a tensor; -1 where it is fixed (or not gated)."""

    tensor: str
    dim: int
    units: Ints


@dataclass(frozen=True)
class Norm:
    """A module whose statistics run over units: those along dimension `dim` of its input, -1 where it is fixed.

    A layer norm is `centred`, an RMS norm is not. `weight` is the parameter that scales its result before anything is
    added to it; None where nothing is. `groups` are those of a group norm, whose statistics run over all places of a
    group, too (0: over the slots of one place); every group has the same units. `standardizes` names a weight that has
    the units along dimension `dim` and is standardised row by row in the module, in place of its input.
    """

    path: str
    dim: int
    units: Ints
    centred: bool
    weight: str | None
    groups: int = 0
    standardizes: str | None = None


@dataclass(frozen=True)
class Part:
    """What goes when a branch's or candidate's unit closes.

    `modules` with the size of the tuple that they give (None: a tensor), `loose` parameters of modules that stay, and
    with both all `tensors` (parameters and buffers by their first names).
    """

    unit: int
    modules: tuple[tuple[str, int | None], ...]
    loose: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """The units of a choice's candidates, in their order: exactly one of them is open."""

    path: str
    units: tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """A branch that is no unit, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Given:
    """The sizes that a module's own code gave to a call, and by position the units along some (-1 where fixed)."""

    path: str
    call: str
    sizes: tuple[int, ...]
    units: Mapping[int, Ints]


@dataclass(frozen=True)
class Structure:
    """The frozen record of a model's removable units.

    `slots` says what removal cuts, `gates` which weights' slots gates multiply, `axes` and the terms what it costs
    (`macs` of one forward pass on the example inputs, `params`), `widths` the units along a dimension of the input of
    modules that may keep its size as an attribute only, `norms` those that statistics run over. `parts` says what goes
    with the units of branches and candidates, `choices` which candidates exclude each other, `kept` which branches are
    no units.
    """

    groups: tuple[Group, ...]
    slots: tuple[Slots, ...]
    gates: tuple[Slots, ...]
    fixed: tuple[Fixed, ...]
    axes: tuple[Axis, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    other_macs: int
    widths: tuple[Slots, ...]
    norms: tuple[Norm, ...]
    given: tuple[Given, ...] = field(repr=False)
    """Sizes that modules' own code gave to views of units."""
    factors: Mapping[str, Mapping[str, float]] = field(repr=False)
    """Numbers that modules' own code multiplied tensors by, by module and call."""
    labels: Ints = field(repr=False)
    """A label of every unit, by which `solve` can be told to fix it."""
    parts: tuple[Part, ...] = ()
    choices: tuple[Options, ...] = ()
    kept: tuple[Kept, ...] = ()

    @property
    def units(self) -> int:
        """The length of a keep vector."""
        return self.groups[-1].stop if self.groups else 0

    def group_of_unit(self) -> Ints:
        """The group index of every unit, shape (units,)."""
        return np.repeat(np.arange(len(self.groups)), [g.size for g in self.groups])

    def dense(self) -> Tensor:
        """The keep of the model as it was given, shape (units,): everything, and of every choice the first."""
        keep = torch.ones(self.units, dtype=torch.bool, device="cpu")
        for choice in self.choices:
            keep[list(choice.units[1:])] = False
        return keep

    def thinnest(self) -> Tensor:
        """The keep with the fewest units that every group may have, but with all branches, shape (units,)."""
        keep = torch.zeros(self.units, dtype=torch.bool, device="cpu")
        for g in self.groups:
            keep[g.start : g.start + max(g.least, 1)] = True
        return keep & self.dense()

    def rivals(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Sets of units of which a least and a most number stay open: groups, and choices in place of their groups.

        (set of every unit, shape (units,); first unit, least and most of every set, shape (sets,)).
        """
        joined = {unit for choice in self.choices for unit in choice.units[1:]}
        candidates = {choice.units[0]: len(choice.units) for choice in self.choices}
        sets = [
            (g.start, candidates[g.start], 1, 1) if g.start in candidates else (g.start, g.size, g.least, g.size)
            for g in self.groups
            if g.start not in joined
        ]
        start, size, least, most = np.array(sets, dtype=np.int64).reshape(-1, 4).T
        return np.repeat(np.arange(len(sets)), size), start, least, most

    def open_units(self, keep: Tensor) -> Ints:
        """Kept units of every group, shape (groups,)."""
        if tuple(keep.shape) != (self.units,) or keep.dtype != torch.bool:
            raise ValueError(
                f"keep must be boolean with one entry for each of {self.units} units, but is {keep.dtype} of shape "
                f"{tuple(keep.shape)}"
            )
        return np.bincount(
            self.group_of_unit(), weights=keep.cpu().numpy().astype(float), minlength=len(self.groups)
        ).astype(np.int64)


def solve(findings: Findings, refused: Iterable[tuple[Ints, str]] = ()) -> Structure:
    """The structure that findings allow; `refused` names labels that a trial has found not removable."""
    fixes = [*findings.fixed, *((torch.as_tensor(labels), reason) for labels, reason in refused)]
    equal = list(findings.equal)
    gated = np.zeros(findings.count, dtype=bool)
    for labels in findings.gated:
        gated[labels.numpy()] = True
    while True:
        unit, reason = _components(findings.count, equal, fixes)
        ties, refusals = _crossed(findings.crossings, unit)
        if not ties and not refusals:
            ties, refusals = _rectangles(findings.tracks, unit)
        if not ties and not refusals:
            refusals = _uncut(findings.movements, unit) or _ungated(unit, gated)
        if not ties and not refusals:
            axes = _Axes(findings, unit)
            refusals = [(np_labels, "it is the only unit of its group") for np_labels in axes.lonely()]
            if not refusals:
                structure = _structure(findings, axes, reason, [text for _, text in fixes], gated)
                causes = {s.label: int(reason[s.label]) for s in findings.switches}
                return _with_switches(structure, findings, {n: fixes[i][1] for n, i in causes.items() if i >= 0})
        equal += ties
        fixes += refusals


def _components(
    count: int, equal: Sequence[tuple[Tensor, Tensor]], fixes: Sequence[tuple[Tensor, str]]
) -> tuple[Ints, Ints]:
    """The component of every label (-1 where fixed), and the index of its first reason (-1 where free)."""
    # the large ones repeat a few pairs many times: once the small ones have joined most labels, little is left of them
    unit = _joined(np.arange(count), [pair for pair in equal if len(pair[0]) <= LARGE])
    unit = _joined(unit, [pair for pair in equal if len(pair[0]) > LARGE])
    components = int(unit.max(initial=-1)) + 1
    reason = np.full(components, len(fixes), dtype=np.int64)
    for i, (labels, _) in enumerate(fixes):
        where = unit[labels.numpy()]
        reason[where] = np.minimum(reason[where], i)
    reason[reason == len(fixes)] = -1
    return np.where(reason[unit] >= 0, FIXED, unit), reason[unit]


def _joined(unit: Ints, equal: Sequence[tuple[Tensor, Tensor]]) -> Ints:
    """The component of every label when the components of labels in the same place of `equal` are joined, too."""
    count, pairs = int(unit.max(initial=-1)) + 1, []
    for a, b in ((unit[a.numpy()], unit[b.numpy()]) for a, b in equal):
        pairs.append(np.unique(a[a != b] * count + b[a != b]) if len(a) > LARGE else a * count + b)
    first, second = np.divmod(np.concatenate([*pairs, np.zeros(0, np.int64)]), max(count, 1))
    graph = coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    joined: Ints = connected_components(graph, directed=False)[1][unit].astype(np.int64)
    return joined


def _seen(labels: Tensor, unit: Ints) -> Tensor:
    """The unit at every place, `unit` being that of every label; -1 where there is no label or it is fixed."""
    return torch.from_numpy(np.where(labels.numpy() >= 0, unit[labels.numpy()], FIXED))


def _rectangles(tracks: Sequence[Tensor], unit: Ints) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, str]]]:
    """Equalities that make every value's cut a rectangle: units vary over one dimension of it at most.

    Of the dimensions that they vary over, the smallest is given up, for that leaves the most units.
    """
    wanted = Findings()
    for labels in tracks:
        if (
            labels.dim() < 2
            or len(varying := [d for d, n in enumerate(lb.compress(_seen(labels, unit)).shape) if n > 1]) < 2
        ):
            continue
        dim = min(varying, key=lambda d: labels.shape[d])
        wanted.equate(labels.narrow(dim, 0, 1), labels, "it stands beside slots without units")
    return wanted.equal, wanted.fixed


def _crossed(crossings: Sequence[Crossing], unit: Ints) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, str]]]:
    """What follows from crossings for the units known so far."""
    wanted = Findings()
    for c in crossings:
        wide, narrow = torch.broadcast_tensors(_seen(c.wide, unit), _seen(c.narrow, unit))
        varying = [d for d, n in enumerate(lb.compress(wide).shape) if n > 1]
        if not any(c.narrow.shape[d] > 1 for d in varying):
            wanted.fix(torch.where(narrow == FIXED, lb.NONE, c.narrow), c.reason)
        elif not torch.equal(wide, narrow):
            wanted.equate(c.wide, c.narrow, c.reason)
    return wanted.equal, wanted.fixed


def _uncut(movements: Sequence[Movement], unit: Ints) -> list[tuple[Tensor, str]]:
    """Movements that cuts show not to commute with cutting.

    One cut may commute by chance (a roll by one does when the last slot is kept), so beside a random cut and its
    complement three are tried that leave out every third unit, each a different one.
    """
    refusals = []
    units = np.arange(len(unit) + 1)
    random = np.random.default_rng(0).random(len(units)) < 0.5
    for keep in (random, ~random, *(units % 3 != third for third in range(3))):
        kept = torch.from_numpy(np.append((unit == FIXED) | keep[unit], True))  # the last entry stands for no label
        refusals += [(m.before[m.before >= 0], m.reason) for m in movements if not _commutes(m, kept)]
    return refusals


def _commutes(movement: Movement, kept: Tensor) -> bool:
    """Whether moving the kept labels gives the kept labels of what was moved."""
    if bool(kept[movement.before].all()):
        return True
    before, after = _cut(movement.before, kept), _cut(movement.after, kept)
    if before is not None and before.numel() == 0:
        return True  # every group keeps a unit
    try:
        return before is not None and after is not None and torch.equal(movement.run(before), after)
    except (RuntimeError, IndexError):  # the arguments do not fit the smaller tensor
        return False


def _cut(labels: Tensor, kept: Tensor) -> Tensor | None:
    """The kept rectangle of labels; None where what is kept is no rectangle."""
    mask = kept[labels]
    for dim, size in enumerate(labels.shape):
        if size == 1 < mask.numel():
            continue  # what goes here goes along another dimension
        others = [d for d in range(labels.dim()) if d != dim]
        index = (mask.any(others) if others else mask).nonzero()[:, 0]
        labels, mask = labels.index_select(dim, index), mask.index_select(dim, index)
    return labels if bool(mask.all()) else None


def _ungated(unit: Ints, gated: npt.NDArray[np.bool_]) -> list[tuple[Tensor, str]]:
    """Units that no weight consumes, so that no gate could close them."""
    reached = np.zeros(len(unit) + 1, dtype=bool)
    reached[unit[gated]] = True
    missing = np.flatnonzero((unit != FIXED) & ~reached[unit])
    return [(torch.from_numpy(missing), "no weight takes it in")] if len(missing) else []


class _Axes:
    """Every labelled or priced axis as counts of units, and the groups of units that are counted alike."""

    def __init__(self, findings: Findings, unit: Ints) -> None:
        self.sizes: list[int] = [s.size for s in findings.slots]
        self.along: list[Ints] = [unit[s.start : s.start + s.size] for s in findings.slots]
        self.unit = unit
        self._known: dict[bytes, int] = {}
        self.priced = [
            (p, tuple(a for size, dim, tracks in p.axes if (a := self._axis(size, dim, tracks)) is not None))
            for p in findings.prices
        ]
        # every unit's count along every axis: rows are units in the order of their first label
        rows = np.concatenate([np.full(len(a), i) for i, a in enumerate(self.along)] or [np.zeros(0, np.int64)])
        ids = np.concatenate([*self.along, np.zeros(0, np.int64)])
        free = ids != FIXED
        components, first = np.unique(unit, return_index=True)
        place = np.searchsorted(components, ids[free])
        counts = coo_matrix(
            (np.ones(len(place), dtype=np.uint64), (place, rows[free])), shape=(len(first), len(self.along))
        ).tocsr()
        counts.sum_duplicates()
        counts.sort_indices()
        # units are of one group when their rows are equal: compare them by two random 64-bit sums
        random = np.random.default_rng(0).integers(1, 2**63, size=(len(self.along), 2), dtype=np.uint64)
        sums = counts @ random
        used = np.flatnonzero((components != FIXED) & (np.diff(counts.indptr) > 0))
        used = used[np.argsort(first[used], kind="stable")]
        _, start, kind = np.unique(sums[used], axis=0, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(start, kind="stable"), kind="stable")  # groups by their first unit
        group = order[kind.reshape(-1)]
        self.kinds = [used[group == g] for g in range(len(start))]
        self.labels = first
        self.number = np.full(len(unit) + 1, FIXED, dtype=np.int64)
        ordered = np.concatenate([*self.kinds, np.zeros(0, np.int64)])
        self.number[components[ordered]] = np.arange(len(ordered))
        self.counts: list[dict[int, int]] = [{} for _ in self.along]
        for g, members in enumerate(self.kinds):
            a, b = counts.indptr[members[0]], counts.indptr[members[0] + 1]
            for axis, n in zip(counts.indices[a:b].tolist(), counts.data[a:b].tolist()):
                self.counts[axis][g] = int(n)

    def _axis(self, size: int, dim: int, tracks: Sequence[lb.Track]) -> int | None:
        """The index of a priced axis, labels as units; None for an axis of size 1."""
        for track in tracks:
            seen = lb.compress(_seen(track.labels, self.unit))
            if seen.shape[dim] > 1:
                return self._add(lb.axis(seen, dim).numpy())
        return None if size == 1 else self._add(np.full(size, FIXED, dtype=np.int64))

    def _add(self, units: Ints) -> int:
        key = units.tobytes()
        if key not in self._known:
            self._known[key] = len(self.along)
            self.along.append(units)
            self.sizes.append(len(units))
        return self._known[key]

    def lonely(self) -> list[Tensor]:
        """Labels of units that are alone in their group: one must stay open, so nothing can be chosen."""
        return [torch.tensor([int(self.labels[m[0]])], device="cpu") for m in self.kinds if len(m) == 1]

    def axis(self, index: int) -> Axis:
        """One axis as counts."""
        groups = tuple(self.counts[index].items())
        return Axis(self.sizes[index] - sum(n * len(self.kinds[g]) for g, n in groups), groups)


def _structure(
    findings: Findings, axes: _Axes, reason: Ints, texts: Sequence[str], gated: npt.NDArray[np.bool_]
) -> Structure:
    slots, gates, fixed = [], [], []
    members: list[list[Member]] = [[] for _ in axes.kinds]
    names: list[str | None] = [None] * len(axes.kinds)
    for index, labelled in enumerate(findings.slots):
        units = axes.number[axes.along[index]]
        span = slice(labelled.start, labelled.start + labelled.size)
        for g, n in axes.counts[index].items():
            members[g].append(Member(labelled.name, labelled.dim, n))
            mine = axes.number[axes.along[index]] >= 0
            if names[g] is None and not gated[span][mine].all():  # the first that gives them out
                names[g] = labelled.name.rpartition(".")[0] or labelled.name
        if (units != FIXED).any():
            slots.append(Slots(labelled.name, labelled.dim, units))
            gate = np.where(gated[span], units, FIXED)
            if (gate != FIXED).any():
                gates.append(Slots(labelled.name, labelled.dim, gate))
        causes, each = np.unique(reason[span], return_counts=True)
        for cause, count in zip(causes.tolist(), each.tolist()):
            if cause >= 0 and not (labelled.dim > 1 and texts[cause].endswith(KERNEL)):
                fixed.append(Fixed(labelled.name, labelled.dim, count, labelled.size, texts[cause]))
    wide = {labelled.name for labelled in findings.slots if labelled.dim > 1}
    lone = {(name, 1, 1) for name in findings.standardized if name not in wide}
    groups, start = [], 0
    taken: Counter[str] = Counter()
    for kind, known, of in zip(axes.kinds, names, members):
        name = known or of[0].tensor
        taken[name] += 1
        # a row of one weight has no deviation to divide by
        least = 2 if any((m.tensor, m.dim, m.slots) in lone for m in of) else 1
        full = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append(Group(full, start, len(kind), tuple(of), least=least))
        start += len(kind)
    params: list[Term] = []
    by_tensor: dict[str, list[int]] = {}
    for index, labelled in enumerate(findings.slots):
        by_tensor.setdefault(labelled.name, []).append(index)
    for name, size in findings.parameters.items():
        indices = by_tensor.get(name, [])
        params.append(Term(name, "parameter", size // math.prod(axes.sizes[i] for i in indices), tuple(indices)))
    macs = tuple(Term(p.where, p.op, p.coefficient, a) for p, a in axes.priced)
    modelled = sum(t.coefficient * math.prod(axes.sizes[a] for a in t.axes) for t in macs)

    def units_of(labels: Tensor) -> Ints:
        units: Ints = axes.number[_seen(labels, axes.unit).numpy()]
        return units

    widths = [Slots(path, 1, units_of(labels)) for path, labels in findings.widths.items()]
    norms = [Norm(path, n.dim, units_of(n.labels), n.centred, n.weight, n.groups) for path, n in findings.norms.items()]
    widths += [Slots(n.path, n.dim, n.units) for n in norms if n.weight is None]
    rows = [g for g in gates if g.dim == 1 and g.tensor in findings.standardized]
    norms += [Norm(owner_of(g.tensor), 1, g.units, True, None, standardizes=g.tensor) for g in rows]

    return Structure(
        groups=tuple(groups),
        slots=tuple(slots),
        gates=tuple(gates),
        fixed=tuple(fixed),
        axes=tuple(axes.axis(i) for i in range(len(axes.along))),
        macs=macs,
        params=tuple(params),
        other_macs=findings.macs - modelled,
        widths=tuple(w for w in widths if (w.units != FIXED).any()),
        norms=tuple(n for n in norms if (n.units != FIXED).any()),
        given=tuple(_given(findings, axes)),
        factors=findings.factors,
        labels=axes.labels[np.concatenate([*axes.kinds, np.zeros(0, np.int64)])],
    )


def _with_switches(structure: Structure, findings: Findings, fixed: Mapping[int, str]) -> Structure:
    """The structure with a group of one unit for every switch whose label is not `fixed`, for which reason.

    What an operation inside of it costs is multiplied by its keep: one more axis, of size 1 when it is open.
    """
    switches = [s for s in findings.switches if s.label not in fixed]
    kept = [Kept(name, kind, why) for kind, name, why in findings.kept]
    kept += [Kept(s.name, s.kind, fixed[s.label]) for s in findings.switches if s.label in fixed]
    first, units, axes = len(structure.groups), structure.units, len(structure.axes)
    inside: list[tuple[Switch, int]] = [(s, axes + i) for i, s in enumerate(switches)]
    by_path: dict[str, list[int]] = {}
    for i, s in enumerate(switches):
        if s.kind == CHOICE:
            by_path.setdefault(s.path, []).append(units + i)
    return replace(
        structure,
        groups=(
            *structure.groups,
            *(
                Group(s.name, units + i, 1, tuple(Member(w, 0, n) for w, n in s.weights), s.kind, 0)
                for i, s in enumerate(switches)
            ),
        ),
        gates=(
            *structure.gates,
            *(Slots(w, 0, np.full(n, units + i)) for i, s in enumerate(switches) for w, n in s.weights),
        ),
        axes=(*structure.axes, *(Axis(0, ((first + i, 1),)) for i in range(len(switches)))),
        macs=tuple(
            replace(t, axes=(*t.axes, *(a for s, a in inside if i in s.prices))) for i, t in enumerate(structure.macs)
        ),
        params=tuple(
            replace(t, axes=(*t.axes, *(a for s, a in inside if t.where in s.tensors))) for t in structure.params
        ),
        labels=np.append(structure.labels, [s.label for s in switches]).astype(np.int64),
        parts=tuple(Part(units + i, s.modules, s.loose, s.tensors) for i, s in enumerate(switches)),
        choices=tuple(Options(path, tuple(of)) for path, of in by_path.items()),
        kept=tuple(kept),
    )


def _given(findings: Findings, axes: _Axes) -> Iterable[Given]:
    """The sizes that modules gave, with the units along them; none where no unit stands along any."""
    found = []
    for g in findings.given:
        along = {}
        for position, (dim, tracks) in g.tracks.items():
            for track in tracks:
                seen = lb.compress(_seen(track.labels, axes.unit))
                if seen.shape[dim] == abs(g.sizes[position]) > 1:
                    units = axes.number[lb.axis(seen, dim).numpy()]
                    if (units != FIXED).any():
                        along[position] = units
                    break
        found.append(Given(g.path, g.call, g.sizes, along))
    return found
