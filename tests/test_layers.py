"""A module imports only from the layers below it, and `import nas_gate` needs no training library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nas_gate"
LAYERS: dict[str, set[str]] = {
    name: set() for name in ("errors", "files", "gates", "modules", "attention", "quality", "import_paths", "described")
}
LAYERS["pareto"] = {"quality"}
LAYERS["latency"] = {"files"}
LAYERS["tasks"] = {"import_paths", "quality"}
LAYERS["structure"] = {"modules"}
LAYERS["models"] = {"import_paths", "modules"}
LAYERS["data"] = {"tasks"}
LAYERS["latency_table"] = {"structure"}
LAYERS["cost"] = {"latency_table", "structure"}
LAYERS["gating"] = {"cost", "gates", "latency_table", "modules", "structure"}
LAYERS["landing"] = {"cost", "latency_table", "structure"}
LAYERS["removal"] = {"attention", "cost", "gating", "modules", "structure"}
LAYERS["operations"] = {"removal", "structure"}
LAYERS["measuring"] = {"files", "gating", "latency", "latency_table", "operations", "removal", "structure"}
LAYERS["inspect"] = {"cost", "structure"}
LAYERS["candidate"] = {"models", "removal", "structure"}
LAYERS["analysis"] = {"cost", "gates", "gating", "landing", "modules", "removal", "structure"}
LAYERS["padding"] = {"analysis", "gating", "removal", "structure"}
LAYERS["training"] = {"data", "errors", "files", "quality", "tasks"}
LAYERS["baselines"] = {"gating", "structure"}
LAYERS["settings"] = {"baselines", "cost", "described", "errors", "training"}
LAYERS["budgets"] = {"gating", "settings", "training"}
LAYERS["folders"] = {"described", "errors", "files"}
LAYERS["prepare"] = {*LAYERS} - {"candidate", "inspect", "pareto"}
LAYERS["outcome"] = {
    "cost",
    "described",
    "latency",
    "models",
    "pareto",
    "prepare",
    "quality",
    "removal",
    "settings",
    "training",
}
LAYERS["search"] = {*LAYERS}
LAYERS["selection"] = {"pareto", "quality"}
LAYERS["plots"] = {"files", "pareto", "quality", "selection"}
LAYERS["exported"] = {"latency", "quality"}
LAYERS["export"] = {"candidate", "cost", "exported", "latency", "models", "padding", "removal", "structure"}
LAYERS["collect"] = {"candidate", "described", "latency", "pareto", "quality"}
LAYERS["table"] = {"collect", "pareto", "plots", "quality", "selection"}
LAYERS["report"] = {"candidate", "collect", "cost", "export", "models", "pareto", "plots", "quality", "removal"}
LAYERS["reproduce"] = {"cost", "described"}
LAYERS["commands"] = {*LAYERS}
LAYERS["study"] = {*LAYERS}
LAYERS["cli"] = {*LAYERS}
TRIAL = {"budgets", "folders", "outcome", "prepare", "settings", "search"}
LAYERS["__init__"] = {*LAYERS} - {"models", "data", "training", "study", "commands", "cli"} - TRIAL
ONLY_IN = {"hydra": {"cli", "study"}, "omegaconf": {"cli", "study"}, "optuna": {"study"}}
HEAVY = ["lightning_fabric", "hydra", "omegaconf", "optuna", "torchvision", "sklearn", "pandas", "rich"]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too; the package's own public names count as its parts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_from_below(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert layer in LAYERS, f"{path.name} has no layer: give it one here"
    for name in imports(path):
        first, *rest = name.split(".")
        assert layer in ONLY_IN.get(first, {layer}), f"only {ONLY_IN[first]} may import {first}, but {path} does"
        if first == "nas_gate" and rest[0] in LAYERS:
            assert rest[0] in LAYERS[layer] | {layer}, f"{layer} may not import {name}"
        elif first == "nas_gate":
            assert layer == "cli", f"{path} must import {name} from the module that defines it"


def test_importing_the_package_pulls_in_no_training_library() -> None:
    code = f"import sys, nas_gate; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
