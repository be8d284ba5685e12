"""The command on the report asks for exactly the settings that it was written from."""

import re
import shlex

import pytest

from nas_gate import cli, reproduce
from nas_gate.reproduce import Shipped, command, overrides
from nas_gate.search import describe


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    return reproduce.shipped(cli.composed, cli.conf_dir())


@pytest.mark.parametrize(
    ("asked", "shortest"),
    [
        ([], []),
        (["experiment=debug"], ["experiment=debug"]),
        (["training=debug", "hardware.accelerator=cpu"], ["experiment=debug"]),
        (
            ["experiment=cifar10", "data.root=/data", "target=0.3"],
            ["experiment=cifar10", "data.root=/data", "target=0.3"],
        ),
        (["model=resnet56", "data=cifar10", "data.root=null"], ["model=resnet56", "data=cifar10"]),
        (["gate=gumbel", "budget=lagrangian", "test=false"], ["gate=gumbel", "budget=lagrangian", "test=false"]),
        (["experiment=debug", "gate=hard_concrete", "seed=3"], ["experiment=debug", "gate=hard_concrete", "seed=3"]),
        (["training.cycle.learning_rate=1e-05"], ["training.cycle.learning_rate=1e-05"]),
        (["~budget.arguments.power"], ["~budget.arguments.power"]),
        (["data.augment=default"], ["data.augment=default"]),
        (["weights=a/b.pt", "training.dense.epochs=0"], ["weights=a/b.pt", "training.dense.epochs=0"]),
        (["limits.params=0.4", "depth=true"], ["limits.params=0.4", "depth=true"]),
        (["method=l1", "targets=[0.7,0.35]"], ["method=l1", "targets=[0.7,0.35]"]),
        (
            ["model=torchvision", "model.name=resnet50", "+model.arguments.widths=[1,2.5,a b]"],
            ["model=torchvision", "model.name=resnet50", "+model.arguments.widths=[1,2.5,'a b']"],
        ),
        (["model=custom", "model.name=my_package.nets:small"], ["model=custom", "model.name=my_package.nets:small"]),
        (["data=npz", "data.path='it\\'s mine, 1.npz'"], ["data=npz", "data.path='it\\'s mine, 1.npz'"]),
    ],
)
def test_composing_the_overrides_gives_the_settings_back(shipped: Shipped, asked: list[str], shortest: list[str]):
    settings = describe(cli.settings_of(cli.composed(asked)))
    found = overrides(settings, shipped)
    assert describe(cli.settings_of(cli.composed(found))) == settings
    assert len(found) == len(shortest)
    assert sorted(found) == sorted(shortest)


def test_every_shipped_file_is_its_own_shortest_command(shipped: Shipped):
    default = {"model": "digits_cnn", "data": "digits", "gate": "trainable", "budget": "penalty", "training": "default"}
    default["task"] = "classification"
    for group, choices in shipped.choices.items():
        assert default[group] in choices
        for choice in choices.keys() - {"custom", default[group]}:
            settings = describe(cli.settings_of(cli.composed([f"{group}={choice}"])))
            assert overrides(settings, shipped) == [f"{group}={choice}"]


TEXTS = (
    *(
        "",
        "1",
        "1e5",
        "null",
        "True",
        "inf",
        "a b",
        "it's",
        "a\\",
        "a\\'",
        "\\\\'x",
        "${seed}",
        "\\${seed}",
        "é",
        "a|b",
    ),
    *("a,b", "{a:1}", "[x]", "a:b", "~x", "x=y", '"', "1_000", " lead", "a\tb", "$", "range(1,2)", "#x", "a#b", "??"),
)


def test_any_value_comes_back(shipped: Shipped):
    values = [form for text in TEXTS for form in (text, [text], [[text, None]], {"key": [text, True, 2, 2.0]})]
    settings = describe(cli.settings_of(cli.composed([])))
    settings["model"]["arguments"] = {f"given_{i}": value for i, value in enumerate(values)}
    again = cli.composed(overrides(settings, shipped))["model"]["arguments"]
    assert [(type(value), value) for value in again.values()] == [(type(value), value) for value in values]


def test_the_command_is_what_a_shell_takes(shipped: Shipped):
    settings = describe(cli.settings_of(cli.composed(["data=npz", "data.path='a b'", "target=0.25"])))
    words = shlex.split(command(settings, shipped))
    assert words[:2] == ["nas-gate", "search"]
    assert describe(cli.settings_of(cli.composed(words[2:]))) == settings


def test_what_is_no_settings_is_refused(shipped: Shipped):
    with pytest.raises(ValueError, match=re.escape("there is no 'data'")):
        command({"target": 0.5}, shipped)
