"""What the framework costs per trial: ask, folder, compose, tell, with a job that does nothing.

    python benchmarks/study_overhead.py                                     # the journal
    python benchmarks/study_overhead.py --postgresql postgresql://USER@HOST/DATABASE

Every study runs as `nas-gate search --multirun` runs it: Hydra composes each trial's whole configuration, a supervisor
follows 1, 2 or 4 workers. Measured from the first trial's creation to the last one's end, per trial, so without the
start of the workers, which is reported beside it. Results go to results/study_overhead/study_overhead.json and .md. The
target is 0.15 s per trial with one worker; run it on a machine that does nothing else (the load is recorded).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import _environment
import optuna
from omegaconf import DictConfig

from nas_gate.study.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.15
SPACE = ["target=interval(0.1,0.9)", "budget.arguments.weight=tag(log,interval(1,16))"]


def no_work(config: DictConfig) -> dict[str, Any]:
    return {"accuracy": config.target, "macs": config.target * 1e6, "params": 1, "path": "nowhere"}


def take_part(overrides: list[str]) -> None:
    """What the command line does, with another job."""
    import hydra

    from nas_gate.cli import conf_dir, register_resolvers, settings_of
    from nas_gate.study.sweeper import register

    register_resolvers()
    register([sys.executable, __file__, "--take-part", *overrides], settings_of)
    sys.argv = ["search", *overrides]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(no_work)()


def measure(trials: int, workers: int, url: str | None, folder: Path) -> dict[str, Any]:
    name = f"overhead-{uuid.uuid4().hex[:8]}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"study={name}", f"n_trials={trials}", f"n_workers={workers}", *([f"storage='{url}'"] if url else [])]
    overrides = ["--multirun", f"hydra.sweep.dir={folder}", *(f"hydra.sweeper.{text}" for text in settings), *SPACE]
    load, began = os.getloadavg()[0], time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, "--take-part", *overrides], check=True, env=environment)
    whole = time.monotonic() - began
    done = optuna.load_study(study_name=name, storage=open_storage(url, folder)).trials
    first = min(trial.datetime_start for trial in done)
    seconds = (max(trial.datetime_complete for trial in done) - first).total_seconds()
    assert len(done) == trials
    return {
        "storage": "journal" if url is None else url.partition(":")[0],
        "workers": workers,
        "trials": trials,
        "seconds_per_trial": seconds / trials,
        "seconds_start_and_end": whole - seconds,
        "load_before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--postgresql", help="the URL of a database that may be written to")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "study_overhead" / "study_overhead.json")
    options = parser.parse_args()
    rows = []
    for url in [None, *([options.postgresql] if options.postgresql else [])]:
        for workers in options.workers:
            rows.append(measure(options.trials, workers, url, ROOT / "runs" / "study_overhead"))
            print(json.dumps(rows[-1]), flush=True)
    sys.argv = [argument if "://" not in argument else "postgresql://..." for argument in sys.argv]
    _environment.write(options.output, target_seconds_per_trial=TARGET, rows=rows)
    lines = ["| storage | workers | s per trial | start and end, s | load before |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['seconds_per_trial']:.3f} | {row['seconds_start_and_end']:.1f} | {row['load_before']:.1f}"
        lines.append(f"| {row['storage']} | {row['workers']} | {figures} |")
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--take-part"]:
        take_part(sys.argv[2:])
    else:
        main()
