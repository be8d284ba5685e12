"""Scores against hand arithmetic, an oracle that removes one unit at a time, and what landing makes of them."""

import pytest
import torch
from torch import Tensor, nn

import nas_gate
from nas_gate import Structure, baselines, landing, models
from nas_gate.removal import cut_model, cut_of


def network() -> nn.Sequential:
    """A group of 2 units with a norm, "0", and one of 3 without, "3"."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([[1.0, -3.0], [0.0, 2.0]]))
        layers[1].weight.copy_(torch.tensor([0.5, -2.0]))
        layers[3].weight.copy_(torch.tensor([[1.0, 2.0], [1.0, 0.0], [-1.0, 0.0]]))
        layers[5].weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    return layers.eval()


def unscaled(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))


def scored(method: str, model: nn.Module, example: Tensor, seed: int = 0) -> tuple[Structure, list[float]]:
    structure = nas_gate.analyze(model.eval(), example)
    return structure, baselines.score(method, structure, model, seed).tolist()


def test_l1_is_the_mean_weight_of_a_unit_relative_to_its_group():
    structure, scores = scored("l1", network(), torch.randn(1, 2))
    assert [(g.name, g.size) for g in structure.groups] == [("0", 2), ("3", 3)]
    # a row of the layer that makes it, and the column of the layer that reads it: biases and norms do not count
    first = [(1 + 3 + 1 + 1 + 1) / 5, (0 + 2 + 2 + 0 + 0) / 5]
    second = [(1 + 2 + 1) / 3, (1 + 0 + 2) / 3, (1 + 0 + 3) / 3]
    assert scores == pytest.approx([x / (sum(g) / len(g)) for g in (first, second) for x in g])


def test_uniform_is_the_place_in_the_group_by_l1():
    _, scores = scored("uniform", network(), torch.randn(1, 2))
    assert scores == pytest.approx([3 / 4, 1 / 4, 5 / 6, 1 / 6, 3 / 6])  # of equal units the first counts more


WITHIN = (1 / 4, -1 / 4, 2 / 6, -2 / 6, 0)
"""The places of the units of `network()` in their groups by l1, from the middle."""


def test_gates_begin_in_the_order_of_l1_around_the_usual_start():
    gated = nas_gate.attach(network(), torch.randn(1, 2))
    nas_gate.spread_gates(gated, 0.6)
    assert gated.gates.weight.tolist() == pytest.approx([0.5 + 0.3 * p for p in WITHIN])
    nas_gate.spread_gates(gated, 1.0, torch.rand(5))
    assert bool((gated.keep() == 1).all())
    for spread in (1.01, -0.1):
        with pytest.raises(ValueError, match=r"`0 <= spread <= 1` must hold"):
            nas_gate.spread_gates(gated, spread)
    nas_gate.spread_gates(gated, 0.0, torch.rand(5))
    assert gated.gates.weight.tolist() == [0.5] * 5


def test_groups_begin_in_the_order_of_what_the_loss_feels_per_cost():
    gated = nas_gate.attach(network(), torch.randn(1, 2))

    def shifts(felt: list[float], metric: str) -> list[float]:
        nas_gate.spread_gates(gated, 0.6, torch.tensor(felt), metric)
        return [(w - 0.5) / 0.3 - p for w, p in zip(gated.gates.weight.tolist(), WITHIN, strict=True)]

    first, second = [1 / 4] * 2 + [-1 / 4] * 3, [-1 / 4] * 2 + [1 / 4] * 3
    # a unit of the first costs 2 + 3 multiply-accumulates, one of the second 2 + 1; parameters 3 + 2 + 3 and 2 + 1 + 1
    assert shifts([1.3, 1.3, 1, 1, 1], "macs") == pytest.approx(first, abs=1e-6)  # 1.3 ** 2 > 5 / 3
    assert shifts([1.28, 1.28, 1, 1, 1], "macs") == pytest.approx(second, abs=1e-6)
    assert shifts([0.0, 1.9, 1, 1, 1], "macs") == pytest.approx(first, abs=1e-6)  # the mean of squares, 1.805
    assert shifts([1.9, 0.0, 1, 0, 1.4], "macs") == pytest.approx(first, abs=1e-6)  # and 0.987
    assert shifts([1.3, 1.3, 1, 1, 1], "params") == pytest.approx(second, abs=1e-6)
    assert shifts([1.42, 1.42, 1, 1, 1], "params") == pytest.approx(first, abs=1e-6)  # 1.42 ** 2 > 8 / 4


def test_gates_of_branches_and_choices_begin_as_usual():
    gated = nas_gate.attach(models.build("cifar_supernet"), torch.randn(1, 3, 8, 8), depth=True)
    before = gated.gates.weight.clone()
    baselines.spread_gates(gated, 0.8)
    for group in gated.structure.groups:
        part, was = gated.gates.weight[group.start : group.stop], before[group.start : group.stop]
        assert part.mean().item() == pytest.approx(was.mean().item())
        assert torch.equal(part, was) == (group.kind != "width" or group.size == 1)


def test_sensitivity_is_the_root_mean_square_of_what_scaling_a_unit_does():
    gated = nas_gate.attach(network(), torch.randn(1, 2)).eval()
    with torch.no_grad():
        gated.model[1].weight.copy_(torch.tensor([1.0, 1.0]))  # with a norm that changes nothing ...
        gated.model[1].running_var.fill_(1 - gated.model[1].eps)
        for layer in (0, 3, 5):
            gated.model[layer].bias.zero_()
    # ... x = (4, 1) makes (4 - 3, 2) = (1, 2), then (1 + 2 * 2, 1, -1), of which the last is cut off: (5, 1, 0)
    second = [1 * 5.0, -2 * 1.0, 3 * 0.0]  # what scaling each does to the output
    first = [1 * (1 * 1 - 2 * 1), 2 * (1 * 2 - 2 * 0)]
    assert gated(torch.tensor([[4.0, 1.0]])).item() == pytest.approx(sum(second), rel=1e-4)
    outputs = (factor * gated(torch.tensor([[4.0, 1.0]])).sum() for factor in (1.0, -7.0))
    scale = ((1 + 49) / 2) ** 0.5
    felt = nas_gate.sensitivity(gated, outputs)
    assert felt.dtype == torch.float64
    assert felt.tolist() == pytest.approx([scale * abs(x) for x in first + second], rel=1e-4)
    assert gated.gates.weight.grad is None
    with pytest.raises(ValueError, match="at least one batch"):
        nas_gate.sensitivity(gated, [])


def test_branches_begin_in_the_order_of_their_sensitivity():
    gated = nas_gate.attach(models.build("resnet20", shortcut="B"), torch.randn(1, 3, 8, 8), depth=True)
    kinds = [g.kind for g in gated.structure.groups for _ in range(g.size)]
    branches = torch.tensor([kind == "branch" for kind in kinds])
    nas_gate.spread_gates(gated)
    usual = gated.gates.weight.detach().clone()
    assert (usual[branches] == 0.5).all()
    felt = torch.rand(gated.structure.units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nas_gate.spread_gates(gated, 1.0, felt)
    start = gated.gates.weight.detach()
    shifts = (start - usual)[~branches].unique()
    assert -0.25 < shifts.min() < shifts.max() < 0.25  # groups of width have their own
    count = int(branches.sum())
    expected = (torch.arange(count) + 0.5) / count
    torch.testing.assert_close(start[branches][felt[branches].argsort()], expected)  # which cost the same here
    with pytest.raises(ValueError, match="sensitivity must have shape"):
        nas_gate.spread_gates(gated, 1.0, felt[1:])


def test_bn_scale_is_the_size_of_gamma_and_groups_without_one_are_average():
    _, scores = scored("bn_scale", network(), torch.randn(1, 2))
    # quantiles 5/6, 1/6 and 1/2 between 0.5 and 2
    assert scores == pytest.approx([0.5, 2.0, 0.5 + 1.5 * 5 / 6, 0.5 + 1.5 / 6, 0.5 + 1.5 / 2])


def test_bn_scale_of_coupled_channels_is_their_mean():
    model = models.build("digits_cnn", width=0.25)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, generator=generator)
    structure, scores = scored("bn_scale", model, torch.zeros(1, 1, 8, 8))
    stem = structure.groups[0]
    stem_norm, block_norm = model.get_parameter("stem.1.weight"), model.get_parameter("stages.0.0.bn2.weight")
    assert scores[stem.start : stem.stop] == pytest.approx(((stem_norm.abs() + block_norm.abs()) / 2).tolist())


def test_layer_norms_have_scales_also_in_a_gated_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 2.0]))
    gated = nas_gate.attach(model, torch.randn(1, 2))
    assert baselines.score("bn_scale", gated.structure, gated.model).tolist() == [1.0, 3.0, 2.0]


def test_bn_scale_without_any_norm_is_refused():
    with pytest.raises(ValueError, match=r"bn_scale.* needs norms.* none of the 1 groups of Sequential"):
        scored("bn_scale", unscaled(), torch.zeros(1, 1, 8, 8))


def test_random_is_an_order_that_the_seed_decides():
    structure, first = scored("random", network(), torch.randn(1, 2), seed=1)
    assert sorted(first) == list(range(structure.units))
    assert scored("random", network(), torch.randn(1, 2), seed=1)[1] == first
    assert len({tuple(scored("random", network(), torch.randn(1, 2), seed)[1]) for seed in range(8)}) > 4


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"one of \('uniform', 'l1', 'bn_scale', 'random'\), but got 'gates'"):
        scored("gates", network(), torch.randn(1, 2))


def weights(model: nn.Module) -> tuple[float, int]:
    """Sum of |w| and number of w over all weights with two dimensions and more."""
    matrices = [p.detach().double() for p in model.parameters() if p.ndim > 1]
    return sum(float(m.abs().sum()) for m in matrices), sum(m.numel() for m in matrices)


def test_l1_counts_what_removing_the_unit_alone_takes_away():
    """Of a residual network: what a unit's removal takes from the sum of |w| and from the number of weights."""
    torch.manual_seed(0)
    model = models.build("digits_cnn", width=0.2).eval()
    structure, scores = scored("l1", model, torch.zeros(1, 1, 8, 8))
    means = []
    size, count = weights(model)
    for unit in range(structure.units):
        keep = torch.ones(structure.units, dtype=torch.bool)
        keep[unit] = False
        less, fewer = weights(cut_model(model, cut_of(structure, keep)))
        means.append((size - less) / (count - fewer))
    expected = [m / (sum(means[g.start : g.stop]) / g.size) for g in structure.groups for m in means[g.start : g.stop]]
    assert scores == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
def test_uniform_keeps_the_same_share_of_every_group(target: float):
    torch.manual_seed(0)
    model = models.build("digits_cnn").eval()
    structure, scores = scored("uniform", model, torch.zeros(1, 1, 8, 8))
    keep = landing.choose(structure, torch.tensor(scores), target)
    kept = structure.open_units(keep).tolist()
    # some one share is within half a unit of every group's
    assert max((k - 0.5) / g.size for k, g in zip(kept, structure.groups)) <= (
        min((k + 0.5) / g.size for k, g in zip(kept, structure.groups)) + 1e-12
    )
    by_l1 = torch.tensor(scored("l1", model, torch.zeros(1, 1, 8, 8))[1])
    for group in structure.groups:
        mine, open_ = by_l1[group.start : group.stop], keep[group.start : group.stop]
        assert float(mine[open_].min()) >= float(mine[~open_].max())
    eights = structure.open_units(landing.choose(structure, torch.tensor(scores), target, round_to=8))
    assert all(n % 8 == 0 for n in eights)
