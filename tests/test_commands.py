"""pareto, select, report and export as they are typed: what they print, write and refuse."""

import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

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
    assert table["alpha/1"].startswith("* knee alpha/1 gates 0.4 0 93.00 %")
    assert table["alpha/1"].endswith("400 K 50 K 40.0 % 4.0")
    assert table["alpha/2"].startswith("alpha/2")
    assert table["alpha/0"].startswith("* alpha/0 gates 0.7 0 94.00 % 700 K")
    assert "95.00 % 1 M 100 K 100.0 %" in table["dense"]
    # 0.2 x 0.80 + 0.3 x 0.93 + 0.3 x 0.94
    assert "alpha gates 4 3 0.7210 93.00 % at 400 K" in " ".join(shown.out.split())
    assert "reference point (accuracy 0, share 1)" in shown.out
    assert "seed repeats" not in shown.out
    assert "skipped alpha/5: " in shown.err
    assert "without a result: alpha/4\n" in shown.err


def test_pareto_of_two_studies_with_seeds_and_a_baseline(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["pareto", "alpha", "beta", "--reference", "0.8,0.6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "** knee alpha/1" in shown

    assert "** knee beta/2" in shown  # 94 % at 500 K: alpha/1 is less accurate, alpha/0 dearer
    assert "** alpha/0" not in shown  # equal to beta/2 in accuracy, and dearer
    assert "beta all 4 1" in shown
    assert shown.index("beta gates 3 1 ") < shown.index("beta uniform 1 1 ")
    assert "beta uniform 1 1 0.0050" in shown  # (0.85 - 0.8) x (0.6 - 0.5)
    assert "beta gates 0.5 4.0 3 92.00 % ± 2.00 500 K ± 0" in shown
    assert "(accuracy 0.8, share 0.6)" in shown


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
    assert "5 of 8 candidates meet MACs <= 600 K and validation accuracy >= 90.00 %." in shown
    assert "highest validation accuracy, 94.00 %" in shown
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
    assert "validation accuracy >= 93.00 % alone excludes 2 of 4; the highest is 94.00 %" in shown.err
    assert "nearest: alpha/3/candidate" in shown.err


# --- export, and the latencies that it leaves ---------------------------------------------------------------


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
