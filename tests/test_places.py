"""Where a module's code stands: the same place however it is written, another for every expression."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nas_gate
from nas_gate.removal import closed
from nas_gate.structure.corrections import CorrectedForward, Corrections, Needs, correct, first_run
from nas_gate.structure.sizes import Calls, parts, watched


def calls_of(model: nn.Module, x: Tensor) -> list[str]:
    """The calls with sizes or factors of the model's own forward, as they are known."""
    seen: list[str] = []

    def sizes(path: str, call: str, given: list[int]) -> list[int]:
        seen.append(call)
        return given

    def factor(path: str, call: str, given: float) -> float:
        seen.append(call)
        return given

    with watched(model, Calls(model, sizes, factor)):
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
    module = Paths()  # of the two equal expressions in it the second one runs
    needs = {
        "": Needs(
            {"reshape:0@reshape(-1,3,2)#0/1": [-1, 2, 2], "reshape:1@reshape(-1,6)~1#0/1": [-1, 4]},
            {"mul:0@x.flatten(1).reshape(-1,6)*0.5#0/1": 0.25},
        )
    }
    result, found = first_run(module, needs, lambda: module(x))
    assert torch.equal(result, x * 0.25)
    assert found[""] == Corrections(
        {"reshape:0@reshape(-1,3,2)#0/1": {1: (2, 3)}, "reshape:1@reshape(-1,6)~1#0/1": {1: (4, 6)}},
        {"mul:0@x.flatten(1).reshape(-1,6)*0.5#0/1": (0.25, 0.5)},
    )
    for module.way in ("analysed", "more", "less"):
        assert torch.equal(module(x), x * 0.25), module.way
        assert torch.equal(module.forward(x), x * 0.25), module.way


def test_code_that_stands_where_other_code_was_analysed_is_refused() -> None:
    """Code that was edited since, or a path without the corrected call: nobody knows what it needs."""
    module = Paths()
    correct(module, Corrections({"reshape:0@reshape(-1,3,2)#0/1": {1: (2, 3)}}, {}))
    module.way = "other"
    message = r"Paths must take the path .* but reshape:0@reshape\(-1,6\)#0 stands in the place of reshape:0@reshape"
    with pytest.raises(RuntimeError, match=message):
        module(torch.ones(2, 6))


def attention(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * width**-0.5).softmax(-1) @ v


class Refines(nn.Module):
    """Attention with a scale by the width of what enters, which cutting changes, as often as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def step(self, x: Tensor) -> Tensor:
        return x + attention(self.q(x), self.k(x), self.v(x), x.shape[-1])

    def forward(self, x: Tensor, steps: int = 2, recomputed: bool = False) -> Tensor:
        x = self.stem(x)
        for _ in range(steps):
            x = checkpoint(self.step, x, use_reentrant=False) if recomputed else self.step(x)
        answer: Tensor = self.head(x)
        return answer


def removed_refinement() -> tuple[nn.Module, Callable[..., Tensor], Tensor]:
    """The removed model, and what it should compute."""
    torch.manual_seed(0)
    model, x = Refines(), torch.randn(1, 5, 8)
    gated = nas_gate.attach(model, x)
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    keep[1::3] = False
    removed = nas_gate.remove_with_proof(gated, keep)
    (corrections,) = removed.cut.corrections.values()
    assert [parts(call).of for call in corrections.factors] == [2, 2]

    def wanted(*args: Any) -> Tensor:
        with torch.no_grad(), closed(model, gated.structure, keep) as small:
            result: Tensor = small(*args)
            return result

    return removed.model, wanted, x


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_loops_may_run_more_or_fewer_times(steps: int) -> None:
    small, wanted, x = removed_refinement()
    torch.testing.assert_close(small(x, steps), wanted(x, steps))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:FutureWarning")
def test_what_would_lose_corrections_is_refused() -> None:
    """Recomputation in the backward pass, and torch.jit.trace, would run the code as it is written."""
    small, wanted, x = removed_refinement()
    with pytest.raises(RuntimeError, match=r"is corrected, which torch.utils.checkpoint does not see"):
        small(x, 2, True)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x, 2, True), wanted(x))
    with pytest.raises(RuntimeError, match=r"which torch.jit.trace would lose: use torch.export"):
        torch.jit.trace(small, (x,))
    whole = checkpoint(small, x, use_reentrant=False)  # the corrected module itself is run again
    whole.sum().backward()
    got = [p.grad for p in small.parameters()]
    small.zero_grad()
    small(x).sum().backward()
    for mine, p in zip(got, small.parameters()):
        torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: module._replicate_for_data_parallel()])
def test_copies_run_their_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    """nn.DataParallel makes such copies: shallow ones, with other weights."""
    small, wanted, x = removed_refinement()
    twin = copied(small)
    twin._modules = {name: copy.deepcopy(module) for name, module in small._modules.items()}
    with torch.no_grad():
        twin.head.weight.zero_()
    assert torch.equal(twin(x), twin.head.bias.expand(1, 5, 3))
    torch.testing.assert_close(small(x), wanted(x))


class Skips(nn.Module):
    """Halves of several layers, of which a run may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.head, self.skipped = nn.Linear(24, 3), -1

    def forward(self, x: Tensor) -> Tensor:
        halves = []
        for i, layer in enumerate(self.layers):
            if i != self.skipped:
                y = layer(x)
                halves += [y[:, :6].tanh(), y[:, 6:]]
        answer: Tensor = self.head(torch.cat(halves, 1))
        return answer


def test_occurrences_of_different_corrections_must_all_be_there() -> None:
    module = Skips()
    correct(
        module, Corrections({"__getitem__:0@y[:,:6]#0/2": {0: (5, 6)}, "__getitem__:2@y[:,:6]#1/2": {0: (4, 6)}}, {})
    )
    module.head = nn.Linear(5 + 6 + 4 + 6, 3)
    assert module(torch.ones(1, 8)).shape == (1, 3)
    module.skipped, module.head = 0, nn.Linear(5 + 6, 3)
    with pytest.raises(RuntimeError, match=r"must take the path .* but __getitem__@y\[:,:6\] runs 1 times, not 2"):
        module(torch.ones(1, 8))


class Heads(nn.Module):
    """Attention whose widths of heads are computed from that of its input."""

    def __init__(self, heads: int, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.heads, self.branch = heads, branch
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        answer: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return answer

    def forward(self, x: Tensor) -> Tensor:
        if self.branch is None:
            return self.attend(x) if self.training else self.attend(x * 1.0)
        x = x + self.branch(x)
        return x + self.attend(x)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_width_that_is_no_units_is_kept(heads: int) -> None:
    """With one head nothing of the attention goes, and the code still computes its width from the embedding."""
    torch.manual_seed(0)
    gated = nas_gate.attach(nn.Sequential(nn.Linear(8, 16), Heads(heads), nn.Linear(16, 3)), torch.randn(2, 5, 8))
    sizes = {group.name: group.size for group in gated.structure.groups}
    assert sizes == {"0": 16, "1.out": 16, **({"1.qkv": heads} if heads > 1 else {})}
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    keep[1:9] = False
    assert nas_gate.remove_with_proof(gated, keep).max_relative_error < 1e-6


class Scaled(Heads):
    """Its scale is computed from the width of what enters: with fewer channels than heads it would divide by 0."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        shares = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        answer: Tensor = self.out((shares @ v).transpose(1, 2).flatten(2))
        return answer


def test_as_many_units_stay_as_the_code_needs_to_run() -> None:
    """Four of the stem's for four heads, where the factor is (4 // 4) ** -0.5; all else may go down to one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Scaled(4), nn.Linear(16, 8), nn.Linear(8, 3))
    gated = nas_gate.attach(model, torch.randn(2, 5, 8))
    assert {group.name: group.least for group in gated.structure.groups} == {"0": 4, "1.qkv": 1, "1.out": 1, "2": 1}
    assert nas_gate.reachable(gated.structure)[0] < 0.15
    keep = nas_gate.land(gated, 0.15)
    removed = nas_gate.remove_with_proof(gated, keep)
    assert removed.model[0].out_features == 4
    assert removed.max_relative_error < 1e-6
    keep[1:4] = False
    with pytest.raises(ValueError, match=r"kept are 1 of 0 \(at least 4\)"):
        nas_gate.remove_with_proof(gated, keep)


def test_a_run_that_fails_with_and_without_corrections_says_why_with_them() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.reshape(-1, 3, 2)
            raise ValueError(f"it has {len(y)} rows")

    module = Fails()
    needs = {"": Needs({"reshape:0@reshape(-1,3,2)#0/1": [-1, 2, 2]}, {})}
    with pytest.raises(ValueError, match="it has 3 rows"):
        first_run(module, needs, lambda: module(torch.ones(2, 6)))


def test_a_branch_in_the_same_words_is_counted_apart() -> None:
    """Closing the branch takes its calls away; those of the module around it stay what they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Heads(4, Heads(4)), nn.Linear(16, 3))
    gated = nas_gate.attach(model, torch.randn(2, 5, 8), depth=True)
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    keep[1:9] = False
    branch = next(group for group in gated.structure.groups if group.kind == "branch")
    for keep[branch.start] in (True, False):
        assert nas_gate.remove_with_proof(gated, keep).max_relative_error < 1e-6


@pytest.mark.parametrize("known", [lambda call: call, lambda call: call.partition("@")[0]])
def test_a_compiled_module_is_corrected_by_numbers(known: Callable[[str], str]) -> None:
    module = Paths()
    correct(
        module,
        Corrections(
            {known("reshape:0@reshape(-1,3,2)#0/1"): {1: (2, 3)}, known("reshape:1@reshape(-1,6)~1#0/1"): {1: (4, 6)}},
            {},
        ),
    )
    x = torch.arange(8.0).reshape(2, 4)
    assert isinstance(module.forward, CorrectedForward)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x * 0.5)
    assert torch.equal(module(x), x * 0.5)
