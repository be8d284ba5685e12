"""What a network runs and how it is measured: sizes against networks that were cut, files; no test looks at times."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nas_gate
from nas_gate import measuring, models
from nas_gate.latency_table import Grid, LatencyTable, Operation
from nas_gate.operations import Ran, Sized, architectures, read, run
from nas_gate.removal import cut_model, cut_of
from nas_gate.structure import Structure


class Branches(nn.Module):
    """A residual addition, a concatenation, a depthwise and a grouped convolution, a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.beside = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(14, 4, 1, groups=2)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = torch.cat([x + self.deep(x), self.beside(x)], 1)
        return self.head(nn.functional.avg_pool2d(self.grouped(x), 2).flatten(1))


def silent(what: str, done: int, total: int) -> None:
    """No progress is told."""


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()


def attached() -> nas_gate.GatedModel:
    return nas_gate.attach(small(), torch.randn(1, 1, 8, 8))


def opened(structure: Structure, seed: int) -> torch.Tensor:
    keep = torch.rand(structure.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    for group in structure.groups:
        keep[group.start] = True
    return keep


# --- operations ---------------------------------------------------------------------------------------------


def test_widths_of_a_chain_by_hand() -> None:
    gated = attached()
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    (a, b) = gated.structure.groups
    assert [(s.ran.key[1], [w.groups for w in s.widths]) for s in sized] == [
        ("aten.convolution.default", [((0, 1),)]),
        ("aten.relu.default", [((0, 1),)]),
        ("aten.convolution.default", [((0, 1),), ((1, 1),)]),
        ("aten.addmm.default", [((1, 1),)]),
    ]
    assert (a.size, b.size) == (4, 4)
    middle = sized[2]
    assert (middle.lowest, middle.highest, middle.needs) == ((1, 1), (4, 4), ())
    output = middle.call((3, 2))()
    assert output.shape == (1, 2, 4, 4)
    assert sized[3].call((2,))().shape == (1, 2)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Branches(), (2, 3, 4, 4)),
        (models.build("resnet20", width=0.25), (1, 3, 16, 16)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    ],
    ids=["branches", "resnet20", "transformer"],
)
def test_sizes_are_those_of_networks_that_were_cut(model: nn.Module, shape: tuple[int, ...]) -> None:
    gated = nas_gate.attach(model.eval(), torch.randn(shape))
    structure = gated.structure
    sized = read(gated.model, structure, *gated.example_inputs, silent)
    for seed in (1, 2):
        keep = opened(structure, seed)
        counts = structure.open_units(keep)
        cut = run(cut_model(gated.model, cut_of(structure, keep)), *gated.example_inputs)
        assert [r.key for r in cut] == [s.ran.key for s in sized]
        for ran, each in zip(cut, sized):
            widths = [sum(n * counts[g] for g, n in w.groups) for w in each.widths]
            numbers = [o if w < 0 else o + f * widths[w] for o, f, w in zip(each.offset, each.factor, each.width)]
            assert numbers == ran.numbers().tolist()


def test_operations_run_alone_at_every_grid_point() -> None:
    gated = nas_gate.attach(Branches().eval(), torch.randn(2, 3, 4, 4))
    for each in read(gated.model, gated.structure, *gated.example_inputs, silent):
        assert each.points()[1]
        for widths in each.points()[1]:
            assert isinstance(torch.utils._pytree.tree_leaves(each.call(widths)())[0], torch.Tensor)


def test_equal_operations_have_equal_names_and_others_do_not() -> None:
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())), nn.Conv2d(4, 5, 1))
    gated = nas_gate.attach(net.eval(), torch.randn(1, 4, 3, 3))
    names = [s.name() for s in read(gated.model, gated.structure, *gated.example_inputs, silent)]
    assert len(names) == 7
    assert names[1] == names[3] == names[5]
    assert names[2] == names[4]
    assert len(set(names)) == 4


def test_many_widths_are_measured_together() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(4))
            self.last = nn.Conv2d(16, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat([layer(x) for layer in self.layers], 1))

    gated = nas_gate.attach(Wide().eval(), torch.randn(1, 3, 2, 2))
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    cat: Sized = next(s for s in sized if "cat" in s.ran.key[1])
    assert len(cat.widths) == len(gated.structure.groups) == 4
    points, widths = cat.points()
    assert points == ((4, 8, 12, 16),) or points[0][0] == 4
    assert points[0][-1] == 16
    assert [sum(w) for w in widths] == list(points[0])
    assert dict(cat.axes()[0].groups) == {0: 1, 1: 1, 2: 1, 3: 1}


# --- operations of choices ----------------------------------------------------------------------------------


def operators(c: int) -> nas_gate.Choice:
    """A convolution; two, with a width of their own; one and a choice; nothing."""
    inner = nas_gate.Choice([nn.Conv2d(c, c, 1), nn.Identity(), nn.Sequential(nn.Tanh(), nn.Conv2d(c, c, 1))])
    return nas_gate.Choice(
        [
            nn.Conv2d(c, c, 3, padding=1),
            nn.Sequential(nn.Conv2d(c, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, c, 1)),
            nn.Sequential(nn.Conv2d(c, c, 1), inner),
            nn.Identity(),
        ]
    )


def choosing_network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 1), operators(4), nn.ReLU(), operators(4), nn.Conv2d(4, 4, 1), nn.AvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).eval()


def random_choice(structure: Structure, seed: int) -> torch.Tensor:
    keep, generator = opened(structure, seed), torch.Generator().manual_seed(seed)
    for choice in structure.choices:
        keep[list(choice.units)] = False
        keep[choice.units[int(torch.randint(len(choice.units), (), generator=generator))]] = True
    return keep


def size_table(gated: nas_gate.GatedModel) -> LatencyTable:
    """A table that nobody measured: an operation takes as many milliseconds as its arguments' sizes add up to."""

    def total(ran: list[Ran]) -> float:
        return float(sum(r.numbers().sum() for r in ran))

    def taken(each: Sized, widths: tuple[int, ...]) -> float:
        return float(sum(o + (0 if w < 0 else f * widths[w]) for o, f, w in zip(each.offset, each.factor, each.width)))

    structure = gated.structure
    sized = read(gated.model, structure, *gated.example_inputs, silent)
    thinnest = structure.dense()
    for group in structure.groups:
        thinnest[group.start + 1 : group.stop] = False
    whole = [
        total(run(cut_model(gated.model, cut_of(structure, keep)), *gated.example_inputs))
        for keep in (structure.dense(), thinnest)
    ]
    return LatencyTable(
        {},
        {g.name: g.size for g in structure.groups},
        tuple(Operation(s.name(), s.axes(), s.needs) for s in sized),
        {s.name(): Grid(s.points()[0], tuple(taken(s, w) for w in s.points()[1])) for s in sized},
        whole[0],
        whole[1],
        tuple(i for i, n in enumerate(structure.open_units(structure.dense())) if n == 0),
    )


def test_few_networks_have_every_candidate() -> None:
    structure = nas_gate.analyze(choosing_network(), torch.randn(1, 3, 4, 4))
    chosen = [
        [int(keep[list(choice.units)].nonzero()) for choice in structure.choices] for keep in architectures(structure)
    ]
    assert [c.path for c in structure.choices] == ["1", "1.candidates.2.1", "3", "3.candidates.2.1"]
    assert chosen == [[0, 0, 0, 0], [1, 0, 1, 0], [2, 0, 2, 0], [2, 1, 2, 1], [2, 2, 2, 2], [3, 0, 3, 0]]
    plain = nas_gate.analyze(small(), torch.randn(1, 1, 8, 8))
    assert [keep.tolist() for keep in architectures(plain)] == [[True] * plain.units]


def test_operations_need_the_candidates_that_they_are_inside_of() -> None:
    gated = nas_gate.attach(choosing_network(), torch.randn(1, 3, 4, 4))
    names = [g.name for g in gated.structure.groups]
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    of_first = {
        s.ran.key[0]: [names[g] for g in s.needs] for s in sized if s.ran.key[0].startswith("1.") or not s.needs
    }
    assert of_first == {
        "0": [],
        "1.candidates.0": ["1:0"],
        **{f"1.candidates.1.{i}": ["1:1"] for i in range(4)},
        "1.candidates.2.0": ["1:2"],
        "1.candidates.2.1.candidates.0": ["1:2", "1.candidates.2.1:0"],
        **{f"1.candidates.2.1.candidates.2.{i}": ["1:2", "1.candidates.2.1:2"] for i in range(2)},
        **{name: [] for name in ("2", "4", "5", "7")},
    }


def test_the_latency_is_that_of_the_removed_networks_own_operations() -> None:
    gated = nas_gate.attach(choosing_network(), torch.randn(1, 3, 4, 4))
    gated.add_latency(size_table(gated))
    for seed in range(12):
        keep = random_choice(gated.structure, seed)
        removed = nas_gate.remove_with_proof(gated, keep)
        own = sum(int(ran.numbers().sum()) for ran in run(removed.model, *gated.example_inputs))
        assert float(gated.cost(keep, "latency_ms")) == pytest.approx(own, rel=1e-12)


def test_landing_under_a_latency_chooses_candidates_that_fit() -> None:
    """All widths are worth more than any candidate: the best candidate that fits is the one, else the next best."""
    layers = [nn.Conv2d(3, 4, 1), operators(4), nn.Flatten(), nn.Linear(64, 2)]
    gated = nas_gate.attach(nn.Sequential(*layers).eval(), torch.randn(1, 3, 4, 4))
    structure = gated.structure
    gated.add_latency(size_table(gated))
    outer, inner = structure.choices
    latency = []
    for unit in outer.units:
        keep = structure.dense()
        keep[list(outer.units)] = False
        keep[unit] = True
        latency.append(float(gated.cost(keep, "latency_ms")))
    assert latency[3] < latency[0] < latency[2] < latency[1]
    with torch.no_grad():
        gated.gates.weight.fill_(10.0)
        gated.gates.weight[list(inner.units)] = torch.tensor([1.0, 0.0, 0.0])
        gated.gates.weight[list(outer.units)] = torch.tensor([2.0, 4.0, 1.0, 3.0])
    for target, expected in ((latency[1], 1), (latency[1] - 0.5, 3), (latency[3], 3)):
        keep = nas_gate.land(gated, target, metric="latency_ms")
        assert keep[list(outer.units)].nonzero().tolist() == [[expected]]
        assert float(gated.cost(keep, "latency_ms")) <= target
        assert keep[: outer.units[0]].all()
    with torch.no_grad():
        gated.gates.weight[outer.units[3]] = 0.0  # now the first is the next best
    keep = nas_gate.land(gated, latency[1] - 0.5, metric="latency_ms")
    assert keep[list(outer.units)].nonzero().tolist() == [[0]]
    limited = nas_gate.land(gated, 0.999, limits={"latency_ms": latency[0] - 0.5})
    assert int(limited[list(outer.units)].sum()) == 1
    assert float(gated.cost(limited, "latency_ms")) <= latency[0] - 0.5
    with pytest.raises(ValueError, match=r"is below what is reachable: latency_ms can lie between"):
        nas_gate.land(gated, 1.0, metric="latency_ms")


def test_what_depends_on_a_choice_from_outside_is_refused() -> None:
    """Flattening copies where the turned image comes in, and does not where a convolution's output does."""

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(2, 3)

    choice = nas_gate.Choice([nn.Conv2d(4, 4, 1), Turned()])
    model = nn.Sequential(nn.Conv2d(3, 4, 1), choice, nn.Flatten(), nn.Linear(64, 2)).eval()
    gated = nas_gate.attach(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"but aten.clone.default in 2 depends on the candidates of a Choice"):
        nas_gate.measure_latency(gated)


def test_a_module_shared_by_candidates_is_of_each() -> None:
    act = nn.ReLU()
    blocks = [nas_gate.Choice([nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), act) for k in (3, 1)]) for _ in "ab"]
    gated = nas_gate.attach(
        nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Conv2d(4, 2, 1)).eval(), torch.randn(1, 3, 4, 4)
    )
    names = [g.name for g in gated.structure.groups]
    sized = read(gated.model, gated.structure, *gated.example_inputs, silent)
    assert sorted(names[g] for s in sized if "relu" in s.ran.key[1] for g in s.needs) == ["1:0", "1:1", "2:0", "2:1"]


def test_tables_of_choices_are_measured_and_kept(tmp_path: Path) -> None:
    def attached_choices(activation: nn.Module) -> nas_gate.GatedModel:
        choice = nas_gate.Choice([nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 1), activation)])
        layers = [nn.Conv2d(3, 4, 1), choice, nn.Conv2d(4, 2, 1)]
        return nas_gate.attach(nn.Sequential(*layers).eval(), torch.randn(1, 3, 4, 4))

    gated, file = attached_choices(nn.ReLU()), tmp_path / "latency.json"
    table = nas_gate.measure_latency(gated, file)
    assert nas_gate.measure_latency(gated, file) == table
    assert [list(table.groups)[i] for i in table.absent] == ["1:1"]
    gated.add_latency(table)
    assert gated.cost.total("latency_ms") == pytest.approx(table.dense_ms)
    with pytest.raises(ValueError, match="but differs in network"):  # though the first candidates are the same
        nas_gate.measure_latency(attached_choices(nn.GELU()), file)


# --- measuring ----------------------------------------------------------------------------------------------


def test_measured_once_and_kept(tmp_path: Path) -> None:
    gated, file = attached(), tmp_path / "tables" / "latency.json"
    before = copy.deepcopy(gated.state_dict())
    threads = torch.get_num_threads()
    table = nas_gate.measure_latency(gated, file, threads=1)
    assert table.dense_ms > 0
    assert all(value > 0 for grid in table.grids.values() for value in grid.ms)
    assert [p.name for p in file.parent.iterdir()] == ["latency.json"]
    told: list[str] = []
    assert nas_gate.measure_latency(gated, file, progress=lambda *what: told.append(str(what))) == table
    assert told == []
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())
    gated.add_latency(table)
    assert gated.cost.total("latency_ms") == pytest.approx(table.dense_ms)
    copied = copy.deepcopy(gated)
    assert copied.cost.total("latency_ms") == gated.cost.total("latency_ms")


def test_whole_networks_are_measured_in_rounds_among_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest round of each counts."""
    measured: list[str] = []
    rounds = {"dense": iter([9.0, 8.0, 5.0, 9.0, 7.0, 6.0, 9.0]), "thinnest": iter([3.0, 2.0, 4.0, 4.0, 2.5, 3.0, 3.0])}

    def fastest(call: Any) -> float:
        if not isinstance(network := call.func, nn.Module):
            measured.append("operation")
            return 1.0
        assert not network.training
        name = "dense" if network[0].out_channels == 4 else "thinnest"
        measured.append(name)
        return next(rounds[name])

    monkeypatch.setattr(measuring, "_fastest", fastest)
    gated = attached()
    table = nas_gate.measure_latency(gated)
    assert (table.dense_ms, table.thinnest_ms) == (5.0, 2.0)
    assert {ms for grid in table.grids.values() for ms in grid.ms} == {1.0}
    where = [name for name, before in zip(measured, [None, *measured]) if name != before or name != "operation"]
    pair = ["dense", "thinnest"]
    assert where == [
        *pair,
        *pair,
        "operation",
        *pair,
        "operation",
        *pair,
        *pair,
        "operation",
        *pair,
        "operation",
        *pair,
    ]


def test_nothing_is_lost_by_an_interrupt(tmp_path: Path) -> None:
    gated, file = attached(), tmp_path / "latency.json"

    def interrupted(what: str, done: int, total: int) -> None:
        if what == "measuring operations" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nas_gate.measure_latency(gated, file, progress=interrupted)
    measured = json.loads(file.read_text())["unfinished"]
    assert len(measured) == 2
    done: list[int] = []
    table = nas_gate.measure_latency(
        gated, file, progress=lambda what, n, _: done.append(n) if what == "measuring operations" else None
    )
    assert done == [2, 3, 4]
    for name, grid in measured.items():
        assert list(table.grids[name].ms) == grid["ms"]


@pytest.mark.parametrize(
    ("key", "value"), [("machine", "another"), ("torch", "0.1"), ("threads", 7), ("inputs", []), ("network", "0")]
)
def test_a_stale_table_is_refused_with_what_differs(tmp_path: Path, key: str, value: object) -> None:
    gated, file = attached(), tmp_path / "latency.json"
    nas_gate.measure_latency(gated, file)
    content = json.loads(file.read_text())
    content["identity"][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"must belong to this network on this machine, but differs in {key}: "):
        nas_gate.measure_latency(gated, file)


def test_other_networks_batches_and_threads_are_told_apart(tmp_path: Path) -> None:
    gated, file = attached(), tmp_path / "latency.json"
    nas_gate.measure_latency(gated, file)
    other = small()
    other[1] = nn.GELU()  # the same units and costs
    for network, inputs, threads in (
        (nas_gate.attach(other, torch.randn(1, 1, 8, 8)), None, 1),
        (gated, (torch.randn(2, 1, 8, 8),), 1),
        (gated, None, 2),
    ):
        with pytest.raises(ValueError, match="but differs in"):
            nas_gate.measure_latency(network, file, inputs, threads)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"identity": {}, "unfinished": {"a": {}}}'])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "latency.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"latency.json must hold a latency table, but it is damaged"):
        nas_gate.measure_latency(attached(), file)


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`threads >= 1` must hold, but got threads=0"):
        nas_gate.measure_latency(attached(), threads=0)
