"""Folders become a table: every figure in its place, what cannot be read is named, nothing depends on where it lies."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import as_errors, set_json, trial

from nas_gate.collect import collect, run_of
from nas_gate.pareto import check_table, repeats
from nas_gate.quality import ACCURACY, Quality


def test_every_figure_in_its_place(studies: Path):
    collected = collect([studies / "alpha"])
    table = collected.table
    check_table(table)
    assert table["trial"].tolist() == [0, 1, 2, 3]
    assert table["accuracy"].tolist() == [0.94, 0.93, 0.92, 0.80]
    assert table["macs"].tolist() == [700_000, 400_000, 500_000, 200_000]
    assert table["target"].tolist() == [0.7, 0.4, 0.5, 0.2]
    assert set(table["study"]) == {"alpha"}
    assert set(table["method"]) == {"gates"}
    assert set(table["dense_macs"]) == {1_000_000}
    assert math.isnan(table["test_accuracy"][0])  # not asked for
    assert table["test_accuracy"][1] > 0
    assert table["path"].tolist() == [(studies / "alpha" / str(n) / "candidate").as_posix() for n in range(4)]
    # of all settings, only one varies that has no column of its own
    assert [name for name in table if name.startswith("param.")] == ["param.budget.arguments.weight"]
    assert table["param.budget.arguments.weight"].tolist() == [24.0, 24.0, 24.0, 8.0]
    assert collected.latency is None
    assert "latency_ms" not in table


def test_what_is_left_out_is_named(studies: Path):
    collected = collect([studies / "alpha"])
    assert collected.unfinished == (studies / "alpha" / "4",)
    assert [each.path for each in collected.skipped] == [studies / "alpha" / "5"]
    assert "truncated or altered" in collected.skipped[0].reason


def test_methods_seeds_and_several_studies(studies: Path):
    table = collect([studies / "beta", studies / "alpha"]).table
    beta = table[table["study"] == "beta"]
    assert beta["method"].tolist() == ["gates", "gates", "gates", "uniform"]
    assert beta["seed"].tolist() == [0, 1, 2, 0]
    assert len(table) == 8
    # it varies in alpha, and so it is told for beta, too
    weights = beta["param.budget.arguments.weight"]
    assert weights[:3].tolist() == [24.0] * 3
    assert math.isnan(weights[3])  # of a baseline it says nothing


def test_what_only_gates_look_at_says_nothing_of_a_baseline(studies: Path):
    """A study draws the gates' settings for all; two seeds of one baseline are repeats all the same."""
    repeated = studies / "beta" / "9"
    shutil.copytree(studies / "beta" / "3", repeated)
    set_json(repeated / "settings.json", seed=1, **{"budget.arguments.weight": 11.0, "gating.learning_rate": 0.5})
    table = collect([studies / "beta"]).table
    assert [name for name in table if name.startswith("param.")] == []
    means = repeats(table)
    assert means[means["method"] == "uniform"]["count"].tolist() == [2]

    set_json(studies / "beta" / "0" / "settings.json", **{"budget.arguments.weight": 12.0})
    table = collect([studies / "beta"]).table
    assert [name for name in table if name.startswith("param.")] == ["param.budget.arguments.weight"]
    told = dict(zip(table["trial"], table["param.budget.arguments.weight"]))
    assert (told[0], told[1]) == (12.0, 24.0)
    assert math.isnan(told[3])
    assert math.isnan(told[9])


def test_several_candidates_of_one_trial(studies: Path, searched: dict[float, Path]):
    folder = studies / "many" / "7"
    folder.mkdir(parents=True)
    for target, macs in ((0.7, 700_000), (0.3, 300_000)):
        run = trial(folder / f"target-{target}", searched[0.5], 0.9, macs, 50_000, {"target": target})
        (run / "settings.json").unlink()
    shutil.copy(searched[0.5] / "settings.json", folder)
    set_json(folder / "settings.json", targets=[0.7, 0.3], target=0.7)
    (folder / "result.json").write_text(json.dumps({"candidates": ["target-0.7", "target-0.3"]}))
    table = collect([studies / "many"]).table
    assert table["trial"].tolist() == [7, 7]
    assert table["target"].tolist() == [0.7, 0.3]
    assert table["macs"].tolist() == [700_000, 300_000]
    assert [Path(path).parent.name for path in table["path"]] == ["target-0.7", "target-0.3"]
    settings, history = run_of(Path(table["path"][1]))
    assert settings["targets"] == [0.7, 0.3]
    assert list(history) == ["dense", "gated", "finetuned"]

    (folder / "target-0.7" / "result.json").unlink()
    collected = collect([studies / "many"])
    assert collected.table["target"].tolist() == [0.3]
    assert [each.path.name for each in collected.skipped] == ["target-0.7"]
    set_json(folder / "result.json", candidates=["../../alpha/0"])
    assert "names of folders" in collect([studies / "many"]).skipped[0].reason


def test_a_single_run_is_a_study_of_one(studies: Path):
    table = collect([studies / "alpha" / "1"]).table
    assert table[["study", "trial", "macs"]].to_numpy().tolist() == [["1", 0, 400_000]]


def test_a_moved_study_is_read_where_it_lies(studies: Path):
    moved = (studies / "alpha").rename(studies / "elsewhere")
    table = collect([moved]).table
    assert set(table["study"]) == {"elsewhere"}
    assert all(Path(path).is_relative_to(moved) and Path(path).is_dir() for path in table["path"])


def test_where_data_lie_is_no_setting_of_the_study(studies: Path):
    set_json(studies / "alpha" / "0" / "settings.json", **{"data.arguments.root": "/elsewhere"})
    set_json(studies / "alpha" / "1" / "settings.json", **{"data.arguments.augment": {"crop": 2, "sizes": [1, 2]}})
    names = [name for name in collect([studies / "alpha"]).table if name.startswith("param.data")]
    assert names == [f"param.data.arguments.augment.{name}" for name in ("crop", "flip", "cutout", "sizes")]


def test_different_data_are_named(studies: Path):
    assert list(collect([studies / "alpha", studies / "beta"]).data.values()) == ["alpha"]
    changed = {"data.name": "npz", "data.arguments.root": "/small", "data.arguments.batch_size": 7}
    set_json(studies / "beta" / "2" / "settings.json", **changed)
    data = collect([studies / "alpha", studies / "beta"]).data
    assert data == {"digits (validation=0.1)": "alpha", "npz (validation=0.1, root=/small)": "beta"}


def test_studies_of_one_name_go_by_their_paths(studies: Path):
    other = studies.parent / "other" / "alpha"
    shutil.copytree(studies / "alpha", other)
    assert set(collect([studies / "alpha", other]).table["study"]) == {str(studies / "alpha"), str(other)}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda run: (run / "result.json").write_text("{"), "result.json is damaged: it is not JSON"),
        (lambda run: (run / "result.json").write_text("[]"), "result.json is damaged: it holds no mapping"),
        (lambda run: (run / "settings.json").unlink(), "settings.json cannot be read (No such file or directory)"),
        (lambda run: set_json(run / "result.json", accuracy=93.0), "`0 <= accuracy <= 1` must hold"),
        (lambda run: set_json(run / "result.json", macs="many"), "must say macs"),
        (lambda run: shutil.rmtree(run / "candidate"), "candidate.json cannot be read"),
        (lambda run: set_json(run / "candidate" / "candidate.json", version=1, figures={}), "was altered"),
        (lambda run: (run / "candidate" / "latency.json").write_text('{"latencies": [{}]}'), "latency.json is damaged"),
    ],
)
def test_a_damaged_candidate_is_skipped_and_the_others_stay(studies: Path, make: Any, reason: str):
    make(studies / "alpha" / "1")
    collected = collect([studies / "alpha"])
    assert collected.table["trial"].tolist() == [0, 2, 3]
    assert [each.path.name for each in collected.skipped] == ["1", "5"]
    assert reason in collected.skipped[0].reason


def test_other_metrics_stand_under_their_own_name(studies: Path):
    gamma = as_errors(studies / "alpha", studies / "gamma")
    collected = collect([gamma])
    assert collected.quality == Quality("rmse", False, ".4f")
    check_table(collected.table, collected.quality)
    assert collected.table["rmse"].tolist() == pytest.approx([0.06, 0.07, 0.08, 0.20])
    assert set(collected.table["dense_rmse"]) == {0.05}
    assert not any("accuracy" in name for name in collected.table)
    assert collect([studies / "alpha"]).quality == ACCURACY
    with pytest.raises(
        ValueError, match=r"by one metric only, but .* rmse \(study gamma\) and accuracy \(study alpha\)"
    ):
        collect([gamma, studies / "alpha"])
    set_json(gamma / "1" / "result.json", task_metric={"name": "rmse"})
    skipped = collect([gamma]).skipped
    assert [each.path.name for each in skipped] == ["1", "5"]
    assert "task_metric must have a name, higher_is_better and shown" in skipped[0].reason


def test_what_is_no_study_is_refused(studies: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not there"):
        collect([tmp_path / "nothing"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file"):
        collect([tmp_path / "file"])
    with pytest.raises(ValueError, match=r"neither a study .* nor a run"):
        collect([studies])
    with pytest.raises(ValueError, match=r"given once, but .*alpha is given 2 times"):
        collect([studies / "alpha", studies / "beta" / ".." / "alpha"])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "study.json").write_text("{}")  # begun, without a trial yet
    assert len(collect([tmp_path / "new"]).table) == 0


def latencies(folder: Path, machine: str, **measured: tuple[str, int, int, float, float]) -> None:
    rows = [
        {"runtime": runtime, "batch": batch, "threads": threads, "dense_ms": dense, "candidate_ms": candidate}
        for runtime, batch, threads, dense, candidate in measured.values()
    ]
    (folder / "candidate" / "latency.json").write_text(json.dumps({"machine": machine, "latencies": rows}))


def test_a_condition_includes_the_padding(studies: Path):
    alpha = studies / "alpha"
    for name in ("0", "1", "2"):
        latencies(alpha / name, "here", a=("ONNX Runtime", 1, 1, 4.0, 3.0))
    for name in ("0", "1"):
        set_json(alpha / name / "candidate" / "latency.json", pad_to=8)
    collected = collect([alpha])
    assert collected.latency == "ONNX Runtime, batch 1, 1 thread, channels padded to multiples of 8, on here"
    assert collected.pad_to == 8
    assert collected.table["latency_ms"].notna().tolist() == [True, True, False, False]


def test_a_candidate_of_several_targets_by_itself(studies: Path, tmp_path: Path):
    """It has the settings of its trial, one folder up."""
    shutil.copytree(studies / "alpha" / "1", tmp_path / "several" / "target-0.4")
    (tmp_path / "several" / "target-0.4" / "settings.json").rename(tmp_path / "several" / "settings.json")
    assert len(collect([tmp_path / "several" / "target-0.4"]).table) == 1


def test_latencies_are_of_one_condition(studies: Path):
    alpha = studies / "alpha"
    big = ("PyTorch", 128, 1, 90.0, 50.0)
    latencies(alpha / "0", "here", a=("ONNX Runtime", 1, 1, 4.0, 3.0), b=big)
    latencies(alpha / "1", "here", a=("PyTorch", 1, 1, 9.0, 8.0), b=("ONNX Runtime", 1, 1, 5.0, 2.0), c=big)
    latencies(alpha / "2", "there", a=("ONNX Runtime", 1, 1, 40.0, 30.0))
    collected = collect([alpha])
    # two were measured here under each of two conditions: the smaller batch counts
    assert collected.latency == "ONNX Runtime, batch 1, 1 thread, on here"
    assert collected.table["latency_ms"].fillna(-1).tolist() == [3.0, 2.0, -1, -1]
    assert collected.table["dense_latency_ms"].tolist() == [4.5] * 4  # the median of one network's
