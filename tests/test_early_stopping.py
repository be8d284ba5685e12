from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nas_gate.search import Moment
from nas_gate.study.early_stopping import EarlyStopping
from nas_gate.study.plan import Plan, join
from nas_gate.study.run import Running, run
from nas_gate.study.space import Space, parse

RULE = EarlyStopping(margin=0.125, rivals=2, grace=3)  # a power of two: the margin is met exactly


@pytest.mark.parametrize(
    ("epoch", "accuracy", "macs", "others", "stops"),
    [
        (3, 0.5, 10.0, [(0.625, 10.0), (0.75, 5.0)], True),
        (2, 0.5, 10.0, [(0.625, 10.0), (0.75, 5.0)], False),  # in the grace
        (3, 0.5, 10.0, [(0.625, 10.0)], False),  # one rival is too few
        (3, 0.5, 10.0, [(0.625, 10.0), (0.62, 5.0)], False),  # the second is not better by the margin
        (3, 0.5, 10.0, [(0.625, 10.0), (0.75, 11.0)], False),  # the second costs more
        (3, 0.0, 1.0, [(1.0, 2.0), (1.0, 3.0)], False),  # the cheapest of all is never stopped
        (3, 0.5, 10.0, [], False),
    ],
)
def test_the_rule(epoch: int, accuracy: float, macs: float, others: list[tuple[float, float]], stops: bool):
    assert RULE.stops(epoch, accuracy, macs, others) is stops


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"margin": -0.1}, "0 <= margin < 1.*-0.1"),
        ({"rivals": 0}, "rivals >= 1.*got 0"),
        ({"grace": -1}, "grace >= 0.*got -1"),
    ],
)
def test_its_numbers_are_checked(field: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**field)


def curve(running: Running) -> Mapping[str, Any]:
    """Trials 0 and 1 are good, 2 is bad, 3 is bad and cheap, 4 is bad in its last stage alone."""
    running.folder.mkdir(parents=True, exist_ok=True)
    seen = running.folder / "epochs"
    accuracy, macs = [(0.9, 10.0), (0.8, 9.0), (0.5, 10.0), (0.5, 5.0), (0.5, 10.0)][running.number]
    for epoch in range(6):
        stage = "gated" if epoch < 4 else "finetuned"
        better = 0.4 if running.number == 4 and stage == "gated" else 0.0
        with seen.open("a") as file:
            file.write(f"{epoch} ")
        running.on_epoch(Moment(stage, epoch, accuracy + better, macs))
    return {"accuracy": accuracy, "macs": macs}


@pytest.mark.parametrize("rule", [RULE, None])
def test_a_study_with_and_without(rule: EarlyStopping | None, tmp_path: Path):
    plan = Plan(
        name="s",
        space=Space(parse(["x=interval(0,1)"])[0]),
        objectives={"accuracy": "maximize", "macs": "minimize"},
        folder=tmp_path,
        n_trials=5,
        n_workers=0,
        early_stopping=rule,
    )
    run(plan, curve, [], Console(quiet=True))
    with closing(join(plan)) as joined:
        states = [trial.state.name for trial in joined.study.trials]
        front = {trial.number for trial in joined.study.best_trials}
    epochs = [len((tmp_path / str(number) / "epochs").read_text().split()) for number in range(5)]
    if rule is None:
        assert states == ["COMPLETE"] * 5
        assert epochs == [6] * 5
    else:  # stopped trials are part of the total, and the front loses nothing
        assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
        assert epochs == [6, 6, 4, 6, 5]
    assert front == {0, 1, 3}


def test_a_storage_that_is_away_for_an_epoch_costs_the_trial_nothing(tmp_path: Path):
    plan = Plan(
        name="s",
        space=Space(parse(["x=interval(0,1)"])[0]),
        objectives={"accuracy": "maximize", "macs": "minimize"},
        folder=tmp_path,
        n_trials=3,
        n_workers=0,
        max_retries=0,
        early_stopping=RULE,
    )

    def job(running: Running) -> Mapping[str, Any]:
        journal, away = tmp_path / "journal.log", tmp_path / "away"

        def on_epoch(moment: Moment) -> None:
            if moment.epoch in (1, 3):
                journal.rename(away)
            try:
                running.on_epoch(moment)
            finally:
                if away.exists():
                    away.rename(journal)

        return curve(replace(running, on_epoch=on_epoch))

    run(plan, job, [], Console(quiet=True))
    with closing(join(plan)) as joined:
        trials = joined.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert "epoch:gated:1" not in trials[0].user_attrs
    epochs = (tmp_path / "2" / "epochs").read_text().split()
    assert len(epochs) == 5  # it was to end after the fourth, which nobody could look at: at the next one
