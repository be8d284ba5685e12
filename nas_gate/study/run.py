"""The processes of a study: workers that run trials, and a supervisor that keeps them alive.

A worker is the same command as the supervisor's, with a variable in its environment: so a job needs to be no more
than a function, and processes on other machines differ in nothing from those here. Workers ask for trials one by
one, with no barrier between them. They end when the study is finished; until then one that finds nothing to do
waits, to take over what another one leaves behind.

A worker's death costs it the unfinished epoch of its trial. The supervisor starts it again; if the supervisor dies, its
workers see the end of their standard input, and go too. Ctrl-C reaches the supervisor alone, which passes it on: each
worker leaves its trial to the next run, and ends.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optuna.trial import TrialState
from rich.console import Console

from nas_gate.errors import InUse, StudyFailed
from nas_gate.search import EpochHook, Moment
from nas_gate.study.claims import BEATS, ERROR, FATAL, Claim, Claims, run_lock, stand_in
from nas_gate.study.context import Lost, Stopped
from nas_gate.study.plan import Joined, Plan, join
from nas_gate.study.progress import SECONDS, Progress

WORKER = "NAS_GATE_STUDY_RUN"
"""In a worker's environment: the run that its supervisor began."""

POLL = 0.5  # seconds between two looks at the storage, where there is nothing else to do
LONGEST_PAUSE = 30.0  # seconds before a worker that dies again and again is started once more
LAST_MOMENT = 20.0  # seconds that workers have to end after Ctrl-C


@dataclass(frozen=True)
class Running:
    """A trial, as its job sees it; `on_epoch` is to be called after every epoch, and may end the trial."""

    number: int
    folder: Path
    overrides: Sequence[str]
    on_epoch: EpochHook


Job = Callable[[Running], Mapping[str, Any]]
"""Runs a trial, continuing what it finds in the folder; returns figures, the objectives among them."""


def run(plan: Plan, job: Job, command: Sequence[str], console: Console | None = None) -> None:
    """Take part in the study until it is finished; `command` starts this program again, as a worker.

    Raises Refused for a mistake, StudyFailed if the study cannot go on, KeyboardInterrupt after Ctrl-C.
    """
    supervisor = os.environ.pop(WORKER, None)
    if supervisor is not None:
        _end_with_supervisor()
    with closing(join(plan)) as joined:
        if supervisor is not None:
            work(joined, job, supervisor)
            return
        stand_in(joined)
        identity = uuid.uuid4().hex[:12]
        progress = Progress(joined, console or Console())
        lock = run_lock(plan.folder, identity)
        lock.acquire()
        try:
            if plan.n_workers == 0:
                work(joined, job, identity, progress.update)
            elif not progress.done:
                _Supervisor(plan, progress, command, identity).run()
        finally:
            lock.release()
        progress.update()
        progress.close()


# --- a worker -----------------------------------------------------------------------------------------------


def work(joined: Joined, job: Job, run: str, after_look: Callable[[], None] = lambda: None) -> None:
    """Run trials until the study is finished; `after_look` is called between them."""
    claims = Claims(joined, run)
    while not claims.finished:
        claim = claims.next()
        if claim is not None:
            _attempt(claim, joined, job)
        elif not claims.finished:
            time.sleep(POLL)
        after_look()


def _attempt(claim: Claim, joined: Joined, job: Job) -> None:
    plan, trial = joined.plan, claim.trial
    before, began = float(trial.user_attrs.get(SECONDS, 0.0)), time.monotonic()
    folder = plan.folder / str(claim.number)
    try:
        with claim.beating():
            figures = _plain(job(Running(claim.number, folder, plan.overrides(trial), _watch(claim, joined))))
            missing = [name for name in (*plan.objectives, *plan.constraints) if name not in figures]
            values = [] if missing else [_number(name, figures[name]) for name in plan.objectives]
            bounds = {} if missing else {name: _number(name, figures[name]) for name in plan.constraints}
    except KeyboardInterrupt:
        claim.release()
        raise
    except Lost:
        claim.release()
    except InUse:  # a former owner's job still runs, on a cluster for instance: it goes on there, or ends
        claim.release()
        time.sleep(plan.heartbeat)
    except Stopped:
        trial.set_user_attr(SECONDS, before + time.monotonic() - began)
        claim.tell(TrialState.PRUNED)
    except BaseException as error:  # SystemExit among them: whatever ends a trial must not end the study
        trial.set_user_attr(SECONDS, before + time.monotonic() - began)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            traceback.print_exc(file=log)
        claim.failed(f"{type(error).__name__}: {error}")
        _require_living_gpu(claim.number)
    else:
        if missing:
            message = f"the job returned no {missing[0]!r}; it returned {', '.join(sorted(figures))}."
            trial.set_user_attr(ERROR, message)
            trial.set_user_attr(FATAL, True)
            claim.tell(TrialState.FAIL)
            raise StudyFailed(f"trial {claim.number}: {message}")
        for name, value in {SECONDS: before + time.monotonic() - began, **figures}.items():
            if name not in plan.objectives:
                trial.set_user_attr(name, value)
        for name, value in bounds.items():
            if name not in trial.constraints:  # an earlier owner may have come this far
                trial.set_constraint(name, value - plan.constraints[name])
        claim.tell(TrialState.COMPLETE, values)


def _require_living_gpu(number: int) -> None:
    """StudyFailed where this process's GPU no longer answers: after an error on the device no call of it ever will.

    A supervised worker is started again; going on, it would fail all trials that there are, within seconds.
    """
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise StudyFailed(f"the GPU no longer answers after trial {number}: {error}") from error


def _watch(claim: Claim, joined: Joined) -> EpochHook:
    rule = joined.plan.early_stopping

    def on_epoch(moment: Moment) -> None:
        if claim.lost.is_set():
            raise Lost(f"another process has taken over trial {claim.number}")
        if rule is None:
            return
        key = f"epoch:{moment.stage}:{moment.epoch}"
        try:
            claim.trial.set_user_attr(key, [moment.accuracy, moment.macs])
            finished = joined.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        except Exception:  # as for the heartbeat: a storage that is away for a moment ends no training
            return
        others = [other.user_attrs[key] for other in finished if key in other.user_attrs]
        if rule.stops(moment.epoch, moment.accuracy, moment.macs, others):
            raise Stopped(f"stopped after epoch {moment.epoch + 1} of {moment.stage}")

    return on_epoch


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(figures), default=str))
    return plain


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, but the job returned {value!r}")
    return float(value)


def _end_with_supervisor() -> None:
    def watch() -> None:
        os.read(0, 1)  # returns at the end of the supervisor, which writes nothing
        os._exit(1)

    threading.Thread(target=watch, name="supervisor", daemon=True).start()


# --- the supervisor -----------------------------------------------------------------------------------------


@dataclass
class _Worker:
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    not_before: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.PIPE,  # whose end tells the worker that this process is gone
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches it through the supervisor
            )

    def close(self) -> None:
        """Forget a process that has ended."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """What workers take in turns, as CUDA_VISIBLE_DEVICES names them: nothing where there is only one GPU or none."""
    named = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = named.split(",")
    return gpus if len(gpus) > 1 else []


class _Supervisor:
    def __init__(self, plan: Plan, progress: Progress, command: Sequence[str], identity: str) -> None:
        self._plan, self._progress, self._seen = plan, progress, time.monotonic()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(max(1, cores // plan.n_workers))}
        environment = {**threads, **os.environ, WORKER: identity}  # a number that a person has set stays
        devices = visible_gpus(os.environ, torch.cuda.device_count())
        logs = plan.folder / "logs"
        self._workers = [
            _Worker(
                command,
                {**environment, **({"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} if devices else {})},
                logs / f"{platform.node()}-{os.getpid()}-{index}.log",
            )
            for index in range(plan.n_workers)
        ]

    def run(self) -> None:
        """Until all workers have ended because the study is finished."""
        try:
            left = list(self._workers)
            while left:
                left = [worker for worker in left if not self._ended(worker)]
                before = self._progress.ended
                self._look()
                if self._progress.ended > before:
                    for worker in self._workers:
                        worker.deaths = 0
                time.sleep(POLL)
        finally:
            self._stop()

    def _look(self) -> None:
        try:
            self._progress.update()
            self._seen = time.monotonic()
        except StudyFailed:
            raise
        except Exception:  # a database that restarts is no reason to end
            if time.monotonic() - self._seen > BEATS * self._plan.heartbeat:
                raise

    def _ended(self, worker: _Worker) -> bool:
        """Whether a worker has done its part; one that has died is started again."""
        code = worker.process.poll() if worker.process is not None else None
        if code == 0:
            return True
        if worker.process is not None and code is not None:
            worker.close()
            worker.deaths += 1
            if worker.deaths > self._plan.max_retries + 2:  # a trial that kills it fails for good before
                raise StudyFailed(
                    f"A worker died {worker.deaths} times in a row; the end of {worker.log}:\n{_tail(worker.log)}"
                )
            worker.not_before = time.monotonic() + min(LONGEST_PAUSE, 2.0 ** (worker.deaths - 1) - 1)
        if worker.process is None and time.monotonic() >= worker.not_before:
            worker.start()
        return False

    def _stop(self) -> None:
        """Ask the workers that still run to end, as Ctrl-C does; a second Ctrl-C ends them at once."""
        running = [w.process for w in self._workers if w.process is not None and w.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        try:
            deadline = time.monotonic() + LAST_MOMENT
            for process in running:
                process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        for process in running:
            process.kill()
            process.wait()
        for worker in self._workers:
            worker.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
