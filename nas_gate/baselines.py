"""Baselines: a score for every unit, read off trained dense weights, in place of learned gates.

What follows is the same for all: units close in ascending order of score until the target is met
(`landing.choose`), and the rest is removed. So a comparison with gates is about the choice of units alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nas_gate.gating import GatedModel, ranks
from nas_gate.structure import BRANCH, WIDTH, Structure

Floats = npt.NDArray[np.float64]

NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Modules whose `weight` is a scale per channel."""


def score(method: str, structure: Structure, model: nn.Module, seed: int = 0) -> Tensor:
    """The score of every unit of `structure` under a method of BASELINES, shape (units,), float64; high ones stay.

    `model` holds the trained weights; only "random" looks at `seed`. The other methods know width only: branches and
    the first candidates of choices get scores above all widths, so that they close where nothing else is left.
    Raises ValueError for an unknown method, and where a method finds nothing to score by.
    """
    if method not in BASELINES:
        raise ValueError(f"method must be one of {tuple(BASELINES)}, but got {method!r}")
    values = BASELINES[method](structure, model, seed)
    if method != "random":
        wide = np.array([g.kind == WIDTH for g in structure.groups], dtype=bool)[structure.group_of_unit()]
        top = values[wide].max(initial=0.0) + 1
        values = np.where(wide, values, np.where(structure.dense().numpy(), top, -top))
    return torch.from_numpy(values)


def l1(structure: Structure, model: nn.Module, seed: int = 0) -> Floats:
    """The mean |w| over all weights that go with a unit, relative to the mean of its group.

    Li, Kadav, Durdanovic, Samet and Graf: "Pruning Filters for Efficient ConvNets" (ICLR 2017) rank the filters of a
    layer by their sum of |w|. A unit may be several coupled filters and the slices that read them, hence the mean
    over all of them; and the size of weights differs between layers for reasons that say nothing about their worth,
    hence the relation to the group, without which no order over the whole network would make sense.
    """
    weights = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    values = _means(structure, weights)  # every unit of width has some: the weights that consume it
    group = structure.group_of_unit()
    average = np.bincount(group, values) / np.bincount(group)
    return values / np.where(average > 0, average, 1.0)[group]


def uniform(structure: Structure, model: nn.Module, seed: int = 0) -> Floats:
    """The same share of every group, its units by `l1`.

    The score is a unit's place in its group: the middle of its 1/n of (0, 1). One threshold over the network then
    leaves every group the same share, to the nearest unit.
    """
    group = structure.group_of_unit()
    start = np.array([g.start for g in structure.groups])
    size = np.array([g.size for g in structure.groups])
    scores = torch.from_numpy(l1(structure, model))
    rank = ranks(scores, torch.from_numpy(group), torch.from_numpy(start)).numpy()
    place: Floats = 1 - (rank + 0.5) / size[group]
    return place


def spread_gates(
    gated: GatedModel, spread: float = 1.0, sensitivity: Tensor | None = None, metric: str = "macs"
) -> None:
    """Let gates begin in the order of their units' worth, around the usual start. In place.

    What a single gate's gradient tells is mostly noise: with one start for all, the order would be much chance. So
    within every group of width the units begin in the order of `l1`, from 1 - spread/2 to 1 + spread/2 times the usual
    start. Where `sensitivity`, shape (units,), is given (see `sensitivity`), whole groups of width begin as far apart,
    too, in the order of what the loss feels per cost: the mean over a group's units of their Fisher information, which
    is sensitivity ** 2, over their marginal cost in `metric` at the dense network. Both add up, to 1 - spread to
    1 + spread; branches begin so in an order of their own, by the same figure. Candidates of choices begin as usual.
    Raises ValueError unless 0 <= spread <= 1: all begin open.
    """
    if not 0 <= spread <= 1:
        raise ValueError(f"`0 <= spread <= 1` must hold, so that all gates begin open, but got {spread=}")
    structure = gated.structure
    group = structure.group_of_unit()
    kinds = np.array([g.kind for g in structure.groups])
    place = np.where(kinds[group] == WIDTH, uniform(structure, gated.model) - 0.5, 0.0)
    if sensitivity is not None:
        if tuple(sensitivity.shape) != (structure.units,):
            raise ValueError(f"sensitivity must have shape ({structure.units},), but has {tuple(sensitivity.shape)}")
        worth = sensitivity.detach().cpu().double().numpy() ** 2 / _marginal_cost(gated, metric)
        worth = np.bincount(group, worth) / np.bincount(group)
        shift = np.zeros(len(kinds))
        for kind, wide in ((WIDTH, 1), (BRANCH, 2)):
            groups = np.flatnonzero(kinds == kind)
            order = groups[np.argsort(worth[groups], kind="stable")]
            shift[order] = wide * ((np.arange(len(order)) + 0.5) / max(len(order), 1) - 0.5)
        place += shift[group]
    with torch.no_grad():
        gated.gates.weight.copy_(torch.from_numpy(gated.gates.function.initial * (1 + spread * place)))


def _marginal_cost(gated: GatedModel, metric: str) -> Floats:
    """What removing a little of each unit alone spares of the dense network's cost, shape (units,), above 0."""
    keep = gated.structure.dense().to(gated.gates.weight).requires_grad_()
    (cost,) = torch.autograd.grad(gated.cost.share(keep, metric), [keep])
    marginal: Floats = cost.double().clamp(min=1e-30).cpu().numpy()  # what costs nothing is worth keeping
    return marginal


def sensitivity(gated: GatedModel, losses: Iterable[Tensor]) -> Tensor:
    """How much the loss feels each unit: the root mean square of its gate's gradient, shape (units,), float64.

    `losses` are scalars of the gated model, one per batch and made one at a time: a generator will do. The squares are
    estimates of the units' Fisher information (Theis, Korshunova, Tejani and Huszar: "Faster gaze prediction with dense
    networks and Fisher pruning", 2018). Raises ValueError where there is no loss.
    """
    squares = [torch.autograd.grad(loss, gated.gates.weight)[0].double().square() for loss in losses]
    if not squares:
        raise ValueError("`losses` must hold the loss of at least one batch, but holds none")
    return torch.stack(squares).mean(0).sqrt()


def bn_scale(structure: Structure, model: nn.Module, seed: int = 0) -> Floats:
    """|gamma|, the scale that normalisation gives to a unit's channel (the mean, where it has several).

    Liu, Li, Shen, Huang, Yan and Zhang: "Learning Efficient Convolutional Networks through Network Slimming" (ICCV
    2017), without the L1 penalty on gamma that they train with: the dense weights are the same for all methods. A
    group without norms takes part as an average one: its units get the quantiles of all other scores, in the order
    of `uniform`. Raises ValueError where no group has a norm with scales.
    """
    names = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, NORMS)}
    values = _means(structure, {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in names})
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError(
            f"method='bn_scale' needs norms with scales over removable units, but none of the {len(structure.groups)} "
            f"groups of {type(model).__name__} has any; choose another method"
        )
    place = uniform(structure, model)[~known]
    values[~known] = np.quantile(values[known], place)
    return values


def random(structure: Structure, model: nn.Module, seed: int = 0) -> Floats:
    """A random order of all units, the same for the same seed."""
    return np.random.default_rng(seed).permutation(structure.units).astype(np.float64)


BASELINES: dict[str, Callable[[Structure, nn.Module, int], Floats]] = {
    "uniform": uniform,
    "l1": l1,
    "bn_scale": bn_scale,
    "random": random,
}


def _means(structure: Structure, tensors: Mapping[str, Tensor]) -> Floats:
    """The mean absolute entry over the slots that every unit has in `tensors`, shape (units,); NaN without any."""
    total, count = np.zeros(structure.units), np.zeros(structure.units)
    for slots in structure.slots:
        if slots.tensor not in tensors:
            continue
        tensor = tensors[slots.tensor].detach().cpu()
        along = tensor.abs().movedim(slots.dim, 0).flatten(1) if tensor.ndim > 1 else tensor.abs()[:, None]
        mine = slots.units >= 0
        np.add.at(total, slots.units[mine], along.double().sum(1).numpy()[mine])
        np.add.at(count, slots.units[mine], along.shape[1])
    means: Floats = np.divide(total, count, out=np.full(structure.units, np.nan), where=count > 0)
    return means
