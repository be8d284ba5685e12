"""The candidates of studies as text for a terminal: the table, the fronts' figures, the means over seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from nas_gate.collect import Collected
from nas_gate.pareto import marked, repeats, summary
from nas_gate.plots import method_order
from nas_gate.quality import Quality
from nas_gate.selection import show

TITLES = {"macs": "MACs", "params": "params", "latency_ms": "latency"}


def described(collected: Collected, cost: str, reference: tuple[float, float] | None = None) -> str:
    """All that `nas-gate pareto` prints; the hypervolume is that beyond `reference` = (quality, share of the cost).

    None stands for the quality's own reference, if it has one.
    """
    quality = collected.quality
    table = marked(collected.table, cost, quality)
    parts = [_candidates(table, cost, quality), _fronts(table, cost, reference or quality.reference, quality)]
    if spread := _repeats(table, cost, quality):
        parts.append(spread)
    if collected.latency is not None:
        parts.append(f"latency: {collected.latency}")
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length in columns, the first `left` of them to the left, the others to the right."""
    sizes = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(text.ljust(size) if i < left else text.rjust(size) for i, (text, size) in enumerate(zip(row, sizes)))
        .rstrip()
        for row in rows
    )  # fmt: skip


def _candidates(table: pd.DataFrame, cost: str, quality: Quality) -> str:
    several = table["study"].nunique() > 1
    varied = [name for name in map(str, table) if name.startswith("param.")]
    titles = {quality.name: quality.label, quality.test: "test", **TITLES}
    figures = [name for name in titles if name in table.columns and not table[name].isna().all()]
    dense_cost = f"dense_{cost}"
    header = ["", "candidate", "method", "target", "seed", *(titles[name] for name in figures)]
    rows = [[*header, f"of dense {TITLES[cost]}", *(name.removeprefix("param.") for name in varied)]]
    for study, group in table.groupby("study", sort=False):
        # those of one kind differ in their seeds: their mean
        own = [name for name in varied if name.startswith(("param.model.", "param.dense."))]
        kinds = group.drop_duplicates(["dense_macs", "dense_params", *own, "seed"])
        for _, networks in kinds.groupby(["dense_macs", "dense_params", *own], sort=False, dropna=False):
            dense = [networks[f"dense_{name}"].mean() if f"dense_{name}" in networks else math.nan for name in figures]
            shown = [
                "" if math.isnan(value) else show(name, float(value), quality) for name, value in zip(figures, dense)
            ]
            first = networks.iloc[0]
            values = ["" if name not in own or pd.isna(first[name]) else str(first[name]) for name in varied]
            rows.append(["dense", str(study) if several else "", "", "", "", *shown, "100.0%", *values])
    for row in table.to_dict("records"):
        share = row[cost] / row[dense_cost]
        rows.append(
            [
                _mark(row, several),
                str(row["path"]).removesuffix("/candidate"),
                *(str(row[name]) for name in ("method", "target", "seed")),
                *(show(name, float(row[name]), quality) if pd.notna(row[name]) else "" for name in figures),
                "" if math.isnan(share) else f"{share:.1%}",
                *("" if pd.isna(row[name]) else str(row[name]) for name in varied),
            ]
        )
    note = "*  on the front of its study"
    if several:
        note += "   **  and of all studies together"
    return aligned(rows, left=3) + f"\n\n{note}   {quality.label}: validation, last epoch; no choice looks at test"


def _mark(row: Mapping[Hashable, Any], several: bool) -> str:
    stars = "*" * (row["on_front"] + (several and row["on_front"] and row["on_common_front"]))
    return f"{stars} knee" if row["knee"] else stars


def _fronts(table: pd.DataFrame, cost: str, reference: tuple[float, float] | None, quality: Quality) -> str:
    rows = [["study", "method", "candidates", "on front", "hypervolume", "knee"]]
    for study, group in table.groupby("study", sort=False):
        for by in (["study"], ["study", "method"])[: 1 + (group["method"].nunique() > 1)]:
            of_methods = summary(group, reference, by, cost, quality).to_dict("records")
            for row in sorted(of_methods, key=lambda row: method_order(str(row.get("method")))):
                known = not math.isnan(row[f"dense_{cost}"])  # of a study without latencies, say, there is nothing
                volume = f"{row['hypervolume']:.4f}" if known and not math.isnan(row["hypervolume"]) else ""
                figures = [f"{row['candidates']}", f"{row['on_front']}", volume]
                names = (quality.name, cost) if known else ()
                at = [show(name, float(row.get(f"knee_{name}", math.nan)), quality) for name in names]
                method = row.get("method", "all" if group["method"].nunique() > 1 else group["method"].iloc[0])
                rows.append([str(study), str(method), *figures, " at ".join(at)])
    name = TITLES[cost]
    if reference is None:
        note = f"hypervolume: none, for {quality.label} has no worst value; give a reference point."
    else:
        note = (
            f"hypervolume: of {quality.label} against the share of the dense {name}, beyond the reference point "
            f"({quality.label} {reference[0]:g}, share {reference[1]:g}).\n"
            "More is better. It compares under one reference and one dense model; seeds count by their means."
        )
    return aligned(rows, left=2) + f"\n\n{note}"


def _repeats(table: pd.DataFrame, cost: str, quality: Quality) -> str:
    """The means over seeds, or nothing where no setting was repeated."""
    spread = repeats(table, quality)
    spread = spread[spread["count"] > 1]
    if len(spread) == 0:
        return ""
    varied = [str(name) for name in spread.columns if str(name).startswith("param.")]
    header = ["study", "method", "target", *(name.removeprefix("param.") for name in varied), "seeds"]
    rows = [[*header, f"{quality.label}, mean ± std", f"{TITLES[cost]}, mean ± std"]]
    for row in spread.to_dict("records"):
        values = f"{quality.show(row[f'{quality.name}_mean'])} ± {quality.show_size(row[f'{quality.name}_std'])}"
        costs = f"{show(cost, row[f'{cost}_mean'])} ± {show(cost, row[f'{cost}_std'])}"
        rows.append(
            [
                *(
                    "" if pd.isna(row[name]) else str(row[name])
                    for name in ("study", "method", "target", *varied, "count")
                ),
                values,
                costs,
            ]
        )
    return "seed repeats:\n" + aligned(rows, left=2)
