"""What can be removed from a model: labels run through its own operations."""

from nas_gate.structure.rules import RULES, default
from nas_gate.structure.trace import Call, Findings, trace
from nas_gate.structure.units import Axis, Fixed, Group, Member, Slots, Structure, Term, solve

__all__ = [
    "RULES",
    "Axis",
    "Call",
    "Findings",
    "Fixed",
    "Group",
    "Member",
    "Slots",
    "Structure",
    "Term",
    "default",
    "solve",
    "trace",
]
