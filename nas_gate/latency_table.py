"""A network's latency as a function of its open units: measured operations, interpolated between grid points.

The latency of a keep vector is the sum over all operations that the network runs. Every operation was measured alone
on a grid of its widths; between grid points its latency is multilinear, so that it is exact at the grid, continuous,
and differentiable almost everywhere. Two whole networks, the dense one and the thinnest, calibrate the sum: `scale`
for what operations lose when they follow one another (cold caches), `overhead` per operation for what surrounds them.
Both networks have the first candidate of every choice; what runs inside another one counts where that one is chosen.
Measured values are noisy, but a wider network is never predicted to be faster: see `isotone`.

Latency has steps, where a kernel computes blocks of channels: one unit less spares nothing there, though a block less
would. So the gradient is not that of the latency but that of its lower convex hull along every width: what a unit
spares on the way to the next step that pays.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas_gate.structure import Axis, Structure

SCHEMA = 2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Milliseconds of one operation, `ms` of shape (len(p) for p in `points`), at all combinations of its widths."""

    points: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]
    """In C order: the last width varies fastest."""


@dataclass(frozen=True)
class Operation:
    """One operation that the network runs: the name of its grid, its widths, and the groups that it needs.

    `needs` are groups without whose open units the operation does not run at all.
    """

    name: str
    widths: tuple[Axis, ...]
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """Measured operations of one network on one machine.

    `identity` says what the figures belong to (machine, torch version, threads, input shapes, network), `groups` the
    size of every group of units by name, `dense_ms` and `thinnest_ms` the measured latencies of the network with all
    units and with one of every group, but none of those in `absent`: all candidates of choices but the first.
    """

    identity: Mapping[str, Any]
    groups: Mapping[str, int]
    operations: tuple[Operation, ...]
    grids: Mapping[str, Grid]
    dense_ms: float
    thinnest_ms: float
    absent: tuple[int, ...] = ()

    def check(self, structure: Structure) -> None:
        """Raise ValueError unless the table belongs to a network of this structure."""
        own = {g.name: g.size for g in structure.groups}
        if list(own.items()) != list(self.groups.items()):
            name = next((n for n in {**own, **self.groups} if own.get(n) != self.groups.get(n)), None)
            if name is None:
                raise ValueError("the latency table must belong to the network, but its groups stand in another order")
            raise ValueError(
                f"the latency table must belong to the network, but its group {name!r} has {self.groups.get(name, 0)} "
                f"units there and {own.get(name, 0)} here: measure the latency again"
            )


class LatencyModel(nn.Module):
    """Milliseconds as a function of the open units of every group; see the module's text."""

    _fixed: Tensor
    _weights: Tensor
    _points: Tensor
    _ms: Tensor
    _needs: Tensor

    def __init__(self, table: LatencyTable) -> None:
        super().__init__()
        degree = max((len(o.widths) for o in table.operations), default=0) or 1
        count = max((len(p) for g in table.grids.values() for p in g.points), default=1) + 1
        groups, operations = len(table.groups), len(table.operations)
        fixed = np.zeros((operations, degree))
        weights = np.zeros((operations, degree, groups))
        # an axis that an operation lacks, or has fewer points of, goes on with points at which nothing changes
        points = np.tile(np.arange(count, dtype=float), (operations, degree, 1))
        ms = np.zeros((operations, *([count] * degree), 2))  # the latency, and its hull
        longest = max((len(operation.needs) for operation in table.operations), default=0)
        needs = np.full((operations, max(1, longest)), groups)  # beyond the groups stands what is always there
        for row, operation in enumerate(table.operations):
            grid = table.grids[operation.name]
            values = isotone(np.array(grid.ms).reshape([len(p) for p in grid.points]))
            shape = [*values.shape, *([1] * (degree - values.ndim))]
            both = np.stack([values, lower_hull(values, grid.points)], axis=-1).reshape([*shape, 2])
            ms[row] = np.pad(both, [*((0, count - n) for n in shape), (0, 0)], mode="edge")
            for d, (axis, at) in enumerate(zip(operation.widths, grid.points)):
                points[row, d] = [*at, *(at[-1] + 1 + i for i in range(count - len(at)))]
                fixed[row, d] = axis.fixed
                for group, n in axis.groups:
                    weights[row, d, group] = n
            needs[row, : len(operation.needs)] = list(operation.needs)
        arrays = {"fixed": fixed, "weights": weights, "points": points, "ms": ms, "needs": needs}
        for name, array in arrays.items():
            self.register_buffer(f"_{name}", torch.from_numpy(array), persistent=False)
        whole = torch.tensor(list(table.groups.values()), dtype=torch.float64, device="cpu")
        thin = torch.ones_like(whole)
        whole[list(table.absent)] = thin[list(table.absent)] = 0
        runs = self._runs(whole)  # the same ones in both
        dense, thinnest = (float(self._alone(n) @ runs) for n in (whole, thin))
        # at most as much as leaves the overhead at 0 or above, however noisy the two were
        most = table.dense_ms / dense if dense > 0 else 0.0
        rise = table.dense_ms - table.thinnest_ms
        self.scale = min(max(0.0, rise / (dense - thinnest)), most) if dense > thinnest else most
        """Milliseconds within the network for one of an operation alone."""
        self.overhead = (table.dense_ms - self.scale * dense) / max(1.0, float(runs.sum()))
        """Milliseconds around every operation."""

    def forward(self, open_units: Tensor) -> Tensor:
        """Milliseconds when so many units of every group are open; `open_units` has shape (groups,), float64."""
        return ((self.scale * self._alone(open_units) + self.overhead) * self._runs(open_units)).sum()

    def _runs(self, open_units: Tensor) -> Tensor:
        """1 for every operation that runs, 0 for the others, shape (operations,)."""
        there = torch.cat([open_units.clamp(max=1), open_units.new_ones(1)])
        return reduce(torch.mul, there[self._needs].unbind(1))  # as in `CostModel.of_counts`

    def _alone(self, open_units: Tensor) -> Tensor:
        """Interpolated milliseconds of every operation by itself, shape (operations,); the gradient is the hull's."""
        widths = self._weights @ open_units + self._fixed
        count = self._points.shape[-1]
        below = torch.searchsorted(self._points, widths.detach().unsqueeze(-1)) - 1
        below = below.clamp(0, count - 2)
        low, high = (self._points.gather(-1, below + i).squeeze(-1) for i in (0, 1))
        part = ((widths - low) / (high - low)).clamp(min=0)
        index = below.squeeze(-1)
        rows = torch.arange(len(index), device=index.device)
        result = open_units.new_zeros(len(index), 2)
        for corner in itertools.product((0, 1), repeat=index.shape[1]):
            share = open_units.new_ones(len(index))
            for d, side in enumerate(corner):
                share = share * (part[:, d] if side else 1 - part[:, d])
            place = (rows, *(index[:, d] + side for d, side in enumerate(corner)))
            result = result + share.unsqueeze(-1) * self._ms[place]
        latency, hull = result.unbind(-1)
        return latency.detach() + (hull - hull.detach())


def isotone(values: Floats) -> Floats:
    """Values that rise along every axis: the mean of the lowest such ones above and the highest such ones below.

    Values that rise already are left as they are.
    """
    above, below = values, values
    for axis in range(values.ndim):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    result: Floats = (above + below) / 2
    return result


def lower_hull(values: Floats, points: Sequence[Sequence[int]]) -> Floats:
    """Lower convex hulls along the first axis, of those along the next one, and so on, shape as `values`.

    `points` are the places of the values along every axis. Values that rise along an axis still do.
    """
    for axis, at in enumerate(points):
        x = np.asarray(at, dtype=float)
        v = np.moveaxis(values, axis, -1)
        lowest = v.copy()
        for i, k, j in itertools.combinations(range(len(x)), 3):  # the chord over k from i to j
            part = (x[k] - x[i]) / (x[j] - x[i])
            lowest[..., k] = np.minimum(lowest[..., k], (1 - part) * v[..., i] + part * v[..., j])
        values = np.moveaxis(lowest, -1, axis)
    return values


def to_json(table: LatencyTable) -> str:
    """The table as text; `from_json` gives it back."""
    return json.dumps({"schema": SCHEMA, **asdict(table)}, indent=1) + "\n"


def from_json(text: str) -> LatencyTable:
    """The table that `to_json` wrote; ValueError for anything else."""
    try:
        plain = json.loads(text)
        if plain["schema"] != SCHEMA:
            raise ValueError(f"schema {SCHEMA} is read, but it has schema {plain['schema']}")
        grids = {name: grid_from(each) for name, each in plain["grids"].items()}
        operations = tuple(_operation(each, grids) for each in plain["operations"])
        groups = {str(name): int(size) for name, size in plain["groups"].items()}
        figures = float(plain["dense_ms"]), float(plain["thinnest_ms"])
        return LatencyTable(plain["identity"], groups, operations, grids, *figures, tuple(map(int, plain["absent"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"a latency table must be as nas_gate.measure_latency leaves it, but {error!r}") from error


def grid_from(plain: Mapping[str, Any]) -> Grid:
    """A grid as JSON holds it."""
    grid = Grid(tuple(tuple(map(int, p)) for p in plain["points"]), tuple(map(float, plain["ms"])))
    if len(grid.ms) != math.prod(len(p) for p in grid.points):
        raise ValueError(f"a grid of {[len(p) for p in grid.points]} points has {len(grid.ms)} values")
    return grid


def _operation(plain: Mapping[str, Any], grids: Mapping[str, Grid]) -> Operation:
    widths = tuple(Axis(int(w["fixed"]), tuple((int(g), int(n)) for g, n in w["groups"])) for w in plain["widths"])
    if len(widths) != len(grids[plain["name"]].points):
        raise ValueError(f"{plain['name']} has {len(widths)} widths and another number of them in its grid")
    return Operation(str(plain["name"]), widths, tuple(map(int, plain["needs"])))
