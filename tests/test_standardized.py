"""Weights that statistics of every row are taken of: standardised ones, and those of weight normalisation.

The oracle is the network written out with the kept slots of every weight, which its layers' own code normalises.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_gating import set_gates
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import nas_gate
from nas_gate.gates import make_gate
from nas_gate.gating import GatedModel
from nas_gate.padding import padded


class Standardized(nn.Conv2d):
    """As BiT's (arXiv 1903.10520): by a batch norm without running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-3)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class Scaled(nn.Conv2d):
    """As NFNet's (arXiv 2101.08692): with a gain for every row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-3)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class WrittenOut(nn.Conv2d):
    """As in many denoisers: by its mean and variance."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * (variance + 1e-3).rsqrt(), self.bias)


class Flattened(nn.Conv2d):
    """By both at once, of rows laid out flat."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        weight = (rows - mean) / (variance + 1e-3).sqrt()
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Centred(nn.Conv2d):
    """Less the mean alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Rows(nn.Module):
    """A parametrization that standardises."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-3).sqrt()).view_as(
            weight
        )


def parametrized(*args: Any, **kwargs: Any) -> nn.Module:
    layer = nn.Conv2d(*args, **kwargs)
    parametrize.register_parametrization(layer, "weight", Rows())
    return layer


def normed(*args: Any, **kwargs: Any) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(*args, **kwargs))


def hooked(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.utils.weight_norm(nn.Conv2d(*args, **kwargs))


LAYERS: list[Callable[..., nn.Module]] = [
    *(Standardized, Scaled, WrittenOut, Flattened, Centred),
    *(parametrized, normed, hooked),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def network(layer: Callable[..., nn.Module], groups: int = 1) -> nn.Sequential:
    """8 units into a layer of 12, grouped if asked for, and these into one of 5, with padding and biases."""
    torch.manual_seed(0)
    with torch.no_grad():  # what old weight normalisation computes at once can be copied then
        inner = layer(8, 12, 3, padding=1, groups=groups)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), inner, nn.SiLU(), layer(12, 5, 1)).double()


def gated_network(model: nn.Module, seed: int | None) -> tuple[GatedModel, Tensor]:
    """The network with gates on a random half of its units, which a seed draws (all without), and that half."""
    gated = nas_gate.attach(model, images(1))
    gated.gates.double()
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    if seed is not None:
        keep = torch.rand(len(keep), generator=torch.Generator().manual_seed(seed)) < 0.5
        keep[[g.start for g in gated.structure.groups]] = True
    return set_gates(gated, *torch.where(keep, 1.0, -1.0).tolist()), keep


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def by_hand(model: nn.Sequential, first: Tensor, second: Tensor) -> nn.Sequential:
    """The network with slots of the first and the second group kept, (8,) and (12,): every tensor cut by its shape."""
    small = copy.deepcopy(model)
    for layer, rows, columns in ((small[0], first, None), (small[2], second, first), (small[4], None, second)):
        for module in layer.modules():
            for name, tensor in module._parameters.items():
                tensor = tensor[rows] if rows is not None and len(tensor) == len(rows) else tensor
                wide = columns is not None and tensor.dim() > 1 and tensor.shape[1] == len(columns)
                module._parameters[name] = nn.Parameter((tensor[:, columns] if wide else tensor).detach())
        layer.out_channels = len(layer.bias)
    return small


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", range(2))
def test_statistics_are_those_of_kept_slots(layer: Callable[..., nn.Module], seed: int) -> None:
    model = network(layer)
    gated, keep = gated_network(model, seed)
    assert [g.size for g in gated.structure.groups] == [8, 12]
    assert 0 < keep[:8].sum() < 8
    assert 0 < keep[8:].sum() < 12
    expected = by_hand(model, keep[:8], keep[8:])(images()).detach()
    torch.testing.assert_close(gated(images()), expected, rtol=1e-10, atol=1e-10)
    removed = nas_gate.remove_with_proof(gated, keep)
    torch.testing.assert_close(removed.model(images()), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(images()), expected, rtol=0.01)
    for module in removed.model.modules():  # a plain network of its own classes
        assert not hasattr(module, "kept_norm")
        assert not [h for h in module._forward_pre_hooks.values() if "nas_gate" in getattr(h, "__module__", "")]


@pytest.mark.parametrize("layer", LAYERS)
def test_all_open_is_the_original_bit_for_bit(layer: Callable[..., nn.Module]) -> None:
    model = network(layer)
    gated, _ = gated_network(model, None)
    assert torch.equal(gated(images()), model(images()))


def test_a_row_keeps_two_weights() -> None:
    """One alone has no deviation to divide by, which PyTorch refuses: the 12 units enter by a kernel of one place."""
    gated, _ = gated_network(network(Standardized), None)
    assert [g.least for g in gated.structure.groups] == [1, 2]
    set_gates(gated, *[-1.0] * 20)
    assert gated.structure.open_units(gated.keep().bool()).tolist() == [1, 2]
    small = nas_gate.remove(gated, target=0.05)
    assert small[4].weight.shape == (5, 2, 1, 1)
    torch.testing.assert_close(small(images()), gated(images()))
    with pytest.raises(ValueError, match=r"kept are 1 of 2 \(at least 2\)"):
        nas_gate.remove_with_proof(gated, torch.arange(20) < 9)


@pytest.mark.parametrize("layer", [Standardized, Scaled, WrittenOut, normed])
def test_groups_keep_the_same_places(layer: Callable[..., nn.Module]) -> None:
    gated, keep = gated_network(network(layer, groups=2), 0)
    assert sorted(g.size for g in gated.structure.groups) == [4, 6]  # a unit is the same place in both groups
    removed = nas_gate.remove_with_proof(gated, keep)
    torch.testing.assert_close(removed.model(images()), gated(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [Standardized, Scaled, WrittenOut, normed])
def test_soft_gates_have_true_gradients(layer: Callable[..., nn.Module]) -> None:
    gated = nas_gate.attach(network(layer), images(1), gate=make_gate("annealed_sigmoid"))
    gated.gates.double()._least.zero_()  # a unit held open has the gradient of one that is not
    weight = torch.linspace(-0.9, 1.1, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: functional_call(gated, {"gates.weight": w}, (images(),)), weight)


def test_a_standard_deviation_by_one_less_stays_fixed_with_the_reason() -> None:
    """Its ratio to that of all slots is no constant of the rule: 1 less of 8 places is not 1 less of 4."""

    class Unbiased(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)

    structure = nas_gate.analyze(nn.Sequential(network(Unbiased), nn.ReLU(), nn.Conv2d(5, 4, 1).double()), images(1))
    assert [g.size for g in structure.groups] == [5]
    assert any("aten.std in 0.2 mixes what the units hold" in f.reason for f in structure.fixed)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_transposed_convolutions_of_weight_normalisation(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Their rows are inputs: closing them is exact, while outputs are what the norm runs over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), wrap(nn.ConvTranspose2d(8, 6, 2, 2)), nn.Conv2d(6, 4, 1))
    gated, keep = gated_network(model.double(), 0)
    assert [(g.name, g.size) for g in gated.structure.groups] == [("0", 8)]
    reason = "aten.convolution in 2 gives out what the statistics of its weight run over"
    assert reason in {f.reason for f in gated.structure.fixed}
    output = gated(images())
    output.sum().backward()
    assert bool(gated.gates.weight.grad.isfinite().all())
    torch.testing.assert_close(nas_gate.remove_with_proof(gated, keep).model(images()), output.detach())


def test_a_norm_with_an_activation_inside() -> None:
    """As timm has them: the module is a group norm with parts."""

    class Activated(nn.GroupNorm):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Activated(2, 8), Standardized(8, 5, 1)).double()
    gated, keep = gated_network(model, 0)
    assert [g.size for g in gated.structure.groups] == [4]
    torch.testing.assert_close(nas_gate.remove_with_proof(gated, keep).model(images()), gated(images()))


def test_padding_leaves_standardised_columns_as_many_as_they_are() -> None:
    """More columns would be other statistics."""
    model = network(Standardized)
    gated, keep = gated_network(model, 0)
    removed = nas_gate.remove_with_proof(gated, keep)
    other = padded(network(Standardized), removed.model, removed.cut, images(1), 8)
    torch.testing.assert_close(other(images()), removed.model(images()), rtol=1e-10, atol=1e-10)
    assert other[2].in_channels == removed.model[2].in_channels


def test_a_branch_that_ends_in_a_standardised_layer_closes() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.inner = nn.Sequential(nn.Conv2d(8, 6, 1), nn.SiLU(), Scaled(6, 8, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.inner(x))

    torch.manual_seed(0)
    model = Residual().double()
    structure = nas_gate.analyze(model, images(1), depth=True)
    assert [g.name for g in structure.groups if g.kind == "branch"] == ["inner:branch"]
