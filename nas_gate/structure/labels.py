"""Labels: which slot of which tensor every element of a value stands for.

A *track* is an integer tensor of the value's rank, of size 1 along every dimension it does not vary over; -1
marks elements without a label. A value may carry several tracks (a weight has one per dimension). An element is
gone when any of its labels is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NONE = -1


@dataclass(frozen=True)
class Track:
    """Labels of one value along one axis of coupling.

    `labels` has the value's rank; `weight` says that the labels are a parameter's own slots and that the value
    is linear in that parameter, so that a gate on those slots multiplies the value.
    """

    labels: Tensor
    weight: bool = False

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that the labels vary over."""
        return tuple(d for d, size in enumerate(self.labels.shape) if size > 1)


@dataclass(frozen=True)
class Value:
    """What is known of one tensor of the run: its tracks, and, where it has none, the origin that says why."""

    shape: tuple[int, ...]
    tracks: tuple[Track, ...] = ()
    why: str = "it is computed without any parameter"

    def over(self, dim: int) -> tuple[Track, ...]:
        """The tracks that vary over `dim`."""
        return tuple(t for t in self.tracks if dim in t.dims)


def compress(labels: Tensor) -> Tensor:
    """Shrink to size 1 every dimension that the labels are constant over."""
    for d, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels


def align(labels: Tensor, rank: int) -> Tensor:
    """Prepend dimensions of size 1, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of dimensions with equal products: [(dims before, dims after)]."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        if i < len(before):
            a, left, i = before[i], [i], i + 1
        if j < len(after):
            b, right, j = after[j], [j], j + 1
        while a != b:
            if a < b:
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        result.append((left, right))
    return result


def reshape(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The labels of `value.reshape(after)`; only the dimensions that are merged or split are expanded."""
    expanded, target, split = list(labels.shape), [1] * len(after), False
    for left, right in blocks(before, after):
        if any(labels.shape[d] > 1 for d in left):
            split |= len(right) > 1
            for d in left:
                expanded[d] = before[d]
            for d in right:
                target[d] = after[d]
    result = labels.expand(expanded).reshape(target)
    return compress(result) if split else result


def axis(labels: Tensor, dim: int) -> Tensor:
    """The labels along `dim`, at index 0 of every other dimension."""
    for d in range(labels.dim()):
        if d != dim:
            labels = labels.narrow(d, 0, 1)
    return labels.reshape(-1)


def part(labels: Tensor, dim: int, size: int) -> Tensor:
    """The first slots along `dim`, or with a negative size the last; all where there are not so many."""
    count = min(abs(size), labels.shape[dim])
    return labels.narrow(dim, 0 if size >= 0 else labels.shape[dim] - count, count)


def where(labels: Tensor, other: Tensor) -> Tensor:
    """`labels` with its gaps filled from `other`, broadcast, of size 1 along what they are constant over."""
    wide, other = torch.broadcast_tensors(labels, other)
    known = labels >= 0
    if wide.shape == labels.shape and bool(known.all()):
        return labels
    return compress(torch.where(known, wide, other))
