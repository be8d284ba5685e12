"""Where does a candidate's time go? By kind of operation, in PyTorch and ONNX Runtime, batch 1 and 128.

    python benchmarks/profile_latency.py runs/a/candidate runs/b/candidate         # into results/cifar10/profile.csv
    python benchmarks/profile_latency.py CANDIDATE... --output runs/profile.csv

Rows: the dense network, every candidate, and every candidate with its channels padded to multiples of 8 (`nas-gate
export --pad-to 8`). Milliseconds of one pass on one thread, the median over passes of each operation, in:

  blocked        convolutions that ONNX Runtime computes in blocks of channels
  convolution    all others
  reorder        from and to blocks
  other          norms, activations, additions, pooling, the classifier
  outside        in PyTorch what is left of a pass: Python and dispatch

Run it on a machine that does nothing else. Hardware, versions and command are recorded beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import _environment
import onnx
import onnxruntime
import pandas as pd
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nas_gate
from nas_gate import models
from nas_gate.candidate import read
from nas_gate.latency import batch
from nas_gate.measuring import on_processor
from nas_gate.padding import padded

ROOT = Path(__file__).resolve().parent.parent
PASSES = {1: 200, 128: 20}
KINDS = ("blocked", "convolution", "reorder", "other", "outside")


def in_onnx_runtime(network: nn.Module, shape: tuple[int, ...], size: int, folder: Path) -> dict[str, float]:
    """Milliseconds by kind."""
    path, optimized = folder / "model.onnx", folder / "optimized.onnx"
    torch.onnx.export(network, (batch(shape, size),), path, input_names=["input"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(PASSES[size]):
        session.run(None, {"input": batch(shape, size).numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    domains = {node.name: node.domain for node in onnx.load(optimized).graph.node}
    taken: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, op = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            kinds[name] = "blocked" if "nchwc" in domains[name] and op == "Conv" else op
            taken[name].append(event["dur"] / 1e3)
    named = {"Conv": "convolution", "FusedConv": "convolution", "ReorderInput": "reorder", "ReorderOutput": "reorder"}
    found = dict.fromkeys(KINDS, 0.0)
    for name, times in taken.items():
        kind = named.get(kinds[name], kinds[name])
        found[kind if kind in KINDS else "other"] += statistics.median(times)
    return found


def in_pytorch(network: nn.Module, shape: tuple[int, ...], size: int) -> dict[str, float]:
    """Milliseconds by kind: the profiler's shares of operations, of a pass that is timed without it."""
    x = batch(shape, size)
    with torch.inference_mode():
        for _ in range(3):
            network(x)
        passes = []
        for _ in range(PASSES[size]):
            begin = perf_counter()
            network(x)
            passes.append(1e3 * (perf_counter() - begin))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(PASSES[size]):
                network(x)
    found = dict.fromkeys(KINDS, 0.0)
    kernels = {"aten::mkldnn_convolution", "aten::thnn_conv2d", "aten::_slow_conv2d_forward"}
    for event in profiler.key_averages():
        milliseconds = event.self_cpu_time_total / 1e3 / PASSES[size]
        if event.key in kernels:
            found["convolution"] += milliseconds
        elif event.key in {"aten::native_batch_norm", "aten::add", "aten::add_", "aten::clamp_min", "aten::clamp_min_",
                           "aten::relu", "aten::relu_", "aten::mean", "aten::sum", "aten::addmm"}:  # fmt: skip
            found["other"] += milliseconds
    found["outside"] = max(0.0, statistics.median(passes) - found["convolution"] - found["other"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", type=Path, metavar="CANDIDATE")
    parser.add_argument("--output", type=Path, default=ROOT / "results/cifar10/profile.csv")
    parsed = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    environment = _environment.describe(threads=1, load_at_start=[round(v, 2) for v in os.getloadavg()])
    first = read(parsed.candidates[0])
    shape = tuple(first.provenance["input_shape"])

    def dense() -> nn.Module:
        return models.build(first.model["name"], **first.model["arguments"]).eval()

    networks = {("dense", 1): dense()}
    for folder in parsed.candidates:
        record, network = read(folder), nas_gate.load(folder)
        if record.model != first.model:
            parser.error(f"all candidates must be of one model, but {folder} is of {record.model}")
        networks[str(folder), 1] = network
        networks[str(folder), 8] = padded(dense(), network, record.cut, batch(shape, 1), 8)
    x = batch(shape, 1)
    whole = nas_gate.count_macs(networks["dense", 1], (x,))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for (name, pad_to), network in networks.items():
            macs = nas_gate.count_macs(network, (x,)) / whole
            network = on_processor(network).eval()
            for size in PASSES:
                for runtime, found in (
                    ("PyTorch", in_pytorch(network, shape, size)),
                    ("ONNX Runtime", in_onnx_runtime(network, shape, size, Path(scratch))),
                ):
                    figures = {"macs": round(macs, 4), "total": round(sum(found.values()), 4)}
                    figures |= {kind: round(value, 4) for kind, value in found.items()}
                    rows.append({"network": name, "pad_to": pad_to, "runtime": runtime, "batch": size, **figures})
    table = pd.DataFrame(rows)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(parsed.output, index=False)
    _environment.save(parsed.output.with_suffix(".json"), environment)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
