"""The rule table: what each ATen operation does with labels.

A rule is a small function of a `Call`: it declares equalities, fixed labels, prices and places for gates, and
returns the tracks of every tensor result. Users add their own with `RULES[torch.ops.library.operation] = rule`.
An operation without a rule fixes every label that enters it, which is always right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nas_gate.structure import labels as lb
from nas_gate.structure.graph import Node
from nas_gate.structure.labels import NONE, Track, Value
from nas_gate.structure.trace import KERNEL, Call, Normed, Rule

aten = torch.ops.aten
Tracks = tuple[Track, ...]
Results = Sequence[Tracks]

# value = linear function of the weight: a gate on the weight's slots multiplies the value
LINEAR = {aten.mul, aten.mul_, aten.neg, aten.neg_}

VIEWS = {aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.expand}


def unknown(call: Call) -> Results:
    """Fix everything that enters."""
    for tensor in call.tensors():
        for track in call.value(tensor).tracks:
            call.fix(track.labels, "has no rule")
    return [()] * len(call.outputs())


# --- pointwise ---------------------------------------------------------------------------------------------


def join(call: Call, values: Sequence[Value], keep_weight: bool = False) -> Tracks:
    """Tracks of a broadcast result: labels in the same place are equal.

    Units that meet an operand without labels over some of their dimensions run over the others.
    """
    rank = max(len(v.shape) for v in values)
    shapes = [(1,) * (rank - len(v.shape)) + v.shape for v in values]
    merged: list[tuple[Track, set[int]]] = []  # a track and the operands that take part in it
    for i, value in enumerate(values):
        for track in value.tracks:
            labels, weight, members = lb.align(track.labels, rank), track.weight and keep_weight, {i}
            apart = []
            for other, operands in merged:
                mine, theirs = Track(labels, weight), other
                if not set(mine.dims) & set(theirs.dims):
                    apart.append((other, operands))
                    continue
                if _is_repeated(mine, theirs, shapes, members):
                    call.cross(theirs.labels, labels)
                    labels, weight = theirs.labels, theirs.weight
                elif _is_repeated(theirs, mine, shapes, operands):
                    call.cross(labels, theirs.labels)
                else:
                    call.equate(theirs.labels, labels)
                    # a weight's own labels stay, for a gate must find what it multiplies; of two the first operand's
                    first, second = (mine, theirs) if weight and not theirs.weight else (theirs, mine)
                    labels, weight = lb.where(first.labels, second.labels), weight or theirs.weight
                members = members | operands
            merged = [*apart, (Track(labels, weight), members)]
    result = []
    for track, operands in merged:
        met = {i: [d for d in track.dims if shape[d] > 1] for i, shape in enumerate(shapes) if i not in operands}
        without = next((i for i, dims in met.items() if len(dims) == len(track.dims)), None)
        if without is not None:  # a fixed track goes no further
            call.fix(track.labels, f"joins it with a tensor that has no units there ({values[without].why})")
            continue
        for d in {d for dims in met.values() for d in dims}:
            call.equate(track.labels.narrow(d, 0, 1), track.labels)
        result.append(track)
    return tuple(result)


def _is_repeated(narrow: Track, wide: Track, shapes: Sequence[tuple[int, ...]], operands: set[int]) -> bool:
    """Whether broadcasting repeats the operands of a track over dimensions that another one varies over, too."""
    more = set(wide.dims) - set(narrow.dims)
    return set(narrow.dims) < set(wide.dims) and all(shapes[i][d] == 1 for i in operands for d in more)


def pointwise(call: Call) -> Results:
    """Element by element, after broadcasting."""
    values = [call.value(t) for t in call.tensors()]
    if call.op.overloadpacket is aten.sub and (centred := _less_its_mean(call)) is not None:
        return [join(call, [centred, *values[1:]], keep_weight=True)]
    return [join(call, values, keep_weight=call.op.overloadpacket in LINEAR)] * len(call.outputs())


def _less_its_mean(call: Call) -> Value | None:
    """A parameter whose rows are standardised and less their own mean now; None where that is not so."""
    if not isinstance(call["other"], Tensor):
        return None
    name, taken = _parameter(call, call.made(call["self"])), _viewed(call, call.made(call["other"]))
    if name not in call.findings.standardized or taken.op not in (aten.mean, aten.var_mean):
        return None
    if _parameter(call, call.node(taken.arguments["self"])) != name:
        return None
    value = call.value(call["self"])
    return Value(value.shape, _columns(call, name, value.tracks), value.why)


def divide(call: Call) -> Results:
    """Linear in the numerator only."""
    numerator, other = call.value(call["self"]), call["other"]
    if not isinstance(other, Tensor):
        return [numerator.tracks]
    value = call.value(other)
    plain = Value(value.shape, tuple(Track(t.labels) for t in value.tracks), value.why)
    return [join(call, [numerator, plain], keep_weight=True)]


def same(call: Call) -> Results:
    """The result is the argument (copies, casts, detach)."""
    return [call.value(call["self"]).tracks]


def like(call: Call) -> Results:
    """A new tensor of the argument's size."""
    return [tuple(Track(t.labels) for t in call.value(call["self"]).tracks)]


def constant(call: Call) -> Results:
    """A new tensor of one value: its size is one that the code gives and that can be another, whatever it meets."""
    return [call.findings.labels(call.out.shape)]


def fresh(call: Call) -> Results:
    """A new tensor of a given size, or none at all: nothing of the argument's elements goes on."""
    return [()] * len(call.outputs())


def restrided(call: Call) -> Results:
    """Another memory layout of the same elements; anything else is unknown."""
    value = call.value(call["self"])
    if tuple(call["size"]) != value.shape or call["self"].shape != call.out.shape:
        return unknown(call)
    return [value.tracks]


def copy(call: Call) -> Results:
    """Write `src` into `self`."""
    return [join(call, [call.value(call["self"]), call.value(call["src"])])]


def dropout(call: Call) -> Results:
    """The result and its mask."""
    tracks = join(call, [call.value(call["input"])])
    return [tracks] * len(call.outputs())


# --- movement: the same operator on labels ------------------------------------------------------------------


def reshaped(call: Call) -> Results:
    """Views that keep the order of elements."""
    source, out = call["self"], call.outputs()[0]
    tracks = call.value(source).tracks
    before, after = _shape_before(call), tuple(out.shape)
    return [tuple(Track(lb.reshape(t.labels, before, after), t.weight) for t in tracks)]


def _shape_before(call: Call) -> tuple[int, ...]:
    value = call.value(call["self"])
    return value.shape if value.tracks else tuple(call["self"].shape)


def permuted(call: Call) -> Results:
    """Permutations of dimensions run on the labels as they are."""
    arguments = {k: v for k, v in call.arguments.items() if k != "self"}
    tracks = call.value(call["self"]).tracks
    return [tuple(Track(call.op(t.labels, **arguments), t.weight) for t in tracks)]


def packed(call: Call) -> Results:
    """A batch of padded sequences becomes one list of places; features stay where they are."""
    value = call.value(call["input"])
    tracks = _carried(call, value, (0, 1), "packs")
    return [tuple(Track(t.labels.flatten(0, 1), t.weight) for t in tracks), ()]


def expanded(call: Call) -> Results:
    """Broadcasting adds dimensions of size 1 to labels."""
    rank = call.outputs()[0].dim()
    return [tuple(Track(lb.align(t.labels, rank), t.weight) for t in call.value(call["self"]).tracks)]


def _arguments(call: Call) -> dict[str, Any]:
    """The call's arguments but `self`, index tensors beside the labels (on the CPU)."""

    def local(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.cpu()
        return [local(b) for b in a] if isinstance(a, (list, tuple)) else a

    return {k: local(v) for k, v in call.arguments.items() if k != "self"}


def _apply(op: Any, arguments: dict[str, Any], index: int, labels: Tensor) -> Tensor:
    """One result of an operation on labels in place of its `self`."""
    result = op(**{**arguments, "self": labels})
    moved: Tensor = result[index] if isinstance(result, (list, tuple)) else result
    return moved


def along(call: Call) -> Results:
    """Movement along one dimension, or the dimensions of `dims` (select, slice, unbind, roll, flip ...)."""
    value = call.value(call["self"])
    rank = len(value.shape)
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return _moved(call, value, [d % rank for d in dims])


def _indices(call: Call, *others: Tensor | None) -> None:
    """Fix what is used as an index: all tensors of the call but `others`."""
    for tensor in call.tensors():
        if all(tensor is not other for other in others):
            for track in call.value(tensor).tracks:
                call.fix(track.labels, "uses it as an index")


def anywhere(call: Call) -> Results:
    """Movement that may touch every dimension (index, repeat, pixel shuffle, unfold ...)."""
    value = call.value(call["self"])
    _indices(call, call["self"])
    return _moved(call, value, list(range(len(value.shape))))


def _moved(call: Call, value: Value, dims: Sequence[int]) -> Results:
    results: list[list[Track]] = [[] for _ in call.outputs()]
    arguments = _arguments(call)
    for track in value.tracks:
        full = track.labels.expand(
            [value.shape[d] if d in dims else track.labels.shape[d] for d in range(len(value.shape))]
        )
        # where no touched dimension carries labels, cutting cannot disturb the movement
        disturbed = any(d in track.dims for d in dims)
        for i in range(len(results)):
            run = partial(_apply, call.op, arguments, i)
            moved = run(full)
            if disturbed:
                call.moves(full, moved, run, "does not commute with cutting")
            results[i].append(Track(lb.compress(moved), track.weight))
    return [tuple(r) for r in results]


def pieces(call: Call) -> Results:
    """Slices and splits: equal pieces of a dimension share positions, so that they stay equal when cut.

    Other pieces are those of a dimension that stays whole.
    """
    value = call.value(call["self"])
    rank = len(value.shape)
    dim = (call["dim"] or 0) % rank
    size = value.shape[dim]
    outs = call.outputs()
    bounds = _bounds(call, size, outs, dim)
    results: list[list[Track]] = [[] for _ in outs]
    for track in value.tracks:
        moved = [track.labels.narrow(dim, a, b - a) if dim in track.dims else track.labels for a, b in bounds or []]
        if dim not in track.dims:
            for r in results:
                r.append(track)
            continue
        if bounds is None:
            return _moved(call, value, [dim])
        for (a, b), part, r in zip(bounds, moved, results):
            # unequal pieces of stated sizes are multiples of a common one, and so are a slice and what lies beside it
            length = math.gcd(size, *(n - m for m, n in bounds)) if "split_sizes" in call.arguments else b - a
            if "end" in call.arguments and (common := math.gcd(size, a, b)) > 1:
                length = common
            if 0 < length < size and size % length == 0 and a % length == 0:
                whole = track.labels.unflatten(dim, (size // length, length))
                call.equate(whole.narrow(dim, 0, 1), whole)
            elif length < size and len(track.dims) == 1:
                call.fix(track.labels, f"takes {b - a} of {size} slots, no equal piece")
            elif length < size:
                call.equate(track.labels.narrow(dim, 0, 1), track.labels)
            r.append(Track(lb.compress(part), track.weight))
    return [tuple(r) for r in results]


def gated_linear(call: Call) -> Results:
    """GLU: the first half of a dimension times the sigmoid of the second."""
    value = call.value(call["self"])
    dim = call["dim"] % len(value.shape)
    result = []
    for track in value.tracks:
        if dim in track.dims:
            first, second = track.labels.chunk(2, dim)
            call.equate(first, second)
            result.append(Track(lb.compress(first)))
        else:
            result.append(Track(track.labels))
    return [tuple(result)]


def _bounds(call: Call, size: int, outs: Sequence[Tensor], dim: int) -> list[tuple[int, int]] | None:
    """[start, stop) of every piece; None where a step leaves gaps."""
    if "step" in call.arguments:
        if call["step"] != 1:
            return None
        start = call["start"] or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        return [(start, start + outs[0].shape[dim])]
    bounds, start = [], 0
    for out in outs:
        bounds.append((start, start + out.shape[dim]))
        start += out.shape[dim]
    return bounds


def concatenated(call: Call) -> Results:
    """Labels along the joined dimension stand side by side; those over other dimensions are equal."""
    tensors = list(call["tensors"])
    values = [call.value(t) for t in tensors if t.dim() > 1 or t.numel()]
    return [cat(call, values, call["dim"])]


def stacked(call: Call) -> Results:
    """A concatenation over a new dimension."""
    out = call.outputs()[0]
    dim = call["dim"] % out.dim()
    values = []
    for tensor in call["tensors"]:
        v = call.value(tensor)
        shape = (*v.shape[:dim], 1, *v.shape[dim:])
        values.append(Value(shape, tuple(Track(t.labels.unsqueeze(dim), t.weight) for t in v.tracks), v.why))
    return [cat(call, values, dim)]


def cat(call: Call, values: Sequence[Value], dim: int) -> Tracks:
    """Tracks of a concatenation."""
    rank = len(values[0].shape)
    dim %= rank
    kinds: dict[frozenset[int], list[Track | None]] = {}
    for i, value in enumerate(values):
        for track in value.tracks:
            kind = frozenset(track.dims) - {dim}
            row = kinds.setdefault(kind, [None] * len(values))
            first = row[i]
            if first is not None:  # two tracks of one value over the same dimensions stand or fall together
                call.equate(first.labels, track.labels)
            else:
                row[i] = track
    result = []
    for kind, row in kinds.items():
        weight = all(t is not None and t.weight for t in row)
        if any(t is not None and dim in t.dims for t in row):
            parts = []
            for value, t in zip(values, row):
                shape = [value.shape[d] if d == dim or d in kind else 1 for d in range(rank)]
                labels = torch.full([1] * rank, NONE, device="cpu") if t is None else t.labels
                parts.append(labels.expand(shape))
            result.append(Track(lb.compress(torch.cat(parts, dim)), weight))
            continue
        present = [t for t in row if t is not None]
        labels = present[0].labels
        for t in present[1:]:
            call.equate(labels, t.labels)
            labels = lb.where(labels, t.labels)
        missing = [v for v, t in zip(values, row) if t is None]
        if missing:
            call.fix(labels, f"joins it with a tensor that has no units there ({missing[0].why})")
        result.append(Track(labels, weight))
    return tuple(result)


def padded(call: Call) -> Results:
    """Constant padding: new places carry no label."""
    value, pad = call.value(call["self"]), list(call["pad"])
    rank = len(value.shape)
    amounts = {rank - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}
    result = []
    for track in value.tracks:
        touched = [d for d in track.dims if amounts.get(d, (0, 0)) != (0, 0)]
        if touched:
            call.fix(track.labels, "pads the units with places of a fixed number")
        else:
            result.append(track)
    return [tuple(result)]


def windowed(call: Call) -> Results:
    """im2col: every channel becomes as many rows as its window has places."""
    value = call.value(call["self"])
    places, channel = math.prod(call["kernel_size"]), len(value.shape) - 3
    result = []
    for track in value.tracks:
        if track.dims == (channel,):
            labels = track.labels.repeat_interleave(places, channel).squeeze(-1)
            result.append(Track(labels))
        else:
            call.fix(track.labels, "mixes what the units hold")
    return [tuple(result)]


def shuffled(call: Call) -> Results:
    """Channel shuffle: a view, a transposition and a view."""
    value, groups = call.value(call["input" if "input" in call.arguments else "self"]), call["groups"]
    result = []
    for track in value.tracks:
        if 1 not in track.dims:
            result.append(track)
            continue
        split = track.labels.unflatten(1, (groups, -1))
        call.equate(split.narrow(1, 0, 1), split)  # positions stay, so that every group stays equally large
        result.append(Track(split.transpose(1, 2).flatten(1, 2), track.weight))
    return [tuple(result)]


# --- spatial and reductions ---------------------------------------------------------------------------------


def spatial(rank: int) -> Rule:
    """Operations over the last `rank` dimensions: labels over the others are carried."""

    def rule(call: Call) -> Results:
        value = call.value(call["self" if "self" in call.arguments else "input"])
        first = len(value.shape) - rank
        carried = _carried(call, value, range(first, len(value.shape)), "mixes")
        return [carried] * len(call.outputs())

    return rule


def _carried(call: Call, value: Value, dims: Sequence[int], verb: str) -> Tracks:
    """Labels that are constant over `dims`: units that vary over them and others are tied, over them alone fixed."""
    result = []
    for track in value.tracks:
        inside, labels = [d for d in track.dims if d in dims], track.labels
        if len(inside) == len(track.dims):
            if inside:
                call.fix(labels, f"{verb} what the units hold")
                continue  # fixed, and its places are no longer those of the result
        else:
            for d in inside:
                labels = labels.narrow(d, 0, 1)
            if inside:
                call.equate(labels, track.labels)
                labels = lb.compress(labels)
        result.append(Track(labels))
    return tuple(result)


def reduced(call: Call) -> Results:
    """Reductions, sorts and normalisations over given dimensions (all where none is given)."""
    return _reduced(call, call.value(call["self"]))


def summed(call: Call) -> Results:
    """A sum over units of what is linear in a weight of theirs is a product with it: a gate there takes them out."""
    value = call.value(call["self"])
    dims = _dims(call, len(value.shape))
    over = [t for t in value.tracks if set(t.dims) & set(dims)]
    if len(over) == 1 and over[0].weight and len(over[0].dims) == 1:
        call.gate(over[0].labels.reshape(-1))
        value = _without(value, *dims)
    return _reduced(call, value)


def mean(call: Call) -> Results:
    """A mean over units, if a norm that is written out takes it, runs over the kept slots; else it mixes.

    That is the mean of squares of an RMS norm, or of what is left when the mean is taken away, and that mean; or those
    of a parameter's rows.
    """
    value = call.value(call["self"])
    dims = _dims(call, len(value.shape))
    rows = _standardized(call, call["self"], dims)
    if rows is not None or len(dims) != 1:
        return _reduced(call, value if rows is None else _without(value, *dims))
    squared = _squared(call, call.made(call["self"]))
    over = value.over(dims[0])
    if squared is not None:
        fit = all(_is_norm_of_units(call, t, dims[0], _is_centred(call, squared), None) for t in over)
    else:
        fit = all(_enters(call, t, dims[0]) is not None for t in over)
        if fit:  # it stands or falls with the norm, whose mean of squares comes later
            reason = f"{call.name} mixes what the units hold"
            call.findings.means += [(call.where, t.labels, reason) for t in over]
    return _reduced(call, _without(value, dims[0]) if fit else value)


def variance(call: Call) -> Results:
    """A variance over units (its square root, its mean, too) as part of a norm; it divides by the number of units."""
    value = call.value(call["self"])
    dims = _dims(call, len(value.shape))
    divided = call.arguments.get("correction") == 0
    rows = _standardized(call, call["self"], dims) if divided else None
    fit = divided and len(dims) == 1
    if rows is not None or (fit and all(_is_norm_of_units(call, t, dims[0], True, None) for t in value.over(dims[0]))):
        value = _without(value, *dims)
    return _reduced(call, value)


def _without(value: Value, *dims: int) -> Value:
    return Value(value.shape, tuple(t for t in value.tracks if not set(dims) & set(t.dims)), value.why)


def _squared(call: Call, node: Node) -> Node | None:
    """What a node is the square of; None where it is no square."""
    factors = node.arguments.get("self"), node.arguments.get("other")
    twice = node.op is aten.mul and factors[0] == factors[1]
    if twice or (node.op is aten.pow and node.arguments["exponent"] == 2):
        return call.node(factors[0])
    return None


def _is_centred(call: Call, node: Node) -> bool:
    """Whether a node is a value less its own mean."""
    if node.op is not aten.sub:
        return False
    taken = _viewed(call, call.node(node.arguments["other"]))
    return taken.op is aten.mean and taken.arguments["self"] == node.arguments["self"]


def _dims(call: Call, rank: int) -> list[int]:
    """The dimensions that a reduction runs over."""
    dim = call.arguments.get("dim", call.arguments.get("axis"))
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return [d % rank for d in dims] if rank else []


def _reduced(call: Call, value: Value) -> Results:
    rank = len(value.shape)
    dims = _dims(call, rank)
    tracks = _carried(call, value, dims, "mixes")
    results = []
    for out in call.outputs():
        shape = tuple(out.shape)
        if len(shape) == rank:
            # a fixed label must not go on over a dimension that has shrunk to 1
            results.append(tuple(t for t in tracks if all(shape[d] == value.shape[d] for d in t.dims)))
        else:
            left = [d for d in range(rank) if d not in dims]
            kept = [t for t in tracks if not set(t.dims) & set(dims)]
            results.append(tuple(Track(t.labels.reshape([t.labels.shape[d] for d in left])) for t in kept))
    return results


def batch_norm(call: Call) -> Results:
    """Per-channel normalisation couples dimension 1 with its parameters and buffers.

    By its own statistics it also standardises weights (Qiao et al., arXiv 1903.10520), which have a row for a channel.
    """
    x = call.value(call["input"])
    rank = len(x.shape)
    others = [d for d in range(rank) if d != 1]
    own = call.arguments.get("running_mean") is None
    rows = _standardized(call, call["input"], others) if own else None
    values = [Value(x.shape, _carried(call, x, others, "mixes") if rows is None else rows, x.why)]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.arguments.get(name)
        if tensor is not None:
            v = call.value(tensor)
            values.append(_channel(v, rank))
    tracks = join(call, values, keep_weight=rows is not None)
    return [tracks, *[()] * (len(call.outputs()) - 1)]


def _standardized(call: Call, tensor: Tensor, dims: Sequence[int]) -> Tracks | None:
    """The tracks of a parameter whose rows get statistics of their own, taken over `dims`; None where it is none.

    The statistics are to be taken over kept slots, which is noted. A gate on a column then closes it all the same, so
    that what comes out goes on as the parameter itself.
    """
    made, value = _viewed(call, call.made(tensor)), call.value(tensor)
    rows = math.prod(n for d, n in enumerate(value.shape) if d not in dims)
    if not made.leaf or rows != made.outputs[0][0] or not all(t.weight for t in value.tracks):
        return None
    call.findings.standardized.add(made.leaf)
    return _columns(call, made.leaf, value.tracks)


def _parameter(call: Call, node: Node) -> str | None:
    """The name of the parameter that a node is, or is a view of; None where there is none."""
    return _viewed(call, node).leaf or None


def _viewed(call: Call, node: Node) -> Node:
    while node.op in VIEWS:
        node = call.node(node.arguments["self"])
    return node


def _columns(call: Call, name: str, tracks: Tracks) -> Tracks:
    """The tracks of a parameter, or of a view of it, without those of its kernel's places, which are fixed."""
    kernel = [range(s.start, s.start + s.size) for s in call.findings.slots if s.name == name and s.dim > 1]
    for labels in kernel:
        call.findings.fix(torch.tensor(labels, device="cpu"), KERNEL)
    return tuple(t for t in tracks if not any(int(t.labels.max()) in labels for labels in kernel))


def _are_columns(call: Call, labels: Tensor) -> bool:
    """Whether labels are columns of a parameter whose rows get statistics."""
    names = call.findings.standardized | call.findings.normalized
    if not names:
        return False
    label = int(labels.max())
    return any(s.name in names and s.dim > 0 and 0 <= label - s.start < s.size for s in call.findings.slots)


def _channel(value: Value, rank: int) -> Value:
    """A vector, seen along dimension 1 of a value of this rank."""
    shape = [1] * rank
    shape[1] = math.prod(value.shape)
    tracks = tuple(Track(t.labels.reshape(shape), t.weight) for t in value.tracks)
    return Value(tuple(shape), tracks, value.why)


def layer_norm(call: Call) -> Results:
    """Statistics over the last dimension, if a module of their own takes them, run over kept slots; else they mix."""
    weight, fit = _scale(call)
    return _normalized(call, ("weight", "bias"), True, weight, fit)


def _scale(call: Call) -> tuple[str | None, bool]:
    """The parameter that scales a norm's result, and whether the scale is known: there is that parameter, or none."""
    weight = None if call["weight"] is None else call.made(call["weight"]).leaf
    return weight, bool(weight) or (call["weight"] is None and call["bias"] is None)


def rms_norm(call: Call) -> Results:
    """The same for the fused RMS norm of some devices (elsewhere it is several operations: see `mean`)."""
    return _normalized(call, ("weight",), False, None, True)


def _normalized(call: Call, factors: Sequence[str], centred: bool, weight: str | None, fit: bool) -> Results:
    x = call.value(call["input"])
    rank, normalized = len(x.shape), len(call["normalized_shape"])
    tracks = x.tracks
    fit = fit and normalized == 1
    if not (fit and all(_is_norm_of_units(call, t, rank - 1, centred, weight) for t in x.over(rank - 1))):
        tracks = _carried(call, x, range(rank - normalized, rank), "mixes")
    values = [Value(x.shape, tracks, x.why)]
    values += [call.value(call[n]) for n in factors if call[n] is not None]
    return [join(call, values), *[()] * (len(call.outputs()) - 1)]


def _is_norm_of_units(call: Call, track: Track, over: int, centred: bool, weight: str | None, groups: int = 0) -> bool:
    """Whether a module's statistics over this track can be taken over kept slots; notes the module if so.

    They can where the units run along one dimension of the module's own input, for there they are closed.
    """
    dim = _enters(call, track, over)
    if dim is None:
        return False
    labels = lb.axis(track.labels, over)
    known = call.findings.norms.setdefault(call.where, Normed(dim, labels, centred, weight, groups))
    call.equate(known.labels, labels)
    return (known.dim, known.centred, known.weight, known.groups) == (dim, centred, weight, groups)


def _enters(call: Call, track: Track, over: int) -> int | None:
    """The dimension of the running module's input that has the labels of a track over `over` alone; None for none."""
    entering = call.findings.entering.get(call.where)
    if entering is None or track.dims != (over,):
        return None
    labels = lb.axis(track.labels, over)
    for dim in range(len(entering.shape)):
        for t in entering.over(dim):
            if t.dims == (dim,) and torch.equal(lb.axis(t.labels, dim), labels):
                return dim
    return None


def group_norm(call: Call) -> Results:
    """Statistics over groups of channels: over kept slots in a module of their own, else they mix the channels.

    Every group keeps the same positions. With one channel in each group it is an instance norm.
    """
    x, groups = call.value(call["input"]), call["group"]
    rank = len(x.shape)
    mixed = list(range(2, rank))
    if groups < call["C"]:
        weight, fit = _scale(call)
        if fit and all(_is_norm_of_units(call, t, 1, True, weight, groups) for t in x.over(1)):
            for track in x.over(1):
                place = track.labels.reshape(groups, -1)
                call.equate(place[:1], place)
        else:
            mixed = [1, *mixed]
    values = [Value(x.shape, _carried(call, x, mixed, "mixes"), x.why)]
    values += [_channel(call.value(call[n]), rank) for n in ("weight", "bias") if call[n] is not None]
    return [join(call, values), *[()] * (len(call.outputs()) - 1)]


def weight_norm(call: Call) -> Results:
    """w = g v / |v|: the norm runs over every dimension but `dim`.

    Closed slots of a parameter v are 0, which adds nothing to the norm: it is that of the kept ones.
    """
    v, g = call.value(call["v"]), call.value(call["g"])
    dim, name = call["dim"] % len(v.shape), _parameter(call, call.made(call["v"]))
    own = all(t.weight for t in v.tracks)
    if name is not None and own:
        call.findings.normalized.add(name)
    tracks = v.tracks if own else _carried(call, v, [d for d in range(len(v.shape)) if d != dim], "mixes")
    # a closed row has no norm to divide by: it is g that closes rows
    tracks = tuple(Track(t.labels, t.weight and dim not in t.dims) for t in tracks)
    tracks = join(call, [g, Value(v.shape, tracks, v.why)], keep_weight=own)
    return [tracks, *[()] * (len(call.outputs()) - 1)]


# --- places: what picks, adds up or transforms them, unit by unit --------------------------------------------


def _narrowed(call: Call, value: Value, dims: Sequence[int]) -> Value:
    """A value at one place of `dims`, over which its labels are constant."""
    tracks = _carried(call, value, dims, "moves")
    kept = tuple(t for t in tracks if not set(t.dims) & set(dims))
    return Value(tuple(1 if d in dims else size for d, size in enumerate(value.shape)), kept, value.why)


def scattered(call: Call) -> Results:
    """Write or add slices of one tensor at places along a dimension of another (index_add, scatter, index_copy ...)."""
    into, source = call["self"], call.arguments.get("source", call.arguments.get("src"))
    rank, dim = into.dim(), call["dim"] % into.dim()
    index = call.arguments.get("index")
    if not isinstance(source, Tensor):  # index_fill, scatter of a number
        source = None
    _indices(call, into, source)
    values, shapes = [call.value(into)], []
    if isinstance(index, Tensor) and index.dim() == rank:  # of scatter: it may be for a part only
        shapes.append(tuple(index.shape))
    if source is not None:
        given = call.value(source)
        if source.dim() < rank:  # select_scatter: a slice without that dimension
            tracks = tuple(Track(t.labels.unsqueeze(dim)) for t in given.tracks)
            given = Value((*source.shape[:dim], 1, *source.shape[dim:]), tracks, given.why)
        shapes.append(given.shape)
        values.append(given)
    if any(shape[d] != into.shape[d] for shape in shapes for d in range(rank) if d != dim):
        return unknown(call)
    return [join(call, [_narrowed(call, value, [dim]) for value in values])]


def sorted_into(call: Call) -> Results:
    """The places of numbers among boundaries (bucketize)."""
    _indices(call, call["self"])
    return like(call)


def put(call: Call) -> Results:
    """x[index] = values, where the index takes the first dimensions: the others go on."""
    into, values, indices = call["self"], call["values"], list(call["indices"])
    taken = [i for i in indices if i is not None]
    first = sum(i.dim() if i.dtype in (torch.bool, torch.uint8) else 1 for i in taken)
    if any(i is None for i in indices[: len(taken)]):
        return unknown(call)
    _indices(call, into, values)
    rest = into.dim() - first
    given = call.value(values)
    lead = max(0, values.dim() - rest)
    narrow = _narrowed(call, given, range(lead))
    tracks = tuple(Track(t.labels.reshape(t.labels.shape[lead:])) for t in narrow.tracks)
    written = Value(tuple(values.shape[lead:]), tracks, given.why)
    return [join(call, [_narrowed(call, call.value(into), range(first)), written])]


def bag(call: Call) -> Results:
    """Sums, means or maxima of rows that are looked up."""
    _indices(call, call["weight"])
    return embedding(call)


def regions(call: Call) -> Results:
    """Regions of images, channel by channel (torchvision.ops.roi_align, roi_pool)."""
    _indices(call, call["input"])
    return [_carried(call, call.value(call["input"]), (0, 2, 3), "mixes")] * len(call.outputs())


def sampled(call: Call) -> Results:
    """Images read at the places of a grid, channel by channel."""
    value = call.value(call["input"])
    _indices(call, call["input"])
    return [_carried(call, value, range(2, len(value.shape)), "mixes")]


def unpooled(call: Call) -> Results:
    """Values put back where pooling found them, channel by channel."""
    value = call.value(call["self"])
    return [join(call, [_narrowed(call, call.value(t), range(2, len(value.shape))) for t in call.tensors()])]


def folded(call: Call) -> Results:
    """col2im: as many rows as its window has places become a channel."""
    value = call.value(call["self"])
    rows, places = len(value.shape) - 2, math.prod(call["kernel_size"])
    result = []
    for track in _carried(call, value, [d for d in range(len(value.shape)) if d != rows], "mixes"):
        windows = track.labels.unflatten(rows, (-1, places))
        call.equate(windows.narrow(rows + 1, 0, 1), windows)
        result.append(Track(windows.narrow(rows + 1, 0, 1)))
    return [tuple(result)]


def sparse_product(call: Call) -> Results:
    """A sparse matrix without units times a dense one, plus a third: columns go on. Not counted by PyTorch."""
    _indices(call, call["self"], call["mat2"])
    product = _narrowed(call, call.value(call["mat2"]), [0])
    return [join(call, [product, _narrowed(call, call.value(call["self"]), [0])])]


def transformed(call: Call) -> Results:
    """Fourier transforms over given dimensions: the others go on."""
    return [_carried(call, call.value(call["self"]), _dims(call, call["self"].dim()), "mixes")]


def complex_view(call: Call) -> Results:
    """Pairs of numbers as complex ones, or the reverse: a last dimension that no units run over goes, or comes."""
    value = call.value(call["self"])
    if call.op.overloadpacket is aten.view_as_real:
        return [tuple(Track(t.labels.unsqueeze(-1)) for t in value.tracks)]
    last = len(value.shape) - 1
    return [tuple(Track(t.labels.squeeze(-1)) for t in _narrowed(call, value, [last]).tracks)]


# --- contractions -------------------------------------------------------------------------------------------


def embedding(call: Call) -> Results:
    """Rows are looked up, columns go on."""
    weight = call.value(call["weight"])
    for track in weight.over(0):
        call.fix(track.labels, "looks up its rows")
    rank = call.outputs()[0].dim()
    return [
        tuple(Track(lb.align(t.labels.reshape(-1), rank)) for t in weight.tracks if t.dims == (1,)),
        *[()] * (len(call.outputs()) - 1),
    ]


def matrix_product(call: Call, a: Value, b: Value, counted: bool = True) -> Tracks:
    """(..., m, k) times (..., k, n), both of the same rank with equal leading dimensions.

    Products with vectors are not `counted` by PyTorch.
    """
    rank = len(a.shape)
    m, k, n = rank - 2, rank - 1, rank - 1
    inner_a, inner_b = a.over(k), b.over(rank - 2)
    inner = a.shape[k]
    left = [t for t in a.tracks if k not in t.dims]
    right = [t for t in b.tracks if rank - 2 not in t.dims]
    weight = next((t for t in inner_b if t.weight and t.dims == (rank - 2,)), None)
    swap = weight is None
    if swap:
        weight = next((t for t in inner_a if t.weight and t.dims == (k,)), None)
    if weight is not None:
        labels = weight.labels.reshape(-1)
        others, why = (inner_b, b.why) if swap else (inner_a, a.why)
        if not others:
            call.fix(labels, f"takes in a tensor without units ({why})")
        for t in others:
            call.equate(labels, t.labels.movedim(rank - 2 if swap else k, -1))
        for t in inner_a if swap else inner_b:
            if t is not weight:
                call.equate(labels, t.labels.movedim(k if swap else rank - 2, -1))
        call.gate(labels)
    else:  # two activations: units that go on must not vary over what is summed
        for t in inner_a:
            left += _same_over(call, t, k)
        for t in inner_b:
            right += _same_over(call, t, rank - 2)
    batch = [(a.shape[d], d, tuple(t for t in (*left, *right) if d in t.dims)) for d in range(rank - 2)]
    middle = (inner, 0, (Track(weight.labels.reshape(-1)),)) if weight is not None else (inner, 0, ())
    rows, columns = (tuple(t for t in side if d in t.dims) for side, d in ((left, m), (right, n)))
    if counted:
        call.price(1, *batch, (a.shape[m], m, rows), middle, (b.shape[n], n, columns))
    # every operand has size 1 along the dimension that only the other one has
    first = Value((*a.shape[:-1], 1), tuple(Track(t.labels, t.weight) for t in left), a.why)
    second = Value((*b.shape[:-2], 1, b.shape[-1]), tuple(Track(t.labels, t.weight) for t in right), b.why)
    return join(call, [first, second], keep_weight=True)


def _same_over(call: Call, track: Track, dim: int) -> list[Track]:
    first = track.labels.narrow(dim, 0, 1)
    call.equate(first, track.labels)
    if first.numel() == 1:
        call.fix(first, "sums over its units without a weight")
        return []
    return [Track(lb.compress(first))]


def mm(call: Call) -> Results:
    """mm and bmm."""
    second = call["mat2"]
    return [matrix_product(call, call.value(call["self"]), call.value(second))]


def vector_product(call: Call) -> Results:
    """A matrix, or a vector, times a vector (mv, dot)."""
    a, b = (
        call.value(call["self"]),
        call.value(next(call.arguments[n] for n in ("vec", "tensor", "other") if n in call.arguments)),
    )
    column = Value((*b.shape, 1), tuple(Track(t.labels.unsqueeze(-1), t.weight) for t in b.tracks), b.why)
    if len(a.shape) == 2:
        product = matrix_product(call, a, column, counted=False)
        return [tuple(Track(t.labels.squeeze(-1), t.weight) for t in product)]
    row = Value((1, *a.shape), tuple(Track(t.labels.unsqueeze(0), t.weight) for t in a.tracks), a.why)
    matrix_product(call, row, column, counted=False)
    return [()]


def addmm(call: Call) -> Results:
    """bias + a @ b (addmm, baddbmm)."""
    names = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    a, b = (call.value(call[n]) for n in names)
    product = Value((*a.shape[:-1], b.shape[-1]), matrix_product(call, a, b), a.why)
    return [join(call, [product, call.value(call["self"])])]


def linear(call: Call) -> Results:
    """x @ W.T + b, where a backend keeps it whole."""
    x, w = call.value(call["input"]), call.value(call["weight"])
    rows = Value((math.prod(x.shape[:-1]), x.shape[-1]), _flat(x, (math.prod(x.shape[:-1]), x.shape[-1])), x.why)
    turned = Value(w.shape[::-1], tuple(Track(t.labels.t(), t.weight) for t in w.tracks), w.why)
    product = Value((rows.shape[0], w.shape[0]), matrix_product(call, rows, turned), x.why)
    values = [product] + ([call.value(call["bias"])] if call["bias"] is not None else [])
    out = Value(product.shape, join(call, values), x.why)
    return [_flat(out, (*x.shape[:-1], w.shape[0]))]


def _flat(value: Value, shape: tuple[int, ...]) -> Tracks:
    return tuple(Track(lb.reshape(t.labels, value.shape, shape), t.weight) for t in value.tracks)


def _side(call: Call, w: Value, dim: int) -> Track | None:
    """A kernel's labels along dimension 0 or 1 alone."""
    side: Track | None = None
    for track in w.tracks:
        if dim not in track.dims:
            continue
        others = [d for d in range(len(w.shape)) if d != dim]
        labels = _carried(call, Value(w.shape, (track,)), others, "mixes")[0].labels
        labels = labels.expand([w.shape[d] if d == dim else 1 for d in range(len(w.shape))])
        if side is None:
            side = Track(labels, track.weight)
        else:
            call.equate(side.labels, labels)
    return side


def _is_repeated_filter(call: Call) -> bool:
    """Whether every channel has the same filters; not known of a weight without values."""
    filters = call["weight"].unflatten(0, (call["groups"], -1))
    return not filters.is_meta and bool((filters == filters[:1]).all())


def convolution(call: Call) -> Results:
    """Convolutions of any rank, plain, grouped, depthwise and transposed.

    Grouped: the same position in every group is one unit. One input channel a group (depthwise, with or without a
    multiplier): the group is the unit.
    """
    return _convolved(call, call["transposed"], counted=True)


def _convolved(call: Call, transposed: bool, counted: bool) -> Results:
    x, w, groups = call.value(call["input"]), call.value(call["weight"]), call["groups"]
    out = call.outputs()[0]
    rank = out.dim()
    if groups > 1 and w.shape[:2] == (groups, 1) and x.shape[1] == groups and any(0 in t.dims for t in x.tracks):
        return _each_channel(call, x, w, tuple(out.shape))
    inputs = [t for t in _carried(call, x, [d for d in range(rank) if d != 1], "mixes") if 1 in t.dims]
    for track in inputs[1:]:
        call.equate(inputs[0].labels, track.labels)
    entering = lb.axis(inputs[0].labels, 1) if inputs else None
    for track in w.tracks:
        if min(track.dims) > 1:
            call.fix(track.labels, KERNEL)
    channels = x.shape[1]
    first, second = (_side(call, w, dim) for dim in (0, 1))
    alone = channels == groups and groups > 1
    if alone and not transposed and first is None and entering is not None and _is_repeated_filter(call):
        # a blur, for instance, whose filter the code repeats for as many channels as there are
        first = Track(entering.repeat_interleave(w.shape[0] // groups).reshape(-1, *[1] * (rank - 1)))
    # the weight's labels for what it takes in and what it gives out, each as (labels in place, is a weight's own)
    taking, giving = (first, second) if transposed else (second, first)
    given: Tensor | None = None
    if alone:  # (groups,) in -> (groups, multiplier) out, no sum over channels: no gate
        if first is None:
            if entering is not None:
                call.fix(entering, f"takes a weight that has no units there ({w.why})")
        else:
            labels = first.labels.reshape(-1)
            if transposed:
                rows = labels.reshape(groups, 1).expand(groups, w.shape[1])
                if second is not None:
                    call.fix(second.labels, "repeats it for every channel")
            else:
                rows = labels.reshape(groups, -1)
            if entering is None:
                call.fix(rows, f"takes in a tensor without units ({x.why})")
            else:
                call.equate(entering.reshape(groups, 1), rows)
            given = rows.reshape(-1)
    else:
        if taking is not None:
            labels = taking.labels.reshape(-1)
            place = labels.reshape(groups, -1) if transposed else labels.reshape(1, -1)
            if groups > 1:
                call.equate(place[:1], place)
            if entering is None:
                call.fix(labels, f"takes in a tensor without units ({x.why})")
            else:
                call.equate(entering.reshape(groups, -1), place)
            own = [t for t in w.tracks if t.weight and (0 if transposed else 1) in t.dims]
            for track in own:
                call.gate(track.labels)
            if not own:
                call.fix(labels, "takes a weight that no gate can reach: it is computed from its parameters")
        elif entering is not None:
            call.fix(entering, f"takes a weight that has no units there ({w.why})")
        if giving is not None:
            labels = giving.labels.reshape(-1)
            if _are_columns(call, labels):
                call.fix(labels, "gives out what the statistics of its weight run over")
            place = labels.reshape(1, -1).expand(groups, -1) if transposed else labels.reshape(groups, -1)
            if groups > 1:
                call.equate(place[:1], place)
            given = place.reshape(-1)
    size = x.shape if transposed else tuple(out.shape)
    spots = size[0] * math.prod(size[2:]) * math.prod(w.shape[2:])
    if counted:
        call.price(
            spots,
            (w.shape[0], 0, () if first is None else (first,)),
            (w.shape[1], 1, () if second is None or alone else (second,)),
        )
    shape = [1] * rank
    shape[1] = out.shape[1]
    tracks: Tracks = () if given is None else (Track(given.reshape(shape)),)
    values = [Value(tuple(out.shape), tracks, w.why)]
    if call["bias"] is not None:
        values.append(_channel(call.value(call["bias"]), rank))
    return [join(call, values)]


def deformable(call: Call) -> Results:
    """A convolution that reads at places which offsets say (torchvision.ops.deform_conv2d). Not counted by PyTorch."""
    if call["offset_groups"] > 1:
        return unknown(call)
    _indices(call, call["input"], call["weight"], call["bias"])
    return _convolved(call, transposed=False, counted=False)


def _each_channel(call: Call, x: Value, w: Value, shape: tuple[int, ...]) -> Results:
    """A depthwise convolution of units that run over the batch, as heads do that are folded into it: place by place."""
    rank = len(shape)
    for track in w.tracks:
        if min(track.dims) > 1:
            call.fix(track.labels, KERNEL)
    tracks = _carried(call, x, range(2, rank), "mixes")
    side = _side(call, w, 0)
    channel = () if side is None else (Track(side.labels.reshape(1, -1, *[1] * (rank - 2))),)
    values = [Value(shape, tracks, x.why), Value((1, shape[1], *[1] * (rank - 2)), channel, w.why)]
    if call["bias"] is not None:
        values.append(_channel(call.value(call["bias"]), rank))
    result = join(call, values)
    axes = [(shape[d], d, tuple(t for t in result if d in t.dims)) for d in (0, 1)]
    call.price(math.prod(shape[2:]) * math.prod(w.shape[2:]), *axes)
    return [result]


# --- the table ----------------------------------------------------------------------------------------------


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}

    def add(rule: Rule, *names: str) -> None:
        for name in names:
            packet = getattr(aten, name, None)  # a name that this version of torch lacks cannot occur
            if packet is not None:
                table[packet] = rule

    add(pointwise, "where", "masked_fill", "masked_fill_", "lerp", "addcmul", "addcdiv", "clamp", "clamp_min")
    add(
        pointwise,
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "hardsigmoid_",
        "log_sigmoid_forward",
        "_prelu_kernel",
        "bernoulli",
        "threshold",
        "hardtanh",
        "hardtanh_",
        "nan_to_num",
        "rrelu_with_noise",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
    )
    add(divide, "div", "div_")
    add(same, "clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "to", "_conj", "detach_")
    add(like, "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
    add(constant, "zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
    add(fresh, "new_empty", "sym_size", "_assert_tensor_metadata", "is_same_size")
    add(like, "bernoulli_", "zero_", "fill_", "uniform_", "normal_")
    add(copy, "copy_")
    add(restrided, "as_strided_")
    add(dropout, "native_dropout")
    add(
        reshaped,
        "view",
        "_unsafe_view",
        "reshape",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "_reshape_alias",
    )
    add(reshaped, "squeeze_", "unsqueeze_")
    add(permuted, "permute", "transpose", "t", "transpose_", "t_", "movedim")
    add(expanded, "expand")
    add(along, "select", "unbind", "flip", "roll", "rot90", "index_select", "diagonal")
    add(
        anywhere,
        "index",
        "repeat",
        "pixel_shuffle",
        "pixel_unshuffle",
        "gather",
        "repeat_interleave",
        "unfold",
    )
    add(pieces, "slice", "split", "split_with_sizes", "chunk", "narrow", "unsafe_split", "unsafe_chunk")
    add(concatenated, "cat")
    add(stacked, "stack")
    add(windowed, "im2col")
    add(packed, "_pack_padded_sequence")
    add(padded, "constant_pad_nd")
    add(shuffled, "channel_shuffle", "native_channel_shuffle")
    add(
        spatial(1),
        "avg_pool1d",
        "max_pool1d",
        "adaptive_avg_pool1d",
        "upsample_nearest1d",
        "_upsample_nearest_exact1d",
    )
    add(spatial(1), "upsample_linear1d", "reflection_pad1d", "replication_pad1d", "max_pool1d_with_indices")
    add(
        spatial(2),
        "avg_pool2d",
        "max_pool2d",
        "max_pool2d_with_indices",
        "adaptive_max_pool2d",
        "_adaptive_avg_pool2d",
    )
    add(
        spatial(2),
        "adaptive_avg_pool2d",
        "upsample_nearest2d",
        "_upsample_nearest_exact2d",
        "upsample_bilinear2d",
    )
    add(spatial(2), "upsample_bicubic2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d")
    add(spatial(2), "fractional_max_pool2d", "tril", "triu")
    add(
        spatial(3),
        "avg_pool3d",
        "max_pool3d",
        "max_pool3d_with_indices",
        "adaptive_max_pool3d",
        "_adaptive_avg_pool3d",
    )
    add(spatial(3), "upsample_nearest3d", "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d")
    add(mean, "mean")
    add(variance, "var", "std", "var_mean", "std_mean")
    add(summed, "sum")
    add(
        reduced,
        "amax",
        "amin",
        "max",
        "min",
        "argmax",
        "argmin",
        "prod",
    )
    add(
        reduced,
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "logsumexp",
        "linalg_vector_norm",
        "norm",
        "all",
    )
    add(reduced, "cumsum", "cumprod", "sort", "topk", "any", "_safe_softmax", "median")
    add(reduced, "cummax", "cummin", "logcumsumexp", "kthvalue", "mode", "nanmedian")
    add(scattered, "index_add", "index_copy", "index_reduce", "index_fill", "scatter", "scatter_add", "scatter_reduce")
    add(scattered, "index_add_", "index_copy_", "index_reduce_", "index_fill_", "scatter_", "scatter_add_")
    add(scattered, "scatter_reduce_", "slice_scatter", "select_scatter")
    add(sorted_into, "bucketize")
    add(put, "index_put", "index_put_", "_unsafe_index_put")
    add(bag, "_embedding_bag", "_embedding_bag_forward_only")
    add(sampled, "grid_sampler_2d", "grid_sampler_3d")
    add(unpooled, "max_unpool2d", "max_unpool3d")
    add(folded, "col2im")
    add(sparse_product, "_sparse_addmm")
    add(transformed, "_fft_r2c", "_fft_c2c", "_fft_c2r")
    add(complex_view, "view_as_complex", "view_as_real")
    add(gated_linear, "glu")
    add(batch_norm, "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
    add(
        batch_norm,
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_batch_norm_with_update",
        "batch_norm",
        "_batch_norm_no_update",
    )
    add(layer_norm, "native_layer_norm")
    add(rms_norm, "_fused_rms_norm")
    add(group_norm, "native_group_norm")
    add(weight_norm, "_weight_norm_interface")
    add(embedding, "embedding")
    add(mm, "mm", "bmm")
    add(vector_product, "mv", "dot", "vdot")
    add(addmm, "addmm", "baddbmm")
    add(linear, "linear")
    add(convolution, "convolution")
    return table


RULES: dict[Any, Rule] = _table()

NAMED: dict[str, Rule] = {
    "torchvision.roi_align": regions,
    "torchvision.roi_pool": regions,
    "torchvision.deform_conv2d": deformable,
}
"""Rules of libraries' operations, which are there only once the library has been imported, by their names."""


def default(call: Call) -> Results:
    """Operations that PyTorch itself calls pointwise need no entry; what has none in `NAMED` either is unknown."""
    if (named := NAMED.get(str(call.op.overloadpacket))) is not None:
        return [tuple(tracks) for tracks in named(call)]
    name = call.op.overloadpacket.__name__
    plain = getattr(aten, name.removesuffix("_"), None)  # in-place twins lack the tag at times
    overloads = [call.op] + ([getattr(plain, o) for o in plain.overloads()] if name.endswith("_") and plain else [])
    return pointwise(call) if any(torch.Tag.pointwise in o.tags for o in overloads) else unknown(call)
