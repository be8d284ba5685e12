"""The choice of one candidate: bounds, preference, reasons, and what is said where nothing fits."""

import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas_gate.quality import Quality
from nas_gate.selection import Infeasible, describe, parse_amount, select, show

M = 10**6
ROW: dict[str, Any] = {
    "study": "a",
    "trial": 0,
    "path": "",
    "method": "gates",
    "seed": 0,
    "target": 0.5,
    "accuracy": 0.9,
    "test_accuracy": math.nan,
    "macs": 50 * M,
    "params": 10**5,
    "dense_accuracy": 0.95,
    "dense_macs": 100 * M,
    "dense_params": 2 * 10**5,
}


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, "trial": i, "path": f"runs/a/{i}", **row} for i, row in enumerate(rows)])


# On the front of accuracy against MACs: 0, 1 (the knee), 2, 4. Fewest parameters: 3. Lowest latency: 2.
CANDIDATES = table(
    {"accuracy": 0.80, "macs": 10 * M, "params": 50_000, "latency_ms": 3.0},
    {"accuracy": 0.92, "macs": 30 * M, "params": 80_000, "latency_ms": 2.0},
    {"accuracy": 0.93, "macs": 60 * M, "params": 90_000, "latency_ms": 1.0},
    {"accuracy": 0.75, "macs": 20 * M, "params": 20_000, "latency_ms": math.nan},
    {"accuracy": 0.94, "macs": 90 * M, "params": 150_000, "latency_ms": 4.0},
    {"accuracy": 0.91, "macs": 70 * M, "params": 95_000, "latency_ms": 5.0, "method": "uniform"},
)


@pytest.mark.parametrize(
    ("prefer", "chosen", "next_ones"),
    [
        ("knee", 1, [2, 4, 0]),  # the ends are equally far from their chord: the more accurate first
        ("accuracy", 4, [2, 1, 0]),
        ("macs", 0, [1, 2, 4]),
        ("params", 3, [0, 1, 2]),
        ("latency", 2, [4]),  # the front of accuracy against latency is short
    ],
)
def test_preferences(prefer: str, chosen: int, next_ones: list[int]) -> None:
    choice = select(CANDIDATES, prefer=prefer)
    assert choice.row["trial"] == chosen
    assert [other.row["trial"] for other in choice.runners_up] == next_ones


@pytest.mark.parametrize(
    ("bounds", "chosen"),
    [
        ({"max_macs": 60 * M, "prefer": "accuracy"}, 2),  # a bound that is met exactly is met
        ({"min_accuracy": 0.92, "prefer": "macs"}, 1),
        ({"max_params": 80_000, "prefer": "accuracy"}, 1),
        ({"max_latency_ms": 1.5, "prefer": "accuracy"}, 2),
        ({"max_latency_ms": 3, "prefer": "macs"}, 0),  # what was not measured is not within the bound
        ({"min_accuracy": 0.9, "max_macs": 80 * M, "max_latency_ms": 4.5, "max_params": 85_000}, 1),
    ],
)
def test_bounds(bounds: dict[str, Any], chosen: int) -> None:
    assert select(CANDIDATES, **bounds).row["trial"] == chosen


def test_the_front_is_that_of_the_feasible() -> None:
    """A candidate that only infeasible ones dominate can be chosen."""
    choice = select(CANDIDATES.assign(latency_ms=[9, 9, 9, 9, 9, 1]), max_latency_ms=2)
    assert choice.row["trial"] == 5
    assert choice.runners_up == ()
    assert choice.reasons[-1] == "It is the only candidate on that front."


def test_reasons_and_differences() -> None:
    choice = select(CANDIDATES, max_macs=60 * M, min_accuracy=0.9, prefer="accuracy")
    assert choice.reasons == (
        "2 of 6 candidates meet MACs <= 60 M and validation accuracy >= 90.00%.",
        "2 of these are on the front of validation accuracy against MACs: no other one is better in one and at least "
        "equal in the other.",
        "It has the highest validation accuracy, 93.00%.",
    )
    assert choice.runners_up[0].difference == (
        "-1.00 points of validation accuracy, -50.0% MACs (30 M), -11.1% parameters (80 K), +100.0% latency (2 ms)"
    )
    assert select(CANDIDATES).reasons[0] == "No bounds were given: 6 candidates considered."
    assert "knee of that front" in select(CANDIDATES).reasons[2]
    assert "no knee" in select(CANDIDATES.iloc[[0, 4]]).reasons[2]
    assert select(CANDIDATES, prefer="params").reasons[2] == "It has the fewest parameters, 20 K."


def test_differences_name_other_methods_and_studies() -> None:
    two = table({"accuracy": 0.9}, {"accuracy": 0.8, "macs": 10 * M, "method": "l1", "study": "b"})
    difference = select(two, prefer="accuracy").runners_up[0].difference
    assert difference.endswith("study b, not a, method l1, not gates")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_number_of_runners_up(count: int) -> None:
    assert len(select(CANDIDATES, runners_up=count).runners_up) == count


def test_nothing_feasible_says_what_excludes_what() -> None:
    with pytest.raises(Infeasible) as caught:
        select(CANDIDATES, max_macs=20 * M, min_accuracy=0.91, max_latency_ms=2.5)
    text = str(caught.value)
    assert "none of 6 candidates meets MACs <= 20 M and latency <= 2.5 ms and validation accuracy >= 91.00%" in text
    assert "MACs <= 20 M alone excludes 4 of 6; the lowest is 10 M" in text
    assert "latency <= 2.5 ms alone excludes 4 of 6 (1 not measured); the lowest is 1 ms" in text
    assert "validation accuracy >= 91.00% alone excludes 2 of 6; the highest is 94.00%" in text
    assert "together they exclude all 6" in text
    assert list(caught.value.excluded.values()) == [4, 4, 2]
    # Sums of relative violations: 0: 0.11/0.91 + 0.2 = 0.32; 1: 0.5; 2: 2.0; 3: not measured; 4: 4.1; 5: 3.5.
    assert caught.value.nearest is not None
    assert caught.value.nearest["trial"] == 0
    assert "nearest: runs/a/0 (study a, trial 0, gates): validation accuracy 80.00%, MACs 10 M" in text
    assert "latency <= 2.5 ms by 20%" in text
    assert "validation accuracy >= 91.00% by 12.1%" in text


def test_one_bound_alone_needs_no_together() -> None:
    with pytest.raises(Infeasible, match="MACs <= 1 M alone excludes 6 of 6; the lowest is 10 M") as caught:
        select(CANDIDATES, max_macs=M)
    assert "together" not in str(caught.value)


def test_nothing_measured_has_no_nearest() -> None:
    with pytest.raises(Infeasible, match="no candidate has all bounded figures measured") as caught:
        select(CANDIDATES.assign(latency_ms=math.nan), max_latency_ms=1)
    assert caught.value.nearest is None
    with pytest.raises(ValueError, match="none of 6 candidates has both accuracy and latency_ms measured"):
        select(CANDIDATES.assign(latency_ms=math.nan), prefer="latency")


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.integers(1, 100)), min_size=1, max_size=10),
    st.lists(st.floats(0, 1), min_size=10, max_size=10),
    st.sampled_from(["knee", "accuracy", "macs"]),
)
def test_test_accuracy_changes_nothing(points: list[tuple[float, int]], tests: list[float], prefer: str) -> None:
    candidates = table(*({"accuracy": accuracy, "macs": macs} for accuracy, macs in points))
    blind = select(candidates, prefer=prefer)
    seeing = select(candidates.assign(test_accuracy=tests[: len(points)]), prefer=prefer)
    assert blind.row["trial"] == seeing.row["trial"]
    assert blind.reasons == seeing.reasons
    assert [o.difference for o in blind.runners_up] == [o.difference for o in seeing.runners_up]


def test_rows_are_plain_values_with_all_columns() -> None:
    row = select(CANDIDATES.assign(**{"param.penalty": 0.5})).row
    assert row["param.penalty"] == 0.5
    assert {type(row[name]) for name in ("trial", "macs", "accuracy", "path")} == {int, float, str}


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match=r"prefer must be one of \['knee', .*'speed'"):
        select(CANDIDATES, prefer="speed")
    with pytest.raises(ValueError, match=r"`0 < min_accuracy <= 1` .*93"):
        select(CANDIDATES, min_accuracy=93)
    with pytest.raises(ValueError, match="`max_macs > 0` must hold"):
        select(CANDIDATES, max_macs=0)
    with pytest.raises(ValueError, match="`max_latency_ms > 0` must hold"):
        select(CANDIDATES, max_latency_ms=math.nan)
    with pytest.raises(ValueError, match="no column 'latency_ms'"):
        select(CANDIDATES.drop(columns="latency_ms"), max_latency_ms=1)
    with pytest.raises(ValueError, match="no candidates"):
        select(CANDIDATES.iloc[:0])
    with pytest.raises(ValueError, match="runners_up >= 0"):
        select(CANDIDATES, runners_up=-1)
    with pytest.raises(ValueError, match=r"needs the columns \['accuracy'\]"):
        select(CANDIDATES.drop(columns="accuracy"))


def test_describe() -> None:
    text = describe(select(CANDIDATES.assign(test_accuracy=0.915, dense_latency_ms=4.0), max_macs=60 * M))
    assert text.splitlines()[0] == "runs/a/1 (study a, trial 1, gates)"
    assert "92.00%   dense 95.00% (-3.00 points)" in text
    assert "30 M   dense 100 M (30.0% of it)" in text
    assert "2 ms   dense 4 ms (50.0% of it)" in text
    assert "91.50%   not used in the choice" in text
    assert "runs/a/2 (study a, trial 2, gates)\n    +1.00 points" in text
    unmeasured = describe(select(CANDIDATES, prefer="params"))
    assert "not measured" in unmeasured
    assert "test accuracy" not in unmeasured


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        *[("60M", 60 * M), ("1.5G", 1_500 * M), ("200k", 200_000), ("0.1K", 100), (" 60 M ", 60 * M)],
        *[("60000000", 60 * M), ("60_000_000", 60 * M), ("6e7", 60 * M), (60 * M, 60 * M), (6e7, 60 * M), ("1", 1)],
    ],
)
def test_amounts(text: str | float, amount: int) -> None:
    assert parse_amount(text) == amount
    assert type(parse_amount(text)) is int


@pytest.mark.parametrize("text", ["", "M", "60MB", "60 %", "-5M", "0", "1.5", "0.0001K", "nan", "inf", "1e999999999"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="an amount must be a positive whole number"):
        parse_amount(text)


@settings(deadline=None)
@given(st.integers(1, 10**12))
def test_amounts_are_exact(amount: int) -> None:
    assert parse_amount(str(amount)) == amount
    assert parse_amount(f"{amount // 1000}.{amount % 1000:03}K") == amount


def test_figures_as_people_read_them() -> None:
    shown = [
        show("accuracy", 0.934),
        show("macs", 59.96 * M),
        show("macs", 950),
        show("latency_ms", 1.25),
        show("params", 2e9),
    ]
    assert shown == ["93.40%", "59.96 M", "950", "1.25 ms", "2 G"]
    assert show("latency_ms", math.nan) == "not measured"


# --- other metrics ------------------------------------------------------------------------------------------

RMSE = Quality("rmse", False, ".3f")
NAMES = {"accuracy": "rmse", "test_accuracy": "test_rmse", "dense_accuracy": "dense_rmse"}
ERRORS = CANDIDATES.assign(**{name: 1 - CANDIDATES[name] for name in NAMES}).rename(columns=NAMES)


@pytest.mark.parametrize("prefer", ["knee", "quality", "macs", "params", "latency"])
def test_errors_choose_as_the_accuracies_that_they_mirror(prefer: str) -> None:
    name = {"quality": "accuracy"}.get(prefer, prefer)
    other = {"quality": "rmse"}.get(prefer, prefer)
    for bounds in ({}, {"max_macs": 60 * M}):
        expected = select(CANDIDATES, prefer=name, **bounds)
        got = select(ERRORS, prefer=other, quality=RMSE, **bounds)
        assert got.row["trial"] == expected.row["trial"]
        assert [o.row["trial"] for o in got.runners_up] == [o.row["trial"] for o in expected.runners_up]


def test_a_limit_is_the_worst_value() -> None:
    """rmse: 0.20, 0.08, 0.07, 0.25, 0.06, 0.09."""
    choice = select(ERRORS, limit=0.085, prefer="macs", quality=RMSE)
    assert choice.row["trial"] == 1
    assert choice.reasons[0] == "3 of 6 candidates meet validation rmse <= 0.085."
    assert select(CANDIDATES, limit=0.915, prefer="macs").row["trial"] == 1
    assert "It has the lowest validation rmse, 0.060." in select(ERRORS, prefer="rmse", quality=RMSE).reasons
    text = describe(choice)
    assert "  validation rmse             0.080   dense 0.050 (+0.030)" in text
    assert "on the front of validation rmse against MACs" in text
    assert "-0.010 validation rmse, +100.0% MACs" in text
    assert "accura" not in text
    with pytest.raises(
        Infeasible, match=r"validation rmse <= 0.010 alone excludes 6 of 6; the lowest is 0.060"
    ) as told:
        select(ERRORS, limit=0.01, quality=RMSE)
    assert told.value.nearest is not None
    assert told.value.nearest["trial"] == 4
    with pytest.raises(Infeasible, match=r"validation rmse <= 0.000 by "):  # a limit of 0 is missed by the value itself
        select(ERRORS, limit=0.0, quality=RMSE)


def test_bounds_of_another_metric_are_refused() -> None:
    with pytest.raises(ValueError, match="min_accuracy bounds an accuracy, but these candidates are judged by rmse"):
        select(ERRORS, min_accuracy=0.9, quality=RMSE)
    with pytest.raises(ValueError, match="the limit of rmse must be finite, but is nan"):
        select(ERRORS, limit=math.nan, quality=RMSE)
    with pytest.raises(ValueError, match="min_accuracy and limit bound the same"):
        select(CANDIDATES, min_accuracy=0.9, limit=0.9)
    with pytest.raises(ValueError, match=r"prefer must be one of \['knee', 'rmse', 'macs', .*but got 'accuracy'"):
        select(ERRORS, prefer="accuracy", quality=RMSE)
