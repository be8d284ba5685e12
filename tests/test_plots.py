"""The picture's record by hand; of the drawing, that it is made whole, named right and repeatable."""

import builtins
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nas_gate.plots import Dense, Knee, Point, Repeat, draw, figure_data
from nas_gate.quality import Quality

ROW: dict[str, Any] = {
    "study": "a",
    "trial": 0,
    "path": "",
    "method": "gates",
    "seed": 0,
    "target": 0.5,
    "accuracy": 0.9,
    "test_accuracy": math.nan,
    "macs": 50,
    "params": 10,
    "dense_accuracy": 0.95,
    "dense_macs": 100,
    "dense_params": 20,
}


def table(*rows: dict[str, Any], **common: Any) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, "trial": i, "path": f"runs/{i}", **common, **row} for i, row in enumerate(rows)])


ONE = table(
    {"accuracy": 0.9, "macs": 60, "target": 0.6},
    {"accuracy": 0.7, "macs": 20, "target": 0.2},
    {"accuracy": 0.6, "macs": 30, "target": 0.3},
    {"accuracy": 0.8, "macs": 30, "target": 0.4},
    {"accuracy": 0.5, "macs": 20, "seed": 0, "method": "uniform"},
    {"accuracy": 0.7, "macs": 40, "seed": 1, "method": "uniform"},
)


def test_series_by_hand() -> None:
    data = figure_data(ONE)
    gates, uniform = data.series
    assert (gates.study, gates.method, uniform.method) == ("a", "gates", "uniform")
    assert gates.points == (
        Point(20, 0.7, 1, "runs/1", True),
        Point(30, 0.6, 2, "runs/2", False),
        Point(30, 0.8, 3, "runs/3", True),
        Point(60, 0.9, 0, "runs/0", True),
    )
    assert gates.staircase == ((20, 0.7), (30, 0.7), (30, 0.8), (60, 0.8), (60, 0.9))
    assert gates.repeats == ()
    assert uniform.staircase == ((30, pytest.approx(0.6)),)  # its two seeds' mean, not the luckier one
    assert not any(point.on_front for point in uniform.points)
    root = math.sqrt(2)
    (mean,) = uniform.repeats
    assert mean == Repeat(30, pytest.approx(0.6), pytest.approx(10 * root), pytest.approx(0.1 * root), 2)
    assert data.knees == (Knee("a", "gates", 30, 0.8),)  # scaled: 3/4 of the cheapness at half of the accuracy
    assert data.dense == (Dense(("a",), 100, 0.95),)
    assert (data.x, data.left_out) == ("macs", 0)


def test_the_knee_is_of_all_methods() -> None:
    better = pd.concat([ONE, table({"accuracy": 0.89, "macs": 21, "method": "l1"})])
    assert figure_data(better).knees == (Knee("a", "l1", 21, 0.89),)


def test_the_knee_is_no_lucky_seed() -> None:
    """It lies on the front that is drawn, which is of means."""
    seeds = [{"macs": 40, "accuracy": accuracy, "seed": seed} for seed, accuracy in enumerate((0.60, 0.61, 0.88))]
    ends = [{"macs": 10, "accuracy": 0.5, "target": 0.1}, {"macs": 100, "accuracy": 0.9, "target": 1.0}]
    data = figure_data(table(*seeds, *ends))
    (knee,) = data.knees
    assert (knee.cost, knee.accuracy) in data.series[0].staircase


def test_equal_candidates_make_one_corner() -> None:
    data = figure_data(table({"macs": 20}, {"macs": 20, "target": 0.1}))
    assert data.series[0].staircase == ((20, 0.9),)
    assert [point.on_front for point in data.series[0].points] == [True, True]


def test_means_of_seeds_stand_beside_candidates_of_one_seed() -> None:
    seeds = [{"macs": 20, "accuracy": accuracy, "seed": seed} for seed, accuracy in enumerate((0.6, 0.8))]
    single = {"macs": 10, "accuracy": 0.65, "target": 0.1}
    worse = {"macs": 30, "accuracy": 0.69, "target": 0.9}  # than the mean of 0.7, at a higher cost
    (series,) = figure_data(table(*seeds, single, worse)).series
    assert series.staircase == ((10, 0.65), (20, 0.65), (20, pytest.approx(0.7)))
    assert [point.on_front for point in series.points] == [True, False, False, False]


def test_several_studies_and_their_dense_models() -> None:
    tables = [
        table({}, study="b"),
        table({}, {"dense_macs": 80}, study="a"),
        table({}, study="c", dense_accuracy=math.nan),
    ]
    data = figure_data(tables)
    assert [series.study for series in data.series] == ["b", "a", "c"]
    assert data.dense == (Dense(("a",), 80, 0.95), Dense(("b", "a"), 100, 0.95))
    assert figure_data(pd.concat(tables)) == data  # one table with three studies, or three tables


def test_other_axes() -> None:
    assert [point.cost for point in figure_data(ONE, x="params").series[0].points] == [10] * 4
    assert figure_data(ONE, x="params").dense[0].cost == 20
    timed = ONE.assign(latency_ms=[2.0, 1.0, math.nan, 1.5, 1.0, math.nan])
    data = figure_data(timed, x="latency_ms")
    assert data.left_out == 2
    assert [point.cost for point in data.series[0].points] == [1.0, 1.5, 2.0]
    assert math.isnan(data.dense[0].cost)  # its latency was not measured; its accuracy was
    assert figure_data(timed.assign(dense_latency_ms=3.0), x="latency_ms").dense[0].cost == 3.0


def test_methods_stand_in_a_fixed_order() -> None:
    names = ["random", "own", "uniform", "gates", "bn_scale", "l1"]
    data = figure_data(table(*({"method": name} for name in names)))
    assert [series.method for series in data.series] == ["gates", "uniform", "l1", "bn_scale", "random", "own"]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must be one of \['macs', 'params', 'latency_ms'\], but got 'flops'"):
        figure_data(ONE, x="flops")
    with pytest.raises(ValueError, match="two tables hold 'a'"):
        figure_data([ONE, ONE])
    with pytest.raises(ValueError, match="no column 'latency_ms'"):
        figure_data(ONE, x="latency_ms")
    with pytest.raises(ValueError, match=r"nothing to draw: .*\(of 6\)"):
        figure_data(ONE.assign(accuracy=math.nan))
    with pytest.raises(ValueError, match="nothing to draw"):
        figure_data([])


# ---------------------------------------------------------------------------------------------------- drawing


def test_svg_is_repeatable_and_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = figure_data([ONE, table({"accuracy": 0.85, "macs": 45}, study="other study")])
    first, second = draw(data, tmp_path / "first.svg"), draw(data, str(tmp_path / "new" / "second.svg"))
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    shown = ["validation accuracy, %", "MACs (multiply-accumulates)", "other study", "uniform", "gates", "dense model"]
    shown += ["2 studies: validation accuracy against MACs", "knee of the study", "mean ± std over seeds"]
    for words in shown:
        assert f"<!-- {words} -->" in text, words
    assert "dc:date" not in text
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["first.svg", "second.svg"]


@pytest.mark.parametrize(
    "candidates",
    [
        table({}),  # a single point
        table({"accuracy": 1.0}, dense_accuracy=math.nan),
        table({"accuracy": 0.1}, {"macs": 20, "accuracy": 0.9}, {"macs": 30, "accuracy": 0.95}),  # one far below
        pd.concat([table({}, {"method": "own"}, study=f"study {i}") for i in range(9)]),  # more than the palette
    ],
    ids=["point", "no dense", "collapsed", "many"],
)
def test_png(candidates: pd.DataFrame, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = draw(figure_data(candidates), tmp_path / "front.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    ("costs", "logarithmic", "ticks"),
    [
        ((100, 1900), False, ["500", "1 K", "1.5 K"]),
        ((100, 2000), True, ["100", "200", "500", "1 K", "2 K"]),
        ((20_000_000, 4_100_000_000), True, ["20 M", "100 M", "1 G"]),
        ((1000, 9_000_000), True, ["1 K", "10 K", "100 K", "1 M"]),
        ((60_000, 60_000), False, ["60 K"]),
    ],
)
def test_the_scale_of_costs(costs: tuple[int, int], logarithmic: bool, ticks: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = figure_data(table({"macs": costs[0], "dense_macs": costs[1]}))
    assert data.logarithmic == logarithmic
    text = draw(data, tmp_path / "a.svg").read_text(encoding="utf-8")
    for tick in ticks:
        assert f"<!-- {tick} -->" in text, tick


def test_candidates_out_of_view_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"accuracy": 0.9, "macs": 20}, {"accuracy": 0.92, "macs": 30}, {"accuracy": 0.1, "macs": 40}]
    candidates = table(*rows, {"accuracy": math.nan})
    text = draw(figure_data(candidates), tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<!-- candidates below the view: 1, candidates without figures: 1 -->" in text


@pytest.mark.parametrize(("dense", "beyond"), [(0.95, False), (0.895, False), (0.81, False), (0.37, True)])
def test_a_dense_model_far_below_is_out_of_view(dense: float, beyond: bool, tmp_path: Path) -> None:
    """As that of a supernet is; one that is little worse, or better, stays in view."""
    pytest.importorskip("matplotlib")
    candidates = table({"accuracy": 0.9, "macs": 20}, {"accuracy": 0.92, "macs": 30}, dense_accuracy=dense)
    text = draw(figure_data(candidates), tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ("<!-- dense models below the view: 1 -->" in text) == beyond


@pytest.mark.parametrize(
    ("method", "accuracy", "beyond"),
    [
        ("l1", 0.83, False),  # up to 0.1 below the lowest of gates always stays in view
        ("l1", 0.41, True),
        ("gates", 0.41, False),  # the left end of what is looked at
    ],
)
def test_a_front_that_collapses_is_out_of_view(method: str, accuracy: float, beyond: bool, tmp_path: Path) -> None:
    rows = [{"accuracy": 0.9, "macs": 20}, {"accuracy": 0.95, "macs": 30}]
    data = figure_data(table(*rows, {"accuracy": accuracy, "macs": 10, "method": method}, dense_accuracy=0.95))
    assert all(point.on_front for series in data.series for point in series.points)
    assert (data.view[0] > accuracy) == beyond
    assert data.view[0] < 0.9
    assert data.view[1] > 0.95
    pytest.importorskip("matplotlib")
    text = draw(data, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ("<!-- candidates below the view: 1 -->" in text) == beyond


def test_pictures_of_errors(tmp_path: Path) -> None:
    """Less is better: the outline falls, and what is far worse lies above the view."""
    names = {"accuracy": "psnr_gap", "test_accuracy": "test_psnr_gap", "dense_accuracy": "dense_psnr_gap"}
    quality = Quality("psnr_gap", False, ".2f")
    rows = [{"accuracy": 3.0, "macs": 20}, {"accuracy": 2.0, "macs": 30}, {"accuracy": 90.0, "macs": 40}]
    data = figure_data(table(*rows, dense_accuracy=1.5).rename(columns=names), quality=quality)
    assert data.series[0].staircase == ((20, 3.0), (30, 3.0), (30, 2.0))
    assert [point.on_front for point in data.series[0].points] == [True, True, False]
    assert data.knees == (Knee("a", "gates", 30, 2.0),)
    assert data.dense == (Dense(("a",), 100, 1.5),)
    pytest.importorskip("matplotlib")
    text = draw(data, tmp_path / "a.svg").read_text(encoding="utf-8")
    for words in (
        "validation psnr gap",
        "a: validation psnr gap against MACs",
        "candidates above the view: 1",
    ):
        assert f"<!-- {words} -->" in text, words


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .png or .svg, but got 'front.pdf'"):
        draw(figure_data(ONE), tmp_path / "front.pdf")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        draw(figure_data(ONE), tmp_path / "front.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_record_works_and_drawing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    data = figure_data(ONE)
    with pytest.raises(ImportError, match=r"pip install 'nas-gate\[plots\]'"):
        draw(data, tmp_path / "front.png")
