"""All that determines a trial's result: plain values, checked where they are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from nas_gate.baselines import BASELINES
from nas_gate.cost import MEASURED, check_budgets
from nas_gate.described import DEFAULT_TASK, Plain, without_added
from nas_gate.training import Hardware, Recipe, require

METHODS = ("gates", *BASELINES)
"""How units are chosen: by learned gates, or by a score of `nas_gate.baselines`."""

TARGET = 0.5


@dataclass(frozen=True)
class Named:
    """Something from a registry: its name there and the keywords that it is made with."""

    name: str
    arguments: Plain = field(default_factory=dict)


@dataclass(frozen=True)
class Gating:
    """How gates learn: for the first `epochs` epochs of the cycle, by Adam at `learning_rate`.

    The target goes from 1 to the wanted share over the first `descent` of these epochs, in a straight line. The gates
    of a group begin in the order of their units' weights, and groups in that of how much the loss feels them per cost,
    as far apart as `spread` says (see `baselines.spread_gates`).
    """

    epochs: int
    learning_rate: float = 0.01
    descent: float = 0.7
    spread: float = 1.0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "`gating.epochs >= 1` must hold", self.epochs)
        require(self.learning_rate > 0, "`gating.learning_rate > 0` must hold", self.learning_rate)
        require(0 <= self.descent <= 1, "`0 <= gating.descent <= 1` must hold", self.descent)
        require(0 <= self.spread <= 1, "`0 <= gating.spread <= 1` must hold", self.spread)


@dataclass(frozen=True)
class Distillation:
    """Learning from the dense network after removal (see `training.distilled`); weight 0 turns it off."""

    weight: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, "`0 <= distillation.weight <= 1` must hold", self.weight)
        require(self.temperature > 0, "`distillation.temperature > 0` must hold", self.temperature)


@dataclass(frozen=True)
class Timing:
    """What "latency_ms" is the latency of: one batch of so many examples, on so many of the processor's threads."""

    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        require(self.batch >= 1, "`latency.batch >= 1` must hold", self.batch)
        require(self.threads >= 1, "`latency.threads >= 1` must hold", self.threads)


@dataclass(frozen=True)
class Leg:
    """The way to one target: over the cycle's epochs `begin` to `end` (exclusive) gates take the cost there.

    The goal descends from `above`, the target before (None: from the dense cost), to `target`. At `end` the network is
    cut for this target, and the small one is trained over the rest of the cycle. Without gates `begin` and `end` are 0.
    """

    above: float | None
    target: float
    begin: int
    end: int


@dataclass(frozen=True)
class Settings:
    """All that determines a trial's result.

    `target` is the wanted share of the dense network's `metric` ("macs" or "params"), in (0, 1], or milliseconds of
    "latency_ms", as `latency` says; `targets`, strictly descending, takes its place where one trial shall give several
    candidates. Each candidate meets `limits`, too: {metric: the most of it, as a target of that metric}. Counts of
    kept units are multiples of `round_to` where they can be. `dense` trains the network with all units, `cycle` the
    gated and then the small one; the first `gating.epochs` of the cycle are the gated ones. `method` is one of
    METHODS; those without gates cut the dense network and train the small one over the whole cycle: as many epochs, on
    the same schedule, or none where `cycle.epochs` is 0. With `test`, a candidate's accuracy on the test set is
    measured, once, at its last epoch. With `depth`, residual branches are units, too. `task` says what is learned and
    measured (see `nas_gate.tasks`). The dense network begins with the weights in the file `weights`, where there is one
    (see `models.load_weights`).
    """

    model: Named
    data: Named
    dense: Recipe
    cycle: Recipe
    gating: Gating
    method: str = "gates"
    gate: Named = field(default_factory=lambda: Named("trainable"))
    budget: Named = field(default_factory=lambda: Named("penalty"))
    distillation: Distillation = field(default_factory=Distillation)
    hardware: Hardware = field(default_factory=Hardware)
    target: float = TARGET
    targets: tuple[float, ...] | None = None
    metric: str = "macs"
    limits: Mapping[str, float] = field(default_factory=dict)
    latency: Timing = field(default_factory=Timing)
    round_to: int = 1
    depth: bool = False
    seed: int = 0
    test: bool = True
    task: Named = field(default_factory=lambda: Named(**DEFAULT_TASK))
    weights: str | None = None

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"`method` must be one of {METHODS}", self.method)
        if self.targets is not None:
            self._check_targets(self.targets)
        for target in self.wanted:
            check_budgets(target, self.metric, self.limits)
        require(self.round_to >= 1, "`round_to >= 1` must hold", self.round_to)
        require(self.seed >= 0, "`seed >= 0` must hold", self.seed)
        if self.method == "gates":
            require(
                self.gating.epochs <= self.cycle.epochs,
                f"`gating.epochs <= cycle.epochs` must hold with cycle.epochs={self.cycle.epochs}",
                self.gating.epochs,
            )

    @property
    def wanted(self) -> tuple[float, ...]:
        """The target or the targets."""
        return (self.target,) if self.targets is None else self.targets

    def _check_targets(self, targets: tuple[float, ...]) -> None:
        require(len(targets) > 0, "`targets` must hold at least one share of the dense cost", targets)
        require(
            all(low < high for high, low in pairwise(targets)),
            "`targets` must descend strictly: one gated training goes from each to the next",
            targets,
        )
        # a target left at its default says nothing; any other one contradicts
        require(self.target == TARGET, f"give `targets` or `target`, not both: targets={targets}", self.target)
        if self.method == "gates":
            require(
                len(targets) <= self.gating.epochs,
                f"`gating.epochs >= len(targets)` must hold with {len(targets)} targets",
                self.gating.epochs,
            )

    def legs(self) -> tuple[Leg, ...]:
        """The way to each target in turn: the gated epochs are shared out equally."""
        targets = self.wanted
        gated = self.gating.epochs if self.method == "gates" else 0
        ends = [gated * k // len(targets) for k in range(len(targets) + 1)]
        return tuple(Leg(*leg) for leg in zip((None, *targets), targets, ends, ends[1:]))

    def timed(self) -> bool:
        """Whether the target or a limit is one of latency."""
        return any(metric in MEASURED for metric in (self.metric, *self.limits))

    def epochs(self) -> int:
        """All epochs of the cycle that the trial trains: gated ones, and those of every candidate."""
        legs = self.legs()
        return legs[-1].end + sum(self.cycle.epochs - leg.end for leg in legs)


def describe(settings: Settings) -> dict[str, Any]:
    """`settings` as JSON holds them, but for what `without_added` leaves out."""
    return without_added(json.loads(json.dumps(asdict(settings), default=str)))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {name: version(name) for name in ("nas-gate", "torch", "torchvision")}
