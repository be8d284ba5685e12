"""Sequence to sequence: nn.Transformer learns to turn strings of digits around; 60% of the MACs.

Takes about 10 s on one processor core. The metric is the share of right digits on strings that were not trained on,
where the digits before each are given (teacher forcing).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nas_gate

TARGET, STEPS, LENGTH, START = 0.6, 60, 6, 10


class Translator(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width))
        self.transformer = nn.Transformer(width, 4, 1, 1, hidden, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        source, before = (self.embedding(each) + self.position for each in (source, before))
        return self.head(self.transformer(source, before, tgt_mask=mask))


def strings(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, the ones to write, and those before each of these; all N x LENGTH."""
    source = torch.randint(10, (number, LENGTH))
    wanted = source.flip(1)
    return source, wanted, F.pad(wanted[:, :-1], (1, 0), value=START)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, gates: bool = False) -> None:
    network.train()
    for step in range(STEPS):
        source, wanted, before = strings(64)
        loss = F.cross_entropy(network(source, before).mT, wanted)
        if gates:
            loss = loss + nas_gate.penalty(network, target=max(TARGET, 1 - step / STEPS), weight=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def score(name: str, network: nn.Module, macs: float) -> None:
    source, wanted, before = held_out
    scores[name] = float((network.eval()(source, before).argmax(-1) == wanted).float().mean())
    print(f"{name:<12} right digits {scores[name]:.1%}   {macs / 1e3:.1f} k MACs")


torch.manual_seed(0)
held_out = strings(256)
example = (held_out[0][:1], held_out[2][:1])
model = Translator()
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
