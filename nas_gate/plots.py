"""The picture of one or several studies: quality against cost. First the plain record of it, then the drawing.

In the record `accuracy` is the figure that candidates are judged by, in other tasks than classification another one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nas_gate.files import replacing
from nas_gate.pareto import SEEDS, check_table, column, front, knee, repeats, seed_means
from nas_gate.quality import ACCURACY, Quality
from nas_gate.selection import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"macs": "MACs (multiply-accumulates)", "params": "parameters", "latency_ms": "latency, ms"}

WIDE = 20
"""From this ratio of the highest to the lowest cost on, their axis is logarithmic."""

# Colours for studies: Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_MARKERS = {"gates": "o", "uniform": "s", "l1": "^", "bn_scale": "D", "random": "v"}
_OTHER_MARKERS = ("p", "h", "<", ">", "P", "X")
_SIZES = {"v": 46, "^": 46, "D": 32, "s": 36}  # square points, so that the marks look equally large
_GREY = "#4d4d4d"
_DASHES = (0, (3, 2))
_SHORT = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}


# ---------------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Point:
    """One candidate: its cost in the unit of the x column, its quality on validation data."""

    cost: float
    accuracy: float
    trial: int
    path: str
    on_front: bool  # of its own series


@dataclass(frozen=True)
class Repeat:
    """At least two seeds of one setting: means and sample standard deviations."""

    cost: float
    accuracy: float
    cost_std: float
    accuracy_std: float
    count: int


@dataclass(frozen=True)
class Series:
    """The candidates of one study and method, in ascending cost; `staircase` is the outline of what they dominate.

    Where settings were repeated with other seeds their means stand for them there, not their luckiest seeds.
    """

    study: str
    method: str
    points: tuple[Point, ...]
    staircase: tuple[tuple[float, float], ...]
    repeats: tuple[Repeat, ...]


@dataclass(frozen=True)
class Knee:
    """The knee of a study's front over all its methods."""

    study: str
    method: str
    cost: float
    accuracy: float


@dataclass(frozen=True)
class Dense:
    """A dense model and the studies that started from it; its cost is NaN where it was not measured."""

    studies: tuple[str, ...]
    cost: float
    accuracy: float


@dataclass(frozen=True)
class FigureData:
    """All that the picture shows; `left_out` counts candidates without the quality or a figure for the x axis.

    The x axis is `logarithmic` where costs differ so much that most would lie at its left edge otherwise. `view` are
    the limits of the quality, ascending: what matters, see `_view`.
    """

    x: str
    logarithmic: bool
    view: tuple[float, float]
    series: tuple[Series, ...]
    knees: tuple[Knee, ...]
    dense: tuple[Dense, ...]
    left_out: int
    quality: Quality = ACCURACY


def _staircase(best: pd.DataFrame, x: str, quality: Quality) -> tuple[tuple[float, float], ...]:
    """The corners of a front's outline: level at each value up to the next cost, then to the better one."""
    points = list(dict.fromkeys(zip(column(best, x).tolist(), column(best, quality.name).tolist())))
    corners = points[:1]
    for (_, worse), (cost, better) in pairwise(points):
        corners += [(cost, worse), (cost, better)]
    return tuple(corners)


def _series(table: pd.DataFrame, study: str, method: str, x: str, quality: Quality) -> Series:
    ascending = [True, quality.higher_is_better]
    ordered: pd.DataFrame = table.sort_values([x, quality.name], ascending=ascending, kind="stable", ignore_index=True)
    best = front(seed_means(ordered, x, quality), quality.against(x), quality)
    chosen = set(best.index[best[SEEDS] <= 1])
    points = tuple(
        Point(float(cost), float(accuracy), int(trial), str(path), place in chosen)
        for place, (cost, accuracy, trial, path) in enumerate(
            zip(column(ordered, x), column(ordered, quality.name), ordered["trial"], ordered["path"])
        )
    )
    spread, name = repeats(ordered, quality), quality.name
    numbers = [column(spread, each).tolist() for each in (f"{x}_mean", f"{name}_mean", f"{x}_std", f"{name}_std")]
    means = tuple(
        Repeat(cost, accuracy, cost_std, accuracy_std, int(count))
        for cost, accuracy, cost_std, accuracy_std, count in zip(*numbers, spread["count"])
        if count > 1
    )
    return Series(study, method, points, _staircase(best, x, quality), means)


def _dense(tables: Sequence[tuple[str, pd.DataFrame]], x: str, quality: Quality) -> tuple[Dense, ...]:
    """The distinct dense models over all studies, in ascending quality."""
    studies: dict[tuple[float, float], list[str]] = {}
    for study, table in tables:
        costs = column(table, f"dense_{x}") if f"dense_{x}" in table.columns else np.full(len(table), np.nan)
        for cost, accuracy in zip(costs.tolist(), column(table, quality.dense).tolist()):
            if not math.isnan(accuracy):
                key = (math.inf if math.isnan(cost) else cost, accuracy)  # NaN is no key: it equals nothing
                studies.setdefault(key, []).append(study)
    return tuple(
        Dense(tuple(dict.fromkeys(names)), math.nan if math.isinf(cost) else cost, accuracy)
        for (cost, accuracy), names in sorted(studies.items(), key=lambda item: (item[0][1], item[0][0]))
    )


def method_order(method: str) -> tuple[int, str]:
    """A sort key: gates first, then the baselines in the order of `_MARKERS`, then others by name."""
    known = list(_MARKERS)
    return (known.index(method) if method in known else len(known), method)


def figure_data(
    tables: pd.DataFrame | Sequence[pd.DataFrame], x: str = "macs", quality: Quality = ACCURACY
) -> FigureData:
    """The record of the picture of one or several tables of candidates.

    `x` is "macs", "params" or "latency_ms", `quality` what candidates are judged by. Each study and method is a series
    of its own with its own front, so that baselines can be compared; the knee is that of all methods of a study, of
    means as the fronts are. Raises
    ValueError for an unknown `x`, for tables that share a study's name, and where no candidate has both figures.
    """
    if x not in AXES:
        raise ValueError(f"x must be one of {list(AXES)}, but got {x!r}")
    studies: list[tuple[str, pd.DataFrame]] = []
    for table in [tables] if isinstance(tables, pd.DataFrame) else tables:
        check_table(table, quality)
        column(table, x)  # a missing one is named here
        for study, group in table.groupby("study", sort=False):
            if str(study) in dict(studies):
                raise ValueError(f"studies must differ in name to be told apart, but two tables hold {study!r}")
            studies.append((str(study), group))
    series: list[Series] = []
    knees = []
    left_out = 0
    for study, table in studies:
        measured = ~(np.isnan(column(table, x)) | np.isnan(column(table, quality.name)))
        left_out += int((~measured).sum())
        shown: pd.DataFrame = table[measured]
        if len(shown) == 0:
            continue
        methods = sorted({str(method) for method in shown["method"]}, key=method_order)
        of_method = {method: shown[shown["method"].astype(str) == method] for method in methods}
        series += [_series(part, study, method, x, quality) for method, part in of_method.items()]
        objectives = quality.against(x)
        best = front(seed_means(shown, x, quality), objectives, quality)
        row = best.iloc[knee(best, objectives)]
        knees.append(Knee(study, str(row["method"]), float(row[x]), float(row[quality.name])))
    if not series:
        raise ValueError(f"there is nothing to draw: no candidate has both {quality.name} and {x} (of {left_out})")
    dense = _dense(studies, x, quality)
    costs = _costs(series, dense)
    logarithmic = min(costs) > 0 and max(costs) >= WIDE * min(costs)
    view = _view(series, dense, quality)
    return FigureData(x, logarithmic, view, tuple(series), tuple(knees), dense, left_out, quality)


def _costs(series: Sequence[Series], dense: Sequence[Dense]) -> list[float]:
    return [p.cost for s in series for p in s.points] + [d.cost for d in dense if not math.isnan(d.cost)]


def _view(series: Sequence[Series], dense: Sequence[Dense], quality: Quality) -> tuple[float, float]:
    """The limits of the quality that show what matters, ascending.

    One collapsed candidate would press all the rest to one edge, and so would a baseline whose whole front collapses,
    or a supernet, whose dense model has hardly been trained. So the limit on the side of the worse values follows the
    fronts and the means: all of the leading method's; of the others, and of dense models, what lies at most as far
    below those as they reach.
    """
    sign = quality.sign  # all that follows is of values that are better for being higher
    leading = min((each.method for each in series), key=method_order)
    first, others = (
        [sign * value for each in series if (each.method == leading) is of_leading for value in _shown(each)]
        for of_leading in (True, False)
    )
    points = [sign * point.accuracy for each in series for point in each.points]
    known = [sign * each.accuracy for each in dense]
    low, high = min(first), max([*first, *others, *known])
    scale = 1.0 if quality.percent else max(abs(low), abs(high)) or 1.0
    reach = max(high - low, 0.1 * scale)
    low = min([low, *(value for value in (*others, *known) if value >= low - reach)])
    span = max(high - low, 0.01 * scale)
    floor = min(low, max(min(points), low - 0.35 * span)) - 0.07 * span
    lower, upper = sorted((sign * floor, sign * (high + 0.09 * span)))
    if quality.percent and all(0 <= sign * value <= 1 for value in points):
        lower, upper = max(lower, -0.01), min(upper, 1.01)
    return lower, upper


def _shown(series: Series) -> list[float]:
    """The qualities on the front, and the ends of what its means spread over."""
    spread = [repeat.accuracy + side * repeat.accuracy_std for repeat in series.repeats for side in (-1, 1)]
    return [*(point.accuracy for point in series.points if point.on_front), *spread]


# ---------------------------------------------------------------------------------------------------- the drawing


def _scale(axes: Axes, data: FigureData) -> None:
    """The scale of the x axis, and its limits: around all costs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    costs = _costs(data.series, data.dense)
    low, high = min(costs), max(costs)
    if data.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        edge = (high / low) ** 0.05
        axes.set_xlim(low / edge, high * edge)
    else:
        width = high - low or 0.2 * high
        axes.set_xlim(max(low - 0.05 * width, 0), high + 0.05 * width)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda cost, _: f"{cost:g}" if data.x == "latency_ms" else show(data.x, cost))
    )
    axes.set_xlabel(AXES[data.x])


def _markers(data: FigureData) -> dict[str, str]:
    methods = sorted({series.method for series in data.series}, key=method_order)
    others = [method for method in methods if method not in _MARKERS]
    spare = {method: _OTHER_MARKERS[i % len(_OTHER_MARKERS)] for i, method in enumerate(others)}
    return {method: _MARKERS.get(method) or spare[method] for method in methods}


def _colours(data: FigureData) -> dict[tuple[str, str], str]:
    """A colour for every (study, method): studies differ in colour; where there is only one, its methods do."""
    keys = [(series.study, series.method) for series in data.series]
    studies = list(dict.fromkeys(study for study, _ in keys))
    names = studies if len(studies) > 1 else [method for _, method in keys]
    palette = list(COLOURS)
    if len(names) > len(palette):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        palette = [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))]
    of_name = dict(zip(names, palette))
    return {(study, method): of_name[study if len(studies) > 1 else method] for study, method in keys}


def _draw_series(axes: Axes, series: Series, height: float, colour: str, marker: str, leading: bool) -> None:
    """Front and candidates of one series."""
    size = _SIZES.get(marker, 42)
    for strong in (False, True):
        points = [p for p in series.points if p.on_front is strong]
        axes.scatter(
            [p.cost for p in points],
            [height * p.accuracy for p in points],
            s=size if strong else 0.6 * size,
            marker=marker,
            color=colour,
            alpha=1.0 if strong else 0.28,
            edgecolors="white" if strong else "none",
            linewidths=0.7,
            zorder=4 if strong else 2,
        )
    axes.plot(
        [cost for cost, _ in series.staircase],
        [height * accuracy for _, accuracy in series.staircase],
        color=colour,
        linewidth=1.8 if leading else 1.0,
        linestyle="-" if leading else _DASHES,
        alpha=1.0 if leading else 0.7,
        zorder=3,
    )
    if series.repeats:
        axes.errorbar(
            [r.cost for r in series.repeats],
            [height * r.accuracy for r in series.repeats],
            xerr=[r.cost_std for r in series.repeats],
            yerr=[height * r.accuracy_std for r in series.repeats],
            fmt=marker,
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.3,
            color=colour,
            elinewidth=1.3,
            zorder=5,
        )


def _legend(
    figure: Figure, data: FigureData, colours: dict[tuple[str, str], str], markers: dict[str, str], leading: str
) -> None:
    from matplotlib.lines import Line2D

    studies = {study: colour for (study, _), colour in colours.items()}
    groups: dict[str, list[Line2D]] = {"study": [], "method": [], "candidates": []}
    if len(studies) > 1:
        groups["study"] = [Line2D([], [], color=colour, lw=3, label=study) for study, colour in studies.items()]
    for method, marker in markers.items():
        colour = _GREY if len(studies) > 1 else next(c for (_, name), c in colours.items() if name == method)
        style: Any = "-" if method == leading else _DASHES
        width = 1.6 if method == leading else 1.0
        groups["method"].append(
            Line2D([], [], color=colour, marker=marker, ms=6.5, mec="white", ls=style, lw=width, label=method)
        )

    def mark(label: str, **style: Any) -> None:
        handle = Line2D([], [], color=_GREY, marker="o", ls="none", ms=6.5, label=label)
        handle.set(**style)
        groups["candidates"].append(handle)

    mark("on the front (line)", mew=0)
    if not all(point.on_front for series in data.series for point in series.points):
        mark(
            "dominated" if not any(s.repeats for s in data.series) else "dominated, or one seed", alpha=0.3, ms=5, mew=0
        )
    if any(series.repeats for series in data.series):
        mark("mean ± std over seeds", mfc="white", mew=1.3)
    mark("knee of the study" if len(studies) > 1 else "knee", mfc="none", mec="black", ms=11, mew=1.3)
    if data.dense:
        priced = any(not math.isnan(dense.cost) for dense in data.dense)
        mark("dense model", ls="--", lw=1.1, marker="*" if priced else "none", ms=10, mew=0)
    handles = []
    for title, members in groups.items():
        if members:
            handles += [Line2D([], [], ls="none", label=title), *members]
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.2)
    for handle, text in zip(handles, legend.get_texts()):
        if all(handle not in members for members in groups.values()):
            text.set_fontweight("bold")


def _worse(each: Point | Dense, data: FigureData) -> bool:
    """Whether it is out of view."""
    return each.accuracy < data.view[0] if data.quality.higher_is_better else each.accuracy > data.view[1]


def _figure(data: FigureData) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    quality, height = data.quality, 100 if data.quality.percent else 1
    colours, markers = _colours(data), _markers(data)
    leading = next(iter(markers))  # gates where there are any: drawn strongest
    studies = {study: colour for (study, _), colour in colours.items()}
    for dense in data.dense:
        colour = studies.get(dense.studies[0], _GREY) if len(dense.studies) == 1 < len(studies) else _GREY
        axes.axhline(height * dense.accuracy, color=colour, linestyle="--", linewidth=1.0, alpha=0.7, zorder=1)
        if not math.isnan(dense.cost):
            axes.scatter([dense.cost], [height * dense.accuracy], s=130, marker="*", color=colour, lw=0, zorder=5)
    for series in reversed(data.series):  # the leading method is drawn last, on top
        colour = colours[series.study, series.method]
        _draw_series(axes, series, height, colour, markers[series.method], series.method == leading)
    for at in data.knees:
        place = [at.cost], [height * at.accuracy]
        axes.scatter(*place, s=150, marker="o", facecolors="none", edgecolors="black", lw=1.3, zorder=6)
    _scale(axes, data)
    axes.set_ylim(*(height * limit for limit in data.view))
    beyond = sum(_worse(point, data) for series in data.series for point in series.points)
    dense_beyond = sum(_worse(dense, data) for dense in data.dense)
    name = next(iter(studies)) if len(studies) == 1 else f"{len(studies)} studies"
    axes.set_title(f"{name}: validation {quality.label} against {_SHORT[data.x]}")
    axes.set_ylabel(f"validation {quality.label}{', %' if quality.percent else ''}")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    where = f"{'below' if quality.higher_is_better else 'above'} the view"
    notes = [f"candidates {where}: {beyond}"] if beyond else []
    notes += [f"candidates without figures: {data.left_out}"] if data.left_out else []
    notes += [f"dense models {where}: {dense_beyond}"] if dense_beyond else []
    if notes:
        note = ", ".join(notes)
        axes.annotate(note, (0.995, 0.015), xycoords="axes fraction", ha="right", fontsize=8, color=_GREY)
    _legend(figure, data, colours, markers, leading)
    return figure


def check_name(path: Path) -> None:
    """ValueError unless the path's suffix is that of a picture that can be drawn."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture's name must end in .png or .svg, but got {path.name!r}")


def draw(data: FigureData, path: str | Path) -> Path:
    """Draws the record to a PNG or SVG file, by the path's suffix, and returns the path.

    The same record gives the same SVG, byte for byte, under one version of matplotlib. The file is written under a
    temporary name first, so a half-written picture never stands under `path`. Raises ValueError for another suffix,
    ImportError where matplotlib is missing.
    """
    path = Path(path)
    check_name(path)
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; install it with: pip install 'nas-gate[plots]'") from error
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "nas-gate", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        _figure(data).savefig(picture, format=path.suffix[1:], metadata=metadata)
    with replacing(path) as file:
        file.write(picture.getvalue())
    return path
