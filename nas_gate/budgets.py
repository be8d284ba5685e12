"""Budgets: loss terms that draw costs to a target and below limits, and the controller that moves these in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nas_gate.gating import GatedModel, Lagrangian, penalty
from nas_gate.settings import Settings
from nas_gate.training import require


class Budget(Protocol):
    """A loss term that draws the cost to a target and others below limits, which may move from step to step."""

    def loss(self, gated: GatedModel, target: float, limits: Mapping[str, float]) -> Tensor:
        """Scalar to add to the task's loss."""

    def update(self, gated: GatedModel) -> None:
        """Adapt after a step."""

    def state_dict(self) -> dict[str, Any]:
        """What changes during training."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""


class PenaltyBudget:
    """`nas_gate.penalty` of a fixed weight."""

    def __init__(self, metric: str, weight: float = 24.0, power: int = 2) -> None:
        require(power in (1, 2), "budget penalty: `power` must be 1 or 2", power)
        require(weight >= 0, "budget penalty: `weight >= 0` must hold", weight)
        self._metric, self._weight, self._power = metric, weight, power

    def loss(self, gated: GatedModel, target: float, limits: Mapping[str, float]) -> Tensor:
        """The penalty for `target` and `limits`."""
        return penalty(gated, target, weight=self._weight, power=self._power, metric=self._metric, limits=limits)

    def update(self, gated: GatedModel) -> None:
        """Nothing adapts."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class LagrangianBudget:
    """`nas_gate.Lagrangian`, which finds the weight itself."""

    def __init__(self, metric: str, rate: float = 0.1) -> None:
        self._lagrangian = Lagrangian(1.0, rate=rate, metric=metric)

    def loss(self, gated: GatedModel, target: float, limits: Mapping[str, float]) -> Tensor:
        """The augmented Lagrangian's term for `target` and `limits`."""
        self._lagrangian.target, self._lagrangian.limits = target, dict(limits)
        return self._lagrangian(gated)

    def update(self, gated: GatedModel) -> None:
        """Adapt the multipliers."""
        self._lagrangian.update(gated)

    def state_dict(self) -> dict[str, Any]:
        """The multipliers."""
        return dict(self._lagrangian.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the multipliers."""
        self._lagrangian.load_state_dict(state)


BUDGETS: dict[str, Callable[..., Budget]] = {"penalty": PenaltyBudget, "lagrangian": LagrangianBudget}


def make_budget(name: str, metric: str, **arguments: Any) -> Budget:
    """The budget called `name`; ValueError for an unknown name, TypeError for an unknown argument."""
    require(name in BUDGETS, f"`budget` must be one of {tuple(BUDGETS)}", name)
    return BUDGETS[name](metric, **arguments)


class GateController:
    """`training.Controller` of a gated model: the descending target and limits, the gate's progress, the budget.

    On every leg the target goes in a straight line over the first `gating.descent` of the leg's epochs, from the
    one before (at first, the dense cost) to the one wanted, and stays there; limits do so on the first leg. The gate's
    own progress (its temperature) is that of all legs.
    """

    def __init__(self, gated: GatedModel, budget: Budget, settings: Settings) -> None:
        self._gated, self._budget = gated, budget
        self._metric, self._legs = settings.metric, settings.legs()
        self._limits, self._descent = settings.limits, settings.gating.descent
        self._dense = {m: gated.cost.total(m) / gated.cost.unit(m) for m in (self._metric, *self._limits)}
        self._present = self._dense[self._metric]
        self._bounds = {name: self._dense[name] for name in self._limits}

    def before_step(self, epoch: float) -> None:
        """Set the target and the gate's progress for this moment."""
        leg = next((leg for leg in self._legs if epoch < leg.end), self._legs[-1])
        progress = (epoch - leg.begin) / (leg.end - leg.begin)
        way = min(1.0, progress / self._descent) if self._descent else 1.0
        first = self._dense[self._metric] if leg.above is None else leg.above
        self._present = first + way * (leg.target - first)
        for name, limit in self._limits.items():
            first = self._dense[name] if leg.above is None else limit
            self._bounds[name] = first + way * (limit - first)
        self._gated.gates.function.set_progress(epoch / self._legs[-1].end)

    def loss(self) -> Tensor:
        """The budget's term."""
        return self._budget.loss(self._gated, self._present, self._bounds)

    def after_step(self) -> None:
        """Let the budget adapt."""
        self._budget.update(self._gated)

    def figures(self) -> dict[str, float]:
        """The gates' present cost, as targets count it, and the present target."""
        with torch.no_grad():
            share = float(self._gated.cost_share(self._metric))
        return {"cost": share * self._dense[self._metric], "target": self._present}

    def state_dict(self) -> dict[str, Any]:
        """The budget's state; the rest follows from the epoch."""
        return self._budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the budget's state."""
        self._budget.load_state_dict(state)
