"""From folders of studies and runs to one table of candidates, as `nas_gate.pareto` wants it.

A study is a folder of trials, each a folder named by its number; a trial (or a single run) holds `settings.json` and
`result.json`. The candidate lies in `candidate/` beside them, or, where the result names several `candidates`, in
`candidate/` of each of these subfolders, beside a `result.json` of its own. Everything is read where it lies now, so
that a folder may be moved. Of a study that is still running, what is finished is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nas_gate import latency
from nas_gate.candidate import CandidateError, read
from nas_gate.described import PLACES, flat, within
from nas_gate.pareto import check_table, required
from nas_gate.quality import ACCURACY, Quality, quality_of

Plain = Mapping[str, Any]

CANDIDATE, RESULT, SETTINGS, HISTORY = "candidate", "result.json", "settings.json", "history.json"
OWN_COLUMN = ("target", "seed", "method")
"""Settings that have a column of their own."""

OF_GATES = ("gate", "budget", "gating")
"""Settings that only the method "gates" looks at: what a study has drawn of them for a baseline says nothing."""

OF_TRAINING = ("batch_size", "augment", "workers", "download")
"""Arguments of data that do not say which data they are."""


@dataclass(frozen=True)
class Skipped:
    """A candidate that is not in the table, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Collected:
    """The table, what is not in it, and how its latencies were measured.

    `table` has the columns of `nas_gate.pareto.required`, all other numbers of the results, `param.<name>` for every
    setting that varies within a study, and, where latencies were measured, `latency_ms` and `dense_latency_ms`.
    `path` is the candidate's folder. `unfinished` are trials without a result; `latency` says under which condition
    `latency_ms` was measured, and is None without latencies; `pad_to` is what channels were padded to then. `quality`
    is what all candidates are judged by, `data` on which data, in words, with a study of each.
    """

    table: pd.DataFrame
    skipped: tuple[Skipped, ...]
    unfinished: tuple[Path, ...]
    latency: str | None
    pad_to: int = 1
    quality: Quality = ACCURACY
    data: Mapping[str, str] = field(default_factory=dict)


class _Unreadable(Exception):
    """Why one candidate is left out."""


def collect(folders: Sequence[Path]) -> Collected:
    """All candidates of studies and runs; those that cannot be read are skipped.

    A study is called by its folder's name, or by its path where two have the same name. Raises ValueError for a folder
    that is neither a study nor a run, for one that is given twice, and where candidates are judged by different
    metrics, which do not compare.
    """
    rows: list[dict[str, Any]] = []
    latencies: dict[str, list[Plain]] = {}
    skipped: list[Skipped] = []
    unfinished: list[Path] = []
    qualities: dict[Quality, str] = {}
    data: dict[str, str] = {}
    for folder, study in zip(folders, _names(folders)):
        for number, trial in _trials(folder):
            if not (trial / RESULT).exists():
                unfinished.append(trial)
                continue
            try:
                # one of several targets' candidates, given by itself, has its trial's settings
                settings = _json(trial / SETTINGS if (trial / SETTINGS).exists() else trial.parent / SETTINGS)
                runs = _runs(trial)
            except _Unreadable as error:
                skipped.append(Skipped(trial, str(error)))
                continue
            for run in runs:
                try:
                    result = _json(run / RESULT)
                    quality = _quality(result)
                    row = _row(study, number, run, settings, result, quality)
                    measured = _measured(run / CANDIDATE / latency.RECORD)
                    latencies[row["path"]] = [*measured, *_of_search(result, settings)]
                except _Unreadable as error:
                    skipped.append(Skipped(run, str(error)))
                else:
                    rows.append(row)
                    qualities.setdefault(quality, study)
                    data.setdefault(_data(settings), study)
    if len(qualities) > 1:
        told = " and ".join(f"{quality.name} (study {study})" for quality, study in qualities.items())
        raise ValueError(f"candidates compare by one metric only, but these are judged by {told}")
    quality = next(iter(qualities), ACCURACY)
    table = _varying(pd.DataFrame(rows, columns=None if rows else list(required(quality))))
    table, condition, pad_to = _with_latency(table, latencies)
    return Collected(table, tuple(skipped), tuple(unfinished), condition, pad_to, quality, data)


def run_of(candidate: Path) -> tuple[Plain, Plain]:
    """The settings and the history (stage -> epochs) of the run that a candidate lies in; {} where they are missing."""
    run = candidate.parent
    found: list[Plain] = []
    for places in ((run / SETTINGS, run.parent / SETTINGS), (run / HISTORY, run.parent / HISTORY)):
        try:
            found.append(next((_json(path) for path in places if path.exists()), {}))
        except _Unreadable:
            found.append({})
    return found[0], found[1]


# --- folders ------------------------------------------------------------------------------------------------


def _names(folders: Sequence[Path]) -> list[str]:
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, count in Counter(places).items() if count > 1]:
        raise ValueError(f"each study must be given once, but {twice[0]} is given {places.count(twice[0])} times")
    same = Counter(place.name for place in places)
    return [place.name if same[place.name] == 1 else str(folder) for folder, place in zip(folders, places)]


def _trials(folder: Path) -> Iterator[tuple[int, Path]]:
    """The trials of a study by number; a single run is its only trial, number 0."""
    if not folder.is_dir():
        raise ValueError(f"a study must be a folder, but {folder} is {'a file' if folder.exists() else 'not there'}")
    if (folder / SETTINGS).exists() or (folder / RESULT).exists():
        return iter([(0, folder)])
    trials = sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    if not trials and not (folder / "study.json").exists():
        raise ValueError(
            f"{folder} is neither a study (it has no trials: folders named by number) nor a run (it has no {RESULT})"
        )
    return iter(trials)


def _runs(trial: Path) -> list[Path]:
    """The folders of a trial's candidates: itself, or the ones that its result names."""
    names = _json(trial / RESULT).get("candidates")
    if names is None:
        return [trial]
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise _Unreadable(f"{trial / RESULT} must list its candidates as names of folders, but has {names!r}")
    return [trial / name for name in names]


def _json(path: Path) -> Plain:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Unreadable(f"{path.name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"{path.name} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _Unreadable(f"{path.name} is damaged: it holds no mapping")
    return content


# --- one candidate ------------------------------------------------------------------------------------------


def _quality(result: Plain) -> Quality:
    try:
        return quality_of(result)
    except ValueError as error:
        raise _Unreadable(f"{RESULT}: {error}") from error


def _row(study: str, trial: int, run: Path, settings: Plain, result: Plain, quality: Quality) -> dict[str, Any]:
    figures = {key: value for key, value in result.items() if _is_number(value)}
    method = str(result.get("method", settings.get("method", "gates")))
    hidden = (*OWN_COLUMN, *(f"data.arguments.{name}" for name in PLACES), *(() if method == "gates" else OF_GATES))
    row = {
        "study": study,
        "trial": trial,
        "path": (run / CANDIDATE).as_posix(),
        "method": method,
        "seed": settings.get("seed"),
        "target": result.get("target", settings.get("target")),
        quality.test: None,  # where it was not asked for
        **{key: value for key, value in figures.items() if key not in ("seed", "target", "trial")},
        **{
            f"param.{key}": json.dumps(value) if isinstance(value, list) else value  # so that they can be grouped
            for key, value in flat(settings).items()
            if not within(key, hidden)
        },
    }
    needed = required(quality)
    if missing := [name for name in needed if name not in row or (row[name] is None and name != quality.test)]:
        raise _Unreadable(f"{RESULT} and {SETTINGS} must say {', '.join(missing)}")
    try:
        check_table(pd.DataFrame([row]), quality)
        read(run / CANDIDATE)  # a damaged candidate must not be chosen
    except CandidateError as error:
        raise _Unreadable(str(error)) from error
    except ValueError as error:
        raise _Unreadable(f"{RESULT}: {error}") from error
    return row


def _data(settings: Plain) -> str:
    """Which data a run had, in words."""
    try:
        name, arguments = settings["data"]["name"], settings["data"]["arguments"]
        told = {key: value for key, value in arguments.items() if key not in OF_TRAINING and value is not None}
    except (KeyError, TypeError, AttributeError):
        return "data that its settings do not name"
    return f"{name} ({', '.join(f'{key}={value}' for key, value in told.items())})" if told else str(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _varying(table: pd.DataFrame) -> pd.DataFrame:
    """Without the settings that are the same throughout every study."""
    names = [str(name) for name in table.columns if str(name).startswith("param.")]

    def constant(name: str) -> bool:
        having = table[table["method"] == "gates"] if within(name.removeprefix("param."), OF_GATES) else table
        return bool((having.groupby("study", sort=False)[name].nunique(dropna=False) <= 1).all())

    varying: pd.DataFrame = table.drop(columns=[name for name in names if constant(name)])
    return varying


# --- latency ------------------------------------------------------------------------------------------------


class Condition(NamedTuple):
    """What a latency was measured under; in order: unpadded, small batches, few threads, ONNX Runtime come first."""

    pad_to: int
    batch: int
    threads: int
    runtime: str
    machine: str

    def text(self) -> str:
        """For people."""
        padded = f", channels padded to multiples of {self.pad_to}" if self.pad_to > 1 else ""
        threads = latency.threads_text(self.threads)
        return f"{self.runtime}, batch {self.batch}, {threads}{padded}, on {self.machine}"


def _measured(path: Path) -> list[Plain]:
    """The latencies recorded for a candidate, each with the machine that they were measured on."""
    if not path.exists():
        return []
    record = _json(path)
    try:
        return [
            {
                "condition": Condition(
                    int(record.get("pad_to", 1)),
                    int(each["batch"]),
                    int(each["threads"]),
                    str(each["runtime"]),
                    str(record["machine"]),
                ),
                "latency_ms": float(each["candidate_ms"]),
                "dense_latency_ms": float(each["dense_ms"]),
            }
            for each in record["latencies"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _Unreadable(f"{path.name} is damaged: {error!r}") from error


def _of_search(result: Plain, settings: Plain) -> list[Plain]:
    """The latency that the search itself measured, if it did."""
    if "latency_ms" not in result:
        return []
    try:
        timing = settings["latency"]
        return [
            {
                "condition": Condition(
                    1, timing["batch"], timing["threads"], "PyTorch (fastest run)", result["latency_machine"]
                ),
                "latency_ms": float(result["latency_ms"]),
                "dense_latency_ms": float(result["dense_latency_ms"]),
            }
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _Unreadable(f"{RESULT} and {SETTINGS} must say how latency was measured: {error!r}") from error


def _with_latency(
    table: pd.DataFrame, latencies: Mapping[str, Sequence[Plain]]
) -> tuple[pd.DataFrame, str | None, int]:
    """The table with the latencies of one condition, since others do not compare, that condition, and its padding.

    It is the condition that most candidates were measured under; of several the first in the order of `Condition`.
    """
    count: Counter[Condition] = Counter(each["condition"] for measured in latencies.values() for each in measured)
    if not count:
        return table, None, 1
    chosen = min(count, key=lambda condition: (-count[condition], condition))
    of_path = {path: each for path, measured in latencies.items() for each in measured if each["condition"] == chosen}
    columns = {
        name: pd.Series([of_path.get(path, {}).get(name, np.nan) for path in table["path"]], index=table.index)
        for name in ("latency_ms", "dense_latency_ms")
    }
    # the dense network was measured beside every candidate, each time a little different
    same_network = [table["dense_macs"], table["dense_params"]]
    columns["dense_latency_ms"] = columns["dense_latency_ms"].groupby(same_network).transform("median")
    return table.assign(**columns), chosen.text(), chosen.pad_to
