"""Does latency follow MACs, is it predicted rightly, and do counts that are multiples of 8 help?

    python benchmarks/latency.py                       # into results/latency/{prediction,speed}.csv and latency.md
    python benchmarks/latency.py --models resnet20     # some networks only
    python benchmarks/latency.py --quick --output runs/latency      # few candidates, to see that it works

Networks for 32x32 images with random weights, cut by random gate weights: latency does not depend on what is learned.

  prediction   `measure_latency` once for a network (batch 1, one thread); then candidates at targets from 0.2 to 0.9 of
               the MACs, half of them with `round_to=8`, in PyTorch: predicted / measured - 1 for each
  speed        one candidate at half of the MACs for `round_to` 1 and 8 each: its measured latency over the dense
               network's, beside its MACs over the dense ones, in PyTorch and ONNX Runtime, batch 1 and 128, one thread

Dense network and candidate take turns. Run it on a machine that does nothing else: the load at the start is recorded,
as are hardware, versions, seed and command.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _environment
import numpy as np
import pandas as pd
import torch
from torch import nn

import nas_gate
from nas_gate import models
from nas_gate.latency import Latency, batch, measure_onnx, measure_torch
from nas_gate.measuring import fastest, on_processor

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
SHAPE = (3, 32, 32)
MODELS = ("resnet20", "resnet56", "cifar_mobilenet_v2", "cifar_vgg16_bn")
BATCHES = (1, 128)


def cut(gated: nas_gate.GatedModel, target: float, round_to: int, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A candidate by random gate weights, and its keep."""
    torch.nn.init.normal_(gated.gates.weight, generator=torch.Generator().manual_seed(seed))
    keep = nas_gate.land(gated, target, round_to=round_to)
    return nas_gate.remove_with_proof(gated, keep).model, keep


def prediction(name: str, gated: nas_gate.GatedModel, candidates: int) -> list[dict[str, Any]]:
    """Rows: predicted and measured milliseconds of some candidates."""
    gated.add_latency(nas_gate.measure_latency(gated))
    dense, example = on_processor(gated.model), (batch(SHAPE, 1),)
    rows = []
    for index, target in enumerate(np.linspace(0.2, 0.9, candidates)):
        round_to = 8 if index % 2 else 1
        small, keep = cut(gated, float(target), round_to, SEED + index)
        dense_ms, measured = fastest([dense, on_processor(small)], example, {}, threads=1)
        predicted = float(gated.cost(keep, "latency_ms"))
        rows.append(
            {
                "model": name,
                "target": round(float(target), 3),
                "round_to": round_to,
                "macs_ratio": round(float(gated.cost.share(keep.float(), "macs")), 4),
                "dense_ms": round(dense_ms, 3),
                "measured_ms": round(measured, 3),
                "predicted_ms": round(predicted, 3),
                "error": round(predicted / measured - 1, 4),
            }
        )
        note(str(rows[-1]))
    return rows


def onnx_file(network: nn.Module, size: int, path: Path) -> Path:
    """The network for batches of `size` as an ONNX file."""
    torch.onnx.export(network, (batch(SHAPE, size),), path, input_names=["input"], dynamo=True, verbose=False)
    return path


def speed(name: str, gated: nas_gate.GatedModel, folder: Path) -> list[dict[str, Any]]:
    """Rows: latency ratios at half of the MACs."""
    dense = on_processor(gated.model).eval()
    rows = []
    for round_to in (1, 8):
        small, keep = cut(gated, 0.5, round_to, SEED)
        small = on_processor(small).eval()
        latencies: list[Latency] = measure_torch(dense, small, SHAPE, BATCHES, (1,))
        for size in BATCHES:
            files = [onnx_file(n, size, folder / f"{i}.onnx") for i, n in enumerate((dense, small))]
            latencies += measure_onnx(*files, SHAPE, (size,), (1,))
        for each in latencies:
            rows.append(
                {
                    "model": name,
                    "round_to": round_to,
                    "runtime": each.runtime,
                    "batch": each.batch,
                    "macs_ratio": round(float(gated.cost.share(keep.float(), "macs")), 4),
                    "latency_ratio": round(each.ratio, 4),
                    "dense_ms": round(each.dense_ms, 3),
                    "candidate_ms": round(each.candidate_ms, 3),
                    "candidate_iqr_ms": round(each.candidate_iqr_ms, 3),
                }
            )
            note(str(rows[-1]))
    return rows


def table(predictions: pd.DataFrame, speeds: pd.DataFrame) -> str:
    """Both results in short, as Markdown."""
    lines = ["| prediction error | candidates | median | median of its size | largest |", "|---|---|---|---|---|"]
    for name, rows in predictions.groupby("model", sort=False):
        error = rows["error"]
        worst = error.iloc[int(error.abs().argmax())]
        lines.append(f"| {name} | {len(rows)} | {error.median():+.1%} | {error.abs().median():.1%} | {worst:+.1%} |")
    lines += ["", "| latency ratio at half of the MACs | batch | any counts | multiples of 8 |", "|---|---|---|---|"]
    for (name, runtime, size), rows in speeds.groupby(["model", "runtime", "batch"], sort=False):
        any_, eight = (rows[rows["round_to"] == n].iloc[0] for n in (1, 8))
        cells = [f"{r['latency_ratio']:.2f} (MACs {r['macs_ratio']:.2f})" for r in (any_, eight)]
        lines.append(f"| {name}, {runtime} | {size} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def note(text: str) -> None:
    """Say on the terminal how far it is."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="few candidates; the numbers mean little")
    parser.add_argument("--output", type=Path, default=ROOT / "results/latency")
    parsed = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load = [round(v, 2) for v in os.getloadavg()]
    if load[0] > 0.5:
        note(f"the machine is busy (load {load[0]}); the numbers will be off")
    environment = _environment.describe(seed=SEED, threads=1, load_at_start=load)
    predictions: list[dict[str, Any]] = []
    speeds: list[dict[str, Any]] = []
    parsed.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in parsed.models:
            torch.manual_seed(SEED)
            gated = nas_gate.attach(models.build(name).eval(), torch.randn(1, *SHAPE))
            predictions += prediction(name, gated, 3 if parsed.quick else 16)
            speeds += speed(name, gated, Path(folder))
            frames = pd.DataFrame(predictions), pd.DataFrame(speeds)
            for stem, frame in zip(("prediction", "speed"), frames):
                frame.to_csv(parsed.output / f"{stem}.csv", index=False)
            (parsed.output / "latency.md").write_text(table(*frames))
    _environment.save(parsed.output / "latency.json", environment)
    print(table(*frames), end="")


if __name__ == "__main__":
    main()
