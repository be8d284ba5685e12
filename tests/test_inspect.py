"""What inspection says of a small network, against what is known of it by hand."""

import json

import pytest
import torch
from torch import Tensor, nn

import nas_gate


class Net(nn.Module):
    """One removable group, one that a roll fixes, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 6, 1)
        self.last = nn.Linear(6 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).roll(1, 1)).flatten(1))


@pytest.fixture(scope="module")
def structure() -> nas_gate.Structure:
    return nas_gate.analyze(Net(), torch.randn(1, 3, 4, 4))


FIRST, SECOND, LAST = 3 * 4 * 16, 4 * 6 * 16, 6 * 16 * 2


def test_the_record_by_hand(structure: nas_gate.Structure) -> None:
    record = nas_gate.to_json(structure)
    assert record["macs"] == FIRST + SECOND + LAST
    assert record["params"] == (3 * 4 + 4) + (4 * 6 + 6) + (6 * 16 * 2 + 2)
    assert record["units"] == 6
    assert record["share_of_macs_reachable"] == (SECOND + LAST) / (FIRST + SECOND + LAST)
    assert record["groups"] == [
        {
            "name": "second",
            "kind": "width",
            "role": "channels",
            "units": 6,
            "start": 0,
            "members": [
                {"tensor": "second.weight", "dim": 0, "slots_per_unit": 1},
                {"tensor": "second.bias", "dim": 0, "slots_per_unit": 1},
                {"tensor": "last.weight", "dim": 1, "slots_per_unit": 16},
            ],
        }
    ]
    fixed = {(f["tensor"], f["dim"]): (f["slots"], f["of"], f["reason"]) for f in record["fixed"]}
    assert fixed.keys() == {
        *(("first.weight", 0), ("first.weight", 1), ("first.bias", 0)),
        *(("second.weight", 1), ("last.weight", 0), ("last.bias", 0)),
    }
    assert fixed["last.weight", 0] == (2, 2, "it is an output of the model")
    assert fixed["second.weight", 1][:2] == (4, 4)
    assert "roll" in fixed["second.weight", 1][2]


def test_the_record_is_plain_json(structure: nas_gate.Structure) -> None:
    record = nas_gate.to_json(structure)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_text_says_the_same(structure: nas_gate.Structure) -> None:
    text = nas_gate.describe(structure)
    assert text.startswith("768 MACs, 240 parameters; 6 removable units in 1 groups; gates reach 75.0% of the MACs\n")
    assert "  channels  second       6 units  second.weight:0, second.bias:0, last.weight:1 x16\n" in text
    assert "  it is an output of the model: last.weight:0 (2), last.bias:0 (2)" in text
    reason = next(f.reason for f in structure.fixed if f.tensor == "second.weight")
    assert f"  {reason}: first.weight:0 (4), first.bias:0 (4), second.weight:1 (4)" in text


class Layer(nn.Module):
    """A transformer's layer over patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(1, 8, 2, 2), nn.MultiheadAttention(8, 4, batch_first=True)
        self.up, self.down, self.last = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.last(x + self.down(self.up(x).relu()))


def roles(model: nn.Module, x: Tensor, depth: bool = False) -> dict[str, str]:
    return {g["name"]: g["role"] for g in nas_gate.to_json(nas_gate.analyze(model, x, depth=depth))["groups"]}


def test_roles_of_a_transformers_units() -> None:
    known = {"patches": "stream", "attention": "heads", "up": "hidden"}
    assert roles(Layer(), torch.randn(2, 1, 4, 4)) == known
    found = roles(Layer(), torch.randn(2, 1, 4, 4), depth=True)
    assert {name: role for name, role in found.items() if role != "branch"} == known
    assert "branch" in found.values()


def test_roles_of_channels_and_features() -> None:
    """A residual stream of channels has channels, a linear layer after many slots of each has features."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
            self.features, self.last = nn.Linear(4 * 16, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(self.features((x + self.b(self.a(x).relu())).flatten(1)).relu())

    known = {"stem": "channels", "a": "channels", "features": "hidden"}
    assert roles(Residual(), torch.randn(2, 3, 4, 4)) == known


def test_a_model_without_groups() -> None:
    structure = nas_gate.analyze(nn.Linear(3, 2), torch.randn(1, 3))
    assert nas_gate.to_json(structure)["groups"] == []
    assert "removable groups (tensor:dimension, xN where every unit has N slots there):\n  none\n" in nas_gate.describe(
        structure
    )
