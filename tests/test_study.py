"""Studies with a job that only counts epochs: what is claimed, killed, resumed, retried and refused."""

import glob
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from nas_gate.errors import Diverged, InUse, Refused, StudyFailed
from nas_gate.search import Moment
from nas_gate.study import claims
from nas_gate.study.claims import ERROR, FAILURES
from nas_gate.study.early_stopping import EarlyStopping
from nas_gate.study.plan import Plan, _refuse_difference, join
from nas_gate.study.run import Job, Running, _attempt, run, visible_gpus
from nas_gate.study.samplers import SAMPLERS
from nas_gate.study.space import Space, parse

EPOCH = 0.05
QUIET = Console(quiet=True)


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
            run(a_plan, job, [], QUIET)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    return forked(main)


def forked(main: Callable[[], None]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=main)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads of PyTorch
        process.start()
    return process  # type: ignore[return-value]


def epochs_of(a_plan: Plan) -> int:
    """How many epochs all trials together have done."""
    return sum(len(path.read_text().split()) for path in a_plan.folder.glob("*/epochs"))


def killed_ten_times(a_plan: Plan, processes: int) -> None:
    """Kill all processes at ten random moments, every other time in the middle of trials, then let them finish."""
    epochs = 12 * processes
    job = counting(epochs)
    moments = random.Random(0)
    for kill in range(10):
        before = epochs_of(a_plan)
        running = [started(a_plan, job) for _ in range(processes)]
        while kill % 2 and epochs_of(a_plan) == before:
            assert all(process.is_alive() for process in running)
            time.sleep(EPOCH / 5)
        time.sleep(moments.uniform(0.02, 4 * EPOCH))
        for process in running:
            process.kill()
        for process in running:
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert epochs_of(a_plan) < a_plan.n_trials * epochs
    running = [started(a_plan, job) for _ in range(processes)]
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    all_finished(a_plan, epochs)


def trials_of(a_plan: Plan) -> list[FrozenTrial]:
    with closing(join(a_plan)) as joined:
        return joined.study.trials


def all_finished(a_plan: Plan, epochs: int) -> None:
    """Exactly `n_trials` finished, in as many folders, every epoch done once."""
    trials = trials_of(a_plan)
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


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database of its own, in a private cluster that ends with the test."""
    found = [shutil.which("pg_ctl"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))]
    programs = [Path(path).resolve().parent for path in found if path]
    if not programs:
        pytest.skip("needs PostgreSQL (initdb, pg_ctl)")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path must be short, and the owner must reach it
    user: dict[str, Any] = {"user": "nobody"} if os.getuid() == 0 else {}  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(folder, "nobody")

    def do(program: str, *arguments: str) -> None:
        command = [str(programs[-1] / program), "-D", str(folder / "data"), *arguments]
        with (folder / "said").open("ab") as said:
            done = subprocess.run(command, cwd=folder, stdout=said, stderr=said, timeout=120, **user)
        assert done.returncode == 0, (folder / "said").read_text() + (folder / "log").read_text()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "log").touch()
    if user:
        shutil.chown(folder / "log", "nobody")
    do("initdb", "-U", "nas_gate", "-A", "trust", "-N")
    do("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -h 127.0.0.1")
    try:
        yield f"postgresql://nas_gate@127.0.0.1:{port}/postgres"
    finally:
        do("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


def test_four_processes_killed_ten_times_with_postgresql(postgresql: str, tmp_path: Path):
    killed_ten_times(plan(tmp_path, storage=postgresql), 4)


# --- faults -------------------------------------------------------------------------------------------------


def failing(times: int, make: Callable[[], BaseException], at: int = 2) -> Job:
    """A job whose trial 1 raises after epoch `at`, `times` times."""
    inner = counting(4, 0.0)

    def job(running: Running) -> Mapping[str, Any]:
        marks = running.folder.parent / "marks"

        def on_epoch(moment: Moment) -> None:
            running.on_epoch(moment)
            if running.number == 1 and moment.epoch == at:
                so_far = int(marks.read_text()) if marks.exists() else 0
                if so_far < times:
                    marks.write_text(str(so_far + 1))
                    raise make()

        return inner(replace(running, on_epoch=on_epoch))

    return job


def test_a_dead_gpu_ends_the_process_not_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After an error on the device every later call of the process fails; it must not take and fail what is left."""

    def dead() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    a_plan = plan(tmp_path, n_trials=3)
    with pytest.raises(StudyFailed, match=r"no longer answers after trial 1: CUDA error"):
        run(a_plan, failing(1, lambda: RuntimeError("CUDA error")), [], QUIET)
    monkeypatch.undo()
    run(a_plan, counting(4, 0.0), [], QUIET)
    all_finished(a_plan, 4)


@pytest.mark.parametrize(
    "make", [lambda: ValueError("bad"), lambda: SystemExit(3), MemoryError, lambda: Diverged("The loss is nan")]
)
def test_a_trial_that_raises_is_tried_again_in_its_folder(make: Callable[[], BaseException], tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=3)
    run(a_plan, failing(2, make), [], QUIET)
    all_finished(a_plan, 4)
    trial = trials_of(a_plan)[1]
    assert trial.user_attrs[FAILURES] == 2
    assert trial.user_attrs[ERROR].startswith(type(make()).__name__)
    assert "Traceback" in (a_plan.folder / "1" / "log.txt").read_text()


def test_a_trial_that_always_raises_fails_and_another_one_takes_its_place(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=3)
    run(a_plan, failing(99, lambda: ValueError("bad")), [], QUIET)
    trials = trials_of(a_plan)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].user_attrs[FAILURES] == a_plan.max_retries + 1


def test_too_many_failures_end_the_study_and_are_named(tmp_path: Path):
    def job(running: Running) -> Mapping[str, Any]:
        raise ValueError(f"number {running.number} is bad")

    a_plan = plan(tmp_path, max_failures=1, max_retries=0)
    with pytest.raises(StudyFailed, match=r"(?s)2 trials failed.*max_failures=1.*0 is bad.*trial 1: .*1 is bad"):
        run(a_plan, job, [], QUIET)
    run(a_plan, counting(1, 0.0), [], QUIET)  # the cause is mended, the same command goes on
    assert sum(trial.state == TrialState.COMPLETE for trial in trials_of(a_plan)) == 6


@pytest.mark.parametrize("value", [float("nan"), None, "high", True])
def test_an_objective_that_is_no_number_is_a_failure(value: Any, tmp_path: Path):
    a_plan = plan(tmp_path, max_failures=0, max_retries=0)
    with pytest.raises(StudyFailed, match="accuracy must be a finite number"):
        run(a_plan, lambda running: {"accuracy": value, "macs": 1}, [], QUIET)


def test_an_objective_that_the_job_does_not_return_ends_the_study_at_once(tmp_path: Path):
    a_plan = plan(tmp_path, objectives={"accuracy": "maximize", "latency": "minimize"})
    with pytest.raises(StudyFailed, match="no 'latency'; it returned accuracy, macs, note"):
        run(a_plan, counting(1, 0.0), [], QUIET)
    assert len(trials_of(a_plan)) == 1


def test_a_folder_that_a_former_job_still_works_in_is_waited_for(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=2, max_retries=0, heartbeat=0.01)
    inner, refusals = counting(2, 0.0), []

    def job(running: Running) -> Mapping[str, Any]:
        if running.number == 0 and len(refusals) < 3:
            refusals.append(running.number)
            raise InUse("Another process is working in it.")
        return inner(running)

    run(a_plan, job, [], QUIET)
    assert len(refusals) == 3
    all_finished(a_plan, 2)
    assert all(FAILURES not in trial.user_attrs for trial in trials_of(a_plan))


def test_ctrl_c_leaves_the_trial_to_the_next_run(tmp_path: Path):
    def interrupted(running: Running) -> Mapping[str, Any]:
        if running.number == 1:
            raise KeyboardInterrupt
        return counting(2, 0.0)(running)

    a_plan = plan(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(a_plan, interrupted, [], QUIET)
    assert [trial.state.name for trial in trials_of(a_plan)] == ["COMPLETE", "RUNNING"]
    run(a_plan, counting(2, 0.0), [], QUIET)
    all_finished(a_plan, 2)
    assert all(FAILURES not in trial.user_attrs for trial in trials_of(a_plan))


def test_a_full_disk_leaves_nothing_half_written_that_counts(tmp_path: Path):
    a_plan = plan(tmp_path)

    def main() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # writing more is an error, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            run(a_plan, counting(1, 0.0), [], QUIET)
        except OSError:
            os._exit(7)
        os._exit(0)

    process = forked(main)
    process.join(60)
    assert process.exitcode == 7
    journal = a_plan.folder / "journal.log"
    assert journal.stat().st_size == 3000
    if journal.read_bytes().endswith(b"\n"):  # lines are as long as names of processes are: it fell between two
        os.truncate(journal, 2999)
    run(a_plan, counting(1, 0.0), [], QUIET)
    all_finished(a_plan, 1)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_trial_of_another_machine_is_taken_over_after_four_silent_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a_plan = plan(tmp_path, heartbeat=0.2, n_trials=1)
    with closing(join(a_plan)) as here, closing(join(a_plan)) as there:
        monkeypatch.setattr(claims, "this_machine", lambda: "there 1")
        theirs = claims.Claims(there, "run").next()
        assert theirs is not None
        theirs._lock.release()  # a lock of that machine's is no lock here
        monkeypatch.undo()
        ours = claims.Claims(here, "run")
        with theirs.beating():
            end = time.monotonic() + 3 * claims.BEATS * 0.2
            while time.monotonic() < end:
                assert ours.next() is None  # its owner shows signs of life
                time.sleep(0.05)
        taken = None
        while taken is None:
            taken = ours.next()
        assert taken.number == theirs.number == 0
        assert taken.mine()
        assert not theirs.mine()
        with theirs.beating():
            assert theirs.lost.wait(30)
        went_on: list[Running] = []

        def job(running: Running) -> Mapping[str, Any]:
            running.on_epoch(Moment("gated", 0, 0.5, 1.0))
            went_on.append(running)
            return {}

        _attempt(theirs, there, job)  # its training ends at the next epoch
        assert went_on == []
        theirs.tell(TrialState.COMPLETE, [0.0, 0.0])  # too late: it counts for nothing
        taken.tell(TrialState.COMPLETE, [1.0, 1.0])
    assert [trial.values for trial in trials_of(a_plan)] == [[1.0, 1.0]]


# --- budget, points, definition ----------------------------------------------------------------------------


def test_a_rerun_does_only_what_is_missing_and_continues_the_sequence(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=2)
    run(a_plan, counting(1, 0.0), [], QUIET)
    run(a_plan, counting(1, 0.0), [], QUIET)
    assert len(trials_of(a_plan)) == 2
    run(replace(a_plan, n_trials=4), counting(1, 0.0), [], QUIET)
    whole = plan(tmp_path / "whole", n_trials=4)
    run(whole, counting(1, 0.0), [], QUIET)
    assert [t.params for t in trials_of(a_plan)] == [t.params for t in trials_of(whole)]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_by_name_in_parts_draws_what_it_draws_at_once(sampler: str, tmp_path: Path):
    arguments = {"population_size": 2} if sampler.startswith("nsga") else {}
    arguments |= {"n_startup_trials": 2} if sampler in ("tpe", "gp") else {}
    parts = plan(tmp_path, sampler=sampler, sampler_arguments=arguments)
    for n in (1, 4, 6):
        run(replace(parts, n_trials=n), counting(1, 0.0), [], QUIET)
    whole = replace(parts, folder=tmp_path / "whole")
    run(whole, counting(1, 0.0), [], QUIET)
    assert [t.params for t in trials_of(parts)] == [t.params for t in trials_of(whole)]
    if not sampler.startswith("nsga"):  # a genetic child may be its parent's copy
        assert len({t.params["x"] for t in trials_of(whole)}) == 6


def test_enqueued_trials_come_first_with_their_own_overrides(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=3, enqueue=({"x": 0.25, "width": 2, "seed": 7}, {"+method": "uniform, wide"}))
    run(a_plan, counting(1, 0.0), [], QUIET)
    given = [json.loads((a_plan.folder / str(n) / "overrides").read_text()) for n in range(3)]
    assert given[0] == ["x=0.25", "width=2", "seed=7"]
    assert given[1][2] == r"+method=uniform\,\ wide"
    assert len(given[2]) == 2
    assert trials_of(a_plan)[0].params == {"x": 0.25, "width": 2}


def test_what_was_enqueued_for_failed_trials_comes_back(tmp_path: Path):
    """After a mistake that a person mends, such as a wrong path: the study has all that was asked for."""
    enqueue: Any = tuple({"x": x, "width": 1, "method": f"m{x}"} for x in (0.1, 0.2, 0.3))
    a_plan = plan(tmp_path, n_trials=5, max_retries=0, max_failures=4, enqueue=enqueue)
    job = counting(1, 0.0)

    def mostly_failing(running: Running) -> Mapping[str, Any]:
        if running.number != 1:
            raise OSError("no such folder")
        return job(running)

    with pytest.raises(StudyFailed, match="5 trials failed"):
        run(a_plan, mostly_failing, [], QUIET)
    run(a_plan, job, [], QUIET)
    finished = [trial for trial in trials_of(a_plan) if trial.state == TrialState.COMPLETE]
    assert len(finished) == 5
    listed = [json.loads((a_plan.folder / str(trial.number) / "overrides").read_text())[2:] for trial in finished]
    assert sorted(each[0] for each in listed if each) == ["method=m0.1", "method=m0.2", "method=m0.3"]
    given = sorted(trial.params["x"] for trial in finished if trial.params["x"] in (0.1, 0.2, 0.3))
    assert given == [0.1, 0.2, 0.3]
    before = len(trials_of(a_plan))
    run(a_plan, job, [], QUIET)
    assert len(trials_of(a_plan)) == before  # nothing is left to stand in for


def test_workers_take_gpus_in_turns():
    assert visible_gpus({}, 0) == visible_gpus({}, 1) == visible_gpus({"CUDA_VISIBLE_DEVICES": "3"}, 1) == []
    assert visible_gpus({}, 3) == ["0", "1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,6"}, 2) == ["4", "6"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0) == []


def test_enqueued_trials_are_foreseen_as_they_will_be(tmp_path: Path):
    enqueue: Any = ({"x": 0.25, "seed": 7}, {"seed": 8}, {"seed": 8})
    a_plan = plan(tmp_path, n_trials=3, enqueue=enqueue)
    run(a_plan, counting(1, 0.0), [], QUIET)
    given = [json.loads((a_plan.folder / str(n) / "overrides").read_text()) for n in range(2)]
    assert list(a_plan.foreseen()) == [*a_plan.space.ends(), *given]
    completed = replace(a_plan, space=Space({}, conditional, "test_study:conditional"), enqueue=({"kind": "b"},))
    ((x, kind, _),) = completed.foreseen()
    assert x.startswith("x=0.")
    assert kind == "kind=b"


def conditional(trial: optuna.Trial) -> list[str]:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return [f"x={trial.suggest_float('x_' + kind, 0, 1)}", f"kind={kind}"]


def test_a_conditional_space_from_a_function(tmp_path: Path):
    a_plan = plan(tmp_path, space=Space({}, conditional, "test_study:conditional"))
    run(a_plan, failing(1, lambda: ValueError("bad")), [], QUIET)
    for trial in trials_of(a_plan):
        assert set(trial.params) == {"kind", f"x_{trial.params['kind']}"}


def test_constraints_decide_what_the_front_is(tmp_path: Path):
    a_plan = plan(tmp_path, constraints={"macs": 50.0})
    run(a_plan, counting(1, 0.0), [], QUIET)
    with closing(join(a_plan)) as joined:
        feasible = [trial.number for trial in joined.study.trials if trial.values[1] <= 50]
        assert 0 < len(feasible) < 6
        assert {trial.number for trial in joined.study.best_trials} == set(feasible)
        assert joined.study.trials[0].constraints == {"macs": joined.study.trials[0].values[1] - 50}


def test_another_study_in_the_folder_is_refused_with_what_differs(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=1)
    run(a_plan, counting(1, 0.0), [], QUIET)
    other = replace(a_plan, space=space("x=interval(0,2)"), seed=1, objectives={"accuracy": "maximize"})
    with pytest.raises(
        Refused, match=r"objectives: .*macs.*seed: 0 there, 1 asked.*space\.width: .*space\.x: .*high=1"
    ):
        run(other, counting(1, 0.0), [], QUIET)
    with pytest.raises(Refused, match=r"\(settings\.dense\.epochs: nothing there, 6 asked for\)"):
        run(replace(a_plan, settings={"dense.epochs": 6}), counting(1, 0.0), [], QUIET)
    earlier = json.loads((a_plan.folder / "study.json").read_text())
    _refuse_difference({k: v for k, v in earlier.items() if k != "settings"}, earlier, "a study of an earlier version")
    (a_plan.folder / "study.json").unlink()  # the storage knows as well
    with pytest.raises(Refused, match="seed: 0 there, 1 asked"):
        run(other, counting(1, 0.0), [], QUIET)
    elsewhere = replace(a_plan, storage=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(Refused, match=r"has a folder 0, but the study 's' .* has 0 trials"):
        run(elsewhere, counting(1, 0.0), [], QUIET)
    run(replace(a_plan, fixed=("hardware.devices=2",), may_differ=("hardware",)), counting(1, 0.0), [], QUIET)
    with pytest.raises(Refused, match=r"another study \(constraints\.macs: nothing there, 5\.0 asked for\)"):
        run(replace(a_plan, constraints={"macs": 5.0}), counting(1, 0.0), [], QUIET)
    with pytest.raises(Refused, match=r"overrides: .* there, .*devices=2"):
        run(replace(a_plan, fixed=("hardware.devices=2",)), counting(1, 0.0), [], QUIET)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampler": "tpee"}, "no sampler 'tpee'; valid names: tpe, nsga2, nsga3, gp, qmc, random"),
        ({"sampler_arguments": {"startup": 3}}, "sampler tpe: .*startup"),
        ({"n_trials": 0}, "`n_trials` must be an int >= 1, but got 0"),
        ({"n_workers": 1.5}, "`n_workers` must be an int"),
        ({"heartbeat": 0}, "heartbeat > 0"),
        ({"objectives": {}}, "must name at least one"),
        ({"objectives": {"accuracy": "up"}}, "'accuracy' must be one of .*maximize.* got 'up'"),
        ({"constraints": {"macs": "40M"}}, "'macs' must be a finite number, but got '40M'"),
        ({"space": Space({})}, "at least one parameter"),
        ({"enqueue": ({"x": 2},)}, "x=2 is no value of x in the space"),
        ({"space": space("y=range(0.2,0.6,0.1)"), "enqueue": ({"y": 0.33},)}, "y=0.33 is no value of y in the space"),
        ({"sampler": "gp", "early_stopping": EarlyStopping(0.02)}, "must be null with the sampler gp"),
        ({"storage": "mysql://host/x"}, "storage must be null, sqlite"),
        ({"storage": "postgresql://nobody@127.0.0.1:1/x"}, "127.0.0.1:1/x cannot be reached"),
        ({"storage": "grpc://127.0.0.1"}, "must be grpc://HOST:PORT"),
        ({"storage": "grpc://127.0.0.1:1"}, "cannot be reached"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "cannot be reached"),
    ],
)
def test_bad_input_is_refused_before_any_trial(more: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(Refused, match=message):
        run(plan(tmp_path, **more), counting(1, 0.0), [], QUIET)
    assert not list((tmp_path / "s").glob("[0-9]*"))


def test_a_password_is_not_told(tmp_path: Path):
    with pytest.raises(Refused) as refused:
        run(plan(tmp_path, storage="postgresql://me:secret@127.0.0.1:1/x"), counting(1, 0.0), [], QUIET)
    assert "secret" not in str(refused.value)


def test_a_database_that_does_not_answer_is_refused(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/x"
        process = forked(lambda: os._exit(7 if refuses(plan(tmp_path, storage=url)) else 1))
        process.join(60)  # without a limit of its own it would wait for ever
        assert process.exitcode == 7


def refuses(a_plan: Plan) -> bool:
    try:
        join(a_plan)
    except Refused:
        return True
    return False


def test_many_processes_create_the_same_study_at_once(postgresql: str, tmp_path: Path):
    for storage in (None, postgresql):
        a_plan = plan(tmp_path / str(storage is None), name="at once", storage=storage, n_trials=8)
        processes = [started(a_plan, counting(1, 0.0)) for _ in range(8)]
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        all_finished(a_plan, 1)


def test_the_grpc_proxy(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import sys, optuna\n"
        f"storage = optuna.storages.RDBStorage('sqlite:///{tmp_path}/served.db')\n"
        f"optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port={port})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            a_plan = plan(tmp_path, storage=f"grpc://127.0.0.1:{port}")
            process = forked(lambda: os._exit(0 if served(a_plan) else 1))  # gRPC's threads stay out of this process
            process.join(120)
            assert process.exitcode == 0
        finally:
            server.kill()


def served(a_plan: Plan) -> bool:
    for _ in range(6):
        with suppress(Refused):
            run(a_plan, counting(1, 0.0), [], QUIET)
            all_finished(a_plan, 1)
            return True
    return False


def test_what_is_shown(tmp_path: Path):
    text = io.StringIO()
    run(plan(tmp_path, n_trials=2), counting(1, 0.0), [], Console(file=text, width=120))
    shown = text.getvalue()
    assert shown.count("trial 0 (x=") == shown.count("trial 1 (x=") == 1
    assert "2/2 finished; front: trials 0, 1" in shown
    assert "front of s: 2 trials" in shown
    assert "left" in shown


def test_what_was_given_to_a_trial_is_shown_beside_what_was_drawn(tmp_path: Path):
    text = io.StringIO()
    enqueue = ({"method": "uniform", "width": 2}, {"+method": "l1"})
    run(plan(tmp_path, n_trials=2, enqueue=enqueue), counting(1, 0.0), [], Console(file=text, width=120))
    shown = text.getvalue()
    assert "trial 0 (method=uniform, width=2, x=" in shown
    assert "trial 1 (+method=l1, x=" in shown
    front = [row.split() for row in shown[shown.index("front of s") :].splitlines()]
    assert next(row for row in front if "trial" in row)[3:8:2] == ["+method", "method", "width"]


def test_a_surplus_trial_whose_process_died_gives_way_even_when_all_is_done(tmp_path: Path):
    a_plan = plan(tmp_path, n_trials=2)
    run(a_plan, counting(1, 0.0), [], QUIET)
    with closing(join(a_plan)) as joined:
        joined.study.ask(fixed_distributions=a_plan.space.distributions)  # and dies
    run(a_plan, counting(1, 0.0), [], QUIET)
    all_finished(a_plan, 1)
    assert [trial.state.name for trial in trials_of(a_plan)] == ["COMPLETE", "COMPLETE", "FAIL"]
