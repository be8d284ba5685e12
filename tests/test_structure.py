"""One small network for every operation and pattern: each is removed and equal, or fixed with the reason.

`CASES` states by hand, for every network, the groups with their numbers of units, how many slots a unit has in some
tensors, and the reasons of what is fixed. One checker then holds every network to the same promises, in float64, so
that a wrong cut cannot hide behind rounding.
"""

import copy
import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d, roi_align, roi_pool

import nas_gate
from nas_gate.models.cifar import ZeroPadShortcut
from nas_gate.structure import rules

# --- building blocks ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Modules, parameters and sizes by name, and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def head(i: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 5))


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.3)


def between(operation: Callable[[Tensor], Tensor], out: int = 8, taken: int | None = None) -> Net:
    """conv `a` (3 to `out`), the operation, conv `b` (`taken` to 6), head `h`."""
    return Net(
        lambda self, x: self.h(F.relu(self.b(operation(self.a(x))))), a=conv(3, out), b=conv(taken or out, 6), h=head(6)
    )


# --- the checker --------------------------------------------------------------------------------------------


def tensors(out: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(out, Tensor):
        return [out]
    if dataclasses.is_dataclass(out):
        return tensors([getattr(out, f.name) for f in dataclasses.fields(out)])
    if isinstance(out, Mapping):
        return tensors(list(out.values()))
    return [t for part in out or () for t in tensors(part)] if isinstance(out, (list, tuple)) else []


def distance(a: Any, b: Any) -> float:
    """The largest difference relative to the largest value."""
    left, right = tensors(a), tensors(b)
    assert [t.shape for t in left] == [t.shape for t in right]
    assert left
    return max(float(((x - y).abs().max() / x.abs().max().clamp(min=1e-12)).detach()) for x, y in zip(left, right))


def informative(model: nn.Module) -> nn.Module:
    """No tensor at its initial constant: a zero branch or a fresh norm would hide a wrong cut."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean") or (
                t.numel() > 1 and t.is_floating_point() and (t == t.flatten()[0]).all()
            ):
                t.copy_(t + torch.randn(t.shape, generator=generator) * 0.3)
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return state, {n: (m.training, type(m)) for n, m in model.named_modules()}


def double(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )


def random_keep(structure: nas_gate.Structure, seed: int) -> Tensor:
    """Every unit by a coin, and one of every group for certain."""
    generator = np.random.default_rng(seed)
    keep = generator.random(structure.units) < 0.5
    for group in structure.groups:
        keep[generator.integers(group.start, group.stop)] = True
    return torch.from_numpy(keep)


def close(gated: nas_gate.GatedModel, keep: Tensor) -> None:
    """Set the gate weights so that exactly `keep` is open."""
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 1.0, -1.0))
    assert torch.equal(gated.keep().detach(), keep.to(gated.gates.weight.dtype))


def macs(model: nn.Module, args: Any, kwargs: Any) -> int:
    # fused attention is not counted on every backend, its matrix products are
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


def train_one_step(model: nn.Module, args: Any, kwargs: Any) -> None:
    model = copy.deepcopy(model).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learned]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    sum(t.square().mean() for t in tensors(model(*args, **kwargs)) if t.requires_grad).backward()
    optimizer.step()
    assert any(not torch.equal(p, b) for p, b in zip(learned, before))
    assert all(bool(p.isfinite().all()) for p in learned)


def verify(model: nn.Module, args: Any = (), kwargs: Any = None, trials: int = 3) -> nas_gate.GatedModel:
    """The promises that every network with at least one group keeps."""
    args, kwargs = double((args if isinstance(args, tuple) else (args,), kwargs or {}))
    model = informative(model.double())
    before = snapshot(model)
    gated = nas_gate.attach(model, args, kwargs)
    structure, tolerance = gated.structure, 1e-12 if not gated.structure.norms else 1e-6
    for training in (True, False):
        model.train(training), gated.train(training)
        torch.manual_seed(0)
        expected = copy.deepcopy(model)(*args, **kwargs)
        torch.manual_seed(0)
        got = copy.deepcopy(gated)(*args, **kwargs)
        if structure.norms:
            assert distance(expected, got) < 1e-6
        else:
            assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(got)))
    for seed in range(trials):
        keep = random_keep(structure, seed)
        removed = nas_gate.remove_with_proof(gated, keep)
        close(gated, keep)
        small = removed.model.eval()
        assert type(small) is type(model)
        assert small.state_dict().keys() == model.state_dict().keys()
        assert distance(gated(*args, **kwargs), small(*args, **kwargs)) < tolerance
        assert removed.max_relative_error < tolerance
        assert removed.macs == round(gated.cost(keep).item()) == macs(small, args, kwargs)
        numel = sum(p.numel() for p in small.parameters())
        assert removed.params == round(gated.cost(keep, "params").item()) == numel
        assert numel < sum(p.numel() for p in model.parameters()) or bool(keep.all())
        train_one_step(small, args, kwargs)
    after = snapshot(model.train())
    assert after[1] == before[1]
    assert all(torch.equal(after[0][n], t) for n, t in before[0].items())
    return gated


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what must come out.

    `groups`: units by group name, all groups. `slots`: slots that a unit of the group has in "tensor:dim".
    `fixed`: what the reason for "tensor:dim" says.
    """

    build: Callable[[], nn.Module]
    inputs: Any
    groups: Mapping[str, int]
    slots: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(
    groups: Mapping[str, int],
    slots: Mapping[str, Mapping[str, int]] | None = None,
    fixed: Mapping[str, str] | None = None,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        given = image() if inputs is None else inputs
        CASES[build.__name__] = Case(build, given, groups, slots or {}, fixed or {}, kwargs or {})
        return build

    return add


OUTPUT = "it is an output of the model"
INPUT = "it is an input of the model"

# couplings


@case({"0": 8, "2": 6}, slots={"0": {"0.weight:0": 1, "0.bias:0": 1, "2.weight:1": 1}}, fixed={"3.2.weight:0": OUTPUT})
def chain():
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), head(6))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "b.weight:0": 1, "b.weight:1": 1, "h.2.weight:1": 1}})
def residual_add():
    return Net(lambda s, x: s.h((y := s.a(x)) + s.b(F.relu(y))), a=conv(3, 8), b=conv(8, 8), h=head(8))


@case({"a": 8}, fixed={"b.weight:0": f"aten.add joins it with a tensor that has no units there ({INPUT})"})
def residual_to_the_input():
    return Net(lambda s, x: s.h(x + s.b(F.relu(s.a(x)))), a=conv(3, 8), b=conv(8, 3), h=head(3))


@case(
    {"a": 6, "b": 4, "c": 5}, slots={"a": {"a.weight:0": 1, "c.weight:1": 1}, "b": {"b.weight:0": 1, "c.weight:1": 1}}
)
def concatenation():
    return Net(
        lambda s, x: s.h(s.c(torch.cat([s.a(x), s.b(x)], 1))), a=conv(3, 6), b=conv(3, 4), c=conv(10, 5), h=head(5)
    )


@case({"a": 6}, slots={"a": {"b.weight:0": 1, "h.2.weight:1": 1}})
def concatenation_over_height():
    return Net(lambda s, x: s.h(torch.cat([s.a(x), s.b(x)], 2)), a=conv(3, 6), b=conv(3, 6), h=head(6))


@case({"a": 6}, fixed={"h.2.weight:1": "joins it with a tensor that has no units there"})
def concatenation_with_the_input():
    return Net(lambda s, x: s.h(torch.cat([x, s.a(x)], 1)), a=conv(3, 6), h=head(9))


@case({"a": 8, "b": 6, "c": 4}, slots={"a": {"c.weight:1": 1, "b.weight:1": 1, "d.weight:1": 1}})
def dense_connections():
    def forward(s, x):
        first = s.a(x)
        second = torch.cat([first, s.b(first)], 1)
        return s.h(s.c(second) + s.d(second))

    return Net(forward, a=conv(3, 8), b=conv(8, 6), c=conv(14, 4), d=conv(14, 4), h=head(4))


@case({"a": 8, "d": 4}, slots={"d": {"d.weight:0": 1, "u.weight:1": 1}, "a": {"u.weight:0": 1, "d.weight:1": 1}})
def squeeze_excitation():
    def forward(s, x):
        y = s.a(x)
        return s.h(y * s.u(F.relu(s.d(F.adaptive_avg_pool2d(y, 1)))).sigmoid())

    return Net(forward, a=conv(3, 8), d=conv(8, 4, 1), u=conv(4, 8, 1), h=head(8))


@case({"scale": 8}, slots={"scale": {"a.weight:0": 1, "b.weight:0": 1, "scale:0": 1, "h.2.weight:1": 1}})
def layer_scale():
    return Net(
        lambda s, x: s.h((y := s.a(x)) + s.scale * s.b(y)),
        a=conv(3, 8),
        b=conv(8, 8),
        scale=parameter(8, 1, 1),
        h=head(8),
    )


@case({"gain": 8}, slots={"gain": {"gain:1": 1, "shift:0": 1, "a.weight:0": 1}})
def raw_gain_and_expanded_shift():
    return Net(
        lambda s, x: s.h((y := s.a(x)) * s.gain + s.shift.view(1, -1, 1, 1).expand_as(y)),
        a=conv(3, 8),
        gain=parameter(1, 8, 1, 1),
        shift=parameter(8),
        h=head(8),
    )


@case({"a": 8}, slots={"a": {"b.weight:0": 1, "b.weight:1": 1}})
def module_called_twice():
    return Net(lambda s, x: s.h(s.b(F.relu(s.b(F.relu(s.a(x)))))), a=conv(3, 8), b=conv(8, 8), h=head(8))


@case({"a": 8}, slots={"a": {"b.weight:0": 1, "b.weight:1": 1, "c.bias:0": 1}})
def tied_weights():
    model = Net(lambda s, x: s.h(s.c(F.relu(s.b(s.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), h=head(8))
    model.c.weight = model.b.weight
    return model


@case({"a": 6}, inputs=rows(4, 10), slots={"a": {"a.weight:0": 1}}, fixed={"a.weight:1": INPUT})
def tied_by_transposition():
    return Net(lambda s, x: F.linear(s.a(x).relu(), s.a.weight.t()), a=nn.Linear(10, 6))


@case(
    {"w": 8, "m": 12}, inputs=torch.arange(6).view(2, 3), fixed={"e.weight:0": "aten.embedding in e looks up its rows"}
)
def tied_embedding():
    return Net(
        lambda s, i: F.linear(s.n((y := s.e(i)) + s.w(s.m(y).relu())), s.e.weight),
        e=nn.Embedding(10, 8),
        m=nn.Linear(8, 12),
        w=nn.Linear(12, 8),
        n=nn.Identity(),
    )


@case({"a": 8}, fixed={"spare.weight:0": "the example inputs do not reach it"})
def unused_module():
    return Net(lambda s, x: s.h(s.a(x)), a=conv(3, 8), spare=nn.Linear(4, 4), h=head(8))


@case({"a": 8, "aux.0": 7})
def auxiliary_head_in_training():
    def forward(s, x):
        y = s.a(x)
        return (s.h(y), s.aux(y)) if s.training else s.h(y)

    return Net(forward, a=conv(3, 8), aux=nn.Sequential(conv(8, 7), head(7)), h=head(8))


# convolutions


@case({"a": 8}, slots={"a": {"d.weight:0": 1, "d.bias:0": 1, "n.weight:0": 1, "n.running_var:0": 1, "h.2.weight:1": 1}})
def depthwise():
    return Net(lambda s, x: s.h(s.n(s.d(s.a(x)))), a=conv(3, 8), d=conv(8, 8, groups=8), n=nn.BatchNorm2d(8), h=head(8))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "d.weight:0": 3, "d.bias:0": 3, "h.2.weight:1": 3}})
def depth_multiplier():
    return Net(lambda s, x: s.h(s.d(s.a(x))), a=conv(3, 8), d=conv(8, 24, groups=8), h=head(24))


@case(
    {"a": 2, "g": 3},
    slots={"a": {"a.weight:0": 4, "g.weight:1": 1}, "g": {"g.weight:0": 4, "g.bias:0": 4, "h.2.weight:1": 4}},
)
def grouped():
    return Net(lambda s, x: s.h(s.g(s.a(x))), a=conv(3, 8), g=conv(8, 12, groups=4), h=head(12))


@case({"a": 4}, slots={"a": {"a.weight:0": 2, "g.weight:0": 2, "g.weight:1": 1, "h.2.weight:1": 2}})
def grouped_residual():
    return Net(lambda s, x: s.h((y := s.a(x)) + s.g(y)), a=conv(3, 8), g=conv(8, 8, groups=2), h=head(8))


@case({"a": 8, "t": 6}, slots={"a": {"t.weight:0": 1}, "t": {"t.weight:1": 1, "t.bias:0": 1}})
def transposed():
    return Net(lambda s, x: s.h(s.t(s.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 6, 2, stride=2), h=head(6))


@case({"a": 2, "t": 3}, slots={"a": {"t.weight:0": 4}, "t": {"t.weight:1": 1, "t.bias:0": 4, "h.2.weight:1": 4}})
def grouped_transposed():
    return Net(lambda s, x: s.h(s.t(s.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 12, 3, groups=4), h=head(12))


@case({"a": 8}, slots={"a": {"t.weight:0": 1, "t.bias:0": 1}})
def depthwise_transposed():
    return Net(lambda s, x: s.h(s.t(s.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 8, 3, groups=8), h=head(8))


@case({"a": 8}, slots={"a": {"t.weight:0": 1, "t.bias:0": 2}}, fixed={"t.weight:1": "repeats it for every channel"})
def depthwise_transposed_multiplier():
    return Net(lambda s, x: s.h(s.t(s.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 16, 3, groups=8), h=head(16))


@case({"0": 8, "3": 6}, inputs=rows(2, 3, 16), slots={"0": {"1.weight:0": 1}})
def convolutions_1d():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@case({"0": 8, "3": 6}, inputs=rows(2, 3, 6, 6, 6))
def convolutions_3d():
    return nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 1), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@case({"a": 8, "w": 6}, slots={"a": {"w:1": 1}, "w": {"w:0": 1, "h.2.weight:1": 1}})
def raw_parameter_in_convolution():
    return Net(lambda s, x: s.h(F.conv2d(s.a(x), s.w)), a=conv(3, 8), w=parameter(6, 8, 3, 3), h=head(6))


@case({}, fixed={"a.weight:0": "aten.convolution takes a weight that has no units there"})
def kernel_that_is_no_parameter():
    def forward(s, x):
        y = s.a(x)
        return s.h(F.conv2d(y, torch.arange(8.0).to(y).view(-1, 1, 1, 1), groups=y.shape[1]))

    return Net(forward, a=conv(3, 8), h=head(8))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "h.2.weight:1": 1}})
def kernel_of_one_value():
    def forward(s, x):
        y = s.a(x)
        return s.h(F.conv2d(y, torch.ones(y.shape[1], 1, 3, 3, dtype=y.dtype), groups=y.shape[1]))

    return Net(forward, a=conv(3, 8), h=head(8))


# constants that the code makes: their sizes follow what they meet


@case({"q": 4}, inputs=rows(2, 7, 6), slots={"q": {"q.weight:0": 3, "k.bias:0": 3, "v.weight:0": 3, "o.weight:1": 3}})
def attention_with_a_mask_for_each_head():
    """As many places for heads as the module's attribute says, whatever is left of them."""

    def core(q, k, v):
        mask = torch.zeros((1, 4, 7, 7), dtype=q.dtype)
        return ((q @ k.transpose(-2, -1) + mask).softmax(-1)) @ v

    return attention((-1, 3), core)


@case({"q": 4}, inputs=rows(2, 7, 6), slots={"q": {"q.weight:0": 3, "k.bias:0": 3, "v.weight:0": 3, "o.weight:1": 3}})
def attention_pooled_by_a_depthwise_convolution():
    """Heads are folded into the batch, and all take the same kernels, as in MViT."""

    def forward(s, x):
        q, k, v = (m(x).unflatten(-1, (4, 3)).transpose(1, 2) for m in (s.q, s.k, s.v))
        n, heads, places, size = q.shape
        q = s.norm(s.pool(q.transpose(2, 3).reshape(n * heads, size, places)).transpose(1, 2))
        y = (q.reshape(n, heads, -1, size) @ k.transpose(-2, -1)).softmax(-1) @ v
        return s.o(y.transpose(1, 2).flatten(2))

    linear = {name: nn.Linear(6, 12) for name in ("q", "k", "v")}
    return Net(forward, **linear, pool=nn.Conv1d(3, 3, 3, 2, 1, groups=3), norm=nn.LayerNorm(3), o=nn.Linear(12, 5))


@case(
    {"cell": 8, "b.weight": 4},
    slots={"cell": {"cell.weight:0": 1, "cell.weight:1": 1, "b.weight:1": 1}},
    inputs=rows(2, 5),
)
def state_that_begins_with_zeros():
    def forward(s, x):
        h = x.new_zeros(len(x), 8)
        for _ in range(2):
            h = s.cell(torch.cat([x, h], 1)).tanh()
        return s.b(torch.cat([h, torch.zeros(len(x), 4, dtype=x.dtype)], 1))

    return Net(forward, cell=nn.Linear(13, 8), b=nn.Linear(12, 3))


@case({"b": 6}, fixed={"a.weight:0": "aten.add joins it with a tensor that has no units there"})
def constants_of_several_values():
    return between(lambda y: y + torch.arange(8.0).to(y).view(-1, 1, 1))


# movement


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 2}})
def channel_shuffle_by_views():
    return between(shuffle)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 2}})
def channel_shuffle_module():
    return between(nn.ChannelShuffle(2))


@case({"a": 8}, slots={"a": {"l.weight:1": 16}})
def flatten_to_linear():
    return Net(lambda s, x: s.l(F.max_pool2d(s.a(x), 2).flatten(1)), a=conv(3, 8), l=nn.Linear(128, 5))


@case({"a": 8}, slots={"a": {"l.weight:1": 16}})
def channels_last_flatten_to_linear():
    return Net(
        lambda s, x: s.l(F.max_pool2d(s.a(x), 2).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 8), l=nn.Linear(128, 5)
    )


@case({"a": 8, "b": 6})
def flip_over_channels():
    return between(lambda y: y.flip(1))


@case({"a": 8, "b": 6})
def flip_and_roll_over_places():
    return between(lambda y: y.flip(3).roll(2, 2))


@case({"b": 6}, fixed={"a.weight:0": "aten.roll does not commute with cutting"})
def roll_over_channels():
    return between(lambda y: y.roll(1, 1))


@case({"b": 6}, fixed={"a.weight:0": "aten.constant_pad_nd pads the units"})
def padded_channels():
    return between(lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)), taken=10)


@case({"a": 8, "b": 6})
def padded_places():
    return between(lambda y: F.pad(F.pad(y, (1, 1, 0, 2)), (1, 1, 1, 1), mode="reflect"))


@case({"a": 8, "b": 2, "b#2": 2}, slots={"b": {"p.before:1": 1}, "b#2": {"p.after:1": 1}})
def zero_channels_from_buffers():
    return Net(
        lambda s, x: s.h(s.b(F.relu(y := s.a(x))) + s.p(y)),
        a=conv(3, 8),
        b=conv(8, 12, stride=2),
        p=ZeroPadShortcut(8, 12, 2),
        h=head(12),
    )


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "a.bias:0": 2, "b.weight:1": 1}})
def glu():
    return between(lambda y: F.glu(y, 1), taken=4)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 4, "b.weight:1": 1}})
def pixel_shuffle():
    return between(lambda y: F.pixel_shuffle(y, 2), out=16, taken=4)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 1, "b.weight:1": 4}})
def pixel_unshuffle():
    return between(lambda y: F.pixel_unshuffle(y, 2), out=4, taken=16)


@case({"a": 8, "b": 6}, slots={"a": {"a.weight:0": 1, "b.weight:1": 2}})
def repeated_channels():
    return between(lambda y: y.repeat(1, 2, 1, 1), taken=16)


@case({"a": 8, "b": 6}, slots={"a": {"a.weight:0": 1, "b.weight:1": 3}})
def interleaved_channels():
    return between(lambda y: y.repeat_interleave(3, 1), taken=24)


@case({"a": 8}, slots={"a": {"l.weight:1": 9}})
def im2col():
    return Net(
        lambda s, x: s.l(F.unfold(s.a(x), 3, padding=1).transpose(1, 2)).mean(1), a=conv(3, 8), l=nn.Linear(72, 5)
    )


@case({"a": 8, "b": 6})
def windows_over_places():
    return between(lambda y: y.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)))


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 1}})
def slice_of_equal_length():
    return between(lambda y: y[:, y.shape[1] // 2 :], taken=4)


@case({"b": 6}, fixed={"a.weight:0": "aten.slice takes 3 of 8 slots, no equal piece"})
def slice_of_unequal_length():
    return between(lambda y: y[:, 1:4], taken=3)


class Sliced(nn.Module):
    """What a module does with slices whose ends it keeps as attributes."""

    def __init__(self, use: Callable[[Tensor, int], Tensor], width: int) -> None:
        super().__init__()
        self.use, self.width = use, width

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.width)


def halves(x: Tensor, c: int) -> Tensor:
    return x[:, :c] * x[:, c:].sigmoid()


def halves_from_behind(x: Tensor, c: int) -> Tensor:
    return x[:, :-c] * x[:, -c:].sigmoid()


def halves_behind_dots(x: Tensor, c: int) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return (x[..., None, c:] * x[..., None, 0:c])[:, :, :, 0].permute(0, 3, 1, 2)


def quarter_and_rest(x: Tensor, c: int) -> Tensor:
    return torch.cat([x[:, c:], x[:, :c] * 2], 1)[:, : 2 * c]


@pytest.mark.parametrize(
    ("use", "width", "units"),
    [(halves, 8, 8), (halves_from_behind, 8, 8), (halves_behind_dots, 8, 8), (quarter_and_rest, 4, 4)],
)
def test_ends_of_slices_are_corrected(use: Callable[[Tensor, int], Tensor], width: int, units: int) -> None:
    """The ends that the code has as numbers become those of the smaller model, for other images, too."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 16), Sliced(use, width), conv(8, 5)).eval()
    gated = nas_gate.attach(model, torch.randn(1, 3, 7, 7))
    assert [g.size for g in gated.structure.groups] == [units]
    nn.init.normal_(gated.gates.weight)
    keep = nas_gate.land(gated, target=0.6)
    small = nas_gate.remove_with_proof(gated, keep).model
    assert small[0].out_channels == 16 * int(keep.sum()) // units < 16
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 1.0, -1.0))
    x = torch.randn(3, 3, 9, 8)
    torch.testing.assert_close(small(x), gated(x))


class ChoosesItsForward(nn.Module):
    """As FasterNet's partial convolution does: the class has none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes, self.conv = [width // 4, width - width // 4], conv(width // 4, width // 4)
        self.forward = self.partial

    def partial(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, self.sizes, dim=1)
        return torch.cat([self.conv(first), rest], 1)


def test_sizes_in_a_module_that_chooses_its_forward() -> None:
    torch.manual_seed(0)
    gated = nas_gate.attach(nn.Sequential(conv(3, 16), ChoosesItsForward(16), conv(16, 5)), torch.randn(1, 3, 9, 9))
    assert [g.size for g in gated.structure.groups] == [4, 4]
    nn.init.normal_(gated.gates.weight)
    assert nas_gate.remove(gated, target=0.6)[0].out_channels < 16


def test_ends_of_slices_in_exported_models() -> None:
    """An end that is the batch is a symbol there, and keeps its place beside those that are corrected."""

    def use(x: Tensor, c: int) -> Tensor:
        return x[: x.shape[0], :c] * x[:, c:].sigmoid()

    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 16), Sliced(use, 8), conv(8, 5)).eval()
    gated = nas_gate.attach(model, torch.randn(2, 3, 7, 7))
    nn.init.normal_(gated.gates.weight)
    small = nas_gate.remove(gated, target=0.6)
    batch = torch.export.Dim("batch", min=1, max=9)
    exported = torch.export.export(small, (torch.randn(2, 3, 7, 7),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 3, 7, 7)
    torch.testing.assert_close(exported(x), small(x))
    torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))


@case({"b": 6}, fixed={"a.weight:0": "aten.slice does not commute with cutting"})
def slice_with_step():
    return between(lambda y: y[:, ::2], taken=4)


@case({"a": 8, "b": 6})
def slice_of_places():
    return between(lambda y: y[:, :, 1::2, 2:-1])


@case({"b": 6}, fixed={"a.weight:0": "aten.index does not commute with cutting"})
def index_by_permutation():
    return between(lambda y: y[:, [3, 1, 0, 2, 7, 6, 5, 4]])


@case({"b": 6}, fixed={"a.weight:0": "aten.index_select does not commute with cutting"})
def index_select():
    return between(lambda y: y.index_select(1, torch.tensor([0, 1, 2])), taken=3)


@case({"b": 6}, fixed={"a.weight:0": "picks a single slot"})
def one_channel():
    return between(lambda y: y[:, 3:4] * y[:, 3].unsqueeze(1), taken=1)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 1}})
def chunks():
    return between(lambda y: (c := y.chunk(2, 1))[0] * c[1].sigmoid(), taken=4)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 2}})
def split_and_concatenated():
    return between(lambda y: torch.cat([s.relu() for s in y.split(y.shape[1] // 2, 1)][::-1], 1))


@case({"a": 2, "b": 6}, slots={"a": {"a.weight:0": 4, "a.bias:0": 4, "b.weight:1": 4}})
def unequal_split():
    return between(lambda y: torch.cat([s.relu() for s in y.split([2, 6], 1)], 1))


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "b.weight:1": 1}})
def unbound():
    return between(lambda y: sum(y.unflatten(1, (2, -1)).unbind(1)), taken=4)


@case({"a": 8}, slots={"a": {"b.weight:0": 1, "h.2.weight:1": 1}})
def stacked():
    return Net(lambda s, x: s.h(torch.stack([s.a(x), s.b(x)], 1).amax(1)), a=conv(3, 8), b=conv(3, 8), h=head(8))


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 4, "n.weight:0": 1, "b.weight:1": 1}})
def norm_after_pixel_shuffle():
    return Net(
        lambda s, x: s.h(s.b(F.max_pool2d(s.n(F.pixel_shuffle(s.a(x), 2)), 2))),
        a=conv(3, 16),
        n=nn.BatchNorm2d(4),
        b=conv(4, 6),
        h=head(6),
    )


# norms and what mixes


@case({"a": 8, "b": 6}, slots={"a": {"n.weight:0": 1, "n.bias:0": 1, "n.running_mean:0": 1, "n.running_var:0": 1}})
def batch_norm():
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6}, slots={"a": {"n.running_mean:0": 1}})
def batch_norm_not_affine():
    return Net(
        lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=nn.BatchNorm2d(8, affine=False), b=conv(8, 6), h=head(6)
    )


@case({"a": 8, "b": 6})
def batch_norm_without_statistics():
    norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=norm, b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6}, slots={"a": {"n.weight:0": 1, "n.running_var:0": 1}})
def instance_norm_affine():
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=norm, b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6})
def instance_norm_plain():
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=nn.InstanceNorm2d(8), b=conv(8, 6), h=head(6))


@case({"a": 8}, inputs=rows(4, 6), slots={"a": {"n.weight:0": 1, "n.bias:0": 1, "b.weight:1": 1}})
def layer_norm_module_over_units():
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 5))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "b.weight:1": 1}}, inputs=rows(4, 6))
def layer_norm_without_weight():
    norm = nn.LayerNorm(8, elementwise_affine=False)
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=norm, b=nn.Linear(8, 5))


class OwnLayerNorm(nn.Module):
    """The function with parameters of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.gain, self.shift = size, parameter(size), parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.gain, self.shift, 1e-3)


@case({"a": 8}, slots={"a": {"n.gain:0": 1, "n.shift:0": 1}}, inputs=rows(4, 6))
def layer_norm_in_a_module_of_its_own():
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=OwnLayerNorm(8), b=nn.Linear(8, 5))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "n.weight:0": 1, "b.weight:1": 1}}, inputs=rows(4, 6))
def rms_norm_over_units():
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=nn.RMSNorm(8, eps=0.1), b=nn.Linear(8, 5))


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "b.weight:1": 1}}, inputs=rows(4, 6))
def rms_norm_without_weight():
    norm = nn.RMSNorm(8, elementwise_affine=False)
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=norm, b=nn.Linear(8, 5))


@case({}, inputs=rows(4, 2, 6), fixed={"a.weight:0": "aten.mean in n mixes what the units hold"})
def rms_norm_over_two_dimensions():
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=nn.RMSNorm((2, 8)), b=nn.Linear(8, 5))


class OwnRMSNorm(nn.Module):
    """Written as language models do, over dimension `dim` of `rank`; `more` is what its module does besides."""

    def __init__(self, size: int, dim: int = -1, rank: int = 1, more: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.weight, self.dim, self.more = parameter(*(size if d == dim % rank else 1 for d in range(rank))), dim, more

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 0.1) * (1 + self.weight)
        return y if self.more is None else self.more(y)


@case({"a": 8}, slots={"a": {"a.weight:0": 1, "n.weight:0": 1, "b.weight:1": 1}}, inputs=rows(4, 6))
def rms_norm_written_by_hand():
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=OwnRMSNorm(8, 1), b=nn.Linear(8, 5))


@case({"a": 8, "b": 6}, slots={"a": {"a.weight:0": 1, "n.weight:1": 1, "b.weight:1": 1}})
def rms_norm_over_channels():
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=OwnRMSNorm(8, 1, 4), b=conv(8, 6), h=head(6))


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "the removed model must compute what the gated one does"})
def rms_norm_with_something_added():
    """No factor on the module's result undoes a stretch of its input: the trial says so."""
    norm = OwnRMSNorm(8, more=lambda y: y + 1)
    return Net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=nn.Linear(6, 8), n=norm, b=nn.Linear(8, 5))


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "aten.mean mixes what the units hold"})
def rms_norm_outside_of_a_module_of_its_own():
    return Net(
        lambda s, x: s.b((y := s.a(x)) * torch.rsqrt((y * y).mean(1, keepdim=True) + 0.1)),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 5),
    )


def by_mean_of_squares(x: Tensor, dim: int) -> Tensor:
    u = x.mean(dim, keepdim=True)
    return (x - u) / torch.sqrt((x - u).pow(2).mean(dim, keepdim=True) + 0.1)


def by_variance(x: Tensor, dim: int) -> Tensor:
    return (x - x.mean(dim).unsqueeze(dim)) / torch.sqrt(x.var(dim, unbiased=False, keepdim=True) + 0.1)


def by_both_at_once(x: Tensor, dim: int) -> Tensor:
    variance, mean = torch.var_mean(x, dim, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 0.1)


def by_deviation(x: Tensor, dim: int) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, correction=0, keepdim=True) + 0.1)


def by_unbiased_variance(x: Tensor, dim: int) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 0.1)


def by_function(x: Tensor, dim: int) -> Tensor:
    return F.layer_norm(x.movedim(dim, -1), x.shape[dim : dim + 1]).movedim(-1, dim)


class Written(nn.Module):
    """A layer norm over dimension 1, written out; with weight and bias of its own."""

    def __init__(self, size: int, rank: int, normalized: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.normalized, self.more = parameter(size), parameter(size), normalized, (1,) * rank

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.view(-1, *self.more), self.bias.view(-1, *self.more)
        return weight * self.normalized(x, 1) + bias


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("normalized", [by_mean_of_squares, by_variance, by_both_at_once, by_deviation, by_function])
def test_a_layer_norm_that_is_written_out(normalized: Callable[[Tensor, int], Tensor], rank: int) -> None:
    first, last = (nn.Linear(6, 8), nn.Linear(8, 5)) if rank == 0 else (conv(6, 8), conv(8, 5))
    model = nn.Sequential(first, Written(8, rank, normalized), nn.ReLU(), last)
    gated = nas_gate.attach(model, torch.randn(4, 6, *[5] * rank))
    (group,) = gated.structure.groups
    assert group.size == 8
    assert {m.tensor for m in group.members} == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    nn.init.normal_(gated.gates.weight)
    assert nas_gate.remove(gated, target=0.6)[1].weight.shape == (4,)


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "aten.std in n mixes what the units hold"})
def layer_norm_that_divides_by_one_less():
    norm = Written(8, 0, by_unbiased_variance)
    return Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 8), n=norm, b=nn.Linear(8, 5))


class OwnMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "aten.mean in n mixes what the units hold"})
def mean_that_is_not_of_squares():
    return Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 8), n=OwnMean(), b=nn.Linear(8, 5))


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "aten.native_layer_norm mixes what the units hold"})
def layer_norm_as_a_function():
    return Net(lambda s, x: s.b(F.layer_norm(s.a(x), (8,))), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


@case({"a": 8, "b": 6}, fixed={"w:0": "aten.native_layer_norm"})
def layer_norm_over_places():
    return Net(
        lambda s, x: s.h(s.b(F.layer_norm(s.a(x), (8,), s.w))), a=conv(3, 8), w=parameter(8), b=conv(8, 6), h=head(6)
    )


@case({"a": 4, "b": 6}, slots={"a": {"n.weight:0": 2}})
def group_norm():
    return Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=nn.GroupNorm(2, 8), b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6}, slots={"a": {"n.weight:0": 1}})
def group_norm_of_all_channels():
    return Net(
        lambda s, x: s.h(s.b(s.m(s.n(s.a(x))))),
        a=conv(3, 8),
        n=nn.GroupNorm(1, 8),
        m=nn.GroupNorm(1, 8, affine=False),
        b=conv(8, 6),
        h=head(6),
    )


@case({"a": 4, "b": 6})
def group_norm_of_vectors():
    return Net(
        lambda s, x: s.h(s.n(s.b(s.a(x)).mean((2, 3)))),
        a=conv(3, 4),
        b=conv(4, 6),
        n=nn.GroupNorm(1, 6),
        h=nn.Linear(6, 3),
    )


@case({"b": 6}, fixed={"a.weight:0": "aten.native_group_norm mixes what the units hold"})
def group_norm_without_a_module():
    return Net(lambda s, x: s.h(s.b(F.group_norm(s.a(x), 2))), a=conv(3, 8), b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6}, slots={"a": {"n.weight:0": 1}})
def group_norm_of_single_channels():
    return Net(
        lambda s, x: s.h(s.b(s.m(s.n(s.a(x))))),
        a=conv(3, 8),
        n=nn.GroupNorm(8, 8),
        m=nn.GroupNorm(8, 8, affine=False),
        b=conv(8, 6),
        h=head(6),
    )


@case({"b": 6}, fixed={"a.weight:0": "aten._softmax mixes what the units hold"})
def softmax_over_channels():
    return between(lambda y: y.softmax(1))


@case({"a": 8, "b": 6})
def softmax_over_places():
    return between(lambda y: y.softmax(3) + F.normalize(y, dim=2))


@case({"b": 6}, fixed={"a.weight:0": "mixes what the units hold"})
def normalised_over_channels():
    return between(lambda y: F.normalize(y, dim=1))


@case({"b": 6}, fixed={"a.weight:0": "aten.mean mixes what the units hold"})
def mean_over_channels():
    return between(lambda y: y - y.mean(1, keepdim=True))


@case({"b": 6}, fixed={"a.weight:0": "aten.cumsum mixes what the units hold"})
def cumulative_sum_over_channels():
    return between(lambda y: y.cumsum(1))


@case({"b": 6}, fixed={"a.weight:0": "aten.sort mixes what the units hold"})
def sorted_channels():
    return between(lambda y: y.sort(1).values)


# weights that are computed


@case({"a": 8, "w": 6}, slots={"a": {"w:1": 1}, "w": {"w:0": 1, "scale:0": 1}})
def scaled_weight():
    return Net(
        lambda s, x: s.h(F.conv2d(s.a(x), s.w * s.scale / 2)),
        a=conv(3, 8),
        w=parameter(6, 8, 1, 1),
        scale=parameter(6, 1, 1, 1),
        h=head(6),
    )


@case({"a": 8, "w": 6}, slots={"a": {"w:1": 9, "a.bias:0": 1}, "w": {"w:0": 1}})
def kernel_from_a_matrix():
    return Net(
        lambda s, x: s.h(F.conv2d(s.a(x), s.w.unflatten(1, (-1, 3, 3)))), a=conv(3, 8), w=parameter(6, 72), h=head(6)
    )


@case({"w": 6}, fixed={"a.weight:0": "takes a weight that no gate can reach: it is computed from its parameters"})
def absolute_weight():
    return Net(lambda s, x: s.h(F.conv2d(s.a(x), s.w.abs())), a=conv(3, 8), w=parameter(6, 8, 1, 1), h=head(6))


@case({"w": 6}, fixed={"a.weight:0": "mixes what the units hold"})
def standardised_weight():
    def forward(s, x):
        w = s.w - s.w.mean((1, 2, 3), keepdim=True)
        return s.h(F.conv2d(s.a(x), w / w.std((1, 2, 3), keepdim=True)))

    return Net(forward, a=conv(3, 8), w=parameter(6, 8, 3, 3), h=head(6))


@case(
    {"a": 8, "b": 6},
    slots={
        "a": {"b.parametrizations.weight.original1:1": 1},
        "b": {"b.parametrizations.weight.original0:0": 1, "b.parametrizations.weight.original1:0": 1},
    },
)
def weight_norm():
    return Net(lambda s, x: s.h(s.b(s.a(x))), a=conv(3, 8), b=parametrizations.weight_norm(conv(8, 6)), h=head(6))


@case(
    {"a": 8, "b": 6},
    slots={"a": {"a.parametrizations.weight.original:0": 1, "a.parametrizations.weight.0._u:0": 1, "b.weight:1": 1}},
)
def spectral_norm():
    """Miyato et al., arXiv 1802.05957: by the largest singular value of what is left."""
    return Net(lambda s, x: s.h(s.b(s.a(x))), a=parametrizations.spectral_norm(conv(3, 8)), b=conv(8, 6), h=head(6))


@case({"b": 6}, fixed={"a.weight:0": "has it as the extent of its kernel"})
def spectral_norm_of_what_enters():
    return Net(lambda s, x: s.h(s.b(s.a(x))), a=conv(3, 8), b=parametrizations.spectral_norm(conv(8, 6)), h=head(6))


@case({"a": 8, "w": 6}, slots={"a": {"w:1": 1}, "w": {"w:0": 1}})
def raw_parameter_in_einsum():
    return Net(lambda s, x: s.h(torch.einsum("bchw,oc->bohw", s.a(x), s.w)), a=conv(3, 8), w=parameter(6, 8), h=head(6))


@case({"v": 8, "w": 6}, inputs=rows(4, 10), slots={"v": {"v:1": 1, "w:0": 1}, "w": {"w:1": 1, "l.weight:1": 1}})
def raw_parameters_in_matmul():
    return Net(lambda s, x: s.l((x @ s.v).relu() @ s.w), v=parameter(10, 8), w=parameter(8, 6), l=nn.Linear(6, 5))


@case({"v": 8}, inputs=rows(3, 4, 10), slots={"v": {"v:2": 1, "w:1": 1}})
def batched_raw_parameters():
    return Net(
        lambda s, x: torch.baddbmm(s.b, torch.bmm(x, s.v), s.w),
        v=parameter(3, 10, 8),
        w=parameter(3, 8, 5),
        b=parameter(3, 1, 5),
    )


@case({"a": 8, "c": 6})
def frozen_parameters():
    model = Net(lambda s, x: s.h(s.c(s.a(x))), a=conv(3, 8), c=conv(8, 6), h=head(6))
    model.a.requires_grad_(False)
    return model


@case({"a": 8}, inputs=rows(4, 6), slots={"a": {"f.parametrizations.weight.original:1": 1}})
def symmetric_parametrization():
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 0.5

    layer = nn.Linear(8, 5)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    return Net(lambda s, x: s.f(s.a(x).relu()), a=nn.Linear(6, 8), f=layer)


# what values go through


@case({"a": 8, "b": 6})
def detached():
    return between(lambda y: y.detach() + y)


@case({"a": 8, "b": 6})
def through_data():
    return between(lambda y: y.data)


@case({"a": 7, "b": 6, "c": 8})
def through_data_and_around():
    return Net(
        lambda s, x: s.h(s.d(s.c(x)) + s.b((y := s.a(x)).data) + s.e(y)),
        a=conv(3, 7), b=conv(7, 6), c=conv(3, 8), d=conv(8, 6), e=conv(7, 6), h=head(6),
    )  # fmt: skip


@case({"a": 8, "b": 6})
def in_place():
    return between(lambda y: y.clone().mul_(2).add_(y).relu_())


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2}})
def write_into_a_view():
    def operation(y):
        y = y.clone()
        y[:, : y.shape[1] // 2].mul_(2.0)
        return y

    return between(operation)


@case({"a": 4, "b": 6}, slots={"a": {"a.weight:0": 2, "d.weight:0": 1}})
def assigned_into_a_view():
    def forward(s, x):
        y = s.a(x).clone()
        y[:, : y.shape[1] // 2] = s.d(x)
        return s.h(s.b(y))

    return Net(forward, a=conv(3, 8), d=conv(3, 4), b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6}, slots={"a": {"a.weight:0": 1, "b.weight:1": 1}})
def assigned_into_new_memory():
    def operation(y):
        out = torch.zeros(y.shape, dtype=y.dtype)
        out[:] = y
        return out

    return between(operation)


@case({"e": 8}, inputs=torch.arange(6).view(2, 3), fixed={"e.weight:0": "aten.embedding in e looks up its rows"})
def embedding():
    return Net(lambda s, i: s.l(s.e(i).mean(1)), e=nn.Embedding(10, 8), l=nn.Linear(8, 5))


@case({"a": 8, "b": 6})
def resized():
    return between(
        lambda y: F.interpolate(F.adaptive_max_pool2d(nn.Upsample(scale_factor=2)(y), 6), size=8, mode="bilinear")
    )


@case({"a": 8, "b": 6})
def pooled_with_indices():
    return between(lambda y: F.max_pool2d(y, 2, return_indices=True)[0])


# what acts on every unit alike, along other dimensions: on rows of 8 features, and on images of 8 channels

PLACES = torch.tensor([0, 2, 1, 1, 0])


def to_every(h: Tensor) -> Tensor:
    return PLACES[:, None].expand_as(h)


def set_rows(h: Tensor) -> Tensor:
    result = torch.zeros_like(h)
    result[PLACES] = h
    return result


def set_masked(h: Tensor) -> Tensor:
    result = h * 0.5
    result[PLACES > 0] = h[:3]
    return result


def normed_spectrum(h: Tensor) -> Tensor:
    parts = torch.view_as_real(torch.fft.rfft(h, dim=0))
    return torch.fft.irfft(torch.view_as_complex(parts.contiguous() * 0.5), n=5, dim=0)


def sums_of_neighbours(h: Tensor) -> Tensor:
    return torch.sparse.mm((torch.ones(5, 5, dtype=h.dtype) - torch.eye(5, dtype=h.dtype)).to_sparse(), h)


def blurred(y: Tensor, repeat: Callable[[Tensor, int], Tensor]) -> Tensor:
    row = torch.tensor([1.0, 2.0, 1.0], dtype=y.dtype)
    return F.conv2d(y, repeat(torch.outer(row, row)[None, None] / 16, y.shape[1]), padding=1, groups=y.shape[1])


def turned(y: Tensor) -> Tensor:
    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.1]], dtype=y.dtype).expand(len(y), -1, -1)
    return F.grid_sample(y, F.affine_grid(turn, list(y.shape), align_corners=False), align_corners=False)


def boxes(y: Tensor) -> list[Tensor]:
    return [torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 6.0, 6.0]], dtype=y.dtype)] * 2


def set_behind_a_gap(h: Tensor) -> Tensor:
    result = h[None] * 0.5
    result[:, PLACES[:2]] = h[None, :2]
    return result[0]


ON_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": lambda h: torch.zeros_like(h).index_add(0, PLACES, h),
    "index_add_in_place": lambda h: h.new_zeros(5, h.shape[1]).index_add_(0, PLACES, h, alpha=2),
    "index_copy": lambda h: h.index_copy(0, PLACES[:3], h[:3] * 2),
    "index_fill": lambda h: h.index_fill(0, PLACES, 0.5),
    "scatter": lambda h: torch.zeros_like(h).scatter(0, to_every(h), h),
    "scatter_of_a_number": lambda h: h.scatter(0, to_every(h)[:2], 0.5),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(0, to_every(h), h),
    "scatter_reduce": lambda h: torch.zeros_like(h).scatter_reduce(0, to_every(h), h, "amax"),
    "slice_scatter": lambda h: h.slice_scatter(h[:2] * 2, 0, 1, 3),
    "select_scatter": lambda h: h.select_scatter(h[0], 0, 1),
    "index_put": lambda h: h.index_put((PLACES,), h[:1].expand_as(h), accumulate=True),
    "index_put_of_one_number": lambda h: h.index_put((PLACES > 0,), torch.tensor(0.5, dtype=h.dtype)),
    "rows_set": set_rows,
    "rows_set_by_a_mask": set_masked,
    "cummax": lambda h: h.cummax(0)[0],
    "logcumsumexp": lambda h: h.logcumsumexp(0),
    "kthvalue": lambda h: h - h.kthvalue(2, 0, keepdim=True)[0],
    "spectrum": normed_spectrum,
    "sparse_product": sums_of_neighbours,
    "bucketize": lambda h: h * torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype)),
}
ON_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "unpooled": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "unfolded_and_folded": lambda y: F.fold(F.unfold(y, 2, stride=2).relu(), (8, 8), 2, stride=2),
    "lower_triangles": lambda y: y.tril(),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "rrelu": F.rrelu,
    "grid_sampled": turned,
    "blurred_by_an_expanded_filter": lambda y: blurred(y, lambda f, n: f.expand(n, -1, -1, -1)),
    "blurred_by_a_repeated_filter": lambda y: blurred(y, lambda f, n: f.repeat(n, 1, 1, 1)),
    "slopes": lambda y: blurred(y, lambda f, n: torch.cat([f, f.flip(2) - f * 2]).repeat(n, 1, 1, 1))[:, ::2].tanh(),
    "roi_align": lambda y: roi_align(y, boxes(y), 4),
    "roi_pool": lambda y: roi_pool(y, boxes(y), 4),
}
MIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "index_add_along_units": (lambda h: torch.zeros_like(h).index_add(1, torch.arange(8).flip(0), h), "moves what"),
    "scatter_along_units": (lambda h: h.scatter(1, to_every(h)[:, :1], 0.5), "moves what"),
    "index_put_along_units": (lambda h: h.index_put((PLACES, PLACES), h[:, 0]), "moves what"),
    "index_put_by_values": (lambda h: h.index_put((h > 0,), torch.tensor(0.5, dtype=h.dtype)), "as an index"),
    "index_put_behind_a_gap": (set_behind_a_gap, "has no rule"),
    "scatter_of_a_part": (lambda h: h.scatter(0, to_every(h)[:, :4], h[:, :4]), "aten.scatter has no rule"),
    "scatter_of_a_number_into_a_part": (lambda h: h.scatter(0, to_every(h)[:, :4], 0.5), "aten.scatter has no rule"),
    "scatter_of_two_widths": (lambda h: h.scatter(0, to_every(h), F.pad(h, (0, 2))), "pads the units"),
    "cummax_along_units": (lambda h: h.cummax(1)[0], "mixes what"),
    "spectrum_of_units": (lambda h: torch.fft.rfft(h, dim=1, norm="ortho").real[:, [0, 1, 2, 3, 4, 1, 2, 3]], "mixes"),
    "lower_triangle_of_units": (lambda h: h.tril(), "mixes what"),
}


def of_rows(operation: Callable[[Tensor], Tensor]) -> Net:
    """Linear `a` (4 to 8), the operation, linear `b` (8 to 5)."""
    return Net(lambda s, x: s.b(operation(s.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 5))


for _name, _operation in ON_ROWS.items():
    CASES[f"rows: {_name}"] = Case(partial(of_rows, _operation), rows(5, 4), {"a": 8})
for _name, _operation in ON_IMAGES.items():
    CASES[f"images: {_name}"] = Case(partial(between, _operation), image(), {"a": 8, "b": 6})
for _name, (_operation, _why) in MIXED.items():
    CASES[f"rows: {_name}"] = Case(partial(of_rows, _operation), rows(5, 4), {}, fixed={"a.weight:0": _why})


@case(
    {"a": 8, "d": 6},
    slots={"a": {"a.weight:0": 1, "d.weight:1": 1}, "d": {"d.weight:0": 1, "d.bias:0": 1, "h.2.weight:1": 1}},
    fixed={"p.weight:0": "torchvision.deform_conv2d in d uses it as an index"},
)
def deformed():
    return Net(
        lambda s, x: s.h(s.d(s.a(x), s.p(x)).relu()),
        a=conv(3, 8), p=conv(3, 18), d=DeformConv2d(8, 6, 3, padding=1), h=head(6),
    )  # fmt: skip


@case({"w": 6}, inputs=torch.tensor([[0, 3], [2, 2]]), slots={"w": {"w.weight:1": 1, "b.weight:1": 1}})
def bag_of_words():
    return Net(lambda s, x: s.b(s.w(x).tanh()), w=nn.EmbeddingBag(4, 6, mode="mean"), b=nn.Linear(6, 5))


@case({"a": 8, "w": 7}, inputs=rows(5, 4), slots={"a": {"a.weight:0": 1, "w:0": 1}, "w": {"v:0": 1, "w:1": 1}})
def products_with_vectors():
    return Net(lambda s, x: s.a(x) @ (s.w @ s.v), a=nn.Linear(4, 8), w=parameter(8, 7), v=parameter(7))


@case({"a": 8}, inputs=rows(5, 4), slots={"a": {"a.weight:0": 1, "a.bias:0": 1, "v:0": 1}})
def weighted_sum():
    return Net(lambda s, x: (s.a(x).tanh() * s.v).sum(-1), a=nn.Linear(4, 8), v=parameter(8))


@case({}, inputs=rows(5, 4), fixed={"a.weight:0": "aten.sum mixes what the units hold"})
def sum_of_what_is_not_linear():
    return Net(lambda s, x: (s.a(x) * s.v).tanh().sum(-1), a=nn.Linear(4, 8), v=parameter(8))


@case({"l": 2}, inputs=(rows(5, 4), (rows(5, 5) > 0) | torch.eye(5, dtype=torch.bool)), slots={"l": {"a.weight:0": 3}})
def graph_attention():
    """Heads of a graph attention network (Velickovic et al., arXiv 1710.10903, equation 3)."""

    def run(s, x, edges):
        h = s.a(x).view(len(x), 2, -1)
        scores = (h * s.l).sum(-1)[:, None] + (h * s.r).sum(-1)[None]
        shares = F.leaky_relu(scores, 0.2).masked_fill(~edges[..., None], -1e9).softmax(1)
        return s.b(torch.einsum("ijh,jhd->ihd", shares, h).flatten(1))

    return Net(run, a=nn.Linear(4, 6), l=parameter(2, 3), r=parameter(2, 3), b=nn.Linear(6, 5))


@case({"a": 8}, inputs=(rows(5, 4), torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 4, 0]])), slots={"a": {"c.weight:0": 1}})
def message_passing():
    def run(s, x, edges):
        h = s.a(x)
        for layer in (s.b, s.c):
            h = (h + h.new_zeros(h.shape).index_add(0, edges[1], layer(h)[edges[0]])).relu()
        return s.o(h)

    return Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8), o=nn.Linear(8, 3))


@case({}, inputs=rows(4, 6), fixed={"a.weight:0": "aten._trilinear in f has no rule"})
def bilinear():
    return Net(lambda s, x: s.f(s.a(x), s.b(x)), a=nn.Linear(6, 8), b=nn.Linear(6, 7), f=nn.Bilinear(8, 7, 5))


@case({"a": 8, "b": 6}, slots={"a": {"p.weight:0": 1}})
def prelu():
    return Net(lambda s, x: s.h(s.b(s.p(s.a(x)))), a=conv(3, 8), p=nn.PReLU(8), b=conv(8, 6), h=head(6))


@case({"a": 8, "b": 6})
def activations():
    def operation(y):
        y = F.gelu(y) + F.silu(y) + F.hardswish(y) + F.elu(y) + F.leaky_relu(y, 0.1) + F.softplus(y) + F.mish(y)
        return torch.where(y > 0, y, y.exp() - 1) + y.tanh().pow(2).clamp(-1, 1) + F.logsigmoid(y)

    return between(operation)


@case({"a": 8, "b": 6})
def dropout():
    return Net(
        lambda s, x: s.h(s.b(s.e(s.d(s.a(x))))),
        a=conv(3, 8), d=nn.Dropout(0.3), e=nn.Dropout2d(0.3), b=conv(8, 6), h=head(6),
    )  # fmt: skip


@case({"a": 8, "b": 6}, slots={"a": {"mask:0": 1}})
def buffer_on_channels():
    model = Net(lambda s, x: s.h(s.b(s.a(x) * s.mask)), a=conv(3, 8), b=conv(8, 6), h=head(6))
    model.register_buffer("mask", torch.rand(8, 1, 1))
    return model


@case({"b": 6}, fixed={"a.weight:0": "aten.mul joins it with a tensor that has no units there"})
def constant_on_channels():
    return between(lambda y: y * torch.arange(8, dtype=y.dtype).view(8, 1, 1))


@case({"a": 8, "b": 6})
def scalars():
    return between(lambda y: (y * 0.5 + torch.tensor(2.0)) / y.shape[2])


def read_by(kind: type[nn.RNNBase]) -> Net:
    """Linear `a` (6 to 8), a recurrent layer `g` (8 to 9), linear `l` (9 to 5) on what it gives last."""
    layer = kind(8, 9, batch_first=True)
    return Net(lambda s, x: s.l(s.g(s.a(x))[0][:, -1]), a=nn.Linear(6, 8), g=layer, l=nn.Linear(9, 5))


for _kind, _gates in ((nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)):
    _own = {"g.weight_ih_l0:0": _gates, "g.weight_hh_l0:0": _gates, "g.weight_hh_l0:1": 1, "l.weight:1": 1}
    CASES[_kind.__name__.lower()] = Case(
        partial(read_by, _kind),
        rows(2, 7, 6),
        {"a": 8, "g": 9},
        slots={"a": {"a.weight:0": 1, "g.weight_ih_l0:1": 1}, "g": _own},
    )


# attention: four heads of three


def attend(s: Any, x: Tensor, by: tuple[int, int], core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (p(x).view(n, t, *by).transpose(1, 2) for p in (s.q, s.k, s.v))
    return s.o(core(q, k, v).transpose(1, 2).reshape(n, t, -1)).mean(1)


def attention(by: tuple[int, int], core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Net:
    return Net(
        lambda s, x: attend(s, x, by, core),
        q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 12), o=nn.Linear(12, 5),
    )  # fmt: skip


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


HEADS = {"q": {"q.weight:0": 3, "k.bias:0": 3, "v.weight:0": 3, "o.weight:1": 3}}


@case({"q": 4}, inputs=rows(2, 7, 6), slots=HEADS)
def attention_by_einsum():
    return attention((-1, 3), by_einsum)


@case({"q": 4}, inputs=rows(2, 7, 6), slots=HEADS)
def attention_fused():
    return attention((-1, 3), F.scaled_dot_product_attention)


@case({"q": 4}, inputs=rows(2, 7, 6), slots=HEADS)
def attention_with_a_fixed_number_of_heads():
    return attention((4, 3), by_einsum)


@case({"q": 4}, inputs=rows(2, 7, 6), slots=HEADS)
def attention_with_other_heads_when_cut():
    return attention((4, -1), by_einsum)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: the halves of every head are turned by `angles`, shape (places, head_dim / 2)."""
    first, second = x.chunk(2, -1)
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


ROTARY = {"q": {"q.weight:0": 4, "k.bias:0": 4, "v.weight:0": 4, "o.weight:1": 4}}


@case({"q": 3}, inputs=rows(2, 7, 6), slots=ROTARY, fixed={"f:0": "aten.mul repeats it for every unit"})
def attention_with_rotary_positions():
    """What a head has in common with all others, the frequencies of its pairs, stays."""
    net = attention((-1, 4), by_einsum)

    def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(7).to(q), net.f)
        return by_einsum(turned(q, angles), turned(k, angles), v)

    net.run = lambda s, x: attend(s, x, (-1, 4), rotary)
    net.register_buffer("f", torch.rand(2))
    return net


@case({"q": 2}, inputs=rows(2, 7, 6), slots={"q": {"q.weight:0": 6, "o.weight:1": 6}})
def attention_with_rotary_positions_of_a_part():
    angles = rows(7, 2)

    def rotary(x: Tensor) -> Tensor:
        return torch.cat([turned(x[..., :4], angles.to(x)), x[..., 4:]], -1)

    return attention((-1, 6), lambda q, k, v: by_einsum(rotary(q), rotary(k), v))


@case({"q": 3}, inputs=rows(2, 7, 6), slots=ROTARY)
def attention_with_rotary_positions_from_nowhere():
    angles = rows(7, 2)
    return attention((-1, 4), lambda q, k, v: by_einsum(turned(q, angles.to(q)), turned(k, angles.to(q)), v))


@case(
    {"q": 4},
    inputs=rows(2, 7, 6),
    slots=HEADS,
    fixed={"l.weight:0": "aten.native_layer_norm in l joins", "r.weight:0": "aten.mul in r repeats it for every unit"},
)
def attention_with_normalised_queries():
    net = attention((-1, 3), by_einsum)
    net.l, net.r = nn.LayerNorm(3), nn.RMSNorm(3)
    net.run = lambda s, x: attend(s, x, (-1, 3), lambda q, k, v: by_einsum(s.l(q), s.r(k), v))
    return net


@case({"w": 3}, inputs=rows(4, 6), slots={"w": {"a.weight:0": 4, "w:0": 1, "b.weight:1": 4}})
def factor_repeated_over_one_of_two_dimensions():
    """Nothing keeps the four slots of a factor apart or together but the factor itself."""
    return Net(
        lambda s, x: s.b((s.a(x).view(len(x), 4, -1) * s.w).flatten(1)),
        a=nn.Linear(6, 12), w=parameter(3), b=nn.Linear(12, 5),
    )  # fmt: skip


@case(
    {"m": 2, "m.out_proj": 8, "f": 10},
    inputs=rows(2, 7, 8),
    slots={"m": {"m.in_proj_weight:0": 12, "m.in_proj_bias:0": 12, "m.out_proj.weight:1": 4}},
)
def multihead_attention_module():
    return Net(
        lambda s, x: s.l(s.f(s.m(x, x, x, need_weights=False)[0]).relu()).mean(1),
        m=nn.MultiheadAttention(8, 2, batch_first=True), f=nn.Linear(8, 10), l=nn.Linear(10, 5),
    )  # fmt: skip


# inputs and outputs


@case({"a": 8, "b": 6}, inputs=(image(), rows(2, 3)), kwargs={"scale": torch.tensor(2.0)})
def several_inputs():
    return Net(
        lambda s, x, v, *, scale: s.h(s.b(s.a(x) * scale)) + s.f(v),
        a=conv(3, 8),
        b=conv(8, 6),
        f=nn.Linear(3, 5),
        h=head(6),
    )


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, Any]


@case({"a": 8}, fixed={"b.weight:0": OUTPUT, "h.2.weight:0": OUTPUT})
def nested_output():
    def forward(s, x):
        y = s.a(x)
        return {"result": Output(s.h(y), {"map": (s.b(y), None, 3)})}

    return Net(forward, a=conv(3, 8), b=conv(8, 4), h=head(8))


@case({"p": 8, "b": 6}, fixed={"p:2": "joins it with a tensor that has no units there"})
def positions_that_are_pooled():
    return Net(
        lambda s, x: s.h(s.b(F.max_pool2d(s.a(x) + s.p, 2).flatten(2).unflatten(2, (4, 4)))),
        a=conv(3, 8),
        p=parameter(1, 8, 8, 1),
        b=conv(8, 6),
        h=head(6),
    )


@case({"p": 8, "b": 6}, fixed={"p:2": "mixes what the units hold", "p:3": "mixes what the units hold"})
def positions_that_are_scaled():
    return Net(
        lambda s, x: s.h(s.b(s.a(x) + F.interpolate(s.p, size=(8, 8), mode="bicubic"))),
        a=conv(3, 8),
        p=parameter(1, 8, 5, 5),
        b=conv(8, 6),
        h=head(6),
    )


@case({}, fixed={"a.weight:0": OUTPUT})
def one_layer():
    return Net(lambda s, x: s.a(x), a=conv(3, 8))


# --- the tests ----------------------------------------------------------------------------------------------


def members(structure: nas_gate.Structure) -> dict[str, dict[str, int]]:
    return {g.name: {f"{m.tensor}:{m.dim}": m.slots for m in g.members} for g in structure.groups}


@pytest.mark.parametrize("name", CASES)
def test_removed_and_equal_or_fixed_with_reason(name):
    torch.manual_seed(0)
    c = CASES[name]
    model = c.build()
    inputs = c.inputs if isinstance(c.inputs, tuple) else (c.inputs,)
    structure = nas_gate.analyze(model, inputs, c.kwargs)
    assert {g.name: g.size for g in structure.groups} == c.groups, nas_gate.describe(structure)
    found = members(structure)
    for group, slots in c.slots.items():
        assert found[group].items() >= slots.items()
    reasons: dict[str, list[str]] = {}
    for f in structure.fixed:
        reasons.setdefault(f"{f.tensor}:{f.dim}", []).append(f.reason)
    for place, text in c.fixed.items():
        assert any(text in reason for reason in reasons[place]), reasons[place]
    if c.groups:
        verify(model, inputs, c.kwargs)


@pytest.mark.parametrize("name", CASES)
def test_a_run_without_arithmetic_shows_the_same(name, monkeypatch):
    c = CASES[name]
    model = c.build()
    inputs = c.inputs if isinstance(c.inputs, tuple) else (c.inputs,)
    before = snapshot(model)[0]
    structure = nas_gate.analyze(model, inputs, c.kwargs)
    monkeypatch.setattr("nas_gate.structure.sizes.LARGE", 0)
    alike = nas_gate.analyze(model, inputs, c.kwargs)
    assert alike.groups == structure.groups
    assert alike.fixed == structure.fixed
    assert alike.macs == structure.macs
    assert snapshot(model)[0].keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model)[0].items())


def test_code_that_looks_at_values_is_run_with_them(monkeypatch):
    def forward(self, x):
        y = self.a(x)
        return self.h(F.relu(self.b(y if x.sum() == x.sum() else -y)))

    monkeypatch.setattr("nas_gate.structure.sizes.LARGE", 0)
    net = Net(forward, a=conv(3, 8), b=conv(8, 6), h=head(6))
    assert {g.name: g.size for g in nas_gate.analyze(net, image()).groups} == {"a": 8, "b": 6}


def test_the_kernel_of_every_convolution_is_left_out_of_the_reasons():
    structure = nas_gate.analyze(chain(), image())
    assert {(f.tensor, f.dim) for f in structure.fixed} == {("0.weight", 1), ("3.2.weight", 0), ("3.2.bias", 0)}


# oracles: the smaller network built by hand, with the kept slots written out


def kept_of(gated: nas_gate.GatedModel, **kept: list[int]) -> Tensor:
    """The boolean keep with these units open in each group."""
    keep = torch.zeros(gated.structure.units, dtype=torch.bool)
    assert {g.name for g in gated.structure.groups} == kept.keys()
    for g in gated.structure.groups:
        keep[torch.tensor(kept[g.name]) + g.start] = True
    return keep


def fill(small: nn.Module, **values: Tensor) -> nn.Module:
    """Load a state written as name (with __ for dots) to value; a missing or strange name is an error."""
    state = {name.replace("__", "."): value.detach() for name, value in values.items()}
    counted = {n: v for n, v in small.state_dict().items() if n.endswith("num_batches_tracked")}
    small.double().load_state_dict(state | counted)
    return small.eval()


def same_as(gated: nas_gate.GatedModel, keep: Tensor, by_hand: nn.Module, x: Tensor) -> None:
    removed = nas_gate.remove_with_proof(gated, keep).model.eval()
    close(gated, keep)
    gated.eval()
    expected = by_hand(x)
    assert distance(expected, removed(x)) < 1e-12
    assert distance(expected, gated(x)) < 1e-12
    for name, value in by_hand.state_dict().items():
        assert torch.equal(removed.state_dict()[name], value), name
    assert str(removed) == str(by_hand)


def test_convolution_norm_flatten_linear_by_hand():
    def build(c: int, d: int) -> nn.Sequential:
        return nn.Sequential(conv(3, c), nn.BatchNorm2d(c), nn.ReLU(), conv(c, d), nn.Flatten(), nn.Linear(d * 16, 5))

    x = image(size=4).double()
    model = informative(build(6, 4).double())
    gated = nas_gate.attach(model, x)
    c, d = [0, 2, 5], [1, 3]
    places = [4 * 4 * channel + place for channel in d for place in range(16)]
    small = fill(
        build(3, 2),
        **{"0__weight": model[0].weight[c], "0__bias": model[0].bias[c]},
        **{f"1__{n}": getattr(model[1], n)[c] for n in ("weight", "bias", "running_mean", "running_var")},
        **{"3__weight": model[3].weight[d][:, c], "3__bias": model[3].bias[d]},
        **{"5__weight": model[5].weight[:, places], "5__bias": model[5].bias},
    )
    same_as(gated, kept_of(gated, **{"0": c, "3": d}), small, x)


def test_grouped_convolution_by_hand():
    """Channels 0 to 3 of 4 feed group 0, 4 to 7 group 1: position p keeps 4 g + p; outputs 3 g + p."""

    def build(positions: int, outputs: int) -> nn.Sequential:
        first = conv(3, 2 * positions)
        return nn.Sequential(first, conv(2 * positions, 2 * outputs, groups=2), nn.ReLU(), head(2 * outputs))

    x = image().double()
    model = build(4, 3).double()
    gated = nas_gate.attach(model, x)
    entering, given = [1, 3, 5, 7], [0, 2, 3, 5]
    small = fill(
        build(2, 2),
        **{"0__weight": model[0].weight[entering], "0__bias": model[0].bias[entering]},
        **{"1__weight": model[1].weight[given][:, [1, 3]], "1__bias": model[1].bias[given]},
        **{"3__2__weight": model[3][2].weight[:, given], "3__2__bias": model[3][2].bias},
    )
    same_as(gated, kept_of(gated, **{"0": [1, 3], "1": [0, 2]}), small, x)


def test_depth_multiplier_by_hand():
    """Channel c becomes channels 2 c and 2 c + 1."""

    def build(channels: int) -> nn.Sequential:
        return nn.Sequential(conv(3, channels), conv(channels, 2 * channels, groups=channels), head(2 * channels))

    x = image().double()
    model = build(5).double()
    gated = nas_gate.attach(model, x)
    given = [2, 3, 8, 9]
    small = fill(
        build(2),
        **{"0__weight": model[0].weight[[1, 4]], "0__bias": model[0].bias[[1, 4]]},
        **{"1__weight": model[1].weight[given], "1__bias": model[1].bias[given]},
        **{"2__2__weight": model[2][2].weight[:, given], "2__2__bias": model[2][2].bias},
    )
    same_as(gated, kept_of(gated, **{"0": [1, 4]}), small, x)


def test_attention_heads_by_hand():
    def build(heads: int) -> Net:
        names = {n: nn.Linear(6, 3 * heads) for n in "qkv"}
        return Net(lambda s, x: attend(s, x, (-1, 3), by_einsum), **names, o=nn.Linear(3 * heads, 5))

    x = rows(2, 7, 6).double()
    model = build(4).double()
    gated = nas_gate.attach(model, x)
    slots = [0, 1, 2, 9, 10, 11]
    small = fill(
        build(2),
        **{f"{n}__weight": getattr(model, n).weight[slots] for n in "qkv"},
        **{f"{n}__bias": getattr(model, n).bias[slots] for n in "qkv"},
        o__weight=model.o.weight[:, slots],
        o__bias=model.o.bias,
    )
    same_as(gated, kept_of(gated, q=[0, 3]), small, x)


@pytest.mark.parametrize("norm", [nn.LayerNorm, partial(nn.RMSNorm, eps=0.1), OwnLayerNorm, OwnRMSNorm])
def test_norm_by_hand(norm: Callable[[int], nn.Module]):
    """Statistics of the smaller network run over its own features only."""

    def build(features: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, features), norm(features), nn.ReLU(), nn.Linear(features, 5))

    x = rows(4, 6).double()
    model = informative(build(8).double())
    gated = nas_gate.attach(model, x)
    kept = [0, 3, 4, 6, 7]
    small = fill(
        build(5),
        **{f"{i}__{n}": t[..., kept] if i else t[kept] for i in (0, 1) for n, t in model[i].named_parameters()},
        **{"3__weight": model[3].weight[:, kept], "3__bias": model[3].bias},
    )
    keep = kept_of(gated, **{"0": kept})
    removed = nas_gate.remove_with_proof(gated, keep).model.eval()
    close(gated, keep)
    assert distance(small(x), removed(x)) < 1e-12
    assert distance(small(x), gated.eval()(x)) < 1e-6


def test_frozen_stays_frozen_and_learned_stays_learned():
    gated = nas_gate.attach(frozen_parameters(), image())
    small = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0)).model
    frozen = {n for n, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"a.weight", "a.bias"}


def test_tied_weights_stay_tied():
    gated = nas_gate.attach(tied_weights(), image())
    small = nas_gate.remove_with_proof(gated, random_keep(gated.structure, 0)).model
    assert small.b.weight is small.c.weight


# rules and mends of a user's own


@torch.library.custom_op("nas_gate_tests::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


squash.register_autograd(
    lambda ctx, grad: grad / (1 + ctx.saved_tensors[0].abs()) ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_an_operation_without_a_rule_is_fixed_until_the_user_adds_one(monkeypatch):
    model = between(squash)
    structure = nas_gate.analyze(model, image())
    assert [g.name for g in structure.groups] == ["b"]
    (reason,) = {f.reason for f in structure.fixed if f.tensor == "a.weight" and f.dim == 0}
    assert reason == "nas_gate_tests.squash has no rule"

    op = torch.ops.nas_gate_tests.squash
    own = {**nas_gate.RULES, op: lambda call: [call.value(call["x"]).tracks]}
    assert [g.name for g in nas_gate.analyze(model, image(), rules=own).groups] == ["a", "b"]
    monkeypatch.setitem(nas_gate.RULES, op, own[op])
    assert {g.name: g.size for g in verify(model, image()).structure.groups} == {"a": 8, "b": 6}


@torch.library.custom_op("nas_gate_tests::rms_norm", mutates_args=())
def fused_rms_norm(input: Tensor, normalized_shape: list[int], weight: Tensor) -> Tensor:
    return F.rms_norm(input, normalized_shape, weight, 0.1)


def test_a_fused_rms_norm():
    """Some devices run an RMS norm as one operation: here it is one of our own, with the same rule."""

    class Fused(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return fused_rms_norm(x, list(self.weight.shape), self.weight)

    model = informative(nn.Sequential(nn.Linear(6, 8), Fused(8), nn.Linear(8, 5))).double()
    own = {**nas_gate.RULES, torch.ops.nas_gate_tests.rms_norm: rules.rms_norm}
    gated = nas_gate.attach(model, rows(4, 6).double(), rules=own)
    assert {g.name: g.size for g in gated.structure.groups} == {"0": 8}
    removed = nas_gate.remove_with_proof(gated, kept_of(gated, **{"0": [0, 3, 4]}))
    assert removed.model[1].normalized_shape == (3,)
    assert removed.max_relative_error < 1e-6


def test_a_wrong_rule_of_the_user_is_found_by_the_trial(monkeypatch):
    """A rule that calls a sum over channels pointwise: the smaller model differs, so nothing wrong is offered."""
    monkeypatch.setitem(nas_gate.RULES, torch.ops.aten.cumsum, rules.same)
    structure = nas_gate.analyze(between(lambda y: y.cumsum(1)), image())
    assert [g.name for g in structure.groups] == ["b"]
    (reason,) = {f.reason for f in structure.fixed if f.tensor == "a.weight" and f.dim == 0}
    assert "the largest relative error is" in reason


def test_a_rule_that_fails_fixes_what_enters_it(monkeypatch):
    def broken(call):
        call.price(7)
        raise KeyError("no such thing")

    monkeypatch.setitem(nas_gate.RULES, torch.ops.aten.cumsum, broken)
    net = between(lambda y: y.cumsum(1))
    structure = nas_gate.analyze(net, image())
    assert [g.name for g in structure.groups] == ["b"]
    (reason,) = {f.reason for f in structure.fixed if f.tensor == "a.weight" and f.dim == 0}
    assert reason == "aten.cumsum has a rule that failed: KeyError: 'no such thing'"
    verify(net, image())


class Spread(nn.Module):
    """Keeps its number of channels as an attribute and insists on it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels")
        return x * self.weight.view(1, -1, 1, 1)


class Asserting(Spread):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise AssertionError  # as `assert` does outside of pytest, which gives it a message
        return x * self.weight.view(1, -1, 1, 1)


def test_a_failure_without_a_message_is_given_one():
    model = Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=Asserting(8), b=conv(8, 6), h=head(6))
    (reason,) = {f.reason for f in nas_gate.analyze(model, image()).fixed if f.tensor == "n.weight"}
    assert reason.startswith("the smaller model fails in n: AssertionError: ")
    assert reason.endswith("see nas_gate.MENDS")


def test_a_module_with_a_size_is_fixed_until_the_user_adds_a_mend(monkeypatch):
    model = Net(lambda s, x: s.h(s.b(s.n(s.a(x)))), a=conv(3, 8), n=Spread(8), b=conv(8, 6), h=head(6))
    structure = nas_gate.analyze(model, image())
    assert [g.name for g in structure.groups] == ["b"]
    (reason,) = {f.reason for f in structure.fixed if f.tensor == "n.weight"}
    assert reason.startswith("the smaller model fails in n: ValueError: expected 8 channels")

    def mend(new: Any, old: Any, width: int | None) -> None:
        new.channels = len(new.weight)

    monkeypatch.setitem(nas_gate.MENDS, Spread, mend)
    gated = verify(model, image())
    assert {g.name: g.size for g in gated.structure.groups} == {"a": 8, "b": 6}
    assert gated.model.n.channels == model.n.channels == 8


# what is shown


def test_reasons_are_shown():
    structure = nas_gate.analyze(roll_over_channels(), image())
    text = nas_gate.describe(structure)
    assert "aten.roll does not commute with cutting: a.weight:0 (8), a.bias:0 (8)" in text
    assert f"{OUTPUT}: h.2.weight:0 (5), h.2.bias:0 (5)" in text
    assert "b       6 units  b.weight:0, b.bias:0, h.2.weight:1" in text
    data = json.loads(json.dumps(nas_gate.to_json(structure)))
    assert {
        "tensor": "a.weight",
        "dim": 0,
        "slots": 8,
        "of": 8,
        "reason": "aten.roll does not commute with cutting",
    } in data["fixed"]
    assert [(g["name"], g["units"], g["start"]) for g in data["groups"]] == [("b", 6, 0)]
    assert data["groups"][0]["members"][-1] == {"tensor": "h.2.weight", "dim": 1, "slots_per_unit": 1}
    assert data["units"] == 6


def test_reachable_share_counts_the_first_candidate_of_a_choice():
    choice = nas_gate.Choice([nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)])
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softmax(1), choice)
    out_of_reach, first = 3 * 3 * 25, 3 * 2 * 25
    share = nas_gate.reachable_share(nas_gate.analyze(model, torch.randn(1, 3, 5, 5)))
    assert share == first / (out_of_reach + first)


def test_reachable_share_by_hand():
    """Places 8 x 8: conv a has 64 * 3 * 8 * 9 MACs, b 64 * 8 * 6 * 9, the head 6 * 5; rolled, only b and head vary."""
    a, b, h = 2 * 64 * 3 * 8 * 9, 2 * 64 * 8 * 6 * 9, 2 * 6 * 5  # a batch of two images
    free, fixed = (nas_gate.analyze(m, image()) for m in (between(torch.relu), roll_over_channels()))
    assert nas_gate.CostModel(free).total("macs") == nas_gate.CostModel(fixed).total("macs") == a + b + h
    assert nas_gate.reachable_share(free) == 1.0
    assert nas_gate.reachable_share(fixed) == pytest.approx((b + h) / (a + b + h), rel=1e-12)


# refusals


def test_rejected_inputs_are_named_by_their_shapes():
    with pytest.raises(
        ValueError, match=r"must run on its example inputs, but Sequential rejects .*\[\(2, 4, 8, 8\)\]"
    ):
        nas_gate.attach(chain(), image(channels=4))
    with pytest.raises(ValueError, match=r"Net rejects tensors of shapes \[\]: TypeError"):
        nas_gate.attach(between(torch.relu), {})


def test_an_output_whose_tensors_cannot_be_found_is_refused():
    model = Net(lambda s, x: types.SimpleNamespace(logits=s.a(x)), a=conv(3, 8))
    with pytest.raises(TypeError, match="holds a SimpleNamespace, whose tensors cannot be found"):
        nas_gate.attach(model, image())


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nn.ReLU(), "it has no parameters"), (nn.Sequential(conv(3, 8)), OUTPUT)],
    ids=["no parameters", "output only"],
)
def test_a_model_without_removable_unit_is_refused(model, reason):
    with pytest.raises(ValueError, match=f"at least one removable unit .*{reason}"):
        nas_gate.attach(model, image())


def test_a_keep_that_empties_a_group_is_refused():
    gated = nas_gate.attach(chain(), image())
    keep = torch.ones(14, dtype=torch.bool)
    keep[8:] = False
    with pytest.raises(
        ValueError, match=r"at least one unit of every group must be kept, of some more, but kept are 0 of 2 "
    ):
        nas_gate.remove_with_proof(gated, keep)
    for wrong in (keep[:-1], keep.float()):
        with pytest.raises(ValueError, match="keep must be boolean with one entry for each of 14 units"):
            nas_gate.remove_with_proof(gated, wrong)
