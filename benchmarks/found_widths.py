r"""What gates learn, taken apart: networks cut at once, without gated epochs, and trained as a baseline's.

    python benchmarks/found_widths.py --runs runs/studies/NAME/0 --output widths.csv experiment=cifar10_16x16 \
        data.root=DIR
    python benchmarks/found_widths.py --targets 0.5 0.25 --output widths.csv experiment=cifar10_short data.root=DIR

With `--runs` the dense network is cut to as many units of every group as a run's candidate kept, those of the largest
mean |w|. Against the candidate itself it tells what the gated epochs cost, against `method=uniform` what the widths
gain. With `--targets` it is cut in the order in which gates begin (`training.gating.spread`), before they have learned
anything: against a search it tells what learning adds to it. Either is trained over the whole cycle
(`training.cycle.epochs=8`: a shorter one). Dense weights come from the same cache. One line per network in `--output`;
what stands there is not done again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _trained import example_of, rows_of, trained, write_rows
from rich.console import Console
from torch import Tensor

from nas_gate import candidate
from nas_gate.baselines import spread_gates, uniform
from nas_gate.cli import composed, settings_of
from nas_gate.folders import file_name
from nas_gate.padding import keep_of
from nas_gate.prepare import Prepared, decide, prepare
from nas_gate.removal import remove_units
from nas_gate.search import Settings, sensed, train_dense


def widths_of(run: Path, prepared: Prepared) -> Tensor:
    """The boolean keep of as many units of every group as the run's candidate has, by their place in l1's order."""
    structure = prepared.gated.structure
    cut = candidate.read(run / "candidate").cut
    share = structure.open_units(keep_of(structure, cut)) / np.array([g.size for g in structure.groups])
    return torch.from_numpy(uniform(structure, prepared.dense) > (1 - share)[structure.group_of_unit()])


def start_at(target: float, settings: Settings, prepared: Prepared) -> Tensor:
    """The boolean keep that gates land on for a target which have learned nothing yet."""
    gated = prepared.gated
    gated.model.load_state_dict(prepared.dense.state_dict())
    spread_gates(gated, settings.gating.spread, sensed(settings, prepared, Path()), settings.metric)
    return decide(settings, gated, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of finished trials")
    parser.add_argument("--targets", type=float, nargs="+", default=[], help="shares of the MACs to cut to")
    parser.add_argument("--output", type=Path, required=True, help="the CSV")
    parser.add_argument("--work", type=Path, default=Path("runs/found-widths"), help="folder of the checkpoints")
    parser.add_argument("--cache", type=Path, default=Path("runs/dense"), help="folder of the dense weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in nas-gate search")
    arguments = parser.parse_intermixed_args()
    if not arguments.runs and not arguments.targets:
        parser.error("name --runs or --targets")
    console, settings = Console(), settings_of(composed(arguments.overrides))
    rows = rows_of(arguments.output)
    prepared = prepare(settings)
    train_dense(settings, prepared, arguments.cache, console)
    cuts = {str(run): partial(widths_of, run, prepared) for run in arguments.runs}
    cuts |= {f"start at {target}": partial(start_at, target, settings, prepared) for target in arguments.targets}
    for name, keep in cuts.items():
        key = (name, settings.cycle.epochs, settings.seed)
        if key in {(row["widths_of"], row["epochs"], row["seed"]) for row in rows}:
            continue
        small = remove_units(prepared.dense, prepared.gated.structure, keep(), (example_of(prepared),), {}).model
        checkpoint = arguments.work / f"{file_name('-'.join(map(str, key)))}.pt"
        row = trained(small, settings, prepared, checkpoint, console)
        rows.append({"widths_of": name, "seed": settings.seed} | row)
        write_rows(rows, arguments.output, arguments.overrides)


if __name__ == "__main__":
    main()
