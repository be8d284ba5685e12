"""What several tests share: studies of real candidates with figures set by hand, and what a skipped test means."""

import json
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one test process per core: a thread each, theirs and their children's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from nas_gate import cli
from nas_gate.search import search

DENSE = {"dense_accuracy": 0.95, "dense_macs": 1_000_000, "dense_params": 100_000}


def has_compiler() -> bool:
    """Whether torch.compile can make code for the processor."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError):
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")


def _required(report: Any) -> Any:
    """A skipped test, or file of tests, fails where nothing may be skipped, as in CI."""
    if report.skipped and os.environ.get("NAS_GATE_SKIP_NOTHING"):
        report.outcome, report.longrepr = "failed", f"skipped, and NAS_GATE_SKIP_NOTHING is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _required((yield))


@pytest.fixture(scope="session", autouse=True)
def no_data_root_of_the_user():
    """What the settings of a run are must not depend on the environment that the tests run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NAS_GATE_DATA", raising=False)
        yield


def set_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; dots lead into mappings, as in budget.arguments.weight."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = content
        for name in outer:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Target -> the folder of a search in seconds."""
    folder = tmp_path_factory.mktemp("searched")
    runs = {}
    for target in (0.5, 0.25):
        overrides = ["experiment=debug", "model.arguments.width=0.25", "training.gating.learning_rate=0.1"]
        settings = cli.settings_of(cli.composed([*overrides, f"target={target}"]))
        runs[target] = folder / str(target)
        search(settings, runs[target], cache_dir=folder / "dense")
    return runs


def trial(
    folder: Path, run: Path, accuracy: float, macs: int, params: int, settings: dict[str, Any], **result: Any
) -> Path:
    """A copy of a run with other figures and settings."""
    shutil.copytree(run, folder)
    figures = {"accuracy": accuracy, "macs": macs, "params": params, **DENSE, **result}
    set_json(folder / "result.json", **figures, target=settings["target"])
    set_json(folder / "settings.json", **settings)
    return folder


def as_errors(study: Path, folder: Path) -> Path:
    """A copy of a study that is judged by an error, 1 - accuracy: so with the same order of candidates."""

    def mirrored(plain: Any) -> Any:
        if isinstance(plain, list):
            return [mirrored(each) for each in plain]
        if not isinstance(plain, dict):
            return plain
        found = {}
        for key, value in plain.items():
            error = "accuracy" in key and value is not None
            found[key.replace("accuracy", "rmse")] = round(1 - value, 9) if error else mirrored(value)
        return found

    shutil.copytree(study, folder)
    for name in ("result.json", "history.json"):
        for file in folder.glob(f"*/{name}"):
            content = mirrored(json.loads(file.read_text()))
            if name == "result.json":
                content["task_metric"] = {"name": "rmse", "higher_is_better": False, "shown": ".4f"}
            file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def studies(searched: dict[float, Path], tmp_path: Path) -> Path:
    """A folder with the studies alpha (one front, a damaged trial, an unfinished one) and beta (seeds, a baseline)."""
    half, quarter = searched[0.5], searched[0.25]
    alpha, beta = tmp_path / "studies" / "alpha", tmp_path / "studies" / "beta"
    trial(alpha / "0", half, 0.94, 700_000, 80_000, {"target": 0.7}, test_accuracy=None)
    trial(alpha / "1", half, 0.93, 400_000, 50_000, {"target": 0.4})
    trial(alpha / "2", half, 0.92, 500_000, 55_000, {"target": 0.5})
    trial(alpha / "3", quarter, 0.80, 200_000, 20_000, {"target": 0.2, "budget.arguments.weight": 8.0})
    (trial(alpha / "4", half, 0.9, 1, 1, {"target": 0.6}) / "result.json").unlink()
    weights = trial(alpha / "5", half, 0.99, 1, 1, {"target": 0.6}) / "candidate" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        trial(beta / str(seed), half, accuracy, 500_000, 60_000, {"target": 0.5, "seed": seed})
    trial(beta / "3", half, 0.85, 500_000, 60_000, {"target": 0.5}, method="uniform")
    for study in (alpha, beta):
        (study / "study.json").write_text("{}")
    return tmp_path / "studies"
