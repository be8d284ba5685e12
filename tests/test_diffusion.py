"""The denoisers of diffusion models: group norms, skip connections, attention, an embedded time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nas_gate

GROUPS = 8


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(GROUPS, channels), heads
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w))


class Denoiser(nn.Module):
    def __init__(self, channels: int = 32, time: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down1, self.down2 = Residual(channels, channels, time), Residual(channels, 2 * channels, time)
        self.middle = Attention(2 * channels, 4)
        self.up2, self.up1 = Residual(4 * channels, 2 * channels, time), Residual(3 * channels, channels, time)
        self.norm, self.last = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        angles = steps[:, None] * torch.exp(-torch.arange(16) / 4)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        wide = self.down1(self.first(x), time)
        deep = self.down2(F.avg_pool2d(wide, 2), time)
        up = self.up2(torch.cat([self.middle(deep), deep], 1), time)
        up = self.up1(torch.cat([F.interpolate(up, scale_factor=2.0), wide], 1), time)
        return self.last(F.silu(self.norm(up)))


def test_all_channels_and_heads_can_go() -> None:
    """Gated and removed are equal (attach and remove prove it), also on another batch; only ends are fixed."""
    torch.manual_seed(0)
    model = Denoiser()
    gated = nas_gate.attach(model, (torch.randn(2, 3, 8, 8), torch.rand(2)))
    assert {(f.tensor, f.dim) for f in gated.structure.fixed} == {
        ("time.0.weight", 1),
        ("first.weight", 1),
        ("last.weight", 0),
        ("last.bias", 0),
    }
    # the same positions of all 8 groups: 4 units of the 32 channels
    assert {g.name: g.size for g in gated.structure.groups if g.name in ("first", "middle.qkv")} == {
        "first": 4,
        "middle.qkv": 4,
    }
    nn.init.normal_(gated.gates.weight)
    small = nas_gate.remove(gated, target=0.5)
    assert small.norm.num_groups == GROUPS
    assert small.norm.num_channels == small.up1.conv2.out_channels
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(nas_gate.land(gated, target=0.5), 1.0, -1.0))
        inputs = torch.randn(5, 3, 12, 12), torch.rand(5)
        torch.testing.assert_close(small.eval()(*inputs), gated.eval()(*inputs), rtol=1e-4, atol=1e-5)


# --- small random models of the diffusers library -----------------------------------------------------------


def noisy(channels: int, **more: Tensor) -> dict[str, Tensor]:
    return {"sample": torch.randn(2, channels, 16, 16), "timestep": torch.tensor([7]), **more}


BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": GROUPS}
ENDS = {"sample_size": 16, "in_channels": 4, "out_channels": 4}
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "UNet2DModel": (
        {
            **ENDS,
            **BLOCKS,
            "attention_head_dim": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: noisy(4),
    ),
    "UNet2DConditionModel": (
        {
            **ENDS,
            **BLOCKS,
            "attention_head_dim": 4,
            "cross_attention_dim": 24,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda: noisy(4, encoder_hidden_states=torch.randn(2, 5, 24)),
    ),
    "AutoencoderKL": (
        {
            **BLOCKS,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: torch.randn(2, 3, 16, 16),
    ),
    "DiTTransformer2DModel": (
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the heads of the autoencoder's two attentions stay as they are."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    def mend(new: Any, old: Any, width: int | None) -> None:
        new.channels = new.conv.weight.shape[1]  # what its forward asserts

    monkeypatch.setitem(nas_gate.MENDS, Downsample2D, mend)
    monkeypatch.setitem(nas_gate.MENDS, Upsample2D, mend)
    torch.manual_seed(0)
    options, inputs = MODELS[name]
    gated = nas_gate.attach(getattr(diffusers, name)(**options).eval(), inputs())
    assert nas_gate.reachable_share(gated.structure) > (0.98 if name == "AutoencoderKL" else 0.999)
    nn.init.normal_(gated.gates.weight)
    keep = nas_gate.land(gated, target=0.6)
    removed = nas_gate.remove_with_proof(gated, keep)
    assert removed.max_relative_error < 1e-5
    with torch.no_grad():
        gated.gates.weight.copy_(torch.where(keep, 1.0, -1.0))
        given = inputs()
        call = (lambda m: m(**given)) if isinstance(given, dict) else (lambda m: m(given))
        expected, got = call(gated), call(removed.model)
    torch.testing.assert_close(got.sample, expected.sample, rtol=1e-3, atol=1e-4)
