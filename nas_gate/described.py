"""Settings as JSON holds them: what they leave out, which of them change no result, and how two differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Plain = Mapping[str, Any]

DEFAULT_TASK: Plain = {"name": "classification", "arguments": {}}
"""The default task, as JSON holds it."""

PLACES = ("root", "download", "workers")
"""Arguments of data that say where and how they are read: they may differ between machines, and change no result."""

ADDED: Plain = {"task": DEFAULT_TASK, "weights": None, "hardware.compile": None}
"""Settings that there were not always, and their defaults; a dot parts a mapping's key from the one within."""


def setting_of(key: str) -> str:
    """What `describe` calls a key of the configuration, as in data.root or training.dense.epochs."""
    if key.startswith("data.") and key != "data.name":
        return f"data.arguments.{key.removeprefix('data.')}"
    return key.removeprefix("training.")


def without_added(plain: Plain, prefix: str = "") -> dict[str, Any]:
    """`plain` without what is in ADDED and at its default, so that the folders of earlier runs stay theirs.

    `prefix` is what comes before the keys of `plain` in ADDED's.
    """
    return {
        key: without_added(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in plain.items()
        if f"{prefix}{key}" not in ADDED or value != ADDED[f"{prefix}{key}"]
    }


def with_added(plain: Plain) -> dict[str, Any]:
    """The reverse of `without_added`: settings with all that it leaves out."""
    whole = dict(plain)
    for key, default in ADDED.items():
        outer, _, inner = key.rpartition(".")
        if not outer:
            whole.setdefault(key, default)
        elif outer in whole:
            whole[outer] = {inner: default, **whole[outer]}
    return whole


def differences(there: Plain, asked: Plain, ignored: Sequence[str] = ()) -> str:
    """What differs between two nested mappings, in words; nothing where they are equal.

    Keys that are, or lie in, one of `ignored`, as in "hardware" or "data.arguments.root", may differ.
    """
    before, now = flat(there), flat(asked)
    return "; ".join(
        f"{key}: {before.get(key, 'nothing')} there, {now.get(key, 'nothing')} asked for"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not within(key, ignored)
    )


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is, or lies in, one of some others."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(plain: Plain, prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found
