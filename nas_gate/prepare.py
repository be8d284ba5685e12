"""What a trial works with, loaded, built and checked before any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from nas_gate import baselines, models
from nas_gate import data as datasets
from nas_gate.analysis import attach
from nas_gate.budgets import Budget, make_budget
from nas_gate.described import Plain
from nas_gate.errors import Refused
from nas_gate.folders import digest, file_name, held
from nas_gate.gates import make_gate
from nas_gate.gating import GatedModel
from nas_gate.landing import choose, reachable
from nas_gate.latency import batch
from nas_gate.measuring import identify, measure_latency
from nas_gate.modules import choices_of
from nas_gate.settings import Settings
from nas_gate.tasks import Task, make_task
from nas_gate.training import Hardware, Loader, compiled, connect, output_of, place, seed_everything


@dataclass(frozen=True)
class Prepared:
    """What a trial works with; `dense` and `gated.model` are two copies of the same untrained network."""

    fabric: Fabric
    task: Task
    data: datasets.Data
    train: Loader
    validation: Loader
    test: Loader
    model_arguments: Plain
    dense: nn.Module
    gated: GatedModel
    budget: Budget
    lowest: float
    """What can be reached of the target's metric, as targets count it."""


def prepare(settings: Settings, cache_dir: Path | None = None, console: Console | None = None) -> Prepared:
    """Load, build and check everything, so that whatever can be refused is refused before any training.

    Where latency is a target or a limit, it is measured; the table is kept in `cache_dir`, where one is given.
    """
    with refusing():
        fabric = connect(settings.hardware)
        if settings.hardware.compile is not None:
            try_compiling(settings.hardware.compile, fabric)
        task = task_of(settings)
        data = load_data(settings)
        dense, model_arguments = seeded_model(settings, data.in_channels, data.num_classes)
        if settings.weights is not None:
            models.load_weights(dense, settings.weights)
        gate = make_gate(settings.gate.name, **settings.gate.arguments)
        budget = make_budget(settings.budget.name, settings.metric, **settings.budget.arguments)
        example = example_input((data.in_channels, *data.image_size))
        gated = attach(dense.eval(), example, gate=gate, depth=settings.depth, round_to=settings.round_to)
        if settings.timed():
            time_operations(settings, gated, timed_input(settings, data), fabric, cache_dir, console)
        lowest = reachable(gated.structure, settings.metric, settings.round_to, latency=gated.cost.table)[0]
        decide(settings, gated, settings.legs()[-1].target)  # refuses what is out of reach
        try_task(task, dense, data)
        check_strategy(settings.hardware, dense, fabric)
        train, validation, test = (
            loader.to(fabric.device).shard(fabric.global_rank, fabric.world_size)
            for loader in (data.train, data.validation, data.test)
        )
    return Prepared(
        fabric=fabric,
        task=task,
        data=data,
        train=train,
        validation=validation,
        test=test,
        model_arguments=model_arguments,
        dense=place(dense, fabric, channels_last=settings.hardware.channels_last),
        gated=gated,
        budget=budget,
        lowest=lowest,
    )


def decide(settings: Settings, gated: GatedModel, target: float) -> Tensor:
    """The boolean keep, shape (units,), that the settings' method lands on for a target."""
    if settings.method == "gates":
        scores: Tensor = gated.gates.weight
    else:
        scores = baselines.score(settings.method, gated.structure, gated.model, settings.seed)
    limits, latency = settings.limits, gated.cost.table
    return choose(gated.structure, scores, target, settings.metric, settings.round_to, limits=limits, latency=latency)


def time_operations(
    settings: Settings,
    gated: GatedModel,
    inputs: Tensor,
    fabric: Fabric,
    cache_dir: Path | None,
    console: Console | None,
) -> None:
    """Give `gated` its latency table: measured now, or taken from the cache, where every machine has its own."""
    threads = settings.latency.threads
    if cache_dir is None:
        gated.add_latency(measure_latency(gated, None, (inputs,), threads))
        return

    def tell(what: str, done: int, total: int) -> None:
        if console is not None and done in (0, total // 2, total):
            console.print(f"latency: {what}: {done} of {total}", soft_wrap=True, highlight=False)

    identity = digest(identify(gated, (inputs,), threads), 16)
    folder = cache_dir / f"latency-{file_name(settings.model.name)}-{identity}"
    with held(folder, fabric, wait=True, console=console):
        if fabric.is_global_zero:
            measure_latency(gated, folder / "table.json", (inputs,), threads, tell)
        fabric.barrier()
        gated.add_latency(measure_latency(gated, folder / "table.json", (inputs,), threads, tell))


def timed_input(settings: Settings, data: datasets.Data) -> Tensor:
    """The batch whose latency is meant."""
    return batch((data.in_channels, *data.image_size), settings.latency.batch)


def task_of(settings: Settings) -> Task:
    """The settings' task; Refused where it cannot be made."""
    with refusing():
        return make_task(settings.task.name, **settings.task.arguments)


def check_strategy(hardware: Hardware, model: nn.Module, fabric: Fabric) -> None:
    """ValueError where processes would wait in vain for gradients: of a Choice's candidates one is trained a step."""
    if fabric.world_size > 1 and "find_unused" not in hardware.strategy and (chosen := choices_of(model)):
        raise ValueError(
            f"`hardware.strategy` must be ddp_find_unused_parameters_true where the model has a Choice, as "
            f"{chosen[0]!r}, but got {hardware.strategy!r}"
        )


def try_task(task: Task, model: nn.Module, data: datasets.Data) -> None:
    """Take loss and metric of two examples: ValueError where model, data and task do not fit together.

    Where targets are classes, two more have the highest one: a model of fewer classes would fail at any later batch.
    """
    inputs, targets = (each[:2] for each in next(iter(data.validation)))
    if data.num_classes is not None:
        highest = torch.full_like(targets, data.num_classes - 1)
        inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets, highest])
    with torch.no_grad():
        outputs = output_of(model(inputs))
    try:
        task.loss(0.0)(outputs, inputs, targets)
        task.metric.count(outputs, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"The task must fit the model's outputs {tuple(outputs.shape)} and the targets {tuple(targets.shape)} "
            f"of {data.name}, but: {error}"
        ) from error


def try_compiling(mode: str, fabric: Fabric) -> None:
    """Compile something small: ValueError where this machine lacks what `torch.compile` needs."""
    try:
        compiled(nn.ReLU(), mode, fabric)(torch.ones(64, device=fabric.device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # advice for torch's developers follows
        raise ValueError(
            f"`hardware.compile` must be null where torch.compile fails, as it does here: {reason}"
        ) from error


def load_data(settings: Settings) -> datasets.Data:
    """The data set, split by the settings' seed; raises as `nas_gate.data.load` does."""
    return datasets.load(settings.data.name, seed=settings.seed, **settings.data.arguments)


def seeded_model(
    settings: Settings, in_channels: int, num_classes: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained model and the arguments that built it: the settings' own, and what the data give."""
    arguments = dict(settings.model.arguments)
    for key, value in (("in_channels", in_channels), ("num_classes", num_classes)):
        if value is not None and models.accepts(settings.model.name, key):
            arguments.setdefault(key, value)
    seed_everything(settings.seed)
    return models.build(settings.model.name, **arguments), arguments


def example_input(shape: tuple[int, ...]) -> Tensor:
    """One random input of `shape`, with a batch dimension: so costs are those of one example."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the errors of loading, building and checking into Refused."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise Refused(str(error)) from error
