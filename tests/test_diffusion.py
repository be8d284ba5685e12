"""The denoiser of diffusion models: group norms, skip connections, attention, an embedded time."""

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
