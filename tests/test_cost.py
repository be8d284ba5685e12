"""Costs against hand arithmetic, PyTorch's own counter, and the laws of a multilinear form."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nas_gate
from nas_gate import CostModel, Structure, models


def random_keep(structure: Structure, seed: int) -> Tensor:
    """Boolean, each unit open with probability 0.5, but at least one in every group."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, generator=generator) < 0.5
    for group in structure.groups:
        keep[group.start + int(torch.randint(group.size, (1,), generator=generator))] = True
    return keep


def soft_keep(structure: Structure, seed: int = 0) -> Tensor:
    return torch.rand(structure.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_counts(structure: Structure, *counts: int) -> Tensor:
    """The keep with so many first units open in each group."""
    keep = torch.zeros(structure.units, dtype=torch.bool)
    for group, count in zip(structure.groups, counts):
        keep[group.start : group.start + count] = True
    return keep


def small() -> nn.Sequential:
    """3x8x8 images; two groups, of 6 and of 10 units, the second flattened from 10x2x2 into the linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),  # 8x8
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 10, 3, stride=2, padding=1),  # 4x4
        nn.PReLU(10),
        nn.MaxPool2d(2),  # 2x2
        nn.Flatten(),
        nn.Linear(40, 5),
    )


@pytest.fixture(scope="module")
def structure() -> Structure:
    return nas_gate.analyze(small(), torch.randn(1, 3, 8, 8))


# --- by hand ------------------------------------------------------------------------------------------------


def small_macs(a: int, b: int) -> int:
    return 3 * a * 9 * 64 + a * b * 9 * 16 + b * 4 * 5


def small_params(a: int, b: int) -> int:
    return 3 * a * 9 + 2 * a + (a * b * 9 + b) + b + (b * 4 * 5 + 5)


@pytest.mark.parametrize(("a", "b"), [(6, 10), (1, 1), (4, 10), (6, 3), (5, 7)])
def test_small_network_by_hand(structure: Structure, a: int, b: int) -> None:
    assert [g.size for g in structure.groups] == [6, 10]
    cost, keep = CostModel(structure), by_counts(structure, a, b)
    assert float(cost(keep, "macs")) == small_macs(a, b)
    assert float(cost(keep, "params")) == small_params(a, b)


def test_totals_are_the_dense_costs(structure: Structure) -> None:
    cost = CostModel(structure)
    assert cost.total() == cost.total("macs") == small_macs(6, 10) == 10368 + 8640 + 200
    assert cost.total("params") == small_params(6, 10) == sum(p.numel() for p in small().parameters())


def test_share_is_cost_over_total(structure: Structure) -> None:
    cost, keep = CostModel(structure), by_counts(structure, 3, 5)
    assert float(cost.share(keep)) == small_macs(3, 5) / small_macs(6, 10)
    assert float(cost.share(keep, "params")) == small_params(3, 5) / small_params(6, 10)


def test_soft_keep_by_hand(structure: Structure) -> None:
    keep = soft_keep(structure)
    a, b = keep[:6].sum(), keep[6:].sum()
    torch.testing.assert_close(CostModel(structure)(keep), 3 * a * 9 * 64 + a * b * 9 * 16 + b * 4 * 5)


def test_cost_of_counts_of_open_units(structure: Structure) -> None:
    counts = torch.tensor([2.0, 7.0], dtype=torch.float64)
    assert float(CostModel(structure).of_counts(counts)) == small_macs(2, 7)
    assert float(CostModel(structure).of_counts(counts, "params")) == small_params(2, 7)


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, nn.Module.bfloat16])
def test_a_cast_of_the_network_leaves_the_cost_exact(cast: Callable[[nn.Module], nn.Module]) -> None:
    gated = cast(nas_gate.attach(models.build("resnet20"), torch.randn(1, 3, 32, 32)))
    wide = CostModel(gated.structure)
    keep = torch.rand(gated.structure.units, generator=torch.Generator().manual_seed(0)) < 0.5
    assert float(gated.cost(keep)) == float(wide(keep)) > 2**11  # what float16 can count to
    assert float(nas_gate.penalty(gated, target=0.5).detach()) == pytest.approx(0.25)
    assert gated.cost.total() == wide.total()


def test_macs_are_those_of_the_example_batch() -> None:
    structure = nas_gate.analyze(small(), torch.randn(3, 3, 8, 8))
    assert CostModel(structure).total() == 3 * small_macs(6, 10)


def test_counts_above_2_to_the_24_are_exact() -> None:
    """float32 would round the odd number 4097 * 4101 = 16,801,797 to an even one."""
    net = nn.Sequential(nn.Linear(4097, 4101, bias=False), nn.ReLU(), nn.Linear(4101, 2, bias=False))
    structure = nas_gate.analyze(net, torch.randn(1, 4097))
    expected = 4097 * 4101 + 4101 * 2
    keep = torch.ones(structure.units)  # float32 keep, as gates give it
    assert expected > 2**24
    assert CostModel(structure).total() == expected
    assert float(CostModel(structure)(keep)) == expected
    keep[0] = 0
    assert float(CostModel(structure)(keep)) == 4097 * 4100 + 4100 * 2


def test_reachable_share_by_hand() -> None:
    """The first convolution is fixed on both sides: its input is given, and rolled channels cannot be cut."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)  # 3 * 4 * 16 macs
            self.second = nn.Conv2d(4, 6, 3, padding=1)  # 4 * 6 * 9 * 16 macs, its outputs gated
            self.last = nn.Conv2d(6, 2, 1)  # 6 * 2 * 16 macs, its inputs gated

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).roll(1, 1)))

    structure = nas_gate.analyze(Net(), torch.randn(1, 3, 4, 4))
    assert [g.size for g in structure.groups] == [6]
    first, second, last = 3 * 4 * 16, 4 * 6 * 9 * 16, 6 * 2 * 16
    assert nas_gate.reachable_share(structure) == (second + last) / (first + second + last)


def test_everything_is_reachable_in_a_chain(structure: Structure) -> None:
    assert nas_gate.reachable_share(structure) == 1.0


def test_nothing_is_reachable_without_groups() -> None:
    structure = nas_gate.analyze(nn.Linear(3, 2), torch.randn(1, 3))
    assert nas_gate.reachable_share(structure) == 0.0
    assert CostModel(structure).total() == 6
    assert CostModel(structure).total("params") == 8


# --- PyTorch's counter --------------------------------------------------------------------------------------

NETWORKS = [
    ("digits_cnn", {}, (1, 1, 8, 8)),
    ("resnet20", {"width": 0.5}, (1, 3, 16, 16)),
    ("resnet20", {"width": 0.5, "shortcut": "B"}, (2, 3, 16, 16)),
    ("densenet40", {}, (1, 3, 16, 16)),
    ("cifar_mobilenet_v2", {}, (1, 3, 16, 16)),
    ("cifar_vgg16_bn", {"width": 0.25}, (1, 3, 16, 16)),
]


@pytest.mark.parametrize(("name", "arguments", "shape"), NETWORKS)
def test_equals_the_counter_on_the_removed_model(name: str, arguments: dict, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    gated = nas_gate.attach(models.build(name, **arguments), x)
    for seed in range(2):
        keep = random_keep(gated.structure, seed)
        small = nas_gate.remove_with_proof(gated, keep).model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(x)
        assert float(gated.cost(keep, "macs")) * 2 == counter.get_total_flops()
        assert float(gated.cost(keep, "params")) == sum(p.numel() for p in small.parameters())


def test_count_macs() -> None:
    model = small().train()
    before = model[1].running_mean.clone()
    assert nas_gate.count_macs(model, (torch.randn(2, 3, 8, 8),)) == 2 * small_macs(6, 10)
    assert model.training
    assert model[1].training
    assert torch.equal(model[1].running_mean, before)


def test_count_macs_of_fused_attention_and_keywords() -> None:
    """Two products of 5x5 places over 4 features in each of 2 heads, whichever kernel would run."""

    class Attention(nn.Module):
        def forward(self, q: Tensor, *, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q = torch.randn(1, 2, 5, 4)
    assert nas_gate.count_macs(Attention(), (q,), {"k": q}) == 2 * 2 * 5 * 5 * 4


# --- a multilinear form -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual() -> Structure:
    """Groups that meet in many terms, with several units per axis and grouped convolutions."""
    return nas_gate.analyze(models.build("cifar_mobilenet_v2", width=0.5), torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_linear_along_each_group(residual: Structure, metric: str) -> None:
    """Where no operation has one group on two axes, the cost is affine in the units of a group."""
    cost = CostModel(residual)
    keep = soft_keep(residual)
    terms = residual.macs if metric == "macs" else residual.params
    for index, group in enumerate(residual.groups):
        of_group = [sum(index in dict(residual.axes[a].groups) for a in term.axes) for term in terms]
        if max(of_group) > 1:
            continue
        ends = []
        for value in (0.0, 0.5, 1.0):
            moved = keep.clone()
            moved[group.start : group.stop] = value * keep[group.start : group.stop]
            ends.append(cost(moved, metric))
        torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_second_differences_of_different_groups_are_products(structure: Structure, metric: str) -> None:
    """For a = open units of the first, b of the second group, f(a, b) has no terms but 1, a, b and a b."""
    cost = CostModel(structure)

    def f(a: int, b: int) -> float:
        return float(cost.of_counts(torch.tensor([a, b], dtype=torch.float64), metric))

    slope = f(1, 1) - f(1, 0) - f(0, 1) + f(0, 0)
    for a, b in itertools.product(range(7), range(11)):
        assert f(a, b) == f(0, 0) + a * (f(1, 0) - f(0, 0)) + b * (f(0, 1) - f(0, 0)) + a * b * slope


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_gradient_equals_finite_differences(residual: Structure, metric: str) -> None:
    cost = CostModel(residual)
    keep = soft_keep(residual).requires_grad_()
    cost(keep, metric).backward()
    assert keep.grad is not None
    step = 1e-3
    for unit in range(0, residual.units, max(1, residual.units // 25)):
        shift = torch.zeros_like(keep)
        shift[unit] = step
        with torch.no_grad():
            slope = (cost(keep + shift, metric) - cost(keep - shift, metric)) / (2 * step)
        torch.testing.assert_close(keep.grad[unit], slope, rtol=1e-6, atol=1e-3)


def test_gradcheck(structure: Structure) -> None:
    cost = CostModel(structure)
    keep = soft_keep(structure).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: cost.share(k), keep)
    assert torch.autograd.gradcheck(lambda k: cost.share(k, "params"), keep)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_monotone_in_every_unit(residual: Structure, metric: str) -> None:
    cost = CostModel(residual)
    keep = soft_keep(residual, seed=3).requires_grad_()
    cost(keep, metric).backward()
    assert keep.grad is not None
    assert bool((keep.grad > 0).all())  # multilinear: the slope's sign at one soft point of the open cube ...
    for seed in range(5):
        boolean = random_keep(residual, seed)
        unit = int(torch.nonzero(~boolean)[seed])
        opened = boolean.clone()
        opened[unit] = True
        assert float(cost(opened, metric)) > float(cost(boolean, metric))  # ... and at corners


def test_nothing_waits_for_the_device(structure: Structure) -> None:
    """On a device without values whatever reads one fails, also in the gradient."""
    keep = torch.ones(structure.units, device="meta", requires_grad=True)
    CostModel(structure).to("meta")(keep).backward()
    assert keep.grad is not None


def test_is_float64_whatever_the_keep(structure: Structure) -> None:
    cost = CostModel(structure)
    for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.float64):
        result = cost(torch.ones(16, dtype=dtype))
        assert result.dtype == torch.float64
        assert result.shape == ()
        assert float(result) == small_macs(6, 10)


# --- errors -------------------------------------------------------------------------------------------------


def test_unknown_metric(structure: Structure) -> None:
    cost = CostModel(structure)
    for call in (
        lambda: cost(torch.ones(16), "flops"),
        lambda: cost.total("flops"),
        lambda: cost.share(torch.ones(16), "flops"),
        lambda: nas_gate.reachable(structure, "flops"),
    ):
        with pytest.raises(ValueError, match=r"one of macs, params, latency_ms, but is 'flops'"):
            call()


@pytest.mark.parametrize("shape", [(15,), (17,), (1, 16), ()])
def test_wrong_shape(structure: Structure, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape (16,), but has {shape}")):
        CostModel(structure)(torch.ones(shape))


def test_a_parameter_that_goes_into_a_module_in_a_tuple_is_no_obstacle_to_counting():
    """PyTorch's counter hangs hooks on such inputs of modules, and without gradients it fails."""

    class Sum(nn.Module):
        def forward(self, pair):
            return pair[0] @ pair[1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sum, self.weight = Sum(), nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return self.sum((x, self.weight.expand(3, 2)))

    net = Net()
    assert nas_gate.count_macs(net, (torch.ones(4, 3),)) == 4 * 3 * 2
    assert net.weight.requires_grad
