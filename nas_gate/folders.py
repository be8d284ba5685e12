"""The folders that trials work in: held by one process, of one trial's settings, with files that are whole."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_fabric import Fabric
from rich.console import Console

from nas_gate.described import PLACES, Plain, differences
from nas_gate.errors import InUse, Refused
from nas_gate.files import write_text

LOOK = 1.0  # seconds between two looks at a folder that another process holds


@contextmanager
def held(folder: Path, fabric: Fabric, *, wait: bool = False, console: Console | None = None) -> Iterator[None]:
    """Hold `folder` against other runs, which wait or are refused. A killed process lets go by dying."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise Refused(f"{folder} must be a folder that can be written to: {error}") from error
    with lock as file:
        # all processes of a run learn of every look: waiting in a barrier, the others would give up after half an hour
        looks = 0
        while not fabric.broadcast(not fabric.is_global_zero or _locked(file)):
            if not wait:
                raise InUse(f"Another process is working in {folder}.")
            if console is not None and looks == 0:
                console.print(f"waiting for another process to finish {folder}", soft_wrap=True)
            looks += 1
            time.sleep(LOOK)
        yield


def _locked(file: IO[str]) -> bool:
    """Whether the file is locked by this process now."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; all files are replaced whole, so the last one wins
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def refuse_other_settings(described: Plain, run_dir: Path, may_differ: Sequence[str] = ()) -> None:
    """Refused if the folder belongs to other settings, saying what differs.

    Where data lie may differ, and settings that are, or lie in, one of `may_differ`.
    """
    file = run_dir / "settings.json"
    if not file.exists():
        return
    ignored = (*(f"data.arguments.{name}" for name in PLACES), *may_differ)
    if differing := differences(read_json(file), described, ignored):
        raise Refused(
            f"{run_dir} holds a run with other settings ({differing}). "
            "Choose another folder, or ask for the same settings to continue that run."
        )


def refuse_other_sources(sources: Plain, run_dir: Path) -> None:
    """Refused if the folder's run was made from other contents than `sources` says, as far as both name them."""
    file = run_dir / "sources.json"
    if not file.exists():
        return
    there = read_json(file)
    both = [name for name in sources if name in there]
    if differing := differences({name: there[name] for name in both}, {name: sources[name] for name in both}):
        raise Refused(
            f"{run_dir} holds a run of other contents ({differing}). "
            "Choose another folder, put back what has changed, or remove the folder to begin anew."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_json(path: Path, content: Plain) -> None:
    """Write an object, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def digest(plain: Plain, digits: int) -> str:
    """So many hexadecimal digits that follow from a mapping, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def file_name(name: str) -> str:
    """`name` with only letters that every file system takes."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
