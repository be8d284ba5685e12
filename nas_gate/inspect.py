"""What gates can reach in a model, and why the rest is fixed: as text and as JSON-ready data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nas_gate.cost import CostModel, reachable_share
from nas_gate.structure import WIDTH, Group, Structure

CHANNELS, HEADS, HIDDEN, STREAM = "channels", "heads", "hidden", "stream"
"""What units are: channels of convolutions, heads of attention, hidden features, those of a residual stream."""


def roles(structure: Structure) -> list[str]:
    """What the units of every group are: one of the words above, or the group's kind where that is no width.

    Heads have several slots each and are multiplied in batches, without a weight. A stream is what several weights add
    to and several take in (an embedding); one convolution may be among them, as that which cuts an image into patches.
    """
    dims = {term.where: len(term.axes) for term in structure.params}
    groups = structure.group_of_unit()
    taken: dict[int, set[tuple[str, int]]] = {}
    for s in structure.gates:
        for index in set(groups[s.units[s.units >= 0]].tolist()):
            taken.setdefault(index, set()).add((s.tensor, s.dim))

    def role(index: int, group: Group) -> str:
        if group.kind != WIDTH:
            return group.kind
        along = {i for i, axis in enumerate(structure.axes) if any(g == index for g, _ in axis.groups)}
        ran = {(term.op, term.where) for term in structure.macs if along.intersection(term.axes)}
        batches = any(op in ("aten.bmm", "aten.baddbmm") for op, _ in ran)
        if batches and any(m.slots > 1 for m in group.members):
            return HEADS
        gates = taken.get(index, set())
        weights = {(m.tensor, m.dim) for m in group.members if dims.get(m.tensor, 0) > 1}
        streams = len(gates) > 1 and len(weights - gates) > 1
        convolutions = sum(op == "aten.convolution" for op, _ in ran)
        if convolutions > streams:
            return CHANNELS
        return STREAM if streams else HIDDEN

    return [role(i, g) for i, g in enumerate(structure.groups)]


def to_json(structure: Structure) -> dict[str, Any]:
    """Groups, sizes, shares of cost, and all that is fixed with its reason, as plain data.

    `kept` lists the branches that are no units; a group's `role` says what its units are (see `roles`).
    """
    cost = CostModel(structure)
    return {
        "macs": cost.total("macs"),
        "params": cost.total("params"),
        "units": structure.units,
        "share_of_macs_reachable": reachable_share(structure),
        "groups": [
            {
                "name": g.name,
                "kind": g.kind,
                "role": role,
                "units": g.size,
                "start": g.start,
                "members": [{"tensor": m.tensor, "dim": m.dim, "slots_per_unit": m.slots} for m in g.members],
            }
            for g, role in zip(structure.groups, roles(structure))
        ],
        "fixed": [
            {"tensor": f.tensor, "dim": f.dim, "slots": f.slots, "of": f.size, "reason": f.reason}
            for f in structure.fixed
        ],
        "kept": [{"name": k.name, "kind": k.kind, "reason": k.reason} for k in structure.kept],
    }


def describe(structure: Structure) -> str:
    """A table of groups and a list of reasons, for people."""
    cost = CostModel(structure)
    lines = [
        f"{cost.total('macs'):,} MACs, {cost.total('params'):,} parameters; "
        f"{structure.units:,} removable units in {len(structure.groups)} groups; "
        f"gates reach {100 * reachable_share(structure):.1f}% of the MACs",
        "",
        "removable groups (tensor:dimension, xN where every unit has N slots there):",
    ]
    width = max((len(g.name) for g in structure.groups), default=0)
    gone = {part.unit: [path for path, _ in part.modules] + list(part.loose) for part in structure.parts}
    for g, role in zip(structure.groups, roles(structure)):
        members = [f"{m.tensor}:{m.dim}" + (f" x{m.slots}" if m.slots > 1 else "") for m in g.members]
        shown = _some(gone.get(g.start, members))
        lines.append(f"  {role:<8}  {g.name:<{width}}  {g.size:>6} unit{'s' if g.size > 1 else ' '}  {shown}")
    if not structure.groups:
        lines.append("  none")
    lines += ["", "fixed (slots of tensor:dimension), by reason:"]
    by_reason: dict[str, list[str]] = {}
    for f in structure.fixed:
        part = f"{f.slots} of {f.size}" if f.slots < f.size else f"{f.size}"
        by_reason.setdefault(f.reason, []).append(f"{f.tensor}:{f.dim} ({part})")
    for reason, members in by_reason.items():
        lines.append(f"  {reason}: {_some(members)}")
    lines += [f"  {k.reason}: {k.kind} {k.name}" for k in structure.kept]
    if not by_reason and not structure.kept:
        lines.append("  none")
    return "\n".join(lines)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f", and {len(items) - 4} more" if len(items) > 4 else "")
