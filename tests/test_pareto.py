"""Fronts, hypervolumes and knees: against brute force, against Optuna, and by hand."""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas_gate import pareto
from nas_gate.pareto import hypervolume, knee, non_dominated
from nas_gate.quality import Quality

ROW: dict[str, Any] = {
    "study": "a",
    "trial": 0,
    "path": "runs/a/0",
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


def table(*changes: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, "trial": i, "path": f"runs/a/{i}", **change} for i, change in enumerate(changes)])


def front_of(*points: tuple[float, float]) -> pd.DataFrame:
    """A table from (accuracy, macs)."""
    return table(*({"accuracy": accuracy, "macs": macs} for accuracy, macs in points))


def dominated_by_any(values: npt.NDArray[np.float64], maximise: list[bool]) -> list[bool]:
    """The definition, pair by pair."""

    def dominates(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:
        gains = [(x - y) if up else (y - x) for x, y, up in zip(a, b, maximise)]
        return all(g >= 0 for g in gains) and any(g > 0 for g in gains)

    return [any(dominates(other, row) for other in values) for row in values]


def counted_volume(values: npt.NDArray[np.float64], reference: list[float], maximise: list[bool]) -> float:
    """The volume of integer points, counted in unit cells."""
    sign = np.where(maximise, -1, 1)
    rows, corner = values * sign, np.array(reference) * sign
    low = int(min(rows.min(initial=0), corner.min())) if len(rows) else 0
    cells = itertools.product(*(range(low, int(c)) for c in corner))
    return float(sum(any((row <= cell).all() for row in rows) for cell in map(np.array, cells)))


@st.composite
def clouds(draw: st.DrawFn, most: int = 4, grid: int = 5, least: int = 1) -> tuple[npt.NDArray[np.float64], list[bool]]:
    """Points on a small grid, so that ties and duplicates are common, and a direction per column."""
    d = draw(st.integers(least, most))
    rows = draw(st.lists(st.lists(st.integers(0, grid), min_size=d, max_size=d), max_size=14))
    return np.array(rows, dtype=np.float64).reshape(-1, d), draw(st.lists(st.booleans(), min_size=d, max_size=d))


@settings(deadline=None)
@given(clouds())
def test_front_is_what_the_definition_says(cloud: tuple[npt.NDArray[np.float64], list[bool]]) -> None:
    values, maximise = cloud
    assert non_dominated(values, maximise).tolist() == [not d for d in dominated_by_any(values, maximise)]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 200))
def test_front_agrees_with_optuna(seed: int, d: int, n: int) -> None:
    multi_objective = pytest.importorskip("optuna.study._multi_objective")
    values = np.random.default_rng(seed).normal(size=(n, d)).round(1)
    expected = multi_objective._is_pareto_front(values, assume_unique_lexsorted=False)
    assert (non_dominated(values, [False] * d) == expected).all()


@settings(deadline=None)
@given(clouds(most=3, grid=4), st.data())
def test_hypervolume_counts_cells(cloud: tuple[npt.NDArray[np.float64], list[bool]], data: st.DataObject) -> None:
    values, maximise = cloud
    corners = st.lists(st.integers(-1, 5).map(float), min_size=len(maximise), max_size=len(maximise))
    reference = data.draw(corners)
    assert hypervolume(values, reference, maximise) == counted_volume(values, reference, maximise)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 40), st.booleans())
def test_hypervolume_agrees_with_optuna(seed: int, d: int, n: int, sphere: bool) -> None:
    optuna_hypervolume = pytest.importorskip("optuna._hypervolume")
    values = np.abs(np.random.default_rng(seed).normal(size=(n, d)))
    if sphere:  # all on the front
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    expected = optuna_hypervolume.compute_hypervolume(-values, np.zeros(d))
    assert hypervolume(values, [0.0] * d, [True] * d) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(clouds(most=3, least=2))
def test_a_dominated_point_changes_no_volume(cloud: tuple[npt.NDArray[np.float64], list[bool]]) -> None:
    values, maximise = cloud
    reference = [-1.0 if up else 6.0 for up in maximise]
    best = values[non_dominated(values, maximise)]
    assert hypervolume(best, reference, maximise) == hypervolume(values, reference, maximise)


def test_volume_by_hand() -> None:
    # accuracy up, MACs down, beyond (0, 10): a 0.5 x 8 and a 0.9 x 4 rectangle share 0.5 x 4.
    assert hypervolume([[0.5, 2], [0.9, 6], [0.4, 7]], [0, 10], [True, False]) == pytest.approx(0.5 * 8 + 0.4 * 4)
    # The corner itself, points beside it and NaN add nothing.
    assert hypervolume([[0, 5], [0.9, 10], [0.9, 11], [math.nan, 1]], [0, 10], [True, False]) == 0
    assert hypervolume(np.empty((0, 3)), [0, 0, 0], [True] * 3) == 0


def test_nan_rows_are_never_on_the_front_and_dominate_nothing() -> None:
    values = [[math.nan, 0.0], [1.0, 5.0], [2.0, math.nan], [1.0, 5.0], [0.5, 5.0]]
    assert non_dominated(values, [True, False]).tolist() == [False, True, False, True, False]
    assert non_dominated([[math.nan, math.nan]], [True, True]).tolist() == [False]


def test_infinite_figures_have_their_order() -> None:
    values = [[math.inf, 3.0], [1.0, -math.inf], [-math.inf, math.inf], [math.inf, 2.0]]
    assert non_dominated(values, [True, False]).tolist() == [False, True, False, True]
    assert non_dominated([[math.inf, math.inf]], [False, False]).tolist() == [True]


@pytest.mark.parametrize("d", [2, 3])
def test_a_hundred_thousand_points(d: int) -> None:
    """Only that it is no quadratic matter (a table of all pairs would need 80 GB); the points' best one is known."""
    values = np.random.default_rng(0).random((100_000, d))
    values[777] = 2.0
    assert np.flatnonzero(non_dominated(values, [True] * d)).tolist() == [777]


def test_shapes_and_references_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        non_dominated(np.zeros((3, 2)), [True])
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        non_dominated(np.zeros(3), [True])
    with pytest.raises(ValueError, match="2 finite numbers"):
        hypervolume(np.zeros((3, 2)), [0, math.inf], [True, False])
    with pytest.raises(ValueError, match="2 finite numbers"):
        hypervolume(np.zeros((3, 2)), [0], [True, False])


# ---------------------------------------------------------------------------------------------------- tables


def test_front_is_sorted_by_cost_and_keeps_all_columns_and_duplicates() -> None:
    candidates = front_of((0.9, 60), (0.8, 20), (0.7, 30), (0.9, 60), (0.95, 90)).assign(**{"param.x": range(5)})
    best = pareto.front(candidates)
    assert best["trial"].tolist() == [1, 0, 3, 4]
    assert best["param.x"].tolist() == [1, 0, 3, 4]
    other = pareto.front(
        candidates.assign(latency_ms=[5, 4, 1, 6, math.nan]), [("accuracy", "max"), ("latency_ms", "min")]
    )
    assert other["trial"].tolist() == [2, 1, 0]


def test_front_of_nothing_is_empty() -> None:
    assert len(pareto.front(front_of((0.9, 1)).iloc[:0])) == 0
    assert len(pareto.front(front_of((math.nan, 1)))) == 0


def test_bad_tables_are_refused_by_name() -> None:
    good = front_of((0.9, 60))
    with pytest.raises(ValueError, match=r"needs the columns \['macs', 'dense_macs'\]"):
        pareto.front(good.drop(columns=["macs", "dense_macs"]))
    with pytest.raises(ValueError, match=r"`0 <= accuracy <= 1` must hold .*93\.4"):
        pareto.front(good.assign(accuracy=93.4))
    with pytest.raises(ValueError, match="`macs > 0` must hold, but got 0"):
        pareto.summary(good.assign(macs=0))
    with pytest.raises(ValueError, match="column 'macs' must hold numbers"):
        pareto.repeats(good.assign(macs="many"))
    with pytest.raises(ValueError, match="no column 'latency_ms'"):
        pareto.front(good, [("accuracy", "max"), ("latency_ms", "min")])
    with pytest.raises(ValueError, match="'max' or 'min'"):
        pareto.front(good, [("accuracy", "up")])


def test_knee_by_hand() -> None:
    # Scaled to (accuracy, cheapness): (0, 1), (0.8, 0.7), (1, 0); the middle one is 0.5 / sqrt(2) above the chord.
    best = front_of((0.5, 10), (0.9, 40), (1.0, 110))
    assert knee(best) == 1
    assert pareto.chord_distance(best) == pytest.approx([0, 0.5 / math.sqrt(2), 0], abs=1e-12)


def test_knee_of_small_straight_and_sagging_fronts() -> None:
    assert knee(front_of((0.9, 60))) == 0
    assert knee(front_of((0.9, 60), (0.9, 60))) == 0
    assert knee(front_of((0.8, 20), (0.9, 60))) == 1
    assert knee(front_of((0.9, 60), (0.8, 20))) == 0  # the same pair in another order
    assert knee(front_of(*((0.3 + 0.07 * i, 7 * i + 1) for i in range(7)))) == 6  # straight, but for rounding: its end
    assert knee(front_of((0.1, 10), (0.2, 90), (1.0, 100))) == 2  # sagging: likewise
    assert knee(front_of((0.0, 1), (0.6, 3), (0.8, 5), (1.0, 11))) == 2  # two equally far: the more accurate


def test_knee_does_not_depend_on_units() -> None:
    points = [(0.5, 10), (0.7, 14), (0.85, 30), (0.9, 80)]
    scaled = front_of(*((0.5 + accuracy / 4, 10**6 * macs) for accuracy, macs in points))
    assert knee(front_of(*points)) == knee(scaled)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 100)), min_size=1, max_size=12))
def test_knee_is_the_farthest_from_the_chord(points: list[tuple[float, int]]) -> None:
    best = pareto.front(front_of(*points))
    (x0, y0), (x1, y1) = ((best["macs"].iloc[i], best["accuracy"].iloc[i]) for i in (0, -1))
    if (x0, y0) == (x1, y1):
        assert knee(best) == 0
        return
    u, v = (best["macs"] - x0) / (x1 - x0), (best["accuracy"] - y0) / (y1 - y0)
    heights = ((v - u) / math.sqrt(2)).to_numpy()  # above the diagonal from (0, 0) to (1, 1)
    assert heights[knee(best)] == pytest.approx(heights.max(), abs=1e-6)


def test_knee_wants_a_front() -> None:
    with pytest.raises(ValueError, match="of 2 candidates some are dominated"):
        knee(front_of((0.9, 60), (0.8, 70)))
    with pytest.raises(ValueError, match="of 0 candidates"):
        knee(front_of((0.9, 60)).iloc[:0])
    with pytest.raises(ValueError, match="2 objectives"):
        knee(front_of((0.9, 60)), (("accuracy", "max"),))


def test_summary_states_its_reference() -> None:
    a = front_of((0.5, 20), (0.9, 60), (0.4, 70), (0.99, 120))
    candidates = pd.concat([a, front_of((0.8, 50)).assign(study="b", method="uniform")])
    default = pareto.summary(candidates).set_index("study")
    assert default.loc["a", ["candidates", "on_front"]].tolist() == [4, 3]
    # Shares of 100 MACs beyond (0, 1): 0.5 x 0.8 and 0.4 x 0.4; what costs more than the dense model adds nothing.
    assert default.loc["a", "hypervolume"] == pytest.approx(0.5 * 0.8 + 0.4 * 0.4)
    assert default.loc["b", "hypervolume"] == pytest.approx(0.8 * 0.5)
    assert default["reference_accuracy"].tolist() == [0, 0]
    assert default["reference_macs_share"].tolist() == [1, 1]
    assert default.loc["a", ["knee_trial", "knee_path", "knee_macs"]].tolist() == [1, "runs/a/1", 60]
    higher = pareto.summary(candidates, reference=(0.6, 0.9)).set_index("study")
    assert higher["hypervolume"].tolist() == pytest.approx([0.3 * 0.3, 0.2 * 0.4])
    assert higher["reference_accuracy"].tolist() == [0.6, 0.6]


def test_summary_of_studies_without_a_result() -> None:
    row = pareto.summary(front_of((math.nan, 20))).iloc[0]
    assert (row["candidates"], row["on_front"], row["hypervolume"]) == (1, 0, 0)
    unknown = pareto.summary(front_of((0.9, 20)).assign(dense_macs=math.nan)).iloc[0]
    assert math.isnan(unknown["hypervolume"])


def test_summary_by_method() -> None:
    candidates = table(
        {"accuracy": 0.9}, {"accuracy": 0.8, "method": "uniform"}, {"accuracy": 0.7, "method": "uniform"}
    )
    rows = pareto.summary(candidates, by=("study", "method"))
    assert rows[["study", "method", "candidates"]].to_numpy().tolist() == [["a", "gates", 1], ["a", "uniform", 2]]
    assert rows["hypervolume"].tolist() == pytest.approx([0.45, 0.4])


def test_hypervolume_is_of_the_means_over_seeds() -> None:
    seeds = [
        {"macs": macs, "accuracy": accuracy, "seed": seed}
        for seed, (macs, accuracy) in enumerate([(40, 0.9), (60, 0.7)])
    ]
    row = pareto.summary(table(*seeds, {"macs": 20, "accuracy": 0.6, "target": 0.2})).iloc[0]
    # The mean of the two, 0.8 at half of 100 MACs, and 0.6 at a fifth; the knee and the front are of candidates.
    assert row["hypervolume"] == pytest.approx(0.6 * 0.8 + 0.2 * 0.5)
    assert (row["candidates"], row["on_front"], row["knee_macs"]) == (3, 2, 40)


def test_summary_of_another_cost() -> None:
    candidates = table({"params": 5, "accuracy": 0.8}, {"params": 10, "macs": 10}, {"params": 15, "macs": 90})
    of_params = pareto.summary(candidates, cost="params").iloc[0]
    assert of_params[["on_front", "knee_trial", "knee_params", "dense_params"]].tolist() == [2, 1, 10, 20]
    # Shares of 20 parameters beyond (0, 1): 0.25 x 0.8 and 0.5 x 0.9.
    assert of_params["hypervolume"] == pytest.approx(0.25 * 0.8 + 0.5 * 0.9)
    assert of_params["reference_params_share"] == 1
    timed = candidates.assign(latency_ms=[1.0, 3.0, math.nan], dense_latency_ms=4.0)
    # A candidate without a measurement counts as one, but is on no front.
    of_latency = pareto.summary(timed, cost="latency_ms").iloc[0]
    assert of_latency[["candidates", "on_front"]].tolist() == [3, 2]
    assert of_latency["hypervolume"] == pytest.approx(0.5 * 0.8 + 0.25 * 0.9)
    unknown = pareto.summary(timed.assign(dense_latency_ms=math.nan), cost="latency_ms")
    assert math.isnan(unknown["hypervolume"].iloc[0])


def test_marks_are_of_each_study_and_of_all_together() -> None:
    a = front_of((0.9, 60), (0.5, 20), (0.4, 70), (0.85, 30))
    b = front_of((0.9, 50), (0.4, 10)).assign(study="b")
    both = pd.concat([a, b], ignore_index=True)
    shown = pareto.marked(both)
    assert shown["macs"].tolist() == [10, 20, 30, 50, 60, 70]
    assert shown["on_front"].tolist() == [True, True, True, True, True, False]
    assert shown["on_common_front"].tolist() == [True, True, True, True, False, False]
    # a: 30 MACs lie above the chord from (20, 0.5) to (60, 0.9); b has two, and so the more accurate
    assert shown["knee"].tolist() == [False, False, True, True, False, False]
    assert list(both) == list(front_of((0.9, 60)))


def test_repeats_by_hand() -> None:
    candidates = table(
        {"seed": 0, "accuracy": 0.90, "macs": 40},
        {"seed": 1, "accuracy": 0.92, "macs": 60},
        {"seed": 1, "accuracy": 0.10, "macs": 60},  # the same seed again: the first row counts
        {"seed": 2, "accuracy": math.nan, "macs": 60},  # not finished
        {"seed": 0, "accuracy": 0.80, "target": 0.25},
        {"seed": 0, "accuracy": 0.70, "method": "uniform"},
    )
    rows = pareto.repeats(candidates)
    assert rows[["method", "target", "count"]].to_numpy().tolist() == [
        ["gates", 0.25, 1],
        ["gates", 0.5, 2],
        ["uniform", 0.5, 1],
    ]
    assert rows["accuracy_mean"].tolist() == pytest.approx([0.8, 0.91, 0.7])
    assert rows["accuracy_std"][1] == pytest.approx(0.01 * math.sqrt(2))  # divided by n - 1
    assert rows["macs_std"][1] == pytest.approx(10 * math.sqrt(2))
    assert rows["accuracy_std"].isna().tolist() == [True, False, True]


def test_repeats_agree_in_every_parameter_but_the_seed() -> None:
    candidates = table({"seed": 0}, {"seed": 1}, {"seed": 2}, {"seed": 0}).assign(
        **{"param.penalty": [1.0, 1.0, 1.0, 2.0], "param.training.seed": [0, 1, 2, 0], "param.rate": [math.nan] * 4}
    )
    assert pareto.repeats(candidates)["count"].tolist() == [3, 1]
    assert "param.training.seed" not in pareto.repeats(candidates)


def test_inputs_stay_as_they_were() -> None:
    candidates = front_of((0.9, 60), (0.8, 20), (0.7, 30))
    before = candidates.copy(deep=True)
    pareto.front(candidates), pareto.summary(candidates), pareto.repeats(candidates)
    pd.testing.assert_frame_equal(candidates, before)


# --- other metrics ------------------------------------------------------------------------------------------

RMSE = Quality("rmse", False, ".4f")


def errors(candidates: pd.DataFrame) -> pd.DataFrame:
    """The same candidates, judged by an error of 1 - accuracy."""
    names = {"accuracy": "rmse", "test_accuracy": "test_rmse", "dense_accuracy": "dense_rmse"}
    return candidates.assign(**{name: 1 - candidates[name] for name in names}).rename(columns=names)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=10))
def test_fronts_of_errors_are_what_the_definition_says(points: list[tuple[int, int]]) -> None:
    candidates = errors(front_of(*((value / 8, macs) for value, macs in points)))
    best = pareto.front(candidates, quality=RMSE)
    values = candidates[["rmse", "macs"]].to_numpy()
    expected = [i for i, d in enumerate(dominated_by_any(values, [False, False])) if not d]
    assert sorted(best["trial"]) == expected
    assert best["macs"].is_monotonic_increasing
    assert best["rmse"].is_monotonic_decreasing
    shown = pareto.marked(candidates, quality=RMSE)
    assert sorted(shown["trial"][shown["on_front"]]) == expected
    assert shown["trial"][shown["knee"]].tolist() == [int(best["trial"].iloc[knee(best, RMSE.against("macs"))])]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 99)), min_size=1, max_size=10))
def test_errors_give_the_fronts_of_the_accuracies_that_they_mirror(points: list[tuple[int, int]]) -> None:
    candidates = front_of(*((value / 8, macs) for value, macs in points))
    mirrored = errors(candidates)
    left, right = pareto.summary(candidates), pareto.summary(mirrored, (1.0, 1.0), quality=RMSE)
    assert right["hypervolume"][0] == pytest.approx(left["hypervolume"][0])
    for name in ("candidates", "on_front", "knee_trial", "knee_macs"):
        assert right[name][0] == left[name][0]
    assert (right["reference_rmse"][0], right["knee_rmse"][0]) == (1.0, 1 - left["knee_accuracy"][0])
    columns = ["trial", "on_front", "on_common_front", "knee"]
    assert pareto.marked(mirrored, quality=RMSE)[columns].equals(pareto.marked(candidates)[columns])


def test_an_error_has_no_hypervolume_without_a_reference() -> None:
    row = pareto.summary(errors(front_of((0.5, 20), (0.9, 60))), quality=RMSE).iloc[0]
    assert math.isnan(row["hypervolume"])
    assert math.isnan(row["reference_rmse"])
    assert (row["on_front"], row["knee_rmse"]) == (2, pytest.approx(0.1))
    by_hand = pareto.summary(errors(front_of((0.5, 20), (0.9, 60))), (0.6, 1.0), quality=RMSE).iloc[0]
    assert by_hand["hypervolume"] == pytest.approx((0.6 - 0.5) * 0.8 + (0.5 - 0.1) * 0.4)


def test_means_of_errors_over_seeds() -> None:
    rows = pareto.repeats(errors(table({"accuracy": 0.9}, {"accuracy": 0.7, "seed": 1})), RMSE)
    assert rows["rmse_mean"].tolist() == [pytest.approx(0.2)]
    assert rows["rmse_std"].tolist() == [pytest.approx(math.sqrt(0.02))]


def test_only_accuracies_must_be_shares() -> None:
    pareto.check_table(errors(front_of((-70.0, 20))), RMSE)
    with pytest.raises(ValueError, match=r"needs the columns \['rmse', 'test_rmse', 'dense_rmse'\]"):
        pareto.check_table(front_of((0.5, 20)), RMSE)
