"""Candidates on disk: what is saved is loaded bit for bit; what is damaged, altered or foreign is refused."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import nas_gate
from nas_gate import candidate, models
from nas_gate.candidate import RECORD, WEIGHTS, CandidateError
from nas_gate.removal import Cut

FIGURES = {"accuracy": 0.5, "macs": 12}
PROVENANCE = {"seed": 7, "versions": {"nas_gate": "0"}}
NOTHING = Cut({}, {})


def half(structure: nas_gate.Structure, seed: int = 0) -> Tensor:
    """Each unit open with probability 0.5, and the first of every group for certain."""
    keep = torch.rand(structure.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[[g.start for g in structure.groups]] = True
    return keep


def cut_in_half(model: nn.Module, x: Tensor, seed: int = 0) -> nas_gate.Removed:
    """The model with about half of its units, its batch norm statistics moved by a step in training mode."""
    gated = nas_gate.attach(model, x)
    removed = nas_gate.remove_with_proof(gated, half(gated.structure, seed))
    removed.model.train()(torch.randn_like(x.expand(4, *x.shape[1:])))
    return removed


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(width: int = 6, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, classes)
    )


class Tied(nn.Module):
    """Two convolutions with one weight; the second name of it is an alias in the saved state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.c.weight = self.b.weight
        self.h = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


def own(factory: Callable[[], nn.Module] = chain) -> dict[str, Any]:
    return {"name": factory.__name__, "arguments": {}}


@pytest.fixture(scope="module")
def removed() -> nas_gate.Removed:
    torch.manual_seed(0)
    return cut_in_half(chain(), pixels(1, 3, 8, 8))


@pytest.fixture
def folder(tmp_path: Path, removed: nas_gate.Removed) -> Path:
    """A sound candidate of `chain`."""
    return nas_gate.save(tmp_path / "c", removed.model, removed.cut, own(), FIGURES, PROVENANCE)


def assert_sound(folder: Path, model: nn.Module) -> None:
    x = pixels(2, 3, 8, 8)
    assert torch.equal(nas_gate.load(folder, chain)(x), model.eval()(x))


def alone(folder: Path) -> bool:
    """Nothing else lies beside the folder, no temporary one either."""
    return os.listdir(folder.parent) == [folder.name]


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the record and give it the checksums of what is there, as someone who forges one would."""
    record = json.loads((folder / RECORD).read_text())
    record.pop("record_sha256")
    record["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    change(record)
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    record["record_sha256"] = hashlib.sha256(canonical).hexdigest()
    (folder / RECORD).write_text(json.dumps(record))


# --- save, then load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("digits_cnn", {"num_classes": 7}, (1, 1, 8, 8)),
        ("resnet20", {"shortcut": "A", "width": 0.5}, (1, 3, 16, 16)),  # cuts buffers that are not in the state
    ],
)
def test_registered_models_load_bit_for_bit(tmp_path, name, arguments, shape):
    torch.manual_seed(0)
    made = cut_in_half(models.build(name, **arguments), pixels(*shape))
    if name == "resnet20":
        assert made.cut.slots.keys() - made.model.state_dict().keys()
    model = {"name": name, "arguments": arguments}
    folder = nas_gate.save(tmp_path / "deep" / "c", made.model, made.cut, model, FIGURES, PROVENANCE)
    loaded = nas_gate.load(folder)
    x = pixels(3, *shape[1:], seed=2)
    assert type(loaded) is type(made.model)
    assert not any(m.training for m in loaded.modules())
    assert torch.equal(loaded(x), made.model.eval()(x))
    state = made.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    assert alone(folder)


def test_a_model_of_your_own_loads_through_its_factory(folder, removed):
    assert_sound(folder, removed.model)
    assert sorted(os.listdir(folder)) == sorted([RECORD, WEIGHTS])


def test_the_record_comes_back(folder, removed):
    record = candidate.read(folder)
    assert (record.model, record.figures, record.provenance) == (own(), FIGURES, PROVENANCE)
    assert record.cut == removed.cut


def test_tied_weights_are_stored_once_and_load_tied(tmp_path):
    torch.manual_seed(0)
    made = cut_in_half(Tied(), pixels(1, 3, 8, 8))
    folder = nas_gate.save(tmp_path / "c", made.model, made.cut, own(Tied), {}, {})
    assert len(load_file(folder / WEIGHTS).keys() & {"b.weight", "c.weight"}) == 1
    loaded = nas_gate.load(folder, Tied)
    assert loaded.b.weight is loaded.c.weight
    x = pixels(2, 3, 8, 8)
    assert torch.equal(loaded(x), made.model.eval()(x))


def test_other_dtypes_load_as_saved(tmp_path):
    torch.manual_seed(0)
    made = cut_in_half(chain().double(), pixels(1, 3, 8, 8).double())
    folder = nas_gate.save(tmp_path / "c", made.model, made.cut, own(), {}, {})
    loaded = nas_gate.load(folder, chain)
    assert loaded[0].weight.dtype == torch.float64
    assert loaded[1].num_batches_tracked.dtype == torch.int64
    x = pixels(2, 3, 8, 8).double()
    assert torch.equal(loaded(x), made.model.eval()(x))


def test_bfloat16_loads_as_saved_with_buffers_outside_the_state(tmp_path):
    torch.manual_seed(0)
    x = pixels(2, 3, 16, 16).bfloat16()
    made = cut_in_half(models.build("resnet20", width=0.5), pixels(1, 3, 16, 16))
    network = made.model.bfloat16()
    model = {"name": "resnet20", "arguments": {"width": 0.5}}
    loaded = nas_gate.load(nas_gate.save(tmp_path / "c", network, made.cut, model, {}, {}))
    assert {t.dtype for t in (*loaded.parameters(), *loaded.buffers()) if t.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(loaded(x), network.eval()(x))


def test_keys_that_are_numbers_come_back_as_text(tmp_path, removed):
    """JSON has no other keys; 1, 2, 16 and "1", "16", "2" differ in order, which the checksum must not see."""
    figures = {"latency_ms": {1: 0.5, 2: 0.75, 16: 3.0}}
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, own(), figures, {})
    assert candidate.read(folder).figures == {"latency_ms": {"1": 0.5, "2": 0.75, "16": 3.0}}


def test_saving_leaves_the_network_alone(tmp_path, removed):
    before = {n: t.clone() for n, t in removed.model.state_dict().items()}
    modes = [m.training for m in removed.model.modules()]
    nas_gate.save(tmp_path / "c", removed.model, removed.cut, own(), FIGURES, PROVENANCE)
    assert all(torch.equal(t, before[n]) for n, t in removed.model.state_dict().items())
    assert [m.training for m in removed.model.modules()] == modes


def test_loads_in_another_process(folder, removed, tmp_path):
    script = (
        "import sys, torch, nas_gate\n"
        "from torch import nn\n"
        "chain = lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(6 * 36, 5))\n"
        "x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "torch.save(nas_gate.load(sys.argv[1], chain)(x), sys.argv[2])\n"
        "assert 'torchvision' not in sys.modules, 'a factory needs no registry'\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "y.pt")], check=True, timeout=60)
    assert torch.equal(torch.load(tmp_path / "y.pt"), removed.model.eval()(pixels(2, 3, 8, 8)))


# --- damaged, altered, foreign ------------------------------------------------------------------------------


def test_every_truncation_of_the_weights_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, 8, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(CandidateError, match="truncated or altered"):
            nas_gate.load(folder, chain)


def test_one_altered_byte_of_the_weights_is_refused(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    for position in (0, 20, len(data) // 2, len(data) - 1):
        altered = data.copy()
        altered[position] ^= 1
        (folder / WEIGHTS).write_bytes(altered)
        with pytest.raises(CandidateError, match=r"weights\.safetensors is truncated or altered"):
            nas_gate.load(folder, chain)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["figures"].update(accuracy=0.99),
        lambda r: r["figures"].update(accuracy=float("nan")),
        lambda r: r["provenance"].update(seed=8),
        lambda r: r["model"].update(name="resnet20"),
        lambda r: r["cut"]["slots"].popitem(),
        lambda r: r.update(more=1),
        lambda r: r.pop("record_sha256"),
        lambda r: r.update(weights_sha256="0" * 64),
    ],
)
def test_an_altered_record_is_refused(folder, change):
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CandidateError, match="was altered"):
        nas_gate.load(folder, chain)
    with pytest.raises(CandidateError, match="was altered"):
        candidate.read(folder)


def test_white_space_in_the_record_does_not_matter(folder, removed):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(dict(reversed(record.items())), indent=4))
    assert_sound(folder, removed.model)


@pytest.mark.parametrize("text", ["", "{", '{"format": ', "\x00", "[" * 100_000])
def test_a_record_that_is_not_json_is_refused(folder, text):
    (folder / RECORD).write_text(text)
    with pytest.raises(CandidateError, match="is damaged: it is not JSON"):
        nas_gate.load(folder, chain)


def test_a_record_that_is_not_text_is_refused(folder):
    (folder / RECORD).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CandidateError, match="is damaged: it is not JSON"):
        nas_gate.load(folder, chain)


@pytest.mark.parametrize("text", ["{}", "[]", "1", "null", '"nas-gate candidate"', '{"format": "onnx", "version": 1}'])
def test_foreign_json_is_refused(folder, text):
    (folder / RECORD).write_text(text)
    with pytest.raises(CandidateError, match="not of nas-gate: its format must be 'nas-gate candidate'"):
        nas_gate.load(folder, chain)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(folder, version):
    reseal(folder, lambda r: r.update(version=version))
    with pytest.raises(CandidateError, match=f"has version {version!r}, but this code reads version 1"):
        nas_gate.load(folder, chain)


@pytest.mark.parametrize("name", [RECORD, WEIGHTS])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(CandidateError, match=r"cannot be read \(No such file or directory\)"):
        nas_gate.load(folder, chain)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CandidateError, match=r"is no candidate: candidate\.json cannot be read"):
        nas_gate.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("cut"),
        lambda r: r.pop("weights_sha256"),
        lambda r: r.pop("aliases"),
        lambda r: r.update(cut=[]),
        lambda r: r.update(aliases={"0.weight": "nowhere"}),
        lambda r: r.update(model="digits_cnn"),
        lambda r: r["cut"].update(slots={"0.weight": {"x": [0]}}),
        lambda r: r["cut"].update(slots={"0.weight": {"0": ["a"]}}),
    ],
)
def test_a_sealed_record_of_another_shape_is_refused(folder, change):
    reseal(folder, change)
    with pytest.raises(CandidateError, match=r"its fields are not those of a candidate|its checksum does not match"):
        nas_gate.load(folder)


def test_sealed_weights_that_are_not_safetensors_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"not weights")
    reseal(folder, lambda r: None)
    with pytest.raises(CandidateError, match=r"weights\.safetensors is damaged"):
        nas_gate.load(folder, chain)


# --- names in the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["os:system", "nas_gate_planted:make", "collections:OrderedDict", "no_such_model", 3, None]
)
def test_an_unregistered_name_is_refused_and_nothing_imported(tmp_path, removed, monkeypatch, name):
    planted = tmp_path / "path"
    planted.mkdir()
    (planted / "nas_gate_planted.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(planted))
    model = {"name": name, "arguments": {"command": "exit 1"}}
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, model, FIGURES, PROVENANCE)
    with pytest.raises(CandidateError, match=rf"{name!r}, which is not registered: pass the function"):
        nas_gate.load(folder)
    assert "nas_gate_planted" not in sys.modules
    assert_sound(folder, removed.model)  # with the factory the name does not matter


def test_arguments_that_the_registered_model_refuses(tmp_path, removed):
    for arguments in ({"no_such_argument": 1}, {"num_classes": "many"}):
        model = {"name": "digits_cnn", "arguments": arguments}
        folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, model, {}, {})
        with pytest.raises(CandidateError, match="names arguments that the model 'digits_cnn' does not take"):
            nas_gate.load(folder)


# --- a model that does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (lambda: chain(classes=4), "size mismatch"),
        (lambda: chain(width=2), "must keep slots that exist"),
        (lambda: nn.Sequential(nn.Linear(3, 5)), "has no such parameter or buffer"),
        (lambda: nn.Sequential(*chain(), nn.Linear(5, 5)), "Missing key"),
        (lambda: chain()[:4], "has no such parameter or buffer"),
        (lambda: nn.Sequential(*chain()[:2], nn.SiLU(), *chain()[3:]), "'2' is SiLU, but the candidate has ReLU there"),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), *chain()[1:]), "size mismatch"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(folder, factory, reason):
    with pytest.raises(CandidateError, match=f"(?s)does not fit the model Sequential: .*{reason}"):
        nas_gate.load(folder, factory)


def test_a_registered_model_that_does_not_fit_is_refused(tmp_path, removed):
    model = {"name": "digits_cnn", "arguments": {}}
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, model, {}, {})
    with pytest.raises(CandidateError, match="does not fit the model ResNet"):
        nas_gate.load(folder)


# --- a save that fails --------------------------------------------------------------------------------------


def test_an_existing_candidate_is_replaced(folder, removed):
    torch.manual_seed(5)
    other = cut_in_half(chain(), pixels(1, 3, 8, 8), seed=3)
    assert nas_gate.save(folder, other.model, other.cut, own(), {"accuracy": 0.75}, PROVENANCE) == folder
    assert candidate.read(folder).figures == {"accuracy": 0.75}
    assert_sound(folder, other.model)
    assert alone(folder)


def test_an_empty_folder_is_filled(tmp_path, removed):
    (tmp_path / "c").mkdir()
    folder = nas_gate.save(tmp_path / "c", removed.model, removed.cut, own(), FIGURES, PROVENANCE)
    assert_sound(folder, removed.model)
    assert alone(folder)


def test_something_else_is_never_replaced(tmp_path, removed):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for name in ("notes", "file"):
        with pytest.raises(CandidateError, match=f"{name} exists and is none"):
            nas_gate.save(tmp_path / name, removed.model, removed.cut, own(), FIGURES, PROVENANCE)
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep me"
    assert sorted(os.listdir(tmp_path)) == ["file", "notes"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.ones(1), {1, 2}, object()])
@pytest.mark.parametrize("field", ["figures", "provenance", "model"])
def test_values_that_json_cannot_hold_are_refused_and_the_old_candidate_stays(folder, removed, field, value):
    fields: dict[str, Mapping[str, Any]] = {"model": own(), "figures": FIGURES, "provenance": PROVENANCE}
    fields[field] = {**fields[field], "x": {"nested": [value]}}
    with pytest.raises(CandidateError, match="must be plain JSON values"):
        nas_gate.save(folder, removed.model, removed.cut, **fields)
    assert candidate.read(folder).figures == FIGURES
    assert_sound(folder, removed.model)
    assert alone(folder)


def test_a_full_disk_leaves_the_old_candidate(folder, removed, monkeypatch):
    def full(weights: Any, path: Path) -> None:
        Path(path).write_bytes(b"the first bytes")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(candidate, "save_file", full)
        for place in (folder, folder.parent / "new"):
            with pytest.raises(OSError, match="No space left"):
                nas_gate.save(place, removed.model, removed.cut, own(), {}, {})
    assert candidate.read(folder).figures == FIGURES
    assert_sound(folder, removed.model)
    assert alone(folder)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_failing_rename_puts_the_old_candidate_back(folder, removed, monkeypatch, fails):
    renames, rename = [], Path.rename

    def sometimes(self: Path, target: Path) -> Path:
        renames.append(self)
        if len(renames) == fails + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", sometimes)
        with pytest.raises(KeyboardInterrupt):
            nas_gate.save(folder, removed.model, removed.cut, own(), {"accuracy": 0.75}, {})
    assert len(renames) > fails
    assert candidate.read(folder).figures == FIGURES
    assert_sound(folder, removed.model)
    assert alone(folder)


def test_a_state_that_is_not_tensors_only_is_refused(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self) -> str:
            return "a note"

    with pytest.raises(CandidateError, match="must be tensors only, but '_extra_state'"):
        nas_gate.save(tmp_path / "c", Noted(2, 2), NOTHING, own(), {}, {})
    assert os.listdir(tmp_path) == []


def test_weights_that_safetensors_cannot_hold_are_refused(tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CandidateError, match="must be dense and have values, but 'sparse'"):
        nas_gate.save(tmp_path / "c", net, NOTHING, own(), {}, {})
    assert os.listdir(tmp_path) == []


def test_views_of_one_memory_are_saved_apart(tmp_path):
    """Only names of the very same tensor are aliases; safetensors refuses tensors that overlap."""

    def make() -> nn.Module:
        net = nn.Linear(4, 4)
        net.register_buffer("whole", torch.arange(8.0))
        net.register_buffer("part", net.whole[:4])
        return net

    net = make()
    folder = nas_gate.save(tmp_path / "c", net, NOTHING, own(), {}, {})
    assert load_file(folder / WEIGHTS).keys() == {"weight", "bias", "whole", "part"}
    loaded = nas_gate.load(folder, make)
    assert torch.equal(loaded.part, net.part)
    assert torch.equal(loaded(torch.ones(1, 4)), net(torch.ones(1, 4)))


def test_weights_of_another_candidate_are_refused(folder, removed):
    state = {n: t + 1 for n, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CandidateError, match="truncated or altered"):
        nas_gate.load(folder, chain)
