"""Gated models: the same function while open, the right gradients, and whatever a training loop does to a model."""

import copy
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nas_gate
from nas_gate import GatedModel, Lagrangian, landing, models, penalty
from nas_gate.gates import GATES, TrainableGate, make_gate
from nas_gate.gating import Gates, check_optimizers, ranks

WIDTH = 6


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def plain_net(norm: bool = True) -> nn.Sequential:
    """conv, (norm,) relu, conv: one group of 6 units, consumed by the second convolution only."""
    torch.manual_seed(1)
    middle = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), middle, nn.ReLU(), nn.Conv2d(WIDTH, 4, 3))


def attached(model: nn.Module | None = None, x: Tensor | None = None, **options: object) -> GatedModel:
    return nas_gate.attach(plain_net() if model is None else model, images(1) if x is None else x, **options)


def set_gates(gated: GatedModel, *values: float) -> GatedModel:
    with torch.no_grad():
        gated.gates.weight.copy_(torch.tensor(values))
    return gated


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- all open -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("digits_cnn", {}, (2, 1, 8, 8)),
        ("resnet20", {"width": 0.5}, (2, 3, 16, 16)),
        ("densenet40", {}, (2, 3, 16, 16)),
        ("cifar_mobilenet_v2", {}, (2, 3, 16, 16)),
        ("cifar_vgg16_bn", {"width": 0.25}, (2, 3, 16, 16)),
    ],
)
def test_all_open_is_the_original_bit_for_bit(name: str, arguments: dict, shape: tuple[int, ...]) -> None:
    model = models.build(name, **arguments)
    x = torch.randn(shape)
    gated = nas_gate.attach(model, x[:1])
    assert bool((gated.keep() == 1).all())
    assert torch.equal(gated.eval()(x), model.eval()(x))
    assert torch.equal(gated.train()(x), model.train()(x))
    assert same(snapshot(gated.model), snapshot(model)), "batch norms saw the same batch"


def test_the_original_is_untouched() -> None:
    model = plain_net().train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before, modes = snapshot(model), [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    gated = attached(model)
    assert torch.equal(torch.get_rng_state(), random)
    set_gates(gated, 1, -1, 1, -1, 1, -1)
    gated(images()).sum().backward()
    torch.optim.SGD(gated.parameters(), lr=0.1).step()
    assert same(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].bias.requires_grad


def test_modes_and_flags_of_single_modules_are_kept() -> None:
    """A norm that is frozen in a model in training mode stays so: the gated model is the same function."""
    model = plain_net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    gated = attached(model)
    assert gated.training
    assert not gated.model[1].training
    assert not gated.model[0].weight.requires_grad
    assert torch.equal(gated(images()), model(images()))
    assert not attached(model.eval()).training


def test_the_model_of_a_gated_one_can_be_gated_again() -> None:
    again = attached(attached().model)
    assert torch.equal(again(images()), plain_net()(images()))


def test_outputs_of_any_kind_and_keyword_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, object]:
            return {"y": (self.b(self.a(x).relu()) * scale,), "n": 3}

    model, inputs = Pair(), {"x": torch.randn(4, 3), "scale": torch.tensor(2.0)}
    out = nas_gate.attach(model, inputs)(**inputs)
    assert torch.equal(out["y"][0], model(**inputs)["y"][0])
    assert out["n"] == 3


# --- gradients ----------------------------------------------------------------------------------------------


def by_activations(model: nn.Sequential, keep: Tensor, x: Tensor) -> Tensor:
    """The independent way: keep multiplies what enters the consuming convolution."""
    hook = model[3].register_forward_pre_hook(lambda m, args: (args[0] * keep.view(1, -1, 1, 1),))
    try:
        return model(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_are_those_of_gated_activations(norm: bool) -> None:
    model = plain_net(norm).double()
    gated = attached(model, images(1).double())
    keep = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.float64, requires_grad=True)
    set_gates(gated, *(2 * keep.detach() - 1).tolist())
    x = images().double()
    expected, got = by_activations(model, keep, x), gated(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    expected.square().mean().backward()
    got.square().mean().backward()
    # the default gate has the gradient shape 1
    torch.testing.assert_close(gated.gates.weight.grad.double(), keep.grad, rtol=1e-6, atol=1e-9)
    assert bool((keep.grad != 0).all())
    for (name, a), b in zip(gated.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_the_gradient_is_multiplied_by_the_shape() -> None:
    weights = torch.tensor([0.5, -0.5, 0.25, -2.0, 1.5, 0.75])
    grads = {}
    for shape in ("constant", "sigmoid"):
        gated = set_gates(attached(gate=TrainableGate(shape)), *weights.tolist())
        gated(images()).square().mean().backward()
        grads[shape] = gated.gates.weight.grad
    slope = torch.sigmoid(weights) * torch.sigmoid(-weights)
    torch.testing.assert_close(grads["sigmoid"], grads["constant"] * slope)


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("name", ["digits_cnn", "cifar_mobilenet_v2"])
def test_every_weight_and_every_gate_receives_gradient(name: str, gate: str) -> None:
    x = torch.randn(8, 1, 8, 8) if name == "digits_cnn" else torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    gated = nas_gate.attach(models.build(name), x[:1], gate=make_gate(gate)).train()
    F.cross_entropy(gated(x), torch.arange(len(x)) % 10).backward()
    assert gated.gates.weight.grad is not None
    # Dead ReLUs give 0, and four of five hard concrete draws are saturated at the weight 3 that they start at.
    expected = 0.1 if gate == "hard_concrete" else 0.8
    assert float((gated.gates.weight.grad != 0).double().mean()) > expected
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in gated.parameters())


# --- the minimum --------------------------------------------------------------------------------------------


def test_every_group_keeps_its_highest_gate_open() -> None:
    gated = nas_gate.attach(models.build("digits_cnn"), torch.randn(1, 1, 8, 8))
    weights = -1 - torch.rand(gated.structure.units, generator=torch.Generator().manual_seed(0))
    set_gates(gated, *weights.tolist())
    keep = gated.keep().detach()
    for group in gated.structure.groups:
        inside = keep[group.start : group.stop]
        assert int(inside.sum()) == 1
        assert int(inside.argmax()) == int(weights[group.start : group.stop].argmax())
    # this is the keep that removal takes, so the network is never cut in two
    assert nas_gate.remove_with_proof(gated, keep.bool()).macs == round(float(gated.cost(keep)))


def test_a_gate_that_is_held_open_learns_like_a_closed_one() -> None:
    gated = set_gates(attached(), -0.5, -1, -1, -1, -1, -1)
    gated(images()).square().mean().backward()
    assert torch.equal(gated.keep(), torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert bool((gated.gates.weight.grad != 0).all())
    keep = gated.keep().detach().requires_grad_()
    model = plain_net()
    by_activations(model, keep, images()).square().mean().backward()
    torch.testing.assert_close(gated.gates.weight.grad, keep.grad)


def test_a_higher_minimum() -> None:
    structure = attached().structure
    gates = Gates(structure, TrainableGate(), minimum=3)
    with torch.no_grad():
        gates.weight.copy_(torch.tensor([-3.0, -1, -5, -2, -4, -6]))
    assert gates().tolist() == [1, 1, 0, 1, 0, 0]


def test_whole_blocks_by_hand() -> None:
    structure = attached().structure
    gates = Gates(structure, TrainableGate(), round_to=4)
    with torch.no_grad():
        gates.weight.copy_(torch.tensor([0.3, -1, 0.2, -0.1, -2, 0.1]))
        assert gates().tolist() == [1, 0, 1, 1, 0, 1], "three are above 0, and the next is held open"
        gates.weight[5] = 0.5
        gates.weight[3] = 0.4
        assert gates().tolist() == [1, 0, 1, 1, 0, 1]
        gates.weight[4] = 0.1
        assert gates().tolist() == [1, 1, 1, 1, 1, 1], "of six units, all are the next block"
        gates.weight.fill_(-1)
        assert gates().tolist() == [1, 1, 1, 1, 0, 0], "the least is a block, too"


@pytest.mark.parametrize("function", sorted(GATES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), round_to=st.integers(1, 8))
def test_gates_in_blocks_are_what_landing_leaves(function: str, seed: int, round_to: int) -> None:
    gates = Gates(BLOCKS.structure, make_gate(function), round_to=round_to).eval()
    gates.function.set_progress(1.0)
    weight = torch.randn(BLOCKS.structure.units, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gates.weight.copy_(weight)
    keep = gates() > 0.5
    share = float(BLOCKS.cost.share(keep, "macs"))
    assert torch.equal(keep, landing.choose(BLOCKS.structure, weight, share, round_to=round_to))


BLOCKS = nas_gate.attach(models.build("resnet20", width=0.5), torch.randn(1, 3, 8, 8))  # groups of 8, 16 and 32


def test_blocks_are_trained_landed_and_removed() -> None:
    gated = nas_gate.attach(models.build("cifar_mobilenet_v2"), torch.randn(1, 3, 16, 16), round_to=8)
    torch.nn.init.uniform_(gated.gates.weight, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(gated.gate_parameters(), lr=0.05)
    train(gated, optimiser, 60, lambda: penalty(gated, 0.5, weight=8.0))
    assert abs(gated.cost_share().item() - 0.5) < 0.1
    sizes = torch.tensor([g.size for g in gated.structure.groups])
    for keep in (gated.keep() > 0.5, nas_gate.land(gated, 0.6)):
        left = torch.from_numpy(gated.structure.open_units(keep))
        assert bool(((left % 8 == 0) | (left == sizes)).all())
        assert bool((left < sizes).any())
    assert nas_gate.remove_with_proof(gated, nas_gate.land(gated, 0.6)).max_relative_error < 1e-4
    single = torch.from_numpy(gated.structure.open_units(nas_gate.land(gated, 0.6, round_to=1)))
    assert bool(((single % 8 != 0) & (single != sizes)).any())


@pytest.mark.parametrize("options", [{"round_to": 0}, {"minimum": 0}])
def test_blocks_below_one(options: dict) -> None:
    with pytest.raises(ValueError, match=r"`minimum >= 1` and `round_to >= 1` must hold"):
        Gates(attached().structure, TrainableGate(), **options)


def test_ranks_within_groups_by_hand() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 2.0, 2.0, 3.0, -1.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert ranks(scores, group, torch.tensor([0, 3, 6])).tolist() == [2, 0, 1, 1, 2, 0, 0]


# --- training -----------------------------------------------------------------------------------------------


def train(gated: GatedModel, optimiser: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimiser.step(closure)


def test_closed_units_open_again() -> None:
    """Five of six units are closed although the task needs them; the task's own gradient opens them."""
    teacher = plain_net(norm=False)
    gated = set_gates(attached(teacher), 0.1, *[-0.05] * 5)
    x = images(16)
    target = teacher(x).detach()
    assert gated.keep().sum().item() == 1
    optimiser = torch.optim.Adam(gated.gate_parameters(), lr=0.01)
    train(gated, optimiser, 50, lambda: F.mse_loss(gated(x), target))
    assert gated.keep().sum().item() == WIDTH


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_any_optimiser_meets_the_target(optimiser: Callable) -> None:
    gated = attached()
    x, y = images(16), torch.arange(16) % 4
    # gates differ from the start, for all that stands on one value would close together
    set_gates(gated, *torch.linspace(0.1, 0.6, WIDTH).tolist())

    def loss() -> Tensor:
        return F.cross_entropy(gated(x).mean((2, 3)), y) + penalty(gated, target=0.5, weight=10.0)

    before = loss().item()
    train(gated, optimiser(gated.parameters()), 30, loss)
    assert loss().item() < before
    assert gated.cost_share().item() == pytest.approx(0.5, abs=1 / WIDTH)


def test_gradient_accumulation_equals_the_full_batch() -> None:
    x, y = images(12), torch.arange(12) % 4
    grads = []
    for parts in (1, 3):
        gated = set_gates(attached(plain_net(norm=False)), 0.5, -0.5, 0.5, -0.5, 0.5, 0.5)
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            loss = F.cross_entropy(gated(a).mean((2, 3)), b) + penalty(gated, target=0.3)
            (loss / parts).backward()
        grads.append([p.grad for p in gated.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "gate", [TrainableGate(), TrainableGate(form="finite"), *map(make_gate, sorted(GATES))], ids=str
)
def test_autocast(gate: nn.Module) -> None:
    torch.manual_seed(0)
    gated = attached(models.build("digits_cnn"), torch.randn(1, 1, 8, 8), gate=gate)
    x = torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated(x)
        loss = F.cross_entropy(out, torch.arange(4)) + penalty(gated, target=0.5)
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert gated.gates.weight.grad.dtype == torch.float32
    assert bool(gated.gates.weight.grad.isfinite().all())
    assert float(gated.gates.weight.grad.abs().max()) > 0


def test_autocast_all_open_is_the_original_bit_for_bit() -> None:
    model = models.build("digits_cnn").eval()
    x = torch.randn(4, 1, 8, 8)
    gated = nas_gate.attach(model, x[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(x), model(x))


def test_half_precision_model() -> None:
    model = plain_net(norm=False).bfloat16()
    gated = set_gates(attached(model, images(1).bfloat16()), 1, -1, 1, -1, 1, -1)
    out = gated(images().bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_activations(model, gated.keep().detach().bfloat16(), images().bfloat16()))


# --- torch.compile ------------------------------------------------------------------------------------------


def compiled_equals_eager(**options: object) -> None:
    torch._dynamo.reset()
    eager = set_gates(attached(), 0.5, -0.5, 0.5, -0.5, 0.5, 0.5)
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, **options)
    for _ in range(2):
        losses = []
        for model, call in ((eager, eager), (compiled, fast)):
            model.zero_grad()
            loss = call(images()).square().mean() + penalty(model, target=0.3)
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
            losses.append(loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
        for (name, a), b in zip(compiled.named_parameters(), eager.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(snapshot(compiled), snapshot(eager), rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_compiles_without_a_graph_break() -> None:
    compiled_equals_eager(backend="eager", fullgraph=True)


def test_differentiates_ahead_of_time() -> None:
    compiled_equals_eager(backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
@needs_compiler
def test_compiles_with_inductor() -> None:
    compiled_equals_eager(fullgraph=True)


# --- activation checkpointing -------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Conv2d(3, WIDTH, 3), plain_net(), reentrant
        self.inner[0] = nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.first(x))
        if torch.is_grad_enabled():
            return checkpoint(self.inner, hidden, use_reentrant=self.reentrant)
        return self.inner(hidden)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_without_gates_is_refused(reentrant: bool) -> None:
    """Backward, blocks would be run again with the weights of closed units."""
    gated = attached(Recomputed(reentrant))
    with pytest.raises(RuntimeError, match=r"run again in the backward pass, but a Conv2d is.*Turn off activation"):
        gated(images()).square().mean().backward()
    small = nas_gate.remove(gated, target=0.5)
    small(images()).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


# --- copies, state, processes -------------------------------------------------------------------------------


def test_a_deep_copy_is_independent() -> None:
    gated = attached()
    other = copy.deepcopy(gated)
    before = snapshot(gated)
    set_gates(other, *[-1.0] * WIDTH)
    with torch.no_grad():
        other.model[0].weight.zero_()
    assert same(snapshot(gated), before)
    assert not torch.equal(other(images()), gated(images()))
    assert nas_gate.remove(other, target=0.5)[0].out_channels < WIDTH


def test_state_dict_round_trip() -> None:
    a, b = attached(), attached(models_with_other_weights())
    set_gates(a, 1, -1, 1, -1, 1, -1)
    state = a.state_dict()
    assert set(state) == {"gates.weight", *(f"model.{n}" for n in plain_net().state_dict())}
    b.load_state_dict(state)
    assert torch.equal(a.eval()(images()), b.eval()(images()))
    assert torch.equal(a.keep(), b.keep())


def models_with_other_weights() -> nn.Sequential:
    model = plain_net()
    torch.nn.init.normal_(model[0].weight)
    return model


def test_parameters_of_gates_and_weights_are_all_and_apart() -> None:
    gated = attached()
    gates, weights = {id(p) for p in gated.gate_parameters()}, {id(p) for p in gated.weight_parameters()}
    assert gates.isdisjoint(weights)
    assert gates | weights == {id(p) for p in gated.parameters()}
    assert gates == {id(gated.gates.weight)}


DDP = textwrap.dedent(
    """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    import nas_gate

    def gated_net():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
        gated = nas_gate.attach(net, torch.zeros(1, 3, 8, 8))
        with torch.no_grad():
            gated.gates.weight.copy_(torch.rand(11) - 0.3)
        return gated

    def data():
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return x, torch.arange(8) % 4

    def loss(model, gated, x, y):
        return F.cross_entropy(model(x).mean((2, 3)), y) + nas_gate.penalty(gated, target=0.3, weight=2.0)

    if __name__ == "__main__":
        rank, meeting, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        gated = gated_net()
        model = DistributedDataParallel(gated)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = (part.chunk(2)[rank] for part in data())
        for step in range(2):
            optimiser.zero_grad()
            loss(model, gated, x, y).backward()
            if step == 0:
                grads = {n: p.grad.clone() for n, p in gated.named_parameters()}
            optimiser.step()
        torch.save({"grads": grads, "state": gated.state_dict()}, result)
        dist.destroy_process_group()
    """
)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The penalty is added in each process: DDP averages, so that it counts once."""
    script = tmp_path / "worker.py"
    script.write_text(DDP)
    meeting = (tmp_path / "meeting").as_uri()
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), meeting, str(tmp_path / f"{rank}.pt")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first["grads"], second["grads"])
    assert same(first["state"], second["state"])

    space: dict = {"__name__": "worker"}
    exec(compile(DDP, "worker.py", "exec"), space)
    gated = space["gated_net"]()
    optimiser = torch.optim.SGD(gated.parameters(), lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        space["loss"](gated, gated, *space["data"]()).backward()
        if step == 0:
            grads = {n: p.grad.clone() for n, p in gated.named_parameters()}
            assert float(grads["gates.weight"].abs().min()) > 0
            torch.testing.assert_close(first["grads"], grads, rtol=1e-4, atol=1e-6)
        optimiser.step()
    torch.testing.assert_close(first["state"], dict(gated.state_dict()), rtol=1e-4, atol=1e-6)


# --- penalty ------------------------------------------------------------------------------------------------

DENSE = 3 * 6 * 9 * 36 + 6 * 4 * 9 * 16  # macs of plain_net on 8x8: 6x6, then 4x4 places
UNIT = 3 * 9 * 36 + 4 * 9 * 16


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("target", [0.3, 0.9, 1.0])
def test_penalty_by_hand(power: int, target: float) -> None:
    gated = set_gates(attached(), 1, -1, 1, -1, 1, 1)
    share = 4 * UNIT / DENSE
    value = penalty(gated, target=target, weight=3.0, power=power)
    value.backward()
    assert value.item() == pytest.approx(3 * abs(target - share) ** power, rel=1e-6)
    slope = 3 * power * abs(share - target) ** (power - 1) * (1 if share > target else -1) * UNIT / DENSE
    torch.testing.assert_close(gated.gates.weight.grad, torch.full((WIDTH,), slope))


def test_penalty_on_parameters() -> None:
    gated = set_gates(attached(), 1, -1, 1, -1, 1, -1)
    unit, fixed = 27 + 1 + 2 + 36, 4
    share = (3 * unit + fixed) / (6 * unit + fixed)
    assert penalty(gated, target=0.25, metric="params").item() == pytest.approx((share - 0.25) ** 2, rel=1e-6)


def test_penalty_at_the_target_is_zero_and_finite() -> None:
    for power in (1, 2):
        gated = set_gates(attached(), 1, -1, 1, -1, 1, -1)
        value = penalty(gated, target=0.5, power=power)
        value.backward()
        assert value.item() == 0
        assert torch.equal(gated.gates.weight.grad, torch.zeros(WIDTH))


def test_penalty_has_the_dtype_of_the_gates() -> None:
    assert penalty(attached(), target=0.5).dtype == torch.float32


@pytest.mark.parametrize("target", [0.0, -0.5, 1.01, float("nan")])
def test_targets_outside_0_and_1(target: float) -> None:
    for call in (lambda: penalty(attached(), target=target), lambda: Lagrangian(target)):
        with pytest.raises(ValueError, match=rf"`0 < target <= 1` must hold .* got target={target}"):
            call()


def test_refused_arguments_of_the_penalty() -> None:
    gated = attached()
    with pytest.raises(ValueError, match="power must be 1 or 2, but is 3"):
        penalty(gated, target=0.5, power=3)
    with pytest.raises(ValueError, match=r"got weight=-1\.0"):
        penalty(gated, target=0.5, weight=-1.0)
    with pytest.raises(ValueError, match="one of macs, params, latency_ms, but is 'latency'"):
        penalty(gated, target=0.5, metric="latency")


# --- Lagrangian ---------------------------------------------------------------------------------------------


def test_lagrangian_by_hand() -> None:
    gated = set_gates(attached(), 1, -1, 1, -1, 1, 1)
    gap = 4 / 6 - 0.5
    budget = Lagrangian(target=0.5, rate=0.2, multiplier=0.7)
    value = budget(gated)
    value.backward()
    assert value.item() == pytest.approx(0.7 * gap + 0.1 * gap**2, rel=1e-6)
    torch.testing.assert_close(gated.gates.weight.grad, torch.full((WIDTH,), (0.7 + 0.2 * gap) / 6))
    budget.update(gated)
    assert budget.multiplier == pytest.approx(0.7 + 0.2 * gap, rel=1e-6)


def test_the_multiplier_stays_at_least_0() -> None:
    gated = set_gates(attached(), 1, -1, -1, -1, -1, -1)
    budget = Lagrangian(target=0.9, rate=10.0, multiplier=0.5)
    budget.update(gated)
    assert budget.multiplier == 0


def test_lagrangian_finds_the_weight_that_holds_the_budget() -> None:
    """The task opens unit i with force 1 + i, the budget closes each with multiplier / 6: three at 18 to 24."""
    gated = set_gates(attached(), *[0.5] * WIDTH)
    worth = torch.arange(1.0, 7.0)
    budget = Lagrangian(target=0.5, rate=3.0)
    optimiser = torch.optim.SGD(gated.gate_parameters(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        task = -(worth * gated.keep()).sum()
        (task + budget(gated)).backward()
        optimiser.step()
        budget.update(gated)
    assert gated.keep().tolist() == [0, 0, 0, 1, 1, 1]
    assert 18 <= budget.multiplier <= 24


def test_no_budget_waits_for_the_device() -> None:
    """On a device without values whatever reads one fails: as one that reads would wait, at every step."""
    gated = attached().to("meta")
    budget = Lagrangian(0.5, limits={"params": 0.4})
    for _ in range(2):
        (budget(gated) + penalty(gated, target=0.5, limits={"params": 0.4})).backward()
        budget.update(gated)
    with pytest.raises(RuntimeError, match="meta"):
        assert budget.multiplier


def test_lagrangian_state() -> None:
    a, b = Lagrangian(0.5, multiplier=1.25), Lagrangian(0.25)
    b.load_state_dict(a.state_dict())
    assert (b.multiplier, b.target) == (1.25, 0.5)
    assert b(attached()).item() == a(attached()).item()


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": -1.0}, {"multiplier": -0.1}])
def test_refused_arguments_of_the_lagrangian(options: dict) -> None:
    with pytest.raises(ValueError, match="must hold"):
        Lagrangian(0.5, **options)


# --- optimisers built too early -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_an_optimiser_built_before_attach_is_an_error(kind: type) -> None:
    model = plain_net()
    optimiser = kind(model.parameters(), lr=0.1)
    gated = attached(model)

    def closure() -> Tensor:
        loss = gated(images()).square().mean()
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"original Sequential, .* after nas_gate.attach, from gated.parameters\(\)"):
        optimiser.step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_training_the_original_goes_on_working(kind: type) -> None:
    model = plain_net()
    gated = attached(model)
    optimiser = kind(model.parameters(), lr=1e-2)
    before = snapshot(gated)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    start = closure().item()
    optimiser.zero_grad()
    for _ in range(3):
        optimiser.step(closure)  # the gradients come into being during the step
    closure()
    if kind is not torch.optim.LBFGS:
        optimiser.step()
    assert closure().item() < start
    assert same(snapshot(gated), before)


def test_other_optimisers_are_let_alone() -> None:
    attached()
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=0.25).step()
    assert other.tolist() == [0.75, 0.75]


def test_check_optimizers() -> None:
    gated = attached()
    apart = [torch.optim.SGD(gated.weight_parameters(), lr=0.1), torch.optim.Adam(gated.gate_parameters())]
    check_optimizers(gated, apart)
    check_optimizers(gated, [torch.optim.SGD(gated.parameters(), lr=0.1)])
    for wrong in (apart[:1], [], [torch.optim.SGD(attached().parameters(), lr=0.1)]):
        with pytest.raises(ValueError, match=r"the gates must be among the optimiser's parameters"):
            check_optimizers(gated, wrong)


# --- refusals -----------------------------------------------------------------------------------------------


def test_no_removable_unit_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"at least one removable unit .* Linear has none; .*output of the model"):
        nas_gate.attach(nn.Linear(3, 2), torch.randn(1, 3))


def test_no_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="ReLU has none; reasons: it has no parameters"):
        nas_gate.attach(nn.ReLU(), torch.randn(1, 3))


def test_inputs_that_the_model_rejects() -> None:
    with pytest.raises(ValueError, match=r"Sequential rejects tensors of shapes \[\(1, 2, 8, 8\)\]: RuntimeError: "):
        nas_gate.attach(plain_net(), torch.randn(1, 2, 8, 8))


# --- stochastic gates ---------------------------------------------------------------------------------------


class TwoConsumers(nn.Module):
    """One group, the 8 channels of `first`, that two convolutions take in; the second undoes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.plus = nn.Conv2d(8, 4, 1)
        self.minus = nn.Conv2d(8, 4, 1)
        self.minus.load_state_dict({n: -t for n, t in self.plus.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.plus(x) + self.minus(x)


@pytest.mark.parametrize("gate", ["gumbel", "hard_concrete"])
def test_one_sample_per_forward_for_all_consumers(gate: str) -> None:
    """With one keep for both, the two consumers cancel; with two samples they would not."""
    gated = nas_gate.attach(TwoConsumers(), images(1), gate=make_gate(gate)).train()
    set_gates(gated, *[0.0] * 8)
    with torch.no_grad():
        gated.model.first.bias += 1.0
    drawn = set()
    for seed in range(5):
        torch.manual_seed(seed)
        assert gated(images()).abs().max().item() < 1e-6
        torch.manual_seed(seed)
        drawn.add(tuple(gated.keep().tolist()))
    assert len(drawn) > 1


@pytest.mark.parametrize("gate", ["gumbel", "hard_concrete"])
def test_samples_differ_in_training_and_not_in_evaluation(gate: str) -> None:
    gated = set_gates(attached(plain_net(norm=False), gate=make_gate(gate)), *[0.0] * WIDTH)
    torch.manual_seed(0)
    gated.train()
    assert not torch.equal(gated(images()), gated(images()))
    gated.eval()
    assert torch.equal(gated(images()), gated(images()))


# --- layer norms over units ---------------------------------------------------------------------------------


class Block(nn.Module):
    """A ConvNeXt block and head: two layer norms over the 8 units of the residual stream, 12 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.scale * self.down(F.gelu(self.up(y)))
        return self.head(self.last(x.mean((1, 2))))


def block() -> Block:
    torch.manual_seed(6)
    model = Block()
    with torch.no_grad():  # affine parameters that a wrong slot would show in
        for norm in (model.norm, model.last):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    return model


def gated_block(seed: int | None = None) -> tuple[Block, GatedModel, Tensor]:
    """The block, its gated copy, and a keep of about half of the units that the copy is set to (all without seed)."""
    model = block()
    gated = attached(model)
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    if seed is not None:
        keep = torch.rand(len(keep), generator=torch.Generator().manual_seed(seed)) < 0.5
        keep[[g.start for g in gated.structure.groups]] = True
    return model, set_gates(gated, *torch.where(keep, 1.0, -1.0).tolist()), keep


def test_layer_norms_leave_their_units_free() -> None:
    model, gated, _ = gated_block()
    assert sorted(g.size for g in gated.structure.groups) == [8, 12]
    assert [n.path for n in gated.structure.norms] == ["norm", "last"]
    assert type(model.norm) is nn.LayerNorm
    assert gated.state_dict().keys() == {"gates.weight", *(f"model.{n}" for n in model.state_dict())}


@pytest.mark.parametrize("training", [True, False])
def test_layer_norms_all_open_are_the_original_bit_for_bit(training: bool) -> None:
    model, gated, _ = gated_block()
    assert torch.equal(gated.train(training)(images()), model.train(training)(images()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(images()), model(images()))


@pytest.mark.parametrize("seed", range(3))
def test_layer_norms_take_their_statistics_over_kept_units(seed: int) -> None:
    """Against the block computed by hand on the kept slots, with `F.layer_norm` over as many as there are."""
    model, gated, keep = gated_block(seed)
    stream, hidden = (keep[g.start : g.stop] for size in (8, 12) for g in gated.structure.groups if g.size == size)
    norm, last = (
        lambda y, n=n: F.layer_norm(y, (int(stream.sum()),), n.weight[stream], n.bias[stream], n.eps)
        for n in (model.norm, model.last)
    )
    x = F.conv2d(images(), model.stem.weight[stream], model.stem.bias[stream], 2)
    y = F.conv2d(x, model.depthwise.weight[stream], model.depthwise.bias[stream], padding=1, groups=len(x[0]))
    x, y = x.permute(0, 2, 3, 1), norm(y.permute(0, 2, 3, 1))
    y = F.linear(y, model.up.weight[hidden][:, stream], model.up.bias[hidden])
    x = x + model.scale[stream] * F.linear(F.gelu(y), model.down.weight[stream][:, hidden], model.down.bias[stream])
    expected = F.linear(last(x.mean((1, 2))), model.head.weight[:, stream], model.head.bias)
    torch.testing.assert_close(gated(images()), expected)

    removed = nas_gate.remove_with_proof(gated, keep)
    torch.testing.assert_close(removed.model(images()), expected)
    kept = int(stream.sum())
    assert kept < 8
    for layer in (removed.model.norm, removed.model.last):
        assert type(layer) is nn.LayerNorm
        assert layer.normalized_shape == (kept,)
        assert not hasattr(layer, "kept")
        assert not hasattr(layer, "kept_norm")
        assert len(layer._forward_pre_hooks) == len(layer._forward_hooks) == 0


def test_layer_norms_in_copies() -> None:
    _, gated, keep = gated_block(0)
    expected = gated(images())
    other = copy.deepcopy(gated)
    assert torch.equal(other(images()), expected)
    set_gates(other, *[1.0] * len(keep))
    assert not torch.equal(other(images()), expected)
    assert torch.equal(gated(images()), expected)
    fresh = gated_block()[1]
    fresh.load_state_dict(gated.state_dict())
    assert torch.equal(fresh(images()), expected)


def test_layer_norms_survive_removal_and_train_on() -> None:
    """Removal looks at the gated model; the model goes on as it was, and every gate learns through the norms."""
    _, gated, keep = gated_block(0)
    before, expected = snapshot(gated), gated(images())
    nas_gate.remove_with_proof(gated, keep)
    assert same(snapshot(gated), before)
    assert torch.equal(gated(images()), expected)
    gated(images()).square().sum().backward()
    gradient = gated.gates.weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).all())


def test_layer_norms_with_soft_gates_have_true_gradients() -> None:
    gated = attached(block().double(), images(1).double(), gate=make_gate("annealed_sigmoid"))
    gated.gates.double()._least.zero_()  # a unit held open has the gradient of one that is not
    x = images(2).double()

    def output(weight: Tensor) -> Tensor:
        return torch.func.functional_call(gated, {"gates.weight": weight}, (x,))

    weight = torch.linspace(-0.9, 1.1, gated.structure.units, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_group_norms_take_their_statistics_over_kept_units(groups: int) -> None:
    """Against `F.group_norm` over the kept channels; with soft gates the gradients are true."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), nn.Conv2d(8, 5, 1)).double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    gated, x = attached(model, images(1).double()), images(2).double()
    keep = torch.tensor([True, False, True, True, False, True, True, False][: 8 // groups])
    set_gates(gated, *torch.where(keep, 1.0, -1.0).tolist())
    kept = keep.repeat(groups)
    y = F.conv2d(x, model[0].weight[kept], model[0].bias[kept])
    y = F.group_norm(y, groups, model[1].weight[kept], model[1].bias[kept])
    expected = F.conv2d(y, model[2].weight[:, kept], model[2].bias)
    torch.testing.assert_close(gated(x), expected)
    small = nas_gate.remove_with_proof(gated, keep).model
    torch.testing.assert_close(small(x), expected)
    assert (small[1].num_groups, small[1].num_channels) == (groups, int(kept.sum()))

    soft = attached(model, images(1).double(), gate=make_gate("annealed_sigmoid"))
    soft.gates.double()._least.zero_()
    weight = torch.linspace(-0.9, 1.1, len(keep), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(soft, {"gates.weight": w}, (x,)), weight)


def test_layer_norms_compile_without_a_graph_break() -> None:
    _, gated, _ = gated_block(0)
    torch._dynamo.reset()
    compiled = torch.compile(gated, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), gated(images()))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch's of its RMS norm in autocast
@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.LayerNorm(8, elementwise_affine=False)])
def test_norms_whose_result_a_hook_scales(norm: nn.Module) -> None:
    """Open they are the original bit for bit; compiled, copied and pickled ones are what they were when closed."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)), torch.randn(4, 5)
    gated = attached(model, x)
    assert torch.equal(gated(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(x), model(x))
    expected = set_gates(gated, *[0.5, -0.5] * 4)(x)
    assert not torch.equal(expected, model(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(gated, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(copy.deepcopy(gated)(x), expected)
    buffer = io.BytesIO()
    torch.save(gated, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
