"""How the points of a study are drawn: Optuna's samplers by name, one for every trial.

Trial n has a sampler of its own, seeded from (seed, n). So workers and reruns, which all begin with the same seed,
draw different points, and what a trial draws does not depend on which process asks. What a sampler learns it
takes from the storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from nas_gate.errors import Refused


def _gp(seed: int, own: int, **arguments: Any) -> BaseSampler:
    return GPSampler(
        seed=own, independent_sampler=RandomSampler(seed=own), warn_independent_sampling=False, **arguments
    )


def _qmc(seed: int, own: int, **arguments: Any) -> BaseSampler:
    # one sequence for all trials, in which the storage counts: the seed that scrambles it must be one, too
    return QMCSampler(
        seed=seed,
        independent_sampler=RandomSampler(seed=own),
        warn_asynchronous_seeding=False,
        warn_independent_sampling=False,
        **arguments,
    )


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": lambda seed, own, **arguments: TPESampler(seed=own, **arguments),
    "nsga2": lambda seed, own, **arguments: NSGAIISampler(seed=own, **arguments),
    "nsga3": lambda seed, own, **arguments: NSGAIIISampler(seed=own, **arguments),
    "gp": _gp,
    "qmc": _qmc,
    "random": lambda seed, own, **arguments: RandomSampler(seed=own, **arguments),
}


def make_sampler(name: str, arguments: Mapping[str, Any], seed: int, number: int) -> BaseSampler:
    """The sampler of trial `number`; Refused for an unknown name or argument."""
    if name not in SAMPLERS:
        raise Refused(f"There is no sampler {name!r}; valid names: {', '.join(SAMPLERS)}.")
    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # asked for by name
        try:
            return SAMPLERS[name](seed, own, **arguments)
        except (TypeError, ValueError) as error:
            raise Refused(f"sampler {name}: {error}") from error


ENTRY = "study:entry"
"""A trial's attribute: the entry of `enqueue` that it has in place of a trial that failed for good."""


def entry_of(number: int, attributes: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> int:
    """Which entry of `enqueue` a trial has; none if there are not so many.

    Trials have them in turn, but those that stand in for failed ones, which have theirs from the beginning. So it
    follows from what lower-numbered trials were made with, and is the same whoever asks, and when.
    """
    if ENTRY in attributes:
        return int(attributes[ENTRY])
    return number - sum(ENTRY in trial.user_attrs for trial in trials if trial.number < number)


def given(enqueue: Sequence[Mapping[str, Any]], study: Study, trial: FrozenTrial | Trial) -> Mapping[str, Any]:
    """What `enqueue` gives a trial."""
    if not enqueue:
        return {}
    entry = entry_of(trial.number, trial.user_attrs, study.get_trials(deepcopy=False))
    return enqueue[entry] if entry < len(enqueue) else {}


class PerTrial(BaseSampler):
    """A sampler for every trial from `make(number)`; the first trials take the values in `fixed`."""

    def __init__(self, make: Callable[[int], BaseSampler], fixed: Sequence[Mapping[str, Any]] = ()) -> None:
        self._make, self._fixed = make, fixed
        self._number, self._sampler = -1, make(0)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number, self._sampler = trial.number, self._make(trial.number)
        return self._sampler

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As the trial's sampler does."""
        self._of(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the trial's sampler draws together, without what is given."""
        space, fixed = self._of(trial).infer_relative_search_space(study, trial), given(self._fixed, study, trial)
        return {name: of for name, of in space.items() if name not in fixed}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the trial's sampler does."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The given value, or one of the trial's sampler."""
        fixed = given(self._fixed, study, trial)
        if param_name in fixed:
            return fixed[param_name]
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the trial's sampler does."""
        self._of(trial).after_trial(study, trial, state, values)
