import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import nas_gate
from nas_gate import data, models, search, training
from nas_gate.search import Gating, Named, Refused, Settings
from nas_gate.training import Diverged, Hardware, Recipe

RECIPE = Recipe(epochs=2, learning_rate=0.05, clip_norm=1.0)
TINY = Settings(
    model=Named("digits_cnn", {"width": 0.25}),
    data=Named("digits", {"batch_size": 256}),
    dense=RECIPE,
    cycle=replace(RECIPE, epochs=4),
    gating=Gating(epochs=2, learning_rate=0.1, descent=0.5),
    hardware=Hardware(accelerator="cpu"),
    target=0.6,
)


def run(folder: Path, settings: Settings = TINY, **more: Any) -> dict[str, Any]:
    return search.search(settings, folder / "run", cache_dir=folder / "dense", **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One finished trial: its folder, its results, what it printed."""
    folder, text = tmp_path_factory.mktemp("whole"), io.StringIO()
    result = run(folder, console=Console(file=text, width=120))
    return folder, result, text.getvalue()


def same_weights(first: str, second: str) -> bool:
    a, b = (nas_gate.load(path).state_dict() for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_candidate_is_what_the_results_say(whole: tuple[Path, dict[str, Any], str]):
    _, result, _ = whole
    network = nas_gate.load(result["path"])
    digits = data.load("digits", batch_size=256)
    fabric = training.connect(TINY.hardware)
    assert training.evaluate(network, digits.validation, fabric=fabric).accuracy == result["accuracy"]
    assert training.evaluate(network, digits.test, fabric=fabric).accuracy == result["test_accuracy"]
    assert nas_gate.count_macs(network, (torch.zeros(1, 1, 8, 8),)) == result["macs"]
    assert sum(p.numel() for p in network.parameters()) == result["params"]
    dense = models.build("digits_cnn", width=0.25)
    assert sum(p.numel() for p in dense.parameters()) == result["dense_params"]
    assert result["achieved"] == result["macs"] / result["dense_macs"] <= result["target"] == 0.6
    assert result["max_relative_error"] < 1e-4


def test_accuracy_is_the_last_epochs_never_the_best(whole: tuple[Path, dict[str, Any], str]):
    folder, result, _ = whole
    history = json.loads((folder / "run" / "history.json").read_text())
    assert result["accuracy"] == history["finetuned"][-1]["accuracy"]
    assert result["dense_accuracy"] == history["dense"][-1]["accuracy"]
    assert [entry["epoch"] for entry in history["gated"] + history["finetuned"]] == [0, 1, 2, 3]


def test_what_is_printed(whole: tuple[Path, dict[str, Any], str]):
    _, result, text = whole
    for row in ("dense", "gated", "landed", "fine-tuned"):
        assert f"│ {row} " in text
    assert f"nas_gate.load({result['path']!r})" in text
    assert "gated        epoch 2/2" in text
    assert " for 0.600" in text  # cost against target
    assert f"achieved {result['achieved']:.4f} of the dense macs, asked 0.6" in text


def test_a_finished_trial_is_reported_and_not_repeated(
    whole: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
):
    folder, result, _ = whole
    monkeypatch.setattr(search, "prepare", None)
    text = io.StringIO()
    assert run(folder, console=Console(file=text, width=120)) == result
    assert "finished already" in text.getvalue()


def test_dense_weights_are_shared_by_trials(
    whole: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder, result, _ = whole
    fits = []
    real = search.fit
    monkeypatch.setattr(search, "fit", lambda *a, **k: (fits.append(k["label"]), real(*a, **k))[1])
    settings = replace(TINY, target=0.3, test=False, budget=Named("lagrangian", {"rate": 1.0}))
    settings = replace(settings, gate=Named("gumbel"), distillation=search.Distillation(weight=0))
    before = {p: p.stat().st_mtime_ns for p in (folder / "dense").glob("*/dense.pt")}
    other = search.search(settings, tmp_path / "run", cache_dir=folder / "dense")
    assert {p: p.stat().st_mtime_ns for p in (folder / "dense").glob("*/dense.pt")} == before
    assert len(before) == 1
    assert other["dense_accuracy"] == result["dense_accuracy"]
    assert other["test_accuracy"] is None
    assert other["achieved"] <= 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"dense": replace(RECIPE, epochs=3)},
        {"model": Named("digits_cnn", {"width": 0.5})},
        {"data": Named("digits", {"batch_size": 128})},
    ],
)
def test_the_cache_knows_what_determines_dense_weights(change: dict, tmp_path: Path):
    names = []
    for settings in (TINY, replace(TINY, **change)):
        prepared = search.prepare(settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
            search.train_dense(settings, prepared, tmp_path)
    assert names[0] != names[1]


def test_killed_in_every_stage_it_continues_to_the_same_weights(
    whole: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    _, result, _ = whole
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_search import TINY, run
        from nas_gate import search
        real, folder = search.fit, Path(sys.argv[1])

        def dying(stage, steps):  # dies in the given stage after so many steps
            def fit(module, train, *a, label, **k):
                if label == stage:
                    class Deadly:
                        left = steps
                        def __getattr__(self, name):
                            return getattr(train, name)
                        def __len__(self):
                            return len(train)
                        def __iter__(self):
                            for batch in train:
                                if self.left == 0:
                                    os.kill(os.getpid(), signal.SIGKILL)
                                self.left -= 1
                                yield batch
                    return real(module, Deadly(), *a, label=label, **k)
                return real(module, train, *a, label=label, **k)
            return fit

        for stage in ("dense", "gated", "fine-tuned"):
            child = os.fork()
            if child == 0:
                search.fit = dying(stage, 7)  # five steps an epoch: in the second one
                run(folder)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, stage
        assert not (folder / "run" / "result.json").exists()
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").glob("*.pt")} == {"gated.pt", "finetuned.pt"}
    continued = run(tmp_path)
    assert same_weights(result["path"], continued["path"])

    def measured(r: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in r.items() if k != "path" and not k.startswith("seconds")}

    assert measured(continued) == measured(result)
    assert list((tmp_path / "run").glob("*.pt")) == []  # the candidate holds the weights now


def test_nan_stops_the_stage_with_the_dense_weights_kept(tmp_path: Path):
    wild = replace(TINY, cycle=replace(TINY.cycle, learning_rate=1e30, clip_norm=0.0))
    with pytest.raises(Diverged, match=r"epoch 1"):
        run(tmp_path, wild)
    assert not (tmp_path / "run" / "gated.pt").exists()
    assert len(list((tmp_path / "dense").glob("*/dense.pt"))) == 1


def test_the_penalty_follows_the_descending_target():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    settings = replace(TINY, cycle=Recipe(epochs=10), gating=Gating(epochs=10, descent=0.5), target=0.4)
    controller = search.GateController(gated, search.make_budget("penalty", "macs", weight=2.0), settings)
    for epoch, target in ((0.0, 1.0), (2.5, 0.7), (5.0, 0.4), (9.9, 0.4)):
        controller.before_step(epoch)
        assert controller.figures() == pytest.approx({"cost": 1.0, "target": target})
        assert float(controller.loss().detach()) == pytest.approx(2 * (1 - target) ** 2, abs=1e-6)


def test_the_lagrangian_is_part_of_the_checkpoint():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    first, second = (
        search.GateController(gated, search.make_budget("lagrangian", "macs", rate=0.5), TINY) for _ in "ab"
    )
    first.before_step(2.0)
    for _ in range(3):
        first.after_step()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.before_step(2.0)
    assert float(second.loss().detach()) == float(first.loss().detach()) > 0


class Fixed(nn.Module):
    """Nothing of it can be removed: its one layer's outputs are the model's."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def changed(**change: Any) -> Settings:
    return replace(TINY, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(target=0.0), r"0 < target < 1.*got 0\.0"),
        (lambda: changed(target=1.0), r"0 < target < 1.*got 1\.0"),
        (lambda: changed(metric="flops"), "metric must be one of macs, params"),
        (lambda: changed(seed=-1), "seed >= 0"),
        (lambda: changed(gating=Gating(epochs=5)), r"gating.epochs <= cycle.epochs.*=4.* got 5"),
        (lambda: changed(gating=Gating(epochs=1, descent=2.0)), "descent <= 1"),
        (lambda: changed(distillation=search.Distillation(temperature=0.0)), "temperature > 0"),
        (lambda: changed(target=0.001), r"target=0\.001 is below what is reachable.*between 0\.\d+ and 1"),
        (lambda: changed(model=Named("digits_cn")), "unknown model 'digits_cn'.*digits_cnn"),
        (lambda: changed(model=Named("digits_cnn", {"depth": 3})), "depth.*arguments are .*width"),
        (lambda: changed(model=Named("test_search:Fixed")), "at least one removable unit"),
        (lambda: changed(data=Named("digit")), "no data set 'digit'; valid names: digits"),
        (lambda: changed(data=Named("digits", {"size": 3})), "takes no argument 'size'"),
        (lambda: changed(data=Named("cifar10")), "no data root is set"),
        (lambda: changed(gate=Named("gumbell")), "unknown gate 'gumbell'; known: .*gumbel"),
        (lambda: changed(gate=Named("gumbel", {"heat": 1})), "heat"),
        (lambda: changed(budget=Named("lagrange")), "one of .*lagrangian.*got 'lagrange'"),
        (lambda: changed(budget=Named("penalty", {"power": 3})), "power.* must be 1 or 2, but got 3"),
        (lambda: changed(hardware=Hardware(accelerator="abacus")), "abacus"),
        (lambda: changed(hardware=Hardware(accelerator="cpu", precision="8")), "8"),
    ],
)
def test_bad_input_is_refused_before_any_training(
    make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NAS_GATE_DATA", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(search, "fit", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, make())
    assert not (tmp_path / "dense").exists()
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_same_folder_are_refused_with_what_differs(
    whole: tuple[Path, dict[str, Any], str],
):
    folder, _, _ = whole
    other = replace(TINY, target=0.5, model=Named("digits_cnn", {"width": 0.5}))
    with pytest.raises(Refused, match=r"model\.arguments\.width: 0\.25 there, 0\.5 asked.*target: 0\.6 there"):
        run(folder, other)


def test_a_folder_in_use_is_refused(tmp_path: Path):
    fabric = SimpleNamespace(is_global_zero=True, barrier=lambda: None)
    with (
        search.held(tmp_path, fabric),  # type: ignore[arg-type]
        pytest.raises(Refused, match="Another process is working in"),
        search.held(tmp_path, fabric),  # type: ignore[arg-type]
    ):
        pass


def test_dense_epochs_0_keep_the_models_own_weights(tmp_path: Path):
    prepared = search.prepare(TINY)
    before = {name: value.clone() for name, value in prepared.dense.state_dict().items()}
    settings = replace(TINY, dense=replace(RECIPE, epochs=0))
    assert search.train_dense(settings, prepared, tmp_path) == []
    assert all(torch.equal(before[name], value) for name, value in prepared.dense.state_dict().items())
