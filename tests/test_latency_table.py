"""Latency as a function of open units: by hand, by finite differences and brute force; nothing is timed."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import nas_gate
from nas_gate import landing
from nas_gate.cost import CostModel
from nas_gate.latency_table import Grid, LatencyModel, LatencyTable, Operation, from_json, isotone, lower_hull, to_json
from nas_gate.operations import POINTS, read
from nas_gate.structure import Axis

X, Y = Axis(0, ((0, 1),)), Axis(2, ((1, 3),))  # widths x and 2 + 3 y

TABLE = LatencyTable(
    identity={},
    groups={"x": 8, "y": 4},
    operations=(Operation("both", (X, Y)), Operation("one", (X,), needs=(1,)), Operation("none", ())),
    grids={
        "both": Grid(((1, 4, 8), (5, 14)), (1.0, 2.0, 3.0, 6.0, 5.0, 9.0)),
        "one": Grid(((1, 8),), (0.5, 4.0)),
        "none": Grid((), (0.25,)),
    },
    dense_ms=9.0 + 4.0 + 0.25,
    thinnest_ms=1.0 + 0.5 + 0.25,
)


def ms(model: nn.Module, *counts: float) -> float:
    return float(model(torch.tensor(counts, dtype=torch.float64)))


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)
    ).eval()


def silent(what: str, done: int, total: int) -> None:
    """No progress is told."""


def synthetic(gated: nas_gate.GatedModel, power: float = 0.7) -> LatencyTable:
    """A table that nobody measured: every operation takes `(1 + the product of 1 + its widths) ** power`."""
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    grids, dense, thinnest = {}, 0.0, 0.0
    for each in sized:
        points, widths = each.points()
        values = [taken(w, power) for w in widths]
        grids[each.name()] = Grid(points, tuple(values))
        dense, thinnest = dense + values[-1], thinnest + values[0]
    operations = tuple(Operation(s.name(), s.axes(), s.needs) for s in sized)
    sizes = {g.name: g.size for g in gated.structure.groups}
    return LatencyTable({}, sizes, operations, grids, dense, thinnest)


def taken(widths: tuple[int, ...], power: float) -> float:
    return (1 + math.prod(1 + w for w in widths)) ** power


@pytest.fixture(scope="module")
def gated() -> nas_gate.GatedModel:
    gated = nas_gate.attach(small(), torch.randn(1, 3, 4, 4))
    gated.add_latency(synthetic(gated))
    return gated


# --- interpolation ------------------------------------------------------------------------------------------


def test_exact_at_grid_points() -> None:
    model = LatencyModel(TABLE)
    assert (model.scale, model.overhead) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    for (i, x), (j, y) in itertools.product(enumerate((1, 4, 8)), enumerate((1, 4))):
        expected = TABLE.grids["both"].ms[2 * i + j] + 0.5 + 0.5 * (x - 1) + 0.25
        assert ms(model, x, y) == pytest.approx(expected, rel=1e-12)


def test_bilinear_between_grid_points_by_hand() -> None:
    """x = 2.5 is half of the way from 1 to 4; y = 2 makes a width of 8, a third of the way from 5 to 14."""
    low, high = (1 + 3) / 2, (2 + 6) / 2
    assert ms(LatencyModel(TABLE), 2.5, 2) == pytest.approx(low + (high - low) / 3 + 0.5 + 0.75 + 0.25, rel=1e-12)


def test_below_the_grid_it_is_that_of_the_thinnest() -> None:
    assert ms(LatencyModel(TABLE), 0, 1) == ms(LatencyModel(TABLE), 1, 1)


def test_an_operation_is_gone_with_the_units_that_it_needs() -> None:
    model = LatencyModel(TABLE)
    assert ms(model, 8, 0) == pytest.approx(5.0 + 0.25)
    assert ms(model, 8, 0.5) == pytest.approx(5.0 + 0.25 + 4.0 / 2)


def test_whole_networks_calibrate_the_sum() -> None:
    model = LatencyModel(replace(TABLE, dense_ms=30.0, thinnest_ms=7.0))
    assert ms(model, 8, 4) == pytest.approx(30.0)
    assert ms(model, 1, 1) == pytest.approx(7.0)
    assert model.scale == pytest.approx(23.0 / (13.25 - 1.75))
    assert model.overhead == pytest.approx((30.0 - model.scale * 13.25) / 3)


def test_overhead_is_never_negative() -> None:
    model = LatencyModel(replace(TABLE, dense_ms=26.5, thinnest_ms=1.0))
    assert (model.scale, model.overhead) == (pytest.approx(2), pytest.approx(0))
    assert ms(model, 8, 4) == pytest.approx(26.5)


def test_a_thinnest_network_that_is_no_faster_leaves_nothing_to_choose() -> None:
    model = LatencyModel(replace(TABLE, dense_ms=5.0, thinnest_ms=6.0))
    assert model.scale == 0
    assert ms(model, 8, 4) == ms(model, 1, 1) == pytest.approx(5.0)


def test_a_network_at_grid_points(gated: nas_gate.GatedModel) -> None:
    """Operations are those of the network: their synthetic figures add up to the prediction."""
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    first, second = (g.size for g in gated.structure.groups)
    assert (first, second) == (8, 8)
    for counts in itertools.product((1, 2, 4, 6, 8), repeat=2):
        widths = [[sum(n * counts[g] for g, n in axis.groups) for axis in each.widths] for each in sized]
        expected = sum(taken(tuple(w), 0.7) for w in widths)
        assert float(gated.cost.of_counts(torch.tensor(counts).double(), "latency_ms")) == pytest.approx(expected)


def test_gradient_equals_finite_differences_where_latency_is_convex() -> None:
    gated = nas_gate.attach(small(), torch.randn(1, 3, 4, 4))
    gated.add_latency(synthetic(gated, power=1.3))
    random = torch.Generator().manual_seed(0)
    keep = torch.rand(gated.structure.units, dtype=torch.float64, generator=random).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: gated.cost(k, "latency_ms"), keep)
    assert torch.autograd.gradcheck(lambda k: gated.cost.share(k, "latency_ms"), keep)
    gated.cost(keep, "latency_ms").backward()
    assert keep.grad is not None
    assert (keep.grad > 0).all()


STEPS = LatencyTable(
    identity={},
    groups={"x": 32},
    operations=(Operation("steps", (X,)),),
    grids={"steps": Grid(((1, 8, 16, 24, 32),), (1.0, 8.0, 8.0, 16.0, 16.0))},
    dense_ms=16.0,
    thinnest_ms=1.0,
)


@pytest.mark.parametrize(
    ("width", "expected", "spared"),
    [
        (32, 16.0, 0.5),  # 24 spares nothing, 16 half
        (28, 16.0, 0.5),
        (20, 12.0, 0.5),
        (12, 8.0, 7 / 15),  # from 1 to 16: what 8 has lies above
        (4, 4.0, 7 / 15),
    ],
)
def test_the_gradient_sees_over_steps(width: float, expected: float, spared: float) -> None:
    """The latency itself stays what was measured."""
    count = torch.tensor([float(width)], dtype=torch.float64, requires_grad=True)
    latency = LatencyModel(STEPS)(count)
    latency.backward()
    assert latency.item() == pytest.approx(expected)
    assert count.grad is not None
    assert count.grad.item() == pytest.approx(spared)


@settings(deadline=None)
@given(arrays(float, (4, 5), elements=st.floats(0, 100)))
def test_the_hull_is_convex_below_and_rises(values: np.ndarray) -> None:
    points = ((1, 3, 4, 9), (1, 2, 8, 9, 16))
    values = isotone(values)
    hull = lower_hull(values, points)
    assert (hull <= values + 1e-9).all()
    assert (np.diff(hull, axis=0) >= -1e-9).all()
    assert (np.diff(hull, axis=1) >= -1e-9).all()
    assert (np.diff(np.diff(hull, axis=1) / np.diff(points[1]), axis=1) >= -1e-9).all()


@settings(deadline=None)
@given(arrays(float, 5, elements=st.floats(0, 100)))
def test_the_hull_is_the_second_conjugate(values: np.ndarray) -> None:
    """Legendre and Fenchel: the highest of the lines below, whose slopes are those between two points."""
    x = np.array([1, 2, 8, 9, 16])
    slopes = [(values[j] - values[i]) / (x[j] - x[i]) for i, j in itertools.combinations(range(5), 2)]
    highest = np.max([[min(values + slope * (at - x)) for at in x] for slope in slopes], axis=0)
    assert lower_hull(values, (tuple(x),)) == pytest.approx(highest, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(arrays(float, (3, 4), elements=st.floats(0, 10)))
def test_isotone_rises_and_leaves_what_rises(values: np.ndarray) -> None:
    result = isotone(values)
    for axis in (0, 1):
        assert (np.diff(result, axis=axis) >= 0).all()
    assert np.array_equal(isotone(result), result)
    assert values.min() <= result.min() <= result.max() <= values.max()


@settings(deadline=None, max_examples=40)
@given(arrays(float, 6, elements=st.floats(0.01, 10)), st.data())
def test_more_units_are_never_faster(values: np.ndarray, data: st.DataObject) -> None:
    grids = {**TABLE.grids, "both": Grid(TABLE.grids["both"].points, tuple(values.tolist()))}
    model = LatencyModel(replace(TABLE, grids=grids))
    x, y = data.draw(st.floats(0, 7)), data.draw(st.floats(0, 3))
    here = ms(model, x, y)
    assert ms(model, x + 1, y) >= here - 1e-9
    assert ms(model, x, y + 1) >= here - 1e-9


# --- choices ------------------------------------------------------------------------------------------------

# a stem of width w, then one of: nothing, one operation, or one and a choice between one and none
CHOICES = LatencyTable(
    identity={},
    groups={"w": 4, "c:0": 1, "c:1": 1, "c:2": 1, "c.2:0": 1, "c.2:1": 1},
    operations=(
        Operation("stem", (Axis(0, ((0, 1),)),)),
        Operation("small", (Axis(0, ((0, 1),)),), needs=(2,)),
        Operation("large", (), needs=(3,)),
        Operation("more", (), needs=(3, 4)),
    ),
    grids={
        "stem": Grid(((1, 4),), (1.0, 4.0)),
        "small": Grid(((1, 4),), (2.0, 8.0)),
        "large": Grid((), (16.0,)),
        "more": Grid((), (32.0,)),
    },
    dense_ms=4.0,
    thinnest_ms=1.0,
    absent=(2, 3, 5),
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((4, 1, 0, 0, 1, 0), 4.0),
        ((4, 0, 1, 0, 1, 0), 4.0 + 8.0),
        ((2, 0, 1, 0, 0, 1), 2.0 + 4.0),
        ((2, 0, 0, 1, 1, 0), 2.0 + 16.0 + 32.0),
        ((1, 0, 0, 1, 0, 1), 1.0 + 16.0),
    ],
)
def test_operations_of_the_chosen_candidate_add_up(counts: tuple[int, ...], expected: float) -> None:
    model = LatencyModel(CHOICES)
    assert (model.scale, model.overhead) == (1, 0)
    assert ms(model, *counts) == expected


def test_every_candidate_pulls_at_its_gate_by_its_latency() -> None:
    counts = torch.tensor([2.0, 1, 0, 0, 1, 0], dtype=torch.float64, requires_grad=True)
    LatencyModel(CHOICES)(counts).backward()
    assert counts.grad is not None
    assert counts.grad.tolist() == [1.0, 0.0, 2.0 + 2.0, 16.0 + 32.0, 0.0, 0.0]


def test_whole_networks_with_first_candidates_calibrate_choices() -> None:
    """9 - 3 = 2 * (4 - 1), so the stem's 4 alone leave 1 around it; the other operations have as much around them."""
    model = LatencyModel(replace(CHOICES, dense_ms=9.0, thinnest_ms=3.0))
    assert (model.scale, model.overhead) == (2, 1)
    assert ms(model, 4, 0, 0, 1, 1, 0) == 9.0 + 2 * 16.0 + 1 + 2 * 32.0 + 1


def test_without_widths_the_dense_network_alone_calibrates() -> None:
    table = LatencyTable(
        {}, {"c:0": 1, "c:1": 1}, (Operation("a", (), (0,)), Operation("b", (), (1,))),
        {"a": Grid((), (2.0,)), "b": Grid((), (1.0,))}, 3.0, 3.0, (1,),
    )  # fmt: skip
    assert ms(LatencyModel(table), 1, 0) == 3.0
    assert ms(LatencyModel(table), 0, 1) == 1.5


# --- as a metric --------------------------------------------------------------------------------------------


def test_the_metric_needs_a_table() -> None:
    gated = nas_gate.attach(small(), torch.randn(1, 3, 4, 4))
    for call in (
        lambda: gated.cost.total("latency_ms"),
        lambda: nas_gate.penalty(gated, 2.0, metric="latency_ms"),
        lambda: nas_gate.penalty(gated, 0.5, limits={"latency_ms": 2.0}),
        lambda: nas_gate.remove(gated, 2.0, metric="latency_ms"),
        lambda: nas_gate.reachable(gated.structure, "latency_ms"),
    ):
        with pytest.raises(ValueError, match=r"'latency_ms' needs a measured table: .*measure_latency"):
            call()


def test_a_table_of_another_network_is_refused(gated: nas_gate.GatedModel) -> None:
    other = nas_gate.attach(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval(), torch.randn(1, 3, 4, 4)
    )
    assert gated.cost.table is not None
    with pytest.raises(ValueError, match=r"must belong to the network, but its group '0' has 8 units there and 6 here"):
        other.add_latency(gated.cost.table)


def test_groups_in_another_order_are_refused(gated: nas_gate.GatedModel) -> None:
    table = gated.cost.table
    assert table is not None
    turned = replace(table, groups=dict(reversed(list(table.groups.items()))))
    with pytest.raises(ValueError, match="its groups stand in another order"):
        CostModel(gated.structure, turned)


def test_targets_are_milliseconds(gated: nas_gate.GatedModel) -> None:
    dense = gated.cost.total("latency_ms")
    lowest, highest = nas_gate.reachable(gated.structure, "latency_ms", latency=gated.cost.table)
    assert highest == dense
    assert lowest == pytest.approx(gated.cost.table.thinnest_ms)
    middle = (lowest + dense) / 2
    keep = nas_gate.land(gated, middle, metric="latency_ms")
    predicted = float(gated.cost(keep, "latency_ms"))
    assert lowest < predicted <= middle
    removed = nas_gate.remove(gated, middle, metric="latency_ms")
    assert sum(p.numel() for p in removed.parameters()) == float(gated.cost(keep, "params"))
    loss = nas_gate.penalty(gated, middle, weight=3.0, metric="latency_ms").detach()
    assert float(loss) == pytest.approx(3 * (1 - middle / dense) ** 2, rel=1e-5)
    with pytest.raises(ValueError, match=rf"target=0.001 .*: latency_ms can lie between {lowest:.4f} and {dense:.4g} "):
        nas_gate.land(gated, 0.001, metric="latency_ms")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency": 2.0}, "one of macs, params, latency_ms, but is 'latency'"),
        ({"latency_ms": 0.0}, r"`limits.latency_ms > 0` must hold for latency_ms, but got limits.latency_ms=0.0"),
        ({"latency_ms": -1.0}, r"`limits.latency_ms > 0`"),
        ({"latency_ms": math.nan}, r"`limits.latency_ms > 0`"),
        ({"params": 1.5}, r"`0 < limits.params <= 1` must hold .* got limits.params=1.5"),
        ({"params": 0.0}, r"`0 < limits.params <= 1` must hold"),
        ({"macs": 0.5}, r"other metrics than the target, but both are of 'macs'"),
    ],
)
def test_limits_that_cannot_be_wanted(gated: nas_gate.GatedModel, limits: dict, message: str) -> None:
    for call in (
        nas_gate.penalty,
        nas_gate.land,
        nas_gate.remove,
        lambda _, t, limits: nas_gate.Lagrangian(t, limits=limits),
    ):
        with pytest.raises(ValueError, match=message):
            call(gated, 0.5, limits=limits)


def test_limits_out_of_reach(gated: nas_gate.GatedModel) -> None:
    with pytest.raises(ValueError, match=r"limits.params=0.01 is below what is reachable: the share of params can"):
        nas_gate.land(gated, 0.5, limits={"params": 0.01})
    with pytest.raises(ValueError, match=r"limits.latency_ms=0.5 is below what is reachable: latency_ms can"):
        nas_gate.land(gated, 0.5, limits={"latency_ms": 0.5})


@settings(deadline=None, max_examples=60)
@given(
    st.permutations(range(16)),
    *(st.floats(0.3, 0.95) for _ in range(3)),
    st.sampled_from([1, 4]),
)
def test_landing_meets_all_budgets_like_brute_force(
    values: list[int], macs: float, params: float, latency: float, round_to: int
) -> None:
    """Closing one unit after the other by score, the first keep that meets all three is the one.

    With blocks, those that still fit open again, that of the highest score first.
    """
    gated = LANDED
    structure, cost, scores = gated.structure, gated.cost, torch.tensor(values).float()
    limits = {"params": params, "latency_ms": latency * cost.total("latency_ms")}
    wanted = {"macs": macs, "params": params, "latency_ms": latency}

    def brute(closed: int) -> torch.Tensor:
        open_ = set(torch.argsort(scores)[closed:].tolist())
        keep = torch.zeros(16, dtype=torch.bool)
        for group in structure.groups:
            mine = sorted(range(group.start, group.stop), key=lambda u: -values[u])
            left = len(open_ & set(mine))
            keep[mine[: max(round_to, -(-left // round_to) * round_to)]] = True
        return keep

    def meets(keep: torch.Tensor) -> bool:
        return all(float(cost.share(keep, m)) <= w * (1 + 1e-12) for m, w in wanted.items())

    def filled(keep: torch.Tensor) -> torch.Tensor:
        while round_to > 1:
            more = []
            for group in structure.groups:
                closed = [u for u in range(group.start, group.stop) if not keep[u]]
                block = sorted(closed, key=lambda u: -values[u])[:round_to]
                opened = keep.clone()
                opened[block] = True
                if block and meets(opened):
                    more.append((values[block[0]], opened))
            if not more:
                break
            keep = max(more, key=lambda each: each[0])[1]
        return keep

    expected = next((k for k in map(brute, range(17)) if meets(k)), None)
    if expected is None:
        with pytest.raises(ValueError, match="below what is reachable"):
            landing.choose(structure, scores, macs, "macs", round_to, limits=limits, latency=cost.table)
    else:
        keep = landing.choose(structure, scores, macs, "macs", round_to, limits=limits, latency=cost.table)
        assert torch.equal(keep, filled(expected))


def _landed() -> nas_gate.GatedModel:
    gated = nas_gate.attach(small(), torch.randn(1, 3, 4, 4))
    gated.add_latency(synthetic(gated))
    return gated


LANDED = _landed()


# --- in the loss --------------------------------------------------------------------------------------------


def set_half(gated: nas_gate.GatedModel) -> None:
    with torch.no_grad():
        gated.gates.weight.copy_(torch.tensor([1.0, -1.0] * 8))


def test_only_what_exceeds_a_limit_counts() -> None:
    gated = _landed()
    set_half(gated)
    with torch.no_grad():
        shares = {m: float(gated.cost_share(m)) for m in ("macs", "params", "latency_ms")}
    latency = (shares["latency_ms"] - 0.1) * gated.cost.total("latency_ms")
    for power in (1, 2):
        bare = nas_gate.penalty(gated, 0.9, weight=2.0, power=power)
        assert float(bare.detach()) == pytest.approx(2 * (0.9 - shares["macs"]) ** power, rel=1e-5)
        above = nas_gate.penalty(gated, 0.9, 2.0, power, limits={"latency_ms": latency, "params": 0.99})
        assert float((above - bare).detach()) == pytest.approx(2 * 0.1**power, rel=1e-4)
    gated.gates.weight.grad = None
    above.backward()
    assert (gated.gates.weight.grad != 0).any()


def test_lagrangian_with_limits_by_hand() -> None:
    gated = _landed()
    set_half(gated)
    share = float(gated.cost_share("params").detach())
    budget = nas_gate.Lagrangian(target=0.9, rate=0.2, limits={"params": share - 0.1, "latency_ms": 1e6})
    gap = float(gated.cost_share("macs").detach()) - 0.9
    first = 0.1 * gap**2 + (0.2 * 0.1) ** 2 / (2 * 0.2)
    assert float(budget(gated).detach()) == pytest.approx(first, rel=1e-5)
    budget.update(gated)
    assert budget.multipliers == {"params": pytest.approx(0.02), "latency_ms": 0.0}
    second = max(0.0, 0.2 * gap) * gap + 0.1 * gap**2 + ((0.02 + 0.02) ** 2 - 0.02**2) / (2 * 0.2)
    assert float(budget(gated).detach()) == pytest.approx(second, rel=1e-5)
    other = nas_gate.Lagrangian(0.5, rate=0.2)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert float(other(gated).detach()) == float(budget(gated).detach())


# --- on disk ------------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    assert from_json(to_json(TABLE)) == TABLE
    table = LANDED.cost.table
    assert table is not None
    assert from_json(to_json(table)) == table


def damage(**change: object) -> str:
    return json.dumps({**json.loads(to_json(TABLE)), **change})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        to_json(TABLE)[:-30],
        damage(schema=0),
        damage(groups=None),
        damage(grids={}),
        damage(grids={**json.loads(to_json(TABLE))["grids"], "one": {"points": [[1, 8]], "ms": [1.0]}}),
        damage(grids={**json.loads(to_json(TABLE))["grids"], "one": {"points": [], "ms": [1.0]}}),
        damage(dense_ms="fast"),
    ],
)
def test_damaged_text_is_a_clear_error(text: str) -> None:
    with pytest.raises(ValueError, match="a latency table must be as nas_gate"):
        from_json(text)


def test_points_are_few_and_hold_both_ends(gated: nas_gate.GatedModel) -> None:
    for each in read(gated.model, gated.structure, *gated.example_inputs, silent):
        points, widths = each.points()
        assert all(len(p) <= POINTS for p in points)
        assert widths[0] == each.lowest
        assert widths[-1] == each.highest


def test_the_cost_model_takes_a_table_by_itself() -> None:
    table = LANDED.cost.table
    cost = CostModel(LANDED.structure, table)
    assert cost.total("latency_ms") == LANDED.cost.total("latency_ms")
    assert float(cost.share(torch.ones(16), "latency_ms")) == pytest.approx(1)
