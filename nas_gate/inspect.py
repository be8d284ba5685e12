"""What gates can reach in a model, and why the rest is fixed: as text and as JSON-ready data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nas_gate.cost import CostModel, reachable_share
from nas_gate.structure import Structure


def to_json(structure: Structure) -> dict[str, Any]:
    """Groups, sizes, shares of cost, and all that is fixed with its reason, as plain data.

    `kept` lists the branches that are no units.
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
                "units": g.size,
                "start": g.start,
                "members": [{"tensor": m.tensor, "dim": m.dim, "slots_per_unit": m.slots} for m in g.members],
            }
            for g in structure.groups
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
    for g in structure.groups:
        members = [f"{m.tensor}:{m.dim}" + (f" x{m.slots}" if m.slots > 1 else "") for m in g.members]
        shown = _some(gone.get(g.start, members))
        lines.append(f"  {g.kind:<6}  {g.name:<{width}}  {g.size:>6} unit{'s' if g.size > 1 else ' '}  {shown}")
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
