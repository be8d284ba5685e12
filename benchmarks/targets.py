"""What several targets in one descent cost and give, against a search for each.

    python benchmarks/targets.py                     # seeds 0, 1, 2; into results/targets/targets.{csv,json,md}
    python benchmarks/targets.py --quick --output runs/targets     # two targets, one seed, few epochs: does it work?
    python benchmarks/targets.py --seeds 0 1 model=resnet20 data=cifar10 experiment=cifar10

The same settings twice: once with `targets` (one gated training in legs, a candidate at the end of each, see
`nas_gate.search`), and once as a search of its own for each target. Both start from the same dense weights, trained
once for each seed and not counted. Every candidate has the epochs of the whole cycle behind it either way; the search
for one target has all gated epochs for it, the descent a share of them. Accuracies are compared target by target
within a seed; test accuracy is measured once for each candidate and decides nothing. Working files lie in
`runs/benchmark-targets`, from where an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import _environment
import pandas as pd
import torch
from rich.console import Console

from nas_gate.cli import composed, settings_of
from nas_gate.search import Settings, search

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (0.7, 0.5, 0.35, 0.25)
FIGURES = ("accuracy", "test_accuracy", "macs_ratio", "max_relative_error")


def rows(settings: Settings, folder: Path, cache_dir: Path, console: Console) -> list[dict[str, Any]]:
    """The candidates of one trial, each with the epochs and the seconds of training that it took."""
    result = search(settings, folder, cache_dir=cache_dir, console=console)
    found, gated_before = [], 0.0
    for leg, name in zip(settings.legs(), result.get("candidates", ["."])):
        one = json.loads((folder / name / "result.json").read_text())
        found.append(
            {
                "seed": settings.seed,
                "way": "search" if settings.targets is None else "descent",
                "target": leg.target,
                **{name: one[name] for name in FIGURES},
                "dense_accuracy": one["dense_accuracy"],
                "epochs": settings.cycle.epochs - leg.begin,  # gated ones of its own leg, and its fine-tuning
                "seconds": round(one["seconds_gated"] - gated_before + one["seconds_finetuned"], 2),
            }
        )
        gated_before = one["seconds_gated"]
    return found


def compared(table: pd.DataFrame) -> dict[str, Any]:
    """Costs of both ways, mean over seeds, and what the descent gains at each target (pairs of one seed)."""
    costs = table.groupby(["way", "seed"])[["epochs", "seconds"]].sum().groupby("way").mean()
    summary: dict[str, Any] = {
        name: {
            "descent": round(float(costs.loc["descent", name]), 1),
            "searches": round(float(costs.loc["search", name]), 1),
            "ratio": round(float(costs.loc["descent", name] / costs.loc["search", name]), 4),
        }
        for name in ("epochs", "seconds")
    }
    pairs = table.pivot(index=["target", "seed"], columns="way", values=["accuracy", "test_accuracy"])
    summary["targets"] = {}
    for target in sorted(table["target"].unique(), reverse=True):
        at = pairs.loc[target]
        entry: dict[str, Any] = {"seeds": len(at)}
        for name in ("accuracy", "test_accuracy"):
            gain = at[name]["descent"] - at[name]["search"]
            entry[name] = {
                "descent": round(float(at[name]["descent"].mean()), 4),
                "search": round(float(at[name]["search"].mean()), 4),
                "gain": round(float(gain.mean()), 4),
                "gain_std": round(float(gain.std(ddof=1)), 4) if len(gain) > 1 else None,
            }
        summary["targets"][str(target)] = entry
    return summary


def markdown(summary: dict[str, Any], environment: dict[str, Any]) -> str:
    """The summary as a table, with what it was measured on."""
    lines = ["# Several targets in one descent, against a search for each", ""]
    lines += ["| target | validation: search | descent | gain | test: search | descent | gain |", "|" + "---|" * 7]
    for target, entry in summary["targets"].items():
        cells = [target]
        for name in ("accuracy", "test_accuracy"):
            one = entry[name]
            spread = "" if one["gain_std"] is None else f" ± {100 * one['gain_std']:.2f}"
            cells += [f"{one['search']:.2%}", f"{one['descent']:.2%}", f"{100 * one['gain']:+.2f}{spread}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Means over seeds; gains in percentage points, with the standard deviation of the pairs.", ""]
    lines += ["| all targets, per seed | searches | descent | ratio |", "|---|---|---|---|"]
    for name in ("epochs", "seconds"):
        one = summary[name]
        lines.append(f"| {name} | {one['searches']:g} | {one['descent']:g} | {one['ratio']:.3f} |")
    lines += [
        "",
        "Without the dense network, which both take from the cache. Epochs are exact; seconds are those of a machine "
        f"with a load of {environment['load_at_start'][0]} on {environment['cores']} cores at the start.",
        "",
        f"`{environment['command']}`, seeds {environment['seeds']}, {environment['processor']} "
        f"({environment['threads']} threads), torch {environment['versions']['torch']}, commit "
        f"{environment['commit']}, {environment['started']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--quick", action="store_true", help="two targets, one seed, few epochs; the numbers mean little"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results/targets", help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmark-targets", help="folder of the trials")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in nas-gate search")
    arguments = parser.parse_intermixed_args()
    seeds, targets = ([0], TARGETS[:2]) if arguments.quick else (arguments.seeds, TARGETS)
    overrides = [*(["experiment=debug"] if arguments.quick else []), *arguments.overrides]
    load, threads = [round(v, 2) for v in os.getloadavg()], torch.get_num_threads()
    environment = _environment.describe(seeds=seeds, overrides=overrides, threads=threads, load_at_start=load)
    console = Console()
    table: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds):
        settings = settings_of(composed([*overrides, f"seed={seed}"]))
        trials = [("descent", replace(settings, targets=targets))]
        trials += [(f"search-{target}", replace(settings, target=target)) for target in targets]
        for name, trial in trials[
            :: 1 if number % 2 == 0 else -1
        ]:  # in turns, so that neither way has the cool machine
            work = arguments.work / ("quick" if arguments.quick else "whole")
            table += rows(trial, work / f"{name}-seed{seed}", work / "dense", console)
    frame = pd.DataFrame(table).sort_values(["seed", "way", "target"], ascending=[True, True, False])
    summary = compared(frame)
    arguments.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.output / "targets.csv", index=False)
    record = {**summary, "environment": environment}
    (arguments.output / "targets.json").write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(summary, environment)
    (arguments.output / "targets.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
