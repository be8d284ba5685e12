"""Deployment: a candidate as ONNX and `torch.export` files, each checked, with measured latency and a model card."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nas_gate import models
from nas_gate.candidate import load, read
from nas_gate.cost import count_macs
from nas_gate.removal import relative_error
from nas_gate.structure.trace import output_tensors

TOLERANCE = 1e-4
"""Largest allowed error of an exported file, relative to the network's largest output."""

CHECKED = (1, 2, 7)
"""Batch sizes on which an exported file is compared with the network."""

INSTALL = 'pip install "nas-gate[export]"'
CARD, LATENCY = "MODEL_CARD.md", "latency.json"

# How often a latency is measured: after a warm-up, until `SECONDS` have passed, but within these counts.
WARM_UP, FEWEST, MOST, SECONDS = 3, 7, 300, 1.0

Factory = Callable[[], nn.Module]
Network = Callable[[Tensor], Any]
Plain = Mapping[str, Any]


class ExportError(RuntimeError):
    """A candidate that cannot be exported, or a file that does not compute what the candidate does."""


# --- the record ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """One exported file, and its largest errors against the network in PyTorch over batches of `CHECKED`."""

    format: str
    path: Path
    size: int
    sha256: str
    max_absolute_error: float
    max_relative_error: float


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


@dataclass(frozen=True)
class Width:
    """Outputs (channels or features) of one layer: how many of the dense ones are kept."""

    layer: str
    kept: int
    dense: int


@dataclass(frozen=True)
class Exported:
    """An export: where it lies, what was checked and measured, and the candidate's own record.

    `input_shape` is that of one example, without the batch dimension; `macs_ratio` the candidate's share of the
    dense network's MACs, counted on it.
    """

    candidate: Path
    output: Path
    model: Plain
    figures: Plain
    provenance: Plain
    input_shape: tuple[int, ...]
    own_factory: bool
    artifacts: tuple[Artifact, ...]
    macs_ratio: float
    latencies: tuple[Latency, ...]
    widths: tuple[Width, ...]
    machine: str
    versions: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the model is called in the registry, or by whoever saved the candidate."""
        return str(self.model.get("name", "network"))

    @property
    def card(self) -> Path:
        """The model card's path."""
        return self.output / CARD


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


def _open_onnx(path: Path, threads: int = 0) -> Network:
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


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _open_pt2(path: Path) -> Network:
    network: Network = torch.export.load(path).module()
    return network


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
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

    The files appear when all is done, each whole; those of an export before are replaced. The network must take one
    tensor and hold its weights in float32.

    Raises:
        CandidateError: the folder is no candidate, is damaged, or does not fit the model.
        ExportError: the network cannot be exported, or a file's output differs from the network's by more than
            `TOLERANCE`.
        ImportError: a format's packages are missing; names the install command.
        ValueError: an unknown format, a size or thread count below 1, no input shape or two different ones.
    """
    formats = _known(formats)
    batch_sizes, threads = _counts("batch_sizes", batch_sizes), _counts("threads", threads)
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
    macs, dense_macs = (count_macs(n, (_batch(shape, 1),)) for n in (network, dense))
    macs_ratio = macs / dense_macs if dense_macs else 1.0

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=output.parent) as temporary:
        staged, scratch = Path(temporary) / "staged", Path(temporary) / "scratch"
        staged.mkdir()
        scratch.mkdir()
        program = _program(network, shape)
        artifacts = tuple(_artifact(name, program, network, shape, staged, output) for name in formats)
        latencies: list[Latency] = []
        if measure:
            latencies += measure_torch(dense, network, shape, batch_sizes, threads)
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
            latencies=tuple(latencies),
            widths=widths(network, dense),
            machine=_machine(),
            versions=versions,
            warnings=(*_disagreement(record.figures, macs, shape), *not_followed(latencies, macs_ratio)),
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
            network(_batch(shape, 1))
    except Exception as error:
        raise ExportError(f"the network must take one tensor of shape {(1, *shape)}, but fails: {error}") from error


def _batch(shape: tuple[int, ...], size: int) -> Tensor:
    """Standard normal inputs, the same at every call."""
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


def _program(network: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """The network's graph, with the batch size left open."""
    batch = torch.export.Dim("batch", min=1)
    try:
        # two examples: a size of 1 would be taken for a constant
        return torch.export.export(network, (_batch(shape, 2),), dynamic_shapes=({0: batch},), strict=False)
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
            x = _batch(shape, size)
            expected, got = output_tensors(network(x)), output_tensors(exported(x))
            error = relative_error(expected, got)
            if not error <= TOLERANCE:
                return float("nan"), error
            relative = max(relative, error)
            absolute = max(absolute, *(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, got)))
    return absolute, relative


def _publish(staged: Path, output: Path) -> None:
    """Rename all staged files into `output`, the card last: what it describes is there."""
    output.mkdir(exist_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CARD):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(output / path.name)


def widths(network: nn.Module, dense: nn.Module) -> tuple[Width, ...]:
    """The outputs of every convolution and linear layer (whatever has `out_channels` or `out_features`)."""
    small = dict(network.named_modules())
    found = []
    for path, layer in dense.named_modules():
        for size in ("out_channels", "out_features"):
            if isinstance(getattr(layer, size, None), int):
                found.append(Width(path, getattr(small[path], size), getattr(layer, size)))
    return tuple(found)


# --- latency ------------------------------------------------------------------------------------------------


def measure_torch(
    dense: Network,
    network: Network,
    shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
) -> list[Latency]:
    """Latencies of both networks in PyTorch on the CPU; the thread count is as before afterwards."""
    latencies = []
    with _thread_count_restored(), torch.inference_mode():
        for count in threads:
            torch.set_num_threads(count)
            latencies += [_latency("PyTorch", dense, network, _batch(shape, n), count) for n in batch_sizes]
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
        sessions = _open_onnx(dense, count), _open_onnx(network, count)
        latencies += [_latency("ONNX Runtime", *sessions, _batch(shape, n), count) for n in batch_sizes]
    return latencies


@contextmanager
def _thread_count_restored() -> Iterator[None]:
    before = torch.get_num_threads()
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


def not_followed(latencies: Sequence[Latency], macs_ratio: float) -> tuple[str, ...]:
    """A sentence for every latency that fell by less than half of what MACs did."""
    return tuple(
        f"latency did not follow MACs: {latency.runtime}, batch {latency.batch}, {_threads(latency.threads)}: "
        f"{latency.ratio:.1%} of the dense latency, with {macs_ratio:.1%} of the MACs"
        for latency in latencies
        if macs_ratio < 1 and latency.ratio > macs_ratio + (1 - macs_ratio) / 2
    )


def _disagreement(figures: Plain, macs: int, shape: tuple[int, ...]) -> tuple[str, ...]:
    recorded = _number(figures, "macs")
    if recorded is None or recorded == macs:
        return ()
    return (f"the candidate's record says {recorded:,} MACs, but {macs:,} were counted on an input of {list(shape)}",)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _machine() -> str:
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} logical cores"


def save_latencies(exported: Exported) -> Path:
    """Leave the latencies in the candidate's folder, for `nas_gate.collect`; those of an export before are replaced."""
    path = exported.candidate / LATENCY
    record = {
        "machine": exported.machine,
        "versions": dict(exported.versions),
        "latencies": [asdict(latency) for latency in exported.latencies],
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


# --- text ---------------------------------------------------------------------------------------------------

LATENCY_HEADER = ("runtime", "batch", "threads", "dense, ms (IQR)", "candidate, ms (IQR)", "ratio")


def describe(exported: Exported) -> str:
    """The export as text for a terminal: the files with their errors, the latencies, the warnings."""
    lines = [f"{exported.name}, {exported.macs_ratio:.1%} of the dense MACs, for inputs of {_shape_text(exported)}", ""]
    for a in exported.artifacts:
        error = f"largest error {a.max_relative_error:.1e} relative, {a.max_absolute_error:.1e} absolute"
        lines.append(f"  {a.format:<6}{a.path}  ({a.size / 1e6:.2f} MB; {error})")
    lines.append(f"  {'card':<6}{exported.card}")
    if exported.latencies:
        lines += ["", f"latency on {exported.machine}:"]
        rows = [LATENCY_HEADER, *map(_latency_row, exported.latencies)]
        sizes = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            first, *others = (text.ljust(n) if i == 0 else text.rjust(n) for i, (text, n) in enumerate(zip(row, sizes)))
            lines.append("  " + "  ".join([first, *others]))
    lines += ["" for _ in exported.warnings[:1]] + [f"warning: {warning}" for warning in exported.warnings]
    return "\n".join(lines)


def card(exported: Exported) -> str:
    """The model card, in Markdown. What the candidate does not record is left out."""
    return "\n".join(
        [
            f"# {exported.name}, {exported.macs_ratio:.1%} of the dense MACs",
            "",
            f"A smaller `{exported.name}`, found by nas-gate: trainable gates (arXiv 1904.10921) chose what of the "
            "dense network stays, and the rest was removed. What remains is a plain network, without masks.",
            "",
            f"Input: float32 of shape {_shape_text(exported)}, N free, prepared as the training data were.",
            *(f"\n> **Warning:** {warning}." for warning in exported.warnings),
            *_figures(exported),
            *_files(exported),
            *_latencies(exported),
            *_loading(exported),
            *_widths(exported),
            *_provenance(exported),
            "",
        ]
    )


def _shape_text(exported: Exported) -> str:
    return f"({', '.join(['N', *map(str, exported.input_shape)])})"


def _number(figures: Plain, key: str) -> float | None:
    value = figures.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    return ["", *(f"| {' | '.join(row)} |" for row in (header, rule, *rows))]


def _figures(exported: Exported) -> list[str]:
    figures, rows = exported.figures, []
    for label, key in (("validation accuracy", "accuracy"), ("test accuracy", "test_accuracy")):
        value, dense = _number(figures, key), _number(figures, f"dense_{key}")
        if value is not None:
            against = ("", "") if dense is None else (f"{dense:.2%}", f"{100 * (value - dense):+.2f} points")
            rows.append((label, f"{value:.2%}", *against))
    for label, key in (("MACs per example", "macs"), ("parameters", "params")):
        value, dense = _number(figures, key), _number(figures, f"dense_{key}")
        if value is not None:
            against = ("", "") if not dense else (f"{dense:,.0f}", f"{value / dense:.1%}")
            rows.append((label, f"{value:,.0f}", *against))
    lines = _table(("", "candidate", "dense", "share or difference"), rows) if rows else []
    removal = _number(figures, "max_relative_error")
    if removal is not None:
        lines += ["", f"Largest relative error of the removal, against the gated network: {removal:.1e}."]
    return ["", "## Figures", *lines] if lines else []


def _files(exported: Exported) -> list[str]:
    header = ("file", "format", "MB", "largest relative error", "largest absolute error", "SHA-256")
    rows = [
        (
            *(f"`{a.path.name}`", a.format, f"{a.size / 1e6:.2f}"),
            *(f"{a.max_relative_error:.1e}", f"{a.max_absolute_error:.1e}", f"`{a.sha256}`"),
        )
        for a in exported.artifacts
    ]
    versions = ", ".join(f"{name} {version}" for name, version in exported.versions.items())
    checked = ", ".join(map(str, CHECKED))
    return [
        *("", "## Files"),
        *_table(header, rows),
        *(
            "",
            f"Errors against PyTorch on random batches of {checked}; allowed: {TOLERANCE:g} relative. By {versions}.",
        ),
    ]


def _latency_row(latency: Latency) -> tuple[str, ...]:
    return (
        latency.runtime,
        str(latency.batch),
        str(latency.threads),
        f"{latency.dense_ms:.3g} ({latency.dense_iqr_ms:.2g})",
        f"{latency.candidate_ms:.3g} ({latency.candidate_iqr_ms:.2g})",
        f"{latency.ratio:.1%}",
    )


def _latencies(exported: Exported) -> list[str]:
    if not exported.latencies:
        return []
    return [
        *("", "## Latency"),
        *_table(LATENCY_HEADER, [_latency_row(latency) for latency in exported.latencies]),
        *("", f"Median of a whole batch, and interquartile range, on {exported.machine}. Both networks took turns."),
    ]


def _loading(exported: Exported) -> list[str]:
    """Code to run from the folder of the card."""
    try:
        folder = Path(os.path.relpath(exported.candidate, exported.output)).as_posix()
    except ValueError:  # on another drive
        folder = exported.candidate.as_posix()
    factory = ", factory=make_dense" if exported.own_factory else ""
    sizes = ", ".join(map(str, exported.input_shape))
    snippets = {
        "onnx": (
            "import numpy, onnxruntime",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            f'outputs = session.run(None, {{"input": numpy.zeros((1, {sizes}), numpy.float32)}})',
        ),
        "pt2": (
            "import torch",
            'model = torch.export.load("model.pt2").module()',
            f"outputs = model(torch.zeros(1, {sizes}))",
        ),
    }
    lines = ["", "## How to load it", "", "From this card's folder, as a PyTorch module of the model's own class:"]
    if exported.own_factory:
        lines[-1] += " `make_dense` is your function that makes the dense model."
    lines += ["", "```python", "import nas_gate", f'model = nas_gate.load("{folder}"{factory})', "```"]
    for artifact in exported.artifacts:
        lines += ["", f"From `{artifact.path.name}`, without nas-gate:"]
        lines += ["", "```python", *snippets[artifact.format], "```"]
    return lines


def _widths(exported: Exported) -> list[str]:
    if not exported.widths:
        return []
    rows = [(f"`{w.layer}`", str(w.kept), str(w.dense), f"{w.kept / w.dense:.0%}") for w in exported.widths]
    return ["", "## Widths", *_table(("layer", "kept outputs", "dense outputs", "share"), rows)]


def _provenance(exported: Exported) -> list[str]:
    provenance = exported.provenance
    settings = provenance.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else provenance.get("data")
    lines = [f"- model: `{exported.name}`, arguments `{json.dumps(exported.model.get('arguments', {}))}`"]
    if data is not None:
        lines.append(f"- data: `{json.dumps(data)}`")
    if "seed" in provenance:
        lines.append(f"- seed: {provenance['seed']}")
    if isinstance(versions := provenance.get("versions"), Mapping):
        lines.append(f"- made by: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    lines = ["", "## Provenance", "", *lines]
    if provenance:
        lines += ["", "All that the candidate records of its making:", "", "```json"]
        lines += [json.dumps(dict(provenance), indent=1), "```"]
    return lines
