"""What passes between a study and the job that it runs: errors, and the look at every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nas_gate.search import EpochHook


class Stopped(Exception):
    """Raised in a job by its `on_epoch`: a trial stopped early."""


class Lost(Exception):
    """Raised in a job by its `on_epoch`: another process has taken the trial over."""


_present: list[EpochHook] = []


@contextmanager
def looking_on(on_epoch: EpochHook) -> Iterator[None]:
    """Let `epoch_hook` return `on_epoch`, for jobs that Hydra calls with a configuration and nothing else."""
    _present.append(on_epoch)
    try:
        yield
    finally:
        _present.pop()


def epoch_hook() -> EpochHook | None:
    """What to call after every epoch of the trial that this process runs; None outside of one."""
    return _present[-1] if _present else None
