"""Landing: from gate weights to a boolean keep that meets the target, and every limit beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nas_gate.cost import MEASURED, CostModel, check_budgets
from nas_gate.latency_table import LatencyTable
from nas_gate.structure import WIDTH, Structure

Ints = npt.NDArray[np.int64]


def least_units(structure: Structure, round_to: int = 1, minimum: int | Mapping[str, int] = 1) -> Ints:
    """The fewest open units of every group, shape (groups,): `minimum` (one number, or by group name), rounded up.

    One number is for the groups that must keep units for the network to stay whole; a branch is held open by name.
    """
    names = {g.name for g in structure.groups}
    if isinstance(minimum, Mapping):
        if strange := sorted(set(minimum) - names):
            raise ValueError(f"minimum must name groups, but there is no {strange[0]!r}; groups: {sorted(names)}")
        wanted = [max(minimum.get(g.name, 0), g.least) for g in structure.groups]
    else:
        wanted = [max(minimum, g.least) if g.least else 0 for g in structure.groups]
    if round_to < 1 or any(w < 1 for w in (minimum.values() if isinstance(minimum, Mapping) else [minimum])):
        raise ValueError(f"`round_to >= 1` and `minimum >= 1` must hold, but got {round_to=}, {minimum=}")
    sizes = np.array([g.size for g in structure.groups], dtype=np.int64)
    return _rounded(np.minimum(np.array(wanted, dtype=np.int64), sizes), round_to, sizes)


def _rounded(counts: Ints, round_to: int, sizes: Ints) -> Ints:
    """Counts rounded up to a multiple, at most the group's size."""
    return np.minimum(-(-counts // round_to) * round_to, sizes)


def reachable(
    structure: Structure,
    metric: str = "macs",
    round_to: int = 1,
    minimum: int | Mapping[str, int] = 1,
    latency: LatencyTable | None = None,
) -> tuple[float, float]:
    """The lowest and highest share of the dense cost that a keep vector can have; milliseconds for "latency_ms".

    The highest is 1 but for choices with candidates that cost more than the first.
    """
    cost = CostModel(structure, latency)
    cost.check(metric)
    unit = cost.unit(metric)
    ends = (least_units(structure, round_to, minimum), min), (_sizes(structure), max)
    low, high = (_Prices(cost, metric, counts, extreme).total for counts, extreme in ends)
    return low / unit, high / unit


def choose(
    structure: Structure,
    scores: Tensor,
    target: float,
    metric: str = "macs",
    round_to: int = 1,
    minimum: int | Mapping[str, int] = 1,
    limits: Mapping[str, float] | None = None,
    latency: LatencyTable | None = None,
) -> Tensor:
    """A boolean keep, shape (units,), whose cost is at most `target` times the dense cost, and close to it.

    Units close in ascending order of `scores`, shape (units,), until the target and all `limits`, {metric: as a target
    of that metric}, are met: opening the unit that was closed last would exceed one. With `round_to` whole blocks of
    units close; one can cost much, so that others open again as long as one fits. Every group keeps at least `minimum`
    units and a multiple of `round_to`, its highest scores. Targets of "latency_ms" are milliseconds, as the table
    `latency` has them. Of a choice the candidate of the highest score is open, a dearer or cheaper one where the target
    demands it (see `_steps`). Where a branch or a candidate is what closes last, units of lower scores open again as
    far as the target allows. Raises ValueError where one is out of reach; a target above what is reachable leaves all
    open.
    """
    wanted = {"target": (metric, target), **{f"limits.{name}": (name, x) for name, x in (limits or {}).items()}}
    check_budgets(target, metric, limits or {})
    if tuple(scores.shape) != (structure.units,):
        raise ValueError(f"scores must have shape ({structure.units},), but have {tuple(scores.shape)}")
    values = scores.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, but {int((~np.isfinite(values)).sum())} of {len(values)} are not")
    for name, (priced, most) in wanted.items():
        lowest, highest = reachable(structure, priced, round_to, minimum, latency)
        if most < lowest:
            what = priced if priced in MEASURED else f"the share of {priced}"
            raise ValueError(
                f"{name}={most} is below what is reachable: {what} can lie between {lowest:.4f} and {highest:.4g} "
                f"({round_to=}, {minimum=}, {len(structure.groups)} groups)"
            )
    cost = CostModel(structure, latency)
    budgets = [(priced, cost.unit(priced), most) for priced, most in wanted.values()]
    sizes, group = _sizes(structure), structure.group_of_unit()
    least = least_units(structure, round_to, minimum)

    def within(left: Ints) -> bool:
        open_units = torch.from_numpy(left).double()
        return all(float(cost.of_counts(open_units, priced)) / unit <= most for priced, unit, most in budgets)

    def landed(sequence: _Steps) -> Ints | None:
        """Open units of every group after the fewest steps of a sequence that meet all budgets; None where none do."""
        steps = sequence.units

        def counts(done: Ints) -> Ints:
            """Open units of every group after some steps."""
            closing = done[sequence.choice[done] < 0]
            left = sizes - np.bincount(group[closing], minlength=len(sizes))
            left = np.maximum(_rounded(left, round_to, sizes), least)
            for index, choice in enumerate(structure.choices):
                opened = done[sequence.choice[done] == index]
                left[group[list(choice.units)]] = 0
                left[group[opened[-1] if len(opened) else sequence.start[index]]] = 1
            return left

        def fits(count: int, then: Ints) -> bool:
            return within(counts(np.append(steps[:count], then)))

        def first(high: int, then: Ints) -> int | None:
            """The fewest steps, at most `high`, that meet all budgets together with `then`."""
            if uneven:
                return next((count for count in range(high + 1) if fits(count, then)), None)
            if not fits(high, then):
                return None
            low = 0
            while low < high:  # with `high` steps they are met; with one step less than those found they are not
                middle = (low + high) // 2
                low, high = (low, middle) if fits(middle, then) else (middle + 1, high)
            return low

        then = steps[:0]
        done = first(len(steps), then)
        while done and structure.groups[group[steps[done - 1]]].kind != WIDTH:
            then = np.append(steps[done - 1], then)
            done = first(done - 1, then)
        return None if done is None else counts(np.append(steps[:done], then))

    # a candidate of a choice that is cheap in one metric can be dear in another, so that a step may raise a cost
    uneven = bool(structure.choices) and len(budgets) > 1
    metrics = dict.fromkeys(priced for priced, _, _ in budgets) if uneven else [metric]
    sequences = (_steps(structure, values, cost, priced, least) for priced in metrics)
    left = next((left for sequence in sequences if (left := landed(sequence)) is not None), None)
    if left is None:
        raise ValueError(
            f"target={target} of {metric} and limits={dict(limits or {})} must be met together, but neither the "
            f"candidates that cost the least {metric} nor those of any limit meet all"
        )
    ranked = [g.start + np.argsort(-values[g.start : g.stop], kind="stable") for g in structure.groups]
    if round_to > 1:
        left = _filled(structure, values, ranked, left, round_to, within)
    keep = np.zeros(len(values), dtype=bool)
    for units, n in zip(ranked, left):
        keep[units[:n]] = True
    return torch.from_numpy(keep)


def _filled(
    structure: Structure,
    scores: npt.NDArray[np.float64],
    ranked: Sequence[Ints],
    left: Ints,
    round_to: int,
    within: Callable[[Ints], bool],
) -> Ints:
    """`left`, open units of every group, with every closed block of width open again that `within` allows.

    The last block to close can cost far more than what was missing to the target. The block of the highest score comes
    first, each by its best unit.
    """
    left = left.copy()
    full = [g.kind != WIDTH for g in structure.groups]
    while open_groups := [i for i, g in enumerate(structure.groups) if not full[i] and left[i] < g.size]:
        best = max(open_groups, key=lambda i: scores[ranked[i][left[i]]])
        more = left.copy()
        more[best] = min(left[best] + round_to, structure.groups[best].size)
        if within(more):
            left = more
        else:
            full[best] = True
    return left


def _sizes(structure: Structure) -> Ints:
    return np.array([g.size for g in structure.groups], dtype=np.int64)


class _Prices:
    """What the network costs with each candidate of every choice, all other choices at their `extreme` (min or max).

    `of` has the costs of every choice's candidates, `total` is the cost at the extreme of all. `counts` are the open
    units of every group; those of choices do not matter.
    """

    def __init__(self, cost: CostModel, metric: str, counts: Ints, extreme: Callable[[Iterable[float]], float]) -> None:
        structure, group = cost.structure, cost.structure.group_of_unit()
        counts = counts.copy()
        for choice in structure.choices:  # open, so that what is inside of a candidate is seen from there
            counts[group[list(choice.units)]] = 1
        self.of: dict[str, list[float]] = {}
        for choice in sorted(structure.choices, key=lambda c: len(c.path), reverse=True):  # the innermost first
            of = self.of[choice.path] = []
            for unit in choice.units:
                counts[group[list(choice.units)]] = 0
                counts[group[unit]] = 1
                of.append(float(cost.of_counts(torch.from_numpy(counts).double(), metric)))
            counts[group[list(choice.units)]] = 0
            counts[group[choice.units[of.index(extreme(of))]]] = 1
        self.total = float(cost.of_counts(torch.from_numpy(counts).double(), metric))


@dataclass(frozen=True)
class _Steps:
    """The steps by which the cost falls, in order, as units: of width or depth they close, of a choice they open.

    `choice` is every unit's choice (-1 for none), `start` the unit of every choice that is open before all steps.
    """

    units: Ints
    choice: Ints
    start: tuple[int, ...]


def _steps(structure: Structure, scores: npt.NDArray[np.float64], cost: CostModel, metric: str, least: Ints) -> _Steps:
    """Every unit's step at its score; those of a choice where another candidate opens.

    A choice's best candidate is that of the highest score. From there the next cheaper one (all else open) of the
    highest score follows, and so on; and so do dearer ones before it. Such a change stands where the units close
    whose score is as far from 0 as the candidate's is from the best. When nothing else is left to close, the one
    that costs least then is open.
    """
    of_choice = np.full(structure.units, -1, dtype=np.int64)
    units: list[int] = []
    keys: list[float] = []
    start: list[int] = []
    dear, cheap = (_Prices(cost, metric, counts, min).of for counts in (_sizes(structure), least))
    for index, choice in enumerate(structure.choices):
        mine = np.array(choice.units)
        of_choice[mine] = index
        best, *others = np.argsort(-scores[mine], kind="stable").tolist()
        prices = dear[choice.path]
        dearer, cheaper = [best], [best]
        for candidate in others:
            if prices[candidate] > prices[dearer[-1]]:
                dearer.append(candidate)
            if prices[candidate] < prices[cheaper[-1]]:
                cheaper.append(candidate)
        margin = scores[mine] - scores[mine[best]]
        for before, after in pairwise(reversed(dearer)):
            units.append(int(mine[after]))
            keys.append(float(margin[before]))
        for after in cheaper[1:]:
            units.append(int(mine[after]))
            keys.append(-float(margin[after]))
        if cheaper[-1] != (last := int(np.argmin(cheap[choice.path]))):
            units.append(int(mine[last]))
            keys.append(np.inf)
        start.append(int(mine[dearer[-1]]))
    alone = np.flatnonzero(of_choice < 0)
    order = np.argsort(np.append(scores[alone], keys), kind="stable")
    return _Steps(np.append(alone, np.array(units, dtype=np.int64))[order], of_choice, tuple(start))
