"""Where a module's code stands: the source of the call that is running, as text that says what is called with what."""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn

LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
"""Folders of code that other versions may write otherwise; the modules in it are known by numbers."""

RECOMPUTES = torch.utils.checkpoint.__file__

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>"}
"""Code that is a frame of its own in some versions of Python, and in others a part of what is around it."""


STARTS = {nn.Module._call_impl.__code__: "self"}
"""Code that runs a module's own forward, and its variable that is the module."""


class Place(NamedTuple):
    """Where a call stands: the running module (None outside of any), and the calls from its `forward` to this one.

    `text` has those in the source file of the module, outermost first, joined by " > "; blanks, comments, and how
    lines are broken do not count. It is "" where the source is not known. `recomputed`: the backward pass will run the
    call again, by torch.utils.checkpoint.
    """

    module: nn.Module | None
    text: str
    recomputed: bool


def place_of_call() -> Place:
    """The place of the call that is the caller's caller.

    What other files do on the way is left out: libraries that are called there may change.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)  # below the one of __torch_function__
    while frame is not None and frame.f_code not in STARTS:
        frames.append(frame)
        frame = frame.f_back
    if frame is None:
        return Place(None, "", False)
    module: nn.Module = frame.f_locals[STARTS[frame.f_code]]
    kind: Any = type(module)
    files, texts, inside = _files(kind), [], False
    for one in frames:
        if not inside and one.f_code.co_filename in files:
            texts.append(_text(one.f_code, one.f_lasti))
        inside = one.f_code.co_name in COMPREHENSIONS
    recomputed = any(one.f_code.co_filename == RECOMPUTES for one in frames)
    return Place(module, " > ".join(reversed(texts)) if all(texts) else "", recomputed)


@cache
def _files(kind: Any) -> frozenset[str]:
    """The files that a module's class and those that it inherits from have their `forward` in."""
    forwards = [inspect.unwrap(vars(one)["forward"]) for one in kind.__mro__ if "forward" in vars(one)]
    files = {forward.__code__.co_filename for forward in forwards if hasattr(forward, "__code__")}
    return frozenset(file for file in files if not file.startswith(LIBRARIES))


Position = tuple[int | None, int | None, int | None, int | None]
"""First line, last line, first column and the one behind the last, as code objects give them."""


def _text(code: CodeType, instruction: int) -> str:
    """The expression that an instruction belongs to, of a call only its name and arguments; "" if not known.

    Of equal ones in the same code the second is marked ~1, and so on.
    """
    text, last = _expressions(code)[_positions(code)[instruction // 2]]
    which = _equal_ones(code)[text].index(last)
    return f"{text}~{which}" if text and which else text


@cache
def _positions(code: CodeType) -> list[Position]:
    """By instruction."""
    return list(code.co_positions())


@cache
def _expressions(code: CodeType) -> dict[Position, tuple[str, tuple[int, int]]]:
    """By position, the expressions of some code, and where they end: where they begin depends on the version."""
    lines = linecache.getlines(code.co_filename)
    return {p: (_expression(lines, *p), (p[1] or 0, p[3] or 0)) for p in _positions(code)}


@cache
def _equal_ones(code: CodeType) -> dict[str, list[tuple[int, int]]]:
    """By expression, where it ends, in the order of the source."""
    found: dict[str, set[tuple[int, int]]] = {}
    for text, last in _expressions(code).values():
        found.setdefault(text, set()).add(last)
    return {text: sorted(ends) for text, ends in found.items()}


def _expression(lines: Sequence[str], first: int | None, last: int | None, start: int | None, end: int | None) -> str:
    if first is None or last is None or start is None or end is None or len(lines) < last:
        return ""
    rows = [line.encode() for line in lines[first - 1 : last]]  # columns are those of bytes
    rows[-1] = rows[-1][:end]
    rows[0] = rows[0][start:]
    text = "".join(re.sub(r"#.*|\s", "", row.decode(errors="replace")) for row in rows).replace(",)", ")")
    if not text.endswith(")"):
        return text
    depth = 0
    for i in range(len(text) - 1, -1, -1):
        depth += (text[i] in ")]}") - (text[i] in "([{")
        if depth == 0:
            break
    name = re.search(r"\w*$", text[:i])
    assert name is not None  # it may be empty
    return text[name.start() :]
