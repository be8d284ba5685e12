"""Choices: one candidate open at every step, gradient to all, the chosen one alone after removal."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nas_gate
from nas_gate import Choice, baselines, candidate, cli, landing, measuring, models
from nas_gate.cli import composed, settings_of

PLACES = 16  # images of 4x4


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv(i: int, o: int, k: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False)


def operators(c: int = 4) -> Choice:
    """9, 25, 1 and 0 MACs for every place and pair of channels."""
    return Choice([conv(c, c, 3), nn.Sequential(conv(c, c, 5), nn.BatchNorm2d(c)), conv(c, c, 1), nn.Identity()])


def network(*blocks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, 1), *blocks, nn.Flatten(), nn.Linear(4 * PLACES, 2, bias=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def attached(*blocks: nn.Module, depth: bool = False) -> nas_gate.GatedModel:
    return nas_gate.attach(network(*blocks), images(), depth=depth)


def choosing(structure: nas_gate.Structure, *indices: int) -> Tensor:
    """All units of width, and of every choice the candidate of this index."""
    keep = structure.dense()
    for choice, index in zip(structure.choices, indices):
        keep[list(choice.units)] = torch.arange(len(choice.units)) == index
    return keep


def macs(*per_layer: int, width: int = 4) -> int:
    """Of a network of such choices, by the MACs of each chosen candidate per place and pair of channels."""
    return (3 * width + 2 * width + sum(per_layer) * width**2) * PLACES


# --- the module alone ---------------------------------------------------------------------------------------


def test_without_gates_the_first_in_evaluation_and_any_in_training() -> None:
    choice = Choice([nn.Identity(), nn.Flatten(0), nn.Unflatten(0, (1, 5))])
    x = torch.arange(5.0)
    choice.eval()
    assert all(torch.equal(choice(x), x) for _ in range(20))
    choice.train()
    torch.manual_seed(0)
    shapes = [tuple(choice(x).shape) for _ in range(300)]
    assert 140 < shapes.count((5,)) < 260  # two of three give this one
    assert 40 < shapes.count((1, 5)) < 160


def test_has_no_state_of_its_own() -> None:
    choice = operators()
    assert {n for n, _ in choice.named_parameters()} == {
        n for n in choice.state_dict() if n.endswith(("weight", "bias"))
    }
    assert not list(choice.named_buffers()) or all("candidates" in n for n, _ in choice.named_buffers())


def test_refuses_what_is_no_choice() -> None:
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="at least two candidates, but got 1"):
        Choice([nn.Identity()])
    with pytest.raises(ValueError, match=r"must not share parameters, but '0.weight' of candidate 1 is also in"):
        Choice([shared, nn.Sequential(shared)])


def test_analysis_refuses_choices_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"candidate 0 gives \(1, 4, 4, 4\) and candidate 1 \(1, 5, 4, 4\)"):
        nas_gate.analyze(network(Choice([conv(4, 4, 1), conv(4, 5, 1)])), images())
    with pytest.raises(ValueError, match="is the model itself"):
        nas_gate.analyze(Choice([nn.Linear(3, 3), nn.Identity()]), torch.randn(1, 3))
    twice = operators()
    with pytest.raises(ValueError, match=r"one place in the model, but one has the places \('1', '2'\)"):
        nas_gate.analyze(network(twice, twice), images())
    idle = network()
    idle.idle = operators()
    idle.forward = lambda x: nn.Sequential(*list(idle)[:3])(x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must run on the example inputs, but 'idle' does not"):
        nas_gate.analyze(idle, images())
    with pytest.raises(ValueError, match="a Choice must be removable, but with 1:1 chosen"):
        nas_gate.analyze(
            network(Choice([nn.Sequential(nn.ReLU(inplace=True), conv(4, 4, 1)), conv(4, 4, 1)])), images()
        )


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nas_gate.GATES)
def test_exactly_one_is_open_under_every_gate_function(name: str) -> None:
    torch.manual_seed(0)
    gated = nas_gate.attach(network(operators(), operators()), images(), gate=nas_gate.make_gate(name))
    for training in (True, False):
        gated.train(training)
        for _ in range(5):
            nn.init.normal_(gated.gates.weight)
            keep = gated.keep()
            for choice in gated.structure.choices:
                of = list(choice.units)
                expected = torch.zeros(4)
                expected[gated.gates.weight[of].argmax()] = 1
                assert torch.equal(keep[of].detach(), expected)
    if name == "hard_concrete":  # where it is clipped, no unit of any kind receives gradient
        return
    gated.train()
    (gated(images(3)).sum() + 10 * gated.cost_share()).backward()
    units = [unit for choice in gated.structure.choices for unit in choice.units]
    assert bool((gated.gates.weight.grad[units] != 0).all())


def test_the_gradient_of_each_candidate_is_its_own() -> None:
    """d loss / d keep_i = <d loss / d output, candidate i>."""
    gated = attached(operators())
    model = gated.model
    with torch.no_grad():
        gated.gates.weight[list(gated.structure.choices[0].units)] = torch.tensor([0.1, 0.4, -0.5, 0.2])
    gated(images(3)).square().sum().backward()
    got = gated.gates.weight.grad[list(gated.structure.choices[0].units)]
    x = model[0](images(3))
    outputs = [c(x) for c in model[1].candidates]
    chosen = outputs[1].detach().requires_grad_()
    model[3](model[2](chosen)).square().sum().backward()
    expected = torch.stack([(chosen.grad * o).sum() for o in outputs])
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_freshly_attached_it_is_the_original() -> None:
    model = network(operators(), Residual(operators()))
    before = copy.deepcopy(model.state_dict())
    gated = nas_gate.attach(model, images())
    assert torch.equal(gated(images(3)), model(images(3)))
    assert gated.cost.total() == nas_gate.count_macs(model, (images(),)) == macs(9, 9)
    assert model[1].keep is None
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert gated.model.state_dict().keys() == before.keys()


def test_copies_states_and_compilation() -> None:
    gated = attached(operators(), Residual(conv(4, 4, 1)), depth=True)
    with torch.no_grad():
        gated.gates.weight.copy_(torch.randn(gated.structure.units, generator=torch.Generator().manual_seed(3)))
    twin = copy.deepcopy(gated)
    twin.load_state_dict(gated.state_dict())
    assert torch.equal(twin(images(2)), gated(images(2)))
    torch._dynamo.reset()
    compiled = torch.compile(gated, backend="eager", fullgraph=True)
    for step in range(2):
        with torch.no_grad():
            gated.gates.weight.copy_(gated.gates.weight.roll(step))
        assert torch.allclose(compiled(images(2)), gated(images(2)), atol=1e-6)


# --- cost, landing, removal ---------------------------------------------------------------------------------


def test_cost_by_hand() -> None:
    gated = attached(operators(), operators())
    cost, structure = gated.cost, gated.structure
    for indices, per in (((0, 0), (9, 9)), ((1, 2), (25, 1)), ((3, 1), (0, 25)), ((3, 3), (0, 0))):
        assert cost(choosing(structure, *indices)).item() == macs(*per)
    norm = 2 * 4
    assert cost(choosing(structure, 1, 3), "params").item() == 3 * 4 + 4 * PLACES * 2 + 25 * 16 + norm
    assert nas_gate.reachable(structure) == ((3 + 2) * PLACES / macs(9, 9), macs(25, 25) / macs(9, 9))
    soft = choosing(structure, 0, 0).double()
    soft[list(structure.choices[0].units)] = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert cost(soft).item() == pytest.approx(macs(9) + (4.5 + 6.25 + 0.25) * 16 * PLACES)


@pytest.mark.parametrize("index", range(4))
def test_removal_leaves_the_chosen_candidate_alone(index: int) -> None:
    gated = attached(operators(), Residual(operators()))
    removed = nas_gate.remove_with_proof(gated, choosing(gated.structure, index, 3 - index))
    model = removed.model
    assert not any(isinstance(m, Choice) for m in model.modules())
    assert type(model[1]) is type(gated.model[1].candidates[index])
    assert type(model[2].inner) is type(gated.model[2].inner.candidates[3 - index])
    own = gated.model[1].candidates[index].state_dict()
    assert all(torch.equal(own[n], t) for n, t in model[1].state_dict().items())
    assert removed.macs == macs((9, 25, 1, 0)[index], (0, 1, 25, 9)[index])
    assert removed.params == sum(p.numel() for p in model.parameters())
    assert gated.model[1].keep is not None  # the gated model goes on


def test_a_choice_in_a_candidate() -> None:
    inner = Choice([conv(6, 6, 3), nn.Identity()])
    outer = Choice([conv(4, 4, 1), nn.Sequential(conv(4, 6, 1), inner, conv(6, 4, 1))])
    gated = attached(outer)
    assert [c.path for c in gated.structure.choices] == ["1", "1.candidates.1.1"]
    assert nas_gate.reachable(gated.structure)[1] == (5 * 4 + 48 + 9 * 36) / (5 * 4 + 16)
    for a, b, per in ((0, 0, 16), (0, 1, 16), (1, 0, 48 + 9 * 36), (1, 1, 48)):
        removed = nas_gate.remove_with_proof(gated, choosing(gated.structure, a, b))
        assert removed.macs == (5 * 4 + per) * PLACES
    assert removed.cut.choices == {"1": 1, "1.candidates.1.1": 1}
    assert isinstance(removed.model[1][1], nn.Identity)


def test_removal_wants_exactly_one() -> None:
    gated = attached(operators())
    for wrong in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        keep = gated.structure.dense()
        keep[list(gated.structure.choices[0].units)] = wrong
        with pytest.raises(ValueError, match=r"exactly one candidate of every choice must be kept, .* in \['1'\]"):
            nas_gate.remove_with_proof(gated, keep)


def chosen(structure: nas_gate.Structure, scores: dict[int, float], target: float) -> int:
    """What landing chooses when all widths stay for as long as they can."""
    values = torch.full((structure.units,), 10.0)
    (choice,) = structure.choices
    values[list(choice.units)] = torch.tensor([scores[i] for i in range(len(choice.units))])
    keep = landing.choose(structure, values, target)
    assert nas_gate.CostModel(structure).share(keep).item() <= target
    assert keep[: choice.units[0]].all()
    return int(keep[list(choice.units)].nonzero())


def test_landing_changes_to_cheaper_and_dearer_candidates() -> None:
    structure = nas_gate.analyze(
        network(Choice([conv(4, 4, 5), conv(4, 4, 3), conv(4, 4, 1), nn.Identity()])), images()
    )
    share = {i: macs(per) / macs(25) for i, per in enumerate((25, 9, 1, 0))}
    best = {0: 0.0, 1: 3.0, 2: 1.0, 3: 2.0}
    assert chosen(structure, best, 0.999) == 1  # a dearer one would exceed the target
    assert chosen(structure, best, share[1]) == 1
    assert chosen(structure, best, share[1] - 0.001) == 3  # the next best that is cheaper
    assert chosen(structure, {**best, 3: -1.0}, share[1] - 0.001) == 2
    assert chosen(structure, {**best, 3: -1.0}, share[2] - 0.001) == 3
    small = nas_gate.analyze(network(Choice([conv(4, 4, 3), conv(4, 4, 1), nn.Identity()])), images())
    assert chosen(small, {0: -1.0, 1: 1.0, 2: 2.0}, 0.999) == 1  # the dearer one of the two that fit
    with pytest.raises(ValueError, match="is below what is reachable"):
        landing.choose(structure, torch.zeros(structure.units), 0.01)


class Opposed(nn.Module):
    """A choice whose first candidate has few MACs and many parameters, and whose second has it the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Upsample(scale_factor=4))
        self.d = Choice([pooled, nn.Conv2d(4, 4, 1)])
        self.o = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(self.d(self.a(x)))
        return result


@pytest.mark.parametrize("most", [0.13, 0.15, 0.17, 0.4])
def test_landing_meets_a_limit_that_the_cheapest_candidate_of_the_target_exceeds(most: float) -> None:
    """Nothing has to close for the MACs; what the scores prefer, the second candidate, meets the limit as well."""
    structure = nas_gate.analyze(Opposed(), torch.randn(1, 3, 8, 8))
    assert [group.size for group in structure.groups] == [4, 4, 1, 1]
    scores = torch.tensor([3.0, 2, 1, 0.5, 1, 1, 1, 1, -1, 5])
    keep = landing.choose(structure, scores, 1.0, "macs", limits={"params": most})
    cost = nas_gate.CostModel(structure)
    assert cost.share(keep, "params") <= most
    assert keep[8:].tolist() == [False, True]
    more = keep.clone()
    more[int(torch.where(keep[:4], -torch.inf, scores[:4]).argmax())] = True
    assert bool(keep[:4].all()) or cost.share(more, "params") > most


@pytest.mark.parametrize("method", ["uniform", "l1"])
def test_baselines_of_width_keep_the_first_candidates(method: str) -> None:
    model = network(operators(), operators())
    structure = nas_gate.analyze(model, images())
    keep = landing.choose(structure, baselines.score(method, structure, model), 0.3)
    assert all(keep[choice.units[0]] for choice in structure.choices)
    assert not keep[: structure.choices[0].units[0]].all()


# --- candidates on disk, the supernet -----------------------------------------------------------------------


def test_candidates_are_rebuilt_from_the_record(tmp_path: Path) -> None:
    gated = attached(operators(), Residual(operators()))
    removed = nas_gate.remove_with_proof(gated, choosing(gated.structure, 1, 2))
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, {"name": "mine"}, {}, {})
    assert json.loads((folder / candidate.RECORD).read_text())["cut"]["choices"] == {"1": 1, "2.inner": 2}

    def dense() -> nn.Module:
        return network(operators(), Residual(operators()))

    assert torch.equal(nas_gate.load(folder, dense)(images(2)), removed.model(images(2)))
    with pytest.raises(candidate.CandidateError, match=r"names the module '2\.inner'"):
        nas_gate.load(folder, lambda: network(operators(), conv(4, 4, 1)))
    with pytest.raises(candidate.CandidateError, match=r"names candidate 2 of '2\.inner'"):
        nas_gate.load(folder, lambda: network(operators(), Residual(Choice([conv(4, 4, 1), nn.Identity()]))))


def test_the_supernet_is_resnet20_where_all_layers_choose_the_first() -> None:
    model, resnet = models.build("cifar_supernet"), models.build("resnet20", shortcut="B")
    structure = nas_gate.analyze(model.eval(), torch.randn(1, 3, 32, 32))
    cost = nas_gate.CostModel(structure)
    assert len(structure.choices) == 9
    assert cost.total() == nas_gate.count_macs(resnet, (torch.randn(1, 3, 32, 32),)) == 40_813_184
    assert cost.total("params") == sum(p.numel() for p in resnet.parameters()) == 272_474
    widths = [[m.tensor for m in g.members] for g in structure.groups if g.kind == "width"]
    own = [i for i in range(4) if any(all(t.startswith(f"3.candidates.{i}.") for t in tensors) for tensors in widths)]
    assert own == [0, 1, 2]  # every candidate that has some has widths of its own


def test_the_supernet_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "MILLISECONDS", 0.0)  # of each operation at each of its sizes
    options = ["experiment=debug", "model=cifar_supernet", "model.arguments.layers=1", "model.arguments.width=0.5"]
    options += [f"training.{stage}.epochs=1" for stage in ("dense", "gating")]
    assert cli.main(["search", *options, "depth=true", "limits.latency_ms=1000", "run=s"]) == 0
    result = json.loads((tmp_path / "runs" / "s" / "result.json").read_text())
    assert result["achieved"] <= 0.5
    assert 0 < result["predicted_latency_ms"] <= 1000
    loaded = nas_gate.load(tmp_path / "runs" / "s" / "candidate")
    assert not any(isinstance(m, Choice) for m in loaded.modules())
    assert nas_gate.count_macs(loaded, (torch.randn(1, 1, 8, 8),)) == result["macs"]
    assert settings_of(composed([*options, "depth=true"])).depth
