"""What early stopping saves and costs: the recorded histories of a study, replayed under several rules.

    nas-gate search --multirun +sweep=digits
    python benchmarks/early_stopping.py runs/studies/digits

Trials are taken in the order of their numbers. Each is followed epoch by epoch, against those before it that were not
stopped, under the same `EarlyStopping.stops` that a study uses. Saved: the share of all gated and fine-tuning epochs
after which a trial was stopped. Lost: the share of the front's hypervolume that the stopped trials held, with the
reference at accuracy 0 and the dense network's MACs. What a sampler would have drawn with fewer results is not known to
a replay. Results go to results/early_stopping/early_stopping.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import _environment

from nas_gate.pareto import hypervolume
from nas_gate.study.early_stopping import EarlyStopping

ROOT = Path(__file__).resolve().parent.parent
RULES = [EarlyStopping(margin, rivals, 3) for margin, rivals in product((0.0, 0.01, 0.02, 0.05), (1, 3))]


@dataclass(frozen=True)
class Recorded:
    """A finished trial: (stage, epoch, accuracy, MACs) after each epoch, and its result."""

    number: int
    moments: tuple[tuple[str, int, float, float], ...]
    accuracy: float
    macs: float
    dense_macs: float


def read(study: Path) -> list[Recorded]:
    """The finished trials of a study whose target counts MACs, by number."""
    folders = sorted((path for path in study.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    return [recorded(folder) for folder in folders if (folder / "result.json").exists()]


def recorded(folder: Path) -> Recorded:
    result, history = (json.loads((folder / name).read_text()) for name in ("result.json", "history.json"))
    assert result["metric"] == "macs", folder
    moments = []
    for epoch in history["gated"]:
        moments.append(("gated", epoch["epoch"], epoch["accuracy"], epoch["figures"]["cost"] * result["dense_macs"]))
    for epoch in history["finetuned"]:
        moments.append(("finetuned", epoch["epoch"], epoch["accuracy"], result["macs"]))
    return Recorded(int(folder.name), tuple(moments), result["accuracy"], result["macs"], result["dense_macs"])


def replay(trials: list[Recorded], rule: EarlyStopping) -> dict[str, Any]:
    """Who is stopped under `rule`, the epochs saved and the hypervolume lost, as shares."""
    kept: list[Recorded] = []
    stopped, run, whole = [], 0, 0
    for trial in trials:
        whole += len(trial.moments)
        for place, (stage, epoch, accuracy, macs) in enumerate(trial.moments):
            others = [m[2:] for other in kept for m in other.moments if m[:2] == (stage, epoch)]
            if rule.stops(epoch, accuracy, macs, others):
                stopped.append(trial.number)
                run += place + 1
                break
        else:
            kept.append(trial)
            run += len(trial.moments)
    return {
        **asdict(rule),
        "stopped": stopped,
        "epochs_saved": 1 - run / whole,
        "hypervolume_lost": 1 - volume(kept) / volume(trials),
    }


def volume(trials: list[Recorded]) -> float:
    points = [(trial.accuracy, trial.macs) for trial in trials]
    return hypervolume(points, (0.0, max(trial.dense_macs for trial in trials)), (True, False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "early_stopping" / "early_stopping.json")
    options = parser.parse_args()
    trials = read(options.study)
    rows = [replay(trials, rule) for rule in RULES]
    epochs = sum(len(trial.moments) for trial in trials)
    definition = json.loads((options.study / "study.json").read_text())
    sys.argv[1:2] = [f"runs/studies/{options.study.name}"]
    _environment.write(options.output, study=definition, trials=len(trials), epochs=epochs, rows=rows)
    lines = [
        f"{len(trials)} finished trials, {epochs} epochs",
        "",
        "| margin | rivals | grace | trials stopped | epochs saved | hypervolume lost |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost = f"{row['epochs_saved']:.1%} | {row['hypervolume_lost']:.2%}"
        lines.append(f"| {row['margin']} | {row['rivals']} | {row['grace']} | {len(row['stopped'])} | {lost} |")
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
