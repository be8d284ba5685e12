"""One trial: dense weights, weights and gates together, landing, removal, fine-tuning, a candidate.

Gated training and fine-tuning share one learning-rate cycle: the gates settle while the rate is high, and the
small network carries the cycle down, so that the epochs spent on gates are epochs of training all the same.
Every stage keeps a checkpoint in the run's folder; calling `search` again with the same settings and folder
continues where it was, to the same result, and returns at once when it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam

from nas_gate import candidate, models
from nas_gate import data as datasets
from nas_gate.analysis import attach, land, remove_with_proof
from nas_gate.cost import check_metric
from nas_gate.gates import make_gate
from nas_gate.gating import GatedModel, Lagrangian, penalty
from nas_gate.landing import reachable
from nas_gate.removal import Removed
from nas_gate.training import (
    Controller,
    Epoch,
    Hardware,
    Loader,
    Recipe,
    classification,
    connect,
    distilled,
    evaluate,
    fit,
    optimiser,
    place,
    replacing,
    require,
    seed_everything,
)

Plain = Mapping[str, Any]


class Refused(ValueError):
    """What was asked for breaks a rule; nothing was trained."""


# --- settings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """Something from a registry: its name there and the keywords that it is made with."""

    name: str
    arguments: Plain = field(default_factory=dict)


@dataclass(frozen=True)
class Gating:
    """How gates learn: for the first `epochs` epochs of the cycle, by Adam at `learning_rate`.

    The target goes from 1 to the wanted share over the first `descent` of these epochs, in a straight line.
    """

    epochs: int
    learning_rate: float = 0.01
    descent: float = 0.7

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "`gating.epochs >= 1` must hold", self.epochs)
        require(self.learning_rate > 0, "`gating.learning_rate > 0` must hold", self.learning_rate)
        require(0 <= self.descent <= 1, "`0 <= gating.descent <= 1` must hold", self.descent)


@dataclass(frozen=True)
class Distillation:
    """Learning from the dense network after removal (see `training.distilled`); weight 0 turns it off."""

    weight: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, "`0 <= distillation.weight <= 1` must hold", self.weight)
        require(self.temperature > 0, "`distillation.temperature > 0` must hold", self.temperature)


@dataclass(frozen=True)
class Settings:
    """All that determines a trial's result.

    `target` is the wanted share of the dense network's `metric` ("macs" or "params"), in (0, 1); counts of
    kept units are multiples of `round_to` where they can be. `dense` trains the network with all units,
    `cycle` the gated and then the small one; the first `gating.epochs` of the cycle are the gated ones. With
    `test`, the candidate's accuracy on the test set is measured, once, at its last epoch.
    """

    model: Named
    data: Named
    dense: Recipe
    cycle: Recipe
    gating: Gating
    gate: Named = field(default_factory=lambda: Named("trainable"))
    budget: Named = field(default_factory=lambda: Named("penalty"))
    distillation: Distillation = field(default_factory=Distillation)
    hardware: Hardware = field(default_factory=Hardware)
    target: float = 0.5
    metric: str = "macs"
    round_to: int = 1
    seed: int = 0
    test: bool = True

    def __post_init__(self) -> None:
        require(0 < self.target < 1, "`0 < target < 1` must hold for the share of the dense cost", self.target)
        check_metric(self.metric)
        require(self.round_to >= 1, "`round_to >= 1` must hold", self.round_to)
        require(self.seed >= 0, "`seed >= 0` must hold", self.seed)
        require(
            self.gating.epochs <= self.cycle.epochs,
            f"`gating.epochs <= cycle.epochs` must hold with cycle.epochs={self.cycle.epochs}",
            self.gating.epochs,
        )


# --- budgets ------------------------------------------------------------------------------------------------


class Budget(Protocol):
    """A loss term that draws the cost to a target, which may move from step to step."""

    def loss(self, gated: GatedModel, target: float) -> Tensor:
        """Scalar to add to the task's loss."""

    def update(self, gated: GatedModel) -> None:
        """Adapt after a step."""

    def state_dict(self) -> dict[str, Any]:
        """What changes during training."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""


class PenaltyBudget:
    """`nas_gate.penalty` of a fixed weight."""

    def __init__(self, metric: str, weight: float = 4.0, power: int = 2) -> None:
        require(power in (1, 2), "budget penalty: `power` must be 1 or 2", power)
        require(weight >= 0, "budget penalty: `weight >= 0` must hold", weight)
        self._metric, self._weight, self._power = metric, weight, power

    def loss(self, gated: GatedModel, target: float) -> Tensor:
        """The penalty for `target`."""
        return penalty(gated, target, weight=self._weight, power=self._power, metric=self._metric)

    def update(self, gated: GatedModel) -> None:
        """Nothing adapts."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class LagrangianBudget:
    """`nas_gate.Lagrangian`, which finds the weight itself."""

    def __init__(self, metric: str, rate: float = 0.1) -> None:
        self._lagrangian = Lagrangian(1.0, rate=rate, metric=metric)

    def loss(self, gated: GatedModel, target: float) -> Tensor:
        """The augmented Lagrangian's term for `target`."""
        self._lagrangian.target = target
        return self._lagrangian(gated)

    def update(self, gated: GatedModel) -> None:
        """Adapt the multiplier."""
        self._lagrangian.update(gated)

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return dict(self._lagrangian.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the multiplier."""
        self._lagrangian.load_state_dict(state)


BUDGETS: dict[str, Callable[..., Budget]] = {"penalty": PenaltyBudget, "lagrangian": LagrangianBudget}


def make_budget(name: str, metric: str, **arguments: Any) -> Budget:
    """The budget called `name`; ValueError for an unknown name, TypeError for an unknown argument."""
    require(name in BUDGETS, f"`budget` must be one of {tuple(BUDGETS)}", name)
    return BUDGETS[name](metric, **arguments)


class GateController:
    """`training.Controller` of a gated model: the descending target, the gate's progress, the budget."""

    def __init__(self, gated: GatedModel, budget: Budget, settings: Settings) -> None:
        self._gated, self._budget = gated, budget
        self._metric, self._target = settings.metric, settings.target
        self._epochs, self._descent = settings.gating.epochs, settings.gating.descent
        self._present = 1.0

    def before_step(self, epoch: float) -> None:
        """Set the target and the gate's progress for this moment."""
        progress = epoch / self._epochs
        way = min(1.0, progress / self._descent) if self._descent else 1.0
        self._present = 1 + way * (self._target - 1)
        self._gated.gates.function.set_progress(progress)

    def loss(self) -> Tensor:
        """The budget's term."""
        return self._budget.loss(self._gated, self._present)

    def after_step(self) -> None:
        """Let the budget adapt."""
        self._budget.update(self._gated)

    def figures(self) -> dict[str, float]:
        """The gates' present cost and target, as shares of the dense network's."""
        with torch.no_grad():
            return {"cost": float(self._gated.cost_share(self._metric)), "target": self._present}

    def state_dict(self) -> dict[str, Any]:
        """The budget's state; the rest follows from the epoch."""
        return self._budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the budget's state."""
        self._budget.load_state_dict(state)


# --- before any training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a trial works with; `dense` and `gated.model` are two copies of the same untrained network."""

    fabric: Fabric
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
        data = load_data(settings)
        dense, model_arguments = seeded_model(settings, data.in_channels, data.num_classes)
        gate = make_gate(settings.gate.name, **settings.gate.arguments)
        budget = make_budget(settings.budget.name, settings.metric, **settings.budget.arguments)
        gated = attach(dense.eval(), example_input((data.in_channels, *data.image_size)), gate=gate)
        lowest = reachable(gated.structure, settings.metric, settings.round_to)[0]
        land(gated, settings.target, settings.metric, settings.round_to)  # refuses what is out of reach
    train, validation, test = (
        loader.to(fabric.device).shard(fabric.global_rank, fabric.world_size)
        for loader in (data.train, data.validation, data.test)
    )
    return Prepared(
        fabric=fabric,
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


# --- the trial ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A network at one point of the trial: validation accuracy in [0, 1], MACs, parameters."""

    name: str
    accuracy: float
    macs: float
    params: float


@dataclass(frozen=True)
class Moment:
    """Where a trial stands after an epoch of "gated" or "finetuned": validation accuracy, MACs at present."""

    stage: str
    epoch: int
    accuracy: float
    macs: float


EpochHook = Callable[[Moment], None]
"""Called after every new epoch of gated training and fine-tuning; what it raises ends the trial."""


def search(
    settings: Settings,
    run_dir: Path,
    *,
    cache_dir: Path,
    console: Console | None = None,
    on_epoch: EpochHook | None = None,
) -> dict[str, Any]:
    """Run the trial that `settings` describe in `run_dir`; returns its results, also in `result.json` there.

    Dense weights are kept in `cache_dir`, for all trials that need the same ones. The results: `accuracy`
    (validation, last epoch), `test_accuracy` (None if not asked for), `macs`, `params`, `macs_ratio` and
    `params_ratio` to the dense ones, `achieved` and `target` (in `metric`), `max_relative_error` of the
    removal, `<stage>_accuracy`, `<stage>_macs` and `<stage>_params` of the stages dense, gated, landed and
    finetuned, `seconds_<stage>` of training, and `path`, the candidate's folder. `on_epoch` looks on.

    Raises Refused before any training, `training.Diverged` when a loss becomes NaN or infinite.
    """
    described = describe(settings)
    _refuse_other_settings(described, run_dir)
    result_file = run_dir / "result.json"
    if result_file.exists():
        result: dict[str, Any] = json.loads(result_file.read_text())
        if console is not None:
            console.print(f"{run_dir} is finished already.", soft_wrap=True)
            report(settings, result, console)
        return result

    prepared = prepare(settings)
    fabric, gated = prepared.fabric, prepared.gated
    if not fabric.is_global_zero:
        console = None
    with held(run_dir, fabric):
        if fabric.is_global_zero:
            _write_json(run_dir / "settings.json", described)
        if console is not None:
            _announce(settings, prepared, console)
        histories: dict[str, list[Epoch]] = {}
        stages: list[Stage] = []

        def measure(name: str, module: nn.Module, macs: float, params: float) -> None:
            accuracy = evaluate(module, prepared.validation, fabric=fabric).accuracy
            stages.append(Stage(name, accuracy, macs, params))

        histories["dense"] = train_dense(settings, prepared, cache_dir, console)
        measure("dense", prepared.dense, gated.cost.total("macs"), gated.cost.total("params"))
        gated.model.load_state_dict(prepared.dense.state_dict())

        def looking_on(stage: str, macs: Callable[[], float]) -> Callable[[Epoch], None] | None:
            if on_epoch is None:
                return None
            return lambda entry: on_epoch(Moment(stage, entry.epoch, entry.accuracy, macs()))

        def gated_macs() -> float:
            return float(gated.cost_share("macs").detach()) * gated.cost.total("macs")

        hook = looking_on("gated", gated_macs)
        histories["gated"] = train_gated(settings, prepared, run_dir / "gated.pt", console, hook)
        with torch.no_grad():
            gated.eval()
            costs = [float(gated.cost(gated.keep(), metric)) for metric in ("macs", "params")]
        measure("gated", gated, *costs)

        keep = land(gated, settings.target, settings.metric, settings.round_to)
        removed = remove_with_proof(gated, keep)
        place(removed.model, fabric, channels_last=settings.hardware.channels_last)
        measure("landed", removed.model, removed.macs, removed.params)
        hook = looking_on("finetuned", lambda: float(removed.macs))
        histories["finetuned"] = fine_tune(settings, prepared, removed, run_dir / "finetuned.pt", console, hook)
        measure("finetuned", removed.model, removed.macs, removed.params)
        test = evaluate(removed.model, prepared.test, fabric=fabric).accuracy if settings.test else None

        result = _result(settings, stages, histories, removed, test, run_dir / "candidate")
        if fabric.is_global_zero:
            _save(settings, prepared, removed, result, described)
            _write_json(run_dir / "history.json", {k: [asdict(e) for e in v] for k, v in histories.items()})
            _write_json(result_file, result)
            for name in ("gated.pt", "finetuned.pt"):  # the candidate holds the weights now
                (run_dir / name).unlink(missing_ok=True)
        fabric.barrier()
    if console is not None:
        report(settings, result, console)
    return result


def train_dense(settings: Settings, prepared: Prepared, cache_dir: Path, console: Console | None = None) -> list[Epoch]:
    """Train `prepared.dense`, or take its weights from the cache; the file there is the fit's checkpoint.

    Two processes that want the same weights train them once: the second waits (where the file system has
    locks; elsewhere both train, to the same result).
    """
    key = {
        "model": settings.model.name,
        "arguments": dict(prepared.model_arguments),
        "data": prepared.data.fingerprint,
        "recipe": asdict(settings.dense),
        "seed": settings.seed,
        "precision": settings.hardware.precision,
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = cache_dir / f"{_file_name(settings.model.name)}-{_file_name(settings.data.name)}-{digest}"
    with held(folder, prepared.fabric, wait=True, console=console):
        if prepared.fabric.is_global_zero:
            _write_json(folder / "dense.json", key)
        return fit(
            prepared.dense,
            prepared.train,
            prepared.validation,
            fabric=prepared.fabric,
            optimisers=[optimiser(prepared.dense.parameters(), settings.dense)],
            schedule=settings.dense.schedule_function(),
            objective=classification(settings.dense.label_smoothing),
            epochs=range(settings.dense.epochs),
            seed=settings.seed,
            clip_norm=settings.dense.clip_norm,
            checkpoint=folder / "dense.pt",
            console=console,
            label="dense",
        )


def train_gated(
    settings: Settings,
    prepared: Prepared,
    checkpoint: Path,
    console: Console | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train the weights and the gates of `prepared.gated` together, over the first epochs of the cycle."""
    gated = prepared.gated
    place(gated, prepared.fabric, channels_last=settings.hardware.channels_last)
    weights = optimiser(gated.weight_parameters(), settings.cycle)
    # Adam, because the gradient of a gate shrinks with the number of units that share the cost
    gates = Adam(gated.gate_parameters(), lr=settings.gating.learning_rate)
    controller: Controller = GateController(gated, prepared.budget, settings)
    return fit(
        gated,
        prepared.train,
        prepared.validation,
        fabric=prepared.fabric,
        optimisers=[weights, gates],
        schedule=settings.cycle.schedule_function(),
        objective=classification(settings.cycle.label_smoothing),
        epochs=range(settings.gating.epochs),
        seed=settings.seed,
        controller=controller,
        clip_norm=settings.cycle.clip_norm,
        checkpoint=checkpoint,
        console=console,
        label="gated",
        after_epoch=after_epoch,
    )


def fine_tune(
    settings: Settings,
    prepared: Prepared,
    removed: Removed,
    checkpoint: Path,
    console: Console | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train the small network over the rest of the cycle, distilling from the dense one if asked to."""
    objective = classification(settings.cycle.label_smoothing)
    if settings.distillation.weight > 0:
        objective = distilled(objective, prepared.dense, **asdict(settings.distillation))
    return fit(
        removed.model,
        prepared.train,
        prepared.validation,
        fabric=prepared.fabric,
        optimisers=[optimiser(removed.model.parameters(), settings.cycle)],
        schedule=settings.cycle.schedule_function(),
        objective=objective,
        epochs=range(settings.gating.epochs, settings.cycle.epochs),
        seed=settings.seed,
        clip_norm=settings.cycle.clip_norm,
        checkpoint=checkpoint,
        console=console,
        label="fine-tuned",
        after_epoch=after_epoch,
    )


# --- what is written and shown ------------------------------------------------------------------------------


def describe(settings: Settings) -> dict[str, Any]:
    """`settings` as JSON holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {name: version(name) for name in ("nas-gate", "torch", "torchvision")}


def _result(
    settings: Settings,
    stages: list[Stage],
    histories: Mapping[str, list[Epoch]],
    removed: Removed,
    test_accuracy: float | None,
    path: Path,
) -> dict[str, Any]:
    dense, last = stages[0], stages[-1]
    ratios = {"macs": last.macs / dense.macs, "params": last.params / dense.params}
    result: dict[str, Any] = {
        "accuracy": last.accuracy,
        "macs": removed.macs,
        "params": removed.params,
        "macs_ratio": ratios["macs"],
        "params_ratio": ratios["params"],
        "metric": settings.metric,
        "target": settings.target,
        "achieved": ratios[settings.metric],
        "max_relative_error": removed.max_relative_error,
        "test_accuracy": test_accuracy,
    }
    for stage in stages:
        for name in ("accuracy", "macs", "params"):
            result[f"{stage.name}_{name}"] = getattr(stage, name)
    for name, history in histories.items():
        result[f"seconds_{name}"] = sum(epoch.seconds for epoch in history)
    return {**result, "path": str(path)}


def _save(settings: Settings, prepared: Prepared, removed: Removed, result: Plain, described: Plain) -> None:
    candidate.save(
        Path(result["path"]),
        removed.model,
        removed.cut,
        model={"name": settings.model.name, "arguments": dict(prepared.model_arguments)},
        figures={key: value for key, value in result.items() if key != "path"},
        provenance={
            "settings": described,
            "seed": settings.seed,
            "versions": versions(),
            "input_shape": [prepared.data.in_channels, *prepared.data.image_size],
        },
    )


def report(settings: Settings, result: Plain, console: Console) -> None:
    """The closing table, where the candidate lies, and how to load it."""
    table = Table("", "accuracy", "MACs", "params", f"share of {result['metric']}", title="validation")
    for stage, label in (
        ("dense", "dense"),
        ("gated", "gated"),
        ("landed", "landed"),
        ("finetuned", "fine-tuned"),
    ):
        share = result[f"{stage}_{result['metric']}"] / result[f"dense_{result['metric']}"]
        figures = (millions(result[f"{stage}_macs"]), millions(result[f"{stage}_params"]))
        table.add_row(label, f"{result[f'{stage}_accuracy']:.2%}", *figures, f"{share:.4f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    lines = [f"achieved {result['achieved']:.4f} of the dense {result['metric']}, asked {result['target']}"]
    if result["test_accuracy"] is not None:
        lines.append(f"test accuracy, measured once: {result['test_accuracy']:.2%}")
    lines.append(f"largest relative error of the removal: {result['max_relative_error']:.1e}")
    lines.append(f"candidate: {result['path']}")
    # a file is never trusted to name what to import
    factory = "" if settings.model.name in models.names() else ", factory=<what makes the dense model>"
    lines.append(f"load it:   import nas_gate; model = nas_gate.load({str(result['path'])!r}{factory})")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def millions(count: float) -> str:
    """A count in millions, for people."""
    return f"{count / 1e6:.3f} M"


def _announce(settings: Settings, prepared: Prepared, console: Console) -> None:
    cost, structure = prepared.gated.cost, prepared.gated.structure
    console.print(
        f"{settings.model.name} on {settings.data.name}: {millions(cost.total('macs'))} MACs, "
        f"{millions(cost.total('params'))} parameters, {structure.units} units in {len(structure.groups)} "
        f"groups; target {settings.target} of the {settings.metric} (reachable: from {prepared.lowest:.3f})",
        soft_wrap=True,
        highlight=False,
    )


def _refuse_other_settings(described: Plain, run_dir: Path) -> None:
    """Refused if the folder belongs to other settings, saying what differs."""
    file = run_dir / "settings.json"
    if not file.exists():
        return
    before, now = _flat(json.loads(file.read_text())), _flat(described)
    differing = [
        f"{key}: {before.get(key, 'nothing')!r} there, {now.get(key, 'nothing')!r} asked for"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise Refused(
            f"{run_dir} holds a run with other settings ({'; '.join(differing)}). "
            "Choose another folder, or ask for the same settings to continue that run."
        )


def _flat(plain: Plain, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        inner = isinstance(value, Mapping) and value
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return flat


def _write_json(path: Path, content: Plain) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)


@contextmanager
def held(folder: Path, fabric: Fabric, *, wait: bool = False, console: Console | None = None) -> Iterator[None]:
    """Hold `folder` against other runs, which wait or are refused. A killed process lets go by dying."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fabric.is_global_zero:
            try:
                import fcntl
            except ImportError:  # no such locks on Windows; all files are replaced whole, so the last one wins
                pass
            else:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise Refused(f"Another process is working in {folder}.") from None
                    if console is not None:
                        console.print(f"waiting for another process to finish {folder}", soft_wrap=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
        fabric.barrier()
        yield
