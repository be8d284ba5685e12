"""Residual branches as units: found in the run, priced by hand, exactly zero when closed, gone when removed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nas_gate
from nas_gate import baselines, landing
from nas_gate.modules import Zero

PLACES = 16  # images of 4x4


class Residual(nn.Module):
    """x + layers(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Written(nn.Module):
    """A forward function of its own over some parts."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def network(*blocks: nn.Module) -> nn.Sequential:
    """A stem to 4 channels, the blocks, a head to 2 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *blocks, nn.Flatten(), nn.Linear(4 * PLACES, 2, bias=False))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def branch(hidden: int = 6) -> list[nn.Module]:
    return [nn.Conv2d(4, hidden, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(hidden, 4, 1), nn.BatchNorm2d(4)]


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def analyzed(*blocks: nn.Module) -> nas_gate.Structure:
    return nas_gate.analyze(network(*blocks), images(), depth=True)


def branches(structure: nas_gate.Structure) -> list[str]:
    return [g.name for g in structure.groups if g.kind == "branch"]


def only_closed(structure: nas_gate.Structure, *names: str) -> Tensor:
    """All units open but the groups of these names."""
    keep = structure.dense()
    for g in structure.groups:
        if g.name in names:
            keep[g.start : g.stop] = False
    return keep


def open_gates(gated: nas_gate.GatedModel, keep: Tensor) -> None:
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 0.5, -0.5))


# --- the record and the cost --------------------------------------------------------------------------------


def test_a_branch_by_hand() -> None:
    structure = analyzed(Residual(*branch()))
    (group,) = (g for g in structure.groups if g.kind == "branch")
    assert (group.name, group.size, group.least) == ("1.layers:branch", 1, 0)
    assert {m.tensor for m in group.members} == {"1.layers.3.weight", "1.layers.3.bias"}
    cost = nas_gate.CostModel(structure)
    stem, head, inside = 3 * 4 * PLACES, 4 * PLACES * 2, (4 * 6 * 9 + 6 * 4) * PLACES
    assert cost.total() == stem + head + inside
    assert cost.total("params") == 3 * 4 + 4 * PLACES * 2 + 4 * 6 * 9 + (6 * 4 + 4) + 2 * 4
    closed = only_closed(structure, group.name)
    assert cost(closed).item() == stem + head
    assert cost(closed, "params").item() == 3 * 4 + 4 * PLACES * 2
    # multilinear: half a branch costs half of it, and with a third of its hidden units closed two thirds of that
    keep = structure.dense().double()
    keep[group.start] = 0.5
    hidden = next(g for g in structure.groups if g.size == 6)
    keep[hidden.start : hidden.start + 2] = 0
    assert cost(keep).item() == pytest.approx(stem + head + inside / 2 * 4 / 6, abs=1e-9)


def test_nested_branches_multiply() -> None:
    inner = nn.Conv2d(6, 6, 1, bias=False)
    outer = [nn.Conv2d(4, 6, 1, bias=False), Residual(inner), nn.Conv2d(6, 4, 1, bias=False)]
    structure = analyzed(Residual(*outer))
    assert branches(structure) == ["1.layers.1.layers:branch", "1.layers:branch"]
    cost, ends = nas_gate.CostModel(structure), (3 * 4 + 4 * 2) * PLACES
    keep = structure.dense().double()
    for g in structure.groups:
        if g.kind == "branch":
            keep[g.start] = 0.5
    assert cost(keep).item() == ends + (0.5 * 2 * 24 + 0.25 * 36) * PLACES
    small = nas_gate.remove_with_proof(
        nas_gate.attach(network(Residual(*outer)), images(), depth=True), only_closed(structure, *branches(structure))
    )
    assert small.cut.zeros == {"1.layers": None}  # what is inside needs no word
    assert small.macs == ends


def test_without_depth_nothing_changes() -> None:
    model = network(Residual(*branch()))
    structure = nas_gate.analyze(model, images())
    assert {g.kind for g in structure.groups} == {"width"}
    assert structure.parts == structure.kept == ()


def test_text_and_record_name_kinds() -> None:
    structure = analyzed(Residual(*branch()), Residual(nn.Conv2d(4, 4, 1), nn.Sigmoid()))
    text = nas_gate.describe(structure)
    assert "  branch    1.layers:branch       1 unit   1.layers\n" in text
    assert text.endswith("aten.sigmoid in 2.layers.1 at its end does not leave zeros zero: branch 2.layers:branch")
    record = nas_gate.to_json(structure)
    assert {g["kind"] for g in record["groups"]} == {"width", "branch"}
    assert [k["name"] for k in record["kept"]] == ["2.layers:branch"]


# --- what is found, and why the rest is not -----------------------------------------------------------------

SCALE = nn.Parameter(torch.rand(4, 1, 1))
FOUND: dict[str, Callable[[], nn.Module]] = {
    "in place, on the branch": lambda: Written(lambda m, x: m.b(m.a(x)).add_(x), a=nn.Conv2d(4, 4, 1), b=nn.ReLU()),
    "shortcut first": lambda: Written(lambda m, x: torch.add(x, m.a(x), alpha=2), a=nn.Conv2d(4, 4, 1)),
    "relu in place on what comes in": lambda: Written(
        lambda m, x: x + m.b(F.relu_(m.n(x))), n=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1)
    ),
    "other channels inside": lambda: Residual(nn.Conv2d(4, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 4, 1)),
    "layer scale": lambda: Written(lambda m, x: x + m.scale * m.a(x), a=nn.Conv2d(4, 4, 1), scale=SCALE),
    "pool and dropout at the end": lambda: Residual(nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 1, 1), nn.Dropout(0.5)),
    "two paths to the end": lambda: Written(
        lambda m, x: x + (m.a(x) + m.c((y := m.b(x)) * y)),
        a=nn.Conv2d(4, 4, 1),
        b=nn.Conv2d(4, 4, 1),
        c=nn.BatchNorm2d(4),
    ),
    "side by side": lambda: Written(
        lambda m, x: x + m.a(x) + m.b(x), a=nn.Conv2d(4, 4, 1), b=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    ),
    "side by side, the shortcut last": lambda: Written(
        lambda m, x: m.a(x) + (m.b(x) + x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)
    ),
    "excitation at the end": lambda: Written(
        lambda m, x: x + (y := m.a(x)) * m.b(y.mean((2, 3), keepdim=True)).sigmoid(),
        a=nn.Conv2d(4, 4, 1),
        b=nn.Conv2d(4, 4, 1),
    ),
    "a tuple": lambda: Written(lambda m, x: x + tokens(m.a, x), a=nn.MultiheadAttention(4, 2, batch_first=True)),
    "by keyword": lambda: Written(lambda m, x: x + m.a(input=x), a=nn.Conv2d(4, 4, 1)),
    "weight norm": lambda: Residual(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, bias=False))),
}


def tokens(attention: nn.Module, x: Tensor) -> Tensor:
    sequence = x.flatten(2).transpose(1, 2)
    out, _ = attention(sequence, sequence, sequence)
    return out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_closes_to_exactly_the_shortcut(kind: str) -> None:
    block = FOUND[kind]()
    gated = nas_gate.attach(network(block), images(), depth=True)
    names = branches(gated.structure)
    assert names
    assert not gated.structure.kept
    assert torch.equal(gated(images(2)), network(block)(images(2)))
    keep = only_closed(gated.structure, *names)
    open_gates(gated, keep)
    removed = nas_gate.remove_with_proof(gated, keep)
    alone = network(nn.Identity())
    alone[0].weight, alone[-1].weight = gated.model[0].weight, gated.model[-1].weight
    for one in (gated, removed.model):
        assert torch.equal(one(images(2)), alone(images(2)))
    assert removed.params == sum(p.numel() for p in alone.parameters())
    assert removed.macs == nas_gate.count_macs(alone, (images(),))
    assert any(isinstance(m, Zero) for m in removed.model.modules())


def doubled() -> nn.Module:
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(Residual(conv), Residual(conv))


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm without parameters": (
        lambda: Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
        "has no parameter that could close it",
    ),
    "a sigmoid": (lambda: Residual(nn.Conv2d(4, 4, 1), nn.Sigmoid()), "does not leave zeros zero"),
    "used elsewhere": (
        lambda: Written(lambda m, x: torch.cat([x + (y := m.a(x)), y[:, :2] * 0], 1)[:, :4], a=nn.Conv2d(4, 4, 1)),
        "is used outside of it, too|is used elsewhere, too",
    ),
    "a weight of two branches": (doubled, "is used elsewhere, too"),
    "products in no module of their own": (
        lambda: Written(
            lambda m, x: x + m.b(((f := x.flatten(2)) @ f.mT @ f).view(x.shape)), b=nn.Conv2d(4, 4, 1)
        ),
        "belongs to no module that runs inside it alone",
    ),
    "no module": (lambda: Written(lambda m, x: x + m.scale * x, scale=SCALE), "no module runs inside it alone"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_what_cannot_be_a_unit_says_why(kind: str) -> None:
    make, reason = KEPT[kind]
    structure = analyzed(make())
    assert not branches(structure)
    assert structure.kept
    for kept in structure.kept:
        assert kept.kind == "branch"
        assert any(part in kept.reason for part in reason.split("|")), kept.reason


def test_what_the_trial_refuses_stays_with_its_error() -> None:
    """A reshape outside of the replaced modules does not fit the zeros that they leave."""

    def run(m: Any, x: Tensor) -> Tensor:
        return x + m.b(m.a(x).reshape(x.shape[0], 2, 4, 4, 4).sum(1))

    structure = analyzed(Written(run, a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 4, 1)), Residual(*branch()))
    assert branches(structure) == ["2.layers:branch"]
    (kept,) = structure.kept
    assert kept.name == "1:branch"
    assert "the smaller model fails" in kept.reason


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_layer_that_looks_into_its_attention_keeps_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    gated = nas_gate.attach(model, x, depth=True)
    assert [k.name for k in gated.structure.kept if "batch_first" in k.reason] == [
        "1.layers.0.self_attn:branch",
        "1.layers.1.self_attn:branch",
    ]
    branches = [g.start for g in gated.structure.groups if g.kind == "branch"]
    assert len(branches) == 2
    with torch.no_grad():
        gated.gates.weight[branches] = -1.0
        small = nas_gate.remove(gated, target=0.9).eval()
        # without gradients, where PyTorch fuses the layers that are whole
        torch.testing.assert_close(small(x), small.requires_grad_(True)(x))


def test_the_gradient_is_that_of_a_gate_on_the_branch() -> None:
    """d loss / d keep = <d loss / d sum, branch>, whether the branch is open or closed."""
    model = network(Residual(*branch()), Residual(*branch(3))).double()
    gated = nas_gate.attach(model, images().double(), depth=True)
    x = images(3).double()
    for closed in ((), ("2.layers:branch",)):
        keep = only_closed(gated.structure, *closed)
        open_gates(gated, keep)
        gated.zero_grad()
        gated(x).square().sum().backward()
        got = {g.name: float(gated.gates.weight.grad[g.start]) for g in gated.structure.groups if g.kind == "branch"}
        factors = torch.tensor([1.0, 0.0 if closed else 1.0], dtype=torch.float64, requires_grad=True)
        y = model[0](x)
        for factor, block in zip(factors, (model[1], model[2])):
            y = y + factor * block.layers(y)
        model[4](model[3](y)).square().sum().backward()
        assert list(got.values()) == pytest.approx(factors.grad.tolist(), rel=1e-4, abs=1e-6)


def test_a_branch_may_be_closed_by_its_gate_alone_and_opens_again() -> None:
    gated = nas_gate.attach(network(Residual(*branch())), images(), depth=True)
    (unit,) = (g.start for g in gated.structure.groups if g.kind == "branch")
    with torch.no_grad():
        gated.gates.weight.fill_(-1.0)
    keep = gated.keep()
    assert keep[unit] == 0
    assert all(keep[g.start : g.stop].sum() == 1 for g in gated.structure.groups if g.kind == "width")
    gated(images()).sum().backward()
    assert gated.gates.weight.grad[unit] != 0


def test_training_copies_and_states() -> None:
    gated = nas_gate.attach(network(Residual(*branch()), Residual(*branch(3))), images(), depth=True)
    open_gates(gated, only_closed(gated.structure, "1.layers:branch"))
    twin = copy.deepcopy(gated)
    twin.load_state_dict(gated.state_dict())
    assert torch.equal(twin(images(2)), gated(images(2)))
    gated.train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    before = gated.gates.weight.detach().clone()
    gated(images(4)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, gated.gates.weight)


# --- landing, baselines, candidates -------------------------------------------------------------------------


def test_landing_closes_a_branch_and_opens_what_then_fits() -> None:
    gated = nas_gate.attach(network(Residual(*branch(40))), images(), depth=True)
    structure, cost = gated.structure, gated.cost
    hidden = next(g for g in structure.groups if g.size == 40)
    (group,) = (g for g in structure.groups if g.kind == "branch")
    scores = torch.linspace(1, 2, structure.units)
    scores[hidden.start] = -1.0  # closes first, then the branch, and then a hidden unit is free
    scores[group.start] = 0.0
    keep = landing.choose(structure, scores, 0.5)
    assert not keep[group.start]
    assert keep.sum() == structure.units - 1
    assert cost.share(keep).item() == (3 * 4 + 4 * 2) * PLACES / cost.total()
    held = landing.choose(structure, scores, 0.5, minimum={group.name: 1})
    assert held[group.start]
    assert 0.4 < cost.share(held).item() <= 0.5


def test_reachable_is_the_shortcuts_alone() -> None:
    structure = analyzed(Residual(*branch()))
    lowest = (3 * 1 + 1 * 2) * PLACES
    total = nas_gate.CostModel(structure).total()
    assert nas_gate.reachable(structure) == (lowest / total, 1.0)
    assert nas_gate.reachable(structure, minimum={"1.layers:branch": 1})[0] > lowest / total


@pytest.mark.parametrize("method", ["uniform", "l1", "bn_scale"])
def test_baselines_of_width_close_branches_last(method: str) -> None:
    model = network(Residual(*branch()), Residual(*branch()))
    structure = nas_gate.analyze(model, images(), depth=True)
    scores = baselines.score(method, structure, model)
    width = nas_gate.analyze(model, images())
    assert torch.equal(scores[: width.units], baselines.score(method, width, model))
    lowest = nas_gate.reachable(width)[0]
    keep = landing.choose(structure, scores, lowest)
    assert all(keep[g.start] for g in structure.groups if g.kind == "branch")
    assert scores.isfinite().all()


def test_a_candidate_without_a_branch_and_its_layer_scale(tmp_path) -> None:
    block = FOUND["layer scale"]
    gated = nas_gate.attach(network(block()), images(), depth=True)
    removed = nas_gate.remove_with_proof(gated, only_closed(gated.structure, "1:branch"))
    assert removed.cut.zeros == {"1.a": None}
    assert removed.cut.loose == ("1.scale",)
    assert "1.scale" not in removed.model.state_dict()
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, {"name": "mine"}, {}, {})
    loaded = nas_gate.load(folder, factory=lambda: network(block()))
    assert torch.equal(loaded(images(2)), removed.model(images(2)))


def test_least_units_are_checked_by_removal() -> None:
    gated = nas_gate.attach(network(Residual(*branch())), images(), depth=True)
    with pytest.raises(ValueError, match="at least one unit of every group"):
        nas_gate.remove_with_proof(gated, only_closed(gated.structure, *(g.name for g in gated.structure.groups)))
