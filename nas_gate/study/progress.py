"""What a person sees of a study while it runs: a line per finished trial, the front so far, the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from nas_gate.errors import StudyFailed
from nas_gate.study.claims import ERROR, FATAL, FINISHED, SURPLUS, finished
from nas_gate.study.plan import Joined
from nas_gate.study.samplers import given
from nas_gate.study.storage import shown

SECONDS = "seconds"


class Progress:
    """Follows a study's storage, whoever runs the trials."""

    def __init__(self, joined: Joined, console: Console) -> None:
        self._joined, self._console = joined, console
        self._began = time.monotonic()
        before = joined.study.get_trials(deepcopy=False)
        self._told = {trial.number for trial in before if trial.state.is_finished()}
        self._done_before = sum(trial.state in FINISHED for trial in before)
        self._failed: list[FrozenTrial] = []
        self.done = finished(before, joined.plan.n_trials)
        self.ended = len(self._told)
        plan = joined.plan
        self._print(
            f"study {plan.name}: {self._done_before} of {plan.n_trials} trials finished; trials in {plan.folder}, "
            f"storage {shown(plan.storage, plan.folder)}"
        )

    def update(self) -> None:
        """Tell what is new; StudyFailed once more than `max_failures` trials have failed since this began."""
        study, plan = self._joined.study, self._joined.plan
        trials = study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state.is_finished()]
        done = sum(trial.state in FINISHED for trial in trials)
        new = [trial for trial in ended if trial.number not in self._told and not trial.user_attrs.get(SURPLUS)]
        for trial in sorted(new, key=lambda trial: trial.datetime_complete or trial.datetime_start):  # type: ignore[arg-type, return-value]
            self._told.add(trial.number)
            self._failed += [trial] if trial.state == TrialState.FAIL else []
            self._print(describe(trial, self._values(trial), plan.objectives))
        if new:
            front = ", ".join(str(trial.number) for trial in study.best_trials)
            self._print(f"  {done}/{plan.n_trials} finished; front: trials {front or 'none'}{self._left(done)}")
        self.ended = len(ended)
        if fatal := [trial for trial in self._failed if trial.user_attrs.get(FATAL)]:
            raise StudyFailed(f"trial {fatal[0].number}: {fatal[0].user_attrs[ERROR]}")
        if len(self._failed) > plan.max_failures:
            errors = "\n".join(f"  trial {trial.number}: {trial.user_attrs.get(ERROR)}" for trial in self._failed)
            raise StudyFailed(
                f"{len(self._failed)} trials failed, more than max_failures={plan.max_failures}:\n{errors}\n"
                f"Their logs: {plan.folder}/NUMBER/log.txt. The same command continues the study."
            )

    def close(self) -> None:
        """The front, as a table."""
        study, plan = self._joined.study, self._joined.plan
        front = sorted(study.best_trials, key=lambda trial: trial.values)
        values = [self._values(trial) for trial in front]
        names = sorted({name for own in values for name in own})
        table = Table("trial", *names, *plan.objectives, title=f"front of {plan.name}: {len(front)} trials")
        for trial, own in zip(front, values):
            shown = [value_text(own.get(name, "")) for name in names]
            table.add_row(str(trial.number), *shown, *map(value_text, trial.values))
        for column in table.columns:
            column.justify = "right"
        self._console.print(table)

    def _values(self, trial: FrozenTrial) -> dict[str, Any]:
        """What tells the trial from others: what was drawn for it, and what it was given."""
        return {**given(self._joined.plan.enqueue, self._joined.study, trial), **trial.params}

    def _left(self, done: int) -> str:
        new, left = done - self._done_before, self._joined.plan.n_trials - done
        if new <= 0 or left <= 0:
            return ""
        return f"; about {duration((time.monotonic() - self._began) / new * left)} left"

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def describe(trial: FrozenTrial, values: Mapping[str, Any], objectives: Mapping[str, str]) -> str:
    """One line on a trial that has ended; `values` are what it was run with."""
    with_what = ", ".join(f"{name}={value_text(value)}" for name, value in values.items())
    if trial.state == TrialState.COMPLETE:
        what = ", ".join(f"{name} {value_text(value)}" for name, value in zip(objectives, trial.values))
    elif trial.state == TrialState.PRUNED:
        what = "stopped early"
    else:
        what = f"failed: {trial.user_attrs.get(ERROR)}"
    seconds = trial.user_attrs.get(SECONDS)
    return f"trial {trial.number} ({with_what}): {what}" + (f" ({duration(seconds)})" if seconds is not None else "")


def value_text(value: Any) -> str:
    """A parameter or an objective, short."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
