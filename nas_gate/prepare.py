"""What a trial works with, loaded, built and checked before any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nas_gate import baselines, models
from nas_gate import data as datasets
from nas_gate.analysis import attach
from nas_gate.budgets import Budget, make_budget
from nas_gate.errors import Refused
from nas_gate.gates import make_gate
from nas_gate.gating import GatedModel
from nas_gate.landing import choose, reachable
from nas_gate.settings import Plain, Settings
from nas_gate.tasks import Task, make_task
from nas_gate.training import Loader, connect, output_of, place, seed_everything


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


def prepare(settings: Settings) -> Prepared:
    """Load, build and check everything, so that whatever can be refused is refused before any training."""
    with refusing():
        fabric = connect(settings.hardware)
        task = task_of(settings)
        data = load_data(settings)
        dense, model_arguments = seeded_model(settings, data.in_channels, data.num_classes)
        gate = make_gate(settings.gate.name, **settings.gate.arguments)
        budget = make_budget(settings.budget.name, settings.metric, **settings.budget.arguments)
        gated = attach(dense.eval(), example_input((data.in_channels, *data.image_size)), gate=gate)
        lowest = reachable(gated.structure, settings.metric, settings.round_to)[0]
        decide(settings, gated, settings.legs()[-1].target)  # refuses what is out of reach
        try_task(task, dense, data)
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
    return choose(gated.structure, scores, target, settings.metric, settings.round_to)


def task_of(settings: Settings) -> Task:
    """The settings' task; Refused where it cannot be made."""
    with refusing():
        return make_task(settings.task.name, **settings.task.arguments)


def try_task(task: Task, model: nn.Module, data: datasets.Data) -> None:
    """Take loss and metric of two examples: ValueError where model, data and task do not fit together."""
    inputs, targets = (each[:2] for each in next(iter(data.validation)))
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
