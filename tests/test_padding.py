"""Padded networks: the same function, counts of channels in blocks, nothing else changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nas_gate
from nas_gate import Choice, models
from nas_gate.cost import count_macs
from nas_gate.padding import padded
from nas_gate.removal import Removed, relative_error


class Small(nn.Module):
    """Convolutions, grouped and depthwise ones, a residual branch, a choice, a flattened linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Sigmoid())
        self.grouped = nn.Sequential(nn.Conv2d(12, 24, 1), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1, groups=2))
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU())
        self.back = nn.Conv2d(24, 12, 1)
        self.choice = Choice([nn.Conv2d(12, 12, 1), nn.Sequential(nn.Conv2d(12, 9, 1), nn.ReLU(), nn.Conv2d(9, 12, 1))])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 20), nn.GELU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.depthwise(self.grouped(x)))
        return self.head(self.choice(x))


class Normed(nn.Module):
    """A stream that a layer norm takes statistics over, and channels inside that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.norm = nn.LayerNorm(12)
        self.inner = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.inner(x)


def removed(model: nn.Module, x: Tensor, seed: int, depth: bool = False) -> Removed:
    """A random half of all units away."""
    torch.manual_seed(seed)
    model.train()(x)
    gated = nas_gate.attach(model.eval(), x[:1], depth=depth)
    torch.nn.init.uniform_(gated.gates.weight, -1, 1)
    return nas_gate.remove_with_proof(gated, gated.keep().bool())


def channels(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(a(x), b(x))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), block=st.integers(2, 8), depth=st.booleans())
def test_the_same_function_with_counts_in_blocks(seed: int, block: int, depth: bool) -> None:
    x = torch.randn(4, 3, 4, 4)
    small = removed(Small(), x, seed, depth)
    network = small.model.eval()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    full = padded(Small().eval(), network, small.cut, x[:1], block)
    assert difference(network, full, x) < 1e-5
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    for path, layer in full.named_modules():
        if isinstance(layer, nn.Conv2d):
            most = {"stem.0": 12, "grouped.0": 24, "grouped.2": 24, "depthwise.0": 24, "back": 12}
            size = most.get(path, 9 if path == "choice.0" and isinstance(full.choice, nn.Sequential) else 12)
            n = dict(network.named_modules())[path].out_channels
            assert layer.out_channels >= n
            assert layer.out_channels % block == 0 or layer.out_channels == size
            assert layer.out_channels < n + block * (2 if path.startswith(("grouped", "depthwise")) else 1)
    assert full.head[1].out_features == network.head[1].out_features, "features of a linear layer stay as many"


@pytest.mark.parametrize("name", ["resnet20", "cifar_mobilenet_v2", "densenet40", "cifar_supernet"])
def test_registered_models(name: str) -> None:
    x = torch.randn(4, 3, 16, 16)
    small = removed(models.build(name), x, 0)
    full = padded(models.build(name).eval(), small.model.eval(), small.cut, x[:1], 8)
    assert difference(small.model, full, x) < 1e-5
    assert count_macs(full, (x[:1],)) > small.macs
    if name in ("resnet20", "cifar_mobilenet_v2"):
        assert {n % 8 for n in channels(full)} == {0}


def test_what_a_norm_takes_statistics_over_stays() -> None:
    x = torch.randn(4, 3, 4, 4)
    small = removed(Normed(), x, 3)
    full = padded(Normed().eval(), small.model.eval(), small.cut, x[:1], 6)
    assert difference(small.model, full, x) < 1e-5
    stream, inner, _ = channels(small.model)
    assert channels(full) == [stream, -(-inner // 6) * 6, 4]
    assert stream % 6, "else nothing would be tested"


def test_a_cut_of_another_analysis_is_refused() -> None:
    x = torch.randn(2, 3, 4, 4)
    small = removed(Small(), x, 0)
    slots = {**small.cut.slots, "head.3.weight": {0: (0, 1)}}
    cut = type(small.cut)(slots, small.cut.widths, small.cut.corrections, small.cut.zeros, small.cut.loose)
    with pytest.raises(ValueError, match="what it keeps is not what the analysis of its model offers"):
        padded(Small().eval(), small.model.eval(), cut, x[:1], 4)
