"""Candidates on disk: a folder with `candidate.json` and `weights.safetensors`; no pickle, nothing imported."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_weights
from safetensors.torch import save_file
from torch import nn

from nas_gate.removal import Cut, cut_model
from nas_gate.structure.corrections import Corrections
from nas_gate.structure.trace import tensors_of

FORMAT, VERSION = "nas-gate candidate", 1
RECORD, WEIGHTS = "candidate.json", "weights.safetensors"


class CandidateError(ValueError):
    """A candidate folder that cannot be trusted or used, with the reason."""


@dataclass(frozen=True)
class Candidate:
    """The record of one finished architecture.

    `model` is {"name": registered name, "arguments": {...}}; `cut` what is kept of it; `figures` what was measured
    (accuracy, macs, params, ...); `provenance` what made it (seed, configuration, versions).
    """

    model: Mapping[str, Any]
    cut: Cut
    figures: Mapping[str, Any]
    provenance: Mapping[str, Any]


def save(
    folder: str | os.PathLike[str],
    network: nn.Module,
    cut: Cut,
    model: Mapping[str, Any],
    figures: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Path:
    """Write a candidate: `network` is the removed model, the rest the fields of `Candidate` (JSON-ready values).

    The folder appears whole or not at all; a candidate that exists there is replaced. Raises CandidateError for
    values that JSON or safetensors cannot hold, and where something else is in the way.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder / RECORD).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CandidateError(f"only a candidate is replaced, but {folder} exists and is none (it has no {RECORD})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise CandidateError(f"a candidate's state must be tensors only, but {strange[0]!r} is not one")
    sparse = [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]
    if sparse:
        raise CandidateError(f"a candidate's tensors must be dense and have values, but {sparse[0]!r} is not so")
    aliases = _aliases(state)
    weights = {n: t.detach().cpu().contiguous().clone() for n, t in state.items() if n not in aliases}
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        try:
            save_file(weights, temporary / WEIGHTS)
        except (KeyError, ValueError) as error:
            raise CandidateError(f"a candidate's weights must be what safetensors can hold, not {error}") from error
        record = {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(model),
            "cut": {
                "slots": {n: {str(d): list(i) for d, i in dims.items()} for n, dims in cut.slots.items()},
                "widths": dict(cut.widths),
                "zeros": dict(cut.zeros),
                "loose": list(cut.loose),
                "choices": dict(cut.choices),
                "corrections": {path: _written(c) for path, c in cut.corrections.items()},
            },
            "figures": dict(figures),
            "provenance": dict(provenance),
            "aliases": aliases,
            "modules": _kinds(network),
            "weights_sha256": _digest((temporary / WEIGHTS).read_bytes()),
        }
        try:
            record = json.loads(json.dumps(record, allow_nan=False))  # what will be read: keys are text from here on
            record["record_sha256"] = _digest(_canonical(record))
            text = json.dumps(record, indent=1)
        except (TypeError, ValueError) as error:
            raise CandidateError(f"a candidate's record must be plain JSON values: {error}") from error
        (temporary / RECORD).write_text(text + "\n", encoding="utf-8")
        for path in (temporary / WEIGHTS, temporary / RECORD):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        _replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _written(corrections: Corrections) -> dict[str, Any]:
    return {
        "sizes": {call: {str(i): list(pair) for i, pair in s.items()} for call, s in corrections.sizes.items()},
        "factors": {call: list(pair) for call, pair in corrections.factors.items()},
    }


def _corrections(written: Mapping[str, Any]) -> Corrections:
    return Corrections(
        {str(call): {int(i): (int(n), int(m)) for i, (n, m) in s.items()} for call, s in written["sizes"].items()},
        {str(call): _factor(factor) for call, factor in written["factors"].items()},
    )


def _factor(written: Any) -> tuple[float, float]:
    if isinstance(written, int | float):  # of an earlier version, which did not say what it stands for
        return float(written), math.nan
    right, computed = written
    return float(right), float(computed)


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of tensors that are the same memory as one before, and that one's name."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in state.items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if same != name and tensor.numel():
            aliases[name] = same
    return aliases


def _replace(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what was there is put back where that fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        folder.rename(aside / "old")
        try:
            temporary.rename(folder)
        except BaseException:
            (aside / "old").rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def read(folder: str | os.PathLike[str]) -> Candidate:
    """The record of a candidate folder. Raises CandidateError where it is missing, damaged, altered or foreign."""
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[Candidate, dict[str, torch.Tensor], dict[str, str]]:
    """The record, the saved state, and the kinds of modules that it belongs to (none of earlier versions)."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CandidateError(f"{folder} is no candidate: {RECORD} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CandidateError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CandidateError(f"{path} is not of nas-gate: its format must be {FORMAT!r}")
    if record.get("version") != VERSION:
        raise CandidateError(f"{path} has version {record.get('version')!r}, but this code reads version {VERSION}")
    claimed = record.pop("record_sha256", None)
    if claimed != _digest(_canonical(record)):
        raise CandidateError(f"{path} was altered: its checksum does not match its content")
    weights = folder / WEIGHTS
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise CandidateError(f"{weights} cannot be read ({error.strerror})") from error
    if _digest(data) != record.get("weights_sha256"):
        raise CandidateError(f"{weights} is truncated or altered: its checksum does not match {RECORD}")
    try:
        state = parse_weights(data)
    except SafetensorError as error:
        raise CandidateError(f"{weights} is damaged: {error}") from error
    try:
        state.update({alias: state[first] for alias, first in record["aliases"].items()})
        kinds = {str(path): str(kind) for path, kind in record.get("modules", {}).items()}
        slots = {
            str(name): {int(dim): tuple(map(int, index)) for dim, index in dims.items()}
            for name, dims in record["cut"]["slots"].items()
        }
        cut = Cut(
            slots,
            {str(path): int(width) for path, width in record["cut"]["widths"].items()},
            {str(path): _corrections(c) for path, c in record["cut"].get("corrections", {}).items()},
            {str(path): None if n is None else int(n) for path, n in record["cut"].get("zeros", {}).items()},
            tuple(map(str, record["cut"].get("loose", ()))),
            {str(path): int(index) for path, index in record["cut"].get("choices", {}).items()},
        )
        model, figures, provenance = (dict(record[key]) for key in ("model", "figures", "provenance"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CandidateError(f"{path} is damaged: its fields are not those of a candidate ({error!r})") from error
    return Candidate(model, cut, figures, provenance), state, kinds


def load(folder: str | os.PathLike[str], factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network of a candidate folder, in evaluation mode, on the CPU.

    The dense model comes from the registry by the name in the record, or from `factory` (called without arguments)
    for a model of your own: nothing that the file names is imported. It is cut, then the weights are loaded. Raises
    CandidateError for a folder that is missing, damaged, altered, or does not fit the model.
    """
    folder = Path(folder)
    candidate, state, kinds = _read(folder)
    try:
        dense = _registered(folder, candidate.model) if factory is None else factory()
    except TypeError as error:
        raise CandidateError(f"the factory of {folder} must make the dense model without arguments: {error}") from error
    try:
        network = cut_model(dense, candidate.cut)
        _match_kinds(network, kinds)
        _match_types(network, state)
        network.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise CandidateError(f"{folder} does not fit the model {type(dense).__name__}: {error}") from error
    return network.eval()


def _kinds(network: nn.Module) -> dict[str, str]:
    """By path, the class of PyTorch's modules without children: activations have no tensors by which to tell them."""
    return {
        path: type(module).__name__
        for path, module in network.named_modules()
        if not module._modules and type(module).__module__.startswith("torch.nn.modules.")
    }


def _match_kinds(network: nn.Module, saved: Mapping[str, str]) -> None:
    """Raise ValueError where the network has another module of PyTorch's than the saved one had."""
    for path, kind in _kinds(network).items():
        if (before := saved.get(path, kind)) != kind:
            raise ValueError(f"{path!r} is {kind}, but the candidate has {before} there")


def _match_types(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give the network's floating tensors the saved types; buffers outside the state change as those in it do."""
    floating = {n: t for n, t in tensors_of(network).items() if t.is_floating_point()}
    became: dict[torch.dtype, set[torch.dtype]] = {}
    for name in floating.keys() & state.keys():
        became.setdefault(floating[name].dtype, set()).add(state[name].dtype)
    for name, tensor in floating.items():
        new = {state[name].dtype} if name in state else became.get(tensor.dtype, set())
        if len(new) == 1:
            tensor.data = tensor.data.to(next(iter(new)))


def _registered(folder: Path, model: Mapping[str, Any]) -> nn.Module:
    from nas_gate import models  # torchvision is needed only here

    name, arguments = model.get("name"), model.get("arguments", {})
    if name not in models.names():
        raise CandidateError(
            f"{folder} is of the model {name!r}, which is not registered: pass the function that makes the dense "
            "model, nas_gate.load(folder, factory=...); names in the file are never imported"
        )
    try:
        return models.build(name, **models.without_weights(name, arguments))
    except (TypeError, ValueError) as error:
        raise CandidateError(f"{folder} names arguments that the model {name!r} does not take: {error}") from error


def next_steps(path: str, model: Mapping[str, Any], pad_to: int) -> tuple[str, str]:
    """How the candidate at `path` is loaded in Python, and exported as it was measured; `model` is its record's."""
    from nas_gate import models

    registered = model.get("name") in models.names()
    factory, option = ("", "") if registered else (", factory=...", " --factory MODULE:FUNCTION")
    padding = f" --pad-to {pad_to}" if pad_to > 1 else ""
    return (
        f"import nas_gate; model = nas_gate.load({path!r}{factory})",
        f"nas-gate export {shlex.quote(path)}{padding}{option}",
    )
