"""One trial: dense weights, weights and gates together, landing, removal, fine-tuning, a candidate.

Gated training and fine-tuning share one learning-rate cycle: the gates settle while the rate is high, and the
small network carries the cycle down, so that the epochs spent on gates are epochs of training all the same.
Every stage keeps a checkpoint in the run's folder; calling `search` again with the same settings and folder
continues where it was, to the same result, and returns at once when it is finished.

Several targets share one gated training of `gating.epochs`, in legs of equal length, one for each target. At the
end of a leg the network lands on the leg's target and a small copy is fine-tuned over the rest of the cycle, while
the gated one goes on to the next leg. So each candidate has `cycle.epochs` epochs behind it on the same schedule,
as in a search of its own: with G gated epochs of C and K targets that is K C - G (K - 1) / 2 epochs instead of K C.
What it gives up is time for the gates: the first target is reached in G / K epochs.

A baseline (see `nas_gate.baselines`) has no gated stage: the dense network is cut at once, and the small one trains
over the whole cycle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Adam

from nas_gate import candidate
from nas_gate.analysis import remove_with_proof
from nas_gate.baselines import sensitivity, spread_gates
from nas_gate.budgets import GateController
from nas_gate.cost import MEASURED
from nas_gate.described import Plain
from nas_gate.folders import (
    digest,
    file_name,
    held,
    read_json,
    refuse_other_settings,
    refuse_other_sources,
    write_json,
)
from nas_gate.import_paths import is_import_path, modules_digest, source_digest
from nas_gate.measuring import fastest, on_processor
from nas_gate.modules import choices_of
from nas_gate.outcome import Stage, announce, announce_leg, combined, figures, named, report, tell
from nas_gate.prepare import Prepared, decide, example_input, load_data, prepare, refusing, seeded_model, timed_input
from nas_gate.removal import Removed
from nas_gate.settings import Distillation, Gating, Leg, Named, Settings, Timing, describe, versions
from nas_gate.training import (
    Controller,
    Epoch,
    distilled,
    evaluate,
    fit,
    optimiser,
    output_of,
    place,
    seed_everything,
)

__all__ = [
    "Distillation",
    "EpochHook",
    "Gating",
    "Moment",
    "Named",
    "Settings",
    "Timing",
    "describe",
    "example_input",
    "load_data",
    "refusing",
    "search",
    "seeded_model",
]


@dataclass(frozen=True)
class Moment:
    """Where a trial stands after an epoch of "gated" or "finetuned": validation accuracy, MACs at present.

    In other tasks than classification `accuracy` is the task's metric, negative where less is better.
    """

    stage: str
    epoch: int
    accuracy: float
    macs: float


SENSED = 50
"""Training batches over which the sensitivity of units is taken."""

EpochHook = Callable[[Moment], None]
"""Called after every new epoch of gated training and fine-tuning; what it raises ends the trial."""


@dataclass(frozen=True)
class Trial:
    """What all candidates of a trial have in common; the dense network is trained."""

    settings: Settings
    prepared: Prepared
    run_dir: Path
    dense: Stage
    history: list[Epoch]
    console: Console | None
    on_epoch: EpochHook | None

    def measured(self, name: str, module: nn.Module, macs: float, params: float, keep: Tensor) -> Stage:
        """The stage `name`, with the validation accuracy of `module` and the predicted latency of `keep`."""
        cost = self.prepared.gated.cost
        latency = (
            None if cost.table is None else float(cost(keep.to(self.prepared.gated.gates.weight.device), MEASURED[0]))
        )
        return Stage(name, validated(self.prepared, module), macs, params, latency)

    def looking_on(self, stage: str, macs: Callable[[], float]) -> Callable[[Epoch], None] | None:
        """The hook for the epochs of a stage."""
        hook, sign = self.on_epoch, self.prepared.task.metric.quality.sign
        return None if hook is None else lambda entry: hook(Moment(stage, entry.epoch, sign * entry.accuracy, macs()))


def validated(prepared: Prepared, module: nn.Module) -> float:
    """The task's metric on the validation split."""
    return evaluate(module, prepared.validation, fabric=prepared.fabric, task=prepared.task).accuracy


def search(
    settings: Settings,
    run_dir: Path,
    *,
    cache_dir: Path,
    console: Console | None = None,
    on_epoch: EpochHook | None = None,
    may_differ: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the trial that `settings` describe in `run_dir`; returns its results, also in `result.json` there.

    Dense weights are kept in `cache_dir`, for all trials that need the same ones. The results: `method`, `accuracy`
    (validation, last epoch), `test_accuracy` (None if not asked for), `macs`, `params`, `macs_ratio` and
    `params_ratio` to the dense ones, `achieved` and `target` (in `metric`), `max_relative_error` of the
    removal, `<stage>_accuracy`, `<stage>_macs` and `<stage>_params` of the stages dense, gated (not in baselines),
    landed and finetuned, `seconds_<stage>` of training, and `path`, the candidate's folder. `on_epoch` looks on. In
    other tasks than classification the metric's name stands for `accuracy` in all of these; `task_metric` has its
    name, direction and format.
    Where latency is a target or a limit also `latency_ms` and `dense_latency_ms` (measured on the finished candidate
    and the dense network in turns), `predicted_latency_ms`, `latency_relative_error` (predicted / measured - 1),
    `latency_machine`, and `<stage>_predicted_latency_ms`.

    With `settings.targets` each candidate has these files in its own folder, `target-0.5` (say) below `run_dir`. The
    results returned are then those of the last target, with the folders' names in `candidates` and the `hypervolume`
    of all (see `outcome.combined`); every candidate's `seconds_gated` are counted from the first leg on.

    A folder that holds an interrupted run of the same settings is continued; where data lie may differ, and settings
    that are, or lie in, one of `may_differ`, as "hardware". What files hold that settings name (the code of a model or
    task of one's own, weights, data: of image files names, labels and sizes) must be the same; of a finished run data
    are not looked at again.

    Raises Refused before any training, Diverged when a loss becomes NaN or infinite.
    """
    described = describe(settings)
    refuse_other_settings(described, run_dir, may_differ)
    result_file = run_dir / "result.json"
    if result_file.exists():
        with refusing():
            refuse_other_sources(contents(settings), run_dir)
        result = read_json(result_file)
        if console is not None:
            console.print(f"{run_dir} is finished already.", soft_wrap=True)
            names = result.get("candidates", ["."])
            report(settings, result, [read_json(run_dir / name / "result.json") for name in names], console)
        return result

    prepared = prepare(settings, cache_dir, console)
    fabric, gated = prepared.fabric, prepared.gated
    sources = {**_contents(settings, prepared), "data": prepared.data.fingerprint}
    refuse_other_sources(sources, run_dir)
    if not fabric.is_global_zero:
        console = None
    with held(run_dir, fabric):
        if fabric.is_global_zero:
            write_json(run_dir / "settings.json", described)
            write_json(run_dir / "sources.json", sources)
        if console is not None:
            announce(settings, prepared, console)
        history = train_dense(settings, prepared, cache_dir, console)
        accuracy = validated(prepared, prepared.dense)
        latency = None if gated.cost.table is None else gated.cost.total(MEASURED[0])
        dense = Stage("dense", accuracy, gated.cost.total("macs"), gated.cost.total("params"), latency)
        gated.model.load_state_dict(prepared.dense.state_dict())
        spread_gates(gated, settings.gating.spread, sensed(settings, prepared, run_dir), settings.metric)
        trial = Trial(settings, prepared, run_dir, dense, history, console, on_epoch)
        if settings.targets is None:
            result = find(trial, settings.legs()[0], run_dir)
            candidates = [result]
        else:
            found = {f"target-{leg.target}": leg for leg in settings.legs()}
            results = {name: find(trial, leg, run_dir / name) for name, leg in found.items()}
            result, candidates = combined(results, prepared.task.metric.quality), list(results.values())
            if fabric.is_global_zero:
                write_json(result_file, result)
        if fabric.is_global_zero:
            (run_dir / "gated.pt").unlink(missing_ok=True)
        fabric.barrier()
    if console is not None:
        report(settings, result, candidates, console)
    return result


def find(trial: Trial, leg: Leg, folder: Path) -> dict[str, Any]:
    """The candidate of one leg, saved in `folder` with its results, which are returned; at once where it is there."""
    settings, prepared, console = trial.settings, trial.prepared, trial.console
    fabric, gated = prepared.fabric, prepared.gated
    several, quality = settings.targets is not None, prepared.task.metric.quality
    if console is not None and several:
        announce_leg(settings, leg, console)
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
    else:
        histories, stages = {"dense": trial.history}, [trial.dense]
        if leg.end > leg.begin:
            histories["gated"] = train_gated(trial, leg)
            with torch.no_grad():
                gated.eval()
                keep = gated.keep()
                macs, params = (float(gated.cost(keep, metric)) for metric in ("macs", "params"))
            stages.append(trial.measured("gated", gated, macs, params, keep))
        removed = remove_with_proof(gated, decide(settings, gated, leg.target))
        place(removed.model, fabric, channels_last=settings.hardware.channels_last)
        stages.append(trial.measured("landed", removed.model, removed.macs, removed.params, removed.keep))
        histories["finetuned"] = fine_tune(trial, leg, removed, folder / "finetuned.pt")
        stages.append(trial.measured("finetuned", removed.model, removed.macs, removed.params, removed.keep))
        test = None
        if settings.test:
            test = evaluate(removed.model, prepared.test, fabric=fabric, task=prepared.task).accuracy
        taken = time_networks(trial, removed) if settings.timed() and fabric.is_global_zero else None
        result = named(
            figures(settings, leg, quality, stages, histories, removed, test, taken, folder / "candidate"), quality.name
        )
        if fabric.is_global_zero:
            _save(settings, prepared, removed, result)
            history = {k: [named(asdict(e), quality.name) for e in v] for k, v in histories.items()}
            write_json(folder / "history.json", history)
            write_json(folder / "result.json", result)
        fabric.barrier()
    if fabric.is_global_zero:
        (folder / "finetuned.pt").unlink(missing_ok=True)  # the candidate holds the weights now
    if console is not None and several:
        tell(result, quality, console)
    return result


def time_networks(trial: Trial, removed: Removed) -> tuple[float, float]:
    """Milliseconds of latency, measured: of the dense network and of the candidate."""
    settings, prepared = trial.settings, trial.prepared
    networks = [on_processor(prepared.dense), on_processor(removed.model)]
    dense, candidate = fastest(networks, (timed_input(settings, prepared.data),), {}, settings.latency.threads)
    return dense, candidate


def contents(settings: Settings) -> dict[str, Any]:
    """Digests of the files that settings only name: the `code` of a model or task of one's own, and `weights`."""
    own = [named.name for named in (settings.model, settings.task) if is_import_path(named.name)]
    found: dict[str, Any] = {"code": {name: source_digest(name) for name in own}} if own else {}
    if settings.weights is not None:
        found["weights"] = hashlib.sha256(Path(settings.weights).read_bytes()).hexdigest()
    return found


def _contents(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """`contents`, with the code of the modules of one's own: the file of the factory may take them from others."""
    found = contents(settings)
    return {**found, "modules": modules_digest(prepared.dense)} if "code" in found else found


def train_dense(settings: Settings, prepared: Prepared, cache_dir: Path, console: Console | None = None) -> list[Epoch]:
    """Train `prepared.dense`, or take its weights from the cache; the file there is the fit's checkpoint.

    Two processes that want the same weights train them once: the second waits (where the file system has
    locks; elsewhere both train, to the same result). A network or task of one's own is the same as long as the file
    that defines it is.
    """
    key = {
        "model": settings.model.name,
        "arguments": dict(prepared.model_arguments),
        "data": prepared.data.fingerprint,
        "recipe": asdict(settings.dense),
        "seed": settings.seed,
        "precision": settings.hardware.precision,
        "versions": versions(),
        **{key: value for key, value in describe(settings).items() if key == "task"},
    }
    # random paths are nothing to compile: every choice begins another graph
    mode = None if choices_of(prepared.dense) else settings.hardware.compile
    if mode is not None:
        key["compile"] = mode
    if prepared.fabric.world_size > 1:  # each has its own part of the data, and its own statistics of norms
        key["processes"] = prepared.fabric.world_size
    sources = _contents(settings, prepared)
    if "code" in sources:
        shapes = {name: tuple(tensor.shape) for name, tensor in prepared.dense.state_dict().items()}
        sources["code"]["network"] = f"{prepared.dense} {shapes}"
    key |= sources
    folder = cache_dir / f"{file_name(settings.model.name)}-{file_name(settings.data.name)}-{digest(key, 16)}"
    with held(folder, prepared.fabric, wait=True, console=console):
        if prepared.fabric.is_global_zero:
            write_json(folder / "dense.json", key)
        return fit(
            prepared.dense,
            prepared.train,
            prepared.validation,
            fabric=prepared.fabric,
            optimisers=[optimiser(prepared.dense.parameters(), settings.dense)],
            schedule=settings.dense.schedule_function(),
            objective=prepared.task.loss(settings.dense.label_smoothing),
            task=prepared.task,
            epochs=range(settings.dense.epochs),
            seed=settings.seed,
            clip_norm=settings.dense.clip_norm,
            compile_mode=mode,
            checkpoint=folder / "dense.pt",
            console=console,
            label="dense",
        )


def sensed(settings: Settings, prepared: Prepared, run_dir: Path) -> Tensor | None:
    """How much the dense network feels its units, over a few batches; None where no gate begins by it.

    In the mode of training, whose outputs the loss is made for, but with the statistics that norms have by now. The
    network is left as it was. A gated training that is continued has its gates already.
    """
    gated, fabric = prepared.gated, prepared.fabric
    if settings.method != "gates" or settings.gating.spread == 0 or (run_dir / "gated.pt").exists():
        return None
    place(gated, fabric, channels_last=settings.hardware.channels_last)
    gated.train()
    for module in gated.modules():
        if isinstance(module, _NormBase):
            module.eval()
    buffers = {name: buffer.clone() for name, buffer in gated.model.named_buffers()}
    objective = prepared.task.loss(settings.cycle.label_smoothing)
    seed_everything(settings.seed, 0, fabric.global_rank)
    prepared.train.set_epoch(0)

    def losses() -> Iterator[Tensor]:
        for batch in islice(prepared.train, SENSED):
            inputs, targets = fabric.to_device(batch)
            with fabric.autocast():
                loss = objective(output_of(gated(inputs)), inputs, targets)
            yield loss

    squares = sensitivity(gated, losses()).square()
    with torch.no_grad():
        for name, buffer in gated.model.named_buffers():
            buffer.copy_(buffers.get(name, buffer))
    return fabric.all_reduce(squares, reduce_op="mean").sqrt()  # type: ignore[union-attr]


def train_gated(trial: Trial, leg: Leg) -> list[Epoch]:
    """Train weights and gates together up to the end of `leg`; returns the history from the first leg on.

    All legs share one checkpoint, and a leg takes up everything from there: weights, gates, optimisers and budget.
    It is never ahead of the first candidate that is not finished.
    """
    settings, prepared, gated = trial.settings, trial.prepared, trial.prepared.gated
    place(gated, prepared.fabric, channels_last=settings.hardware.channels_last)
    weights = optimiser(gated.weight_parameters(), settings.cycle)
    # Adam, because the gradient of a gate shrinks with the number of units that share the cost
    gates = Adam(gated.gate_parameters(), lr=settings.gating.learning_rate)
    controller: Controller = GateController(gated, prepared.budget, settings)

    def macs() -> float:
        return float(gated.cost_share("macs").detach()) * gated.cost.total("macs")

    return fit(
        gated,
        prepared.train,
        prepared.validation,
        fabric=prepared.fabric,
        optimisers=[weights, gates],
        schedule=settings.cycle.schedule_function(),
        objective=prepared.task.loss(settings.cycle.label_smoothing),
        task=prepared.task,
        epochs=range(leg.end),
        seed=settings.seed,
        controller=controller,
        clip_norm=settings.cycle.clip_norm,
        compile_mode=settings.hardware.compile,
        checkpoint=trial.run_dir / "gated.pt",
        console=trial.console,
        label="gated",
        after_epoch=trial.looking_on("gated", macs),
    )


def fine_tune(trial: Trial, leg: Leg, removed: Removed, checkpoint: Path) -> list[Epoch]:
    """Train the small network over the rest of the cycle, distilling from the dense one if asked to."""
    settings, prepared = trial.settings, trial.prepared
    objective = prepared.task.loss(settings.cycle.label_smoothing)
    if settings.distillation.weight > 0:
        objective = distilled(prepared.task, objective, prepared.dense, **asdict(settings.distillation))
    return fit(
        removed.model,
        prepared.train,
        prepared.validation,
        fabric=prepared.fabric,
        optimisers=[optimiser(removed.model.parameters(), settings.cycle)],
        schedule=settings.cycle.schedule_function(),
        objective=objective,
        task=prepared.task,
        epochs=range(leg.end, settings.cycle.epochs),
        seed=settings.seed,
        clip_norm=settings.cycle.clip_norm,
        compile_mode=settings.hardware.compile,
        checkpoint=checkpoint,
        console=trial.console,
        label="fine-tuned",
        after_epoch=trial.looking_on("finetuned", lambda: float(removed.macs)),
    )


def _save(settings: Settings, prepared: Prepared, removed: Removed, result: Plain) -> None:
    candidate.save(
        Path(result["path"]),
        removed.model,
        removed.cut,
        model={"name": settings.model.name, "arguments": dict(prepared.model_arguments)},
        figures={key: value for key, value in result.items() if key != "path"},
        provenance={
            "settings": describe(settings),
            "seed": settings.seed,
            "versions": versions(),
            "input_shape": [prepared.data.in_channels, *prepared.data.image_size],
            "normalisation": {"mean": list(prepared.data.mean), "std": list(prepared.data.std)},
        },
    )
