"""Landing: from gate weights to a boolean keep that meets the target, and every limit beside it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nas_gate.cost import MEASURED, CostModel, check_budgets
from nas_gate.latency_table import LatencyTable
from nas_gate.structure import Structure


def least_units(structure: Structure, round_to: int = 1, minimum: int | Mapping[str, int] = 1) -> npt.NDArray[np.int64]:
    """The fewest open units of every group, shape (groups,): `minimum` (one number, or by group name), rounded up."""
    names = {g.name for g in structure.groups}
    if isinstance(minimum, Mapping):
        if strange := sorted(set(minimum) - names):
            raise ValueError(f"minimum must name groups, but there is no {strange[0]!r}; groups: {sorted(names)}")
        wanted = [minimum.get(g.name, 1) for g in structure.groups]
    else:
        wanted = [minimum] * len(structure.groups)
    if round_to < 1 or any(w < 1 for w in wanted):
        raise ValueError(f"`round_to >= 1` and `minimum >= 1` must hold, but got {round_to=}, {minimum=}")
    sizes = np.array([g.size for g in structure.groups], dtype=np.int64)
    return _rounded(np.minimum(np.array(wanted, dtype=np.int64), sizes), round_to, sizes)


def _rounded(counts: npt.NDArray[np.int64], round_to: int, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts rounded up to a multiple, at most the group's size."""
    return np.minimum(-(-counts // round_to) * round_to, sizes)


def reachable(
    structure: Structure,
    metric: str = "macs",
    round_to: int = 1,
    minimum: int | Mapping[str, int] = 1,
    latency: LatencyTable | None = None,
) -> tuple[float, float]:
    """The lowest and highest share of the dense cost that a keep vector can have; milliseconds for "latency_ms"."""
    cost = CostModel(structure, latency)
    cost.check(metric)
    least = torch.from_numpy(least_units(structure, round_to, minimum)).double()
    unit = cost.unit(metric)
    return float(cost.of_counts(least, metric)) / unit, cost.total(metric) / unit


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
    of that metric}, are met: opening the unit that was closed last would exceed one (with `round_to`, the last block of
    units). Every group keeps at least `minimum` units and a multiple of `round_to`, its highest scores. Targets of
    "latency_ms" are milliseconds, as the table `latency` has them. Raises ValueError where one is out of reach.
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
    sizes = np.array([g.size for g in structure.groups], dtype=np.int64)
    group = structure.group_of_unit()
    least = least_units(structure, round_to, minimum)
    ascending = np.argsort(values, kind="stable")

    def counts(closed: int) -> npt.NDArray[np.int64]:
        left = sizes - np.bincount(group[ascending[:closed]], minlength=len(sizes))
        return np.maximum(_rounded(left, round_to, sizes), least)

    def fits(closed: int) -> bool:
        left = torch.from_numpy(counts(closed)).double()
        return all(float(cost.of_counts(left, priced)) / unit <= most for priced, unit, most in budgets)

    low, high = 0, len(values)  # every cost falls with the number of closed units
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    keep = np.zeros(len(values), dtype=bool)
    for g, n in zip(structure.groups, counts(low)):
        best = np.argsort(-values[g.start : g.stop], kind="stable")[:n]
        keep[g.start + best] = True
    return torch.from_numpy(keep)
