"""What a study is, and joining it: the first process creates it, all others must mean the same."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import Trial

from nas_gate.described import differences, within
from nas_gate.errors import Refused
from nas_gate.files import write_text
from nas_gate.study.early_stopping import EarlyStopping
from nas_gate.study.samplers import PerTrial, given, make_sampler
from nas_gate.study.space import Space, as_overrides
from nas_gate.study.storage import open_storage, shown
from nas_gate.training import require

DEFINITION = "study:definition"
DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Plan:
    """A study and how this process takes part; `folder` holds one numbered folder per trial.

    The first fields, up to `settings`, define the study: all who take part must have them the same. `enqueue` are
    the first trials: keys of the space with their values, and other keys, which become overrides of that
    trial. `fixed` are the overrides of all trials; keys that are, or begin with, one of `may_differ` may differ
    between those who take part. `settings` are all others, as a trial at the first ends of the space has them: what
    files say may change, too. `storage` None is a journal file in `folder`; `n_workers`
    0 runs the trials in this process. Refused names the field that is wrong.
    """

    name: str
    space: Space
    objectives: Mapping[str, str]
    constraints: Mapping[str, float] = field(default_factory=dict)
    sampler: str = "tpe"
    sampler_arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    enqueue: tuple[Mapping[str, Any], ...] = ()
    fixed: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    may_differ: tuple[str, ...] = ()
    folder: Path = Path("runs/studies/unnamed")
    storage: str | None = None
    n_trials: int = 20
    n_workers: int = 1
    max_retries: int = 2
    max_failures: int = 10
    heartbeat: float = 30.0
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        try:
            for name, least in (
                ("seed", 0),
                ("n_trials", 1),
                ("n_workers", 0),
                ("max_retries", 0),
                ("max_failures", 0),
            ):
                value = getattr(self, name)
                require(type(value) is int and value >= least, f"study: `{name}` must be an int >= {least}", value)
            require(self.heartbeat > 0, "study: `heartbeat > 0` must hold", self.heartbeat)
            require(bool(self.objectives), "study: `objectives` must name at least one", dict(self.objectives))
            for name, way in self.objectives.items():
                require(way in DIRECTIONS, f"study: the objective {name!r} must be one of {DIRECTIONS}", way)
            for name, bound in self.constraints.items():
                number = type(bound) in (int, float) and math.isfinite(bound)
                require(number, f"study: the constraint {name!r} must be a finite number", bound)
            searched = bool(self.space.parameters) or self.space.function is not None
            require(searched, "study: the space must have at least one parameter, as in 'target=interval(0.3,0.7)'", {})
        except ValueError as error:
            raise Refused(str(error)) from error
        if self.early_stopping is not None and self.sampler == "gp":
            raise Refused(
                "early_stopping must be null with the sampler gp, which does not learn from trials that were stopped, "
                "and would ask for the same point again and again."
            )
        self.make_sampler(0)
        for listed in self.enqueue:
            for name, value in listed.items():
                if name in self.space.parameters:
                    self.space.parameters[name].check(name, value)

    def make_sampler(self, number: int) -> BaseSampler:
        """The sampler of trial `number`."""
        return make_sampler(self.sampler, self.sampler_arguments, self.seed, number)

    def overrides(self, trial: Trial) -> list[str]:
        """What a trial is run with: the overrides of all trials, its own values, and what else was enqueued for it."""
        listed = given(self.enqueue, trial.study, trial)
        others = {name: value for name, value in listed.items() if name not in self.space.parameters}
        return [*self.fixed, *self.space.overrides(trial), *as_overrides(others)]

    def foreseen(self) -> Iterator[list[str]]:
        """The overrides of trials that must be possible: at the ends of the space, and the enqueued ones.

        The ends of a space that a function completes are not foreseen.
        """
        if self.space.function is None:
            for overrides in self.space.ends():
                yield [*self.fixed, *overrides]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=PerTrial(self.make_sampler, self.enqueue))  # in memory
        for number, listed in enumerate(self.enqueue):
            trial = study.ask(fixed_distributions=self.space.distributions)
            if listed not in self.enqueue[:number]:
                yield self.overrides(trial)

    def definition(self) -> dict[str, Any]:
        """What all who take part must have the same, as JSON holds it."""
        plain: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "space": self.space.describe(),
                    "objectives": [f"{name}: {way}" for name, way in self.objectives.items()],  # in this order
                    "constraints": {name: float(bound) for name, bound in self.constraints.items()},
                    "sampler": {"name": self.sampler, **self.sampler_arguments},
                    "seed": self.seed,
                    "enqueue": [dict(listed) for listed in self.enqueue],
                    "overrides": [
                        override
                        for override in self.fixed
                        if not within(override.partition("=")[0].lstrip("+~"), self.may_differ)
                    ],
                    "settings": dict(self.settings),
                },
                default=str,
            )
        )
        return plain


@dataclass(frozen=True)
class Joined:
    """A study that this process takes part in; `storage` is what `study` writes to."""

    plan: Plan
    study: Study
    storage: BaseStorage

    def close(self) -> None:
        """Let go of a database's connections."""
        self.storage.remove_session()
        if isinstance(self.storage, RDBStorage):
            self.storage.engine.dispose()
        elif isinstance(self.storage, GrpcStorageProxy):
            self.storage.close()


def join(plan: Plan) -> Joined:
    """Create the study or find it, safely also for many processes at once; Refused if it is another one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = plan.definition()
    described = plan.folder / "study.json"
    if described.exists():
        _refuse_difference(json.loads(described.read_text()), definition, str(plan.folder))
    numbered = [int(path.name) for path in plan.folder.glob("*") if path.name.isdecimal()]
    storage = open_storage(plan.storage, plan.folder)
    where = f"study {plan.name!r} in {shown(plan.storage, plan.folder)}"
    sampler = PerTrial(plan.make_sampler, plan.enqueue)
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        directions=[StudyDirection[way.upper()] for way in plan.objectives.values()],
        sampler=sampler,
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    if DEFINITION not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(plan.objectives))  # what the dashboard calls its axes
        study.set_user_attr(DEFINITION, definition)
    _refuse_difference(study.user_attrs[DEFINITION], definition, f"The {where}")
    # folders are made after their trials, so that those seen above must be known by now
    known = len(study.get_trials(deepcopy=False))
    if unknown := [number for number in numbered if number >= known]:
        raise Refused(
            f"{plan.folder} has a folder {min(unknown)}, but the {where} has {known} trials: "
            "the folder belongs to another storage. Choose another study name, or move the folder away."
        )
    if not described.exists():
        write_text(described, json.dumps(definition, indent=2) + "\n")
    return Joined(plan, study, storage)


def _refuse_difference(there: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    if "settings" not in there:  # a study of an earlier version
        asked = {key: value for key, value in asked.items() if key != "settings"}
    if differing := differences(there, asked):
        raise Refused(
            f"{where} is another study ({differing}). Choose another name (hydra.sweeper.study=...), "
            "or ask for the same to continue it."
        )
