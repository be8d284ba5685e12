"""One HTML page of studies: the fronts to look at, filters, and every candidate's widths, curves and command.

First the plain record of the page, then the page: the record, the drawing code (`report.html`) and plotly.js in one
file that needs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from nas_gate import models
from nas_gate.candidate import Candidate, CandidateError, next_steps, read
from nas_gate.collect import Collected, run_of
from nas_gate.cost import MEASURED
from nas_gate.export import widths
from nas_gate.pareto import column, marked, summary
from nas_gate.plots import AXES, COLOURS, figure_data, method_order
from nas_gate.quality import Quality
from nas_gate.removal import cut_model

TEMPLATE = Path(__file__).with_suffix(".html")
INSTALL = "pip install 'nas-gate[report]'"

Plain = Mapping[str, Any]
Command = Callable[[Plain], str]
"""The settings of a run -> the command that asks for them; ValueError where there is none."""


def report_data(collected: Collected, command: Command, factory: str | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON holds it.

    `factory` is the import path ("package.module:function") of what makes the dense model of candidates whose model is
    not registered; without it their widths are not known. `misfit` says of a candidate why it does not fit its dense
    model, which leaves its widths unknown, too.
    Raises ValueError where no candidate has figures.
    """
    table, quality = collected.table, collected.quality
    axes = [name for name in AXES if name in table.columns and not np.isnan(column(table, name)).all()]
    dense: dict[str, nn.Module] = {}
    pictures = {name: asdict(figure_data(table, name, quality)) for name in axes}
    found: dict[str, Any] = {
        "version": version("nas-gate"),
        "quality": {**asdict(quality), "label": quality.label, "percent": quality.percent},
        "axes": {name: AXES[name] for name in axes},
        "colours": COLOURS,
        "latency": collected.latency,
        "varied": [name for name in map(str, table) if name.startswith("param.")],
        "pictures": pictures,
        "summary": _compared(table, quality),
        "candidates": [
            {
                **_figures(row, quality),
                **_details(row, command, factory, dense, collected),
            }
            for row in _records(marked(table, quality=quality))
        ],
        "skipped": [{"path": str(each.path), "reason": each.reason} for each in collected.skipped],
        "unfinished": len(collected.unfinished),
    }
    cleaned: dict[str, Any] = _json_ready(found)
    return cleaned


def page(data: Plain) -> str:
    """The HTML page of a record; raises ImportError where plotly is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"the report needs plotly; install it with: {INSTALL}") from error
    record = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    library = get_plotlyjs().replace("</script", "<\\/script")
    return TEMPLATE.read_text(encoding="utf-8").replace("@@PLOTLY@@", library).replace("@@DATA@@", record)


# --- the record ---------------------------------------------------------------------------------------------


def _compared(table: pd.DataFrame, quality: Quality) -> list[dict[str, Any]]:
    """One row per study and method: size, front, hypervolume, knee."""
    rows = summary(table, by=("study", "method"), quality=quality)
    extreme = "max" if quality.higher_is_better else "min"
    best = [table[_same(table, row)][quality.name].agg(extreme) for _, row in rows.iterrows()]
    rows = rows.assign(**{f"best_{quality.name}": best})
    return sorted(_records(rows), key=lambda row: (str(row["study"]), method_order(row["method"])))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _same(table: pd.DataFrame, row: Any) -> Any:
    return (table["study"] == row["study"]) & (table["method"] == row["method"])


def _figures(row: Plain, quality: Quality) -> dict[str, Any]:
    names = ("study", "trial", "path", "method", "seed", "target", "on_front", "knee", "max_relative_error")
    figures = (quality.name, quality.test, "macs", "params", "latency_ms")
    kept = [*names, *figures, *(f"dense_{name}" for name in figures)]
    varied = {name: value for name, value in row.items() if str(name).startswith("param.")}
    return {**{name: row.get(name) for name in kept}, **varied}


def _details(
    row: Plain, command: Command, factory: str | None, dense: dict[str, nn.Module], collected: Collected
) -> dict[str, Any]:
    folder = Path(row["path"])
    record = read(folder)
    settings, history = run_of(folder)
    try:
        again: str | None = command(settings)
    except ValueError:  # settings of another version
        again = None
    try:
        found, misfit = _widths(folder, record, factory, dense), None
    except CandidateError as error:
        found, misfit = None, str(error)
    dense_cost = row.get("dense_predicted_latency_ms") if settings.get("metric") in MEASURED else 1.0
    curves = _curves(history, collected.quality, dense_cost)
    export = next_steps(str(folder), record.model, collected.pad_to)[1]
    return {"widths": found, "misfit": misfit, "curves": curves, "command": again, "export": export}


def _widths(
    folder: Path, record: Candidate, factory: str | None, dense: dict[str, nn.Module]
) -> list[list[Any]] | None:
    """[layer, kept outputs, dense outputs] of every layer; None where the dense model is not known."""
    key = json.dumps(record.model, sort_keys=True)
    if key not in dense:
        name = record.model["name"] if record.model["name"] in models.names() else factory
        if name is None:
            return None
        dense[key] = models.build(name, **models.without_weights(name, record.model.get("arguments", {})))
    try:
        small = cut_model(dense[key], record.cut)
    except ValueError as error:
        raise CandidateError(f"{folder} does not fit its dense model: {error}") from error
    return [[each.layer, each.kept, each.dense] for each in widths(small, dense[key], record.cut)]


def _curves(history: Plain, quality: Quality, dense_cost: float | None) -> dict[str, dict[str, list[Any]]]:
    """Stage -> lists of equal length: epoch (from 1), the quality, and the gates' share of the dense cost, if known.

    `dense_cost` is that in the units of the history.
    """

    def share(cost: float | None) -> float | None:
        return None if cost is None or not dense_cost else cost / dense_cost

    return {
        str(stage): {
            "epoch": [epoch["epoch"] + 1 for epoch in epochs],
            quality.name: [epoch[quality.name] for epoch in epochs],
            "cost": [share(epoch.get("figures", {}).get("cost")) for epoch in epochs],
        }
        for stage, epochs in history.items()
    }


def _json_ready(value: Any) -> Any:
    """Plain Python values; what is not a finite number becomes None, figures keep six digits."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(each) for each in value]
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float):
        return float(f"{plain:.6g}") if math.isfinite(plain) else None
    return plain if isinstance(plain, (int, str, bool)) else None
