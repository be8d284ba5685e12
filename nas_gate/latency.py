"""Latency of networks on this machine's processor, in PyTorch and in ONNX Runtime, and the record of it."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nas_gate.files import write_text

RECORD = "latency.json"
ONNX_RUNTIME = "ONNX Runtime"

# How often a latency is measured: after a warm-up, until `SECONDS` have passed, but within these counts.
WARM_UP, FEWEST, MOST, SECONDS = 3, 7, 300, 1.0

Network = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Latency:
    """Medians of one batch's latency and their interquartile ranges, in milliseconds, over `repetitions`."""

    runtime: str
    batch: int
    threads: int
    dense_ms: float
    dense_iqr_ms: float
    candidate_ms: float
    candidate_iqr_ms: float
    repetitions: int

    @property
    def ratio(self) -> float:
        """The candidate's latency as a share of the dense network's."""
        return self.candidate_ms / self.dense_ms


def batch(shape: tuple[int, ...], size: int) -> Tensor:
    """Standard normal inputs, the same at every call."""
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


def open_onnx(path: Path, threads: int = 0) -> Network:
    """An ONNX Runtime session on the CPU; with 0 threads it takes as many as it likes."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # idle threads of one session would otherwise spin on the cores that the next one is measured on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {"input": x.numpy()})]

    return run


def measure_torch(
    dense: Network,
    network: Network,
    shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
) -> list[Latency]:
    """Latencies of both networks in PyTorch on the CPU; the thread count is as before afterwards."""
    latencies = []
    for count in threads:
        with thread_count(count), torch.inference_mode():
            latencies += [_latency("PyTorch", dense, network, batch(shape, n), count) for n in batch_sizes]
    return latencies


def measure_onnx(
    dense: Path,
    network: Path,
    shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
) -> list[Latency]:
    """Latencies of two ONNX files in ONNX Runtime on the CPU."""
    latencies = []
    for count in threads:
        sessions = open_onnx(dense, count), open_onnx(network, count)
        latencies += [_latency(ONNX_RUNTIME, *sessions, batch(shape, n), count) for n in batch_sizes]
    return latencies


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Compute with so many threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _latency(runtime: str, dense: Network, network: Network, x: Tensor, threads: int) -> Latency:
    dense_ms, network_ms = take_turns([lambda: dense(x), lambda: network(x)])
    return Latency(
        runtime,
        len(x),
        threads,
        *(median(dense_ms), _spread(dense_ms)),
        *(median(network_ms), _spread(network_ms)),
        repetitions=len(dense_ms),
    )


def _spread(values: Sequence[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def take_turns(functions: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of every call of each function, after a warm-up.

    The functions take turns, so that whatever else the machine does meets all of them alike.
    """
    for _ in range(WARM_UP):
        for function in functions:
            function()
    taken: list[list[float]] = [[] for _ in functions]
    start = perf_counter()
    while len(taken[0]) < FEWEST or (len(taken[0]) < MOST and perf_counter() - start < SECONDS):
        for function, times in zip(functions, taken):
            before = perf_counter()
            function()
            times.append(1e3 * (perf_counter() - before))
    return taken


def not_followed(latencies: Sequence[Latency], macs_ratio: float, pad_to: int = 1) -> tuple[str, ...]:
    """A sentence for every latency that fell by less than half of what MACs did, and one of advice where there is any.

    ONNX Runtime lays channels out in blocks of 8 (AVX2) or 16 (AVX-512, Arm) and fills the last block up, but not where
    an input has more channels than a block and no multiple of 4 (its NCHWc transformer, version 1.32): convolutions of
    such take several times as long per MAC.
    """
    slow = [each for each in latencies if macs_ratio < 1 and each.ratio > macs_ratio + (1 - macs_ratio) / 2]
    padding = "export with --pad-to 8 (the same function), or " if pad_to == 1 else ""
    advice = (
        "ONNX Runtime is quickest where channels are multiples of 8 (16 is better with AVX-512): "
        f"{padding}search with round_to=8"
    )
    return (
        *(
            f"latency did not follow MACs: {each.runtime}, batch {each.batch}, {threads_text(each.threads)}: "
            f"{each.ratio:.1%} of the dense latency, with {macs_ratio:.1%} of the MACs"
            for each in slow
        ),
        *((advice,) if any(each.runtime == ONNX_RUNTIME for each in slow) else ()),
    )


def threads_text(count: int) -> str:
    """So many threads, for people."""
    return f"{count} thread{'s' if count > 1 else ''}"


def processor() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def machine() -> str:
    """What latencies depend on, besides the networks."""
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} logical cores"


def measured_on() -> str:
    """The machine, with its processor's own name: latencies of two processors do not compare."""
    return f"{processor()}, {machine()}"


def save(folder: Path, latencies: Sequence[Latency], versions: Mapping[str, str], pad_to: int = 1) -> Path:
    """Leave latencies in a candidate's folder, for `nas_gate.collect`; those of a measurement before are replaced.

    `pad_to` is what the measured network's channels were padded to.
    """
    path = folder / RECORD
    record = {
        "machine": measured_on(),
        "versions": dict(versions),
        "pad_to": pad_to,
        "latencies": [asdict(each) for each in latencies],
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path
