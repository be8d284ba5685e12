import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn

import nas_gate
from nas_gate import search, tasks, training
from nas_gate.cli import composed, settings_of
from nas_gate.errors import Refused
from nas_gate.tasks import CLASSIFICATION, REGRESSION, SEGMENTATION, TASKS, VOID, Metric, Task, make_task

SHORT = ["training.dense.epochs=1", "training.cycle.epochs=3", "training.gating.epochs=2", "hardware.accelerator=cpu"]
SHORT += ["training.gating.learning_rate=0.2", "data.batch_size=128"]


def small(num_classes: int = 1, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))


def counting(off_by: float = 0.0) -> Task:
    """A task of a user's own: numbers, measured by the share that is nearer than 1 to the target."""
    metric = Metric(
        "hits",
        lambda outputs, targets: torch.tensor([((outputs - targets).abs() < 1).sum(), targets.numel()]),
        lambda counts: float(counts[0] / counts[1] - off_by),
    )
    return Task(REGRESSION.loss, REGRESSION.imitation, metric)


def run(folder: Path, *overrides: str, **more):
    return search.search(
        settings_of(composed([*SHORT, *overrides])), folder / "run", cache_dir=folder / "dense", **more
    )


# --- losses and metrics ---


def test_mean_iou_by_hand():
    given = torch.tensor([[0, 0, 1, 1], [2, 2, 0, 1]])
    targets = torch.tensor([[0, 1, 1, VOID], [2, 0, VOID, 1]])
    logits = nn.functional.one_hot(given, 5).movedim(-1, 1).float()
    counts = tasks.confusion(logits, targets)
    expected = torch.zeros(5, 5, dtype=torch.int64)  # rows: true classes
    expected[0, 0] = expected[1, 0] = expected[0, 2] = expected[2, 2] = 1
    expected[1, 1] = 2
    assert torch.equal(counts, expected)
    assert SEGMENTATION.metric.value(counts.double()) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


def test_void_pixels_have_no_loss():
    logits, y = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[0, 1, 2, VOID], [VOID, 1, 1, 0]])
    loss = SEGMENTATION.loss(0.0)(logits, logits, y)
    flat, known = logits.movedim(1, -1).reshape(8, 3), y.flatten() != VOID
    torch.testing.assert_close(loss, nn.functional.cross_entropy(flat[known], y.flatten()[known]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_batch_of_void_pixels_has_a_loss_of_0_and_any_other_its_mean(label_smoothing: float):
    logits, y = torch.randn(2, 3, 4, requires_grad=True), torch.full((2, 4), VOID)
    loss = SEGMENTATION.loss(label_smoothing)
    void = loss(logits, logits, y)
    void.backward()
    assert (float(void.detach()), float(logits.grad.abs().max())) == (0.0, 0.0)
    y[0, 1], y[1, 3] = 2, 0
    logs = logits.detach().log_softmax(1)
    known = ((logs[0, :, 1], logs[0, 2, 1]), (logs[1, :, 3], logs[1, 0, 3]))  # of all classes, of the right one
    hand = sum((1 - label_smoothing) * right + label_smoothing * every.mean() for every, right in known) / -2
    torch.testing.assert_close(loss(logits, logits, y).detach(), hand)


def test_255_is_a_class_of_images_like_any_other():
    logits = torch.randn(2, 300)
    torch.testing.assert_close(
        CLASSIFICATION.loss(0.0)(logits, logits, torch.tensor([255, 3])),
        -(logits.log_softmax(1)[0, 255] + logits.log_softmax(1)[1, 3]) / 2,
    )


def test_distillation_of_pixels_is_that_of_as_many_examples():
    ours, theirs = torch.randn(2, 2, 3, 4, 5).unbind()
    flat = (each.movedim(1, -1).reshape(40, 3) for each in (ours, theirs))
    torch.testing.assert_close(SEGMENTATION.imitation(ours, theirs, 3.0), CLASSIFICATION.imitation(*flat, 3.0))


def test_regression_by_hand():
    outputs, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    counts = REGRESSION.metric.count(outputs, targets)
    assert REGRESSION.metric.value(counts) == math.sqrt((4 + 16) / 4)
    assert float(REGRESSION.loss(0.3)(outputs, outputs, targets)) == 5.0
    assert float(REGRESSION.imitation(outputs, targets, 4.0)) == 5.0
    with pytest.raises(ValueError, match=r"must have one shape, but have \(2, 2\) and \(2,\)"):
        REGRESSION.loss(0.0)(outputs, outputs, targets[:, 0])


@pytest.mark.parametrize("name", TASKS)
@given(seed=strategies.integers(0, 1000), at=strategies.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_counts_add_up_over_batches(name: str, seed: int, at: int):
    rng = torch.Generator().manual_seed(seed)
    outputs = torch.randn(7, 3, 2, 2, generator=rng)
    targets = {"segmentation": torch.randint(3, (7, 2, 2), generator=rng), "regression": outputs.flip(0)}
    if name == "classification":
        outputs, targets["classification"] = outputs[..., 0, 0], torch.randint(3, (7,), generator=rng)
    y, metric = targets[name], TASKS[name].metric
    parts = sum(metric.count(outputs[part], y[part]).double() for part in (slice(at), slice(at, 7)))
    assert isinstance(parts, Tensor)
    assert metric.value(parts) == pytest.approx(metric.value(metric.count(outputs, y).double()))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("segment", {}, ValueError, "one of classification, segmentation, regression, or .* but got 'segment'"),
        ("segmentation", {"classes": 3}, TypeError, "takes no arguments, but got {'classes': 3}"),
        ("test_tasks:no_such", {}, ImportError, "task 'test_tasks:no_such': 'test_tasks' has no attribute 'no_such'"),
        ("no_such_module:task", {}, ImportError, "cannot import module 'no_such_module'"),
        ("test_tasks:counting", {"far": 3}, TypeError, "far"),
        ("test_tasks:small", {}, TypeError, "must return a Task, but returned .*Sequential"),
    ],
)
def test_what_is_no_task(name: str, arguments: dict, error: type, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(error, match=message):
        make_task(name, **arguments)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("loss", "none of .*'macs'"),
        *((name, "none of") for name in ("macs", "macs_ratio", "params_ratio", "max_relative_error", "hypervolume")),
        *((name, "none of") for name in ("test_accuracy", "candidates", "latency_relative_error", "landed_macs")),
        ("mean iou", "an identifier"),
        ("", "an ident"),
    ],
)
def test_a_metrics_name_is_an_identifier_and_no_other_figures(name: str, rule: str):
    with pytest.raises(ValueError, match=f"must be {rule}.* but is '{name}'"):
        Metric(name, tasks.confusion, float)


@pytest.mark.parametrize(
    ("count", "outputs", "targets"),
    [
        (tasks.ACCURACY.count, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)),
        (tasks.confusion, torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64)),
        (tasks.ERROR.count, torch.zeros(4, 3), torch.zeros(4, 3)),
    ],
)
def test_counting_waits_for_no_device(count: Callable, outputs: torch.Tensor, targets: torch.Tensor):
    """On a device without values whatever reads one fails."""
    assert count(outputs.to("meta"), targets.to("meta")).device.type == "meta"


def test_a_metric_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"`shown` must be a format of floats, as .2%, but is 'much'"):
        Metric("psnr", tasks.confusion, float, shown="much")


# --- in the program ---


def test_segmentation_is_searched_like_classification(tmp_path: Path):
    moments: list[search.Moment] = []
    overrides = ("experiment=segmentation", "model.arguments.width=0.5", "target=0.6")
    result = run(tmp_path, *overrides, on_epoch=moments.append)
    assert not any("accuracy" in key for key in result)
    assert result["achieved"] == result["macs"] / result["dense_macs"] <= 0.6
    assert result["max_relative_error"] < 1e-4
    assert result["task_metric"] == {"name": "mean_iou", "higher_is_better": True, "shown": ".2%"}
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["finetuned"][-1]["mean_iou"] == result["mean_iou"] == result["finetuned_mean_iou"]
    assert [moment.accuracy for moment in moments[:2]] == [entry["mean_iou"] for entry in history["gated"]]
    data = search.load_data(settings_of(composed([*SHORT, *overrides])))
    network, fabric = nas_gate.load(result["path"]), training.connect(training.Hardware(accelerator="cpu"))
    for loader, name in ((data.validation, "mean_iou"), (data.test, "test_mean_iou")):
        assert training.evaluate(network, loader, fabric=fabric, task=SEGMENTATION).accuracy == result[name]
    assert run(tmp_path, *overrides) == result  # finished
    keys = {*result, *(key for entries in history.values() for key in entries[0])}
    assert [key for key in keys if "mean_iou" not in key and key not in tasks.TAKEN] == []
    with pytest.raises(Refused, match=r"task\.name: segmentation there"):
        run(tmp_path, *overrides, "task=classification")


@pytest.fixture
def values(tmp_path: Path) -> list[str]:
    """Overrides for pictures with two numbers each: where their light stands."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, n in (("train", 300), ("test", 40)):
        y = rng.integers(0, 8, (n, 2))
        x = np.zeros((n, 1, 8, 8), np.float32)
        x[np.arange(n), 0, y[:, 0], y[:, 1]] = 5
        parts |= {f"x_{part}": x, f"y_{part}": y / 2}
    np.savez(tmp_path / "lights.npz", **parts)
    return ["model=custom", "model.name=test_tasks:small", "data=npz", f"data.path='{tmp_path}/lights.npz'"]


def test_less_error_is_better(tmp_path: Path, values: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    moments: list[search.Moment] = []
    result = run(tmp_path, *values, "task=regression", "targets=[0.7,0.4]", on_epoch=moments.append)
    assert result["candidates"] == ["target-0.7", "target-0.4"]
    assert "hypervolume" not in result  # of an error there is no worst one
    assert [key for key in result if "rmse" not in key and key not in tasks.TAKEN] == []
    assert result["rmse"] > 0
    assert result["task_metric"] == {"name": "rmse", "higher_is_better": False, "shown": ".4f"}
    history = json.loads((tmp_path / "run" / "target-0.7" / "history.json").read_text())
    assert moments[0].accuracy == -history["gated"][0]["rmse"]


def test_a_task_of_ones_own(tmp_path: Path, values: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = ["task=custom", "task.name=test_tasks:counting", "+task.arguments.off_by=0.25"]
    result = run(tmp_path, *values, *own)
    assert -0.25 <= result["hits"] == result["finetuned_hits"] <= 0.75
    assert result["test_hits"] is not None
    assert len(list((tmp_path / "dense").iterdir())) == 1
    run(tmp_path / "other", *values, "task=regression")
    names = [path.name for folder in (tmp_path, tmp_path / "other") for path in (folder / "dense").iterdir()]
    assert len(set(names)) == 2  # the cache tells tasks apart


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=regression"], r"must fit the model's outputs \(4, 10\) and the targets \(4,\) of digits.* one shape"),
        (
            ["data=shapes", "model=shapes_fcn"],
            r"\(4, 32, 32\) of shapes, but: Targets .* a class per example, \(N,\), .*take task=segmentation",
        ),
        (["data=shapes"], r"model's outputs \(4, 4\) and the targets \(4, 32, 32\) of shapes"),
        (["+task.arguments.classes=3"], "takes no arguments"),
        (["task=custom", "task.name=test_tasks:nothing"], "has no attribute 'nothing'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_training(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(Refused, match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "dense").exists()
