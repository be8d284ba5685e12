"""Training on Lightning Fabric: one `fit`, one `evaluate`, and the small pieces that they are given.

`fit` owns the loop and nothing else: what is minimised is an objective, what adapts while training is a
controller, how the learning rate moves is a schedule, what the machine is like is in the Fabric. After every
epoch the whole state goes to one checkpoint file, and each epoch draws its random numbers from (seed, epoch,
rank) alone, so that a run killed at any moment continues to bit-for-bit the same result on a CPU.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from nas_gate.errors import Diverged, Refused
from nas_gate.files import replacing
from nas_gate.quality import Quality
from nas_gate.tasks import CLASSIFICATION, Objective, Task

Schedule = Callable[[float], float]
"""Epochs done, fractions included -> factor on every optimiser's own learning rate."""

PRECISIONS = ("32-true", "bf16-mixed")
"""Of computing; weights are float32 in both. Mixed float16 would need one scale for two optimisers' gradients, whose
update Lightning Fabric leaves to each of them."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of `torch.compile`."""

STEPS_BETWEEN_CHECKS = 50  # reading the loss waits for the device: not at every step


class Loader(Protocol):
    """Batches of (inputs, targets); `set_epoch` chooses the order and the augmentation of the next pass."""

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass a function of `epoch` alone."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Controller(Protocol):
    """What adapts while a network trains: the target's descent, a gate's temperature, a multiplier."""

    def before_step(self, epoch: float) -> None:
        """Called before every step with the epochs done, fractions included."""

    def loss(self) -> Tensor:
        """Scalar to add to the objective."""

    def after_step(self) -> None:
        """Called after every optimiser step."""

    def figures(self) -> dict[str, float]:
        """What to record in the history after an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: it is stored in the checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""


@dataclass(frozen=True)
class Evaluation:
    """The task's metric (in classification top-1 accuracy in [0, 1]) and mean loss over `examples` examples."""

    accuracy: float
    loss: float
    examples: int


@dataclass(frozen=True)
class Epoch:
    """One line of a history; `seconds` is wall time, `figures` come from the controller.

    `train_accuracy` and `accuracy` (validation) are the task's metric.
    """

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


# --- the machine --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """Where and how to compute; the first four fields are Lightning Fabric's own arguments.

    `accelerator` "auto" is a GPU by CUDA where there is one, else the processor. `compile` is a mode of
    `torch.compile`, one of COMPILE_MODES, in which networks are trained; None trains them as they are. ValueError for
    any other mode or precision, for strategies that split a network, and for Apple's MPS, which lacks float64.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str = "32-true"
    channels_last: bool = True
    compile: str | None = None

    def __post_init__(self) -> None:
        require(self.accelerator != "mps", "`accelerator` must have float64, in which costs are exact", "mps")
        whole = self.strategy == "auto" or self.strategy.startswith("ddp")
        require(whole, "`strategy` must be auto or one of ddp's: gates need the whole network", self.strategy)
        require(self.precision in PRECISIONS, f"`precision` must be one of {PRECISIONS}", self.precision)
        known = self.compile is None or self.compile in COMPILE_MODES
        require(known, f"`compile` must be null or one of {COMPILE_MODES}", self.compile)


def connect(hardware: Hardware) -> Fabric:
    """The launched Fabric of `hardware`; ValueError for what Fabric refuses: more devices than there are, for one."""
    accelerator = hardware.accelerator
    if accelerator == "auto":  # Fabric's own choice would be MPS on a Mac
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=hardware.devices,
            strategy=hardware.strategy,
            precision=hardware.precision,  # type: ignore[arg-type]  # checked by Fabric, with the list
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise ValueError(str(error)) from error
    fabric.launch()
    if not fabric.is_global_zero:
        _end_with_parent()
    return fabric


def _end_with_parent() -> None:
    """End this process soon after the one that started it: at the next barrier it would wait for it, with its GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def place(module: nn.Module, fabric: Fabric, *, channels_last: bool = False) -> nn.Module:
    """Move `module` in place to Fabric's device, its 4-d weights to channels_last if asked; returns it.

    On a CPU a network with a thin strided 1x1 convolution stays in the default format (see `_miscomputed`).
    """
    module.to(fabric.device)
    if channels_last:  # convolutions follow their weight's format, so that inputs need no conversion
        unsafe = fabric.device.type == "cpu" and any(map(_miscomputed, module.modules()))
        layout = torch.contiguous_format if unsafe else torch.channels_last
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim() == 4:
                # not `contiguous`, which leaves 1x1 weights' strides, and DDP would copy their gradients at every step
                tensor.data = tensor.data.clone(memory_format=layout)
    return module


def _miscomputed(module: nn.Module) -> bool:
    """Whether oneDNN's gradient of this convolution is wrong, or crashes, in channels_last.

    So it is for 1x1 convolutions of stride above 1 with fewer input channels than a vector has places (8 with AVX2,
    16 with AVX-512): https://github.com/uxlfoundation/oneDNN/issues/6035. Removal makes such layers.
    """
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
    )


def compiled(module: nn.Module, mode: str | None, fabric: Fabric) -> nn.Module:
    """`module` as `torch.compile` makes it in `mode`, with the same weights; itself where the mode is None."""
    if mode is None:
        return module
    # Networks of one class share a cache of eight, and a study has many: beyond them torch would no longer compile.
    torch.compiler.reset()
    options = dict(torch._inductor.list_mode_options(mode))
    if fabric.device.type == "cpu" and any(map(_miscomputed, module.modules())):
        options["layout_optimization"] = False  # which would put the channels last
    return torch.compile(module, options=options)  # type: ignore[return-value]  # a module of a module


def seed_everything(seed: int, *more: int) -> None:
    """Seed Python, NumPy and PyTorch from the whole of (seed, *more)."""
    words = np.random.SeedSequence((seed, *more)).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002  # transforms in loader workers draw from the global one
    torch.manual_seed(int(words[1]))


# --- optimiser and schedule ---------------------------------------------------------------------------------


def constant(epochs: float, warmup: float) -> Schedule:
    """Linear warm-up over `warmup` epochs, then 1."""
    return lambda epoch: min(1.0, _rise(epoch, warmup))


def one_cycle(epochs: float, warmup: float) -> Schedule:
    """Linear warm-up over `warmup` epochs, then linear down to 0 at `epochs`."""
    return lambda epoch: min(_rise(epoch, warmup), max(0.0, (epochs - epoch) / max(epochs - warmup, 1e-9)))


def cosine(epochs: float, warmup: float) -> Schedule:
    """Linear warm-up over `warmup` epochs, then half a cosine down to 0 at `epochs`."""

    def factor(epoch: float) -> float:
        if epoch < warmup:
            return _rise(epoch, warmup)
        share = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))
        return 0.5 * (1 + math.cos(math.pi * share))

    return factor


def _rise(epoch: float, warmup: float) -> float:
    # never 0: a first step at rate 0 would be wasted
    return max(epoch / warmup, 0.01) if epoch < warmup else 1.0


SCHEDULES: dict[str, Callable[[float, float], Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
}
OPTIMISERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained for `epochs` epochs, the learning rate's one cycle included.

    `warmup` is a share of `epochs`; `momentum` is SGD's (with Nesterov's step) or Adam's first beta;
    `weight_decay` spares parameters of one dimension (biases, norms); `clip_norm` 0 means no clipping.
    ValueError names the field that is out of its range.
    """

    epochs: int
    optimiser: str = "sgd"
    learning_rate: float = 0.1
    schedule: str = "one_cycle"
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "`epochs >= 0` must hold", self.epochs)
        require(self.optimiser in OPTIMISERS, f"`optimiser` must be one of {OPTIMISERS}", self.optimiser)
        require(self.schedule in SCHEDULES, f"`schedule` must be one of {tuple(SCHEDULES)}", self.schedule)
        require(self.learning_rate > 0, "`learning_rate > 0` must hold", self.learning_rate)
        require(0 <= self.warmup < 1, "`0 <= warmup < 1` must hold", self.warmup)
        require(0 <= self.momentum < 1, "`0 <= momentum < 1` must hold", self.momentum)
        require(self.weight_decay >= 0, "`weight_decay >= 0` must hold", self.weight_decay)
        require(0 <= self.label_smoothing < 1, "`0 <= label_smoothing < 1` must hold", self.label_smoothing)
        require(self.clip_norm >= 0, "`clip_norm >= 0` must hold", self.clip_norm)

    def schedule_function(self) -> Schedule:
        """The learning-rate factor over the recipe's epochs."""
        return SCHEDULES[self.schedule](self.epochs, self.warmup * self.epochs)


def require(condition: bool, rule: str, value: object) -> None:
    """ValueError with the rule and the value that broke it."""
    if not condition:
        raise ValueError(f"{rule}, but got {value!r}.")


def optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """The recipe's optimiser over `parameters`, without weight decay where they have one dimension."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimiser == "sgd":
        nesterov = recipe.momentum > 0
        return SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=nesterov)
    adaptive: type[Adam] = {"adam": Adam, "adamw": AdamW}[recipe.optimiser]
    return adaptive(groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999))


# --- objectives ---------------------------------------------------------------------------------------------


def distilled(task: Task, objective: Objective, teacher: nn.Module, *, weight: float, temperature: float) -> Objective:
    """(1 - weight) objective + weight * the task's distance to the teacher's outputs.

    The teacher must lie on the device of the inputs; it is put in eval mode here and gets no gradient.
    """
    teacher.eval()

    def both(outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = output_of(teacher(inputs))
        distance = task.imitation(outputs, wanted, temperature)
        return (1 - weight) * objective(outputs, inputs, targets) + weight * distance

    return both


def output_of(returned: Any) -> Tensor:
    """A network's output, also where it comes first in a tuple or a mapping, before those of auxiliary heads.

    So do Inception and GoogLeNet in training, and torchvision's segmentation networks.
    """
    if isinstance(returned, Mapping):
        returned = tuple(returned.values())
    output: Tensor = returned if isinstance(returned, Tensor) else returned[0]
    return output


# --- checkpoints --------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `fit` last stored at `path`, on the CPU; None where there is no file. Refused if unreadable."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(
            f"The checkpoint {path} cannot be read ({type(error).__name__}); delete it to start the stage anew."
        ) from error
    return state


def history_of(state: Mapping[str, Any]) -> list[Epoch]:
    """The history stored in a checkpoint."""
    return [Epoch(**entry) for entry in state["history"]]


# --- the loop -----------------------------------------------------------------------------------------------


def fit(
    module: nn.Module,
    train: Loader,
    validation: Loader,
    *,
    fabric: Fabric,
    optimisers: Sequence[Optimizer],
    schedule: Schedule,
    objective: Objective,
    epochs: range,
    task: Task = CLASSIFICATION,
    seed: int = 0,
    controller: Controller | None = None,
    clip_norm: float = 0.0,
    compile_mode: str | None = None,
    checkpoint: Path | None = None,
    console: Console | None = None,
    label: str = "train",
    after_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `module` in place and return its history, one `Epoch` for each of `epochs`.

    `epochs` may begin above 0: batch order, random numbers and `schedule` are functions of the epoch's
    number, so two calls over range(0, a) and range(a, b) share one learning-rate cycle. With `checkpoint`,
    the state is stored there after every epoch, and a call that finds the file continues after that epoch.
    `clip_norm` bounds the first optimiser's gradient norm (the weights'; gates come second). Under a
    distributed strategy every process calls `fit`, with loaders that hold its own share of the examples.
    Training steps run as `compiled` makes them in `compile_mode`; validation runs `module` itself.
    `after_epoch` is called with each new epoch once that is stored; what it raises ends the training.

    Raises Diverged when loss or weights are no longer finite: nothing of that epoch is stored. Refused for a
    checkpoint that cannot be read or is another network's.
    """
    history: list[Epoch] = []
    stored = read_checkpoint(checkpoint) if checkpoint is not None else None
    if stored is not None:
        try:
            module.load_state_dict(stored["module"])
        except RuntimeError as error:
            raise Refused(f"{checkpoint} holds another network; delete it to start the stage anew. {error}") from error
        history = history_of(stored)
    wrapped, *stepped = fabric.setup(compiled(module, compile_mode, fabric), *optimisers)
    if stored is not None:
        for made, state in zip(optimisers, stored["optimisers"], strict=True):
            made.load_state_dict(state)
        if controller is not None:
            controller.load_state_dict(stored["controller"])
    rates = [[group.setdefault("initial_lr", group["lr"]) for group in made.param_groups] for made in optimisers]

    console = console if fabric.is_global_zero else None
    with _Display(console, label, epochs, len(train), history, task.metric.quality) as display:
        for epoch in epochs[len(history) :]:
            began = time.monotonic()
            seed_everything(seed, epoch, fabric.global_rank)
            train.set_epoch(epoch)
            wrapped.train()
            losses: list[Tensor] = []
            counts = torch.zeros((), dtype=torch.float64, device=fabric.device)
            for step, batch in enumerate(train):
                inputs, targets = fabric.to_device(batch)
                moment = epoch + step / len(train)
                for made, initial in zip(optimisers, rates, strict=True):
                    for group, rate in zip(made.param_groups, initial, strict=True):
                        group["lr"] = rate * schedule(moment)
                if controller is not None:
                    controller.before_step(moment)
                outputs = output_of(wrapped(inputs))
                with fabric.autocast():
                    loss = objective(outputs, inputs, targets)
                if controller is not None:
                    loss = loss + controller.loss()
                fabric.backward(loss)
                if clip_norm > 0:
                    fabric.clip_gradients(wrapped, stepped[0], max_norm=clip_norm, error_if_nonfinite=False)
                for taken in stepped:
                    taken.step()
                    taken.zero_grad()
                if controller is not None:
                    controller.after_step()
                losses.append(loss.detach())
                counts = counts + task.metric.count(outputs.detach(), targets)
                if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
                    _require_finite_losses(losses, epoch, fabric, checkpoint)
                display.step()
            _require_finite_losses(losses, epoch, fabric, checkpoint)
            _share_buffers(module, fabric)
            _require_finite_weights(module, epoch, checkpoint)
            history.append(
                Epoch(
                    epoch=epoch,
                    loss=float(_sum(torch.stack(losses).double().mean(), fabric)) / fabric.world_size,
                    train_accuracy=task.metric.value(_sum(counts, fabric)),
                    accuracy=evaluate(module, validation, fabric=fabric, task=task).accuracy,
                    seconds=time.monotonic() - began,
                    figures=controller.figures() if controller is not None else {},
                )
            )
            if checkpoint is not None:
                if fabric.is_global_zero:
                    with replacing(checkpoint) as file:
                        torch.save(
                            {
                                "module": module.state_dict(),
                                "optimisers": [made.state_dict() for made in optimisers],
                                "controller": controller.state_dict() if controller is not None else {},
                                "history": [asdict(entry) for entry in history],
                            },
                            file,
                        )
                fabric.barrier()
            display.epoch(history[-1])
            if after_epoch is not None:
                after_epoch(history[-1])
    return history


@torch.no_grad()
def evaluate(module: nn.Module, loader: Loader, *, fabric: Fabric, task: Task = CLASSIFICATION) -> Evaluation:
    """The metric and the mean loss of `module` in eval mode at a task; its mode is put back afterwards.

    Under a distributed strategy the examples of every process's loader are counted together.
    """
    was_training = module.training
    module.eval()
    objective = task.loss(0.0)
    counts, totals = torch.zeros((), device=fabric.device).double(), torch.zeros(2, device=fabric.device).double()
    loader.set_epoch(0)
    for batch in loader:
        inputs, targets = fabric.to_device(batch)
        with fabric.autocast():
            outputs = output_of(module(inputs))
        outputs = outputs.float()
        counts = counts + task.metric.count(outputs, targets)
        totals[0] += len(targets) * objective(outputs, inputs, targets)
        totals[1] += len(targets)
    module.train(was_training)
    loss, examples = _sum(totals, fabric).tolist()
    require(examples > 0, "`evaluate` needs at least one example", examples)
    value = task.metric.value(_sum(counts, fabric))
    return Evaluation(accuracy=value, loss=loss / examples, examples=int(examples))


def _sum(totals: Tensor, fabric: Fabric) -> Tensor:
    return totals if fabric.world_size == 1 else fabric.all_reduce(totals, reduce_op="sum")  # type: ignore[return-value]


def _share_buffers(module: nn.Module, fabric: Fabric) -> None:
    # each process has running statistics of its own share; all must leave the epoch with the stored ones
    if fabric.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _require_finite_losses(losses: list[Tensor], epoch: int, fabric: Fabric, checkpoint: Path | None) -> None:
    values = _sum(torch.stack(losses).double(), fabric)  # the sum, so that all processes stop together
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0])
        raise Diverged(f"The loss is {float(values[step])} at epoch {epoch + 1}, step {step + 1}. {_kept(checkpoint)}")


def _require_finite_weights(module: nn.Module, epoch: int, checkpoint: Path | None) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Diverged(f"{name!r} is not finite after epoch {epoch + 1}. {_kept(checkpoint)}")


def _kept(checkpoint: Path | None) -> str:
    advice = "Lower the learning rate, lengthen the warm-up or clip gradients."
    if checkpoint is None or not checkpoint.exists():
        return advice
    return f"{advice} The last good epoch is kept in {checkpoint}."


class _Display:
    """A bar on a terminal, one line per epoch elsewhere, nothing without a console."""

    def __init__(
        self,
        console: Console | None,
        label: str,
        epochs: range,
        steps: int,
        history: Sequence[Epoch],
        quality: Quality,
    ) -> None:
        self._console = console
        self._quality = quality
        self._label = label
        self._epochs = epochs
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(
                label,
                total=len(epochs) * steps,
                completed=len(history) * steps,
                epoch=len(history),
                epochs=len(epochs),
                status=self._status(history[-1]) if history else "",
            )

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch(self, entry: Epoch) -> None:
        done = self._epochs.index(entry.epoch) + 1
        if self._bar is not None:
            self._bar.update(self._task, epoch=done, status=self._status(entry))
        elif self._console is not None:
            left = (len(self._epochs) - done) * entry.seconds
            line = f"{self._label:<12} epoch {done}/{len(self._epochs)}  {self._status(entry)}  {left:.0f} s left"
            self._console.print(line, soft_wrap=True, highlight=False)

    def _status(self, entry: Epoch) -> str:
        cost = ""
        if {"cost", "target"} <= entry.figures.keys():
            cost = f"  cost {entry.figures['cost']:.3f} for {entry.figures['target']:.3f}"
        return f"loss {entry.loss:.3f}  {self._quality.label} {self._quality.show(entry.accuracy)}{cost}"
