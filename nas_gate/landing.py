"""Landing: from gate weights to a boolean keep that meets the target."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nas_gate.cost import CostModel, check_metric
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
    structure: Structure, metric: str = "macs", round_to: int = 1, minimum: int | Mapping[str, int] = 1
) -> tuple[float, float]:
    """The lowest and highest share of the dense cost that a keep vector can have."""
    check_metric(metric)
    cost = CostModel(structure)
    least = torch.from_numpy(least_units(structure, round_to, minimum)).double()
    return float(cost.of_counts(least, metric)) / cost.total(metric), 1.0


def choose(
    structure: Structure,
    scores: Tensor,
    target: float,
    metric: str = "macs",
    round_to: int = 1,
    minimum: int | Mapping[str, int] = 1,
) -> Tensor:
    """A boolean keep, shape (units,), whose cost is at most `target` times the dense cost, and close to it.

    Units close in ascending order of `scores`, shape (units,), until the target is met: opening the unit that was
    closed last would exceed it (with `round_to`, the last block of units). Every group keeps at least `minimum`
    units and a multiple of `round_to`, its highest scores. Raises ValueError where the target is out of reach.
    """
    if not 0 < target < 1:
        raise ValueError(f"`0 < target < 1` must hold for the wanted share of the dense cost, but got target={target}")
    if tuple(scores.shape) != (structure.units,):
        raise ValueError(f"scores must have shape ({structure.units},), but have {tuple(scores.shape)}")
    values = scores.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, but {int((~np.isfinite(values)).sum())} of {len(values)} are not")
    lowest, _ = reachable(structure, metric, round_to, minimum)
    if target < lowest:
        raise ValueError(
            f"target={target} is below what is reachable: the share of {metric} can lie between {lowest:.4f} and 1 "
            f"({round_to=}, {minimum=}, {len(structure.groups)} groups)"
        )
    cost = CostModel(structure)
    total = cost.total(metric)
    sizes = np.array([g.size for g in structure.groups], dtype=np.int64)
    group = structure.group_of_unit()
    least = least_units(structure, round_to, minimum)
    ascending = np.argsort(values, kind="stable")

    def counts(closed: int) -> npt.NDArray[np.int64]:
        left = sizes - np.bincount(group[ascending[:closed]], minlength=len(sizes))
        return np.maximum(_rounded(left, round_to, sizes), least)

    def fits(closed: int) -> bool:
        return float(cost.of_counts(torch.from_numpy(counts(closed)).double(), metric)) / total <= target

    low, high = 0, len(values)  # the cost falls with the number of closed units
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    keep = np.zeros(len(values), dtype=bool)
    for g, n in zip(structure.groups, counts(low)):
        best = np.argsort(-values[g.start : g.stop], kind="stable")[:n]
        keep[g.start + best] = True
    return torch.from_numpy(keep)
