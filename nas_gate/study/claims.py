"""Which process runs which trial, so that none is lost, none runs twice, and no budget is exceeded.

The rules, all by Optuna's public interface and so on every storage:

*Budget.* A trial counts unless it failed for good or waits for its turn. A process that finds fewer than `n_trials`
asks for another one, and looks again: Optuna numbers trials without gaps, so a new trial with `n_trials` counted ones
below it is surplus, and gives way before anything is run. However many processes ask at once, the same `n_trials` stay.

*Ownership.* A trial runs from its creation to its end, even if its processes die on the way: who runs it stands in a
user attribute, as the machine, the process, and a mark unique to the claim. While it runs, its process holds a lock
of the kernel's in the study's folder, and a thread changes the attribute `study:heartbeat`. A running trial without a
living owner is taken over: the same trial, number, values and folder, continued from its checkpoint. On the owner's
machine the lock says who lives, at once; elsewhere a heartbeat that has not changed for four beats, by the observer's
own clock, so that no two clocks are compared.

*Safety does not hang on time.* If two processes ever run the same trial (one had been asleep for four beats, say), the
one that is no longer the owner is told so at its next epoch; and Optuna takes the end of a trial only once.

*Whose fault.* A process that dies while the supervisor of its workers lives was killed for what it did (out of memory,
a crash), which counts as a failure of its trial. If the supervisor is gone too, the machine or a person ended them, and
no trial is to blame.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from nas_gate.study.plan import Joined
from nas_gate.study.samplers import ENTRY, entry_of
from nas_gate.study.storage import Lock, in_folder, locked

OWNER, HEARTBEAT = "study:owner", "study:heartbeat"
FAILURES, ERROR, SURPLUS, FATAL = "study:failures", "study:error", "study:surplus", "study:fatal"
BEATS = 4
"""Heartbeats without a change after which an owner on another machine counts as dead."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
NOBODY = "nobody"


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is part of the budget."""
    return trial.state not in (TrialState.FAIL, TrialState.WAITING)


def surplus(number: int, trials: Sequence[FrozenTrial], n_trials: int) -> bool:
    """Whether the budget is used up by trials below `number`."""
    return sum(counts(trial) and trial.number < number for trial in trials) >= n_trials


def finished(trials: Sequence[FrozenTrial], n_trials: int) -> bool:
    """Whether all is done; a trial that nobody has made its own yet, or that gives way at present, is not."""
    unclear = any(trial.state == TrialState.RUNNING and OWNER not in trial.user_attrs for trial in trials)
    return sum(trial.state in FINISHED for trial in trials) >= n_trials and not unclear


def stand_in(joined: Joined) -> None:
    """Enqueue again what was enqueued for trials that have failed for good, so that the study does not lack it.

    For the beginning of a run: what a person has mended meanwhile (a wrong path, a full disk) may do now.
    """
    with locked(joined.plan.folder / ".claims" / "stand-in"):
        trials = joined.study.get_trials(deepcopy=False)
        entries = {trial.number: entry_of(trial.number, trial.user_attrs, trials) for trial in trials}
        held = {entries[trial.number] for trial in trials if trial.state != TrialState.FAIL}
        for entry in sorted({*entries.values()} - held):
            if entry < len(joined.plan.enqueue):
                joined.study.enqueue_trial({}, user_attrs={ENTRY: entry})


def this_machine() -> str:
    """A name for what shares one kernel, and so its locks, until the next start."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"


class Claim:
    """A trial that this process runs; `lost` is set once another process has taken it over."""

    def __init__(self, joined: Joined, trial: Trial, trial_id: int, owner: dict[str, Any], lock: Lock) -> None:
        self.trial, self.number, self.lost = trial, trial.number, threading.Event()
        self._joined, self._id, self._owner, self._lock = joined, trial_id, owner, lock

    def mine(self) -> bool:
        """Whether this process still owns the trial."""
        found = self._joined.storage.get_trial(self._id)
        return found.state == TrialState.RUNNING and found.user_attrs.get(OWNER) == self._owner

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show signs of life."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._joined.plan.heartbeat):
                with suppress(Exception):  # a storage that is away for a moment ends no training
                    if not self.mine():
                        self.lost.set()
                        return
                    self.trial.set_user_attr(HEARTBEAT, time.time())

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def tell(self, state: TrialState, values: Sequence[float] | None = None) -> None:
        """End the trial, unless another process owns or has ended it."""
        if self.mine():
            try:
                self._joined.study.tell(self.trial, values=values, state=state)
            except (UpdateFinishedTrialError, ValueError):
                if self.mine():
                    raise
        self._lock.release()

    def failed(self, error: str) -> None:
        """Count a failure: the trial is tried again, or ends, after `max_retries`."""
        if not self.mine():
            self._lock.release()
            return
        failures = int(self.trial.user_attrs.get(FAILURES, 0)) + 1
        self.trial.set_user_attr(FAILURES, failures)
        self.trial.set_user_attr(ERROR, error)
        if failures > self._joined.plan.max_retries:
            self.tell(TrialState.FAIL)
        else:
            self.release()

    def release(self) -> None:
        """Leave the trial to whoever comes next."""
        if self.mine():
            self.trial.set_user_attr(OWNER, NOBODY)
        self._lock.release()


class Claims:
    """Finds the trials that this process runs, one after the other; `run` names its supervisor."""

    def __init__(self, joined: Joined, run: str) -> None:
        self._joined, self._run = joined, run
        self.finished = False
        self._machine = this_machine()
        self._locks = joined.plan.folder / ".claims"
        self._seen: dict[int, tuple[Any, float]] = {}
        self._study_id = joined.storage.get_study_id_from_name(joined.plan.name)

    def next(self) -> Claim | None:
        """A trial to run: one left behind before a new one. None if there is nothing to do at present.

        `finished` is set once there never will be.
        """
        study, plan = self._joined.study, self._joined.plan
        with locked(self._locks / "next"):  # spares most surplus trials; nothing depends on it
            trials = study.get_trials(deepcopy=False)
            self.finished = finished(trials, plan.n_trials)
            if self.finished:
                return None
            for found in trials:
                if found.state != TrialState.RUNNING:
                    continue
                with suppress(UpdateFinishedTrialError):  # ended meanwhile, on another machine
                    claim = self._take_over(found, trials)
                    if claim is not None:
                        return claim
            if sum(map(counts, trials)) >= plan.n_trials:
                return None
            trial = study.ask(fixed_distributions=plan.space.distributions)
            possible = trial.number >= plan.n_trials  # spares a look at the storage
            if possible and surplus(trial.number, study.get_trials(deepcopy=False), plan.n_trials):
                self._give_way(trial)
                return None
            lock = self._lock(trial.number)
            lock.acquire()
            return self._own(trial, lock)

    def _take_over(self, found: FrozenTrial, trials: Sequence[FrozenTrial]) -> Claim | None:
        lock = self._lock(found.number)
        if not lock.acquire(wait=False):
            return None
        found = self._joined.storage.get_trial(self._id(found.number))  # it may have ended by now
        owner = found.user_attrs.get(OWNER)
        if found.state != TrialState.RUNNING or not self._left(found, owner):
            lock.release()
            return None
        trial = Trial(self._joined.study, self._id(found.number))
        if surplus(found.number, trials, self._joined.plan.n_trials):
            self._give_way(trial)
            lock.release()
            return None
        claim = self._own(trial, lock)
        if isinstance(owner, dict) and owner["machine"] != self._machine:
            # no lock is common to both machines: the last to write is the owner
            time.sleep(min(1.0, self._joined.plan.heartbeat))
            if not claim.mine():
                lock.release()
                return None
        if isinstance(owner, dict) and self._supervised(owner):
            claim.failed(f"the process died while the trial ran ({owner['machine'].split()[0]}, {owner['process']})")
            return None
        return claim

    def _left(self, found: FrozenTrial, owner: Any) -> bool:
        """Whether nobody runs a trial whose lock is free on this machine."""
        if owner == NOBODY:
            return True
        if isinstance(owner, dict) and owner["machine"] == self._machine:
            return True
        if owner is None and in_folder(self._joined.plan.storage):
            return True  # who asked for it died before it was the owner; it cannot be elsewhere
        sign = (owner, found.user_attrs.get(HEARTBEAT))
        before, since = self._seen.get(found.number, (None, 0.0))
        if before != sign:
            self._seen[found.number] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > BEATS * self._joined.plan.heartbeat

    def _supervised(self, owner: dict[str, Any]) -> bool:
        """Whether the supervisor of a dead worker lives, on this machine."""
        if owner["machine"] != self._machine:
            return False
        lock = run_lock(self._joined.plan.folder, owner["run"])
        free = lock.acquire(wait=False)
        lock.release()
        return not free

    def _own(self, trial: Trial, lock: Lock) -> Claim:
        owner = {"machine": self._machine, "process": os.getpid(), "run": self._run, "claim": uuid.uuid4().hex[:8]}
        trial.set_user_attr(OWNER, owner)
        return Claim(self._joined, trial, self._id(trial.number), owner, lock)

    def _give_way(self, trial: Trial) -> None:
        trial.set_user_attr(SURPLUS, True)
        with suppress(UpdateFinishedTrialError, ValueError):  # another has seen it, too
            self._joined.study.tell(trial, state=TrialState.FAIL)

    def _id(self, number: int) -> int:
        return self._joined.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _lock(self, number: int) -> Lock:
        return Lock(self._locks / str(number))


def run_lock(folder: Path, run: str) -> Lock:
    """What a supervisor holds as long as it lives."""
    return Lock(folder / ".claims" / f"run-{run}")
