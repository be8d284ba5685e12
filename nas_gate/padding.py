"""Padding: a candidate's function with more channels, for runtimes that are quicker at multiples of a block.

ONNX Runtime, for one, lays channels out in blocks of 8 or 16 and computes other counts by a slower way. Channels that
were removed come back as far as a block has room for them, and nothing reads them: what consumes them is zero there.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nas_gate.analysis import analyze
from nas_gate.gating import Factors
from nas_gate.removal import Cut, RemovalError, cut_of, remove_units, renamed
from nas_gate.structure import Structure
from nas_gate.structure.trace import owner_of, tensors_of


def padded(dense: nn.Module, network: nn.Module, cut: Cut, example: Tensor, block: int) -> nn.Module:
    """A network that computes what `network` does, with convolutions' channels filled up to multiples of `block`.

    `network` is what `cut` leaves of `dense`, which is changed: it takes up the weights. Counts are at most those of
    the dense network. Features that no convolution gives (of linear layers, attention) and channels that a norm takes
    its statistics over stay as many as they are. Raises ValueError where the cut is not one that the analysis offers.
    """
    structure = analyze(dense, example, depth=bool(cut.zeros or cut.loose))
    keep = keep_of(structure, cut)
    _take_up(dense, network, structure, cut, keep)
    more = keep.clone()
    normed = {int(unit) for norm in structure.norms for unit in norm.units}
    for group in structure.groups:
        channels = [m.slots for m in group.members if isinstance(dense.get_submodule(owner_of(m.tensor)), _ConvNd)]
        if channels and group.start not in normed:
            units = max(block // math.gcd(block, n) for n in channels)
            closed = torch.nonzero(~keep[group.start : group.stop]).flatten() + group.start
            more[closed[: -(group.size - len(closed)) % units]] = True
    try:
        return remove_units(dense, structure, more, (example,), {}).model.eval()
    except RemovalError as error:
        raise ValueError(f"{type(dense).__name__} cannot be padded to multiples of {block}: {error}") from error


def keep_of(structure: Structure, cut: Cut) -> Tensor:
    """The keep vector that gives the cut."""
    keep = structure.dense()
    for slots in structure.slots:
        if (kept := cut.slots.get(slots.tensor, {}).get(slots.dim)) is not None:
            closed = np.delete(slots.units, kept)
            keep[closed[closed >= 0]] = False
    for choice in structure.choices:
        if choice.path in cut.choices:
            keep[list(choice.units)] = torch.arange(len(choice.units), device="cpu") == cut.choices[choice.path]
    rivals = {unit for choice in structure.choices for unit in choice.units}
    for part in structure.parts:
        if part.unit not in rivals:
            keep[part.unit] = not all(renamed(cut, name) is None for name in part.tensors)
    found = cut_of(structure, keep)
    if (found.slots, found.zeros, found.loose, found.choices) != (cut.slots, cut.zeros, cut.loose, cut.choices):
        raise ValueError("the candidate cannot be padded: what it keeps is not what the analysis of its model offers")
    return keep


def _take_up(dense: nn.Module, network: nn.Module, structure: Structure, cut: Cut, keep: Tensor) -> None:
    """Give the dense network the candidate's weights where they come from, and let nothing read the other units."""
    state, own = network.state_dict(), dense.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            new = renamed(cut, name)
            if new in state:
                slots = cut.slots.get(name, {})
                places = [torch.tensor(slots.get(d, range(n)), device="cpu") for d, n in enumerate(tensor.shape)]
                tensor[torch.meshgrid(*places, indexing="ij") if places else ()] = state[new].to(tensor)
        tensors = tensors_of(dense)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        factors = Factors(replace(structure, norms=()), shapes)  # units that norms run over stay as they are
        for name, gated in factors(tensors, keep.float()).items():
            tensors[name].copy_(gated)
