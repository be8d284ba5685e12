"""Every file in examples/ runs, and keeps what the library promises."""

import runpy
from pathlib import Path

import pytest
import torch

import nas_gate
from nas_gate.removal import relative_error

EXAMPLES = Path(__file__).parents[1] / "examples"
HIGHER_IS_BETTER = {"segmentation": True, "optical_flow": False, "style_transfer": False, "translation": True}


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(HIGHER_IS_BETTER)


@pytest.mark.parametrize("name", HIGHER_IS_BETTER)
def test_example(name: str, capsys: pytest.CaptureFixture[str]):
    ran = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    gated, target, scores = ran["gated"], ran["TARGET"], ran["scores"]
    assert list(scores) == ["untrained", "dense", "gated", "landed", "fine-tuned"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(scores)

    sign = 1 if HIGHER_IS_BETTER[name] else -1
    for stage in ("dense", "fine-tuned"):
        assert sign * scores[stage] > sign * scores["untrained"]

    args, kwargs = gated.example_inputs
    dense, left = (nas_gate.count_macs(ran[model], args, kwargs) for model in ("model", "small"))
    assert dense == gated.cost.total()
    assert 0.9 * target * dense < left <= target * dense

    # the small network was trained on: cut once more, and compare with the gates set to what landing chose
    keep, removed = nas_gate.land(gated, target), nas_gate.remove(gated, target).eval()
    assert nas_gate.count_macs(removed, args, kwargs) == left
    with torch.no_grad():
        gated.gates.weight.copy_(keep.float() * 2 - 1)
        assert relative_error(gated.eval()(*args, **kwargs), removed(*args, **kwargs)) < 1e-5
