"""The commands that look at finished candidates: `nas-gate pareto`, `report`, `select` and `export`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas_gate.errors import Refused
from nas_gate.files import write_text
from nas_gate.quality import ACCURACY, COSTS, Quality

if TYPE_CHECKING:
    from nas_gate.collect import Collected
    from nas_gate.reproduce import Shipped

STUDIES_HELP = """\
A STUDY is a folder of `nas-gate search --multirun` (runs/studies/NAME), finished or still running; the folder of a
single `nas-gate search` (runs/...) will do as well. Candidates that cannot be read are skipped, and named.
"""

PARETO_HELP = f"""\
All candidates of one or several studies in a table, cheapest first: which of them no other one dominates in accuracy
and cost, the hypervolume of each front, and its knee, where more cost begins to buy little accuracy.
Accuracy is that of the last epoch on validation data; in place of it stands the metric that the studies' task has.

{STUDIES_HELP}"""

PARETO_EXAMPLES = """\
examples:
  nas-gate pareto runs/studies/digits
  nas-gate pareto runs/studies/digits runs/studies/gumbel --plot fronts.png --plot fronts.svg
  nas-gate pareto runs/studies/digits --x params --csv candidates.csv
  nas-gate pareto runs/studies/digits --reference 0.9,0.7       hypervolume beyond 90% accuracy, 70% of the MACs
  nas-gate pareto runs/studies/digits --x latency               of candidates measured by `nas-gate export`
  nas-gate pareto runs/studies/prices --reference 2.5,1         hypervolume of an error, rmse say, below 2.5
"""

REPORT_HELP = f"""\
One HTML page that needs no network: the fronts, to hover over and click; a candidate's widths per layer, its training
curves and the command that makes it again; bounds that highlight what remains; studies side by side.

{STUDIES_HELP}"""

REPORT_EXAMPLES = """\
examples:
  nas-gate report runs/studies/digits
  nas-gate report runs/studies/digits runs/studies/gumbel -o compared.html
  nas-gate report runs/studies/mine --factory my_package.nets:small      for a model of your own
"""

SELECT_HELP = f"""\
The candidate to deploy: of those that meet all bounds, the preferred one on their front, with the reasons and the
runners-up. Test accuracy is looked at nowhere. Where nothing meets the bounds: which bound excludes how many, and the
nearest candidate.

{STUDIES_HELP}"""

SELECT_EXAMPLES = """\
examples:
  nas-gate select runs/studies/digits                                   the knee of the front
  nas-gate select runs/studies/digits --max-macs 0.6M --prefer accuracy
  nas-gate select runs/studies/digits --min-accuracy 0.97 --prefer macs
  nas-gate select runs/studies/digits --max-latency-ms 2 --prefer latency    as measured by `nas-gate export`
  nas-gate select runs/studies/digits --max-macs 60M --json
  nas-gate select runs/studies/shapes --min mean_iou=0.6 --prefer macs       of another task than classification
  nas-gate select runs/studies/prices --max rmse=2.5 --prefer macs           whose metric is an error
Amounts may be written 60000000, 6e7, 60M, 1.5G or 200K (powers of 1000).
"""

EXPORT_HELP = """\
Files for deployment: the network as ONNX and as a torch.export program, for any batch size, each checked against
PyTorch; latency of the dense network and the candidate, in PyTorch and ONNX Runtime, with a warning where it did not
follow the MACs; and a model card. The latencies are also left in the candidate's folder (latency.json), where
pareto, report and select find them.

A CANDIDATE is a folder that holds candidate.json; of a run or a study, all candidates are exported.
"""

EXPORT_EXAMPLES = """\
examples:
  nas-gate export runs/studies/digits/7/candidate                       into .../7/candidate/export
  nas-gate export runs/studies/digits/7 --format onnx -o deploy
  nas-gate export runs/studies/digits/7 --format onnx --pad-to 8        quicker in ONNX Runtime
  nas-gate export runs/studies/digits --format onnx --batch-sizes 1     latency of a whole study
  nas-gate export runs/mine --factory my_package.nets:small             a model of your own
"""


# --- pareto -------------------------------------------------------------------------------------------------


def pareto(arguments: Sequence[str]) -> None:
    """`nas-gate pareto`."""
    parser = _parser("pareto", PARETO_HELP, PARETO_EXAMPLES)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--x", choices=tuple(COSTS), default="macs", help="the cost beside accuracy (default: macs)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table, with all figures and settings")
    parser.add_argument(
        *("--plot",), type=Path, action="append", default=[], metavar="FILE", help="draw to .png or .svg; repeatable"
    )
    parser.add_argument(
        "--reference",
        type=_reference,
        metavar="A,S",
        help="hypervolume beyond accuracy A (a share; in other tasks a value of their metric) and share S of the dense "
        "cost (default: 0,1; none where less is better)",
    )
    options = parser.parse_args(arguments)

    with _mistakes():
        from nas_gate.pareto import marked
        from nas_gate.plots import check_name, draw, figure_data
        from nas_gate.table import described

        collected = _collected(options.studies)
        cost = COSTS[options.x]
        _check_latency(collected, [cost])
        for path in options.plot:
            check_name(path)
        if collected.quality == ACCURACY and options.reference is not None and not 0 <= options.reference[0] < 1:
            raise ValueError(f"the reference must be an accuracy in [0, 1), but is {options.reference[0]:g}")
        print(described(collected, cost, options.reference))
        if options.plot:
            figure = figure_data(collected.table, cost, collected.quality)
            for path in options.plot:
                print(f"picture: {draw(figure, path)}")
        if options.csv is not None:
            write_text(options.csv, marked(collected.table, cost, collected.quality).to_csv(index=False))
            print(f"table: {options.csv}")


def _reference(text: str) -> tuple[float, float]:
    try:
        value, share = map(float, text.split(","))
    except ValueError:
        value = share = math.nan
    if not (math.isfinite(value) and 0 < share < math.inf):
        raise argparse.ArgumentTypeError(
            f"must be an accuracy and a positive share of the dense cost, as in 0.5,1, but is {text!r}"
        )
    return value, share


# --- report -------------------------------------------------------------------------------------------------


def report(arguments: Sequence[str], shipped: Callable[[], Shipped]) -> None:
    """`nas-gate report`; `shipped` reads the shipped configuration, which commands are written against."""
    parser = _parser("report", REPORT_HELP, REPORT_EXAMPLES)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument(
        *("-o", "--output"), type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    _add_factory(parser)
    options = parser.parse_args(arguments)

    with _mistakes():
        from nas_gate.report import page, report_data
        from nas_gate.reproduce import command

        collected = _collected(options.studies)
        known = shipped()
        data = report_data(collected, lambda settings: command(settings, known), options.factory)
        for each in data["candidates"]:
            if each["misfit"] is not None:
                print(f"nas-gate: without widths {each['path']}: {each['misfit']}", file=sys.stderr)
        write_text(options.output, page(data))
        print(f"{len(data['candidates'])} candidates: {options.output}")


# --- select -------------------------------------------------------------------------------------------------


def select(arguments: Sequence[str]) -> None:
    """`nas-gate select`."""
    parser = _parser("select", SELECT_HELP, SELECT_EXAMPLES)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--max-macs", type=_amount, metavar="N", help="most multiply-accumulates, as in 60M")
    parser.add_argument("--max-params", type=_amount, metavar="N", help="most parameters, as in 200K")
    parser.add_argument("--min-accuracy", type=float, metavar="A", help="least validation accuracy, as in 0.93")
    parser.add_argument("--max-latency-ms", type=float, metavar="MS", help="highest latency, in milliseconds")
    parser.add_argument(
        *("--min",), type=_limit, metavar="METRIC=X", help="least validation metric of another task: mean_iou=0.6"
    )
    parser.add_argument(
        *("--max",), type=_limit, metavar="METRIC=X", help="the same where less is better, as in rmse=0.1"
    )
    parser.add_argument(
        "--prefer",
        default="knee",
        metavar="WHAT",
        help="knee: that of accuracy against MACs (default); accuracy: the highest (of another task its metric, by "
        "name); macs, params or latency: the lowest",
    )
    parser.add_argument("--runners-up", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)

    with _mistakes():
        from nas_gate import selection
        from nas_gate.candidate import next_steps, read

        collected = _collected(options.studies)
        needed = [COSTS.get(options.prefer), *(["latency_ms"] if options.max_latency_ms else [])]
        _check_latency(collected, needed)
        _check_limits(collected.quality, options.min, options.max)
        choice = selection.select(
            collected.table,
            max_macs=options.max_macs,
            min_accuracy=options.min_accuracy,
            max_params=options.max_params,
            max_latency_ms=options.max_latency_ms,
            limit=next((given[1] for given in (options.min, options.max) if given is not None), None),
            prefer=options.prefer,
            runners_up=options.runners_up,
            quality=collected.quality,
        )
        if options.json:
            chosen = {
                "candidate": choice.row,
                "reasons": choice.reasons,
                "runners_up": [{"candidate": other.row, "difference": other.difference} for other in choice.runners_up],
                "latency": collected.latency,
            }
            print(json.dumps(_without_nan(chosen), indent=2))
            return
        print(selection.describe(choice))
        if collected.latency is not None:
            print(f"\nLatency: {collected.latency}.")
        path = str(choice.row["path"])
        loading, exporting = next_steps(path, read(path).model, collected.pad_to)
        print(f"\nLoad it:    {loading}\nDeploy it:  {exporting}")


def _amount(text: str) -> int:
    from nas_gate.selection import parse_amount

    try:
        return parse_amount(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a metric and a number, as in mean_iou=0.6, but is {text!r}")
    return name, value


def _check_limits(quality: Quality, least: tuple[str, float] | None, most: tuple[str, float] | None) -> None:
    """ValueError unless a given limit is of the studies' own metric, and on the side where it bounds anything bad."""
    for option, given, right in (
        ("--min", least, quality.higher_is_better),
        ("--max", most, not quality.higher_is_better),
    ):
        if given is not None and given[0] != quality.name:
            raise ValueError(f"{option} {given[0]}: these candidates are judged by {quality.name}")
        if given is not None and not right:
            better, other = ("more", "--min") if quality.higher_is_better else ("less", "--max")
            raise ValueError(f"{option} {given[0]}: {better} of it is better; bound it by {other} {quality.name}=...")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# --- export -------------------------------------------------------------------------------------------------


def export(arguments: Sequence[str]) -> None:
    """`nas-gate export`."""
    parser = _parser("export", EXPORT_HELP, EXPORT_EXAMPLES)
    parser.add_argument("candidates", nargs="+", type=Path, metavar="CANDIDATE")
    parser.add_argument(
        "--format", type=_names, default=("onnx", "pt2"), metavar="F,F", help="onnx, pt2 (default: onnx,pt2)"
    )
    parser.add_argument(
        "--batch-sizes", type=_counts, default=(1, 128), metavar="N,N", help="to measure latency at (default: 1,128)"
    )
    parser.add_argument(
        "--threads", type=_counts, default=(1,), metavar="N,N", help="to measure latency with (default: 1)"
    )
    parser.add_argument(
        "--pad-to",
        type=int,
        default=1,
        metavar="N",
        help="fill convolutions' channels up to multiples of N with some that nothing reads: the same function, "
        "quicker in ONNX Runtime for N=8 (16 with AVX-512) where counts of channels are any",
    )
    parser.add_argument("--no-latency", action="store_true", help="measure no latency")
    parser.add_argument(
        *("-o", "--output"), type=Path, metavar="DIR", help="where the files go (default: export in the candidate)"
    )
    parser.add_argument("--input", type=_sizes, metavar="CxHxW", help="size of one input, where none is recorded")
    _add_factory(parser)
    options = parser.parse_args(arguments)

    with _mistakes():
        from nas_gate import latency, models
        from nas_gate.candidate import read
        from nas_gate.export import export as exported_candidate
        from nas_gate.exported import describe

        folders = [folder for given in options.candidates for folder in _candidates(given)]
        if options.output is not None and len(folders) > 1:
            raise ValueError(f"--output takes the files of one candidate, but {len(folders)} are given")
        for folder in folders:
            factory = options.factory and partial(
                models.build, options.factory, **read(folder).model.get("arguments", {})
            )
            exported = exported_candidate(
                folder,
                options.format,
                factory=factory,
                example_shape=options.input,
                batch_sizes=options.batch_sizes,
                threads=options.threads,
                output=options.output,
                measure=not options.no_latency,
                pad_to=options.pad_to,
            )
            print(describe(exported))
            if exported.latencies:
                latency.save(folder, exported.latencies, exported.versions, exported.pad_to)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return _positive(text, ",", "1,128")


def _sizes(text: str) -> tuple[int, ...]:
    return _positive(text, "x", "3x32x32")


def _positive(text: str, separator: str, example: str) -> tuple[int, ...]:
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, as in {example}, but is {text!r}")
    return tuple(map(int, parts))


# --- shared -------------------------------------------------------------------------------------------------


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"nas-gate {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_factory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--factory",
        metavar="MODULE:FUNCTION",
        help="makes the dense model, for one that is not registered: it is imported and run, with the arguments that "
        "the candidate records (what a candidate names is never imported)",
    )


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn errors that the user can mend into Refused."""
    from nas_gate.export import ExportError

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, ExportError) as error:
        raise Refused(str(error)) from error


def _collected(studies: Sequence[Path]) -> Collected:
    """The candidates of the studies, at least one; what is not among them is told on stderr."""
    from nas_gate.collect import collect

    collected = collect(studies)
    for each in collected.skipped:
        print(f"nas-gate: skipped {each.path}: {each.reason}", file=sys.stderr)
    if collected.unfinished:
        trials = ", ".join(map(str, collected.unfinished))
        print(f"nas-gate: without a result: {trials}", file=sys.stderr)
    if len(collected.table) == 0:
        raise ValueError(f"there is no finished candidate in {', '.join(map(str, studies))}")
    if len(collected.data) > 1:
        told = "; ".join(f"{data} in {study}" for data, study in collected.data.items())
        print(f"nas-gate: figures compare only where data are the same, but here are {told}", file=sys.stderr)
    return collected


def _candidates(folder: Path) -> list[Path]:
    """A candidate's folder itself, or those of all candidates of a run or a study."""
    from nas_gate.candidate import RECORD

    return [folder] if (folder / RECORD).exists() else [Path(path) for path in _collected([folder]).table["path"]]


def _check_latency(collected: Collected, columns: Sequence[str | None]) -> None:
    if "latency_ms" in columns and collected.latency is None:
        raise ValueError(
            "no candidate has a measured latency; measure it with nas-gate export CANDIDATE... (see nas-gate export "
            "--help)"
        )
