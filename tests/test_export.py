"""Exported files compute what the candidate does, at any batch size; the card says what is recorded, no more."""

import builtins
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nas_gate
from nas_gate import export as module
from nas_gate import latency as latency_module
from nas_gate import models
from nas_gate.candidate import RECORD, CandidateError
from nas_gate.export import ExportError, export, widths
from nas_gate.exported import CARD, Exported, Width, card, describe
from nas_gate.latency import Latency, not_followed, take_turns

FIGURES = {
    "accuracy": 0.9375,
    "test_accuracy": 0.925,
    "dense_accuracy": 0.95,
    "macs": 900_000,
    "dense_macs": 1_800_000,
    "params": 80_000,
    "dense_params": 160_000,
    "max_relative_error": 3e-7,
}
PROVENANCE = {
    "seed": 11,
    "settings": {"data": {"name": "digits", "arguments": {"batch_size": 64}}, "target": 0.5},
    "versions": {"nas-gate": "0.1.0", "torch": "2.14.1"},
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason=f"needs {module.INSTALL}",
)


def made(folder: Path, name: str, shape: tuple[int, ...], figures: dict[str, Any], **arguments: Any) -> Path:
    """A candidate with about half of the MACs, and batch norm statistics that are not trivial."""
    torch.manual_seed(0)
    network = models.build(name, **arguments)
    network(torch.randn(8, *shape))
    return saved(folder, network.eval(), shape, {"name": name, "arguments": arguments}, figures)


def saved(folder: Path, network: nn.Module, shape: tuple[int, ...], model: Any, figures: dict[str, Any]) -> Path:
    gated = nas_gate.attach(network, torch.randn(1, *shape))
    gated.gates.weight.data.uniform_(-1, 1)
    removed = nas_gate.remove_with_proof(gated, nas_gate.land(gated, 0.5))
    costs = {"macs": removed.macs, "params": removed.params}
    return nas_gate.save(folder, removed.model, removed.cut, model, {**costs, **figures}, PROVENANCE)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "candidate"
    return made(folder, "digits_cnn", (1, 8, 8), {"input_shape": [1, 8, 8]}, width=0.5)


@pytest.fixture(scope="module")
def both(digits: Path) -> Exported:
    """The candidate of the digits in both formats, in its own folder."""
    return export(digits, measure=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies from as few calls as there can be."""
    monkeypatch.setattr(latency_module, "WARM_UP", 1)
    monkeypatch.setattr(latency_module, "FEWEST", 2)
    monkeypatch.setattr(latency_module, "SECONDS", 0.0)


def two(latency: Latency) -> tuple[Any, ...]:
    return latency.runtime, latency.batch, latency.threads


# --- the files ----------------------------------------------------------------------------------------------


def test_files_of_an_earlier_export_do_not_stay_beside_the_new_card(digits: Path, tmp_path: Path):
    """The card would not describe them. What else lies there is not ours."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "notes.txt"):
        (folder / name).write_text("earlier")
    export(digits, ["pt2"], output=folder, measure=False)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, "model.pt2", "notes.txt"]


@needs_onnx
@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_files_compute_what_the_candidate_does_at_any_batch_size(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
):
    import onnx
    import onnxruntime

    if name == "digits_cnn":
        exported, dense, shape = request.getfixturevalue("both"), models.build(name, width=0.5), (1, 8, 8)
    else:
        folder, shape = tmp_path / "c", (3, 32, 32)
        exported = export(made(folder, name, shape, {}), example_shape=shape, measure=False)
        dense = models.build(name)
    folder = exported.candidate
    assert sorted(path.name for path in (folder / "export").iterdir()) == [CARD, "model.onnx", "model.pt2"]
    assert not list(folder.glob(".export*"))

    network = nas_gate.load(folder)
    program = torch.export.load(folder / "export" / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "export" / "model.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", *shape]
    assert [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == ["batch", 10]
    for size in (1, 2, 5, 33):
        x = torch.randn(size, *shape)
        with torch.inference_mode():
            expected = network(x)
            torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)
        onnx_output = torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])
        torch.testing.assert_close(onnx_output, expected, rtol=1e-4, atol=1e-4)

    assert [a.format for a in exported.artifacts] == ["onnx", "pt2"]
    for a in exported.artifacts:
        assert 0 <= a.max_relative_error < 1e-5
        assert 0 <= a.max_absolute_error < 1e-4
        assert hashlib.sha256(a.path.read_bytes()).hexdigest() == a.sha256
    assert exported.artifacts[0].max_absolute_error > 0  # other kernels round otherwise

    x = torch.zeros(1, *shape)
    assert exported.macs_ratio == nas_gate.count_macs(network, (x,)) / nas_gate.count_macs(dense, (x,))
    assert exported.latencies == ()
    assert exported.warnings == ()


@needs_onnx
def test_padded_files_compute_the_same(digits: Path, tmp_path: Path):
    import onnx

    network = nas_gate.load(digits)
    exported = export(digits, output=tmp_path / "export", measure=False, pad_to=4)
    plain = export(digits, ["pt2"], output=tmp_path / "plain", measure=False)
    assert (exported.pad_to, exported.macs_ratio) == (4, plain.macs_ratio)
    assert exported.macs_ratio < exported.written_ratio < 1
    program = torch.export.load(tmp_path / "export" / "model.pt2").module()
    x = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(program(x), network(x), rtol=1e-5, atol=1e-5)
    weights = onnx.load(tmp_path / "export" / "model.onnx").graph.initializer
    assert {w.dims[0] % 4 for w in weights if len(w.dims) == 4} == {0}
    assert any(m.out_channels % 4 for m in network.modules() if isinstance(m, nn.Conv2d))
    line = f"padded to multiples of 4 with some that nothing reads: the same function, for {exported.written_ratio:.1%}"
    assert line in card(exported)
    assert line in describe(exported)
    assert "padded" not in card(plain)


@needs_onnx
def test_latency_of_both_networks_in_both_runtimes(digits: Path, tmp_path: Path, quick: None):
    threads = torch.get_num_threads()
    exported = export(digits, output=tmp_path / "export", batch_sizes=(1, 3), threads=(1, 2))
    assert torch.get_num_threads() == threads
    runtimes = ("PyTorch", "ONNX Runtime")
    assert list(map(two, exported.latencies)) == [(r, n, t) for r in runtimes for t in (1, 2) for n in (1, 3)]
    assert all(x.repetitions == 2 and x.dense_ms > 0 and x.candidate_ms > 0 for x in exported.latencies)
    assert exported.warnings == not_followed(exported.latencies, exported.macs_ratio)


def test_pt2_alone_needs_no_onnx(digits: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    exported = export(digits, ["pt2"], output=tmp_path / "a" / "b", batch_sizes=[2], threads=[1])
    assert [path.name for path in sorted((tmp_path / "a" / "b").iterdir())] == [CARD, "model.pt2"]
    assert list(map(two, exported.latencies)) == [("PyTorch", 2, 1)]
    assert exported.versions == {"torch": torch.__version__}


class Two(nn.Module):
    """A network of the user's own, with two outputs and a layer that no gate reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 12, 3), nn.Linear(12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x).relu().mean((2, 3))
        return {"third": self.third(x), "second": self.second(x)}


@needs_onnx
def test_own_factory_with_two_outputs(tmp_path: Path):
    torch.manual_seed(0)
    folder = saved(tmp_path / "c", Two().eval(), (2, 6, 6), {"name": "mine"}, {"input_shape": [2, 6, 6]})
    exported = export(folder, factory=Two, measure=False)
    assert exported.latencies == ()
    assert all(a.max_relative_error < 1e-5 for a in exported.artifacts)
    assert "factory=make_dense" in exported.card.read_text()
    kept = exported.widths[0].kept
    assert 0 < kept < 12
    assert exported.widths == (Width("first", kept, 12), Width("second", 3, 3), Width("third", 5, 5))


# --- what is refused ----------------------------------------------------------------------------------------


@needs_onnx
def test_a_wrong_onnx_file_is_caught(digits: Path, both: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import onnx

    def wrong(program: torch.export.ExportedProgram, path: Path) -> None:
        proto = onnx.load(both.artifacts[0].path)
        weight = next(w for w in proto.graph.initializer if len(w.dims) == 4)
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values * 1.01, weight.name))
        onnx.save(proto, path)

    monkeypatch.setitem(module.FORMATS, "onnx", replace(module.FORMATS["onnx"], write=wrong))
    with pytest.raises(ExportError, match=r"onnx file must compute what the network does.*allowed: 0.0001.*1, 2, 7"):
        export(digits, output=tmp_path / "export", measure=False)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_pt2_file_is_caught(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = module.FORMATS["pt2"]
    monkeypatch.setitem(module.FORMATS, "pt2", replace(right, open=lambda path: lambda x: torch.zeros(len(x), 10)))
    with pytest.raises(ExportError, match=r"pt2 file must compute what the network does, but its largest .* is 1 "):
        export(digits, ["pt2"], output=tmp_path / "export", measure=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["onnx", "tflite"]}, "unknown format 'tflite'; valid formats: onnx, pt2"),
        ({"formats": []}, "at least one format must be named; valid formats: onnx, pt2"),
        ({"batch_sizes": (1, 0)}, r"`batch_sizes` must be whole numbers of at least 1, but are \[1, 0\]"),
        ({"threads": (2.5,)}, r"`threads` must be whole numbers of at least 1, but are \[2.5\]"),
        ({"example_shape": (3, 8, 8)}, r"takes inputs of shape \[1, 8, 8\], but example_shape=\[3, 8, 8\]"),
        ({"output": __file__}, "the output must be a folder"),
    ],
)
def test_wrong_arguments(digits: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        export(digits, **arguments)


def test_the_input_shape_must_be_known_and_right(tmp_path: Path):
    folder = made(tmp_path / "c", "digits_cnn", (1, 8, 8), {}, width=0.25)
    with pytest.raises(ValueError, match=r"does not record the shape of its input: pass .* example_shape=\(3, 32"):
        export(folder, ["pt2"])
    with pytest.raises(ValueError, match=r"sizes of at least 1, but is \[1, -8\]"):
        export(folder, ["pt2"], example_shape=(1, -8))
    with pytest.raises(ExportError, match=r"one tensor of shape \(1, 3, 8, 8\), but fails"):
        export(folder, ["pt2"], example_shape=(3, 8, 8))
    # it runs on larger images, too, but that is not what the figures are of
    exported = export(folder, ["pt2"], example_shape=(1, 16, 16), measure=False)
    assert re.fullmatch(
        r"the candidate's record says [\d,]+ MACs, but [\d,]+ were counted .*16\]", exported.warnings[0]
    )
    assert exported.warnings[0] in exported.card.read_text()


def test_other_types_than_float32_are_refused(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    folder = saved(tmp_path / "c", network, (1, 8, 8), {"name": "mine"}, {"input_shape": [1, 8, 8]})
    small = nas_gate.load(folder, lambda: network).half()
    cut = nas_gate.candidate.read(folder).cut
    nas_gate.save(folder, small, cut, {"name": "mine"}, {"input_shape": [1, 8, 8]}, {})
    with pytest.raises(ExportError, match=r"weights must be float32, but some are \['torch.float16'\]"):
        export(folder, ["pt2"], factory=lambda: network)


class OnlyTwo(nn.Module):
    """A network whose code allows a batch of up to four only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            raise ValueError("too many")
        return self.last(self.first(x).relu())


def test_a_network_that_no_graph_of_any_batch_size_exists_for(tmp_path: Path):
    folder = saved(tmp_path / "c", OnlyTwo(), (4,), {"name": "mine"}, {"input_shape": [4]})
    with pytest.raises(ExportError, match=r"torch\.export cannot trace OnlyTwo for any batch size"):
        export(folder, ["pt2"], factory=OnlyTwo)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_give_the_install_command(digits: Path, missing: str, monkeypatch: pytest.MonkeyPatch):
    real = importlib.import_module

    def importing(name: str) -> Any:
        if name == missing:
            raise ImportError(name)
        return real("json") if name.startswith("onnx") else real(name)

    monkeypatch.setattr(json, "__version__", "1", raising=False)
    monkeypatch.setattr(importlib, "import_module", importing)
    with pytest.raises(ImportError, match=rf"'onnx' needs the package '{missing}': pip install \"nas-gate\[export\]\""):
        export(digits)


def test_errors_of_the_candidate_pass_through(tmp_path: Path, digits: Path):
    with pytest.raises(CandidateError, match="is no candidate"):
        export(tmp_path / "nothing")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in digits.glob("*.*"):
        if path.is_file():
            (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / RECORD).write_text((damaged / RECORD).read_text().replace('"macs": ', '"macs": 1'))
    with pytest.raises(CandidateError, match="was altered"):
        export(damaged)
    (damaged / RECORD).write_bytes((digits / RECORD).read_bytes())
    (damaged / "weights.safetensors").write_bytes((digits / "weights.safetensors").read_bytes()[:-5])
    with pytest.raises(CandidateError, match="truncated or altered"):
        export(damaged)


@pytest.mark.parametrize("moment", ["writing", "measuring"])
def test_an_interrupted_export_leaves_what_was_there(
    digits: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "export"
    before = export(digits, ["pt2"], output=output, measure=False)
    content = {path: path.read_bytes() for path in output.iterdir()}
    threads = torch.get_num_threads()

    def half(program: torch.export.ExportedProgram, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    def stop(*_: Any) -> None:
        assert torch.get_num_threads() == 3
        raise KeyboardInterrupt

    if moment == "writing":
        monkeypatch.setitem(module.FORMATS, "pt2", replace(module.FORMATS["pt2"], write=half))
    else:
        monkeypatch.setattr(latency_module, "take_turns", stop)
    with pytest.raises(KeyboardInterrupt):
        export(digits, ["pt2"], output=output, threads=[3])
    assert {path: path.read_bytes() for path in output.iterdir()} == content
    assert list(tmp_path.iterdir()) == [output]
    assert torch.get_num_threads() == threads
    assert before.artifacts[0].path in content


def test_a_full_disk_leaves_nothing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(program: torch.export.ExportedProgram, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(module.FORMATS, "pt2", replace(module.FORMATS["pt2"], write=full))
    with pytest.raises(OSError, match="No space left"):
        export(digits, ["pt2"], output=tmp_path / "export", measure=False)
    assert list(tmp_path.iterdir()) == []


# --- latency ------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while a function runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, ""
        monkeypatch.setattr(latency_module, "perf_counter", lambda: self.now)

    def function(self, name: str, seconds: Iterator[float]) -> Any:
        def run(*_: Any) -> None:
            self.calls += name
            self.now += next(seconds)

        return run


def test_functions_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(latency_module, "WARM_UP", 2)
    monkeypatch.setattr(latency_module, "FEWEST", 3)
    # 0.1 s a turn after 1.8 s of warm-up: the count alone is not enough for 0.45 s
    monkeypatch.setattr(latency_module, "SECONDS", 0.45)
    a, b = clock.function("a", iter([0.9] * 2 + [0.06] * 9)), clock.function("b", iter([0.0] * 2 + [0.04] * 9))
    first, second = take_turns([a, b])
    assert clock.calls == "ab" * (2 + 5)
    assert first == pytest.approx([60] * 5)
    assert second == pytest.approx([40] * 5)
    monkeypatch.setattr(latency_module, "MOST", 4)
    slow, fast = (clock.function(name, iter([0.0] * 9)) for name in "cd")
    assert [len(times) for times in take_turns([slow, fast])] == [4, 4]


def test_median_and_spread(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    for name, value in (("WARM_UP", 0), ("FEWEST", 5), ("SECONDS", 0.0)):
        monkeypatch.setattr(latency_module, name, value)
    dense = clock.function("d", iter([0.010, 0.012, 0.100, 0.014, 0.016]))
    small = clock.function("s", iter([0.007] * 5))
    latency = latency_module._latency("PyTorch", dense, small, torch.zeros(6, 1), 2)
    # in order 10, 12, 14, 16, 100: quartiles 12 and 16
    assert (latency.dense_ms, latency.dense_iqr_ms) == (pytest.approx(14), pytest.approx(4))
    assert (latency.candidate_ms, latency.candidate_iqr_ms) == (pytest.approx(7), pytest.approx(0, abs=1e-9))
    assert (latency.batch, latency.threads, latency.repetitions) == (6, 2, 5)
    assert latency.ratio == pytest.approx(0.5)


def at(ratio: float, runtime: str = "PyTorch", threads: int = 1) -> Latency:
    return Latency(runtime, 128, threads, 100.0, 1.0, 100 * ratio, 1.0, 9)


def test_a_warning_where_less_than_half_of_the_saving_arrived():
    # 40% of the MACs: 60% are saved, so 70% is the most latency that is not warned of
    assert not_followed([at(0.4), at(0.6), at(0.699)], 0.4) == ()
    assert not_followed([at(0.5), at(0.71, "ONNX Runtime", 2), at(1.05)], 0.4) == (
        "latency did not follow MACs: ONNX Runtime, batch 128, 2 threads: 71.0% of the dense latency, with 40.0% of "
        "the MACs",
        "latency did not follow MACs: PyTorch, batch 128, 1 thread: 105.0% of the dense latency, with 40.0% of "
        "the MACs",
        "ONNX Runtime is quickest where channels are multiples of 8 (16 is better with AVX-512): export with --pad-to "
        "8 (the same function), or search with round_to=8",
    )
    *_, advice = not_followed([at(0.71, "ONNX Runtime")], 0.4, pad_to=8)
    assert "multiples of 8 (16 is better with AVX-512): search with round_to=8" in advice
    assert not_followed([at(1.2)], 1.0) == ()  # nothing was saved


# --- card and text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export of known figures (those of the record, not of the network) and one latency."""
    folder = tmp_path_factory.mktemp("recorded") / "candidate"
    made(folder, "digits_cnn", (1, 8, 8), {**FIGURES, "input_shape": [1, 8, 8]}, width=0.5)
    exported = export(folder, ["pt2"], measure=False)
    return replace(exported, latencies=(at(0.9),), macs_ratio=0.5, warnings=not_followed([at(0.9)], 0.5))


def test_the_card_says_what_is_recorded(recorded: Exported):
    text = card(recorded)
    (pt2,) = recorded.artifacts
    for line in (
        "# digits_cnn, 50.0% of the dense MACs",
        "Input: float32 of shape (N, 1, 8, 8), N free, prepared as the training data were.",
        "> **Warning:** latency did not follow MACs: PyTorch, batch 128, 1 thread: 90.0% of the dense latency, with "
        "50.0% of the MACs.",
        "| validation accuracy | 93.75% | 95.00% | -1.25 points |",
        "| test accuracy | 92.50% |  |  |",
        "| MACs per example | 900,000 | 1,800,000 | 50.0% |",
        "| parameters | 80,000 | 160,000 | 50.0% |",
        "Largest relative error of the removal, against the gated network: 3.0e-07.",
        "| PyTorch | 128 | 1 | 100 (1) | 90 (1) | 90.0% |",
        '- model: `digits_cnn`, arguments `{"width": 0.5}`',
        '- data: `{"name": "digits", "arguments": {"batch_size": 64}}`',
        "- seed: 11",
        "- made by: nas-gate 0.1.0, torch 2.14.1",
    ):
        assert line in text.splitlines()
    assert f"| `model.pt2` | pt2 | {pt2.size / 1e6:.2f} | {pt2.max_relative_error:.1e} |" in text
    assert pt2.sha256 in text
    assert json.loads(text.split("```json")[1].split("```")[0]) == PROVENANCE
    network, dense = nas_gate.load(recorded.candidate), models.build("digits_cnn", width=0.5)
    layers = {
        path: (len(a.weight), len(b.weight))
        for (path, a), b in zip(network.named_modules(), dense.modules())
        if isinstance(a, (nn.Conv2d, nn.Linear))
    }
    assert len(layers) >= 7
    assert {w.layer: (w.kept, w.dense) for w in recorded.widths} == layers
    for path, (kept, wide) in layers.items():
        assert f"| `{path}` | {kept} | {wide} | {kept / wide:.0%} |" in text


@pytest.mark.parametrize("depth", [False, True])
def test_widths_of_layers_that_are_gone(depth: bool):
    """Closed branches and candidates that were not chosen: none of their outputs is left."""
    dense = models.build("resnet20" if depth else "cifar_supernet").eval()
    gated = nas_gate.attach(dense, torch.randn(1, 3, 32, 32), depth=depth)
    gone = [group.start for group in gated.structure.groups if group.kind == "branch"][:1]
    gone += [choice.units[0] for choice in gated.structure.choices]
    with torch.no_grad():
        gated.gates.weight[gone] = -1
    removed = nas_gate.remove_with_proof(gated, gated.keep() > 0.5)
    layers = {path: m for path, m in dense.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    found = widths(removed.model, dense, removed.cut)
    assert [width.layer for width in found] == list(layers)
    left = [m for m in removed.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [width.kept for width in found if width.kept] == [m.weight.shape[0] for m in left]
    assert len(left) < len(layers)


def test_what_is_not_recorded_is_left_out(recorded: Exported):
    bare = replace(recorded, figures={"test_accuracy": None}, provenance={}, latencies=(), warnings=())
    text = card(bare)
    for word in ("accuracy", "## Figures", "## Latency", "seed", "data:", "made by", "Warning", "None", "| nan"):
        assert word not in text
    assert "## Files" in text


@pytest.mark.parametrize(
    ("method", "gate", "chooser"),
    [
        ("gates", "trainable", "trainable gates (arXiv 1904.10921) chose"),
        ("gates", "gumbel", "`gumbel` gates chose"),
        ("uniform", "trainable", "the baseline `uniform` chose"),
    ],
)
def test_the_card_says_who_chose(recorded: Exported, method: str, gate: str, chooser: str):
    made = replace(recorded, figures={"method": method}, provenance={"settings": {"gate": {"name": gate}}})
    assert f"found by nas-gate: {chooser} what of the dense network stays" in card(made)


def test_the_card_says_how_inputs_are_prepared(recorded: Exported):
    made = replace(recorded, provenance={"normalisation": {"mean": [125.30691, 1], "std": [62.5, 2.0]}})
    assert "normalised by channel as (x - mean) / std with mean [125.307, 1.0] and std [62.5, 2.0]" in card(made)


def test_the_card_of_another_task(recorded: Exported):
    quality = {"name": "mean_error", "higher_is_better": False, "shown": ".3f"}
    figures = {"task_metric": quality, "mean_error": 0.25, "dense_mean_error": 0.2, "test_mean_error": 0.3}
    lines = card(replace(recorded, figures=figures)).splitlines()
    assert "| validation mean error | 0.250 | 0.200 | +0.050 |" in lines
    assert "| test mean error | 0.300 |  |  |" in lines
    assert not any("accuracy" in line for line in lines)


@needs_onnx
def test_the_code_on_the_card_runs(both: Exported, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(both.output)
    snippets = re.findall(r"```python\n(.*?)```", both.card.read_text(), re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    shapes = []
    for code in snippets:
        builtins.exec(code, names)
        if "outputs" in names:
            shapes.append(tuple(names["outputs"][0].shape))
    assert isinstance(names["nas_gate"].load(os.pardir), nn.Module)
    assert shapes == [(1, 10), (10,)]


def test_describe(recorded: Exported):
    lines = describe(recorded).splitlines()
    (pt2,) = recorded.artifacts
    assert lines[0] == "digits_cnn, 50.0% of the dense MACs, for inputs of (N, 1, 8, 8)"
    assert lines[2].startswith(
        f"  pt2   {pt2.path}  ({pt2.size / 1e6:.2f} MB; largest error {pt2.max_relative_error:.1e} "
    )
    assert lines[3] == f"  card  {recorded.card}"
    assert " ".join(lines[6].split()) == "runtime batch threads dense, ms (IQR) candidate, ms (IQR) ratio"
    assert " ".join(lines[7].split()) == "PyTorch 128 1 100 (1) 90 (1) 90.0%"
    assert lines[-1] == f"warning: {recorded.warnings[0]}"
