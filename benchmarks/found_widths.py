r"""What the widths that gates have found are worth, apart from how gates train: cut and trained as a baseline's.

    python benchmarks/found_widths.py --runs runs/studies/NAME/0 --output widths.csv experiment=cifar10_16x16 \
        data.root=DIR

The dense network is cut at once to as many units of every group as the candidate kept, those of the largest mean |w|,
and trained over the whole cycle (`training.cycle.epochs=8`: a shorter one). Against the candidate itself it tells what
the gated epochs cost, against `method=uniform` what the widths gain. Dense weights come from the same cache. One line
per candidate in `--output`; what stands there is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _environment
import numpy as np
import pandas as pd
import torch
from _trained import example_of, trained
from rich.console import Console

from nas_gate import candidate
from nas_gate.baselines import uniform
from nas_gate.cli import composed, settings_of
from nas_gate.padding import keep_of
from nas_gate.prepare import prepare
from nas_gate.removal import remove_units
from nas_gate.search import train_dense


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished trials")
    parser.add_argument("--output", type=Path, required=True, help="the CSV")
    parser.add_argument("--work", type=Path, default=Path("runs/found-widths"), help="folder of the checkpoints")
    parser.add_argument("--cache", type=Path, default=Path("runs/dense"), help="folder of the dense weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in nas-gate search")
    arguments = parser.parse_intermixed_args()
    console, settings = Console(), settings_of(composed(arguments.overrides))
    rows: list[Any] = pd.read_csv(arguments.output).to_dict("records") if arguments.output.exists() else []
    prepared = prepare(settings)
    train_dense(settings, prepared, arguments.cache, console)
    structure, example = prepared.gated.structure, example_of(prepared)
    for run in arguments.runs:
        found, key = candidate.read(run / "candidate"), (str(run), settings.cycle.epochs, settings.seed)
        if key in {(row["widths_of"], row["epochs"], row["seed"]) for row in rows}:
            continue
        # by their place in l1's order, the same number of every group
        share = structure.open_units(keep_of(structure, found.cut)) / np.array([g.size for g in structure.groups])
        place = uniform(structure, prepared.dense)
        keep = torch.from_numpy(place > (1 - share)[structure.group_of_unit()])
        small = remove_units(prepared.dense, structure, keep, (example,), {}).model
        name = "-".join([*run.parts[-2:], str(settings.cycle.epochs), str(settings.seed)])
        row = trained(small, settings, prepared, arguments.work / f"{name}.pt", console)
        rows.append({"widths_of": str(run), "seed": settings.seed} | row)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(arguments.output, index=False)
        _environment.write(arguments.output.with_suffix(".json"), overrides=arguments.overrides)


if __name__ == "__main__":
    main()
