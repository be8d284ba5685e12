"""What a trial gives back: the figures of its candidates, and what a person is shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nas_gate import models
from nas_gate.cost import MEASURED
from nas_gate.described import Plain
from nas_gate.latency import measured_on
from nas_gate.pareto import hypervolume
from nas_gate.prepare import Prepared, task_of
from nas_gate.quality import RECORD, Quality
from nas_gate.removal import Removed
from nas_gate.settings import Leg, Settings
from nas_gate.training import Epoch

STAGES = {"dense": "dense", "gated": "gated", "landed": "landed", "finetuned": "fine-tuned"}
"""Stages in order, and what they are called in print; baselines have no gated one."""


@dataclass(frozen=True)
class Stage:
    """A network at one point of the trial: the task's metric on the validation split, MACs, parameters, predicted
    latency.
    """

    name: str
    accuracy: float
    macs: float
    params: float
    latency_ms: float | None = None


def figures(
    settings: Settings,
    leg: Leg,
    quality: Quality,
    stages: Sequence[Stage],
    histories: Mapping[str, Sequence[Epoch]],
    removed: Removed,
    test_accuracy: float | None,
    latencies: tuple[float, float] | None,
    path: Path,
) -> dict[str, Any]:
    """The results of one candidate: see `search.search`; `latencies` are measured ones, dense and its own."""
    dense, last = stages[0], stages[-1]
    ratios = {"macs": last.macs / dense.macs, "params": last.params / dense.params}
    achieved = {**ratios, "latency_ms": last.latency_ms}
    result: dict[str, Any] = {
        "method": settings.method,
        "accuracy": last.accuracy,
        "macs": removed.macs,
        "params": removed.params,
        "macs_ratio": ratios["macs"],
        "params_ratio": ratios["params"],
        "metric": settings.metric,
        "target": leg.target,
        "achieved": achieved[settings.metric],
        "max_relative_error": removed.max_relative_error,
        "test_accuracy": test_accuracy,
        RECORD: asdict(quality),
    }
    for stage in stages:
        for name in ("accuracy", "macs", "params"):
            result[f"{stage.name}_{name}"] = getattr(stage, name)
        if stage.latency_ms is not None:
            result[f"{stage.name}_predicted_latency_ms"] = stage.latency_ms
    if latencies is not None and last.latency_ms is not None:
        result["dense_latency_ms"], result["latency_ms"] = latencies
        result["predicted_latency_ms"] = last.latency_ms
        result["latency_relative_error"] = last.latency_ms / latencies[1] - 1
        result["latency_machine"] = measured_on()
    for name, history in histories.items():
        result[f"seconds_{name}"] = sum(epoch.seconds for epoch in history)
    return {**result, "path": str(path)}


def named(figures: Plain, metric: str) -> dict[str, Any]:
    """The figures of an epoch or a candidate, with the metric's name for `accuracy` in their keys."""
    return {key.replace("accuracy", metric): value for key, value in figures.items()}


def combined(results: Mapping[str, Plain], quality: Quality) -> dict[str, Any]:
    """The results of a trial with several targets: those of the last candidate, and what they make together.

    `candidates` are the names of `results`, in order of targets; `hypervolume` is that of their points (accuracy,
    share of the dense MACs), beyond no accuracy at the dense cost: at most 1. An error, where less is better, has no
    such reference point, and no hypervolume is given.
    """
    together = {**list(results.values())[-1], "candidates": list(results)}
    if not quality.higher_is_better:
        return together
    points = [(result[quality.name], result["macs_ratio"]) for result in results.values()]
    return {**together, "hypervolume": hypervolume(points, reference=(0.0, 1.0), maximise=(True, False))}


def announce(settings: Settings, prepared: Prepared, console: Console) -> None:
    """Say what is about to be done."""
    cost, structure = prepared.gated.cost, prepared.gated.structure
    wanted = f"target{'s'[: len(settings.wanted) - 1]} {shares(settings.wanted)} {of(settings.metric)}"
    limits = "".join(f", at most {limit} {of(metric)}" for metric, limit in settings.limits.items())
    _print(
        console,
        f"{settings.model.name} on {settings.data.name}: {millions(cost.total('macs'))} MACs, "
        f"{millions(cost.total('params'))} parameters, {structure.units} units in {len(structure.groups)} "
        f"groups; {wanted} (reachable: from {prepared.lowest:.3f}){limits} by {settings.method}, "
        f"on {prepared.fabric.device}",
    )


def announce_leg(settings: Settings, leg: Leg, console: Console) -> None:
    """Say which epochs of the cycle lead to the next of several targets."""
    legs = settings.legs()
    gated = f"gated epochs {leg.begin + 1} to {leg.end}, " if leg.end > leg.begin else ""
    last = settings.cycle.epochs
    tuned = f"fine-tuning over epochs {leg.end + 1} to {last} of the cycle" if last > leg.end else "no fine-tuning"
    _print(
        console,
        f"target {leg.target} ({legs.index(leg) + 1} of {len(legs)}): {gated}{tuned}; {settings.epochs()} epochs for "
        "all targets",
    )


def tell(result: Plain, quality: Quality, console: Console) -> None:
    """One line about a finished candidate."""
    _print(
        console,
        f"target {result['target']}: {quality.label} {quality.show(result[quality.name])}, "
        f"{millions(result['macs'])} MACs, "
        f"{millions(result['params'])} parameters, {result['achieved']:.4f} {of(result['metric'])}",
    )


def report(settings: Settings, result: Plain, candidates: Sequence[Plain], console: Console) -> None:
    """The closing table, where the candidates lie, and how to load one.

    A row per stage of the trial's only candidate, or one per candidate where `targets` asked for several.
    """
    quality = task_of(settings).metric.quality
    timed = [MEASURED[0]] if "dense_predicted_latency_ms" in result else []
    columns = [quality.label, "MACs", "params", *("predicted ms" for _ in timed), f"share of {result['metric']}"]
    table = Table("", *columns, title="validation")
    if settings.targets is None:
        rows = [(label, result, stage) for stage, label in STAGES.items() if f"{stage}_macs" in result]
    else:
        rows = [("dense", result, "dense"), *((f"target {c['target']}", c, "finetuned") for c in candidates)]
    for label, each, stage in rows:
        priced = f"predicted_{each['metric']}" if each["metric"] in MEASURED else each["metric"]
        share = each[f"{stage}_{priced}"] / each[f"dense_{priced}"]
        counts = [millions(each[f"{stage}_macs"]), millions(each[f"{stage}_params"])]
        counts += [f"{each[f'{stage}_predicted_{name}']:.3f}" for name in timed]
        table.add_row(label, quality.show(each[f"{stage}_{quality.name}"]), *counts, f"{share:.4f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    if settings.targets is None:
        _print(console, f"achieved {result['achieved']:.4f} {of(result['metric'])}, asked {result['target']}")
    elif quality.higher_is_better:
        _print(console, f"hypervolume beyond ({quality.label} 0, dense MACs): {result['hypervolume']:.4f}")
    for candidate in (c for c in candidates if "latency_ms" in c):
        _print(
            console,
            f"latency: {candidate['predicted_latency_ms']:.3f} ms predicted, {candidate['latency_ms']:.3f} ms measured "
            f"(error {candidate['latency_relative_error']:+.1%}; dense {candidate['dense_latency_ms']:.3f} ms; "
            f"batch {settings.latency.batch}, threads {settings.latency.threads}, on {candidate['latency_machine']})",
        )
    if result[quality.test] is not None:
        tested = ", ".join(quality.show(c[quality.test]) for c in candidates)
        _print(console, f"test {quality.label}, measured once: {tested}")
    _print(console, f"largest relative error of the removal: {max(c['max_relative_error'] for c in candidates):.1e}")
    for candidate in candidates:
        _print(console, f"candidate: {candidate['path']}")
    # a file is never trusted to name what to import
    factory = "" if settings.model.name in models.names() else ", factory=<what makes the dense model>"
    _print(console, f"load it:   import nas_gate; model = nas_gate.load({str(result['path'])!r}{factory})")


def of(metric: str) -> str:
    """What a target of a metric counts, for people."""
    return "ms of latency" if metric in MEASURED else f"of the dense {metric}"


def millions(count: float) -> str:
    """A count in millions, for people."""
    return f"{count / 1e6:.3f} M"


def shares(targets: Sequence[float]) -> str:
    """Several targets, for people."""
    return ", ".join(map(str, targets))


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
