"""Studies as processes: supervised workers, and the whole command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from rich.console import Console

import nas_gate
from nas_gate import cli
from nas_gate.errors import Refused, StudyFailed
from nas_gate.study import run as running
from nas_gate.study.claims import ERROR, FAILURES
from nas_gate.study.plan import Plan
from nas_gate.study.space import Space, load_function, parse
from nas_gate.study.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent

JOB = """
import os, signal, sys
from pathlib import Path
import torch
from nas_gate.study.plan import Plan
from nas_gate.study.run import run
from nas_gate.study.space import Space, parse

def job(running):
    running.folder.mkdir(parents=True, exist_ok=True)
    deaths = running.folder / "deaths"
    if running.number in (1, 2):
        so_far = len(deaths.read_text()) if deaths.exists() else 0
        if running.number == 2 or so_far == 0:
            deaths.write_text("x" * (so_far + 1))
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
    return {"y": 1.0, "process": os.getpid(), "threads": torch.get_num_threads()}

run(Plan("s", Space(parse(["x=interval(0,1)"])[0]), {"y": "maximize"}, folder=Path("s"), n_trials=4, n_workers=2,
         max_retries=1), job, [sys.executable, *sys.argv])
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def trials_of(folder: Path, name: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(None, folder)).trials


def test_workers_killed_in_a_trial_are_started_again_and_share_the_cores(tmp_path: Path):
    (tmp_path / "job.py").write_text(JOB)
    given = environment()
    given.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, env=given, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    trials = trials_of(tmp_path / "s", "s")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.user_attrs.get(FAILURES) for trial in trials] == [None, 1, 2, None, None]
    assert "the process died while the trial ran" in trials[2].user_attrs[ERROR]
    assert "failed: the process died" in done.stdout
    cores = len(os.sched_getaffinity(0))
    assert {trial.user_attrs["threads"] for trial in trials if trial.number != 2} == {max(1, cores // 2)}


def test_workers_that_cannot_start_end_the_study_with_what_they_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "LONGEST_PAUSE", 0.0)
    plan = Plan("s", Space(parse(["x=interval(0,1)"])[0]), {"y": "maximize"}, folder=tmp_path)
    command = [sys.executable, "-c", "raise SystemExit('there is no such library')"]
    with pytest.raises(StudyFailed, match=r"died 5 times in a row.*(?s:.*)there is no such library"):
        running.run(plan, lambda trial: {}, command, Console(quiet=True))


# --- the command line ---------------------------------------------------------------------------------------

COMMAND = [
    *("search", "--multirun", "experiment=debug", "model.arguments.width=0.25", "target=interval(0.4,0.7)"),
    *("training.gating.learning_rate=0.1", "training.cycle.epochs=12", "training.gating.epochs=10"),
    *("hydra.sweeper.n_trials=2", "hydra.sweeper.study=mine"),
]


def started(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "nas_gate.cli", *COMMAND]
    given = environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command,
        cwd=folder,
        env=given,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def after_an_epoch(process: "subprocess.Popen[str]", checkpoint: Path) -> int:
    """Wait until the trial has stored its first epoch; the pid of the worker."""
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    owner = trials_of(checkpoint.parent.parent, "mine")[0].user_attrs["study:owner"]
    assert isinstance(owner, dict)
    return int(owner["process"])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_study_of_searches_interrupted_killed_and_run_again(tmp_path: Path):
    study = tmp_path / "runs" / "studies" / "mine"
    process = started(tmp_path)
    worker = after_an_epoch(process, study / "0" / "gated.pt")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command continues" in said
    assert gone(worker)
    assert [trial.state.name for trial in trials_of(study, "mine")] == ["RUNNING"]

    process = started(tmp_path)
    time.sleep(1)
    end = time.monotonic() + 120
    while not isinstance(owner := trials_of(study, "mine")[0].user_attrs["study:owner"], dict):
        assert time.monotonic() < end
    process.kill()
    process.communicate()
    while not gone(int(owner["process"])):  # a worker ends with its supervisor, which can tell it nothing any more
        assert time.monotonic() < end
        time.sleep(0.05)

    process = started(tmp_path)
    shown, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "2/2 finished" in shown
    assert said == ""
    trials = trials_of(study, "mine")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert sorted(path.name for path in study.iterdir() if path.name.isdecimal()) == ["0", "1"]
    for trial in trials:
        folder = study / str(trial.number)
        result = json.loads((folder / "result.json").read_text())
        assert json.loads((folder / "settings.json").read_text())["target"] == trial.params["target"]
        assert trial.values == [result["accuracy"], result["macs"]]
        assert trial.user_attrs["path"] == f"runs/studies/mine/{trial.number}/candidate"
        assert trial.user_attrs["test_accuracy"] == result["test_accuracy"]
        nas_gate.load(folder / "candidate")
        history = json.loads((folder / "history.json").read_text())
        assert [epoch["epoch"] for epoch in history["gated"] + history["finetuned"]] == list(range(12))
    assert FAILURES not in trials[0].user_attrs

    again = started(tmp_path)
    shown, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "2 of 2 trials finished" in shown
    assert trials_of(study, "mine") == trials


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["target=interval(0.3"], "interval(0.3"),
        (["target=interval(0.7,0.3)"], "target=interval(0.7,0.3): an interval must begin below its end"),
        (["target=0.5"], "the space must have at least one parameter"),
        (["target=interval(0.3,0.7)", "hydra.sweeper.sampler.name=tpee"], "valid names: tpe, nsga2"),
        (["target=interval(0.3,0.7)", "hydra.sweeper.trials=3"], "hydra.sweeper.trials"),
        (["target=interval(0.3,0.7)", "hydra.sweeper.early_stopping={margins: 2}"], "margins"),
        (["modle=choice(a,b)"], "Key 'modle' is not in struct"),
        (["model=choice(resnet21,resnet20)"], "Could not find 'model/resnet21'"),
        (["target=interval(0.3,0.7)", "hydra.sweeper.storage=postgresql://me@127.0.0.1:1/x"], "cannot be reached"),
        (["target=interval(0.3,0.7)", "hardware.devices=2"], "`hardware.devices` must be 1, but is 2"),
        (["seed=range(3)", "targets=[0.7,0.5]", "hydra.sweeper.early_stopping={}"], "asks for several"),
        (["hydra.sweeper.space_function=nowhere:f"], "'nowhere:f' cannot be imported"),
        (["seed=range(3)", "hydra/launcher=cluster", "hydra.sweeper.early_stopping={}"], "hydra/launcher=cluster runs"),
        (["seed=range(3)", "hydra.sweeper.enqueue=[{seed:1},{methodd:l1}]"], "methodd=l1: Could not override"),
        (["seed=range(3)", "hydra.sweeper.enqueue=[{method:l3}]"], "method=l3: `method` must be one of"),
        (["target=interval(0.3,1.5)"], "No trial can have target=1.5: `0 < target <= 1` must hold"),
        (["seed=range(3)", "method=choice(l1,gates,l3)"], "No trial can have seed=0 method=l3: `method` must"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_run(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; put back afterwards
    launcher = tmp_path / "own" / "hydra" / "launcher" / "cluster.yaml"
    launcher.parent.mkdir(parents=True)
    launcher.write_text("_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n")
    assert cli.main(["search", "-m", "--config-dir", "own", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not list(tmp_path.glob("runs/studies/*/[0-9]*"))


def test_a_sweeps_file_that_changed_makes_another_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What its command does not say, the study knows all the same; where and how it is computed may differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    file = tmp_path / "own" / "sweep" / "edited.yaml"
    file.parent.mkdir(parents=True)
    text = (
        "# @package _global_\ndefaults:\n  - override /experiment: debug\nmodel:\n  arguments:\n    width: 0.25\n"
        "hydra:\n  sweeper:\n    study: edited\n    n_trials: 1\n    n_workers: 0\n    params:\n      seed: range(3)\n"
    )
    file.write_text(text)
    command = ["search", "-m", "--config-dir", "own", "+sweep=edited"]
    assert cli.main(command) == 0
    assert cli.main([*command, "hardware.channels_last=false"]) == 0
    capsys.readouterr()
    file.write_text(text.replace("hydra:\n", "training:\n  dense:\n    epochs: 6\nhydra:\n"))
    assert cli.main(command) == 2
    assert "another study (settings.dense.epochs: 2 there, 6 asked for)" in capsys.readouterr().err


# --- the space ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("interval(0.1,0.5)", FloatDistribution(0.1, 0.5)),
        ("interval(1,5)", FloatDistribution(1.0, 5.0)),
        ("int(interval(1,5))", IntDistribution(1, 5)),
        ("tag(log,interval(1,16))", FloatDistribution(1.0, 16.0, log=True)),
        ("tag(log,int(interval(1,16)))", IntDistribution(1, 16, log=True)),
        ("range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("range(3)", IntDistribution(0, 2)),
        ("range(5,0,-2)", IntDistribution(1, 5, step=2)),
        ("range(0.1,0.4,0.1)", FloatDistribution(0.1, 0.3, step=0.1)),
        ("range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(1,b)", CategoricalDistribution([1, "b"])),
        ("x,y", CategoricalDistribution(["x", "y"])),
        ("choice([1,2],[3])", CategoricalDistribution(["[1,2]", "[3]"])),
    ],
)
def test_hydras_grammar_as_distributions(text: str, distribution: Any):
    searched, fixed = parse([f"+a.b={text}", "seed=1"])
    assert searched["a.b"].distribution == distribution
    assert searched["a.b"].key == "+a.b"
    assert fixed == ["seed=1"]


def test_values_come_back_as_they_were_written():
    searched, _ = parse(["a=choice([1,2],'c d',3)", "b=range(0.1,0.9,0.1)"])
    texts = [searched["a"].override(value) for value in searched["a"].distribution.choices]
    assert [parse([text])[1] for text in texts] == [["a=[1,2]"], [texts[1]], ["a=3"]]
    assert cli.composed([texts[1].replace("a=", "run=")])["run"] == "c d"
    assert searched["b"].override(0.1 + 2 * 0.1) == "b=0.3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interval(2,1)", "begin below its end"),
        ("tag(log,interval(0,1))", "low"),
        ("tag(log,choice(a,b))", "no logarithmic scale"),
        ("tag(lin,interval(0,1))", "no tag 'lin'"),
        ("range(1,1)", "empty"),
        ("range(0,1,0)", "empty"),
        ("choice(a,a)", "different"),
        ("tag(log,range(1,9,2))", "log"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_its_text(text: str, message: str):
    with pytest.raises(Refused, match=message) as refused:
        parse([f"target={text}"])
    assert f"target={text}" in str(refused.value)


def test_the_ends_of_a_space_one_at_a_time():
    searched, _ = parse(["a=interval(0,1)", "b=choice(x,y,z)", "+c=range(0.1,0.4,0.1)", "d=range(1)"])
    assert [" ".join(overrides) for overrides in Space(searched).ends()] == [
        "a=0.0 b=x +c=0.1 d=0",
        "a=1.0 b=x +c=0.1 d=0",
        "a=0.0 b=y +c=0.1 d=0",
        "a=0.0 b=z +c=0.1 d=0",
        "a=0.0 b=x +c=0.3 d=0",
    ]


def test_a_later_override_replaces_an_earlier_one():
    searched, fixed = parse(["target=interval(0,1)", "seed=1", "target=0.5", "seed=interval(1,2)"])
    assert list(searched) == ["seed"]
    assert fixed == ["target=0.5"]


@pytest.mark.parametrize("path", ["nothing", "json:nothing", "json:__name__"])
def test_a_space_function_is_found_or_refused(path: str):
    assert load_function("json:loads") is json.loads
    with pytest.raises(Refused, match="space_function must be"):
        load_function(path)
