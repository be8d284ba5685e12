r"""Torch-Pruning through our own training: the peer's candidates for `results/cifar10`.

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
from pathlib import Path

import torch
import torch_pruning
from _trained import example_of, rows_of, trained, write_rows
from rich.console import Console
from torch import nn

from nas_gate.cli import composed, settings_of
from nas_gate.cost import count_macs
from nas_gate.prepare import prepare
from nas_gate.search import train_dense

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
    rows = rows_of(arguments.output)
    done = {(row["target"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        settings = settings_of(composed([*arguments.overrides, f"seed={seed}"]))
        wanted = [target for target in arguments.targets if (target, seed) not in done]
        if not wanted:
            continue
        prepared = prepare(settings)
        train_dense(settings, prepared, arguments.cache, console)
        for target in wanted:
            small = pruned(prepared.dense, example_of(prepared), target)
            checkpoint = arguments.work / f"seed{seed}-{target}.pt"
            row = {"method": "torch_pruning", "target": target, "seed": seed}
            rows.append(row | trained(small, settings, prepared, checkpoint, console))
            write_rows(rows, arguments.output, arguments.overrides)


if __name__ == "__main__":
    main()
