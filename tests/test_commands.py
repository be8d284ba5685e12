"""pareto, select, report and export as they are typed: what they print, write and refuse."""

import importlib
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import as_errors, set_json

import nas_gate
from nas_gate import cli, latency
from nas_gate.candidate import read as candidate_of
from nas_gate.collect import collect
from nas_gate.table import aligned


@pytest.fixture(autouse=True)
def _here(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studies)


def rows(text: str) -> dict[str, str]:
    """The lines of the table of candidates by candidate, spaces joined; "dense" by that word."""
    lines = [" ".join(line.split()) for line in text.split("\n\n")[0].splitlines()[1:]]
    return {next(word for word in line.split() if "/" in word or word == "dense"): line for line in lines}


# --- pareto -------------------------------------------------------------------------------------------------


def test_pareto_of_one_study(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["pareto", "alpha"]) == 0
    shown = capsys.readouterr()
    table = rows(shown.out)
    assert list(table) == ["dense", "alpha/3", "alpha/1", "alpha/2", "alpha/0"]  # cheapest first
    assert table["alpha/1"].startswith("* knee alpha/1 gates 0.4 0 93.00%")
    assert table["alpha/1"].endswith("400 K 50 K 40.0% 24.0")
    assert table["alpha/2"].startswith("alpha/2")
    assert table["alpha/0"].startswith("* alpha/0 gates 0.7 0 94.00% 700 K")
    assert "95.00% 1 M 100 K 100.0%" in table["dense"]
    # 0.2 x 0.80 + 0.3 x 0.93 + 0.3 x 0.94
    assert "alpha gates 4 3 0.7210 93.00% at 400 K" in " ".join(shown.out.split())
    assert "reference point (accuracy 0, share 1)" in shown.out
    assert "seed repeats" not in shown.out
    assert "skipped alpha/5: " in shown.err
    assert "without a result: alpha/4\n" in shown.err


def test_pareto_of_two_studies_with_seeds_and_a_baseline(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["pareto", "alpha", "beta", "--reference", "0.8,0.6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "** knee alpha/1" in shown

    assert "** knee beta/2" in shown  # 94% at 500 K: alpha/1 is less accurate, alpha/0 dearer
    assert "** alpha/0" not in shown  # equal to beta/2 in accuracy, and dearer
    assert "beta all 4 1" in shown
    assert shown.index("beta gates 3 1 ") < shown.index("beta uniform 1 1 ")
    assert "beta uniform 1 1 0.0050" in shown  # (0.85 - 0.8) x (0.6 - 0.5)
    assert "beta gates 0.5 24.0 3 92.00% ± 2.00 500 K ± 0" in shown
    assert "(accuracy 0.8, share 0.6)" in shown


def test_different_data_are_told_beside_every_comparison(capsys: pytest.CaptureFixture[str]):
    for command in ("pareto", "select"):
        assert cli.main([command, "alpha", "beta"]) == 0
        assert "data" not in capsys.readouterr().err
    set_json(Path("beta/2/settings.json"), **{"data.name": "mnist"})
    for command in ("pareto", "select"):
        assert cli.main([command, "alpha", "beta"]) == 0
        told = "digits (validation=0.1) in alpha; mnist (validation=0.1) in beta"
        assert f"figures compare only where data are the same, but here are {told}\n" in capsys.readouterr().err


def test_pareto_writes_what_it_shows(capsys: pytest.CaptureFixture[str]):
    assert (
        cli.main(["pareto", "alpha", "--x", "params", "--csv", "out/a.csv", "--plot", "a.png", "--plot", "a.svg"]) == 0
    )
    table = pd.read_csv("out/a.csv").set_index("trial")
    assert table["params"].to_dict() == {3: 20_000, 1: 50_000, 2: 55_000, 0: 80_000}
    assert table["on_front"].to_dict() == {3: True, 1: True, 2: False, 0: True}
    assert table["knee"].to_dict() == {3: False, 1: True, 2: False, 0: False}
    assert table["accuracy"][1] == 0.93
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("a.svg").read_text()
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "a.svg", "alpha", "beta", "out"]


def test_settings_that_others_lack_are_left_empty(studies: Path, capsys: pytest.CaptureFixture[str]):
    set_json(studies / "alpha" / "0" / "settings.json", noise=0.5)
    assert cli.main(["pareto", "alpha", "beta"]) == 0
    shown = capsys.readouterr().out
    assert "noise" in shown
    assert "seed repeats" in shown
    assert "nan" not in shown


def test_dense_networks_of_different_sizes_have_their_own_rows(studies: Path, capsys: pytest.CaptureFixture[str]):
    for name, accuracy, macs in (("0", 0.95, 1_000_000), ("1", 0.9, 400_000), ("2", 0.9, 400_000)):
        set_json(studies / "alpha" / name / "result.json", dense_accuracy=accuracy, dense_macs=macs)
    assert cli.main(["pareto", "alpha"]) == 0
    dense = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("dense")]
    assert [line[1:4] for line in dense] == [["95.00%", "1", "M"], ["90.00%", "400", "K"]]


def test_the_name_of_a_picture_is_looked_at_first(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["pareto", "alpha", "--plot", "a.png", "--plot", "b.pdf"]) == 2
    assert "must end in .png or .svg, but got 'b.pdf'" in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_select_says_how_a_padded_model_is_exported(studies: Path, capsys: pytest.CaptureFixture[str]):
    for candidate in (studies / "alpha").glob("*/candidate"):
        rows = [{"runtime": "ONNX Runtime", "batch": 1, "threads": 1, "dense_ms": 2.0, "candidate_ms": 1.0}]
        (candidate / "latency.json").write_text(json.dumps({"machine": "here", "pad_to": 8, "latencies": rows}))
    assert cli.main(["select", "alpha"]) == 0
    assert re.search(r"Deploy it: +nas-gate export alpha/\d/candidate --pad-to 8\n", capsys.readouterr().out)


def test_rows_are_aligned():
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


# --- select -------------------------------------------------------------------------------------------------


def test_select_chooses_with_reasons(capsys: pytest.CaptureFixture[str]):
    assert (
        cli.main(["select", "alpha", "beta", "--max-macs", "0.6M", "--min-accuracy", "0.9", "--prefer", "accuracy"])
        == 0
    )
    shown = capsys.readouterr().out
    assert shown.startswith("beta/2/candidate (study beta, trial 2, gates)")
    assert "5 of 8 candidates meet MACs <= 600 K and validation accuracy >= 90.00%." in shown
    assert "highest validation accuracy, 94.00%" in shown
    assert "alpha/1/candidate" in shown.split("Runners-up:")[1]
    assert "Deploy it:  nas-gate export beta/2/candidate" in shown
    nas_gate.load("beta/2/candidate")


def test_select_for_programs(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["select", "alpha", "--max-params", "60K", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)
    assert choice["candidate"]["path"] == "alpha/1/candidate"
    assert [other["candidate"]["trial"] for other in choice["runners_up"]] == [3]
    assert choice["latency"] is None
    assert cli.main(["select", "alpha", "--prefer", "accuracy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"]["test_accuracy"] is None


def test_nothing_feasible_says_what_excludes_what(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["select", "alpha", "--max-macs", "300K", "--min-accuracy", "0.93"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "MACs <= 300 K alone excludes 3 of 4; the lowest is 200 K" in shown.err
    assert "validation accuracy >= 93.00% alone excludes 2 of 4; the highest is 94.00%" in shown.err
    assert "nearest: alpha/3/candidate" in shown.err


# --- other tasks --------------------------------------------------------------------------------------------


def test_a_study_judged_by_an_error_looks_like_the_accuracies_that_it_mirrors(
    studies: Path, capsys: pytest.CaptureFixture[str]
):
    as_errors(studies / "alpha", studies / "gamma")
    assert cli.main(["pareto", "gamma", "--csv", "gamma.csv", "--plot", "gamma.svg"]) == 0
    shown = capsys.readouterr().out
    table = rows(shown)
    assert list(table) == ["dense", "gamma/3", "gamma/1", "gamma/2", "gamma/0"]
    assert table["gamma/1"].startswith("* knee gamma/1 gates 0.4 0 0.0700")
    assert table["gamma/2"].startswith("gamma/2")
    assert "0.0500 1 M 100 K 100.0%" in table["dense"]
    assert "gamma gates 4 3 0.0700 at 400 K" in " ".join(shown.split())
    assert "hypervolume: none, for rmse has no worst value" in shown
    assert "rmse: validation, last epoch" in shown
    assert "accuracy" not in shown
    assert pd.read_csv("gamma.csv").set_index("trial")["rmse"][1] == 0.07
    assert "<!-- validation rmse -->" in Path("gamma.svg").read_text()

    assert cli.main(["pareto", "gamma", "--reference", "1,1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gamma gates 4 3 0.7210 0.0700 at 400 K" in shown  # that of alpha
    assert "reference point (rmse 1, share 1)" in shown

    assert cli.main(["select", "gamma", "--max", "rmse=0.075", "--prefer", "macs"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("gamma/1/candidate")
    assert "2 of 4 candidates meet validation rmse <= 0.0750." in shown
    assert "accuracy" not in shown
    assert cli.main(["select", "gamma", "--prefer", "rmse", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"]["path"] == "gamma/0/candidate"
    for arguments, message in (
        (["select", "gamma", "--min-accuracy", "0.9"], "min_accuracy bounds an accuracy, but these candidates"),
        (["select", "gamma", "--min", "rmse=0.1"], "--min rmse: less of it is better; bound it by --max rmse=..."),
        (["pareto", "gamma", "alpha"], "candidates compare by one metric only"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["segmentation", "regression"])
def test_a_study_of_another_task_from_search_to_selection(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 60), ("test", 10)):
        x = rng.normal(size=(count, 1, 8, 8)).astype(np.float32)
        wanted = {"segmentation": (x[:, 0] > 0).astype(np.int64), "regression": x.mean((2, 3)).astype(np.float64)}
        parts |= {f"x_{part}": x, f"y_{part}": wanted[task]}
    np.savez(tmp_path / "data.npz", **parts)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def segmentation(num_classes=2): return nn.Sequential(\n"
        "    nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, num_classes, 1))\n"
        "def regression(): return nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    name, way = {"segmentation": ("mean_iou", "maximize"), "regression": ("rmse", "minimize")}[task]
    overrides = ["experiment=debug", f"task={task}", "data=npz", f"data.path='{tmp_path}/data.npz'"]
    overrides += ["model=custom", f"model.name=own_networks:{task}", "target=choice(0.4,0.7)"]
    sweep = ["hydra.sweeper.study=tiny", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_workers=0"]
    sweep += ["data.batch_size=16", "hydra.sweeper.max_retries=0", "hydra.sweeper.max_failures=0"]
    sweep += ["~hydra.sweeper.objectives.accuracy", f"+hydra.sweeper.objectives.{name}={way}"]
    sweep += ["hydra.sweeper.enqueue=[{target: 0.4}, {target: 0.7}]"]
    assert cli.main(["search", "--multirun", *overrides, *sweep]) == 0
    assert name in capsys.readouterr().out

    collected = collect([Path("runs/studies/tiny")])
    assert (collected.quality.name, collected.quality.higher_is_better) == (name, way == "maximize")
    values, costs = (collected.table[column].tolist() for column in (name, "macs"))
    assert len(values) == 2
    sign = 1 if way == "maximize" else -1
    best = [
        not any((sign * b >= sign * a and d <= c) and (sign * b > sign * a or d < c) for b, d in zip(values, costs))
        for a, c in zip(values, costs)
    ]
    assert cli.main(["pareto", "runs/studies/tiny", "--csv", "tiny.csv"]) == 0
    shown = capsys.readouterr().out
    assert name.replace("_", " ") in shown
    assert "accuracy" not in shown
    assert pd.read_csv("tiny.csv").sort_values("trial")["on_front"].tolist() == best
    extreme = max(values) if way == "maximize" else min(values)
    limit = f"{name}={extreme - sign * 1e-6}"
    assert cli.main(["select", "runs/studies/tiny", "--min" if sign == 1 else "--max", limit, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"][name] == extreme
    factory = ["--factory", f"own_networks:{task}"]
    assert cli.main(["report", "runs/studies/tiny", "-o", "tiny.html", *factory]) == 0
    assert f'"name":"{name}"' in Path("tiny.html").read_text()


# --- export, and the latencies that it leaves ---------------------------------------------------------------


def test_a_candidate_of_a_loop_of_ones_own_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the README saves it: its record has no arguments of a factory."""
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    gated = nas_gate.attach(importlib.import_module("own_net").net(), torch.rand(1, 8))
    removed = nas_gate.remove_with_proof(gated, nas_gate.land(gated, target=0.5))
    folder = nas_gate.save(tmp_path / "candidate", removed.model, removed.cut, {"name": "MyNet"}, {}, {"seed": 0})
    options = ["--factory", "own_net:net", "--input", "8", "--format", "pt2", "--no-latency"]
    assert cli.main(["export", str(folder), *options]) == 0
    program = torch.export.load(folder / "export" / "model.pt2").module()
    x = torch.rand(3, 8)
    torch.testing.assert_close(program(x), removed.model(x))


def test_export_measures_and_the_others_find_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    arguments = ["export", "alpha/1", "alpha/3/candidate", "--format", "pt2", "--batch-sizes", "1,3"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("largest error") == 2
    files = sorted(path.name for path in Path("alpha/1/candidate/export").iterdir())
    assert files == ["MODEL_CARD.md", "model.pt2"]
    record = json.loads(Path("alpha/1/candidate/latency.json").read_text())
    assert [(each["batch"], each["threads"]) for each in record["latencies"]] == [(1, 1), (3, 1)]

    measured = collect([Path("alpha")]).table["latency_ms"].tolist()
    assert measured[1] == record["latencies"][0]["candidate_ms"]
    assert [math.isnan(value) for value in measured] == [True, False, True, False]
    assert cli.main(["pareto", "alpha", "--x", "latency"]) == 0
    assert "latency: PyTorch, batch 1, 1 thread, on " in capsys.readouterr().out
    assert cli.main(["select", "alpha", "--max-latency-ms", "1e6", "--prefer", "accuracy"]) == 0
    assert capsys.readouterr().out.startswith("alpha/1/candidate")


def test_export_of_a_model_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    Path("own_nets.py").write_text(
        "from nas_gate.models import build\ndef net(**given): return build('digits_cnn', **given)\n"
    )
    monkeypatch.syspath_prepend(".")
    candidate = Path("alpha/1/candidate")
    record = candidate_of(candidate)
    network = nas_gate.load(candidate)
    model = {"name": "own_nets:net", "arguments": record.model["arguments"]}
    nas_gate.save(candidate, network, record.cut, model, record.figures, record.provenance)
    assert cli.main(["export", "alpha/1", "--format", "pt2", "--no-latency"]) == 2
    assert "not registered" in capsys.readouterr().err
    assert (
        cli.main(["export", "alpha/1", "--format", "pt2", "--no-latency", "-o", "out", "--factory", "own_nets:net"])
        == 0
    )
    exported = torch.export.load("out/model.pt2").module()
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(exported(x), network(x))
    assert not (candidate / "latency.json").exists()


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pareto", "gamma"], "a study must be a folder, but gamma is not there"),
        (["pareto", "alpha", "--x", "latency"], "measure it with nas-gate export"),
        (["select", "alpha", "--prefer", "latency"], "measure it with nas-gate export"),
        (["select", "alpha", "--max-latency-ms", "2"], "measure it with nas-gate export"),
        (["pareto", "alpha", "--reference", "93,1"], "must be an accuracy in [0, 1), but is 93"),
        (["select", "alpha", "--min-accuracy", "93"], "`0 < min_accuracy <= 1` must hold"),
        (["select", "alpha", "--min", "accuracy=93"], "`0 < min_accuracy <= 1` must hold"),
        (["select", "alpha", "--min", "mean_iou=0.5"], "--min mean_iou: these candidates are judged by accuracy"),
        (["select", "alpha", "--max", "accuracy=0.5"], "more of it is better; bound it by --min accuracy=..."),
        (["select", "alpha", "--prefer", "rmse"], "prefer must be one of ['knee', 'accuracy', 'macs', 'params'"),
        (["pareto", "alpha", "--plot", "a.pdf"], "must end in .png or .svg"),
        (["report", "alpha", "-o", "alpha"], "Is a directory"),
        (["export", "gamma"], "a study must be a folder, but gamma is not there"),
        (["export", "beta", "-o", "out"], "--output takes the files of one candidate, but 4 are given"),
        (["export", "alpha/1", "--format", "onnx,tflite"], "unknown format 'tflite'"),
        (["export", "alpha/5/candidate"], "truncated or altered"),
        (["export", "alpha/5"], "there is no finished candidate in alpha/5"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" or arguments[0] == "pareto"
    told = [line for line in shown.err.splitlines() if "skipped" not in line and "without a result" not in line]
    assert len(told) == 1
    assert told[0].startswith("nas-gate: ")
    assert message in told[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pareto"], "the following arguments are required: STUDY"),
        (["pareto", "alpha", "--x", "watts"], "invalid choice: 'watts'"),
        (["pareto", "alpha", "--reference", "0.9"], "must be an accuracy and a positive share"),
        (["select", "alpha", "--min", "0.9"], "must be a metric and a number, as in mean_iou=0.6, but is '0.9'"),
        (["select", "alpha", "--max-macs", "60MB"], "an amount must be a positive whole number"),
        (["export", "alpha/1", "--batch-sizes", "0"], "must be whole numbers of at least 1, as in 1,128, but is '0'"),
    ],
)
def test_a_mistyped_option_is_told_with_the_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: nas-gate {arguments[0]}")
    assert message in error


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("matplotlib", ["pareto", "alpha", "--plot", "a.png"], "plots"),
        ("plotly.offline", ["report", "alpha"], "report"),
        ("onnx", ["export", "alpha/1"], "export"),
    ],
)
def test_a_missing_extra_is_named(
    missing: str, arguments: list[str], extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(arguments) == 2
    assert f"nas-gate[{extra}]" in capsys.readouterr().err


def test_a_study_without_a_candidate(capsys: pytest.CaptureFixture[str]):
    Path("new").mkdir()
    Path("new/study.json").write_text("{}")
    for command in ("pareto", "select", "report"):
        assert cli.main([command, "new"]) == 2
        assert "there is no finished candidate in new" in capsys.readouterr().err
    assert not Path("report.html").exists()


@pytest.mark.parametrize("command", ["pareto", "select", "report", "export"])
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"examples:\n  nas-gate {command} runs/studies/digits" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert f"nas-gate {command}" in cli.HELP


def test_report_is_written_whole(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", "alpha", "beta", "-o", "out/page.html"]) == 0
    assert capsys.readouterr().out == "8 candidates: out/page.html\n"
    assert [path.name for path in Path("out").iterdir()] == ["page.html"]
