"""What candidates are judged by beside their cost: the task's metric, by its name and direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECORD = "task_metric"
"""The key of results that says it, as `quality_of` reads it."""


COSTS = {"macs": "macs", "params": "params", "latency": "latency_ms"}
"""What a candidate costs, by the word that people give -> its column in tables."""


@dataclass(frozen=True)
class Quality:
    """A figure of candidates, measured on validation data at the last epoch.

    Results hold it under its `name`; `test_<name>` and `dense_<name>` are that on test data and of the dense network.
    `shown` is how people are shown it, a format specification: one that ends with % shows a share of 1.

    Raises ValueError where the name is no identifier or nothing can be formatted so.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    shown: str = ".2%"

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"the name of a task's metric must be an identifier, but is {self.name!r}")
        try:
            format(1.0, self.shown)
        except ValueError as error:
            raise ValueError(f"`shown` must be a format of floats, as .2%, but is {self.shown!r}: {error}") from error

    @property
    def label(self) -> str:
        """The name, for people."""
        return self.name.replace("_", " ")

    @property
    def test(self) -> str:
        """The name of the same figure on test data."""
        return f"test_{self.name}"

    @property
    def dense(self) -> str:
        """The name of the same figure of the dense network."""
        return f"dense_{self.name}"

    @property
    def percent(self) -> bool:
        """Whether it is shown in per cent."""
        return self.shown.endswith("%")

    @property
    def sign(self) -> int:
        """What a value is multiplied by to be the better for being higher."""
        return 1 if self.higher_is_better else -1

    @property
    def reference(self) -> tuple[float, float] | None:
        """The corner of hypervolumes, (value, share of the dense cost): none for an error, which has no worst value."""
        return (0.0, 1.0) if self.higher_is_better else None

    def against(self, cost: str) -> tuple[tuple[str, str], tuple[str, str]]:
        """It and a cost, as objectives: pairs of a column and "max" or "min"."""
        return (self.name, "max" if self.higher_is_better else "min"), (cost, "min")

    def show(self, value: float) -> str:
        """A value, for people: 93.40%, 0.1234."""
        return format(value, self.shown)

    def show_size(self, value: float) -> str:
        """The size of a difference or spread, for people: in points where values are in per cent, without the word."""
        return format(value, self.shown).removesuffix("%")

    def show_change(self, change: float) -> str:
        """A difference of two values, for people: +1.20 points, -0.0123."""
        return f"{'-' if change < 0 else '+'}{self.show_size(abs(change))}{' points' if self.percent else ''}"


ACCURACY = Quality()
"""Top-1 accuracy, a share in [0, 1]: that of results which do not say another."""


def quality_of(result: Mapping[str, Any]) -> Quality:
    """What a candidate's result says it is judged by; ValueError where it says it wrongly."""
    if RECORD not in result:
        return ACCURACY  # from before there were other tasks
    plain = result[RECORD]
    if not (
        isinstance(plain, Mapping)
        and plain.keys() == {"name", "higher_is_better", "shown"}
        and isinstance(plain["name"], str)
        and isinstance(plain["higher_is_better"], bool)
        and isinstance(plain["shown"], str)
    ):
        raise ValueError(f"{RECORD} must have a name, higher_is_better and shown, but is {plain!r}")
    return Quality(**plain)
