"""The promises on random networks: whatever is built from these parts, gates, removal, cost and landing hold."""

import copy
import tempfile
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

import nas_gate
from nas_gate import Choice, landing

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


class Scaled(nn.Module):
    """A residual branch with a scale per channel at its end."""

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(channels, width, 3, norm), nn.Conv2d(width, channels, 1))
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layers(x)


class Own(nn.Module):
    """A parameter of its own, and what to do with it."""

    def __init__(self, run: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) - 0.3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


def attention(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    """Two heads over the places of an image, whose width is taken from what enters."""
    n, _, h, w = x.shape
    q, k, v = qkv(x).reshape(n, 3, 2, -1, h * w).transpose(-1, -2).unbind(1)
    y = F.scaled_dot_product_attention(q, k, v)
    return x + out(y.transpose(-1, -2).reshape(n, -1, h, w))


def recurrent(x: Tensor, layer: nn.Module) -> Tensor:
    """From place to place of an image."""
    return layer(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, x.shape[2:])


def modulated(x: Tensor, layer: nn.Module) -> Tensor:
    """Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", arXiv 1709.07871, equation 2."""
    scale, shift = layer(x.mean((2, 3)))[..., None, None].chunk(2, 1)
    return x * scale + shift


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
    "scaled residual": lambda c, w, norm: (Scaled(c, w, norm), c),
    "nested residual": lambda c, w, norm: (
        Step(
            lambda x, a, b, d: x + d((y := a(x)) + b(y)), conv(c, w, 1, norm), conv(w, w, 3, norm), nn.Conv2d(w, c, 1)
        ),
        c,
    ),
    "choice": lambda c, w, norm: (
        Choice([conv(c, c, 3, norm), nn.Sequential(conv(c, w, 1, norm), conv(w, c, 1)), nn.Identity()]),
        c,
    ),
    "choice in a residual": lambda c, w, norm: (
        Step(
            lambda x, a: x + a(x),
            Choice([conv(c, c, 1, norm), nn.Sequential(*(PARTS["residual"](c, w, norm)[0], conv(c, c, 3)))]),
        ),
        c,
    ),
    "own filters": lambda c, w, norm: (Own(lambda x, a: F.conv2d(x, a, padding=1), w, c, 3, 3), w),
    "stack": lambda c, w, norm: (
        Step(lambda x, a, b: torch.stack([a(x), b(x)], 1).amax(1), conv(c, w, 1, norm), conv(c, w, 3)),
        w,
    ),
    "unfold": lambda c, w, norm: (
        Step(lambda x, a: a(F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:])), nn.Conv2d(9 * c, w, 1)),
        w,
    ),
    "attention": lambda c, w, norm: (Step(attention, nn.Conv2d(c, 6 * w, 1), nn.Conv2d(2 * w, c, 1)), c),
    "recurrent": lambda c, w, norm: (Step(recurrent, (nn.GRU if w % 2 else nn.LSTM)(c, w, batch_first=True)), w),
    "modulation": lambda c, w, norm: (Step(modulated, nn.Linear(c, 2 * c)), c),
    "scatter": lambda c, w, norm: (
        Step(lambda x: torch.zeros_like(x).index_add(2, torch.arange(PLACES) // 2, x.cumsum(3))),
        c,
    ),
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
    """Every unit by a coin, one of every group of width for certain, and one candidate of every choice."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, generator=generator) < 0.5
    for g in structure.groups:
        if g.kind == "width":
            keep[g.start + int(torch.randint(g.size, (), generator=generator))] = True
    for choice in structure.choices:
        chosen = choice.units[int(torch.randint(len(choice.units), (), generator=generator))]
        keep[list(choice.units)] = torch.tensor(choice.units) == chosen
    return keep


def open_gates(gated: nas_gate.GatedModel, keep: Tensor) -> None:
    """Give the gates weights that open exactly `keep`."""
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))
    assert torch.equal(gated.keep().bool(), keep)


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / a.abs().max()).detach())


# --- the promises -------------------------------------------------------------------------------------------


@STEADY
@given(NETWORKS, SEEDS, st.booleans())
def test_gates_removal_and_cost(model: nn.Module, seed: int, depth: bool):
    """Promises 1 to 3: open gates change nothing; removed and gated model are equal and cost what was predicted."""
    x, other = images(seed), images(seed + 1)
    before = copy.deepcopy(model.state_dict())
    gated = nas_gate.attach(model, x, depth=depth)
    structure = gated.structure
    # what the rules allow is right at once: the trial has nothing to correct
    assert not [f for f in (*structure.fixed, *structure.kept) if "smaller model" in f.reason or "must" in f.reason]
    assert {g.kind for g in structure.groups} <= {"width", "choice", *(["branch"] if depth else [])}
    assert gated.cost.total() == nas_gate.count_macs(model, (x,))
    if structure.norms:
        assert distance(model(other), gated(other)) < 1e-6
    else:
        assert torch.equal(model(other), gated(other))
    for keep in (random_keep(structure, seed), random_keep(structure, seed + 1)):
        removed = nas_gate.remove_with_proof(gated, keep)
        open_gates(gated, keep)
        with torch.no_grad():
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
    structure = nas_gate.analyze(model, images(seed), depth=True)
    cost = nas_gate.CostModel(structure)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(structure.units, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad(cost(keep.requires_grad_(), metric), keep)
    keep = keep.detach()
    free = torch.ones_like(keep, dtype=torch.bool)  # a candidate may cost nothing, all else costs something
    free[[unit for choice in structure.choices for unit in choice.units]] = False
    assert bool((gradient >= 0).all())
    assert bool((gradient[free] > 0).all())
    step = 1e-3
    for g in structure.groups:
        unit = torch.zeros_like(keep)
        unit[g.start] = step
        slope = (cost(keep + unit, metric) - cost(keep - unit, metric)) / (2 * step)
        assert gradient[g.start].item() == pytest.approx(slope.item(), rel=1e-6)
        assert torch.equal(gradient[g.start : g.stop], gradient[g.start].expand(g.size))  # units of a group cost alike
    assert cost(structure.dense(), metric).item() == cost.total(metric)


@STEADY
@given(NETWORKS, SEEDS, st.floats(0.02, 0.98), st.sampled_from(["macs", "params"]), st.booleans())
def test_landing_meets_the_target_or_refuses(model: nn.Module, seed: int, target: float, metric: str, depth: bool):
    """Promise 5: below the target, and above it with the unit that was closed last."""
    structure = nas_gate.analyze(model, images(seed), depth=depth)
    cost = nas_gate.CostModel(structure)
    scores = torch.randn(structure.units, generator=torch.Generator().manual_seed(seed))
    lowest, highest = nas_gate.reachable(structure, metric)
    assert highest == 1.0 or (highest > 1.0 and structure.choices)
    if target < lowest:
        with pytest.raises(ValueError, match="is below what is reachable"):
            landing.choose(structure, scores, target, metric)
        return
    keep = landing.choose(structure, scores, target, metric)
    assert (structure.open_units(keep) >= [g.least for g in structure.groups]).all()
    assert all(int(keep[list(choice.units)].sum()) == 1 for choice in structure.choices)
    share = cost.share(keep, metric).item()
    assert share <= target
    others = [cost.share(more, metric).item() for more in with_one_more(structure, keep)]
    assert max(others) > target or (max(others) <= share and structure.choices)
    if {g.kind for g in structure.groups} == {"width"}:
        last = torch.where(keep, -torch.inf, scores).argmax()
        assert not keep[last]
        more = keep.clone()
        more[last] = True
        assert cost.share(more, metric).item() > target
    for g in structure.groups:  # a group keeps its highest scores
        of, kept = scores[g.start : g.stop], keep[g.start : g.stop]
        if g.kind == "width":
            assert bool(kept.all()) or of[kept].min() > of[~kept].max()


def with_one_more(structure: nas_gate.Structure, keep: Tensor) -> list[Tensor]:
    """Every keep with one more unit open, or another candidate of one choice."""
    result = []
    rivals = {unit: choice.units for choice in structure.choices for unit in choice.units}
    for unit in (~keep).nonzero().flatten().tolist():
        more = keep.clone()
        more[list(rivals.get(unit, ()))] = False
        more[unit] = True
        result.append(more)
    return result


@STEADY
@given(NETWORKS, SEEDS)
def test_candidates_load_from_the_record_alone(model: nn.Module, seed: int):
    """Promise 6: the same outputs, bit for bit, from files without any pickle."""
    gated = nas_gate.attach(model, images(seed), depth=True)
    removed = nas_gate.remove_with_proof(gated, random_keep(gated.structure, seed))
    with tempfile.TemporaryDirectory() as folder:
        path = nas_gate.save(Path(folder) / "c", removed.model, removed.cut, {"name": "mine"}, {}, {})
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
        loaded = nas_gate.load(path, factory=lambda: copy.deepcopy(model))
    assert torch.equal(loaded(images(seed + 1)), removed.model(images(seed + 1)))
    assert sum(p.numel() for p in loaded.parameters()) == removed.params


def test_every_part_has_been_tried_with_units_to_remove():
    """The grammar reaches what it names: all parts but two leave units to remove before them."""
    reached: dict[str, Any] = {}
    for part in PARTS:
        structure = nas_gate.analyze(build([(part, 4, "batch"), ("conv", 4, "none")], False, 0), images(0))
        reached[part] = any(m.tensor == "0.0.weight" for g in structure.groups for m in g.members)
    assert {part for part, whole in reached.items() if not whole} == {"roll", "softmax"}
