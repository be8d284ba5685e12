"""Attention heads, hidden units and embedding widths: the promises of DESIGN.md over small random transformers."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import nas_gate
from nas_gate import candidate
from nas_gate.attention import HeadsAttention
from nas_gate.removal import closed
from nas_gate.structure.corrections import Corrections, Needs, correct, first_run
from nas_gate.structure.trace import plain_operations

STEADY = settings(max_examples=8, derandomize=True, deadline=None)


class Attention(nn.Module):
    """Written as many are: the inner width is that of the input, and so is the scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Packed(nn.MultiheadAttention):
    """PyTorch's own, on one input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, batch_first=True)


class Block(nn.Module):
    """Attention and hidden units on a residual stream, norms before or after."""

    def __init__(self, kind: str, width: int, heads: int, hidden: int, first: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        self.kind, self.first = kind, first
        self.attention = Packed(width, heads) if kind == "packed" else Attention(width, heads)
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0] if self.kind == "packed" else self.attention(x)

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in zip(self.norms, (self.attend, self.mlp)):
            x = x + branch(norm(x)) if self.first else norm(x + branch(x))
        return x


class Transformer(nn.Module):
    """Tokens, a class token, positions, blocks, a head."""

    def __init__(self, blocks: list[tuple[str, int, bool]], heads: int, head_dim: int, norm: type[nn.Module]) -> None:
        super().__init__()
        width = heads * head_dim
        self.embed = nn.Linear(5, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 7, width))
        self.blocks = nn.Sequential(*(Block(kind, width, heads, hidden, first, norm) for kind, hidden, first in blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


def build(
    blocks: list[tuple[str, int, bool]], heads: int, head_dim: int, norm: type[nn.Module], seed: int
) -> Transformer:
    torch.manual_seed(seed)
    return informative(Transformer(blocks, heads, head_dim, norm).double())


def informative(model: Any) -> Any:
    for name, tensor in model.named_parameters():
        if not tensor.any():
            nn.init.normal_(tensor)
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, *((0.5, 1.5) if "norm" in name and name.endswith("weight") else (-0.5, 0.5)))
    return model.eval()


BLOCKS = st.tuples(st.sampled_from(["packed", "own"]), st.integers(2, 7), st.booleans())
NETWORKS = st.builds(
    build,
    st.lists(BLOCKS, min_size=1, max_size=2),
    st.integers(2, 4),
    st.integers(2, 4),
    st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
    st.integers(0, 99),
)


def random_keep(structure: nas_gate.Structure, seed: int) -> Tensor:
    """A random half of every group, and every other unit by a coin: code that divides widths needs some width."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, generator=generator) < 0.5
    for g in structure.groups:
        keep[g.start + torch.randperm(g.size, generator=generator)[: (g.size + 1) // 2]] = True
    return keep


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / a.abs().max()).detach())


@torch.no_grad()
def keeps_its_promises(model: nn.Module, x: Tensor, other: Tensor, seed: int) -> nas_gate.GatedModel:
    """Promises 1 to 3 on inputs of another batch size; returns the gated model, closed."""
    before = copy.deepcopy(model.state_dict())
    gated = nas_gate.attach(model, x)
    assert nas_gate.reachable_share(gated.structure) == 1.0
    assert distance(model(other), gated(other)) < 1e-6
    keep = random_keep(gated.structure, seed)
    removed = nas_gate.remove_with_proof(gated, keep)
    small = removed.model.eval()
    gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))
    assert distance(gated(other), small(other)) < 1e-5
    with plain_operations(), FlopCounterMode(display=False) as counter:
        small(x)
    assert round(gated.cost(keep).item()) == counter.get_total_flops() // 2
    assert round(gated.cost(keep, "params").item()) == sum(p.numel() for p in small.parameters())
    assert type(small) is type(model)
    assert small.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    return gated


@STEADY
@given(NETWORKS, st.integers(0, 99))
def test_random_transformers(model: Transformer, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(n, 6, 5, dtype=torch.float64, generator=generator) for n in (1, 3))
    gated = keeps_its_promises(model, x, other, seed)
    kinds = {g.name for g in gated.structure.groups}
    heads = model.blocks[0].attention.num_heads if model.blocks[0].kind == "packed" else model.blocks[0].attention.heads
    attention = [g for g in gated.structure.groups if "attention" in g.name]
    assert [g.size for g in attention] == [heads] * len(model.blocks), kinds


def swin(**more: Any) -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=7, **more)


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7),
    "swin": swin,
    "swin_v2": lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, tmp_path: Path):
    """Every MAC is in reach, and a candidate is built again from its record alone, pickled, exported and cut again."""
    torch.manual_seed(0)
    model = informative(TORCHVISION[name]())
    x, other = torch.randn(1, 3, 32, 32), torch.randn(3, 3, 32, 32)
    gated = keeps_its_promises(model, x, other, 0)
    removed = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0))
    expected = removed.model.eval()(other)
    if name != "vit":  # at this size its windows are shifted in no layer: it takes other branches
        tiny = torch.randn(2, 3, 16, 16)
        with closed(model, gated.structure, removed.keep) as small:
            assert distance(small(tiny), removed.model(tiny)) < 1e-5
    candidate.save(tmp_path / "c", removed.model, removed.cut, {}, {}, {})
    assert candidate.read(tmp_path / "c").cut == removed.cut
    assert torch.equal(nas_gate.load(tmp_path / "c", TORCHVISION[name])(other), expected)
    assert torch.equal(copy.deepcopy(removed.model)(other), expected)
    buffer = io.BytesIO()
    torch.save(removed.model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(other), expected)
    again = nas_gate.attach(removed.model, x)
    nas_gate.remove_with_proof(again, random_keep(again.structure, 1))


def test_exported_for_any_batch():
    """torch.export sees the corrected sizes and the signature of a corrected root."""
    torch.manual_seed(0)
    gated = nas_gate.attach(informative(TORCHVISION["vit"]()), torch.randn(1, 3, 32, 32))
    small = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0)).model.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(5, 3, 32, 32)
    assert distance(small(x), program.module()(x)) < 1e-5


def test_the_heads_of_pytorchs_attention_by_hand():
    """Of 4 heads of 2 numbers the first and the last: rows 0, 1, 6, 7 of each of q, k and v."""
    torch.manual_seed(0)
    block = Block("packed", 8, 4, 6, True, nn.LayerNorm)
    model = nn.Sequential(nn.Linear(3, 8), block, nn.Linear(8, 2)).double().eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    gated = nas_gate.attach(model, x)
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    (heads,) = (g for g in gated.structure.groups if g.name == "1.attention")
    keep[heads.start + 1 : heads.start + 3] = False
    small = nas_gate.remove_with_proof(gated, keep).model[1].attention
    old = model[1].attention
    assert isinstance(small, HeadsAttention)
    assert (small.num_heads, small.head_dim, small.embed_dim) == (2, 2, 8)
    rows = [0, 1, 6, 7]
    assert torch.equal(small.in_proj_weight, old.in_proj_weight[[r + 8 * i for i in range(3) for r in rows]])
    assert torch.equal(small.out_proj.weight, old.out_proj.weight[:, rows])
    assert (old.num_heads, type(old)) == (4, Packed)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float64])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_pytorchs_attention_with_all_heads_is_ours(options: dict[str, Any], masked: torch.dtype | None, padded: bool):
    """An oracle: ours is PyTorch's where both can be."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **options).double().eval()
    ours = copy.deepcopy(theirs)
    ours.__class__ = HeadsAttention
    q, k = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(5, 2, 8, dtype=torch.float64)
    if options.get("batch_first"):
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    more: dict[str, Any] = {}
    if masked is not None:
        mask = torch.rand(3, 5) < 0.3
        more["attn_mask"] = mask if masked == torch.bool else torch.randn(4, 3, 5, dtype=masked)
    if padded:
        more["key_padding_mask"] = torch.tensor([[False] * 5, [False, False, False, True, True]])
        if masked == torch.float64:
            more["key_padding_mask"] = more["key_padding_mask"].double() * -5
    for weights in (False, True):
        expected, got = (m(q, k, k, need_weights=weights, **more) for m in (theirs, ours))
        assert distance(expected[0], got[0]) < 1e-12
        assert (expected[1] is None and got[1] is None) or distance(expected[1], got[1]) < 1e-12
    one = (q[0], k[0]) if options.get("batch_first") else (q[:, 0], k[:, 0])
    assert distance(theirs(one[0], one[1], one[1])[0], ours(one[0], one[1], one[1])[0]) < 1e-12


def test_encoder_and_decoder():
    class Translation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 16)
            self.transformer = nn.Transformer(16, 4, 1, 2, 12, batch_first=True)
            self.out = nn.Linear(16, 11)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.out(self.transformer(self.words(source), self.words(target), tgt_mask=mask))

    torch.manual_seed(0)
    model = informative(Translation())
    inputs = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 6))
    gated = nas_gate.attach(model, inputs)
    assert nas_gate.reachable_share(gated.structure) == 1.0
    assert sorted(g.size for g in gated.structure.groups) == [4] * 5 + [12] * 3 + [16]
    small = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0)).model
    assert small.transformer.d_model < 16
    small.train()(*inputs).square().mean().backward()


@pytest.mark.parametrize("look", [lambda x: x.mean(1), lambda x: x.roll(1, 1), lambda x: x.select(1, 2)])
def test_what_nobody_looks_at_fixes_nothing(look: Callable[[Tensor], Tensor]):
    def net(use: bool) -> nn.Module:
        class Look(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen = look(x)
                return x + seen.sum() if use else x

        return nn.Sequential(nn.Linear(3, 6), Look(), nn.Linear(6, 2))

    assert [nas_gate.analyze(net(use), torch.randn(4, 3)).units for use in (False, True)] == [6, 0]


def test_corrections_by_hand():
    """A size is multiplied by right / computed, so that it may be a multiple of the batch; a factor is replaced."""

    class Folded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2 * len(x), -1) * 0.5

    module = Folded()
    correct(module, Corrections({"reshape:0": {0: (3, 2)}}, {"mul:0": (0.25, 0.5)}))
    assert torch.equal(module(torch.ones(4, 6)), torch.full((12, 2), 0.25))
    assert torch.equal(module(torch.ones(2, 6)), torch.full((6, 2), 0.25))
    assert type(module) is Folded
    correct(module, Corrections({"reshape:0": {0: (1, 3)}}, {}))  # cut again: the earlier corrections come first
    assert torch.equal(module(torch.ones(4, 6)), torch.full((4, 6), 0.25))
    of_before = Folded()  # candidates of earlier versions do not say what a factor stands for
    correct(of_before, Corrections({}, {"mul:0": (0.25, math.nan)}))
    assert torch.equal(of_before(torch.ones(1, 6)), torch.full((2, 3), 0.25))
    for elsewhere in (Corrections({}, {"mul:0": (0.25, 0.3)}), Corrections({"reshape:0": {2: (3, 2)}}, {})):
        module = Folded()
        correct(module, elsewhere)
        with pytest.raises(RuntimeError, match=r"Folded must take the path .*, but (mul|reshape):0@.* has the"):
            module(torch.ones(4, 6))


def test_corrections_are_found_in_a_run():
    """The first run gives what later ones give; one that fails with corrections is repeated without any."""

    class Literal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 3, 2) * 0.5

    x = torch.arange(8.0).reshape(2, 4)
    module = Literal()
    needs = {"": Needs({"reshape:0": [-1, 2, 2]}, {"mul:0": 0.25})}
    result, found = first_run(module, needs, lambda: module(x))
    assert torch.equal(result, x.reshape(2, 2, 2) * 0.25)
    assert torch.equal(module(x), result)
    assert found == {"": Corrections({"reshape:0": {1: (2, 3)}}, {"mul:0": (0.25, 0.5)})}

    module = Literal()
    result, found = first_run(module, {"": Needs({"reshape:0": [5, 5, 5]}, {})}, lambda: module(torch.ones(1, 6)))
    assert torch.equal(result, torch.full((1, 3, 2), 0.5))
    assert found == {}
    assert "forward" not in vars(module)


def test_a_size_that_is_no_units_is_left_alone():
    """A factor and a size that do not depend on any width stay as the code has them."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    gated = nas_gate.attach(model, torch.randn(4, 3))
    removed = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0))
    assert removed.model[1].unflattened_size == (2, 3)
    assert F.relu(removed.model(torch.randn(2, 3))).shape == (2, 2)
