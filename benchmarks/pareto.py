"""How long fronts take: 10^5 candidates of two objectives, at random and at worst (all of them on the front).

    python benchmarks/pareto.py [-o results/pareto]

Writes pareto.json: seconds, the median of five calls, of `non_dominated`, `hypervolume`, `knee` and the table that
`nas-gate pareto` prints from (`marked`). Two objectives are what the commands use; of three, `non_dominated` is
measured on random points, of which about a hundred are on the front (its time grows with the front's size).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import _environment
import numpy as np
import numpy.typing as npt
import pandas as pd

from nas_gate.pareto import front, hypervolume, knee, marked, non_dominated

POINTS = 100_000


def seconds(function: Callable[[], Any]) -> float:
    taken = []
    for _ in range(5):
        before = perf_counter()
        function()
        taken.append(perf_counter() - before)
    return round(median(taken), 4)


def table(values: npt.NDArray[np.float64]) -> pd.DataFrame:
    """Candidates of (accuracy, share of the MACs)."""
    plain = {"study": "a", "trial": 0, "path": "", "method": "gates", "seed": 0, "target": 0.5, "test_accuracy": 0.5}
    dense = {"params": 1.0, "dense_accuracy": 1.0, "dense_macs": 1.0, "dense_params": 1.0}
    return pd.DataFrame({"accuracy": values[:, 0], "macs": values[:, 1], **plain, **dense})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/pareto"))
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    cost = np.sort(1 - generator.random(POINTS))
    clouds = {"random": 1 - generator.random((POINTS, 2)), "all on the front": np.column_stack([np.sqrt(cost), cost])}
    rows: list[dict[str, Any]] = []
    for name, values in clouds.items():
        candidates = table(values)
        best = front(candidates)
        for function, call in {
            "non_dominated": lambda values=values: non_dominated(values, [True, False]),
            "hypervolume": lambda values=values: hypervolume(values, (0.0, 1.0), [True, False]),
            "knee": lambda best=best: knee(best),
            "marked": lambda candidates=candidates: marked(candidates),
        }.items():
            rows.append({"points": name, "on_front": len(best), "function": function, "seconds": seconds(call)})
    three = generator.random((POINTS, 3))
    on_front = int(non_dominated(three, [True] * 3).sum())
    taken = seconds(lambda: non_dominated(three, [True] * 3))
    rows.append({"points": "random, 3 objectives", "on_front": on_front, "function": "non_dominated", "seconds": taken})
    print(pd.DataFrame(rows).to_string(index=False))
    _environment.write(options.output / "pareto.json", points=POINTS, results=rows)


if __name__ == "__main__":
    main()
