"""The record of an export, and its text: for a terminal, and as a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas_gate.latency import Latency
from nas_gate.quality import quality_of

CARD = "MODEL_CARD.md"

TOLERANCE = 1e-4
"""Largest allowed error of an exported file, relative to the network's largest output."""

CHECKED = (1, 2, 7)
"""Batch sizes on which an exported file is compared with the network."""

Plain = Mapping[str, Any]


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
class Width:
    """Outputs (channels or features) of one layer: how many of the dense ones are kept."""

    layer: str
    kept: int
    dense: int


@dataclass(frozen=True)
class Exported:
    """An export: where it lies, what was checked and measured, and the candidate's own record.

    `input_shape` is that of one example, without the batch dimension; `macs_ratio` the candidate's share of the
    dense network's MACs, counted on it, and `written_ratio` that of the files, whose channels are padded to multiples
    of `pad_to`.
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
    pad_to: int
    written_ratio: float
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


# --- text ---------------------------------------------------------------------------------------------------

LATENCY_HEADER = ("runtime", "batch", "threads", "dense, ms (IQR)", "candidate, ms (IQR)", "ratio")


def describe(exported: Exported) -> str:
    """The export as text for a terminal: the files with their errors, the latencies, the warnings."""
    lines = [f"{exported.name}, {exported.macs_ratio:.1%} of the dense MACs, for inputs of {_shape_text(exported)}", ""]
    for a in exported.artifacts:
        error = f"largest error {a.max_relative_error:.1e} relative, {a.max_absolute_error:.1e} absolute"
        lines.append(f"  {a.format:<6}{a.path}  ({a.size / 1e6:.2f} MB; {error})")
    lines.append(f"  {'card':<6}{exported.card}")
    lines += [f"  {line}" for line in _padding(exported)]
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
            f"A smaller `{exported.name}`, found by nas-gate: {_chooser(exported)} chose what of the dense network "
            "stays, and the rest was removed. What remains is a plain network, without masks.",
            "",
            f"Input: float32 of shape {_shape_text(exported)}, N free, {_preparation(exported)}.",
            *_padding(exported),
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


def _chooser(exported: Exported) -> str:
    method, settings = exported.figures.get("method"), exported.provenance.get("settings")
    if method is None:
        return "its maker"
    if method != "gates":
        return f"the baseline `{method}`"
    gate = settings.get("gate", {}).get("name") if isinstance(settings, Mapping) else None
    names = {None: "gates", "trainable": "trainable gates (arXiv 1904.10921)"}
    return names.get(gate, f"`{gate}` gates")


def _preparation(exported: Exported) -> str:
    normalisation = exported.provenance.get("normalisation")
    if not isinstance(normalisation, Mapping):
        return "prepared as the training data were"
    mean, std = ([float(f"{x:.6g}") for x in normalisation[name]] for name in ("mean", "std"))
    return f"normalised by channel as (x - mean) / std with mean {mean} and std {std} (images: x in 0 to 255)"


def _padding(exported: Exported) -> list[str]:
    if exported.pad_to == 1:
        return []
    return [
        "",
        f"In the files convolutions' channels are padded to multiples of {exported.pad_to} with some that nothing "
        f"reads: the same function, for {exported.written_ratio:.1%} of the dense MACs.",
    ]


def _shape_text(exported: Exported) -> str:
    return f"({', '.join(['N', *map(str, exported.input_shape)])})"


def number(figures: Plain, key: str) -> float | None:
    """A figure, or None where none is recorded."""
    value = figures.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    return ["", *(f"| {' | '.join(row)} |" for row in (header, rule, *rows))]


def _figures(exported: Exported) -> list[str]:
    figures, rows = exported.figures, []
    quality = quality_of(figures)
    for label, key in ((f"validation {quality.label}", quality.name), (f"test {quality.label}", quality.test)):
        value, dense = number(figures, key), number(figures, f"dense_{key}")
        if value is not None:
            against = ("", "") if dense is None else (format(dense, quality.shown), quality.show_change(value - dense))
            rows.append((label, format(value, quality.shown), *against))
    for label, key in (("MACs per example", "macs"), ("parameters", "params")):
        value, dense = number(figures, key), number(figures, f"dense_{key}")
        if value is not None:
            against = ("", "") if not dense else (f"{dense:,.0f}", f"{value / dense:.1%}")
            rows.append((label, f"{value:,.0f}", *against))
    lines = _table(("", "candidate", "dense", "share or difference"), rows) if rows else []
    removal = number(figures, "max_relative_error")
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
