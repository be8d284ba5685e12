"""Where a module's code stands: the source of the call that is running, as text that says what is called with what."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Container
from functools import cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType

import torch

LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
"""Folders of code between a module's code and its call, which may be other code in other versions."""

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>"}
"""Code that is a frame of its own in some versions of Python, and in others a part of what is around it."""


def place_of_call(starts: Container[CodeType]) -> str:
    """The calls from the running module's `forward` to this one, outermost first, joined by " > ".

    `starts` is the code that runs modules, below whose frames those of a `forward` are. "" where the source of a call
    is not known. Blanks, comments, and how lines are broken do not count.
    """
    texts: list[str] = []
    frame: FrameType | None = sys._getframe(2)  # below the one of __torch_function__
    inside = False
    while frame is not None and frame.f_code not in starts:
        code = frame.f_code
        if not inside and not code.co_filename.startswith(LIBRARIES):
            text = _text(code, frame.f_lasti)
            if not text:
                return ""
            texts.append(text)
        inside = code.co_name in COMPREHENSIONS
        frame = frame.f_back
    return " > ".join(reversed(texts))


@cache
def _text(code: CodeType, instruction: int) -> str:
    """The expression that an instruction of some code belongs to, of a call only its name and arguments."""
    if not hasattr(code, "co_positions"):  # Python 3.10
        return ""
    first, last, start, end = next(islice(code.co_positions(), instruction // 2, None))
    lines = linecache.getlines(code.co_filename)
    if first is None or last is None or start is None or end is None or len(lines) < last:
        return ""
    rows = [line.encode() for line in lines[first - 1 : last]]  # columns are those of bytes
    rows[-1] = rows[-1][:end]
    rows[0] = rows[0][start:]
    return _call("".join(re.sub(r"#.*|\s", "", row.decode()) for row in rows).replace(",)", ")"))


def _call(expression: str) -> str:
    """Of a chain of calls the last: where a chain begins is told otherwise by other versions of Python."""
    if not expression.endswith(")"):
        return expression
    depth = 0
    for i in range(len(expression) - 1, -1, -1):
        depth += (expression[i] in ")]}") - (expression[i] in "([{")
        if depth == 0:
            break
    name = re.search(r"\w*$", expression[:i])
    assert name is not None  # it may be empty
    return expression[name.start() :]
