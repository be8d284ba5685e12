"""Style transfer: a transform net with instance norm, trained on what it should look like; half of the MACs.

Takes about 15 s on one processor core. Network and loss follow Johnson, Alahi, Fei-Fei, "Perceptual Losses for
Real-Time Style Transfer and Super-Resolution" (2016), in small: features of a picture shall stay those of the content,
their Gram matrices become those of the style. A random network gives the features here, and so downloads nothing. The
metric is that loss on pictures that were not trained on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nas_gate
from nas_gate.data.shapes import draw

TARGET, STEPS = 0.5, 30


def conv(channels: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    padding = nn.ReflectionPad2d(size // 2)
    return [padding, nn.Conv2d(channels, out, size, stride), nn.InstanceNorm2d(out, affine=True), nn.ReLU()]


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv(channels, channels, 3), *conv(channels, channels, 3)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    return flat @ flat.mT / flat[0].numel()


def loss_of(output: Tensor, content: Tensor) -> Tensor:
    early = first(output)
    late, wanted = second(early), second(first(content))
    style_loss = sum(F.mse_loss(gram(a), gram(b).expand(len(a), -1, -1)) for a, b in zip((early, late), style))
    return F.mse_loss(late, wanted) + 200 * style_loss


def train(network: nn.Module, optimizer: torch.optim.Optimizer, gates: bool = False) -> None:
    network.train()
    for step in range(STEPS):
        content = x[torch.randint(len(x), (8,))]
        loss = loss_of(network(content), content)
        if gates:
            loss = loss + nas_gate.penalty(network, target=max(TARGET, 1 - step / STEPS), weight=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def score(name: str, network: nn.Module, macs: float) -> None:
    scores[name] = float(loss_of(network.eval()(x_test), x_test))
    print(f"{name:<12} content and style loss {scores[name]:.4f}   {macs / 1e6:.2f} M MACs")


torch.manual_seed(0)
x, x_test = ((draw(number, part)[0].float() - 128) / 64 for number, part in ((128, "train"), (32, "test")))
first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()).requires_grad_(False)
second = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()).requires_grad_(False)
stripes = torch.sin(torch.arange(32) * 1.5).expand(1, 3, 32, 32) * torch.tensor([2.0, 1.0, -1.0])[:, None, None]
style = (first(stripes), second(first(stripes)))
up = nn.Upsample(scale_factor=2)
layers = [*conv(3, 16, 5), *conv(16, 32, 3, 2), Residual(32), Residual(32), up, *conv(32, 16, 3), *conv(16, 3, 5)[:2]]
model, example = nn.Sequential(*layers), (x[:1],)
dense = nas_gate.count_macs(model.eval(), example)
scores: dict[str, float] = {}

score("untrained", model, dense)
train(model, torch.optim.Adam(model.parameters(), lr=3e-3))
score("dense", model, dense)
gated = nas_gate.attach(model, example)
weights, gates = gated.weight_parameters(), gated.gate_parameters()
train(gated, torch.optim.Adam([{"params": weights}, {"params": gates, "lr": 0.02}], lr=2e-3), gates=True)
score("gated", gated, float(gated.cost_share().detach()) * dense)
small = nas_gate.remove(gated, target=TARGET)
left = nas_gate.count_macs(small, example)
score("landed", small, left)
train(small, torch.optim.Adam(small.parameters(), lr=2e-3))
score("fine-tuned", small, left)
