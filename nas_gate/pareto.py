"""Fronts over a table of candidates: who is dominated, the hypervolume, the knee, the spread over seeds.

The table has one row per candidate: `required` names its columns, and any others (`latency_ms`, `param.<name>`) are
kept. What candidates are judged by is the task's metric, a `Quality`: `accuracy`, the validation accuracy at the last
epoch as a share in [0, 1], unless another is given, and then its columns have its name. `macs` are
multiply-accumulates. A row dominates another if it is at least as good in every objective and better in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from nas_gate.quality import ACCURACY, Quality

Floats = npt.NDArray[np.float64]
Objectives = Sequence[tuple[str, str]]

OBJECTIVES: Objectives = ACCURACY.against("macs")

SEEDS = "seeds"
"""The column of how many seeds a mean is of."""

_KNEE_TIE = 1e-9  # distances this close are equal: points on one straight line differ by rounding alone


# ---------------------------------------------------------------------------------------------------- arrays


def _costs(values: npt.ArrayLike, maximise: Sequence[bool]) -> Floats:
    """The values, shape (n, d), with less being better in every column."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(maximise) or len(maximise) == 0:
        raise ValueError(
            f"values must have shape (n, d) with d = len(maximise) > 0, but have {array.shape}, and {len(maximise)=}"
        )
    return np.where(np.asarray(maximise, dtype=bool), -array, array)


def _distinct(rows: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    """The distinct rows in lexicographic order, and for every given row its place among them."""
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    place = np.empty(len(rows), dtype=np.intp)
    place[order] = np.cumsum(first) - 1
    return ordered[first], place


def _best(rows: Floats) -> npt.NDArray[np.bool_]:
    """Which of distinct rows in lexicographic order no other one dominates (less is better)."""
    if rows.shape[1] == 2:  # the second column must fall below all that came before
        before = np.concatenate([[np.inf], np.minimum.accumulate(rows[:-1, 1])])
        best: npt.NDArray[np.bool_] = rows[:, 1] < before
        best[:1] = True  # nothing comes before the first row, whatever it holds
        return best
    best = np.zeros(len(rows), dtype=bool)
    ranks = np.column_stack([np.unique(column, return_inverse=True)[1] for column in rows.T])
    left = np.argsort(ranks.sum(axis=1), kind="stable")
    ranks = ranks[left]
    while len(left):  # what is left has no better row outside, and the least sum of ranks has none inside
        best[left[0]] = True
        better_somewhere = (ranks < ranks[0]).any(axis=1)
        left, ranks = left[better_somewhere], ranks[better_somewhere]
    return best


def non_dominated(values: npt.ArrayLike, maximise: Sequence[bool]) -> npt.NDArray[np.bool_]:
    """Which rows of `values`, shape (n, d), no other row dominates; shape (n,).

    `maximise` says for each column whether more is better. Equal rows stand or fall together; a row with a NaN is
    never on the front, and dominates nothing. Takes O(n log n) for d = 2, O(n * front) for other d.
    """
    costs = _costs(values, maximise)
    mask = np.zeros(len(costs), dtype=bool)
    usable = ~np.isnan(costs).any(axis=1)
    if usable.any():
        rows, place = _distinct(costs[usable])
        mask[usable] = _best(rows)[place]
    return mask


def _volume(rows: Floats, reference: Floats) -> float:
    """The volume between `reference` and rows that lie strictly below it (less is better)."""
    rows = _distinct(rows)[0]
    rows = rows[_best(rows)]
    if rows.shape[1] == 1:
        return float(reference[0] - rows[0, 0])
    edges = np.append(rows[:, 0], reference[0])
    if rows.shape[1] == 2:
        heights = np.append(reference[1], rows[:-1, 1]) - rows[:, 1]
        return float((reference[0] - rows[:, 0]) @ heights)
    # Between two edges of the first axis, the section is what the rows up to there dominate in the other axes.
    return sum(
        float(width) * _volume(rows[: i + 1, 1:], reference[1:]) for i, width in enumerate(np.diff(edges)) if width > 0
    )


def hypervolume(values: npt.ArrayLike, reference: Sequence[float], maximise: Sequence[bool]) -> float:
    """The volume that the rows of `values`, shape (n, d), dominate within the corner `reference`, shape (d,).

    Exact: a sweep for d = 2, and for more the slicing of one objective after the other (While, Hingston, Barone and
    Huband: "A faster algorithm for calculating hypervolume", IEEE Trans. Evol. Comput. 10(1), 2006), which takes
    O(front^(d-1)). Rows that do not dominate the reference, or hold a NaN, add nothing.
    """
    costs = _costs(values, maximise)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (costs.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"reference must hold {costs.shape[1]} finite numbers, one per objective, but got {reference}")
    corner = np.where(np.asarray(maximise, dtype=bool), -corner, corner)
    inside = costs[(costs < corner).all(axis=1)]
    return _volume(inside, corner) if len(inside) else 0.0


# ---------------------------------------------------------------------------------------------------- tables


def column(table: pd.DataFrame, name: str) -> Floats:
    """A column as float64, shape (rows,), NaN where nothing was measured. Raises ValueError where it has no numbers."""
    if name not in table.columns:
        raise ValueError(f"the table of candidates has no column {name!r}; its columns: {sorted(map(str, table))}")
    try:
        return np.asarray(table[name].to_numpy(dtype=np.float64, na_value=np.nan), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} must hold numbers, but {error}") from None


def required(quality: Quality = ACCURACY) -> tuple[str, ...]:
    """The columns that a table of candidates must have."""
    return (
        *("study", "trial", "path", "method", "seed", "target"),
        *(quality.name, quality.test, "macs", "params"),
        *(quality.dense, "dense_macs", "dense_params"),
    )


def check_table(table: pd.DataFrame, quality: Quality = ACCURACY) -> None:
    """Raises ValueError where the table misses a required column or holds an impossible figure."""
    if missing := [name for name in required(quality) if name not in table.columns]:
        raise ValueError(f"a table of candidates needs the columns {missing}; it has {sorted(map(str, table))}")
    for name in (quality.name, quality.test, quality.dense):
        values = column(table, name)
        if quality.name == ACCURACY.name and len(wrong := values[(values < 0) | (values > 1)]):
            raise ValueError(f"`0 <= {name} <= 1` must hold (a share, not per cent), but got {wrong[0]:g}")
    for name in ("macs", "params", "dense_macs", "dense_params", "latency_ms"):
        if name in table.columns and len(wrong := (values := column(table, name))[values <= 0]):
            raise ValueError(f"`{name} > 0` must hold, but got {wrong[0]:g}")


def _values(table: pd.DataFrame, objectives: Objectives) -> tuple[Floats, list[bool]]:
    """The objectives' columns, shape (rows, objectives), and which of them are maximised."""
    if not objectives or any(direction not in ("max", "min") for _, direction in objectives):
        raise ValueError(f"objectives must be pairs of a column and 'max' or 'min', but got {tuple(objectives)}")
    return np.column_stack([column(table, name) for name, _ in objectives]), [d == "max" for _, d in objectives]


def front(table: pd.DataFrame, objectives: Objectives | None = None, quality: Quality = ACCURACY) -> pd.DataFrame:
    """The candidates that no other one dominates, all columns kept, sorted by the first minimised objective (MACs).

    `objectives` are pairs of a column and "max" or "min" (default: the quality against MACs); the quality itself is
    what is sorted by last. Candidates with equal figures are all kept.
    """
    check_table(table, quality)
    objectives = quality.against("macs") if objectives is None else objectives
    values, maximise = _values(table, objectives)
    chosen: pd.DataFrame = table[non_dominated(values, maximise)]
    # stable: minimised costs first
    names = sorted(objectives, key=lambda objective: objective[1] == "max" or objective[0] == quality.name)
    ascending = [direction == "min" for _, direction in names]
    ordered: pd.DataFrame = chosen.sort_values([name for name, _ in names], ascending=ascending, kind="stable")
    return ordered


def chord_distance(front: pd.DataFrame, objectives: Objectives = OBJECTIVES) -> Floats:
    """How far each candidate of a front lies above the chord between the front's two ends, shape (rows,).

    Both axes are scaled so that the front spans [0, 1] with 1 the best; the chord joins the ends (0, 1) and (1, 0),
    and points towards the ideal (1, 1) are above it. At most sqrt(1/2); negative where the front sags.
    """
    if len(objectives) != 2:
        raise ValueError(f"a chord needs 2 objectives, but got {len(objectives)}: {tuple(objectives)}")
    values, maximise = _values(front, objectives)
    if len(values) == 0 or not non_dominated(values, maximise).all():
        raise ValueError(f"a knee needs a front, but of {len(values)} candidates some are dominated or have no figures")
    goodness = np.where(maximise, values, -values)
    low, span = goodness.min(axis=0), np.ptp(goodness, axis=0)
    if not span.all():  # one point, or copies of it
        return np.zeros(len(values))
    scaled: Floats = (goodness - low) / span
    return np.asarray((scaled.sum(axis=1) - 1) / np.sqrt(2), dtype=np.float64)


def knee(front: pd.DataFrame, objectives: Objectives = OBJECTIVES) -> int:
    """The position (for `iloc`) of a front's knee: the candidate farthest above the chord between the front's ends.

    Das: "On characterizing the 'knee' of the Pareto curve based on Normal-Boundary Intersection", Structural
    Optimization 18, 1999, on axes scaled as in `chord_distance`. Of equally far candidates the one best in the first
    objective counts, then the first row: so a front of two, a straight one and a sagging one have their knee at the
    most accurate end, where nothing is given up without a gain. Raises ValueError for an empty front.
    """
    distance = chord_distance(front, objectives)
    values, maximise = _values(front, objectives)
    first = values[:, 0] if maximise[0] else -values[:, 0]
    return int(np.argmax(np.where(distance >= distance.max() - _KNEE_TIE, first, -np.inf)))


def marked(table: pd.DataFrame, cost: str = "macs", quality: Quality = ACCURACY) -> pd.DataFrame:
    """The table in ascending `cost`, with three columns more: who is on the front of the quality against it.

    `on_front` is of the front of the candidate's study (all methods), `knee` the knee of that front, and
    `on_common_front` of the front of all studies together.
    """
    objectives = quality.against(cost)
    on_front: list[Any] = []
    knees: list[Any] = []
    for _, group in table.groupby("study", sort=False):
        best = front(group, objectives, quality)
        on_front += list(best.index)
        knees += [best.index[knee(best, objectives)]] if len(best) else []
    result: pd.DataFrame = table.assign(
        on_front=table.index.isin(on_front),
        on_common_front=table.index.isin(front(table, objectives, quality).index),
        knee=table.index.isin(knees),
    ).sort_values([cost, quality.name], ascending=[True, quality.higher_is_better], kind="stable", ignore_index=True)
    return result


def summary(
    table: pd.DataFrame,
    reference: tuple[float, float] | None = None,
    by: Sequence[str] = ("study",),
    cost: str = "macs",
    quality: Quality = ACCURACY,
) -> pd.DataFrame:
    """One row per study: candidates, how many are on its front, the front's hypervolume and its knee.

    The front is that of the quality against the column `cost` ("macs", "params" or "latency_ms"). The hypervolume is
    that of the quality against the cost as a share of the dense model's (the largest one's, where a study has
    several; column `dense_<cost>`), beyond `reference` = (quality, share of the cost). The default (0, 1), "no
    accuracy at the dense model's cost", leaves out nothing that saves anything and bounds the hypervolume of an
    accuracy by 1; of a quality that is better for being lower there is no such corner, and no hypervolume (NaN)
    without one given. It is returned as `reference_<quality>` and `reference_<cost>_share`. Hypervolumes compare only
    under one reference and one dense model. Settings that were repeated count in it by the means over their
    seeds. `by=("study", "method")` gives each method of a study its own row.
    """
    check_table(table, quality)
    objectives = quality.against(cost)
    corner = quality.reference if reference is None else reference
    rows: list[dict[str, Any]] = []
    for names, group in table.groupby(list(by), sort=False, dropna=False):
        best = front(group, objectives, quality)
        dense = float(np.nanmax(column(group, f"dense_{cost}"), initial=-np.inf))
        volume = math.nan
        if corner is not None and dense > 0:
            means = seed_means(group, cost, quality)
            shares = np.column_stack([column(means, quality.name), column(means, cost) / dense])
            volume = hypervolume(shares, corner, (quality.higher_is_better, False))
        row = dict(zip(by, names if isinstance(names, tuple) else (names,)))
        row |= {"candidates": len(group), "on_front": len(best)}
        row |= {"hypervolume": volume}
        row |= dict(zip((f"reference_{quality.name}", f"reference_{cost}_share"), corner or (math.nan, math.nan)))
        row |= {f"dense_{cost}": dense if dense > 0 else float("nan")}
        if len(best):
            at_knee = best.iloc[knee(best, objectives)]
            row |= {f"knee_{name}": at_knee[name] for name in ("trial", "path", quality.name, cost)}
        rows.append(row)
    result: pd.DataFrame = pd.DataFrame(rows)
    return result


def repeat_keys(table: pd.DataFrame) -> list[str]:
    """The columns in which repeats agree: study, method, target and every hyper-parameter but the seed."""
    parameters = [c for c in table.columns if str(c).startswith("param.") and str(c).rsplit(".", 1)[-1] != "seed"]
    return ["study", "method", "target", *parameters]


def seed_means(table: pd.DataFrame, cost: str = "macs", quality: Quality = ACCURACY) -> pd.DataFrame:
    """The candidates, but one row of every setting that was repeated: quality and cost are the means over its seeds.

    So that methods are compared by what they give, not by their luckiest seeds. All columns are kept, and the column
    SEEDS says of how many seeds a row is. A seed that stands twice counts once, with its first row.
    """
    keys, figures = repeat_keys(table), [cost, quality.name]
    numbered = table.assign(**{name: column(table, name) for name in figures})
    numbered[SEEDS] = numbered.groupby(keys, dropna=False)["seed"].transform("nunique")
    repeated = numbered[numbered[SEEDS] > 1].drop_duplicates([*keys, "seed"])
    means = repeated.groupby(keys, dropna=False)[figures].transform("mean")
    repeated = repeated.assign(**{name: means[name] for name in figures}).drop_duplicates(keys)
    result: pd.DataFrame = pd.concat([numbered[numbered[SEEDS] <= 1], repeated])
    return result


def repeats(table: pd.DataFrame, quality: Quality = ACCURACY) -> pd.DataFrame:
    """Mean and spread over seeds: one row per study, method, target and hyper-parameters, one column per figure.

    `count` is the number of seeds; `<figure>_mean` and `<figure>_std` (sample standard deviation, NaN for one seed)
    are given for the quality, also on test data, macs, params and, where it is there, latency_ms. A seed that stands
    twice counts once, with its first row; candidates whose quality is not known are left out.
    """
    check_table(table, quality)
    keys = repeat_keys(table)
    finished = table[~np.isnan(column(table, quality.name))].drop_duplicates([*keys, "seed"])
    figures = [c for c in (quality.name, quality.test, "macs", "params", "latency_ms") if c in table.columns]
    numbers = finished.assign(**{name: column(finished, name) for name in figures})
    groups = numbers.groupby(keys, sort=False, dropna=False)
    parts: list[Any] = [groups.size().rename("count")]
    for name in figures:
        parts += [groups[name].mean().rename(f"{name}_mean"), groups[name].std(ddof=1).rename(f"{name}_std")]
    spread: pd.DataFrame = pd.concat(parts, axis=1).reset_index()
    ordered: pd.DataFrame = spread.sort_values(keys[:3], kind="stable", ignore_index=True)
    return ordered
