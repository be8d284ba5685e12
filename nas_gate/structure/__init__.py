"""What can be removed from a model: labels run through its own operations."""

from nas_gate.structure.depth import VANISHES, Zeros, add_switches
from nas_gate.structure.rules import RULES, default
from nas_gate.structure.trace import BRANCH, CHOICE, WIDTH, Call, Findings, trace
from nas_gate.structure.units import Axis, Fixed, Group, Member, Norm, Options, Part, Slots, Structure, Term, solve

__all__ = [
    "BRANCH",
    "CHOICE",
    "RULES",
    "VANISHES",
    "WIDTH",
    "Axis",
    "Call",
    "Findings",
    "Fixed",
    "Group",
    "Member",
    "Norm",
    "Options",
    "Part",
    "Slots",
    "Structure",
    "Term",
    "Zeros",
    "add_switches",
    "default",
    "solve",
    "trace",
]
