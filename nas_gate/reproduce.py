"""The shortest `nas-gate search` command that asks for given settings again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nas_gate.cost import MEASURED, METRICS
from nas_gate.described import with_added

Plain = Mapping[str, Any]
Compose = Callable[[Sequence[str]], Plain]
"""Overrides -> the configuration that they give, resolved."""

GROUPS = ("model", "data", "task", "gate", "budget", "training")
TRAINING = ("dense", "cycle", "gating", "distillation")
"""Keys of settings that the configuration keeps under `training`."""

MANDATORY = {"model=custom": ["model.name=any"], "task=custom": ["task.name=any"]}
"""Choices that cannot be composed without a value, and a placeholder for it."""

NOT_TEXT = ("null", "true", "false", "nan", "inf")
"""Words that stand for other values."""


@dataclass(frozen=True)
class Shipped:
    """The shipped configuration: per experiment (None: none) the whole, per group and choice that group's part."""

    experiments: Mapping[str | None, Plain]
    choices: Mapping[str, Mapping[str, Plain]]


def shipped(compose: Compose, folder: Path) -> Shipped:
    """Read the configuration in `folder`: its groups' files, as `compose` composes them."""
    files = {group: sorted(path.stem for path in (folder / group).glob("*.yaml")) for group in GROUPS}
    choices: dict[str, dict[str, Plain]] = {group: {} for group in GROUPS}
    for row in zip_longest(*files.values()):  # the groups are independent: one composition reads a choice of each
        chosen = [f"{group}={choice}" for group, choice in zip(GROUPS, row) if choice is not None]
        whole = compose([*chosen, *(extra for each in chosen for extra in MANDATORY.get(each, []))])
        for group, choice in zip(GROUPS, row):
            if choice is not None:
                choices[group][choice] = whole[group]
    experiments = sorted(path.stem for path in (folder / "experiment").glob("*.yaml"))
    return Shipped(
        {None: compose([]), **{name: compose([f"experiment={name}"]) for name in experiments}},
        choices,
    )


def overrides(settings: Plain, known: Shipped) -> list[str]:
    """The fewest overrides whose composition gives `settings`, as they stand in a run's `settings.json`."""
    wanted = configuration_of(settings)
    tried = [_from_experiment(wanted, name, known) for name in known.experiments]
    return min(tried, key=_length)


def command(settings: Plain, known: Shipped) -> str:
    """The command, as a shell takes it."""
    return shlex.join(["nas-gate", "search", *overrides(settings, known)])


def configuration_of(settings: Plain) -> dict[str, Any]:
    """The part of the configuration that settings came from: the reverse of what the command line makes of it."""
    try:
        settings = with_added(settings)
        return {
            **{key: value for key, value in settings.items() if key not in TRAINING},
            "data": {"name": settings["data"]["name"], **settings["data"]["arguments"]},
            "training": {key: settings[key] for key in TRAINING},
            # settings leave out what is not limited
            "limits": {metric: settings.get("limits", {}).get(metric) for metric in (*METRICS, *MEASURED)},
        }
    except KeyError as error:
        raise ValueError(f"these settings are not those of a search: there is no {error}") from error


def _length(overrides: Sequence[str]) -> tuple[int, int]:
    return len(overrides), sum(map(len, overrides))


def _from_experiment(wanted: Plain, experiment: str | None, known: Shipped) -> list[str]:
    base = known.experiments[experiment]
    found = [] if experiment is None else [f"experiment={experiment}"]
    for key, value in wanted.items():
        changes = list(_changes(base, {key: value}, ""))
        for choice, part in known.choices.get(key, {}).items():
            other = [f"{key}={choice}", *_changes({key: part}, {key: value}, "")]
            changes = min(changes, other, key=_length)
        found += changes
    return found


def _changes(base: Plain, wanted: Plain, prefix: str) -> Iterator[str]:
    """The overrides that turn what `base` has at the keys of `wanted` into `wanted`."""
    for key, value in wanted.items():
        before, path = base.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from (f"~{path}.{gone}" for gone in before if gone not in value)
            yield from _changes(before, value, f"{path}.")
        elif key not in base:
            yield f"+{path}={_written(value)}"
        elif before != value or isinstance(before, bool) != isinstance(value, bool):  # 1 == True
            yield f"{path}={_written(value)}"


def _written(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_written(key)}:{_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_/.:-]*", text) and text.lower() not in NOT_TEXT:
        return text
    # backslashes stand for themselves except before a quote and at the end; OmegaConf would look `${...}` up
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"
