"""Models of the transformers library, small and random, built from configurations: nothing is downloaded.

Nothing in the package knows them. Their outputs are dataclasses, and sizes are attributes of their modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nas_gate
from nas_gate import candidate
from nas_gate.structure.trace import plain_operations

hf = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, HIDDEN, WORDS, CLASSES = 32, 2, 4, 48, 40, 5
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": HIDDEN}
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 16, "num_labels": CLASSES, "initializer_range": 0.3}
DECODER = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
BOTH = [HEADS, HIDDEN] * LAYERS
"""The units of each layer's attention and MLP."""


def words(count: int, seed: int) -> dict[str, Tensor]:
    shape = (count, 5 + count)
    return {"input_ids": torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(seed))}


def words_and_mask(count: int, seed: int) -> dict[str, Tensor]:
    ids = words(count, seed)["input_ids"]
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < ids.shape[1] - 2).long().expand_as(ids)}


def translated(count: int, seed: int) -> dict[str, Tensor]:
    return {**words_and_mask(count, seed), "decoder_input_ids": words(count, seed + 9)["input_ids"]}


def images(count: int, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


@dataclass(frozen=True)
class Case:
    """How to build a model, inputs by batch size and seed, units of groups, and the least share of MACs in reach."""

    model: Any
    config: Any
    options: dict[str, Any]
    inputs: Callable[[int, int], dict[str, Tensor]]
    units: Sequence[int]
    share: float = 1.0

    def build(self, attention: str) -> nn.Module:
        torch.manual_seed(0)
        return self.model(self.config(**self.options, attn_implementation=attention)).eval()


CASES = {
    # the pooler is one more layer of the embedding's width
    "bert": Case(hf.BertForSequenceClassification, hf.BertConfig, TEXT, words_and_mask, [WIDTH, *BOTH, WIDTH]),
    "bert of tokens": Case(hf.BertForTokenClassification, hf.BertConfig, TEXT, words, [WIDTH, *BOTH]),
    "distilbert": Case(
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        {**TEXT, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": HIDDEN},
        words_and_mask,
        [WIDTH, *BOTH, WIDTH],
    ),
    "vit": Case(
        hf.ViTForImageClassification,
        hf.ViTConfig,
        {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": CLASSES, "initializer_range": 0.3},
        images,
        [WIDTH, *BOTH],
    ),
    "dinov2": Case(
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        {**SIZES, "mlp_ratio": 2, "image_size": 32, "patch_size": 8, "num_labels": CLASSES, "initializer_range": 0.3},
        images,
        [WIDTH, *[HEADS, 2 * WIDTH] * LAYERS],
    ),
    "gpt2": Case(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {**DECODER, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": HIDDEN, "n_positions": 16},
        words,
        [WIDTH, *BOTH],
    ),
    # two query heads share one head of keys and values, and go with it
    "llama": Case(
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {**DECODER, "num_key_value_heads": 2},
        words_and_mask,
        [WIDTH, *[2, HIDDEN] * LAYERS],
    ),
    "qwen3": Case(
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config,
        {**DECODER, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS},
        words,
        [WIDTH, *BOTH],
    ),
    # slices one matrix into queries, keys and values
    "phi3": Case(hf.Phi3ForCausalLM, hf.Phi3Config, DECODER, words, [WIDTH, *BOTH]),
    # the encoder's outputs are outputs of the model, so the embedding is not offered; the bias by distance is shared by
    # the layers of a stack, and so are their heads
    "t5": Case(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
        | {"use_cache": False, "decoder_start_token_id": 0},
        translated,
        [HEADS] * 3 + [HIDDEN] * 2 * LAYERS,
        0.9,
    ),
    "gpt_neox": Case(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, DECODER, words, [WIDTH, *BOTH]),
}


def random_keep(structure: nas_gate.Structure, seed: int) -> Tensor:
    """Every unit by a coin, and the first of every group."""
    keep = torch.rand(structure.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[[g.start for g in structure.groups]] = True
    return keep


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / a.abs().max()).detach())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_attached_cut_and_equal(name: str, attention: str):
    case = CASES[name]
    model, inputs, fresh = case.build(attention), case.inputs(1, 0), case.inputs(3, 1)
    before = copy.deepcopy(model.state_dict())
    gated = nas_gate.attach(model, inputs)
    structure = gated.structure
    assert sorted(g.size for g in structure.groups) == sorted(case.units), nas_gate.describe(structure)
    assert nas_gate.reachable_share(structure) >= case.share
    assert distance(model(**fresh).logits, gated(**fresh).logits) < 1e-6
    gated(**fresh).logits.square().mean().backward()
    slopes = gated.gates.weight.grad
    assert slopes is not None
    assert bool(slopes.isfinite().all())
    assert all(bool(slopes[g.start : g.stop].any()) for g in structure.groups)

    keep = random_keep(structure, 0)
    removed = nas_gate.remove_with_proof(gated, keep)
    small = removed.model.eval()
    assert type(small) is type(model)
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))
    dense, closed, cut = (m(**fresh).logits for m in (model, gated, small))
    assert distance(closed, cut) < 1e-5
    assert distance(dense, cut) > 1e-2
    with plain_operations(), FlopCounterMode(display=False) as counter:
        small(**inputs)
    assert round(gated.cost(keep).item()) == counter.get_total_flops() // 2 == removed.macs
    assert round(gated.cost(keep, "params").item()) == sum(p.numel() for p in small.parameters()) == removed.params
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())

    weights = [p.detach().clone() for p in small.parameters()]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()(**fresh).logits.square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, w) for p, w in zip(small.parameters(), weights))
    assert all(bool(p.isfinite().all()) for p in small.parameters())


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "phi3"])
def test_saved_and_loaded(name: str, tmp_path: Path):
    """A candidate's record holds all that a module computes otherwise; the configuration stays that of the factory."""
    case = CASES[name]
    model, fresh = case.build("sdpa"), case.inputs(3, 1)
    gated = nas_gate.attach(model, case.inputs(1, 0))
    removed = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 1))
    candidate.save(tmp_path / "c", removed.model, removed.cut, {}, {}, {})
    loaded = nas_gate.load(tmp_path / "c", lambda: case.build("sdpa")).eval()
    assert torch.equal(loaded(**fresh).logits, removed.model.eval()(**fresh).logits)
    again = nas_gate.attach(removed.model, case.inputs(1, 0))
    nas_gate.remove_with_proof(again, random_keep(again.structure, 2))


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_branches_of_layers(name: str):
    case = CASES[name]
    gated = nas_gate.attach(case.build("sdpa"), case.inputs(1, 0), depth=True)
    kinds = [g.kind for g in gated.structure.groups]
    assert kinds.count("branch") == 2 * LAYERS
    removed = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 3))
    assert removed.max_relative_error < 1e-5
