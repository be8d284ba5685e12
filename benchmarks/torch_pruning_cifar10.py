"""Torch-Pruning through our own training: the peer's candidates for `results/cifar10`.

    python benchmarks/torch_pruning_cifar10.py --targets 0.5 0.35 --seeds 0 1 2 experiment=cifar10 model=resnet20 \
        model.arguments.shortcut=B data.root=DIR

Torch-Pruning 1.6.1 (extra `benchmark`) cuts the dense network by its group magnitude (p = 2) over the whole network
at once, its own classifier left alone, in small steps until the target is met; the small network then trains over the
whole cycle with the same recipe, batches and distillation as a candidate of `nas-gate search` with the same settings.
Dense weights come from the same cache. ResNets take shortcut B: with the parameter-free shortcut A (zero channels) its
result does not run. One line per candidate in `--output`, a CSV; what stands there is not done again.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _environment
import pandas as pd
import torch
import torch_pruning
from rich.console import Console
from torch import nn

from nas_gate.cli import composed, settings_of
from nas_gate.cost import count_macs
from nas_gate.prepare import Prepared, example_input, prepare
from nas_gate.search import Settings, train_dense
from nas_gate.training import distilled, evaluate, fit, optimiser, place

ROOT = Path(__file__).resolve().parent.parent
STEPS = 400
"""Of Torch-Pruning's schedule from the dense network to nothing: about 0.5% of the MACs each."""


def pruned(model: nn.Module, example: torch.Tensor, target: float) -> nn.Module:
    """A copy of the model, cut by Torch-Pruning until it costs at most `target` of the MACs."""
    small = copy.deepcopy(model).eval()
    dense = count_macs(small, (example,))
    last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        small,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[last],
    )
    for _ in range(STEPS):
        if count_macs(small, (example,)) <= target * dense:
            return small
        pruner.step()
    raise RuntimeError(f"Torch-Pruning did not come down to {target} of the MACs in {STEPS} steps")


def candidate(settings: Settings, prepared: Prepared, target: float, work: Path, console: Console) -> dict[str, Any]:
    """One row: prune `prepared.dense`, which is trained, and train the small network over the cycle."""
    example = example_input((prepared.data.in_channels, *prepared.data.image_size)).to(prepared.fabric.device)
    small = place(
        pruned(prepared.dense, example, target), prepared.fabric, channels_last=settings.hardware.channels_last
    )
    task = prepared.task
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
        checkpoint=work / f"seed{settings.seed}-{target}.pt",
        console=console,
        label="torch-pruning",
    )
    macs, dense_macs = count_macs(small, (example,)), count_macs(prepared.dense, (example,))
    return {
        "method": "torch_pruning",
        "target": target,
        "seed": settings.seed,
        "landed_accuracy": landed,
        "accuracy": history[-1].accuracy,
        "test_accuracy": evaluate(small, prepared.test, fabric=prepared.fabric, task=task).accuracy
        if settings.test
        else None,
        "dense_accuracy": evaluate(prepared.dense, prepared.validation, fabric=prepared.fabric, task=task).accuracy,
        "macs": macs,
        "dense_macs": dense_macs,
        "macs_ratio": macs / dense_macs,
        "params": sum(p.numel() for p in small.parameters()),
        "epochs": settings.cycle.epochs,
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results/cifar10/torch_pruning.csv")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/torch-pruning", help="folder of the checkpoints")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/dense", help="folder of the dense weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in nas-gate search")
    arguments = parser.parse_intermixed_args()
    console = Console()
    rows = pd.read_csv(arguments.output).to_dict("records") if arguments.output.exists() else []
    done = {(row["target"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        settings = settings_of(composed([*arguments.overrides, f"seed={seed}"]))
        wanted = [target for target in arguments.targets if (target, seed) not in done]
        if not wanted:
            continue
        prepared = prepare(settings)
        train_dense(settings, prepared, arguments.cache, console)
        for target in wanted:
            rows.append(candidate(settings, prepared, target, arguments.work, console))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(arguments.output, index=False)
            _environment.write(arguments.output.with_suffix(".json"), overrides=arguments.overrides)


if __name__ == "__main__":
    main()
