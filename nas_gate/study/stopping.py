"""Early stopping with several objectives: a trial ends when finished ones leave it no hope at its cost.

Optuna's `report` and `should_prune` know one objective only. Here two trials are compared where both stood at
the same epoch of the same stage: (accuracy, macs) of then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nas_gate.search import Moment
from nas_gate.training import require

Point = tuple[float, float]
"""(validation accuracy in [0, 1], multiply-accumulates) after an epoch."""


class Stopped(Exception):
    """The trial was stopped early; it counts as pruned."""


@dataclass(frozen=True)
class EarlyStopping:
    """Stop a trial once `rivals` finished ones were better by `margin` at no higher cost at the same epoch.

    `margin` is a difference of accuracies, which are in [0, 1]; no trial is stopped in the first `grace`
    epochs of a stage, where accuracies say little.
    """

    margin: float = 0.02
    rivals: int = 3
    grace: int = 3

    def __post_init__(self) -> None:
        require(self.margin >= 0, "`early_stopping.margin >= 0` must hold", self.margin)
        require(self.rivals >= 1, "`early_stopping.rivals >= 1` must hold", self.rivals)
        require(self.grace >= 0, "`early_stopping.grace >= 0` must hold", self.grace)


def hopeless(point: Point, finished: Iterable[Point], rule: EarlyStopping) -> bool:
    """Whether at least `rule.rivals` of `finished` cost no more than `point` and are clearly more accurate."""
    accuracy, macs = point
    better = sum(macs_then <= macs and then >= accuracy + rule.margin for then, macs_then in finished)
    return better >= rule.rivals


def key(moment: Moment) -> str:
    """The trial's attribute that holds its point of this moment."""
    return f"nas_gate.at.{moment.stage}.{moment.epoch}"
