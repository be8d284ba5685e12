import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import needs_compiler
from lightning_fabric import Fabric
from rich.console import Console
from torch import nn

import nas_gate
from nas_gate import baselines, budgets, data, folders, landing, models, prepare, search, training
from nas_gate.collect import collect
from nas_gate.described import setting_of
from nas_gate.errors import Diverged, InUse, Refused
from nas_gate.search import Gating, Named, Settings
from nas_gate.settings import describe
from nas_gate.training import Hardware, Recipe

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
    assert result["gated_accuracy"] == history["gated"][-1]["accuracy"]  # of validation data, too
    assert [entry["epoch"] for entry in history["gated"] + history["finetuned"]] == [0, 1, 2, 3]


def test_gates_learn_what_the_budget_asks(whole: tuple[Path, dict[str, Any], str]):
    """Landing reaches any target; what is told here is that training has come near it before."""
    folder, _, _ = whole
    costs = [epoch["figures"]["cost"] for epoch in json.loads((folder / "run" / "history.json").read_text())["gated"]]
    assert costs[-1] < min(0.8, costs[0])


@pytest.mark.parametrize("test", [True, False])
def test_test_data_are_looked_at_once_or_never(test: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks = []

    class Counted:
        def __init__(self, loader: Any) -> None:
            self._loader = loader

        def __iter__(self) -> Any:
            looks.append(1)
            return iter(self._loader)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

    real = search.prepare

    def prepared(*given: Any) -> Any:
        found = real(*given)
        return replace(found, test=Counted(found.test))

    monkeypatch.setattr(search, "prepare", prepared)
    short = replace(TINY, test=test, dense=replace(RECIPE, epochs=1), cycle=replace(RECIPE, epochs=2))
    run(tmp_path, replace(short, gating=replace(TINY.gating, epochs=1)))
    assert len(looks) == test


def test_seeds_draw_other_validation_data():
    first, second, again = (prepare.load_data(replace(TINY, seed=seed)).validation for seed in (0, 1, 0))
    images = [torch.cat([x for x, _ in loader]) for loader in (first, second, again)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


def test_settings_reach_what_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def spy(name: str, real: Any) -> Any:
        return lambda *a, **k: (seen.update({name: (a, k)}), real(*a, **k))[1]

    for name in ("spread_gates", "distilled", "Adam"):
        monkeypatch.setattr(search, name, spy(name, getattr(search, name)))
    settings = replace(
        TINY,
        cycle=replace(RECIPE, epochs=2),
        gating=Gating(epochs=1, learning_rate=0.07, descent=0.5, spread=0.4),
        distillation=search.Distillation(weight=0.3, temperature=2.0),
        round_to=4,
    )
    result = run(tmp_path, settings)
    assert seen["spread_gates"][0][1] == 0.4
    assert seen["distilled"][1] == {"weight": 0.3, "temperature": 2.0}
    assert seen["Adam"][1] == {"lr": 0.07}
    small, dense = (
        {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        for model in (nas_gate.load(result["path"]), models.build("digits_cnn", width=0.25))
    )
    assert small != dense
    assert all(width % 4 == 0 or width == dense[name] for name, width in small.items())


def test_gates_begin_by_what_the_trained_network_feels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    felt: list[torch.Tensor | None] = []
    real = search.spread_gates

    def spy(gated: nas_gate.GatedModel, spread: float, sensitivity: torch.Tensor | None, metric: str) -> None:
        assert metric == "params"
        felt.append(sensitivity)
        real(gated, spread, sensitivity, metric)

    monkeypatch.setattr(search, "spread_gates", spy)
    settings = replace(TINY, metric="params", test=False)
    result = run(tmp_path, settings)
    state = nas_gate.load(result["path"]).state_dict()

    prepared = prepare.prepare(settings)
    search.train_dense(settings, prepared, tmp_path / "dense")
    gated = prepared.gated
    gated.model.load_state_dict(prepared.dense.state_dict())
    measured = search.sensed(settings, prepared, tmp_path / "none")
    assert all(
        torch.equal(value, gated.model.state_dict()[name]) for name, value in prepared.dense.state_dict().items()
    )
    gated.eval()  # which is nothing but the norms' mode here
    training.seed_everything(settings.seed, 0)
    prepared.train.set_epoch(0)
    loss = prepared.task.loss(0.0)
    expected = nas_gate.sensitivity(gated, (loss(gated(x), x, y) for x, y in prepared.train))  # an epoch is fewer
    for each in (felt[0], measured):
        assert each is not None
        torch.testing.assert_close(each, expected)

    stopped = tmp_path / "stopped"  # with gates that have begun nothing is felt again

    def stop(moment: search.Moment) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.search(settings, stopped, cache_dir=tmp_path / "dense", on_epoch=stop)
    again = search.search(settings, stopped, cache_dir=tmp_path / "dense")
    assert [each is None for each in felt] == [False, False, True]
    assert all(torch.equal(value, state[name]) for name, value in nas_gate.load(again["path"]).state_dict().items())
    run(tmp_path / "flat", replace(settings, gating=replace(settings.gating, spread=0.0)))
    run(tmp_path / "uniform", replace(settings, method="uniform"))
    assert felt[3:] == [None, None]


def test_the_lagrangian_is_of_the_metric_that_is_asked_for():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    with torch.no_grad():
        gated.gates.weight[: gated.structure.groups[0].size // 2] = -1.0
    shares = {metric: float(gated.cost_share(metric).detach()) for metric in ("macs", "params")}
    assert shares["macs"] != pytest.approx(shares["params"], abs=1e-3)
    for metric, share in shares.items():
        term = budgets.make_budget("lagrangian", metric, rate=2.0).loss(gated, 0.25, {})
        assert float(term.detach()) == pytest.approx((share - 0.25) ** 2, rel=1e-5)  # rate / 2 * gap ** 2


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
        pytest.param({"hardware": Hardware(accelerator="cpu", compile="default")}, marks=needs_compiler),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_the_cache_knows_what_determines_dense_weights(change: dict, tmp_path: Path):
    names = []
    for settings in (TINY, replace(TINY, **change)):
        prepared = search.prepare(settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
            search.train_dense(settings, prepared, tmp_path)
    assert names[0] != names[1]


SEVERAL = replace(TINY, cycle=replace(RECIPE, epochs=5), gating=replace(TINY.gating, epochs=4), target=0.5)
SEVERAL = replace(SEVERAL, targets=(0.7, 0.4), gate=Named("gumbel"), budget=Named("lagrangian"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One finished trial with two targets: its folder, its results, what it printed."""
    folder, text = tmp_path_factory.mktemp("several"), io.StringIO()
    result = run(folder, SEVERAL, console=Console(file=text, width=140))
    return folder, result, text.getvalue()


DYING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_search
from nas_gate import search
settings, folder = getattr(test_search, sys.argv[3]), Path(sys.argv[1])
real_fit, real_write, left = search.fit, search.write_json, 7  # five steps an epoch: each life finishes one more

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly:
    def __init__(self, loader):
        self.loader = loader
    def __getattr__(self, name):
        return getattr(self.loader, name)
    def __len__(self):
        return len(self.loader)
    def __iter__(self):
        global left
        for batch in self.loader:
            if left == 0:
                die()
            left -= 1
            yield batch

def write(path, content):  # once before each file, too
    mark = folder / f"died-before-{path.parent.name}-{path.name}"
    if not mark.exists():
        mark.touch()
        die()
    real_write(path, content)

search.fit = lambda module, train, *a, **k: real_fit(module, Deadly(train), *a, **k)
search.write_json = write
for life in range(40):
    child = os.fork()
    if child == 0:
        test_search.run(folder, settings)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
    print(life)
"""


@pytest.mark.parametrize(("name", "deaths"), [("TINY", 10), ("SEVERAL", 16)])
def test_killed_in_every_epoch_and_before_every_file_it_continues_to_the_same_weights(
    name: str, deaths: int, tmp_path: Path
):
    settings = globals()[name]
    command = [sys.executable, "-c", DYING, str(tmp_path), str(Path(__file__).parent), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == deaths
    killed, whole = tmp_path / "run", tmp_path / "whole"
    search.search(settings, whole, cache_dir=tmp_path / "dense")
    files = sorted(p.relative_to(whole) for p in whole.rglob("*"))
    assert files == sorted(p.relative_to(killed) for p in killed.rglob("*"))  # no checkpoint is left
    for file in (f for f in files if f.name == "result.json"):
        one, other = (json.loads((folder / file).read_text()) for folder in (killed, whole))
        assert same_weights(one["path"], other["path"])
        assert measured(one) == measured(other)
    assert measured(run(tmp_path, settings)) == measured(json.loads((whole / "result.json").read_text()))


def measured(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "path" and not k.startswith("seconds")}


def test_each_target_has_its_candidate(several: tuple[Path, dict[str, Any], str]):
    folder, result, text = several
    assert result == json.loads((folder / "run" / "result.json").read_text())
    assert result["candidates"] == ["target-0.7", "target-0.4"]
    assert "gated.pt" not in {p.name for p in folder.glob("run/**/*")}
    points = []
    for name, target, gated in zip(result["candidates"], SEVERAL.targets or (), (2, 4)):
        one = json.loads((folder / "run" / name / "result.json").read_text())
        network = nas_gate.load(folder / "run" / name / "candidate")
        assert one["path"] == str(folder / "run" / name / "candidate")
        assert nas_gate.count_macs(network, (torch.zeros(1, 1, 8, 8),)) == one["macs"]
        assert one["macs"] / one["dense_macs"] == one["macs_ratio"] <= one["target"] == target
        digits = data.load("digits", batch_size=256)
        assert (
            training.evaluate(network, digits.test, fabric=training.connect(TINY.hardware)).accuracy
            == (one["test_accuracy"])
        )
        history = json.loads((folder / "run" / name / "history.json").read_text())
        assert [e["epoch"] for e in history["gated"]] == list(range(gated))
        assert [e["epoch"] for e in history["finetuned"]] == list(range(gated, 5))
        points.append((one["macs_ratio"], one["accuracy"]))
        assert f"target {target}: accuracy {one['accuracy']:.2%}" in text
        assert f"│ target {target} " in text
    assert {k: result[k] for k in one} == one  # the last one's figures
    (wide, good), (narrow, fair) = points  # the area by hand: a step down at each point
    by_hand = (1 - wide) * good + (wide - narrow) * fair if good > fair else (1 - narrow) * fair
    assert result["hypervolume"] == pytest.approx(by_hand)
    assert "target 0.4 (2 of 2): gated epochs 3 to 4, fine-tuning over epochs 5 to 5 of the cycle; 8 epochs" in text


def test_the_first_leg_is_the_search_for_its_target_alone(several: tuple[Path, dict[str, Any], str], tmp_path: Path):
    """With a gate that knows no progress, the legs after it change nothing about a candidate."""
    folder, _, _ = several
    trainable = replace(SEVERAL, gate=Named("trainable"))
    run(tmp_path, trainable)
    alone = replace(trainable, targets=None, target=0.7, gating=replace(SEVERAL.gating, epochs=2))
    result = search.search(alone, tmp_path / "alone", cache_dir=folder / "dense")
    leg = json.loads((tmp_path / "run" / "target-0.7" / "result.json").read_text())
    assert measured(leg) == measured(result)
    assert same_weights(leg["path"], result["path"])


def test_finished_targets_are_reported_and_not_repeated(
    several: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
):
    folder, result, before = several
    monkeypatch.setattr(search, "prepare", None)
    text = io.StringIO()
    assert run(folder, SEVERAL, console=Console(file=text, width=140)) == result
    table = before[before.index("validation") :]
    assert text.getvalue().endswith(table)


@pytest.mark.parametrize("method", ["uniform", "l1", "bn_scale", "random"])
def test_a_baseline_cuts_trained_dense_weights_and_trains_as_long(
    method: str, whole: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    folder, gates, _ = whole
    text = io.StringIO()
    settings = replace(TINY, method=method)
    result = search.search(
        settings, tmp_path / "run", cache_dir=folder / "dense", console=Console(file=text, width=120)
    )
    assert {k for k in gates if "gated" in k} == gates.keys() - result.keys()
    assert (result["method"], gates["method"]) == (method, "gates")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history.keys() == {"dense", "finetuned"}
    assert [e["epoch"] for e in history["finetuned"]] == [0, 1, 2, 3]
    assert "gated" not in text.getvalue()
    assert f"by {method}" in text.getvalue()

    dense = models.build("digits_cnn", width=0.25)
    (stored,) = (folder / "dense").glob("*/dense.pt")
    dense.load_state_dict(torch.load(stored)["module"])
    structure = nas_gate.analyze(dense.eval(), torch.zeros(1, 1, 8, 8))
    keep = landing.choose(structure, baselines.score(method, structure, dense, seed=0), 0.6)
    kept = nas_gate.load(result["path"])
    widths = [kept.get_parameter(g.members[0].tensor).shape[g.members[0].dim] for g in structure.groups]
    assert widths == structure.open_units(keep).tolist()
    assert result["macs"] == int(nas_gate.CostModel(structure)(keep)) <= 0.6 * result["dense_macs"]


def test_a_target_of_1_trains_the_dense_network_over_the_whole_cycle(
    whole: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    folder, gates, _ = whole
    settings = replace(TINY, method="uniform", target=1.0)
    result = search.search(settings, tmp_path / "run", cache_dir=folder / "dense")
    assert (result["macs_ratio"], result["params_ratio"], result["achieved"]) == (1, 1, 1)
    assert result["macs"] == gates["dense_macs"]
    assert result["landed_accuracy"] == result["dense_accuracy"] == gates["dense_accuracy"]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history["finetuned"]) == TINY.cycle.epochs


@pytest.mark.parametrize("targets", [None, (0.7, 0.4)])
def test_a_baseline_may_cut_without_training_afterwards(
    whole: tuple[Path, dict[str, Any], str], tmp_path: Path, targets: tuple[float, ...] | None
):
    folder, gates, _ = whole
    settings = replace(TINY, method="l1", cycle=replace(RECIPE, epochs=0), targets=targets, target=0.5)
    text = io.StringIO()
    result = search.search(
        settings, tmp_path / "run", cache_dir=folder / "dense", console=Console(file=text, width=150)
    )
    assert result["dense_accuracy"] == gates["dense_accuracy"]
    assert result["accuracy"] == result["finetuned_accuracy"] == result["landed_accuracy"]
    assert (result["seconds_finetuned"], result["macs_ratio"] <= settings.wanted[-1]) == (0, True)
    validation, fabric = data.load("digits", batch_size=256).validation, training.connect(TINY.hardware)
    network = nas_gate.load(result["path"])
    assert training.evaluate(network, validation, fabric=fabric).accuracy == result["accuracy"]
    assert ("target 0.4 (2 of 2): no fine-tuning; 0 epochs for all targets" in text.getvalue()) == (targets is not None)
    assert len(collect([tmp_path / "run"]).table) == len(settings.wanted)


def test_the_hook_sees_every_epoch_once_and_may_end_the_trial(whole: tuple[Path, dict[str, Any], str], tmp_path: Path):
    folder, result, _ = whole
    moments: list[search.Moment] = []

    def look(moment: search.Moment) -> None:
        moments.append(moment)
        if len(moments) in (1, 3):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search.search(TINY, tmp_path / "run", cache_dir=folder / "dense", on_epoch=look)
    stopped = search.search(TINY, tmp_path / "run", cache_dir=folder / "dense", on_epoch=look)
    assert measured(stopped) == measured(result)
    assert [(m.stage, m.epoch) for m in moments] == [("gated", 0), ("gated", 1), ("finetuned", 2), ("finetuned", 3)]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [m.accuracy for m in moments] == [e["accuracy"] for e in history["gated"] + history["finetuned"]]
    shares = [e["figures"]["cost"] for e in history["gated"]]
    assert [m.macs for m in moments[:2]] == pytest.approx([s * result["dense_macs"] for s in shares])
    assert [m.macs for m in moments[2:]] == [result["macs"]] * 2


def test_legs_share_the_gated_epochs():
    settings = replace(TINY, cycle=Recipe(epochs=20), gating=Gating(epochs=8), targets=(0.7, 0.5, 0.2), target=0.5)
    assert [(leg.above, leg.target, leg.begin, leg.end) for leg in settings.legs()] == [
        (None, 0.7, 0, 2),
        (0.7, 0.5, 2, 5),
        (0.5, 0.2, 5, 8),
    ]
    assert settings.epochs() == 8 + 18 + 15 + 12
    plain = replace(settings, method="random")
    assert [(leg.begin, leg.end) for leg in plain.legs()] == [(0, 0)] * 3
    assert plain.epochs() == 60
    assert replace(settings, targets=None).epochs() == 20


def test_the_target_descends_from_leg_to_leg():
    gate = nas_gate.make_gate("annealed_sigmoid")
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8), gate=gate)
    gating = Gating(epochs=8, descent=0.5)
    settings = replace(TINY, cycle=Recipe(epochs=10), gating=gating, targets=(0.6, 0.2), target=0.5)
    controller = budgets.GateController(gated, budgets.make_budget("penalty", "macs"), settings)
    for epoch, target in (
        (0.0, 1.0),
        (1.0, 0.8),
        (2.0, 0.6),
        (3.9, 0.6),
        (4.0, 0.6),
        (5.0, 0.4),
        (6.0, 0.2),
        (7.9, 0.2),
    ):
        controller.before_step(epoch)
        assert controller.figures()["target"] == pytest.approx(target)
        assert float(gated.gates.function.progress) == pytest.approx(epoch / 8)


def test_nan_stops_the_stage_with_the_dense_weights_kept(tmp_path: Path):
    wild = replace(TINY, cycle=replace(TINY.cycle, learning_rate=1e30, clip_norm=0.0))
    with pytest.raises(Diverged, match=r"epoch 1"):
        run(tmp_path, wild)
    assert not (tmp_path / "run" / "gated.pt").exists()
    assert len(list((tmp_path / "dense").glob("*/dense.pt"))) == 1


def test_the_penalty_follows_the_descending_target():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    settings = replace(TINY, cycle=Recipe(epochs=10), gating=Gating(epochs=10, descent=0.5), target=0.4)
    controller = budgets.GateController(gated, budgets.make_budget("penalty", "macs", weight=2.0), settings)
    for epoch, target in ((0.0, 1.0), (2.5, 0.7), (5.0, 0.4), (9.9, 0.4)):
        controller.before_step(epoch)
        assert controller.figures() == pytest.approx({"cost": 1.0, "target": target})
        assert float(controller.loss().detach()) == pytest.approx(2 * (1 - target) ** 2, abs=1e-6)


def test_limits_descend_with_the_first_target():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    settings = replace(SEVERAL, gating=Gating(epochs=4, descent=0.5), limits={"params": 0.2})
    budget = budgets.make_budget("penalty", "macs", weight=2.0, power=1)
    controller = budgets.GateController(gated, budget, settings)
    for epoch, target, limit in ((0.0, 1.0, 1.0), (0.5, 0.85, 0.6), (1.0, 0.7, 0.2), (2.5, 0.55, 0.2), (3.9, 0.4, 0.2)):
        controller.before_step(epoch)
        assert float(controller.loss().detach()) == pytest.approx(2 * (1 - target) + 2 * (1 - limit), abs=1e-6)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings, dict[str, Any], str]:
    """A finished trial with a latency in the middle of what is reachable, and a limit: see `whole`."""
    folder, text = tmp_path_factory.mktemp("timed"), io.StringIO()
    short = replace(TINY, dense=replace(RECIPE, epochs=1), cycle=RECIPE, gating=replace(TINY.gating, epochs=1))
    settings = replace(short, metric="latency_ms", target=1e9, limits={"params": 0.5}, latency=search.Timing(batch=2))
    prepared = search.prepare(settings, folder / "dense")
    middle = (prepared.lowest + prepared.gated.cost.total("latency_ms")) / 2
    settings = replace(settings, target=middle)
    before = {p: p.stat().st_mtime_ns for p in (folder / "dense").glob("*/table.json")}
    result = run(folder, settings, console=Console(file=text, width=140))
    assert {p: p.stat().st_mtime_ns for p in (folder / "dense").glob("*/table.json")} == before
    assert len(before) == 1
    return folder, settings, result, text.getvalue()


def test_a_latency_is_met_and_measured(timed: tuple[Path, Settings, dict[str, Any], str]):
    folder, settings, result, text = timed
    assert result["achieved"] == result["predicted_latency_ms"] == result["landed_predicted_latency_ms"]
    assert result["achieved"] <= result["target"] == settings.target
    assert result["params"] <= 0.5 * result["dense_params"]
    assert result["latency_ms"] > 0
    assert result["latency_relative_error"] == result["predicted_latency_ms"] / result["latency_ms"] - 1
    assert json.loads((folder / "run" / "result.json").read_text()) == result
    assert f"achieved {result['achieved']:.4f} ms of latency, asked {settings.target}" in text
    assert f"{result['predicted_latency_ms']:.3f} ms predicted, {result['latency_ms']:.3f} ms measured (error" in text
    assert "batch 2, threads 1, on " in text
    assert "at most 0.5 of the dense params" in text
    assert "predicted ms" in text


def test_fronts_take_the_latency_that_a_search_measured(timed: tuple[Path, Settings, dict[str, Any], str]):
    folder, _, result, _ = timed
    collected = collect([folder / "run"])
    assert collected.skipped == ()
    assert collected.table["latency_ms"].tolist() == [result["latency_ms"]]
    assert collected.table["dense_latency_ms"].tolist() == [result["dense_latency_ms"]]
    assert collected.latency == f"PyTorch (fastest run), batch 2, 1 thread, on {result['latency_machine']}"


def test_a_latency_out_of_reach_is_refused(timed: tuple[Path, Settings, dict[str, Any], str], tmp_path: Path):
    folder, settings, _, _ = timed
    with pytest.raises(
        Refused, match=r"target=1e-06 is below what is reachable: latency_ms can lie between \d+\.\d+ and"
    ):
        search.search(replace(settings, target=1e-6), tmp_path / "run", cache_dir=folder / "dense")
    assert not (tmp_path / "run").exists()


def test_the_lagrangian_is_part_of_the_checkpoint():
    gated = nas_gate.attach(models.build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))
    first, second = (
        budgets.GateController(gated, budgets.make_budget("lagrangian", "macs", rate=0.5), TINY) for _ in "ab"
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
        (lambda: changed(target=0.0), r"0 < target <= 1.*got target=0\.0"),
        (lambda: changed(target=1.5), r"0 < target <= 1.*got target=1\.5"),
        (lambda: changed(target=0.5, targets=()), r"`targets` must hold at least one"),
        (lambda: changed(target=0.5, targets=(1.5, 0.7)), r"0 < target <= 1.*got target=1\.5"),
        (lambda: changed(target=0.5, targets=(0.5, 0.7)), r"must descend strictly.*got \(0\.5, 0\.7\)"),
        (lambda: changed(target=0.5, targets=(0.5, 0.5)), r"must descend strictly"),
        (lambda: changed(target=0.4, targets=(0.7, 0.5)), r"`targets` or `target`, not both.*got 0\.4"),
        (lambda: changed(target=0.5, targets=(0.7, 0.5, 0.3)), r"gating\.epochs >= len\(targets\).* 3 targets.*got 2"),
        (lambda: changed(target=0.5, targets=(0.7, 0.001)), r"target=0\.001 is below what is reachable"),
        (lambda: changed(method="l2"), r"`method` must be one of .*'gates', 'uniform', 'l1'.* got 'l2'"),
        (lambda: changed(method="bn_scale", model=Named("test_baselines:unscaled")), "bn_scale.* needs norms"),
        (lambda: changed(metric="flops"), "metric must be one of macs, params"),
        (lambda: changed(limits={"flops": 0.5}), "metric must be one of macs, params, latency_ms, but is 'flops'"),
        (lambda: changed(limits={"macs": 0.5}), "limits must be of other metrics than the target"),
        (lambda: changed(limits={"params": 1.5}), r"0 < limits\.params <= 1.*got limits\.params=1\.5"),
        (lambda: changed(limits={"latency_ms": 0.0}), r"limits\.latency_ms > 0.*got limits\.latency_ms=0\.0"),
        (lambda: changed(limits={"params": 0.001}), r"limits\.params=0\.001 is below what is reachable"),
        (lambda: changed(metric="latency_ms", target=-1.0), r"target > 0.*for latency_ms, but got target=-1\.0"),
        (lambda: changed(latency=search.Timing(batch=0)), r"latency\.batch >= 1"),
        (lambda: changed(latency=search.Timing(threads=0)), r"latency\.threads >= 1"),
        (lambda: changed(seed=-1), "seed >= 0"),
        (lambda: changed(gating=Gating(epochs=5)), r"gating.epochs <= cycle.epochs.*=4.* got 5"),
        (lambda: changed(cycle=replace(RECIPE, epochs=0)), r"gating.epochs <= cycle.epochs.*=0.* got 2"),
        (lambda: changed(gating=Gating(epochs=1, descent=2.0)), "descent <= 1"),
        (lambda: changed(gating=Gating(epochs=1, spread=1.1)), "0 <= gating.spread <= 1"),
        (lambda: changed(distillation=search.Distillation(temperature=0.0)), "temperature > 0"),
        (lambda: changed(target=0.001), r"target=0\.001 is below what is reachable.*between 0\.\d+ and 1"),
        (lambda: changed(model=Named("digits_cn")), "unknown model 'digits_cn'.*digits_cnn"),
        (lambda: changed(model=Named("digits_cnn", {"depth": 3})), "depth.*arguments are .*width"),
        (lambda: changed(weights="there/is/none.pt"), "no file of weights there/is/none.pt"),
        (lambda: changed(model=Named("digits_cnn", {"num_classes": 9})), "task must fit .*Target 9 is out of bounds"),
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
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(search, "fit", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, make())
    assert not (tmp_path / "dense").exists()
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_compiling_is_refused_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # which must not know the answer
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no such compiler",)}),
        pytest.raises(Refused, match=r"`hardware.compile` must be null .* here: .*no such compiler.*\Z"),
    ):
        run(tmp_path, changed(hardware=Hardware(accelerator="cpu", compile="default")))
    assert not (tmp_path / "run").exists()


def test_where_data_lie_and_what_may_differ_make_no_other_run(tmp_path: Path):
    there = describe(changed(data=Named("digits", {"root": "a"})))
    folders.write_json(tmp_path / "settings.json", there)
    moved = describe(changed(data=Named("digits", {"root": "b", "workers": 2})))
    folders.refuse_other_settings(moved, tmp_path)
    wide = moved | {"hardware": {**moved["hardware"], "precision": "bf16-mixed"}}
    with pytest.raises(Refused, match=r"\(hardware\.precision: 32-true there, bf16-mixed asked for\)"):
        folders.refuse_other_settings(wide, tmp_path)
    folders.refuse_other_settings(wide, tmp_path, ["hardware"])
    assert [*map(setting_of, ("data.root", "data.name", "training.dense.epochs", "hardware"))] == [
        *("data.arguments.root", "data.name", "dense.epochs", "hardware"),
    ]


def test_begins_with_the_weights_of_a_file(whole: tuple[Path, dict[str, Any], str], tmp_path: Path):
    """The dense network of the cache, as a file: with no dense epochs it gives the trial that trained it."""
    folder, result, _ = whole
    (checkpoint,) = (folder / "dense").glob("*/dense.pt")
    settings = replace(TINY, weights=str(checkpoint), dense=replace(RECIPE, epochs=0))
    again = run(tmp_path, settings)
    assert again["dense_accuracy"] == result["dense_accuracy"]
    assert same_weights(str(folder / "run/candidate"), str(tmp_path / "run/candidate"))


def test_the_cache_knows_the_code_of_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another function under the same name, file by file: its weights are other ones."""
    code = tmp_path / "edited.py"
    code.write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []
    monkeypatch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
    settings = replace(TINY, model=Named("edited:net"))
    prepared = search.prepare(settings)
    for _ in range(2):
        search.train_dense(settings, prepared, tmp_path)
    code.write_text(code.read_text().replace("ReLU", "Tanh"))
    search.train_dense(settings, prepared, tmp_path)
    assert names[0] == names[1] != names[2]


def test_the_code_of_a_network_is_that_of_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package that passes on a factory, which takes a layer from a third file: a change in any is another network."""
    package = tmp_path / "passing"
    package.mkdir()
    (package / "__init__.py").write_text("from passing.nets import net\n")
    layers, nets = package / "layers.py", package / "nets.py"
    layers.write_text(
        "from torch import nn\nclass Act(nn.Module):\n    def forward(self, x):\n        return x.relu()\n"
    )
    nets.write_text(
        "from torch import nn\nfrom passing.layers import Act\ndef net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Act(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = replace(TINY, model=Named("passing:net"))
    prepared = search.prepare(settings)
    names = []
    monkeypatch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
    for changed in (None, None, layers, nets):
        if changed is not None:
            changed.write_text(changed.read_text() + "# another\n")
        search.train_dense(settings, prepared, tmp_path)
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_the_cache_knows_on_how_many_processes_a_network_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared, names = search.prepare(TINY), []
    monkeypatch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
    for processes in (1, 2):
        fabric = cast(Fabric, SimpleNamespace(world_size=processes, is_global_zero=True, broadcast=lambda got: got))
        search.train_dense(TINY, replace(prepared, fabric=fabric), tmp_path)
    assert names[0] != names[1]


NET = """
from torch import nn

def net(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def test_a_run_is_of_the_contents_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not of what the same names lead to by now: else it would mix two data sets, or report another network."""
    (tmp_path / "own.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    file, images = tmp_path / "images.npz", rng.integers(0, 255, (400, 8, 8), np.uint8)
    labels = np.arange(400) % 4

    def write(images: Any) -> None:
        np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)

    write(images)
    settings = replace(TINY, model=Named("own:net"), data=Named("npz", {"path": str(file), "batch_size": 128}))

    def stop(moment: search.Moment) -> None:
        if moment.stage == "gated":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings, on_epoch=stop)
    write(255 - images)
    with pytest.raises(Refused, match=r"run holds a run of other contents \(data: \w+ there, \w+ asked for\)"):
        run(tmp_path, settings)
    write(images)
    result = run(tmp_path, settings)
    assert run(tmp_path, settings) == result
    (tmp_path / "own.py").write_text(NET.replace("ReLU", "Tanh"))
    with pytest.raises(Refused, match=r"other contents \(code\.own:net: \w+ there"):
        run(tmp_path, settings)


def test_processes_would_wait_for_the_candidates_of_a_choice():
    model, fabric = models.build("cifar_supernet"), cast(Fabric, SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match=r"must be ddp_find_unused_parameters_true .* Choice, as .*, but got 'ddp'"):
        prepare.check_strategy(Hardware(strategy="ddp"), model, fabric)
    prepare.check_strategy(Hardware(strategy="ddp_find_unused_parameters_true"), model, fabric)
    prepare.check_strategy(Hardware(strategy="ddp"), models.build("resnet20"), fabric)


def test_the_cache_knows_the_weights_by_their_content(tmp_path: Path):
    names = []
    file = tmp_path / "weights.pt"
    for seed in (0, 1):
        torch.save(search.prepare(replace(TINY, seed=seed)).dense.state_dict(), file)
        settings = replace(TINY, weights=str(file))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "fit", lambda *a, **k: names.append(k["checkpoint"].parent.name))
            search.train_dense(settings, search.prepare(settings), tmp_path)
    assert names[0] != names[1]


def test_other_settings_in_the_same_folder_are_refused_with_what_differs(
    whole: tuple[Path, dict[str, Any], str],
):
    folder, _, _ = whole
    other = replace(TINY, target=0.5, model=Named("digits_cnn", {"width": 0.5}))
    with pytest.raises(Refused, match=r"model\.arguments\.width: 0\.25 there, 0\.5 asked.*target: 0\.6 there"):
        run(folder, other)


def test_a_folder_in_use_is_refused(tmp_path: Path):
    fabric = SimpleNamespace(is_global_zero=True, broadcast=lambda got: got)
    with (
        folders.held(tmp_path, fabric),  # type: ignore[arg-type]
        pytest.raises(InUse, match="Another process is working in"),
        folders.held(tmp_path, fabric),  # type: ignore[arg-type]
    ):
        pass


def test_dense_epochs_0_keep_the_models_own_weights(tmp_path: Path):
    prepared = search.prepare(TINY)
    before = {name: value.clone() for name, value in prepared.dense.state_dict().items()}
    settings = replace(TINY, dense=replace(RECIPE, epochs=0))
    assert search.train_dense(settings, prepared, tmp_path) == []
    assert all(torch.equal(before[name], value) for name, value in prepared.dense.state_dict().items())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(Refused, match=r"run must be a folder that can be written to"):
        run(tmp_path)
