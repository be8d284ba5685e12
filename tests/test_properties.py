"""The promises on random networks: whatever is built from these parts, gates, removal, cost and landing hold."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nas_gate
from nas_gate import landing

PLACES = 8
STEADY = settings(max_examples=40, derandomize=True, deadline=None)


# --- random networks ----------------------------------------------------------------------------------------


class Step(nn.Module):
    """Some modules and what to do with them."""

    def __init__(self, run: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.parts)


def over_channels_last(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=c % 2 == 0),
    "group": lambda c: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
    "layer": lambda c: Step(over_channels_last, nn.LayerNorm(c)),
}


def conv(i: int, o: int, k: int, norm: str = "none", groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=groups), NORMS[norm](o), nn.ReLU())


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


# every part: (channels that come in, width, norm) -> (module, channels that come out)
Part = Callable[[int, int, str], tuple[nn.Module, int]]
PARTS: dict[str, Part] = {
    "conv": lambda c, w, norm: (conv(c, w, 3, norm), w),
    "residual": lambda c, w, norm: (Step(lambda x, a, b: x + b(a(x)), conv(c, w, 3, norm), conv(w, c, 1)), c),
    "projected residual": lambda c, w, norm: (Step(lambda x, a, b: a(x) + b(x), conv(c, w, 3, norm), conv(c, w, 1)), w),
    "concatenation": lambda c, w, norm: (Step(lambda x, a: torch.cat([x, a(x)], 1), conv(c, w, 1, norm)), c + w),
    "depthwise": lambda c, w, norm: (conv(c, c, 3, norm, groups=c), c),
    "depth multiplier": lambda c, w, norm: (conv(c, 2 * c, 3, norm, groups=c), 2 * c),
    "grouped": lambda c, w, norm: (conv(c, 2 * w, 3, norm, groups=2 - c % 2), 2 * w),
    "transposed": lambda c, w, norm: (nn.ConvTranspose2d(c, 2 * w, 3, padding=1, groups=2 - c % 2), 2 * w),
    "excitation": lambda c, w, norm: (
        Step(
            lambda x, a, b: x * b(a(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid(),
            nn.Conv2d(c, w, 1),
            nn.Conv2d(w, c, 1),
        ),
        c,
    ),
    "pool": lambda c, w, norm: (nn.MaxPool2d(3, 1, 1) if norm == "none" else nn.AvgPool2d(3, 1, 1), c),
    "chunks": lambda c, w, norm: (
        (Step(lambda x: (p := x.chunk(2, 1))[0] * p[1].tanh()), c // 2) if even(c) else SAME(c)
    ),
    "glu": lambda c, w, norm: (nn.GLU(1), c // 2) if even(c) else SAME(c),
    "shuffle": lambda c, w, norm: (Step(shuffle), c) if even(c) else SAME(c),
    "flip": lambda c, w, norm: (Step(lambda x: x.flip(1)), c),
    "prelu": lambda c, w, norm: (nn.PReLU(c), c),
    "roll": lambda c, w, norm: (Step(lambda x: x.roll(1, 1)), c),
    "softmax": lambda c, w, norm: (Step(lambda x: x.softmax(1)), c),
}


def even(channels: int) -> bool:
    return channels % 2 == 0 and channels > 2


def SAME(channels: int) -> tuple[nn.Module, int]:
    return nn.ReLU(), channels


def build(steps: list[tuple[str, int, str]], flat: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [conv(3, 6, 3)]
    channels = 6
    for part, width, norm in steps:
        layer, channels = PARTS[part](channels, width, norm)
        layers.append(layer)
    pool = nn.AdaptiveAvgPool2d(2 if flat else 1)
    layers += [pool, nn.Flatten(), nn.Linear(channels * (4 if flat else 1), 7), nn.ReLU(), nn.Linear(7, 5)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():  # no norm at its first values
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or (t.dim() == 1 and name.endswith("weight")):
                t.uniform_(0.5, 1.5)
            elif t.is_floating_point() and t.dim() == 1:
                t.uniform_(-0.5, 0.5)
    return model.eval()


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(PARTS)), st.integers(2, 6), st.sampled_from(sorted(NORMS))), min_size=1, max_size=6
)
NETWORKS = st.builds(build, STEPS, st.booleans(), st.integers(0, 99))
SEEDS = st.integers(0, 999)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, PLACES, PLACES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_keep(structure: nas_gate.Structure, seed: int) -> Tensor:
    """Every unit by a coin, and one of every group for certain."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, generator=generator) < 0.5
    for g in structure.groups:
        keep[g.start + int(torch.randint(g.size, (), generator=generator))] = True
    return keep


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / a.abs().max()).detach())


# --- the promises -------------------------------------------------------------------------------------------


@STEADY
@given(NETWORKS, SEEDS)
def test_gates_removal_and_cost(model: nn.Module, seed: int):
    """Promises 1 to 3: open gates change nothing; removed and gated model are equal and cost what was predicted."""
    x, other = images(seed), images(seed + 1)
    before = copy.deepcopy(model.state_dict())
    gated = nas_gate.attach(model, x)
    structure = gated.structure
    # what the rules allow is right at once: the trial has nothing to correct
    assert not [f for f in structure.fixed if "smaller model" in f.reason or "must" in f.reason]
    if structure.norms:
        assert distance(model(other), gated(other)) < 1e-6
    else:
        assert torch.equal(model(other), gated(other))
    for keep in (random_keep(structure, seed), random_keep(structure, seed + 1)):
        removed = nas_gate.remove_with_proof(gated, keep)
        with torch.no_grad():
            gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))
            assert distance(gated(other), removed.model(other)) < (1e-6 if structure.norms else 1e-9)
            with FlopCounterMode(display=False) as counter:
                removed.model(x)
        assert round(gated.cost(keep).item()) == counter.get_total_flops() // 2
        assert round(gated.cost(keep, "params").item()) == sum(p.numel() for p in removed.model.parameters())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


@STEADY
@given(NETWORKS, SEEDS, st.sampled_from(["macs", "params"]))
def test_cost_rises_with_every_unit_and_its_gradient_is_right(model: nn.Module, seed: int, metric: str):
    """Promise 4, on soft keep."""
    structure = nas_gate.analyze(model, images(seed))
    cost = nas_gate.CostModel(structure)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad(cost(keep.requires_grad_(), metric), keep)
    keep = keep.detach()
    assert bool((gradient > 0).all())
    step = 1e-3
    for g in structure.groups:
        unit = torch.zeros_like(keep)
        unit[g.start] = step
        slope = (cost(keep + unit, metric) - cost(keep - unit, metric)) / (2 * step)
        assert gradient[g.start].item() == pytest.approx(slope.item(), rel=1e-6)
        assert torch.equal(gradient[g.start : g.stop], gradient[g.start].expand(g.size))  # units of a group cost alike
    assert cost(torch.ones_like(keep), metric).item() == cost.total(metric)


@STEADY
@given(NETWORKS, SEEDS, st.floats(0.02, 0.98), st.sampled_from(["macs", "params"]))
def test_landing_meets_the_target_or_refuses(model: nn.Module, seed: int, target: float, metric: str):
    """Promise 5: below the target, and above it with the unit that was closed last."""
    structure = nas_gate.analyze(model, images(seed))
    cost = nas_gate.CostModel(structure)
    scores = torch.randn(structure.units, generator=torch.Generator().manual_seed(seed))
    lowest, highest = nas_gate.reachable(structure, metric)
    assert highest == 1.0
    least = torch.zeros(structure.units, dtype=torch.bool)
    least[[g.start for g in structure.groups]] = True
    assert lowest == pytest.approx(cost.share(least, metric).item(), rel=1e-12)
    if target < lowest:
        with pytest.raises(ValueError, match="is below what is reachable"):
            landing.choose(structure, scores, target, metric)
        return
    keep = landing.choose(structure, scores, target, metric)
    assert (structure.open_units(keep) >= 1).all()
    assert cost.share(keep, metric).item() <= target
    last = torch.where(keep, -torch.inf, scores).argmax()
    assert not keep[last]
    more = keep.clone()
    more[last] = True
    assert cost.share(more, metric).item() > target
    for g in structure.groups:  # a group keeps its highest scores
        of, kept = scores[g.start : g.stop], keep[g.start : g.stop]
        assert bool(kept.all()) or of[kept].min() > of[~kept].max()


def test_every_part_has_been_tried_with_units_to_remove():
    """The grammar reaches what it names: all parts but two leave units to remove before them."""
    reached: dict[str, Any] = {}
    for part in PARTS:
        structure = nas_gate.analyze(build([(part, 4, "batch"), ("conv", 4, "none")], False, 0), images(0))
        reached[part] = any(m.tensor == "0.0.weight" for g in structure.groups for m in g.members)
    assert {part for part, whole in reached.items() if not whole} == {"roll", "softmax"}
