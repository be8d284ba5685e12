import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import nas_gate
from nas_gate import cli, search
from nas_gate.errors import Diverged, Refused

QUICK = ["experiment=debug", "model.arguments.width=0.25", "training.gating.learning_rate=0.1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; put back afterwards


def test_search_inspect_and_their_results(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["search", *QUICK, "run=mine"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "nas_gate.load('runs/mine/candidate')" in shown.out
    assert "fine-tuned" in shown.out
    nas_gate.load("runs/mine/candidate")
    assert sorted(os.listdir("runs")) == ["dense", "mine"]

    assert cli.main(["search", *QUICK, "run=mine"]) == 0
    assert "finished already" in capsys.readouterr().out

    assert cli.main(["search", *QUICK, "run=mine", "target=0.4"]) == 2
    error = capsys.readouterr().err
    assert "target: 0.5 there, 0.4 asked for" in error
    assert error.count("\n") == 1

    assert cli.main(["inspect", "model.arguments.width=0.25", "--json"]) == 0
    structure = json.loads(capsys.readouterr().out)
    result = json.loads(Path("runs/mine/result.json").read_text())
    assert structure["macs"] == result["dense_macs"]
    assert structure["params"] == result["dense_params"]


def test_inspect_takes_the_data_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = np.zeros((400, 16, 16, 3), np.uint8)
    np.savez(
        tmp_path / "half.npz", x_train=images, y_train=np.arange(400) % 2, x_test=images, y_test=np.arange(400) % 2
    )
    command = ["inspect", "experiment=cifar10_16x16", f"data.root={tmp_path}", "--json"]
    assert cli.main(command) == 0
    assert round(json.loads(capsys.readouterr().out)["macs"] / 1e6, 1) == 10.2


def test_a_folder_of_configuration_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", "--config-dir", "nowhere"]) == 2
    assert "`--config-dir` must be a folder, but nowhere is none" in capsys.readouterr().err


def test_inspect_takes_the_size_that_a_model_was_made_for(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", "model=resnet56", "--json"]) == 0
    assert round(json.loads(capsys.readouterr().out)["macs"] / 1e6, 2) == 125.49
    assert cli.main(["inspect", "model=resnet20", "data=digits", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)["macs"]
    assert cli.main(["inspect", "model=resnet20", "--input", "1x8x8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == small


def test_inspect_needs_no_data_where_the_input_is_given(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", "--input", "3x32x32", "model=resnet20", "data=cifar10"]) == 0
    shown = capsys.readouterr().out
    assert "removable groups" in shown
    assert "it is an output of the model" in shown


def test_the_same_command_in_the_same_folder_is_the_same_run(monkeypatch: pytest.MonkeyPatch):
    folders = []
    monkeypatch.setattr(search, "search", lambda settings, run_dir, **more: folders.append(run_dir))
    for overrides in ([], ["target=0.5"], ["target=0.4"]):
        assert cli.main(["search", *overrides]) == 0
    assert folders[0] == folders[1] != folders[2]
    assert not folders[0].is_absolute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch"], "There is no command 'serch'; commands: search, inspect"),
        (["search", "target=2"], "`0 < target <= 1` must hold"),
        (["search", "target=half"], "`target` must be float, but is 'half'"),
        (["search", "target=0.0001"], "below what is reachable"),
        (["search", "weights=5"], "`weights` must be str or null, but is 5"),
        (["search", "targets=0.5"], "`targets` must be a list of numbers, but is 0.5"),
        (["search", "targets=[0.7,x]"], "`targets` must be a list of numbers, but is [0.7, 'x']"),
        (["search", "targets=[0.7,0.5]", "target=0.3"], "give `targets` or `target`, not both"),
        (["search", "method=l2"], "`method` must be one of ('gates', 'uniform'"),
        (["search", "modle=resnet20"], "Key 'modle' is not in struct"),
        (["search", "+modle=resnet20"], "There is no key 'modle'; valid keys: model"),
        (["search", "model=resnet2"], "Could not find 'model/resnet2'"),
        (["search", "model.name=resnet2"], "unknown model 'resnet2'"),
        (["search", "model=custom"], "model.name"),
        (["search", "gate.arguments.shape=box"], "unknown gradient shape 'box'"),
        (["search", "+training.dense.optimizer=sgd"], "`training.dense` has no key 'optimizer'; valid keys: epochs"),
        (["search", "training.dense.optimiser=sdg"], "training.dense: `optimiser` must be one of"),
        (["search", "~training.gating"], "`training` must have exactly the keys"),
        (["search", "training.dense.epochs=two"], "`training.dense.epochs` must be int, but is 'two'"),
        (["search", "hardware=gpu"], "hardware"),
        (["search", "data=cifar10"], "no data root is set"),
        (["search", "target"], "target"),
        (["search", "--config-dir", "nowhere"], "nowhere"),
        (["inspect", "model=resnet2"], "Could not find 'model/resnet2'"),
        (["inspect", "--input", "32"], "`--input` must be sizes joined by x"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("nas-gate: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not list(Path().glob("runs/*/*"))


def test_divergence_interruption_and_defects_each_end_in_their_own_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(error: BaseException):
        def search(*arguments: object, **more: object) -> None:
            raise error

        return search

    monkeypatch.setattr(search, "search", failing(Diverged("The loss is nan at epoch 3, step 2.")))
    assert cli.main(["search"]) == 1
    assert capsys.readouterr().err == "nas-gate: The loss is nan at epoch 3, step 2.\n"

    monkeypatch.setattr(search, "search", failing(KeyboardInterrupt()))
    assert cli.main(["search"]) == 130
    assert "the same command continues" in capsys.readouterr().err

    monkeypatch.setattr(search, "search", failing(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["search"])


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        assert "nas-gate search" in capsys.readouterr().out
    for command, expected in (
        ("search", ["experiment=debug", "model: cifar_mobilenet_v2", "budget: lagrangian, penalty", "target: 0.5"]),
        ("inspect", ["--json", "--input", "model=resnet56"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        for text in expected:
            assert text in shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nas-gate {version('nas-gate')}\n"


def test_configuration_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "own (1)" / "model"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("name: digits_cnn\narguments: {width: 0.125}\n")
    seen = []
    monkeypatch.setattr(search, "search", lambda settings, run_dir, **more: seen.append(settings))
    assert cli.main(["search", "--config-dir", "own (1)", "model=mine"]) == 0
    assert seen[0].model.arguments == {"width": 0.125}
    assert cli.main(["inspect", "--config-dir", "own (1)", "model=mine", "--input", "1x8x8"]) == 0


def test_values_are_checked_where_configuration_ends():
    plain = cli.composed([])
    assert cli.settings_of({**plain, "target": 0.25}).target == 0.25
    with pytest.raises(Refused, match="key 'target' is missing"):
        cli.settings_of({key: value for key, value in plain.items() if key != "target"})
    with pytest.raises(Refused, match="`hardware` must be a mapping, but is 3"):
        cli.settings_of({**plain, "hardware": 3})
    with pytest.raises(Refused, match=r"`data\.name` must be str, but is None"):
        cli.settings_of({**plain, "data": {"batch_size": 3}})


def test_help_is_quick_because_it_loads_no_training_library():
    script = (
        "import sys, nas_gate.cli as cli\n"
        "cli.main(['--help'])\n"
        "heavy = {'lightning_fabric', 'hydra', 'omegaconf', 'torchvision', 'sklearn', 'rich', 'optuna', 'pandas'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
