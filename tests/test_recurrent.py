"""Recurrent layers: their hidden units and what enters them go as channels do, whatever surrounds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nas_gate
from nas_gate.removal import closed

WORDS, WIDTH, HIDDEN, ANSWERS = 11, 6, 8, 5


class Reads(nn.Module):
    """Words in, answers for every word out."""

    def __init__(self, kind: type[nn.RNNBase], packs: bool = False, **more: Any) -> None:
        super().__init__()
        self.packs = packs
        self.words, self.layer = nn.Embedding(WORDS, WIDTH), kind(WIDTH, HIDDEN, batch_first=True, **more)
        given = more.get("proj_size", HIDDEN) * (2 if more.get("bidirectional") else 1)
        self.answer = nn.Linear(given, ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        read = self.words(x)
        if self.packs:
            lengths = torch.arange(x.shape[1], x.shape[1] - len(x), -1)
            read = pack_padded_sequence(read, lengths, batch_first=True)
        given = self.layer(read)[0]
        if self.packs:
            given = pad_packed_sequence(given, batch_first=True)[0]
        answers: Tensor = self.answer(given)
        return answers


class Steps(nn.Module):
    """A cell that the network's own loop calls for every word."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.words, self.cell, self.answer = nn.Embedding(WORDS, WIDTH), kind(WIDTH, HIDDEN), nn.Linear(HIDDEN, ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for word in self.words(x).unbind(1):
            state = self.cell(word, state)
        answers: Tensor = self.answer(state[0] if isinstance(state, tuple) else state)
        return answers


class Translates(nn.Module):
    """A decoder that begins in the state in which the encoder ends: their hidden units are the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder, self.decoder = (nn.LSTM(WIDTH, HIDDEN, batch_first=True) for _ in range(2))
        self.answer = nn.Linear(HIDDEN, ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.answer(self.decoder(self.words(x.flip(1)), self.encoder(self.words(x))[1])[0])
        return answers


ALL = [("words", WIDTH), ("layer", HIDDEN)]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    "rnn": (lambda: Reads(nn.RNN), ALL),
    "gru": (lambda: Reads(nn.GRU), ALL),
    "lstm": (lambda: Reads(nn.LSTM), ALL),
    "gru of two layers both ways": (lambda: Reads(nn.GRU, num_layers=2, bidirectional=True), ALL),
    "lstm without biases": (lambda: Reads(nn.LSTM, bidirectional=True, bias=False), ALL),
    "lstm with projection": (lambda: Reads(nn.LSTM, proj_size=3), [*ALL, ("layer#2", 3)]),
    "packed": (lambda: Reads(nn.LSTM, packs=True, num_layers=2, dropout=0.1), ALL),
    "rnn cell": (lambda: Steps(nn.RNNCell), [("words", WIDTH), ("cell", HIDDEN)]),
    "gru cell": (lambda: Steps(nn.GRUCell), [("words", WIDTH), ("cell", HIDDEN)]),
    "lstm cell": (lambda: Steps(nn.LSTMCell), [("words", WIDTH), ("cell", HIDDEN)]),
    "translation": (Translates, [("words", WIDTH), ("encoder", HIDDEN)]),
}


def words(seed: int) -> Tensor:
    return torch.randint(WORDS, (2, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_are_removed_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """float32 on a CPU runs an LSTM as one operation of oneDNN's; the network is analysed and proven without."""
    torch.manual_seed(0)
    make, groups = NETWORKS[name]
    model = make().to(dtype).eval()
    gated = nas_gate.attach(model, words(0))
    structure = gated.structure
    assert [(group.name, group.size) for group in structure.groups] == groups
    keep = torch.ones(structure.units, dtype=torch.bool)
    for group in structure.groups:
        keep[group.start + 1 : group.stop : 2] = False
    removed = nas_gate.remove_with_proof(gated, keep)
    assert torch.backends.mkldnn.enabled
    other, tolerance = words(1), 1e-12 if dtype == torch.float64 else 1e-5
    with closed(model, structure, keep) as small:
        torch.testing.assert_close(removed.model(other), small(other), rtol=tolerance, atol=tolerance)
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, {"name": "mine"}, {}, {})
    loaded = nas_gate.load(folder, factory=lambda: copy.deepcopy(model))
    assert torch.equal(loaded(other), removed.model(other))


@pytest.mark.parametrize("name", ["gru", "lstm", "translation"])
def test_gated_and_removed_networks_learn_alike(name: str) -> None:
    """Gradients of what is kept are those of the smaller network, so training goes on after removal as before it."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double()
    gated = nas_gate.attach(model, words(0))
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    keep[::3] = False
    removed = nas_gate.remove_with_proof(gated, keep)
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))
    for network in (gated, removed.model):
        network.train()
        network(words(1)).square().mean().backward()
    mine = dict(removed.model.named_parameters())
    for name, parameter in gated.model.named_parameters():
        wanted = nas_gate.removal.cut_tensor(parameter.grad, removed.cut.slots.get(name, {}))
        torch.testing.assert_close(mine[name].grad, wanted)


def test_costs_by_hand() -> None:
    """A GRU of 3 words: per word 3 gates of (width + hidden) x hidden, and the answer."""
    model = Reads(nn.GRU)
    x = words(0)[:1, :3]
    gated = nas_gate.attach(model, x)
    assert gated.cost.total() == 3 * (3 * (WIDTH + HIDDEN) * HIDDEN + HIDDEN * ANSWERS)
    keep = torch.ones(WIDTH + HIDDEN, dtype=torch.bool)
    keep[:2] = False
    keep[-3:] = False
    assert nas_gate.remove_with_proof(gated, keep).macs == 3 * (3 * (4 + 5) * 5 + 5 * ANSWERS)
