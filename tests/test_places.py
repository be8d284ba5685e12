"""Where a module's code stands: the same place however it is written, another for every expression."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_gate.structure.sizes import Calls, CorrectedForward, Corrections, Needs, correct, first_run, watched

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not know its columns before Python 3.11")


def calls_of(model: nn.Module, x: Tensor) -> list[str]:
    """The calls with sizes or factors of the model's own forward, as they are known."""
    seen: list[str] = []

    def sizes(path: str, call: str, given: list[int]) -> list[int]:
        seen.append(call)
        return given

    def factor(path: str, call: str, given: float) -> float:
        seen.append(call)
        return given

    with watched(model, Calls(sizes, factor)):
        model(x)
    return seen


def forward_of(source: str, folder: Path) -> type[nn.Module]:
    """A module whose forward is `source`, in a file of its own."""
    path = folder / f"written_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: type[nn.Module] = module.Written
    return kind


ONE_LINE = """
from torch import nn
class Written(nn.Module):
    def forward(self, x):
        n, c = x.shape
        return x.reshape(n, 2, c // 2).transpose(1, 2).reshape(n, c) * 0.5
"""
MANY_LINES = """
from torch import nn


class Written(nn.Module):
    def forward(self, x):
        n, c = x.shape
        return (
            x.reshape(
                n,
                2,  # halves
                c // 2,
            )
            .transpose(1, 2)
            .reshape(n, c)
        ) * 0.5
"""


def test_how_lines_are_broken_does_not_count(tmp_path: Path) -> None:
    x = torch.ones(3, 4)
    one, many = (calls_of(forward_of(source, tmp_path)(), x) for source in (ONE_LINE, MANY_LINES))
    assert one[:2] == many[:2] == ["reshape:0@reshape(n,2,c//2)#0", "reshape:1@reshape(n,c)#0"]
    assert one[2] == "mul:0@x.reshape(n,2,c//2).transpose(1,2).reshape(n,c)*0.5#0"


def test_code_without_a_source_is_known_by_numbers() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec("\n" + ONE_LINE, names)
    assert calls_of(names["Written"](), torch.ones(3, 4)) == ["reshape:0", "reshape:1", "mul:0"]


def halves(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, 2, -1)


class Helped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        pieces = [part.view(n, -1) for part in halves(x, n).unbind(1)]
        return F.layer_norm(halves(torch.cat(pieces, 1), n)[:, :, :1], (1,))


def test_helpers_comprehensions_and_repeats() -> None:
    """A helper's call is another one for everyone who calls it; a comprehension is a part of what is around it."""
    assert calls_of(Helped(), torch.ones(3, 4)) == [
        "reshape:0@halves(x,n) > reshape(n,2,-1)#0",
        "view:0@view(n,-1)#0",
        "view:1@view(n,-1)#1",
        "reshape:1@halves(torch.cat(pieces,1),n) > reshape(n,2,-1)#0",
        "__getitem__:0@halves(torch.cat(pieces,1),n)[:,:,:1]#0",
        "layer_norm:0@layer_norm(halves(torch.cat(pieces,1),n)[:,:,:1],(1))#0",
    ]


class Paths(nn.Module):
    """Its sizes and factor are literals; `way` adds calls before them, leaves the first out, or writes it otherwise."""

    way = "analysed"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "more":
            x = x.reshape(len(x), -1) * 1.0
        if self.way == "other":
            x = x.reshape(-1, 6)
        elif self.way != "less":
            x = x.reshape(-1, 3, 2)
        return x.flatten(1).reshape(-1, 6) * 0.5


def test_corrections_follow_the_code_on_other_paths() -> None:
    """By hand: of 3 pairs 2 are kept. Numbers alone would have corrected the calls that came before, or others."""
    x = torch.arange(8.0).reshape(2, 4)
    module = Paths()
    needs = {
        "": Needs(
            {"reshape:0@reshape(-1,3,2)#0": [-1, 2, 2], "reshape:1@reshape(-1,6)#0": [-1, 4]},
            {"mul:0@x.flatten(1).reshape(-1,6)*0.5#0": 0.25},
        )
    }
    result, found = first_run(module, needs, lambda: module(x))
    assert torch.equal(result, x * 0.25)
    assert found[""] == Corrections(
        {"reshape:0@reshape(-1,3,2)#0": {1: (2, 3)}, "reshape:1@reshape(-1,6)#0": {1: (4, 6)}},
        {"mul:0@x.flatten(1).reshape(-1,6)*0.5#0": (0.25, 0.5)},
    )
    for module.way in ("analysed", "more", "less"):
        assert torch.equal(module(x), x * 0.25), module.way
        assert torch.equal(module.forward(x), x * 0.25), module.way


def test_code_that_stands_where_other_code_was_analysed_is_refused() -> None:
    """Code that was edited since, or a path without the corrected call: nobody knows what it needs."""
    module = Paths()
    correct(module, Corrections({"reshape:0@reshape(-1,3,2)#0": {1: (2, 3)}}, {}))
    module.way = "other"
    message = r"Paths must take the path .* but reshape:0@reshape\(-1,6\)#0 stands in the place of reshape:0@reshape"
    with pytest.raises(RuntimeError, match=message):
        module(torch.ones(2, 6))


@pytest.mark.parametrize("known", [lambda call: call, lambda call: call.partition("@")[0]])
def test_a_compiled_module_is_corrected_by_numbers(known: Callable[[str], str]) -> None:
    module = Paths()
    correct(
        module,
        Corrections(
            {known("reshape:0@reshape(-1,3,2)#0"): {1: (2, 3)}, known("reshape:1@reshape(-1,6)#0"): {1: (4, 6)}}, {}
        ),
    )
    x = torch.arange(8.0).reshape(2, 4)
    assert isinstance(module.forward, CorrectedForward)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x * 0.5)
    assert torch.equal(module(x), x * 0.5)
