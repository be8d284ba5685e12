"""When a trial with several objectives is not worth its remaining epochs.

Optuna's `report` and `should_prune` refuse several objectives. The rule here: a trial is stopped once several finished
ones had, after the same epoch of the same stage, a clearly better accuracy at no higher cost. What costs less than
all others is never stopped, however bad its accuracy: it may be the end of the front.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nas_gate.training import require


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after the first `grace` epochs, once `rivals` finished trials are better by `margin` in accuracy."""

    margin: float = 0.02
    rivals: int = 3
    grace: int = 3

    def __post_init__(self) -> None:
        require(0 <= self.margin < 1, "early_stopping: `0 <= margin < 1` must hold", self.margin)
        require(self.rivals >= 1, "early_stopping: `rivals >= 1` must hold", self.rivals)
        require(self.grace >= 0, "early_stopping: `grace >= 0` must hold", self.grace)

    def stops(self, epoch: int, accuracy: float, macs: float, others: Iterable[tuple[float, float]]) -> bool:
        """Whether to stop after `epoch` (from 0), given the (accuracy, macs) of finished trials after that epoch."""
        if epoch < self.grace:
            return False
        better = sum(theirs >= accuracy + self.margin and cost <= macs for theirs, cost in others)
        return better >= self.rivals
