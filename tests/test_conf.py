"""Every shipped configuration file is composed and instantiated."""

import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import nas_gate
from nas_gate import budgets, data, models, search
from nas_gate.cli import composed, conf_dir, settings_of, sweeps_dir
from nas_gate.errors import Refused

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(conf_dir().iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
GROUPS["sweep"] = sorted(file.stem for file in sweeps_dir().glob("*.yaml"))
NEEDED = {
    ("model", "custom"): ["model.name=test_conf:small"],
    ("task", "custom"): ["task.name=test_tasks:counting"],
}  # values that a file leaves to its user


def small(num_classes: int, in_channels: int):
    return models.build("digits_cnn", num_classes=num_classes, in_channels=in_channels, width=0.25)


def chosen(group: str, name: str) -> list[str]:
    absent = "+" if group == "sweep" else ""  # a study is no part of a single search
    return [f"{absent}{group}={name}", *NEEDED.get((group, name), [])]


@pytest.mark.parametrize(("group", "name"), [(g, name) for g, names in GROUPS.items() for name in names])
def test_every_file_composes_to_settings(group: str, name: str):
    settings = settings_of(composed(chosen(group, name)))
    own = OmegaConf.load(sweeps_dir() / f"{name}.yaml").get("target", 0.5) if group == "sweep" else 0.5
    assert search.describe(settings)["target"] == own


def test_the_groups():
    assert set(GROUPS) - {"sweep"} == {"budget", "data", "experiment", "gate", "model", "task", "training"}


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_file_builds(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = settings_of(composed(chosen("model", name)))
    model, arguments = search.seeded_model(settings, in_channels=3, num_classes=7)
    assert arguments["num_classes"] == 7
    assert any(p.shape[0] == 7 for p in model.parameters())


@pytest.mark.parametrize("name", GROUPS["data"])
def test_every_data_file_names_arguments_that_its_set_takes(name: str):
    settings = settings_of(composed(chosen("data", name)))
    if name in ("digits", "shapes"):
        assert search.load_data(settings).image_size == {"digits": (8, 8), "shapes": (32, 32)}[name]
    else:  # all arguments are checked before the missing data is
        with pytest.raises((FileNotFoundError, ValueError), match="root"):
            search.load_data(settings)
    assert settings.data.name in data.NAMES


@pytest.mark.parametrize("name", GROUPS["gate"])
def test_every_gate_file_makes_its_gate(name: str):
    settings = settings_of(composed(chosen("gate", name)))
    assert isinstance(
        nas_gate.make_gate(settings.gate.name, **settings.gate.arguments), nas_gate.GATES[settings.gate.name]
    )


@pytest.mark.parametrize("name", GROUPS["budget"])
def test_every_budget_file_makes_its_budget(name: str):
    settings = settings_of(composed(chosen("budget", name)))
    made = budgets.make_budget(settings.budget.name, "macs", **settings.budget.arguments)
    assert isinstance(made, budgets.BUDGETS[name])  # type: ignore[arg-type]


def test_every_option_has_a_comment():
    """Each file begins with one, and the name of every value stands below one (training files share theirs)."""
    shared = explained((conf_dir() / "training" / "default.yaml").read_text())[1]
    for file in sorted([*conf_dir().rglob("*.yaml"), *sweeps_dir().glob("*.yaml")]):
        text = file.read_text().partition("\nhydra:")[0]
        names, commented = explained(text)
        assert text.startswith("#"), file
        if file.parent.name == "training":
            commented |= shared
        if file.parent.name not in ("experiment", "sweeps"):  # experiments repeat nothing
            assert names - commented - {"name"} == set(), file


def explained(text: str) -> tuple[set[str], set[str]]:
    """The names of all values, and of those that stand right below a comment."""
    names, commented, lines = set(), set(), text.splitlines()
    for before, line in itertools.pairwise(lines):
        name, _, value = line.strip().partition(": ")
        if value and not name.startswith(("#", "-")):
            names.add(name)
            if before.strip().startswith("#"):
                commented.add(name)
    return names, commented


def test_the_run_folder_follows_from_what_determines_the_result(tmp_path: Path):
    def folder(*overrides: str) -> str:
        return composed(list(overrides))["run_dir"]

    plain = folder()
    assert plain.startswith("runs/digits_cnn-digits-macs0.5-seed0-")
    assert folder("cache_dir=elsewhere") == plain
    assert folder("+data.root=elsewhere") == plain
    for other in (
        "budget.arguments.weight=5",
        "limits.params=0.4",
        "latency.batch=2",
        "gate=gumbel",
        "training.cycle.epochs=50",
        "test=false",
    ):
        assert folder(other) != plain
    assert "-seed0-l1-" in folder("method=l1")
    assert "-macs0.7-0.3-" in folder("targets=[0.7,0.3]")
    assert folder("run=mine") == "runs/mine"


def test_limits_and_latency():
    assert settings_of(composed([])).limits == {}
    settings = settings_of(composed(["limits.latency_ms=2", "limits.params=0.4", "latency.batch=8", "round_to=8"]))
    assert settings.limits == {"latency_ms": 2.0, "params": 0.4}
    assert settings.latency == search.Timing(batch=8, threads=1)
    assert settings_of(composed(["metric=latency_ms", "targets=[3,2.5]"])).targets == (3.0, 2.5)
    for override, message in (
        ("limits.params=half", "`limits.params` must be float, but is 'half'"),
        ("limits.params=40", r"`0 < limits.params <= 1` must hold"),
        ("+limits.flops=0.4", "latency_ms, but is 'flops'"),
        ("limits.macs=0.4", "limits must be of other metrics than the target"),
        ("latency.threads=0", "`latency.threads >= 1` must hold"),
    ):
        with pytest.raises(Refused, match=message):
            settings_of(composed([override]))


def test_debug_is_short_and_changes_nothing_but_lengths():
    plain, debug = (settings_of(composed(o)) for o in ([], ["experiment=debug"]))
    assert debug.dense.epochs + debug.cycle.epochs <= 6
    assert debug.cycle.learning_rate == plain.cycle.learning_rate
    assert (debug.model, debug.data, debug.gate) == (plain.model, plain.data, plain.gate)


def test_config_is_plain_yaml():
    for file in conf_dir().rglob("*.yaml"):
        assert OmegaConf.load(file) is not None
