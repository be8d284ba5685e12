"""Optical flow: torchvision's RAFT, made small, on random pictures that are shifted as a whole; 60% of the MACs.

Takes about 20 s on one processor core. RAFT refines its flow several times; the loss weighs the later flows more, as
in Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow" (2020), equation 7. The metric is the
mean distance of the last flow from the true one, in pixels, on pairs that were not trained on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.optical_flow import RAFT, raft

import nas_gate

TARGET, STEPS, SIDE, UPDATES = 0.6, 30, 40, 2


def small_raft() -> RAFT:
    corr = raft.CorrBlock(num_levels=1, radius=2)
    seen = corr.out_channels
    update = raft.UpdateBlock(
        motion_encoder=raft.MotionEncoder(
            in_channels_corr=seen, corr_layers=(32,), flow_layers=(16, 16), out_channels=32
        ),
        recurrent_block=raft.RecurrentBlock(input_size=64, hidden_size=32, kernel_size=((3, 3),), padding=((1, 1),)),
        flow_head=raft.FlowHead(in_channels=32, hidden_size=32),
    )

    def encoder(out: int, norm: type[nn.Module]) -> nn.Module:
        return raft.FeatureEncoder(block=raft.ResidualBlock, layers=(16, 16, 24, 32, out), norm_layer=norm)

    features, context = encoder(32, nn.InstanceNorm2d), encoder(64, nn.BatchNorm2d)
    return RAFT(feature_encoder=features, context_encoder=context, corr_block=corr, update_block=update)


def pairs(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures, N x 3 x SIDE x SIDE, and the flow between them, N x 2 x SIDE x SIDE: right, down."""
    canvas = F.interpolate(2 * torch.rand(number, 3, SIDE // 8 + 2, SIDE // 8 + 2) - 1, SIDE + 16, mode="bilinear")
    shift = torch.randint(-8, 9, (number, 2))
    first = canvas[..., 8 : 8 + SIDE, 8 : 8 + SIDE]
    second = [c[:, 8 - dy : 8 - dy + SIDE, 8 - dx : 8 - dx + SIDE] for c, (dx, dy) in zip(canvas, shift.tolist())]
    return first, torch.stack(second), shift[:, :, None, None].expand(-1, -1, SIDE, SIDE).float()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, gates: bool = False) -> None:
    network.train()
    for step in range(STEPS):
        first, second, flow = pairs(8)
        flows = network(first, second, num_flow_updates=UPDATES)
        loss = sum(0.8 ** (len(flows) - 1 - i) * (each - flow).abs().mean() for i, each in enumerate(flows))
        if gates:
            loss = loss + nas_gate.penalty(network, target=max(TARGET, 1 - step / STEPS), weight=20.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(name: str, network: nn.Module, macs: float) -> None:
    first, second, flow = held_out
    scores[name] = float((network.eval()(first, second, num_flow_updates=UPDATES)[-1] - flow).norm(dim=1).mean())
    print(f"{name:<12} end-point error {scores[name]:.3f} pixels   {macs / 1e6:.2f} M MACs")


torch.manual_seed(0)
held_out = pairs(16)
example, keywords = (held_out[0][:1], held_out[1][:1]), {"num_flow_updates": UPDATES}
model = small_raft()
dense = nas_gate.count_macs(model.eval(), example, keywords)
scores: dict[str, float] = {}

score("untrained", model, dense)
train(model, torch.optim.Adam(model.parameters(), lr=2e-3))
score("dense", model, dense)
gated = nas_gate.attach(model, example, keywords)
weights, gates = gated.weight_parameters(), gated.gate_parameters()
train(gated, torch.optim.Adam([{"params": weights}, {"params": gates, "lr": 0.02}], lr=2e-3), gates=True)
score("gated", gated, float(gated.cost_share().detach()) * dense)
small = nas_gate.remove(gated, target=TARGET)
left = nas_gate.count_macs(small, example, keywords)
score("landed", small, left)
train(small, torch.optim.Adam(small.parameters(), lr=2e-3))
score("fine-tuned", small, left)
