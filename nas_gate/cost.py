"""What an architecture costs: a multilinear form in keep, exact at every 0/1 point, differentiable everywhere.

`macs` are multiply-accumulates of one forward pass on the example inputs (`flops = 2 * macs`, as
`torch.utils.flop_counter` counts them: convolutions and matrix products, no biases, norms or activations);
`params` are elements of parameters. Every priced operation costs `coefficient` times the product of the kept sizes
of its axes, and every axis' kept size is a constant plus a weighted sum of open units. `latency_ms`, milliseconds of
one forward pass, is predicted from a table measured on this machine (see `latency_table`), where one is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas_gate.latency_table import LatencyModel, LatencyTable
from nas_gate.structure import Structure, Term
from nas_gate.structure.trace import mode_of, plain_operations

METRICS = ("macs", "params")
"""What is counted: wanted as a share of the dense model's, in (0, 1]."""

MEASURED = ("latency_ms",)
"""What is predicted from measurements: wanted in the unit that the name ends with."""


class CostModel(nn.Module):
    """The cost of a keep vector, in float64, so that counts are exact up to 2**53.

    Calling it with `keep` of shape (units,), soft or boolean, gives a scalar float64 tensor, differentiable in keep.
    With a latency table (of this network: ValueError otherwise) "latency_ms" is a metric, too.
    """

    _group: Tensor
    _dense: Tensor

    def __init__(self, structure: Structure, latency: LatencyTable | None = None) -> None:
        super().__init__()
        if latency is not None:
            latency.check(structure)
        self.structure = structure
        self.table = latency
        self.latency = None if latency is None else LatencyModel(latency)
        self._other = {"macs": structure.other_macs, "params": 0}
        dense = structure.open_units(structure.dense()).astype(np.float64)
        self.register_buffer("_group", torch.from_numpy(structure.group_of_unit()), persistent=False)
        self.register_buffer("_dense", torch.from_numpy(dense), persistent=False)
        for metric, terms in (("macs", structure.macs), ("params", structure.params)):
            weights, fixed, coefficient, axes = _form(structure, terms)
            self.register_buffer(f"_{metric}_weights", weights, persistent=False)
            self.register_buffer(f"_{metric}_fixed", fixed, persistent=False)
            self.register_buffer(f"_{metric}_coefficient", coefficient, persistent=False)
            self.register_buffer(f"_{metric}_axes", axes, persistent=False)
        priced = METRICS if latency is None else (*METRICS, *MEASURED)
        self._total = {metric: float(self.of_counts(self._dense, metric)) for metric in priced}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CostModel:
        """Moved as the network is, but never cast with it: counts are exact in float64 only."""
        moved: CostModel = super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return moved

    def forward(self, keep: Tensor, metric: str = "macs") -> Tensor:
        """Cost of keep, shape (units,), as a float64 scalar."""
        self.check(metric)
        if tuple(keep.shape) != (self.structure.units,):
            raise ValueError(f"keep must have shape ({self.structure.units},), but has {tuple(keep.shape)}")
        open_units = torch.zeros_like(self._dense).index_add(0, self._group, keep.to(torch.float64))
        return self.of_counts(open_units, metric)

    def of_counts(self, open_units: Tensor, metric: str = "macs") -> Tensor:
        """Cost when so many units of every group are open; `open_units` has shape (groups,), float64."""
        if metric in MEASURED and self.latency is not None:
            predicted: Tensor = self.latency(open_units)
            return predicted
        weights, fixed = getattr(self, f"_{metric}_weights"), getattr(self, f"_{metric}_fixed")
        axes, coefficient = getattr(self, f"_{metric}_axes"), getattr(self, f"_{metric}_coefficient")
        kept = weights @ open_units + fixed
        # not prod, whose gradient makes the processor wait for a GPU, to count zeros
        products = reduce(torch.mul, kept[axes].unbind(0))
        result: Tensor = coefficient @ products + self._other[metric]
        return result

    def total(self, metric: str = "macs") -> float:
        """Cost of the dense model: of every choice its first candidate, and all else. An int where it is counted."""
        self.check(metric)
        return self._total[metric] if metric in MEASURED else round(self._total[metric])

    def unit(self, metric: str) -> float:
        """What targets of a metric are counted in: the dense model's cost for shares, 1 for milliseconds."""
        return 1.0 if metric in MEASURED else self.total(metric)

    def check(self, metric: str) -> None:
        """Raise ValueError for a metric that is not priced, or a measured one without a table."""
        check_metric(metric)
        if metric in MEASURED and self.latency is None:
            raise ValueError(
                f"the metric {metric!r} needs a measured table: gated.add_latency(nas_gate.measure_latency(gated))"
            )

    def share(self, keep: Tensor, metric: str = "macs") -> Tensor:
        """Cost of keep over the cost of the dense model."""
        result: Tensor = self(keep, metric) / self.total(metric)
        return result


def check_metric(metric: str) -> None:
    """Raise ValueError for a metric that is not priced."""
    if metric not in (*METRICS, *MEASURED):
        raise ValueError(f"metric must be one of {', '.join((*METRICS, *MEASURED))}, but is {metric!r}")


def check_wanted(name: str, wanted: float, metric: str) -> None:
    """Raise ValueError unless what is wanted of a metric, called `name`, is above 0 and, for a share, at most 1."""
    if metric in MEASURED:
        if not 0 < wanted < math.inf:
            raise ValueError(f"`{name} > 0` must hold for {metric}, but got {name}={wanted}")
    elif not 0 < wanted <= 1:
        raise ValueError(f"`0 < {name} <= 1` must hold for the wanted share of the dense cost, but got {name}={wanted}")


def check_budgets(target: float, metric: str, limits: Mapping[str, float]) -> None:
    """Raise ValueError unless a target and the limits beside it can be wanted: see `check_wanted`."""
    check_metric(metric)
    check_wanted("target", target, metric)
    for name, limit in limits.items():
        check_metric(name)
        if name == metric:
            raise ValueError(f"limits must be of other metrics than the target, but both are of {metric!r}")
        check_wanted(f"limits.{name}", limit, name)


def _form(structure: Structure, terms: Sequence[Term]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(axis weights (axes, groups), fixed sizes (axes,), coefficients (terms,), axes of terms (degree, terms)).

    Terms over the same axes are one; sizes without units go into the coefficient; axis 0 is the constant 1.
    """
    used: dict[int, int] = {}
    merged: dict[tuple[int, ...], int] = {(): 0}
    for term in terms:
        constant, variable = term.coefficient, []
        for a in term.axes:
            if structure.axes[a].groups:
                variable.append(used.setdefault(a, len(used) + 1))
            else:
                constant *= structure.axes[a].fixed
        key = tuple(sorted(variable))
        merged[key] = merged.get(key, 0) + constant
    degree = max(1, max(len(k) for k in merged))
    weights = torch.zeros(len(used) + 1, len(structure.groups), dtype=torch.float64, device="cpu")
    fixed = torch.ones(len(used) + 1, dtype=torch.float64, device="cpu")
    for axis, row in used.items():
        fixed[row] = structure.axes[axis].fixed
        for group, count in structure.axes[axis].groups:
            weights[row, group] = count
    axes = torch.tensor([[*k, *[0] * (degree - len(k))] for k in merged], dtype=torch.int64, device="cpu")
    coefficient = torch.tensor(list(merged.values()), dtype=torch.float64, device="cpu")
    return weights, fixed, coefficient, axes.t().contiguous()


def reachable_share(structure: Structure) -> float:
    """The share of the dense model's MACs that lie in operations with at least one gated axis."""
    open_units = structure.open_units(structure.dense())
    dense, reached = structure.other_macs, 0
    for term in structure.macs:
        axes = [structure.axes[a] for a in term.axes]
        macs = term.coefficient * math.prod(a.fixed + sum(n * int(open_units[g]) for g, n in a.groups) for a in axes)
        dense += macs
        reached += macs if any(a.groups for a in axes) else 0
    return reached / dense if dense else 0.0


def count_macs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode, counted by PyTorch's FlopCounterMode.

    Fused attention is run as plain matrix products, so that it counts alike on every backend.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:  # the counter hangs hooks on what needs a gradient and goes into a module, without one it fails
        p.requires_grad = False
    try:
        with mode_of(model, training=False), plain_operations(), FlopCounterMode(display=False) as counter:
            model(*args, **(kwargs or {}))
    finally:
        for p in learned:
            p.requires_grad = True
    return int(counter.get_total_flops()) // 2
