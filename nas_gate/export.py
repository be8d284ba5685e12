"""Deployment: a candidate as ONNX and `torch.export` files, each checked, with measured latency and a model card."""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from nas_gate import models
from nas_gate.candidate import load, read
from nas_gate.cost import count_macs
from nas_gate.exported import CARD, CHECKED, TOLERANCE, Artifact, Exported, Plain, Width, card, number
from nas_gate.latency import Latency, Network, batch, measure_onnx, measure_torch, measured_on, not_followed, open_onnx
from nas_gate.padding import padded
from nas_gate.removal import Cut, name_before, relative_error
from nas_gate.structure.trace import output_tensors

INSTALL = 'pip install "nas-gate[export]"'

Factory = Callable[[], nn.Module]


class ExportError(RuntimeError):
    """A candidate that cannot be exported, or a file that does not compute what the candidate does."""


# --- formats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A file format: its file's name, the packages it needs, how it is written, and how it is opened to be run."""

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Network]


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    onnx = importlib.import_module("onnx")
    outputs = len(program.graph_signature.user_outputs)
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["input"],
        output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
        dynamic_shapes=({0: "batch"},),  # the program has it already: this only names the dimension in the file
    )
    assert made is not None  # so with dynamo=True
    made.save(path)  # beyond 2 GB the weights lie beside it, under a name relative to the file
    onnx.checker.check_model(path, full_check=True)


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _open_pt2(path: Path) -> Network:
    network: Network = torch.export.load(path).module()
    return network


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, open_onnx),
    "pt2": Format("model.pt2", (), _write_pt2, _open_pt2),
}
"""The file formats by name."""


def _import_packages(formats: Sequence[str]) -> dict[str, str]:
    """The versions of what the formats need."""
    versions = {"torch": str(torch.__version__)}
    for name in formats:
        for package in FORMATS[name].packages:
            try:
                versions[package] = importlib.import_module(package).__version__
            except ImportError as error:
                raise ImportError(f"the format {name!r} needs the package {package!r}: {INSTALL}") from error
    return versions


# --- export -------------------------------------------------------------------------------------------------


def export(
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("onnx", "pt2"),
    *,
    factory: Factory | None = None,
    example_shape: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 128),
    threads: Sequence[int] = (1, 2),
    output: str | os.PathLike[str] | None = None,
    measure: bool = True,
    pad_to: int = 1,
) -> Exported:
    """Export the candidate in `folder` to files of any batch size, check them, measure latency, write a card.

    Args:
        folder: a candidate's folder.
        formats: of `FORMATS`: "onnx" (ONNX, for ONNX Runtime and others), "pt2" (`torch.export`, without the class).
        factory: makes the dense model, for one that is not registered, as in `nas_gate.load`.
        example_shape: shape of one input without the batch, e.g. (3, 32, 32); needed only where the candidate's
            figures or provenance have no `input_shape`.
        batch_sizes: those that latency is measured at.
        threads: the thread counts that latency is measured with.
        output: where the files go; by default `export` in the candidate's folder.
        measure: whether to measure latency (of the dense and the small network, in PyTorch and, where ONNX is among
            the formats, in ONNX Runtime), about a second for each combination.
        pad_to: fill channels of convolutions up to multiples of this with some that nothing reads (see
            `nas_gate.padding`). The function is the same, and ONNX Runtime quicker where it computes in blocks.

    The files appear when all is done, each whole; those of an export before are replaced. The network must take one
    tensor and hold its weights in float32.

    Raises:
        CandidateError: the folder is no candidate, is damaged, or does not fit the model.
        ExportError: the network cannot be exported, or a file's output differs from the network's by more than
            `TOLERANCE`.
        ImportError: a format's packages are missing; names the install command.
        ValueError: an unknown format, a size or thread count below 1, no input shape or two different ones, a
            candidate that cannot be padded.
    """
    formats = _known(formats)
    batch_sizes, threads = _counts("batch_sizes", batch_sizes), _counts("threads", threads)
    _counts("pad_to", [pad_to])
    folder = Path(folder)
    record = read(folder)
    output = folder / "export" if output is None else Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output must be a folder, but {output} is a file")
    shape = _input_shape(folder, {**record.provenance, **record.figures}, example_shape)
    versions = _import_packages(formats)
    network = load(folder, factory)
    dense = _dense(record.model, factory).eval()
    _check_runs(network, shape)
    written = network
    if pad_to > 1:
        written = padded(_dense(record.model, factory).eval(), network, record.cut, batch(shape, 1), pad_to)
    macs, written_macs, dense_macs = (count_macs(n, (batch(shape, 1),)) for n in (network, written, dense))
    macs_ratio, written_ratio = (n / dense_macs if dense_macs else 1.0 for n in (macs, written_macs))

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=output.parent) as temporary:
        staged, scratch = Path(temporary) / "staged", Path(temporary) / "scratch"
        staged.mkdir()
        scratch.mkdir()
        program = _program(written, shape)
        artifacts = tuple(_artifact(name, program, network, shape, staged, output) for name in formats)
        latencies: list[Latency] = []
        if measure:
            latencies += measure_torch(dense, written, shape, batch_sizes, threads)
            if "onnx" in formats:
                _converted("onnx", _program(dense, shape), scratch / "dense.onnx")
                files = scratch / "dense.onnx", staged / FORMATS["onnx"].file
                latencies += measure_onnx(*files, shape, batch_sizes, threads)
        exported = Exported(
            candidate=folder,
            output=output,
            model=record.model,
            figures=record.figures,
            provenance=record.provenance,
            input_shape=shape,
            own_factory=factory is not None,
            artifacts=artifacts,
            macs_ratio=macs_ratio,
            pad_to=pad_to,
            written_ratio=written_ratio,
            latencies=tuple(latencies),
            widths=widths(network, dense, record.cut),
            machine=measured_on(),
            versions=versions,
            warnings=(*_disagreement(record.figures, macs, shape), *not_followed(latencies, macs_ratio, pad_to)),
        )
        (staged / CARD).write_text(card(exported), encoding="utf-8")
        _publish(staged, output)
    return exported


def _known(formats: Sequence[str]) -> tuple[str, ...]:
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; valid formats: {', '.join(FORMATS)}")
    if not formats:
        raise ValueError(f"at least one format must be named; valid formats: {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(formats))


def _counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not all(_is_count(value) for value in values):
        raise ValueError(f"`{name}` must be whole numbers of at least 1, but are {list(values)}")
    return tuple(dict.fromkeys(values))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _input_shape(folder: Path, recorded: Plain, given: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one input without the batch: the candidate's own, or the one given."""
    own = recorded.get("input_shape")
    if own is None and given is None:
        raise ValueError(
            f"{folder} does not record the shape of its input: pass it without the batch dimension, as in "
            "example_shape=(3, 32, 32)"
        )
    if own is not None and given is not None and list(own) != list(given):
        raise ValueError(f"{folder} takes inputs of shape {list(own)}, but example_shape={list(given)} was given")
    shape = tuple(own if own is not None else given or ())
    if not shape or not all(_is_count(size) for size in shape):
        raise ValueError(f"the shape of one input must be sizes of at least 1, but is {list(shape)}")
    return shape


def _dense(model: Plain, factory: Factory | None) -> nn.Module:
    """The dense network with random weights."""
    if factory is not None:
        return factory()
    name = model["name"]
    return models.build(name, **models.without_weights(name, model.get("arguments", {})))


def _check_runs(network: nn.Module, shape: tuple[int, ...]) -> None:
    other = {t.dtype for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()} - {torch.float32}
    if other:
        raise ExportError(f"the weights must be float32, but some are {sorted(map(str, other))}")
    try:
        with torch.inference_mode():
            network(batch(shape, 1))
    except Exception as error:
        raise ExportError(f"the network must take one tensor of shape {(1, *shape)}, but fails: {error}") from error


def _program(network: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """The network's graph, with the batch size left open."""
    size = torch.export.Dim("batch", min=1)
    try:
        # two examples: a size of 1 would be taken for a constant
        return torch.export.export(network, (batch(shape, 2),), dynamic_shapes=({0: size},), strict=False)
    except Exception as error:  # whatever the network's own code raises while it is traced
        raise ExportError(f"torch.export cannot trace {type(network).__name__} for any batch size: {error}") from error


def _converted(name: str, program: ExportedProgram, path: Path) -> None:
    try:
        FORMATS[name].write(program, path)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"the network cannot be written as {name}: {error}") from error


def _artifact(
    name: str, program: ExportedProgram, network: nn.Module, shape: tuple[int, ...], staged: Path, output: Path
) -> Artifact:
    """Write one format into `staged`, open it again and compare it with the network."""
    path = staged / FORMATS[name].file
    _converted(name, program, path)
    try:
        absolute, relative = errors(network, FORMATS[name].open(path), shape)
    except Exception as error:
        raise ExportError(f"the {name} file does not run: {error}") from error
    if not relative <= TOLERANCE:  # also where it is no number
        raise ExportError(
            f"the {name} file must compute what the network does, but its largest relative error is {relative:.3g} "
            f"(allowed: {TOLERANCE:g}; batches of {', '.join(map(str, CHECKED))})"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Artifact(name, output / path.name, path.stat().st_size, digest, absolute, relative)


def errors(network: Network, exported: Network, shape: tuple[int, ...]) -> tuple[float, float]:
    """The largest absolute and relative difference of outputs, over random batches of the sizes in `CHECKED`.

    Relative to the largest magnitude of the network's output in that batch; nan or inf where they cannot be compared.
    """
    absolute, relative = 0.0, 0.0
    with torch.inference_mode():
        for size in CHECKED:
            x = batch(shape, size)
            expected, got = output_tensors(network(x)), output_tensors(exported(x))
            error = relative_error(expected, got)
            if not error <= TOLERANCE:
                return float("nan"), error
            relative = max(relative, error)
            absolute = max(absolute, *(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, got)))
    return absolute, relative


def _publish(staged: Path, output: Path) -> None:
    """Rename all staged files into `output`, the card last: what it describes is there, and no file of another one."""
    output.mkdir(exist_ok=True)
    for form in FORMATS.values():
        for name in (form.file, f"{form.file}.data"):
            if not (staged / name).exists():
                (output / name).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CARD):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(output / path.name)


def widths(network: nn.Module, dense: nn.Module, cut: Cut) -> tuple[Width, ...]:
    """The outputs of every convolution and linear layer (whatever has `out_channels` or `out_features`).

    `network` is what `cut` leaves of `dense`; of layers that are gone it keeps 0.
    """
    small = {name_before(cut, path): layer for path, layer in network.named_modules()}
    found = []
    for path, layer in dense.named_modules():
        for size in ("out_channels", "out_features"):
            if isinstance(getattr(layer, size, None), int):
                found.append(Width(path, getattr(small.get(path), size, 0), getattr(layer, size)))
    return tuple(found)


def _disagreement(figures: Plain, macs: int, shape: tuple[int, ...]) -> tuple[str, ...]:
    recorded = number(figures, "macs")
    if recorded is None or recorded == macs:
        return ()
    return (f"the candidate's record says {recorded:,} MACs, but {macs:,} were counted on an input of {list(shape)}",)
