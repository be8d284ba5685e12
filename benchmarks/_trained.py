"""A small network, cut in whatever way, trained as `nas-gate search` trains what a baseline has cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _environment
import pandas as pd
from rich.console import Console
from torch import Tensor, nn

from nas_gate.cost import count_macs
from nas_gate.prepare import Prepared, example_input
from nas_gate.search import Settings
from nas_gate.training import distilled, evaluate, fit, optimiser, place


def example_of(prepared: Prepared) -> Tensor:
    """One example's input, where the networks are."""
    return example_input((prepared.data.in_channels, *prepared.data.image_size)).to(prepared.fabric.device)


def rows_of(table: Path) -> list[dict[str, Any]]:
    """The lines of a CSV; none where there is no file yet."""
    return [dict(row) for row in pd.read_csv(table).to_dict("records")] if table.exists() else []


def write_rows(rows: Sequence[dict[str, Any]], table: Path, overrides: Sequence[str]) -> None:
    """The lines into a CSV, and beside it what they depend on into a JSON file."""
    table.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(table, index=False)
    _environment.write(table.with_suffix(".json"), overrides=overrides)


def trained(
    small: nn.Module, settings: Settings, prepared: Prepared, checkpoint: Path, console: Console
) -> dict[str, Any]:
    """Train the small network over the whole cycle, in place; its figures, accuracies of the last epoch.

    `prepared.dense` is trained. Recipe, batches and distillation are those of a search of the same settings.
    """
    example, task = example_of(prepared), prepared.task
    small = place(small, prepared.fabric, channels_last=settings.hardware.channels_last)
    objective = task.loss(settings.cycle.label_smoothing)
    if settings.distillation.weight > 0:
        objective = distilled(task, objective, prepared.dense, **asdict(settings.distillation))
    landed = evaluate(small, prepared.validation, fabric=prepared.fabric, task=task).accuracy
    history = fit(
        small,
        prepared.train,
        prepared.validation,
        fabric=prepared.fabric,
        optimisers=[optimiser(small.parameters(), settings.cycle)],
        schedule=settings.cycle.schedule_function(),
        objective=objective,
        task=task,
        epochs=range(settings.cycle.epochs),
        seed=settings.seed,
        clip_norm=settings.cycle.clip_norm,
        compile_mode=settings.hardware.compile,
        checkpoint=checkpoint,
        console=console,
        label="fine-tuned",
    )
    macs, dense_macs = count_macs(small, (example,)), count_macs(prepared.dense, (example,))
    test = evaluate(small, prepared.test, fabric=prepared.fabric, task=task).accuracy if settings.test else None
    return {
        "landed_accuracy": landed,
        "training_loss": history[-1].loss,
        "accuracy": history[-1].accuracy,
        "test_accuracy": test,
        "dense_accuracy": evaluate(prepared.dense, prepared.validation, fabric=prepared.fabric, task=task).accuracy,
        "macs": macs,
        "dense_macs": dense_macs,
        "macs_ratio": macs / dense_macs,
        "params": sum(p.numel() for p in small.parameters()),
        "epochs": settings.cycle.epochs,
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
    }
