"""What a measurement depends on: hardware, versions, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe(**more: Any) -> dict[str, Any]:
    """Processor, memory, versions, commit, command and time, as plain data; `more` is added."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in PACKAGES}},
        "commit": _commit(),
        "command": shlex.join(["python", *(_shown(a) for a in sys.argv)]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


PACKAGES = ("nas-gate", "torch", "torchvision", "numpy", "scipy", "torch-pruning", "timm", "onnxruntime")


def write(path: Path, **more: Any) -> None:
    """`describe` into a JSON file."""
    save(path, describe(**more))


def save(path: Path, description: dict[str, Any]) -> None:
    """A description into a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description, indent=2) + "\n")


def _shown(argument: str) -> str:
    path = Path(argument)
    root = Path(__file__).resolve().parent.parent
    return str(path.resolve().relative_to(root)) if path.is_absolute() and root in path.resolve().parents else argument


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
