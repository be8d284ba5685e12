"""What a running trial tells its study after every epoch; light, for the command line imports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from nas_gate.search import EpochHook

_present: ContextVar[EpochHook | None] = ContextVar("nas_gate_epoch_hook", default=None)


def epoch_hook() -> EpochHook | None:
    """The hook of the study's trial that this process runs now, for `nas_gate.search.search`; else None."""
    return _present.get()


@contextmanager
def hooked(hook: EpochHook | None) -> Iterator[None]:
    """Make `hook` the present one within the block."""
    token = _present.set(hook)
    try:
        yield
    finally:
        _present.reset(token)
