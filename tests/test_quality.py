"""What candidates are judged by: its words by hand, its record."""

import json
from dataclasses import asdict

import pytest

from nas_gate.quality import ACCURACY, RECORD, Quality, quality_of
from nas_gate.tasks import TASKS

RMSE = Quality("rmse", False, ".4f")
IOU = Quality("mean_iou")


def test_words_by_hand() -> None:
    assert (IOU.label, IOU.test, IOU.dense) == ("mean iou", "test_mean_iou", "dense_mean_iou")
    assert (IOU.show(0.934), RMSE.show(0.934)) == ("93.40%", "0.9340")
    assert (IOU.show_size(0.012), RMSE.show_size(0.012)) == ("1.20", "0.0120")
    assert (IOU.show_change(-0.012), IOU.show_change(0.012)) == ("-1.20 points", "+1.20 points")
    assert (RMSE.show_change(-0.012), RMSE.show_change(0.0)) == ("-0.0120", "+0.0000")
    assert IOU.against("macs") == (("mean_iou", "max"), ("macs", "min"))
    assert RMSE.against("params") == (("rmse", "min"), ("params", "min"))
    assert (IOU.reference, RMSE.reference) == ((0.0, 1.0), None)


@pytest.mark.parametrize("quality", [ACCURACY, IOU, RMSE])
def test_its_record_is_read_back(quality: Quality) -> None:
    assert quality_of(json.loads(json.dumps({RECORD: asdict(quality)}))) == quality


def test_results_without_a_record_are_of_accuracy() -> None:
    assert quality_of({"accuracy": 0.9}) == ACCURACY == Quality(TASKS["classification"].metric.name)


@pytest.mark.parametrize(
    "record",
    [
        None,
        "rmse",
        {"name": "rmse"},
        {"name": "rmse", "higher_is_better": 0, "shown": ".4f"},
        {"name": 3, "higher_is_better": False, "shown": ".4f"},
        {"name": "mean iou", "higher_is_better": True, "shown": ".4f"},
        {"name": "rmse", "higher_is_better": False, "shown": "nonsense"},
    ],
)
def test_a_damaged_record_is_refused(record: object) -> None:
    with pytest.raises(ValueError, match=r"task_metric must have|must be an identifier|format specifier"):
        quality_of({RECORD: record})
