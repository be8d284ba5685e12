"""Studies with a job that only counts epochs: what is claimed, killed, resumed, retried and refused."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from nas_gate.search import Moment, Refused
from nas_gate.study.claims import ERROR, FAILURES
from nas_gate.study.context import StudyFailed
from nas_gate.study.early_stopping import EarlyStopping
from nas_gate.study.plan import Plan, join
from nas_gate.study.run import Job, Running, run
from nas_gate.study.space import Space, parse

EPOCH = 0.05
QUICK = Console(file=open(os.devnull, "w"))  # noqa: SIM115  # what is shown is looked at in one test only


def space(*overrides: str) -> Space:
    return Space(parse(overrides or ["x=interval(0,1)", "width=choice(1,2)"])[0])


def plan(folder: Path, **more: Any) -> Plan:
    return Plan(
        **{
            "name": "s",
            "space": space(),
            "objectives": {"accuracy": "maximize", "macs": "minimize"},
            "folder": folder / "s",
            "n_trials": 6,
            "n_workers": 0,
            "heartbeat": 0.5,
            **more,
        }
    )


def counting(epochs: int, seconds: float = EPOCH) -> Job:
    """A job of `epochs` epochs with a checkpoint; it notes every epoch that it finishes, and its overrides."""

    def job(running: Running) -> Mapping[str, Any]:
        running.folder.mkdir(parents=True, exist_ok=True)
        given, done = running.folder / "overrides", running.folder / "epochs"
        if given.exists():
            assert json.loads(given.read_text()) == list(running.overrides)
        else:
            part = given.with_name("part")
            part.write_text(json.dumps(list(running.overrides)))
            part.replace(given)
        for epoch in range(len(done.read_text().split()) if done.exists() else 0, epochs):
            time.sleep(seconds)
            running.on_epoch(Moment("gated", epoch, 0.5, 1.0))
            with done.open("a") as file:
                file.write(f"{epoch}\n")
        x = float(running.overrides[0].removeprefix("x="))
        return {"accuracy": x, "macs": 100 * x, "note": str(running.folder)}

    return job


def started(a_plan: Plan, job: Job) -> multiprocessing.Process:
    """A process of its own that takes part; forked, because importing takes seconds."""

    def main() -> None:
        try:
            run(a_plan, job, [], QUICK)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=main)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads of PyTorch
        process.start()
    return process  # type: ignore[return-value]


def killed_ten_times(a_plan: Plan, processes: int) -> None:
    """Kill all processes at ten random moments before the work can be done, then let them finish it."""
    epochs = 12 * processes
    job = counting(epochs)
    longest = a_plan.n_trials * epochs * EPOCH / processes / 10
    moments = random.Random(0)
    for _ in range(10):
        running = [started(a_plan, job) for _ in range(processes)]
        time.sleep(moments.uniform(0.02, longest))
        for process in running:
            process.kill()
        for process in running:
            process.join()
            assert process.exitcode == -signal.SIGKILL
    running = [started(a_plan, job) for _ in range(processes)]
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    all_finished(a_plan, epochs)


def all_finished(a_plan: Plan, epochs: int) -> None:
    """Exactly `n_trials` finished, in as many folders, every epoch done once."""
    trials = join(a_plan).study.trials
    kept = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(kept) == a_plan.n_trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    assert all(trial.user_attrs.get("study:surplus") for trial in trials if trial.state == TrialState.FAIL)
    folders = sorted(int(path.name) for path in a_plan.folder.iterdir() if path.name.isdecimal())
    assert folders == [trial.number for trial in kept] == list(range(a_plan.n_trials))
    for trial in kept:
        folder = a_plan.folder / str(trial.number)
        assert (folder / "epochs").read_text().split() == [str(epoch) for epoch in range(epochs)]
        assert json.loads((folder / "overrides").read_text())[0] == f"x={trial.params['x']}"
        assert trial.values == [trial.params["x"], 100 * trial.params["x"]]
        assert trial.user_attrs["note"] == str(folder)
    assert len({trial.params["x"] for trial in kept}) == a_plan.n_trials


# --- kills --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_ten_times_with_the_journal(processes: int, tmp_path: Path):
    killed_ten_times(plan(tmp_path), processes)


def test_killed_ten_times_with_sqlite(tmp_path: Path):
    killed_ten_times(plan(tmp_path, storage=f"sqlite:///{tmp_path}/study.db"), 1)
