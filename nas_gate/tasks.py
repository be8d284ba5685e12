"""Tasks: what is minimised and what is reported, apart from the network and the data.

`training.fit` and `training.evaluate` know nothing of a task but this record. The table `TASKS` names the ones that
are shipped; "package.module:factory" names one of your own, a callable that returns a `Task`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas_gate.import_paths import imported, is_import_path
from nas_gate.quality import Quality

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(outputs (N, ...), inputs (N, ...), targets (N, ...)) -> scalar loss, a mean over the N examples."""

TAKEN = (
    *("loss", "epoch", "seconds", "figures", "macs", "params", "method", "metric", "target", "achieved", "path"),
    *("task_metric", "latency_ms", "study", "trial", "seed", "knee"),
    *("macs_ratio", "params_ratio", "max_relative_error", "train_accuracy", "test_accuracy"),
    *("predicted_latency_ms", "dense_latency_ms", "latency_relative_error", "latency_machine"),
    *("candidates", "hypervolume", "on_front", "on_common_front", "count"),
    *(
        name.format(stage)
        for stage in ("dense", "gated", "landed", "finetuned")
        for name in ("{}_accuracy", "{}_macs", "{}_params", "{}_predicted_latency_ms", "seconds_{}")
    ),
)
"""Names that other figures of an epoch, a candidate, a trial or a table of candidates have."""

VOID = 255
"""The label of pixels that belong to no class: neither loss nor metric sees them (as in Pascal VOC)."""


@dataclass(frozen=True)
class Metric:
    """A figure of a whole data set, from counts that add up over batches and processes.

    Args:
        name: the figure's name in results, e.g. "accuracy"; an identifier that no other figure has, else ValueError.
        count: (outputs (N, ...), targets (N, ...)) -> a tensor of counts, always of one shape.
        value: the sum of all counts, float64 -> the figure.
        higher_is_better: its direction.
        shown: how people are shown the figure, a format specification.
    """

    name: str
    count: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]
    higher_is_better: bool = True
    shown: str = ".2%"

    def __post_init__(self) -> None:
        if self.name in TAKEN:
            raise ValueError(f"A metric's name must be none of {TAKEN}, but is {self.name!r}.")
        _ = self.quality  # checks the rest

    @property
    def quality(self) -> Quality:
        """What candidates are judged by: the figure, without how it is counted."""
        return Quality(self.name, self.higher_is_better, self.shown)


@dataclass(frozen=True)
class Task:
    """What a network learns.

    Args:
        loss: label smoothing in [0, 1) -> what is minimised; a task without classes leaves smoothing aside.
        imitation: (outputs, the teacher's outputs, temperature) -> scalar: the distance that distillation closes.
        metric: what is reported.
    """

    loss: Callable[[float], Objective]
    imitation: Callable[[Tensor, Tensor, float], Tensor]
    metric: Metric


# --- classes, of whole images or of pixels ------------------------------------------------------------------


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Mean cross-entropy with label smoothing: of logits (N, classes, ...) against classes (N, ...), but VOID.

    Where all pixels are VOID it is 0.
    """

    def objective(logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() < 2:  # an image's label 255 is a class as any other
            return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        total = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, ignore_index=VOID, reduction="sum")
        return total / (targets != VOID).sum().clamp(min=1)

    return objective


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of (N, classes, ...) logits softened by T, a mean over examples and pixels.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
    """
    given, wanted = (F.log_softmax(each.float() / temperature, dim=1) for each in (logits, wanted))
    places = given.numel() // given.shape[1]
    return temperature**2 * F.kl_div(given, wanted, reduction="sum", log_target=True) / places


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.dim() > 1:
        raise ValueError(
            f"Targets of a classification must be a class per example, (N,), but have shape {tuple(targets.shape)}; "
            "for a class per pixel take task=segmentation."
        )
    right = (logits.argmax(dim=1) == targets).sum()
    return torch.stack([right, torch.full_like(right, len(targets))])  # filled on the device, which nothing waits for


ACCURACY = Metric("accuracy", _right, lambda counts: float(counts[0] / counts[1]))
"""Top-1 accuracy in [0, 1]."""


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How many pixels of class i were given class j, shape (classes, classes); logits (N, classes, ...)."""
    classes = logits.shape[1]
    pairs = torch.where(targets != VOID, targets * classes + logits.argmax(dim=1), classes**2).flatten()
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=pairs.device)  # the last: pixels of no class
    return counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1].view(classes, classes)


def mean_intersection_over_union(counts: Tensor) -> float:
    """The mean over classes of intersection / union, from `confusion`; classes that occur nowhere are left out.

    Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective" (2015), section 4.
    """
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    return float((both / either)[either > 0].mean())


MEAN_IOU = Metric("mean_iou", confusion, mean_intersection_over_union)


# --- numbers ------------------------------------------------------------------------------------------------


def mean_square(label_smoothing: float = 0.0) -> Objective:
    """Mean squared error; there are no classes to smooth over. ValueError where shapes differ."""

    def objective(outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:  # they would be broadcast
            shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"Outputs and targets must have one shape, but have {shapes}.")
        return F.mse_loss(outputs, targets)

    return objective


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    total = (outputs - targets).double().square().sum()
    return torch.stack([total, torch.full_like(total, targets.numel())])


ERROR = Metric("rmse", _squares, lambda counts: float((counts[0] / counts[1]).sqrt()), False, ".4f")
"""The root of the mean squared error, in the targets' own unit."""


# --- by name ------------------------------------------------------------------------------------------------


CLASSIFICATION = Task(cross_entropy, softened_divergence, ACCURACY)
"""A class per example: logits (N, classes), targets int64 (N)."""

SEGMENTATION = Task(cross_entropy, softened_divergence, MEAN_IOU)
"""A class per pixel: logits (N, classes, H, W), targets int64 (N, H, W), VOID where there is none."""

REGRESSION = Task(mean_square, lambda outputs, wanted, temperature: F.mse_loss(outputs, wanted), ERROR)
"""Numbers: outputs and targets floating, of one shape (N, ...)."""

TASKS = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION, "regression": REGRESSION}


def make_task(name: str, **arguments: Any) -> Task:
    """The task called `name`: one of TASKS, which take no arguments, or "package.module:factory", called with them.

    Such a path imports and runs that code. Raises ValueError for an unknown name, ImportError where a path leads
    nowhere, TypeError for an argument that is not taken and for a factory that returns no `Task`.
    """
    if name in TASKS:
        if arguments:
            raise TypeError(f"task {name!r} takes no arguments, but got {arguments}.")
        return TASKS[name]
    if not is_import_path(name):
        known = ", ".join(TASKS)
        raise ValueError(f'`task` must be one of {known}, or "package.module:factory", but got {name!r}.')
    task = imported(name, "task")(**arguments)
    if not isinstance(task, Task):
        raise TypeError(f"task {name!r}: the factory must return a Task, but returned {type(task)}")
    return task
