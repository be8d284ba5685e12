"""The README's training loop, taken from the README, on scikit-learn's digits."""

import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nas_gate
from nas_gate import models
from nas_gate.removal import relative_error

README = Path(__file__).parents[1] / "README.md"
EPOCHS = 3


def loop() -> str:
    """The first Python block of the README that attaches gates."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if "nas_gate.attach" in block)


class Epochs:
    """A loader that counts and runs several times over its data, as the README's loop runs once over `loader`."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self):
        for _ in range(EPOCHS):
            yield from self.loader


@pytest.fixture(scope="module")
def ran() -> dict[str, object]:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    space = {
        "torch": torch,
        "model": models.build("digits_cnn"),
        "example_inputs": x[:1],
        "loader": Epochs(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)),
        "criterion": nn.CrossEntropyLoss(),
    }
    exec(compile(loop(), str(README), "exec"), space)
    return {**space, "x": x, "y": y}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def test_the_loop_is_as_short_as_promised() -> None:
    assert len([line for line in loop().splitlines() if line.strip()]) <= 14


def test_at_most_half_of_the_macs_are_left(ran) -> None:
    dense = nas_gate.count_macs(ran["model"], (ran["x"][:1],))
    left = nas_gate.count_macs(ran["small"], (ran["x"][:1],))
    assert dense == ran["gated"].cost.total()
    assert 0.45 * dense < left <= 0.5 * dense


def test_gates_and_weights_were_learned(ran) -> None:
    gated = ran["gated"]
    assert gated.gates.weight.unique().numel() > 100
    assert float(gated.cost_share().detach()) == pytest.approx(0.5, abs=0.1)
    assert accuracy(gated, ran["x"], ran["y"]) > 0.8


def test_the_result_computes_what_the_gated_model_does(ran) -> None:
    """The gated model with its gates set to what landing chose."""
    gated, small, x = ran["gated"], ran["small"].eval(), ran["x"]
    keep = nas_gate.land(gated, 0.5)
    learned = gated.gates.weight.detach().clone()
    with torch.no_grad():
        gated.gates.weight.copy_(keep.float() * 2 - 1)
        error = relative_error(gated.eval()(x), small(x))
        gated.gates.weight.copy_(learned)
    assert error < 1e-5


def test_the_result_is_a_plain_module_of_the_users_class(ran) -> None:
    small = ran["small"]
    assert type(small) is type(ran["model"])
    assert all(type(m).__module__.split(".")[:2] != ["nas_gate", "gating"] for m in small.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert small.state_dict().keys() == ran["model"].state_dict().keys()


def test_the_model_given_is_left_alone(ran) -> None:
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(ran["model"].parameters(), models.build("digits_cnn").parameters()))
