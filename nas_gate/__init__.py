"""nas-gate: neural architecture search with trainable gates.

One idea: an architecture is a 0/1 vector (*keep*) over a network's removable units. Gates learn it, the cost model
prices it, removal applies it. A training loop needs `attach`, `penalty` and `remove`; the rest is here for those who
want the parts.
"""

from nas_gate.analysis import analyze, attach, land, remove, remove_with_proof
from nas_gate.baselines import sensitivity, spread_gates
from nas_gate.candidate import load, save
from nas_gate.cost import CostModel, count_macs, reachable_share
from nas_gate.gates import GATES, SHAPES, TrainableGate, make_gate
from nas_gate.gating import GatedModel, Lagrangian, penalty
from nas_gate.inspect import describe, to_json
from nas_gate.landing import reachable
from nas_gate.latency_table import LatencyTable
from nas_gate.measuring import measure_latency
from nas_gate.modules import Choice
from nas_gate.removal import MENDS, RemovalError, Removed
from nas_gate.structure import RULES, Structure

__version__ = "0.1.0"

__all__ = [
    "GATES",
    "MENDS",
    "RULES",
    "SHAPES",
    "Choice",
    "CostModel",
    "GatedModel",
    "Lagrangian",
    "LatencyTable",
    "RemovalError",
    "Removed",
    "Structure",
    "TrainableGate",
    "analyze",
    "attach",
    "count_macs",
    "describe",
    "land",
    "load",
    "make_gate",
    "measure_latency",
    "penalty",
    "reachable",
    "reachable_share",
    "remove",
    "remove_with_proof",
    "save",
    "sensitivity",
    "spread_gates",
    "to_json",
]
