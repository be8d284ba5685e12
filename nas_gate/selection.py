"""From a table of candidates to the one to deploy, with reasons; by validation data, never by test data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from nas_gate.pareto import Objectives, check_table, chord_distance, column, front, knee
from nas_gate.quality import ACCURACY, COSTS, Quality

Row = Mapping[str, Any]  # one candidate: column -> plain Python value

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}

_WORDS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}


@dataclass(frozen=True)
class Bound:
    """One bound on a figure: at most `limit`, or at least `limit` where `lower`."""

    column: str
    limit: float
    lower: bool = False
    quality: Quality = ACCURACY

    def __str__(self) -> str:
        return f"{_word(self.column)} {'>=' if self.lower else '<='} {show(self.column, self.limit, self.quality)}"

    def met(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which values lie within the bound; one that was not measured (NaN) does not."""
        return np.asarray(values >= self.limit if self.lower else values <= self.limit)

    def violation(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """By which share of the limit the values miss the bound: 0 within it, infinite where not measured."""
        missed = (self.limit - values if self.lower else values - self.limit) / (abs(self.limit) or 1)
        return np.asarray(np.where(np.isnan(values), np.inf, np.maximum(missed, 0)))


@dataclass(frozen=True)
class RunnerUp:
    """Another candidate of the same front, and how it differs from the chosen one."""

    row: Row
    difference: str


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, why it was chosen, and what stood next to it (nearest in preference first)."""

    row: Row
    reasons: tuple[str, ...]
    runners_up: tuple[RunnerUp, ...]
    quality: Quality = ACCURACY


class Infeasible(ValueError):
    """No candidate meets the bounds.

    `excluded` says how many candidates each bound alone excludes; `nearest` is the candidate with the smallest sum of
    relative violations, or None where no candidate has all bounded figures measured.
    """

    def __init__(self, message: str, excluded: Mapping[str, int], nearest: Row | None) -> None:
        super().__init__(message)
        self.excluded = excluded
        self.nearest = nearest


def parse_amount(text: str | float) -> int:
    """A positive whole number from `60M`, `1.5G`, `200k`, `6e7` or plain digits (K, M, G are powers of 1000)."""
    written = str(text).strip().upper()
    suffix = written[-1:] if written[-1:] in SUFFIXES else ""
    wrong = ValueError(
        f"an amount must be a positive whole number, plain (60000000, 6e7) or with a suffix of "
        f"{[s for s in SUFFIXES if s]} (60M, 1.5G), but got {text!r}"
    )
    try:
        number = Decimal(written.removesuffix(suffix))
    except InvalidOperation:
        raise wrong from None
    # The exponent is looked at before the number is written out: 1e999999999 would fill the memory.
    if not number.is_finite() or number <= 0 or number.adjusted() > 18:
        raise wrong
    amount = number * SUFFIXES[suffix]
    if amount != int(amount):
        raise wrong
    return int(amount)


def show(name: str, value: float, quality: Quality = ACCURACY) -> str:
    """A figure as people read it: 93.40%, 60.0 M, 1.25 ms; "not measured" for NaN."""
    if math.isnan(value):
        return "not measured"
    if name in (quality.name, quality.test, quality.dense):
        return quality.show(value)
    if name.endswith("latency_ms"):
        return f"{value:.3g} ms"
    for suffix in ("G", "M", "K"):
        if abs(value) >= SUFFIXES[suffix]:
            return f"{value / SUFFIXES[suffix]:.4g} {suffix}"
    return f"{value:.4g}"


def preferences(quality: Quality = ACCURACY) -> dict[str, str]:
    """What can be preferred -> the column of the cost that spans the front with the quality."""
    return {"knee": "macs", quality.name: "macs", **COSTS}


def _word(name: str) -> str:
    """A figure's name, for people."""
    return _WORDS.get(name) or f"validation {name.replace('_', ' ')}"


def _row(table: pd.DataFrame, position: int) -> dict[str, Any]:
    """One row as plain Python values, NaN where there is none."""
    values = ((str(name), table[name].iloc[position]) for name in table.columns)
    plain = ((name, value.item() if isinstance(value, np.generic) else value) for name, value in values)
    return {name: math.nan if value is None or value is pd.NA else value for name, value in plain}


def _bounds(
    quality: Quality,
    upper: Mapping[str, float | None],
    min_accuracy: float | None,
    limit: float | None,
) -> list[Bound]:
    for name, most in upper.items():
        if most is not None and not (most > 0 and math.isfinite(most)):
            raise ValueError(f"`max_{name} > 0` must hold, and be finite, but got {most}")
    if min_accuracy is not None and quality.name != ACCURACY.name:
        raise ValueError(f"min_accuracy bounds an accuracy, but these candidates are judged by {quality.name}")
    if min_accuracy is not None and limit is not None:
        raise ValueError(f"min_accuracy and limit bound the same, but both are given: {min_accuracy=}, {limit=}")
    wanted = limit if min_accuracy is None else min_accuracy
    bounds = [Bound(name, float(most)) for name, most in upper.items() if most is not None]
    if wanted is None:
        return bounds
    if quality.name == ACCURACY.name and not 0 < wanted <= 1:
        raise ValueError(f"`0 < min_accuracy <= 1` must hold (a share, not per cent), but got {wanted}")
    if not math.isfinite(wanted):
        raise ValueError(f"the limit of {quality.name} must be finite, but is {wanted}")
    return [*bounds, Bound(quality.name, float(wanted), quality.higher_is_better, quality)]


def _plural(count: int, noun: str = "candidate") -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _label(row: Row) -> str:
    return f"{row['path']} (study {row['study']}, trial {row['trial']}, {row['method']})"


def _infeasible(table: pd.DataFrame, bounds: list[Bound], quality: Quality) -> Infeasible:
    lines = [f"none of {_plural(len(table))} meets {' and '.join(map(str, bounds))}:"]
    excluded = {}
    for bound in bounds:
        values = column(table, bound.column)
        excluded[str(bound)] = count = int((~bound.met(values)).sum())
        line = f"  {bound} alone excludes {count} of {len(table)}"
        if unmeasured := int(np.isnan(values).sum()):
            line += f" ({unmeasured} not measured)"
        if unmeasured < len(table):
            extreme = np.nanmax(values) if bound.lower else np.nanmin(values)
            line += f"; the {'highest' if bound.lower else 'lowest'} is {show(bound.column, float(extreme), quality)}"
        lines.append(line)
    if len(bounds) > 1:
        lines.append(f"  together they exclude all {len(table)}")
    violation = np.sum([b.violation(column(table, b.column)) for b in bounds], axis=0)
    if not np.isfinite(violation).any():
        return Infeasible("\n".join([*lines, "  no candidate has all bounded figures measured"]), excluded, None)
    goodness = np.nan_to_num(quality.sign * column(table, quality.name), nan=-np.inf)
    nearest = _row(table, int(np.lexsort([-goodness, violation])[0]))
    lines.append(f"  nearest: {_label(nearest)}: {_figures(nearest, quality)}; it misses")
    for bound in bounds:
        if missed := float(bound.violation(np.array([nearest[bound.column]], dtype=np.float64))[0]):
            lines.append(f"    {bound} by {100 * missed:.3g}%")
    return Infeasible("\n".join(lines), excluded, nearest)


def _figures(row: Row, quality: Quality) -> str:
    names = [name for name in (quality.name, *_WORDS) if name in row]
    return ", ".join(f"{_word(name)} {show(name, float(row[name]), quality)}" for name in names)


def _difference(row: Row, chosen: Row, quality: Quality) -> str:
    """How a candidate's figures differ from the chosen one's, as one line."""
    change = quality.show_change(row[quality.name] - chosen[quality.name])
    parts = [f"{change} {'of ' if quality.percent else ''}{_word(quality.name)}"]
    for name in _WORDS:
        if name in row and not math.isnan(share := row[name] / chosen[name] - 1):
            parts.append(f"{share:+.1%} {_WORDS[name]} ({show(name, row[name])})")
    parts += [f"{name} {row[name]}, not {chosen[name]}" for name in ("study", "method") if row[name] != chosen[name]]
    return ", ".join(parts)


def _order(prefer: str, best: pd.DataFrame, objectives: Objectives, quality: Quality) -> npt.NDArray[np.intp]:
    """The positions of a front's candidates, the preferred one first."""
    goodness = quality.sign * column(best, quality.name)
    if prefer == quality.name:
        return np.argsort(-goodness, kind="stable")
    if prefer in COSTS:
        return np.argsort(column(best, COSTS[prefer]), kind="stable")
    at_knee = knee(best, objectives)
    order = np.lexsort([-goodness, -chord_distance(best, objectives)])
    return np.concatenate([[at_knee], order[order != at_knee]])


def _why(prefer: str, best: pd.DataFrame, objectives: Objectives, position: int, quality: Quality) -> str:
    """The sentence that says why this candidate of the front is preferred."""
    if len(best) == 1:
        return "It is the only candidate on that front."
    cost = objectives[1][0]
    if prefer == quality.name:
        extreme = "highest" if quality.higher_is_better else "lowest"
        return f"It has the {extreme} {_word(prefer)}, {quality.show(best[prefer].iloc[position])}."
    if prefer in COSTS:
        least = "lowest" if cost == "latency_ms" else "fewest"
        return f"It has the {least} {_WORDS[cost]}, {show(cost, best[cost].iloc[position])}."
    distance = float(chord_distance(best, objectives)[position])
    if distance <= 1e-9:
        best_one = "most accurate" if quality.name == ACCURACY.name else f"best in {quality.label}"
        return f"That front has no knee (no candidate lies above the line between its ends): the {best_one} is taken."
    return (
        f"It is the knee of that front: farthest above the line between the front's ends "
        f"({distance:.2f}, where 0 is on the line and 0.71 the ideal corner)."
    )


def select(
    table: pd.DataFrame,
    *,
    max_macs: float | None = None,
    min_accuracy: float | None = None,
    max_params: float | None = None,
    max_latency_ms: float | None = None,
    limit: float | None = None,
    prefer: str = "knee",
    runners_up: int = 3,
    quality: Quality = ACCURACY,
) -> Choice:
    """The candidate to deploy: the preferred one on the front of those that meet all bounds.

    Args:
        table: candidates of one or several studies, as `nas_gate.pareto.check_table` wants them.
        max_macs: most multiply-accumulates.
        min_accuracy: least validation accuracy, a share in (0, 1], where candidates are judged by accuracy.
        max_params: most parameters.
        max_latency_ms: highest latency in milliseconds; needs the column `latency_ms`.
        limit: the worst value of the quality: the least, or the most where less is better.
        prefer: "knee" (of the quality against MACs), the quality's name ("accuracy"), or the lowest "macs", "params"
            or "latency".
        runners_up: how many of the front's next candidates in the order of preference to report.
        quality: what the candidates are judged by, a column of the table.

    The front is that of the quality on validation data against MACs (parameters or latency where these are
    preferred). Test data are looked at nowhere. Raises `Infeasible` where no candidate meets the bounds, ValueError for
    an empty table, an impossible bound, an unknown preference or a missing column.
    """
    check_table(table, quality)
    costs = preferences(quality)
    if prefer not in costs:
        raise ValueError(f"prefer must be one of {list(costs)}, but got {prefer!r}")
    if runners_up < 0:
        raise ValueError(f"`runners_up >= 0` must hold, but got {runners_up=}")
    if len(table) == 0:
        raise ValueError("there is nothing to select from: the table has no candidates")
    upper = {"macs": max_macs, "params": max_params, "latency_ms": max_latency_ms}
    bounds = _bounds(quality, upper, min_accuracy, limit)
    cost = costs[prefer]
    for name in [bound.column for bound in bounds] + [cost]:
        column(table, name)  # a missing one is named here

    met = np.logical_and.reduce([b.met(column(table, b.column)) for b in bounds] + [np.ones(len(table), dtype=bool)])
    if not met.any():
        raise _infeasible(table, bounds, quality)
    feasible: pd.DataFrame = table[met]
    objectives = quality.against(cost)
    best = front(feasible, objectives, quality)
    if len(best) == 0:
        raise ValueError(f"none of {_plural(len(feasible))} has both {quality.name} and {cost} measured")
    order = _order(prefer, best, objectives, quality)
    chosen = _row(best, int(order[0]))
    if bounds:
        share = f"{len(feasible)} of {_plural(len(table))} meet{'s' if len(feasible) == 1 else ''}"
        feasibility = f"{share} {' and '.join(map(str, bounds))}."
    else:
        feasibility = f"No bounds were given: {_plural(len(table))} considered."
    reasons = (
        feasibility,
        f"{len(best)} of these {'is' if len(best) == 1 else 'are'} on the front of {_word(quality.name)} against "
        f"{_WORDS[cost]}: no other one is better in one and at least equal in the other.",
        _why(prefer, best, objectives, int(order[0]), quality),
    )
    others = [_row(best, int(position)) for position in order[1 : 1 + runners_up]]
    runners = tuple(RunnerUp(row, _difference(row, chosen, quality)) for row in others)
    return Choice(chosen, reasons, runners, quality)


def describe(choice: Choice) -> str:
    """The choice as text: the candidate, its figures beside the dense model's, the reasons and the runners-up."""
    row, quality = choice.row, choice.quality
    lines = [_label(row), ""]
    for name in (quality.name, *_WORDS):
        if name not in row:
            continue
        line = f"  {_word(name):<20}{show(name, row[name], quality):>13}"
        if not math.isnan(dense := float(row.get(f"dense_{name}", math.nan))):
            line += f"   dense {show(f'dense_{name}', dense, quality)}"
            if name == quality.name:
                line += f" ({quality.show_change(row[name] - dense)})"
            else:
                line += f" ({row[name] / dense:.1%} of it)"
        lines.append(line)
    if not math.isnan(tested := row[quality.test]):
        lines.append(f"  {f'test {quality.label}':<20}{quality.show(tested):>13}   not used in the choice")
    lines += ["", "Why:", *(f"  - {reason}" for reason in choice.reasons)]
    if choice.runners_up:
        lines += ["", "Runners-up:"]
        for other in choice.runners_up:
            lines += [f"  - {_label(other.row)}", f"    {other.difference}"]
    return "\n".join(lines)
