"""The three calls of a user's own training loop: attach gates, land, remove.

The analysis reads the structure off one run of the model and then tries it: it removes a random half of all units
and compares. What does not hold is fixed with the reason, so that a group that is offered can be removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nas_gate import landing
from nas_gate.gates import Gate
from nas_gate.gating import GatedModel, plain, refuse_optimizers_of
from nas_gate.modules import copied, fresh, recurrent
from nas_gate.removal import (
    SIZED,
    RemovalError,
    Removed,
    check,
    cut_of,
    remove_units,
    smaller,
    try_cut,
)
from nas_gate.structure import (
    BRANCH,
    CHOICE,
    RULES,
    WIDTH,
    Group,
    Structure,
    add_switches,
    default,
    solve,
    trace,
)
from nas_gate.structure.sizes import ways_to_run
from nas_gate.structure.trace import Findings, Rule, gpus
from nas_gate.structure.units import Ints

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def arguments(
    example_inputs: Inputs, keywords: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments from a tensor, a sequence of positional or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **(keywords or {})}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), dict(keywords or {})
    return (example_inputs,), dict(keywords or {})


def analyze(
    model: nn.Module,
    example_inputs: Inputs,
    keywords: Mapping[str, Any] | None = None,
    rules: Mapping[Any, Rule] = RULES,
    depth: bool = False,
) -> Structure:
    """The structure of a model: its removable units, what they cost, and why the rest is fixed.

    `example_inputs` are what the model is called with: a tensor, a sequence of positional arguments, or a mapping
    of keyword arguments (`keywords` adds some to positional ones). MACs are those of one pass over them, so a batch
    of one gives MACs per example. With `depth`, residual branches are units, too. The model is left as it was.
    """
    args, kwargs = fresh(arguments(example_inputs, keywords))
    model, args, kwargs = _readable(model, args, kwargs)
    findings = _findings(model, args, kwargs, rules)
    add_switches(findings, model, depth)
    refused: list[tuple[Ints, str]] = []
    while True:
        structure = solve(findings, refused)
        if not structure.groups:
            return structure
        attempt = _Attempt(model, structure, args, kwargs)
        for groups in _trials(structure):
            error = attempt(groups)
            if error is not None:
                break
        else:
            return _with_least(model, structure, args, kwargs)
        if groups[0].kind == CHOICE:
            raise ValueError(f"a Choice must be removable, but with {groups[0].name} chosen {error}")
        path, blamed = _around(groups, error.path)
        culprits = _bisect(attempt, blamed) or [(group, str(error)) for group in blamed]
        alike = _alike(model, groups, path, [group for group, _ in culprits])
        if alike and attempt(alike) is not None:
            culprits += [
                (group, f"{error} (and so in every {type(model.get_submodule(path)).__name__})") for group in alike
            ]
        refused += [(structure.labels[g.start : g.stop], reason) for g, reason in culprits]


def _with_least(model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """The structure, in which every group keeps as many units as the code of the modules needs to run.

    It may divide by a number that it computes from a width, as that of a head's features. Where no single group mends
    that, all stays as it is: removal says so.
    """

    def error_of(structure: Structure) -> RemovalError | None:
        try:
            smaller(model, structure, structure.thinnest(), args, kwargs)
        except RemovalError as error:
            return error
        return None

    def mends(structure: Structure, error: RemovalError) -> bool:
        other = error_of(structure)
        return other is None or other.path != error.path

    while (error := error_of(structure)) is not None and error.path:
        _, blamed = _around([g for g in structure.groups if g.kind == WIDTH], error.path)
        group = next((g for g in blamed if mends(_leaving(structure, g, g.size), error)), None)
        if group is None or group.least == group.size:
            break
        least = min(2 * group.least, group.size)  # as many as it has do not mend it: they make the error
        while least < group.size and not mends(_leaving(structure, group, least), error):
            least = min(2 * least, group.size)
        structure = _leaving(structure, group, least)
    return structure


def _leaving(structure: Structure, group: Group, least: int) -> Structure:
    """The structure with another least number of units for a group."""
    return replace(structure, groups=tuple(replace(g, least=least) if g == group else g for g in structure.groups))


def _readable(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and its arguments; copies on the CPU where a GPU would run recurrent layers as single operations."""
    if not (recurrent(model) and gpus(model)):
        return model, args, kwargs
    args, kwargs = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, (args, kwargs))
    return copied(model).cpu(), args, kwargs


def _findings(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Mapping[Any, Rule]) -> Findings:
    """What a run of the model shows."""
    *first, last = ways_to_run(model, args, kwargs)
    for way in first:
        with suppress(Exception):  # its code needs values; what is wrong with the model shows in the last run, too
            return trace(*way, rules, default, SIZED)
    return trace(*last, rules, default, SIZED)


@dataclass(frozen=True)
class _Attempt:
    """Removes a random half of the units of some groups and compares: the error, or None where all is well.

    A branch closes; a candidate that is among the groups is chosen.
    """

    model: nn.Module
    structure: Structure
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, groups: Sequence[Group]) -> RemovalError | None:
        generator = np.random.default_rng(0)
        keep = self.structure.dense()
        chosen = {group.start for group in groups if group.kind == CHOICE}
        for choice in self.structure.choices:
            if chosen & set(choice.units):
                keep[list(choice.units)] = torch.tensor([unit in chosen for unit in choice.units], device="cpu")
        for group in groups:
            if group.kind == CHOICE:
                continue
            closed = generator.permutation(group.size)[: max(1, group.size // 2)]
            keep[group.start + closed] = False
        try:
            cut = cut_of(self.structure, keep)
            trial = try_cut(self.model, self.structure, cut, keep, self.args, self.kwargs)
            check(trial)
        except RemovalError as error:
            return error
        return None


def _trials(structure: Structure) -> list[list[Group]]:
    """Groups to try together, so that all are tried: widths; branches, none inside another; candidates in turn."""
    trials = [[g for g in structure.groups if g.kind == WIDTH]]
    inside: dict[int, int] = {}
    parts = {part.unit: part for part in structure.parts}
    branches = [g for g in structure.groups if g.kind == BRANCH]
    for g in branches:
        own = set(parts[g.start].tensors)
        inside[g.start] = sum(own < set(parts[other.start].tensors) for other in branches)
    trials += [[g for g in branches if inside[g.start] == level] for level in sorted(set(inside.values()))]
    most = max((len(choice.units) for choice in structure.choices), default=0)
    for index in range(most):
        chosen = {choice.units[min(index, len(choice.units) - 1)] for choice in structure.choices}
        trials.append([g for g in structure.groups if g.start in chosen and g.kind == CHOICE])
    return [groups for groups in trials if groups]


def _around(groups: Sequence[Group], path: str | None) -> tuple[str, list[Group]]:
    """The module at `path`, or the nearest around it that has groups, and its groups; all groups where none has."""
    while path:
        found = [g for g in groups if any(m.tensor.startswith(f"{path}.") for m in g.members)]
        if found:
            return path, found
        path = path.rpartition(".")[0]
    return "", list(groups)


def _alike(model: nn.Module, groups: Sequence[Group], path: str, culprits: Sequence[Group]) -> list[Group]:
    """Groups that stand in other modules of the same class as the culprits stand in the module at `path`."""

    def pattern(group: Group, path: str) -> frozenset[tuple[str, int]]:
        return frozenset((m.tensor.removeprefix(f"{path}."), m.dim) for m in group.members)

    if not path:
        return []
    kind, patterns = type(model.get_submodule(path)), {pattern(g, path) for g in culprits}
    paths = [p for p, m in model.named_modules() if type(m) is kind and p != path]
    return [g for p in paths for g in groups if pattern(g, p) in patterns]


def _bisect(attempt: _Attempt, groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """The groups that make the trial fail, each with the reason; all of them where only they together do."""
    error = attempt(groups)
    if error is None:
        return []
    if len(groups) == 1:
        return [(groups[0], str(error))]
    half = len(groups) // 2
    parts = [culprit for part in (groups[:half], groups[half:]) for culprit in _bisect(attempt, part)]
    return parts or [(g, str(error)) for g in groups]


def attach(
    model: nn.Module,
    example_inputs: Inputs,
    keywords: Mapping[str, Any] | None = None,
    gate: Gate | None = None,
    rules: Mapping[Any, Rule] = RULES,
    depth: bool = False,
    round_to: int = 1,
) -> GatedModel:
    """A copy of the model with a gate on every removable unit; with all gates open it is the same function.

    `gate` is the gate function (default: the trainable gate with constant gradient). With `round_to` the open units of
    every group are a multiple of it at every step (or all), so that weights and gates learn with the very widths that
    landing will leave. The other arguments are those of `analyze`. Build the optimiser afterwards, from
    `gated.parameters()`. Raises ValueError where the model rejects its inputs or has no removable unit.
    """
    structure = analyze(model, example_inputs, keywords, rules, depth)
    gated = GatedModel(copied(model), structure, gate, fresh(arguments(example_inputs, keywords)), round_to)
    gated.training = model.training  # the model's own modules keep the modes that they are in
    gated.gates.train(model.training)
    refuse_optimizers_of(model)
    return gated


def land(
    gated: GatedModel,
    target: float,
    metric: str = "macs",
    round_to: int | None = None,
    minimum: int | Mapping[str, int] = 1,
    limits: Mapping[str, float] | None = None,
) -> Tensor:
    """The boolean keep, shape (units,), that the learned gates land on for a target: see `landing.choose`.

    `round_to` is that which the gates have learned with, where none is given.
    """
    scores, latency = gated.gates.weight, gated.cost.table
    round_to = gated.gates.round_to if round_to is None else round_to
    return landing.choose(gated.structure, scores, target, metric, round_to, minimum, limits, latency)


def remove_with_proof(gated: GatedModel, keep: Tensor) -> Removed:
    """Remove the units that a boolean keep leaves out; the record holds model, cost and the proof's error."""
    device = gated.gates.weight.device
    types = {t.dtype for t in gated.model.parameters() if t.is_floating_point()}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        cast = value.is_floating_point() and value.dtype not in types and len(types) == 1  # with the model, since
        return value.to(device, next(iter(types)) if cast else value.dtype)

    args, kwargs = tree_map(placed, gated.example_inputs)
    model = plain(gated.model)
    read, args, kwargs = _readable(model, args, kwargs)
    removed = remove_units(read, gated.structure, keep, args, kwargs)
    if read is not model:
        removed.model.to(device)
    return removed


def remove(
    gated: GatedModel,
    target: float,
    metric: str = "macs",
    round_to: int | None = None,
    minimum: int | Mapping[str, int] = 1,
    limits: Mapping[str, float] | None = None,
) -> nn.Module:
    """Land on a target and remove: a plain module of the user's own class, proven equal to the gated one."""
    return remove_with_proof(gated, land(gated, target, metric, round_to, minimum, limits)).model
