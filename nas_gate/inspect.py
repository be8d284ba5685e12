"""What gates can reach in a model, and why the rest is fixed: as text and as JSON-ready data."""

from __future__ import annotations

from typing import Any

from nas_gate.cost import CostModel, reachable_share
from nas_gate.structure import Structure


def to_json(structure: Structure) -> dict[str, Any]:
    """Groups, sizes, shares of cost, and every fixed dimension with its reason, as plain data."""
    cost = CostModel(structure)
    return {
        "macs": cost.total("macs"),
        "params": cost.total("params"),
        "units": structure.units,
        "share_of_macs_reachable": reachable_share(structure),
        "groups": [
            {
                "name": g.name,
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
    for g in structure.groups:
        members = [f"{m.tensor}:{m.dim}" + (f" x{m.slots}" if m.slots > 1 else "") for m in g.members]
        shown = ", ".join(members[:4]) + (f", and {len(members) - 4} more" if len(members) > 4 else "")
        lines.append(f"  {g.name:<{width}}  {g.size:>6} units  {shown}")
    if not structure.groups:
        lines.append("  none")
    lines += ["", "fixed (slots of tensor:dimension), by reason:"]
    by_reason: dict[str, list[str]] = {}
    for f in structure.fixed:
        part = f"{f.slots} of {f.size}" if f.slots < f.size else f"{f.size}"
        by_reason.setdefault(f.reason, []).append(f"{f.tensor}:{f.dim} ({part})")
    for reason, members in by_reason.items():
        shown = ", ".join(members[:4]) + (f", and {len(members) - 4} more" if len(members) > 4 else "")
        lines.append(f"  {reason}: {shown}")
    if not by_reason:
        lines.append("  none")
    return "\n".join(lines)
