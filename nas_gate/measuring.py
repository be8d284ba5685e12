"""Latency tables, measured: every operation of a network alone, over its widths, and two whole networks."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas_gate.files import write_text
from nas_gate.gating import GatedModel, plain
from nas_gate.latency import machine, processor, take_turns, thread_count
from nas_gate.latency_table import Grid, LatencyTable, Operation, from_json, grid_from, to_json
from nas_gate.operations import Progress, Sized, read, run_all
from nas_gate.removal import smaller
from nas_gate.structure.trace import mode_of

# How long one operation at one point is measured: after a warm-up, for so many milliseconds, but at least so often.
WARM_UP, MILLISECONDS, FEWEST = 2, 15.0, 3

ROUNDS = 7
"""How often the two whole networks are measured so, spread evenly over the measuring of the operations."""


def on_stderr(what: str, done: int, total: int) -> None:
    """Say on the terminal how far it is; nowhere else."""
    if sys.stderr.isatty():
        print(f"\rlatency: {what}: {done} of {total}\x1b[K", end="\n" if done == total else "", file=sys.stderr)


def measure_latency(
    gated: GatedModel,
    file: str | os.PathLike[str] | None = None,
    inputs: tuple[Any, ...] | None = None,
    threads: int = 1,
    progress: Progress = on_stderr,
) -> LatencyTable:
    """The latency table of a network on this machine's processor, in PyTorch's eager mode.

    Args:
        gated: the network; it is left alone, on whatever device it is.
        file: where the table is kept. It is written after every operation, so that nothing is lost by an interrupt,
            and a finished one is returned at once.
        inputs: positional arguments that the network is timed on (default: the example inputs). Their batch size is
            the one that the latency is for.
        threads: how many the network is timed with; the thread count is as before afterwards.
        progress: told how far it is.

    Raises ValueError where the file is no table, or one of another machine, torch, thread count, input or network.
    """
    identity = identify(gated, inputs, threads)
    model, structure = on_processor(plain(gated.model)), gated.structure
    args, kwargs = _arguments(gated, inputs)
    path = None if file is None else Path(file)
    known = _known(path, identity)
    if isinstance(known, LatencyTable):
        return known
    grids = dict(known)
    sized = read(model, structure, args, kwargs, progress)
    names = [each.name() for each in sized]
    left = {name: each for name, each in zip(names, sized) if name not in grids}
    networks = [model, smaller(model, structure, structure.thinnest(), args, kwargs)[0]]
    whole = [partial(network, *args, **kwargs) for network in networks]
    # between the operations, so that a moment at which the machine is busy meets neither all rounds nor these alone
    moments = [len(left) * k // (ROUNDS - 1) for k in range(ROUNDS)]
    with _running(networks, threads):
        rounds = [list(map(_fastest, whole)) for _ in range(moments.count(0))]
        for done, (name, each) in enumerate(left.items(), 1):
            progress("measuring operations", len(set(names) & grids.keys()), len(set(names)))
            grids[name] = _measured(each)
            if path is not None:
                unfinished = {n: asdict(g) for n, g in grids.items()}
                write_text(path, json.dumps({"identity": identity, "unfinished": unfinished}))
            rounds += [list(map(_fastest, whole)) for _ in range(moments.count(done))]
        progress("measuring operations", len(set(names)), len(set(names)))
    dense_ms, thinnest_ms = map(min, zip(*rounds))
    table = LatencyTable(
        identity=identity,
        groups={g.name: g.size for g in structure.groups},
        operations=tuple(Operation(n, each.axes(), each.needs) for n, each in zip(names, sized)),
        grids={name: grids[name] for name in dict.fromkeys(names)},
        dense_ms=dense_ms,
        thinnest_ms=thinnest_ms,
        absent=tuple(np.flatnonzero(structure.open_units(structure.dense()) == 0).tolist()),
    )
    if path is not None:
        write_text(path, to_json(table))
    return table


def identify(gated: GatedModel, inputs: tuple[Any, ...] | None = None, threads: int = 1) -> dict[str, Any]:
    """What the figures of a table belong to, as JSON holds it; the arguments are those of `measure_latency`."""
    if threads < 1:
        raise ValueError(f"`threads >= 1` must hold, but got {threads=}")
    args, kwargs = _arguments(gated, inputs)
    structure = gated.structure
    network = [[(g.name, g.size) for g in structure.groups], [(a.fixed, a.groups) for a in structure.axes]]
    ran = run_all(on_processor(plain(gated.model)), structure, args, kwargs)
    network += [[(*r.key, str(r.leaves)) for r in ran]]
    shapes = [list(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return {
        "machine": machine(),
        "processor": processor(),
        "torch": torch.__version__,
        "threads": threads,
        "inputs": shapes,
        "network": hashlib.sha256(repr(network).encode()).hexdigest()[:16],
    }


def on_processor(model: nn.Module) -> nn.Module:
    """A copy of a model in main memory, in the layout that it is deployed in."""
    return copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)


def fastest(networks: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], threads: int) -> list[float]:
    """Milliseconds of each network's fastest call in evaluation mode; they take turns.

    Whatever else the machine does only adds to a call, so that the fastest says the most about the network.
    """
    with _running(networks, threads):
        return [min(taken) for taken in take_turns([partial(network, *args, **kwargs) for network in networks])]


@contextmanager
def _running(networks: Sequence[nn.Module], threads: int) -> Iterator[None]:
    """Networks in evaluation mode, without gradients, on so many threads."""
    with ExitStack() as exits:
        exits.enter_context(thread_count(threads))
        exits.enter_context(torch.inference_mode())
        for network in networks:
            exits.enter_context(mode_of(network, training=False))
        yield


def _arguments(gated: GatedModel, inputs: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the network is timed on, in main memory."""
    given = gated.example_inputs if inputs is None else (tuple(inputs), {})
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, given
    )
    return found


def _known(path: Path | None, identity: Mapping[str, Any]) -> LatencyTable | dict[str, Grid]:
    """What a file holds: a finished table, or the grids of an unfinished one."""
    if path is None or not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        found = content["identity"]
        unfinished = {n: grid_from(g) for n, g in content["unfinished"].items()} if "unfinished" in content else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must hold a latency table, but it is damaged: {error!r}") from error
    if differing := [key for key in identity if found.get(key) != identity[key]]:
        told = "; ".join(f"{key}: {found.get(key)!r} there, {identity[key]!r} here" for key in differing)
        raise ValueError(
            f"the latency table {path} must belong to this network on this machine, but differs in {told}. Give "
            "another file, or delete it to measure again"
        )
    return from_json(text) if unfinished is None else unfinished


def _measured(sized: Sized) -> Grid:
    points, widths = sized.points()
    try:
        return Grid(points, tuple(_fastest(sized.call(w)) for w in widths))
    except Exception as error:
        raise ValueError(f"every operation must run alone to be measured, but {sized.name()} fails: {error}") from error


def _fastest(function: Callable[[], Any]) -> float:
    """Milliseconds of the fastest of several calls."""
    for _ in range(WARM_UP):
        function()
    fastest, count, start = float("inf"), 0, perf_counter()
    while count < FEWEST or 1e3 * (perf_counter() - start) < MILLISECONDS:
        before = perf_counter()
        function()
        fastest, count = min(fastest, 1e3 * (perf_counter() - before)), count + 1
    return fastest
