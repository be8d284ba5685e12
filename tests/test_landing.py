"""Landing: at most the target and within one unit of it, the highest scores kept, or a refusal."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nas_gate
from nas_gate import CostModel, landing, models

WIDTHS = (6, 10, 4)


def network() -> nn.Sequential:
    """Groups of 6, 10 and 4 units, named 0, 2 and 4."""
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3)
    )


def macs(a: int, b: int, c: int) -> int:
    return 5 * a + a * b + b * c + 3 * c


STRUCTURE = nas_gate.analyze(network(), torch.randn(1, 5))
TOTAL = macs(*WIDTHS)
UNITS = sum(WIDTHS)
STARTS = (0, 6, 16)


def counts(keep: Tensor) -> list[int]:
    return [int(part.sum()) for part in keep.split(WIDTHS)]


def closing_one_by_one(scores: Tensor, target: float) -> list[int]:
    """The units of each group that stay when the lowest score closes first: plain Python, one unit at a time."""
    left = list(WIDTHS)
    for unit in sorted(range(UNITS), key=lambda u: (float(scores[u]), u)):
        if macs(*left) / TOTAL <= target:
            break
        group = sum(unit >= start for start in STARTS) - 1
        left[group] = max(left[group] - 1, 1)
    return left


finite = st.floats(-5, 5, allow_nan=False, width=32)
score_lists = st.lists(finite, min_size=UNITS, max_size=UNITS)
targets = st.floats(macs(1, 1, 1) / TOTAL, 0.999)


def test_structure_is_the_one_assumed() -> None:
    assert [(g.name, g.start, g.size) for g in STRUCTURE.groups] == [("0", 0, 6), ("2", 6, 10), ("4", 16, 4)]
    assert CostModel(STRUCTURE).total() == TOTAL == 142


# --- the promise --------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(score_lists, targets)
def test_meets_the_target_within_one_unit(values: list[float], target: float) -> None:
    scores = torch.tensor(values)
    keep = landing.choose(STRUCTURE, scores, target)
    assert keep.dtype == torch.bool
    assert keep.shape == (UNITS,)
    left = counts(keep)
    assert min(left) >= 1
    assert macs(*left) / TOTAL <= target
    assert left == closing_one_by_one(scores, target)
    with_one_more = [macs(*(n + (i == g) for i, n in enumerate(left))) for g in range(3) if left[g] < WIDTHS[g]]
    assert max(with_one_more) / TOTAL > target


@settings(max_examples=60, deadline=None)
@given(score_lists, targets)
def test_every_group_keeps_its_highest_scores(values: list[float], target: float) -> None:
    scores = torch.tensor(values)
    keep = landing.choose(STRUCTURE, scores, target)
    for part, kept in zip(scores.split(WIDTHS), keep.split(WIDTHS)):
        if not bool(kept.all()):
            assert float(part[kept].min()) >= float(part[~kept].max())


@settings(max_examples=60, deadline=None)
@given(score_lists, st.floats(0.62, 0.999), st.integers(1, 8), st.integers(1, 4))
def test_round_to_and_minimum(values: list[float], target: float, round_to: int, minimum: int) -> None:
    lowest, _ = landing.reachable(STRUCTURE, "macs", round_to, minimum)
    if target < lowest:
        with pytest.raises(ValueError, match="below what is reachable"):
            landing.choose(STRUCTURE, torch.tensor(values), target, "macs", round_to, minimum)
        return
    left = counts(landing.choose(STRUCTURE, torch.tensor(values), target, "macs", round_to, minimum))
    assert macs(*left) / TOTAL <= target
    for n, size in zip(left, WIDTHS):
        assert n >= min(minimum, size)
        assert n % round_to == 0 or n == size
    more = [macs(*(min(n + round_to * (i == g), WIDTHS[i]) for i, n in enumerate(left))) for g in range(3)]
    closed = [cost / TOTAL for cost, n, size in zip(more, left, WIDTHS) if n < size]
    assert not closed or (max if round_to == 1 else min)(closed) > target


def test_a_block_that_still_fits_opens_again() -> None:
    # By fours, 113.6 of 142 MACs: the lowest scores take 10 units to 8 (122 MACs), the next ones 6 to 4 (96 MACs); with
    # these closed the others fit again (112 MACs).
    scores = torch.cat([torch.tensor([-1.0, -1.0, 1, 1, 1, 1]), torch.tensor([-2.0, -2.0]), torch.ones(8 + 4)])
    keep = landing.choose(STRUCTURE, scores, 0.8, round_to=4)
    assert (counts(keep), macs(4, 10, 4), macs(4, 8, 4), macs(6, 8, 4)) == ([4, 10, 4], 112, 96, 122)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("name", ["digits_cnn", "cifar_mobilenet_v2"])
def test_registered_models_land_within_one_unit(name: str, metric: str) -> None:
    x = torch.randn(1, 1, 8, 8) if name == "digits_cnn" else torch.randn(1, 3, 16, 16)
    structure = nas_gate.analyze(models.build(name), x)
    cost = CostModel(structure)
    scores = torch.randn(structure.units, generator=torch.Generator().manual_seed(0))
    for target in (0.15, 0.5, 0.9):
        keep = landing.choose(structure, scores, target, metric)
        share = float(cost.share(keep, metric))
        dearest = 0.0
        for group in structure.groups:
            inside = keep[group.start : group.stop]
            if not bool(inside.all()):
                opened = keep.clone()
                opened[group.start + int(torch.nonzero(~inside)[0])] = True
                dearest = max(dearest, float(cost.share(opened, metric)) - share)
        assert target - dearest < share <= target


# --- order --------------------------------------------------------------------------------------------------


def test_lowest_scores_close_first_across_groups() -> None:
    """Closing units 7, 2 and 17 in that order: 6 * 9 * 4, 5 * 9 * 4, then 5 * 9 * 3 wide."""
    scores = torch.ones(UNITS)
    scores[7], scores[2], scores[17] = -3.0, -2.0, -1.0
    steps = [((6, 9, 4), {7}), ((5, 9, 4), {7, 2}), ((5, 9, 3), {7, 2, 17})]
    for left, closed in steps:
        keep = landing.choose(STRUCTURE, scores, macs(*left) / TOTAL)
        assert {u for u in range(UNITS) if not keep[u]} == closed


def test_a_target_that_is_met_exactly_closes_no_more() -> None:
    for left in [(6, 10, 3), (6, 5, 4), (2, 10, 4), (3, 3, 3), (1, 1, 1)]:
        scores = torch.cat([(torch.arange(size) < n).float() for size, n in zip(WIDTHS, left)])
        assert counts(landing.choose(STRUCTURE, scores, macs(*left) / TOTAL)) == list(left)


def test_ties_are_settled_alike_every_time() -> None:
    scores = torch.zeros(UNITS)
    first = landing.choose(STRUCTURE, scores, 0.5)
    assert torch.equal(first, landing.choose(STRUCTURE, scores.clone(), 0.5))
    assert macs(*counts(first)) / TOTAL <= 0.5
    for part in first.split(WIDTHS):  # of equal units the first ones stay, as with the gates' minimum
        assert torch.equal(part, part.sort(descending=True).values)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_only_the_order_of_scores_matters(factor: float) -> None:
    scores = torch.randn(UNITS, generator=torch.Generator().manual_seed(4))
    expected = landing.choose(STRUCTURE, scores, 0.4)
    assert torch.equal(landing.choose(STRUCTURE, scores * factor, 0.4), expected)
    assert torch.equal(landing.choose(STRUCTURE, scores.exp(), 0.4), expected)


def test_takes_scores_of_any_floating_type_and_leaves_them() -> None:
    scores = nn.Parameter(torch.linspace(-1, 1, UNITS))
    before = scores.detach().clone()
    expected = landing.choose(STRUCTURE, scores, 0.5)
    assert torch.equal(scores, before)
    assert torch.equal(landing.choose(STRUCTURE, before.double(), 0.5), expected)


def test_lands_from_the_gates_of_a_model() -> None:
    gated = nas_gate.attach(network(), torch.randn(1, 5))
    with torch.no_grad():
        gated.gates.weight.copy_(torch.randn(UNITS, generator=torch.Generator().manual_seed(1)))
    keep = nas_gate.land(gated, 0.5)
    assert torch.equal(keep, landing.choose(STRUCTURE, gated.gates.weight, 0.5))
    assert counts(nas_gate.land(gated, 0.8, minimum={"4": 4}))[2] == 4


# --- minimum and rounding -----------------------------------------------------------------------------------


def test_minimum_by_group_name() -> None:
    scores = torch.cat([torch.full((6,), 1.0), torch.full((10,), 2.0), torch.full((4,), -1.0)])
    assert counts(landing.choose(STRUCTURE, scores, 0.5))[2] == 1
    for minimum in ({"4": 3}, {"4": 3, "0": 2}):
        left = counts(landing.choose(STRUCTURE, scores, 0.5, minimum=minimum))
        assert left[2] == 3
        assert left[0] >= minimum.get("0", 1)
        assert macs(*left) / TOTAL <= 0.5


def test_minimum_above_a_size_keeps_the_group_whole() -> None:
    assert counts(landing.choose(STRUCTURE, torch.zeros(UNITS), 0.7, minimum=5))[2] == 4


def test_round_to_eight() -> None:
    structure = nas_gate.analyze(models.build("digits_cnn"), torch.randn(1, 1, 8, 8))
    cost = CostModel(structure)
    keep = landing.choose(structure, torch.randn(structure.units), 0.5, round_to=8)
    left = [int(keep[g.start : g.stop].sum()) for g in structure.groups]
    assert all(n % 8 == 0 and n > 0 for n in left)
    assert float(cost.share(keep)) <= 0.5
    cheapest = min(
        float(cost.of_counts(torch.tensor([n + 8 * (i == g) for i, n in enumerate(left)]).double()))
        for g, group in enumerate(structure.groups)
        if left[g] < group.size
    )
    assert cheapest / cost.total() > 0.5


def test_a_whole_group_may_be_no_multiple() -> None:
    scores = torch.cat([torch.ones(6), -torch.arange(10.0), torch.ones(4)])
    assert counts(landing.choose(STRUCTURE, scores, 0.9, round_to=4)) == [6, 8, 4]


def test_least_units() -> None:
    assert landing.least_units(STRUCTURE).tolist() == [1, 1, 1]
    assert landing.least_units(STRUCTURE, round_to=4).tolist() == [4, 4, 4]
    assert landing.least_units(STRUCTURE, round_to=8).tolist() == [6, 8, 4]
    assert landing.least_units(STRUCTURE, round_to=4, minimum={"2": 5}).tolist() == [4, 8, 4]


def test_reachable_range_by_hand() -> None:
    assert nas_gate.reachable(STRUCTURE) == (macs(1, 1, 1) / TOTAL, 1.0)
    assert nas_gate.reachable(STRUCTURE, minimum=2) == (macs(2, 2, 2) / TOTAL, 1.0)
    assert nas_gate.reachable(STRUCTURE, round_to=4) == (macs(4, 4, 4) / TOTAL, 1.0)
    params = (5 + 1) + (1 + 1) + (1 + 1) + (1 * 3 + 3)
    dense = sum(p.numel() for p in network().parameters())
    assert nas_gate.reachable(STRUCTURE, "params") == (params / dense, 1.0)


# --- refusals -----------------------------------------------------------------------------------------------


def test_an_unreachable_target_names_the_range() -> None:
    lowest = macs(1, 1, 1) / TOTAL
    with pytest.raises(ValueError, match=rf"target=0.05 .* between {lowest:.4f} and 1 "):
        landing.choose(STRUCTURE, torch.zeros(UNITS), 0.05)
    with pytest.raises(ValueError, match=r"share of params"):
        landing.choose(STRUCTURE, torch.zeros(UNITS), 0.01, metric="params")
    with pytest.raises(ValueError, match=r"round_to=8"):
        landing.choose(STRUCTURE, torch.zeros(UNITS), 0.5, round_to=8)


def test_a_target_of_1_keeps_all() -> None:
    assert bool(landing.choose(STRUCTURE, torch.randn(UNITS), 1.0).all())


@pytest.mark.parametrize("target", [0, 1.5, -0.5, math.nan, math.inf])
def test_targets_outside_0_and_1(target: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got target={target}")):
        landing.choose(STRUCTURE, torch.zeros(UNITS), target)


def test_scores_that_are_not_finite() -> None:
    scores = torch.zeros(UNITS)
    scores[3], scores[5] = math.nan, math.inf
    with pytest.raises(ValueError, match=rf"2 of {UNITS} are not"):
        landing.choose(STRUCTURE, scores, 0.5)


def test_scores_of_another_shape() -> None:
    with pytest.raises(ValueError, match=rf"shape \({UNITS},\), but have \(3,\)"):
        landing.choose(STRUCTURE, torch.zeros(3), 0.5)


def test_unknown_group_names() -> None:
    for call in (landing.reachable, lambda s, **k: landing.choose(s, torch.zeros(UNITS), 0.5, **k)):
        with pytest.raises(ValueError, match=r"there is no 'stem'; groups: \['0', '2', '4'\]"):
            call(STRUCTURE, minimum={"stem": 2})


@pytest.mark.parametrize("options", [{"round_to": 0}, {"minimum": 0}, {"minimum": {"0": 0}}, {"round_to": -8}])
def test_round_to_and_minimum_below_one(options: dict) -> None:
    with pytest.raises(ValueError, match=r"`round_to >= 1` and `minimum >= 1` must hold"):
        landing.choose(STRUCTURE, torch.zeros(UNITS), 0.5, **options)


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="but is 'latency'"):
        landing.choose(STRUCTURE, torch.zeros(UNITS), 0.5, metric="latency")


def test_prices_by_counts_what_the_cost_model_prices_by_units() -> None:
    cost = CostModel(STRUCTURE)
    keep = landing.choose(STRUCTURE, torch.randn(UNITS), 0.5)
    assert float(cost(keep)) == macs(*counts(keep)) == float(cost.of_counts(torch.tensor(counts(keep)).double()))
    assert np.array_equal(STRUCTURE.open_units(keep), counts(keep))
