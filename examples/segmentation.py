"""Semantic segmentation: torchvision's FCN on a small backbone, a class per pixel of drawn shapes; half of the MACs.

Takes about 10 s on one processor core. The metric is the mean intersection over union on pictures that were not
trained on (see `nas_gate.tasks`).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

import nas_gate
from nas_gate.data.shapes import draw
from nas_gate.tasks import confusion, mean_intersection_over_union

TARGET, STEPS = 0.5, 40


def block(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def pictures(number: int, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = draw(number, part)
    return (x.float() - 128) / 64, y


def train(network: nn.Module, optimizer: torch.optim.Optimizer, gates: bool = False) -> None:
    network.train()
    for step in range(STEPS):
        batch = torch.randint(len(x), (16,))
        loss = F.cross_entropy(network(x[batch])["out"], y[batch])
        if gates:
            loss = loss + nas_gate.penalty(network, target=max(TARGET, 1 - step / STEPS), weight=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def score(name: str, network: nn.Module, macs: float) -> None:
    scores[name] = mean_intersection_over_union(confusion(network.eval()(x_test)["out"], y_test).double())
    print(f"{name:<12} mean IoU {scores[name]:.3f}   {macs / 1e6:.2f} M MACs")


torch.manual_seed(0)
(x, y), (x_test, y_test) = pictures(256, "train"), pictures(64, "test")
example = (x[:1],)
backbone = nn.Sequential(block(3, 16, 2), block(16, 32, 1), block(32, 64, 2), block(64, 64, 1))
model = FCN(IntermediateLayerGetter(backbone, {"3": "out"}), FCNHead(64, 4))
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
train(small, torch.optim.Adam(small.parameters(), lr=1e-3))
score("fine-tuned", small, left)
