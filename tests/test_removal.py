"""Removal: a plain smaller model with everything mended, the input untouched, and a proof that fails loudly."""

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nas_gate
from nas_gate import GatedModel, RemovalError, models, removal
from nas_gate.removal import Cut, cut_model, cut_of, cut_tensor, informative, relative_error


class Net(nn.Module):
    """A few modules by name and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def chain() -> nn.Sequential:
    """One group of 6 units."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


KEEP = torch.tensor([True, False, True, True, False, False])


def half(structure: nas_gate.Structure, seed: int = 0) -> Tensor:
    keep = torch.rand(structure.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[[g.start for g in structure.groups]] = True
    return keep


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = snapshot(model)
    return after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def attach_chain() -> GatedModel:
    return nas_gate.attach(chain(), images()[:1])


# --- the result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "cifar_mobilenet_v2"])
def test_the_input_model_is_not_touched(name: str) -> None:
    x = images(1) if name == "digits_cnn" else torch.randn(1, 3, 16, 16)
    model = models.build(name).train()
    gated = nas_gate.attach(model, x)
    next(gated.model.parameters()).grad = torch.ones_like(next(gated.model.parameters()))
    before, original, pointers = snapshot(gated), snapshot(model), [p.data_ptr() for p in gated.parameters()]
    random = torch.get_rng_state()
    nas_gate.remove(gated, target=0.4)
    assert unchanged(gated, before)
    assert unchanged(model, original)
    assert [p.data_ptr() for p in gated.parameters()] == pointers
    assert next(gated.model.parameters()).grad is not None
    assert all(m.training for m in gated.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_result_is_a_plain_module_that_stands_alone() -> None:
    gated = attach_chain()
    small = nas_gate.remove_with_proof(gated, KEEP).model
    assert [type(m) for m in small.modules()] == [type(m) for m in chain().modules()]
    assert list(small.state_dict()) == list(chain().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in small.modules())
    assert {p.data_ptr() for p in small.parameters()}.isdisjoint(p.data_ptr() for p in gated.parameters())
    assert all(p.grad is None and p.is_leaf for p in small.parameters())


def test_hooks_and_attributes_of_the_user_stay() -> None:
    model = chain()
    model.note = {"made": "by me"}
    model[0].register_forward_hook(lambda m, args, out: out + 0)
    small = nas_gate.remove_with_proof(nas_gate.attach(model, images()[:1]), KEEP).model
    assert small.note == model.note
    assert len(small[0]._forward_hooks) == 1


def test_the_kept_slots_are_those_of_the_keep() -> None:
    model, removed = chain(), nas_gate.remove_with_proof(attach_chain(), KEEP)
    index = KEEP.nonzero().flatten()
    small = removed.model
    assert torch.equal(small[0].weight, model[0].weight[index])
    assert torch.equal(small[0].bias, model[0].bias[index])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(small[1], name), getattr(model[1], name)[index])
    assert torch.equal(small[3].weight, model[3].weight[:, index])
    assert torch.equal(small[3].bias, model[3].bias)


def test_the_record_by_hand() -> None:
    removed = nas_gate.remove_with_proof(attach_chain(), KEEP)
    assert removed.macs == 3 * 3 * 9 * 36 + 3 * 4 * 9 * 16
    assert removed.params == (3 * 3 * 9 + 3) + 2 * 3 + (3 * 4 * 9 + 4)
    assert 0 <= removed.max_relative_error < 1e-5
    assert torch.equal(removed.keep, KEEP)
    assert removed.cut.slots["0.weight"] == {0: (0, 2, 3)}
    assert removed.cut.slots["3.weight"] == {1: (0, 2, 3)}
    assert removed.cut.slots.keys() == {
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight")
    }


def test_keeping_all_is_a_copy() -> None:
    gated = attach_chain()
    removed = nas_gate.remove_with_proof(gated, torch.ones(6, dtype=torch.bool))
    assert removed.cut == Cut({}, {})
    assert unchanged(removed.model, snapshot(gated.model))
    assert removed.max_relative_error == 0


def test_trains_exports_and_copies_like_any_module() -> None:
    small = nas_gate.remove(attach_chain(), target=0.5).train()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    first = small(images()).square().mean()
    first.backward()
    optimiser.step()
    assert small(images()).square().mean().item() < first.item()
    assert torch.equal(copy.deepcopy(small).eval()(images()), small.eval()(images()))
    exported = torch.export.export(small.eval(), (images(),)).module()
    torch.testing.assert_close(exported(images()), small(images()))


@pytest.mark.parametrize("at_once", [0, removal.AT_ONCE])
def test_a_cut_tensor_is_its_kept_rectangle(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "AT_ONCE", at_once)
    tensor = torch.arange(4 * 5 * 3 * 2).reshape(4, 5, 3, 2)
    for slots in (
        {},
        {0: [1, 3]},
        {1: [0, 2, 4]},
        {0: [2], 1: [0, 4]},
        {1: [1, 2], 3: [0]},
        {0: [3], 2: [0, 2], 3: [1]},
    ):
        kept = np.ix_(*(slots.get(dim, range(size)) for dim, size in enumerate(tensor.shape)))
        new = cut_tensor(tensor, slots)
        assert torch.equal(new, torch.from_numpy(tensor.numpy()[kept]))
        assert new.data_ptr() != tensor.data_ptr()


class Tied(nn.Module):
    """One weight as an embedding's table, in a layer, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.mix(self.embed(x)))
        return self.out(y) + y @ self.out.weight.t()


@pytest.mark.parametrize("wide", [0, removal.WIDE])
@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 5)),
        (Tied(), torch.arange(6).reshape(2, 3)),
        (
            nn.Sequential(nn.Linear(5, 12), nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)),
            torch.randn(2, 4, 5),
        ),
    ],
)
def test_a_closed_model_computes_what_the_gated_one_does(
    model: nn.Module, example: torch.Tensor, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "WIDE", wide)
    gated = nas_gate.attach(model.eval(), example)
    keep = half(gated.structure)
    gated.gates.weight.data = torch.where(keep, 1.0, -1.0)
    before = snapshot(model)
    with torch.no_grad(), removal.plain_operations(), removal.closed(model, gated.structure, keep) as closed:
        got = closed(example)
    torch.testing.assert_close(got, gated(example).detach())
    assert unchanged(model, before)


class Aliased(nn.Module):
    """Reads a weight under a name that no replacement of parameters reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.weights = [self.last.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.relu(self.first(x)), self.weights[0], self.last.bias)


def test_a_weight_that_gates_do_not_reach_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"at least one removable unit.*must compute what the gated one does"):
        nas_gate.attach(Aliased(), torch.randn(1, 6))


def test_precision_that_was_set_by_either_way_is_put_back() -> None:
    """In processes of their own: PyTorch refuses to mix the two ways for good."""
    script = """
        import sys, torch, nas_gate
        from torch import backends, nn
        exec(sys.argv[1])
        parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
        before = [part.fp32_precision for part in parts]
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        assert len(nas_gate.remove(nas_gate.attach(model, torch.randn(1, 6)), target=0.5)[0].weight) == 8
        assert [part.fp32_precision for part in parts] == before
        assert "tf32" in before
    """
    for setting in ("backends.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('high')"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), setting], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["densenet40", "cifar_supernet"])
def test_tensors_of_ours_do_not_follow_the_default_device(name: str) -> None:
    """As where torch.set_default_device("cuda") holds, and the model is still on the processor."""
    model, example = models.build(name).eval(), torch.randn(1, 3, 16, 16)
    with torch.device("meta"):
        gated = nas_gate.attach(model, example, depth=True)
        nas_gate.spread_gates(gated)
        nas_gate.penalty(gated, target=0.5).backward()
        removed = nas_gate.remove_with_proof(gated, nas_gate.land(gated, target=0.6))
    assert removed.macs <= 0.6 * gated.cost.total()


def test_random_states_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    model, example = chain(), torch.randn(1, 3, 8, 8)  # which take from them
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    nas_gate.remove(nas_gate.attach(model, example), target=0.5)
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)


# --- types and attributes -----------------------------------------------------------------------------------


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def check_against_fresh(small: nn.Module, fresh: nn.Module) -> None:
    """Every attribute of the removed model's modules is that of a model built at that size."""
    for (path, got), wanted in zip(small.named_modules(), fresh.modules()):
        assert type(got) is type(wanted), path
        for key, value in vars(wanted).items():
            if not key.startswith("_") and key not in ("training", "run"):
                assert getattr(got, key) == value, f"{path}.{key}"
    for (name, a), b in zip(small.state_dict().items(), fresh.state_dict().values()):
        assert a.shape == b.shape, name
    got, wanted = (repr(m) for m in (small, fresh))
    assert got == wanted


def convolution(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, c, 3), nn.PReLU(c), nn.BatchNorm2d(c), nn.Conv2d(c, 4, 1), head(4))


def depthwise(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, c, 1), nn.Conv2d(c, c, 3, groups=c, bias=False), nn.ReLU(), head(c))


def depth_multiplier(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, c, 1), nn.Conv2d(c, 3 * c, 3, groups=c), nn.ReLU(), head(3 * c))


def grouped(c: int) -> nn.Module:
    """Two groups: units are pairs, one channel in either."""
    return nn.Sequential(nn.Conv2d(3, c, 1), nn.Conv2d(c, 4, 3, groups=2), head(4))


def transposed(c: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, c, 2, stride=2), nn.ConvTranspose2d(c, 4, 2), head(4))


def depthwise_transposed(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, c, 1), nn.ConvTranspose2d(c, c, 2, groups=c), nn.ReLU(), head(c))


def linear(c: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, 5))


def instance_norm(c: int) -> nn.Module:
    """Without parameters of its own: only its attribute tells the width."""
    return nn.Sequential(nn.Conv2d(3, c, 3), nn.InstanceNorm2d(c), nn.ReLU(), head(c))


@pytest.mark.parametrize(
    ("build", "dense", "left"),
    [
        (convolution, 6, 4),
        (depthwise, 6, 4),
        (depth_multiplier, 6, 4),
        (grouped, 8, 4),
        (transposed, 6, 4),
        (depthwise_transposed, 6, 4),
        (linear, 6, 4),
        (instance_norm, 6, 4),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:num_features")
def test_modules_are_what_they_would_be_if_built_at_that_size(build: Callable, dense: int, left: int) -> None:
    gated = nas_gate.attach(build(dense), images()[:1])
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    group = gated.structure.groups[0]
    keep[group.start : group.start + round(group.size * (1 - left / dense))] = False
    removed = nas_gate.remove_with_proof(gated, keep)
    check_against_fresh(removed.model, build(left))
    assert removed.model.eval()(images()).shape == (2, 5)


def test_embedding() -> None:
    def build(c: int) -> nn.Module:
        return Net(lambda m, x: m.out(m.table(x).mean(1)), table=nn.Embedding(11, c), out=nn.Linear(c, 2))

    gated = nas_gate.attach(build(6), torch.randint(11, (1, 4)))
    removed = nas_gate.remove_with_proof(gated, KEEP)
    check_against_fresh(removed.model, build(3))


def test_a_users_own_module_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.scale = nn.Parameter(torch.rand(width))

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == self.width
            return x.flatten(2) * self.scale.view(1, -1, 1)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 3), Scaled(6), nn.Conv1d(6, 4, 1))

    assert nas_gate.analyze(build(), images()[:1]).units == 0, "its forward fails with a width that is not mended"

    def mend(new: Scaled, old: Scaled, width: int | None) -> None:
        assert old.width == 6
        new.width = len(new.scale)

    monkeypatch.setitem(nas_gate.MENDS, Scaled, mend)
    removed = nas_gate.remove_with_proof(nas_gate.attach(build(), images()[:1]), KEEP)
    assert removed.model[1].width == 3


# --- flags, modes, sharing ----------------------------------------------------------------------------------


def test_requires_grad_is_preserved() -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    small = nas_gate.remove_with_proof(nas_gate.attach(model, images()[:1]), KEEP).model
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"0.weight", "1.bias"}


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_preserved(training: bool) -> None:
    model = chain().train(training)
    model[1].train(not training)
    small = nas_gate.remove_with_proof(nas_gate.attach(model, images()[:1]), KEEP).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


def test_shared_tensors_stay_shared() -> None:
    b, c = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
    c.weight = b.weight
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), b, norm, nn.ReLU(), c, norm, nn.Conv2d(6, 2, 1))
    gated = nas_gate.attach(model, images()[:1])
    removed = nas_gate.remove_with_proof(gated, half(gated.structure))
    small = removed.model
    assert small[1].weight is small[4].weight
    assert small[2] is small[5]
    assert small[1].weight.shape[0] < 6
    assert removed.params == sum(p.numel() for p in small.parameters())


def test_dtype_and_memory_format_stay() -> None:
    model = chain().double().to(memory_format=torch.channels_last)
    small = nas_gate.remove_with_proof(nas_gate.attach(model, images()[:1].double()), KEEP).model
    assert {p.dtype for p in small.parameters()} == {torch.float64}


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_keep_that_empties_a_group() -> None:
    with pytest.raises(
        ValueError, match=r"at least one unit of every group must be kept, of some more, but kept are 0 of 0 "
    ):
        nas_gate.remove_with_proof(attach_chain(), torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        (torch.ones(6), r"torch.float32 of shape \(6,\)"),
        (torch.ones(6, dtype=torch.uint8), r"torch.uint8 of shape \(6,\)"),
        (torch.ones(5, dtype=torch.bool), r"torch.bool of shape \(5,\)"),
        (torch.ones(6, 1, dtype=torch.bool), r"torch.bool of shape \(6, 1\)"),
    ],
)
def test_a_keep_of_the_wrong_dtype_or_shape(keep: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=f"keep must be boolean with one entry for each of 6 units, but is {found}"):
        nas_gate.remove_with_proof(attach_chain(), keep)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"9.weight": {0: (0,)}}, "'9.weight', but Sequential has no such parameter or buffer"),
        ({"0.weight": {0: (0, 6)}}, r"dimension 0 of '0.weight' with slots up to 6, and its shape is \(6, 3, 3, 3\)"),
        ({"0.weight": {4: (0,)}}, "dimension 4 of '0.weight'"),
        ({"0.weight": {0: (-1, 2)}}, "must keep slots that exist"),
        ({"0.weight": {0: ()}}, "slots up to None"),
    ],
)
def test_a_cut_that_does_not_fit(slots: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_model(chain(), Cut(slots, {}))


# --- the proof ----------------------------------------------------------------------------------------------


def shifted(tensor: Tensor, slots: dict[int, tuple[int, ...]]) -> Tensor:
    """A wrong cut: as many slots, but each the next one along dimension 1."""
    wrong = {d: tuple((i + 1) % tensor.shape[d] for i in index) if d == 1 else index for d, index in slots.items()}
    return cut_tensor(tensor, wrong)


def test_the_proof_finds_wrong_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = attach_chain()
    monkeypatch.setattr(removal, "cut_tensor", shifted)
    with pytest.raises(RemovalError, match=r"must compute what the gated one does, but .* \(allowed: 1e-05\)"):
        nas_gate.remove_with_proof(gated, KEEP)


def assert_wrong_cut_is_found(gated: GatedModel, keep: Tensor, name: str, patch: pytest.MonkeyPatch) -> None:
    """Let the removed model keep other slots of one tensor than its record says."""
    shape = gated.model.state_dict()[name].shape
    slots = cut_of(gated.structure, keep).slots[name]
    wrong = {d: tuple((i + 1) % shape[d] for i in index) for d, index in slots.items()}

    def cut_wrongly(model: nn.Module, cut: Cut) -> nn.Module:
        return cut_model(model, Cut({**cut.slots, name: wrong}, cut.widths))

    patch.setattr(removal, "cut_model", cut_wrongly)
    with pytest.raises(RemovalError, match="must compute what the gated one does"):
        nas_gate.remove_with_proof(gated, keep)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight"])
def test_the_proof_finds_one_wrong_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_wrong_cut_is_found(attach_chain(), KEEP, name, monkeypatch)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_the_proof_sees_through_fresh_norms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure that gives a norm's slots to wrong units shows only where the slots' values differ."""
    gated = attach_chain()
    assert getattr(gated.model[1], name).unique().numel() == 1
    structure = gated.structure
    slots = [replace(s, units=s.units[::-1].copy()) if s.tensor == f"1.{name}" else s for s in structure.slots]
    gated.structure = replace(structure, slots=tuple(slots))
    with pytest.raises(RemovalError, match="must compute what the gated one does"):
        nas_gate.remove_with_proof(gated, KEEP)
    monkeypatch.setattr(removal, "informative", lambda model: {})
    nas_gate.remove_with_proof(gated, KEEP)


def zero_branch() -> nn.Module:
    """A residual branch whose last norm starts at zero, as torchvision's `zero_init_residual` and LayerScale do."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(branch[3].weight)
    return Net(
        lambda m, x: m.out(F.relu(m.stem(x) + m.branch(m.stem(x)))),
        stem=nn.Conv2d(3, 4, 1),
        branch=branch,
        out=nn.Conv2d(4, 2, 1),
    )


def test_the_proof_sees_into_a_branch_that_starts_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = nas_gate.attach(zero_branch(), images()[:1])
    group = next(g for g in gated.structure.groups if g.size == 6)
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    keep[group.start + 1 : group.start + 4] = False
    assert_wrong_cut_is_found(gated, keep, "branch.2.weight", monkeypatch)
    monkeypatch.setattr(removal, "informative", lambda model: {})
    nas_gate.remove_with_proof(gated, keep)  # so it would have been hidden


def test_constant_tensors_become_informative() -> None:
    model = zero_branch()
    random = informative(model)
    assert {n.rpartition(".")[0] for n in random} == {"branch.3"}
    assert random.keys() == {f"branch.3.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    for name, value in random.items():
        assert value.unique().numel() == 4, name
    assert bool((random["branch.3.running_var"] > 0).all())


def test_the_proof_restores_the_model_when_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = attach_chain()
    gated.train()
    before, pointers = snapshot(gated), [p.data_ptr() for p in gated.parameters()]
    random = torch.get_rng_state()

    def refuse(*args: Any) -> float:
        raise ZeroDivisionError

    for name, patched in (("relative_error", refuse), ("cut_tensor", shifted)):
        with monkeypatch.context() as patch:
            patch.setattr(removal, name, patched)
            with pytest.raises((ZeroDivisionError, RemovalError)):
                nas_gate.remove_with_proof(gated, KEEP)
        assert unchanged(gated, before)
        assert [p.data_ptr() for p in gated.parameters()] == pointers
        assert all(m.training for m in gated.modules())
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled()


def test_the_proof_restores_the_model_when_the_small_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(new: Any, old: Any, width: int | None) -> None:
        new.groups = 2

    gated = attach_chain()
    before = snapshot(gated)
    monkeypatch.setitem(nas_gate.MENDS, nn.Conv2d, wrong)
    with pytest.raises(RemovalError, match="the smaller model fails in 0: RuntimeError: ") as caught:
        nas_gate.remove_with_proof(gated, KEEP)
    assert caught.value.path == "0"
    assert unchanged(gated, before)


def test_a_forward_pass_that_fails_half_way_restores_the_model() -> None:
    """The smaller model runs first and passes; then the gated one fails, its weights zeroed."""
    gated = attach_chain()
    before = snapshot(gated)

    def fail(module: nn.Module, args: Any) -> None:
        if len(module.weight) == 6:
            raise ConnectionError("lost")

    gated.model[0].register_forward_pre_hook(fail)
    with pytest.raises(ConnectionError, match="lost"):
        nas_gate.remove_with_proof(gated, KEEP)
    assert unchanged(gated, before)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a_cost_other_than_predicted_is_refused(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = attach_chain()

    class Dearer(nas_gate.CostModel):
        def forward(self, keep: Tensor, asked: str = "macs") -> Tensor:
            return super().forward(keep, asked) + (asked == metric)

    monkeypatch.setattr(removal, "CostModel", Dearer)
    with pytest.raises(RemovalError, match=r"must cost what was predicted, but predicted=\{.*\} and counted=\{"):
        nas_gate.remove_with_proof(gated, KEEP)


def test_a_model_that_is_not_a_number_is_refused() -> None:
    gated = attach_chain()
    with torch.no_grad():
        gated.model[3].weight[:] = float("nan")
    with pytest.raises(RemovalError, match="largest relative error is nan in float64"):
        nas_gate.remove_with_proof(gated, KEEP)


def test_random_models_need_no_seed_to_agree() -> None:
    """Dropout that is on in evaluation mode, too: both models draw the same."""
    model = Net(
        lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))) + torch.randn(len(x), 4), a=nn.Conv2d(3, 6, 1), b=nn.Linear(6, 4)
    )
    gated = nas_gate.attach(model, images()[:1])
    assert nas_gate.remove_with_proof(gated, KEEP).max_relative_error < 1e-5


# --- gated = removed, from outside --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20", "cifar_mobilenet_v2"])
def test_gated_equals_removed_after_training(name: str) -> None:
    """With statistics and weights that a training step has moved, on inputs that the proof has not seen."""
    torch.manual_seed(0)
    shape = (1, 8, 8) if name == "digits_cnn" else (3, 16, 16)
    gated = nas_gate.attach(models.build(name), torch.randn(1, *shape))
    optimiser = torch.optim.SGD(gated.weight_parameters(), lr=0.01)
    F.cross_entropy(gated.train()(torch.randn(8, *shape)), torch.arange(8)).backward()
    optimiser.step()
    keep = half(gated.structure)
    with torch.no_grad():
        gated.gates.weight.copy_(keep.float() - 0.5)
    removed = nas_gate.remove_with_proof(gated, keep)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected, got = gated.eval()(x), removed.model.eval()(x)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        removed.model(x)
    assert counter.get_total_flops() == 2 * 4 * removed.macs


# --- relative error -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]), 0.25),
        (torch.zeros(2), torch.tensor([0.0, 0.5]), 0.5),
        (torch.zeros(2), torch.zeros(2), 0.0),
        (torch.zeros(0), torch.zeros(0), 0.0),
        ((torch.ones(2), torch.full((2,), 2.0)), (torch.ones(2), torch.ones(2)), 0.5),
        ({"a": [torch.ones(2)], "n": 1}, {"a": [torch.ones(2) * 3], "n": 1}, 2.0),
        (torch.tensor([3 + 4j]), torch.tensor([3 + 3j]), 0.25),
        (torch.tensor([2, 4]), torch.tensor([2, 5]), 0.25),
        (torch.tensor([True, True]), torch.tensor([True, False]), 1.0),
        (torch.ones(2), torch.ones(3), np.inf),
        (torch.ones(2), torch.ones(2, 1), np.inf),
        (torch.ones(2), (torch.ones(2), torch.ones(2)), np.inf),
    ],
)
def test_relative_error_by_hand(a: Any, b: Any, expected: float) -> None:
    assert relative_error(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_relative_error_of_what_is_not_finite(value: float) -> None:
    ones, strange = torch.ones(2), torch.tensor([1.0, value])
    for a, b in ((strange, ones), (ones, strange), (strange, strange), ((ones, strange), (ones, ones))):
        assert np.isnan(relative_error(a, b))


def test_relative_error_of_bfloat16_is_taken_in_float64() -> None:
    a, b = torch.tensor([256.0]).bfloat16(), torch.tensor([258.0]).bfloat16()
    assert relative_error(a, b) == 2 / 256


# --- layer norms over units ---------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Residual tokens: a branch whose last norm starts at zero, and layer norms over the 8 units of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.before = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 10), nn.PReLU(10), nn.Linear(10, 8)
        self.scale = nn.BatchNorm1d(8)
        nn.init.zeros_(self.scale.weight)
        self.after, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.after(x + self.scale(self.down(self.act(self.up(self.before(x)))))))


def attach_tokens() -> tuple[GatedModel, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    gated = nas_gate.attach(Tokens(), x)
    assert sorted(g.size for g in gated.structure.groups) == [8, 10]
    keep = torch.ones(gated.structure.units, dtype=torch.bool)
    for group in gated.structure.groups:
        keep[group.start + 1 : group.start + 6] = False
    return gated, keep, x


def test_layer_norms_are_plain_and_of_the_kept_size() -> None:
    gated, keep, _ = attach_tokens()
    small = nas_gate.remove_with_proof(gated, keep).model
    for norm in (small.before, small.after):
        assert type(norm) is nn.LayerNorm
        assert (norm.normalized_shape, tuple(norm.weight.shape)) == ((3,), (3,))
        assert norm.state_dict().keys() == {"weight", "bias"}
        assert not [a for a in dir(norm) if a.startswith("kept")]


@pytest.mark.parametrize("fails", [False, True])
def test_layer_norms_are_restored_by_the_proof(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, keep, x = attach_tokens()
    model = Tokens()
    kinds = [type(m) for m in model.modules()]
    before = snapshot(model)

    def refuse(module: nn.Module, args: Any) -> None:
        if hasattr(model.after, "kept"):  # the gated run
            raise ConnectionError("lost")

    if fails:
        model.head.register_forward_pre_hook(refuse)
        with pytest.raises(ConnectionError, match="lost"):
            removal.remove_units(model, gated.structure, keep, (x,), {})
    else:
        removal.remove_units(model, gated.structure, keep, (x,), {})
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model.after, "kept")
    assert unchanged(model, before)


def test_every_wrong_cut_is_found() -> None:
    """Each dimension of each tensor in turn keeps as many slots, but others; all norms are fresh, one is zero."""
    gated, keep, x = attach_tokens()
    structure, model = gated.structure, Tokens()
    right = cut_of(structure, keep)
    passed = []
    for slots in structure.slots:
        kept, size = right.slots[slots.tensor][slots.dim], len(slots.units)
        wrong = tuple(sorted((i + 1) % size for i in kept))
        cut = Cut({**right.slots, slots.tensor: {**right.slots[slots.tensor], slots.dim: wrong}}, right.widths)
        trial = removal.try_cut(model, structure, cut, keep, (x,), {})
        if not trial.error > removal.TOLERANCE:
            passed.append(f"{slots.tensor}:{slots.dim}")
    assert len(structure.slots) == 18
    assert passed == []
    trial = removal.try_cut(model, structure, right, keep, (x,), {})
    assert trial.error < 1e-6


def test_rounding_is_told_from_a_wrong_cut() -> None:
    """An output that magnifies rounding is equal in float64; a weak branch that is cut wrongly is not."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 512), nn.ReLU(), nn.Linear(512, 8))
    chaotic = nas_gate.attach(Net(lambda self, x: torch.sin(1e6 * self.inner(x)), inner=inner), images())
    keep = half(chaotic.structure)
    removed = nas_gate.remove_with_proof(chaotic, keep)
    with torch.no_grad():
        chaotic.gates.weight.copy_(torch.where(keep, 1.0, -1.0))
        assert relative_error(chaotic.eval()(images()), removed.model.eval()(images())) > removal.TOLERANCE
    assert 0 < removed.max_relative_error < 1e-6

    weak = Net(lambda self, x: self.outer(x) + 5e-5 * self.inner(x), inner=chain(), outer=nn.Conv2d(3, 4, 5))
    structure = nas_gate.analyze(weak, images())
    keep = torch.ones(structure.units, dtype=torch.bool)
    group = next(g for g in structure.groups if g.size == 6)
    keep[group.start : group.stop] = KEEP
    cut = cut_of(structure, keep)
    name = "inner.3.weight"
    wrong = Cut({**cut.slots, name: {1: (0, 1, 2)}}, cut.widths)
    trial = removal.try_cut(weak, structure, wrong, keep, (images(),), {})
    assert removal.DOUBT < trial.error < removal.TOLERANCE
    with pytest.raises(RemovalError, match=r"in float64 \(allowed: 1e-05\)"):
        removal.check(trial)


def test_a_model_that_makes_float32_numbers_is_judged_in_float32() -> None:
    """float64 cannot tell there, so the doubt stays one."""
    model = Net(lambda self, x: torch.sin(3e3 * self.inner(x).float()), inner=chain())
    structure = nas_gate.analyze(model, images())
    trial = removal.try_cut(model, structure, Cut({}, {}), KEEP, (images(),), {})
    assert trial.exact is None
    assert trial.error > removal.TOLERANCE  # nothing was cut, so they differ


# --- what a user's modules do besides computing -------------------------------------------------------------


class Keeps(nn.Module):
    """Changes its input in place, gives itself a new buffer, and keeps what it has computed in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.kept = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3), []
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.sub_(0.5).div_(0.3)).relu()
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        self.kept = [hidden, {"again": hidden}]
        return self.last(hidden)


def test_inputs_buffers_and_kept_activations_are_no_obstacle() -> None:
    model, x = Keeps(), torch.rand(1, 2, 8, 8)
    before, buffer = x.clone(), model.mean
    gated = nas_gate.attach(model, x)
    assert torch.equal(x, before)
    assert model.mean is buffer
    assert float(buffer) == 0
    gated(x.clone()).sum().backward()
    small = nas_gate.remove(gated, 0.6)
    assert small.first.out_channels < 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast_while_gated_is_removed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    gated = nas_gate.attach(model, torch.rand(1, 2, 8, 8)).to(dtype)
    small = nas_gate.remove(gated, 0.6)
    assert small(torch.rand(1, 2, 8, 8, dtype=dtype)).dtype == dtype


class Noisy(nn.Module):
    """Noise of a fixed width, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if self.training:
            hidden = hidden + 0.1 * torch.randn(8)
        return self.last(self.second(hidden).relu())


def test_what_fails_in_training_mode_is_fixed() -> None:
    structure = nas_gate.analyze(Noisy(), torch.rand(3, 4))
    assert [(group.name, group.size) for group in structure.groups] == [("second", 8)]


class WantsTargets(nn.Module):
    """In training mode it gives a loss, which needs more than its example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        out = self.last(self.first(x).relu())
        if self.training:
            assert wanted is not None
            return (out - wanted).square().mean()
        return out


def test_a_model_that_wants_targets_in_training_is_cut_all_the_same() -> None:
    assert [group.size for group in nas_gate.analyze(WantsTargets(), torch.rand(3, 4)).groups] == [8]


class Attends(nn.Module):
    """Attention whose scale is the second number of its forward in training mode, and the first in evaluation mode."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.first:
            x = x + torch.ones_like(x) * 0.01
        batch, length, width = x.shape
        q, k, v = (m(x).view(batch, length, 4, -1).transpose(1, 2) for m in (self.query, self.key, self.value))
        weights = ((q * (width // 4) ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("first", [False, True])
def test_a_factor_is_never_corrected_in_another_ones_place(first: bool) -> None:
    """Cut, its width is not four times that of a head, by which the scale must go on, whatever comes before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), Attends(first), nn.Linear(32, 4))
    x = torch.randn(1, 10, 8)
    gated = nas_gate.attach(model, x)
    assert [group.size for group in gated.structure.groups] == [32, 4, 32]
    keep = nas_gate.land(gated, 0.6)
    small = nas_gate.remove_with_proof(gated, keep).model
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 1.0, -1.0))
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(x), gated.train(training)(x), rtol=1e-4, atol=1e-5)


class Mixes(nn.Module):
    """A product of matrices, written as torch.einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(4, 6), nn.Parameter(torch.rand(6, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.head(torch.einsum("bc,cd->bd", self.stem(x), self.mix))
        return mixed


@pytest.mark.parametrize("channels", [1, 2])
def test_a_width_of_one_may_cost_less_than_predicted(channels: int) -> None:
    """Over one channel torch.einsum multiplies element by element, which is not counted: 2 rows x 1 x 5 less."""
    torch.manual_seed(0)
    gated = nas_gate.attach(Mixes(), torch.rand(2, 4))
    keep = torch.ones(11, dtype=torch.bool)
    keep[channels:6] = False
    mixed = 0 if channels == 1 else channels * 5
    assert nas_gate.remove_with_proof(gated, keep).macs == 2 * (4 * channels + mixed + 5 * 3)


class Routed(nn.Module):
    """An expert that sees the rows which a router gives it: how many, its weights and the data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.expert = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        rows = self.router(h)[:, 0] > 0
        y = torch.zeros(len(x), 4)
        y[rows] = self.head(self.expert(h[rows]).relu())
        return y


def test_a_cost_that_depends_on_data_is_counted_anew_and_said() -> None:
    """A router that gives the expert all rows after training makes the small model dearer, not wrong."""
    torch.manual_seed(0)
    x = torch.rand(16, 8)
    gated = nas_gate.attach(Routed(), x)
    assert [(group.name, group.size) for group in gated.structure.groups] == [("stem", 16), ("expert", 32)]
    with torch.no_grad():
        gated.model.router.weight.fill_(1)
        gated.model.router.bias.fill_(1)
    keep = torch.ones(48, dtype=torch.bool)
    keep[:4] = False
    keep[16:24] = False
    expected = 16 * (8 * 12 + 12 * 1 + 12 * 24 + 24 * 4)
    with pytest.warns(UserWarning, match=rf"Routed depend on its data: \d+ were predicted .*, {expected} are those"):
        removed = nas_gate.remove_with_proof(gated, keep)
    assert removed.macs == expected
    assert removed.params == sum(p.numel() for p in removed.model.parameters())
