"""The command line: `nas-gate search`, `inspect`, and those of `commands.py`. Configuration ends here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nas_gate.search import Settings

HELP = """\
nas-gate: neural architecture search with trainable gates

  nas-gate search  [key=value ...]        train, decide, cut, fine-tune, save: one candidate
  nas-gate inspect [key=value ...]        what can be removed from a model, and why the rest cannot
  nas-gate pareto  STUDY...               a table of all candidates, the front, its hypervolume, plots
  nas-gate report  STUDY...               the same in a browser: one page to hover, click and filter
  nas-gate select  STUDY...               the candidate to deploy under bounds, with reasons
  nas-gate export  CANDIDATE...           ONNX and torch.export files, checked, measured, with a model card

Begin with
  nas-gate search                         digits, half of the MACs, about a minute on two cores
  nas-gate search experiment=debug        every stage in seconds
  nas-gate inspect model=torchvision model.name=resnet18

`nas-gate search --help` lists models, data sets and every option of a search, which `nas-gate inspect` takes, too;
--help after the other commands lists theirs.
`nas-gate --version` prints the version.
"""

INSPECT_HELP = """\
What gates can remove from a model: its groups of units with their sizes, the share of its multiply-
accumulates that they reach, and for everything else the reason why it is fixed. Nothing is trained.
"""

INSPECT_EXAMPLES = """\
examples:
  nas-gate inspect                                       the default model
  nas-gate inspect model=resnet56                        on images of the size that it was made for
  nas-gate inspect model=torchvision model.name=densenet121 --json
  nas-gate inspect model=custom model.name=my_package.nets:small --input 3x64x64
"""

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit code.

    0 done; 1 training diverged, or a study could not go on; 2 a mistake in what was asked, told in one message;
    130 interrupted. What is a defect of this package itself is raised, with its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"nas-gate {version('nas-gate')}")
        return 0
    if given[0] not in COMMANDS:
        return _mistake(f"There is no command {given[0]!r}; commands: {', '.join(COMMANDS)}. See nas-gate --help.")
    with _told() as code:
        COMMANDS[given[0]](given[1:])
    return code[0]


def _mistake(message: str) -> int:
    print(f"nas-gate: {message}", file=sys.stderr)
    return 2


@contextmanager
def _told() -> Iterator[list[int]]:
    """Turn errors that the user can mend into one message and an exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from nas_gate.errors import Diverged, Refused, StudyFailed

    code = [0]
    try:
        yield code
    except (Refused, HydraException, OmegaConfBaseException) as error:
        code[0] = _mistake(_whole_message(error))
    except (Diverged, StudyFailed) as error:
        _mistake(str(error))
        code[0] = 1
    except KeyboardInterrupt:
        print(
            "\nnas-gate: interrupted. A search has stored every finished epoch: the same command continues from there.",
            file=sys.stderr,
        )
        code[0] = 130


def _whole_message(error: BaseException) -> str:
    # Hydra says where, its cause says what
    lines = [str(error)]
    while (cause := error.__cause__) is not None and type(cause).__module__.startswith(("hydra", "omegaconf")):
        lines += [str(cause)] if str(cause) not in lines[-1] else []
        error = cause
    if "LexerNoViableAlt" in lines[0]:
        lines.append(
            "Put values with spaces, brackets or other such signs in quotes: \"data.path='my data (1)/x.npz'\""
        )
    return "\n".join(lines).strip()


# --- search -------------------------------------------------------------------------------------------------


def _search(overrides: Sequence[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from nas_gate.errors import Diverged, Refused
    from nas_gate.settings import describe
    from nas_gate.study.sweeper import register

    _prepare_hydra()
    register([sys.executable, "-m", "nas_gate.cli", "search", *overrides], lambda plain: describe(settings_of(plain)))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach `_told`, which tells mistakes from defects
    failed: list[Exception] = []
    command = sys.argv

    def job(config: DictConfig) -> dict[str, Any] | None:
        sys.argv = command  # what Lightning starts the other processes of a distributed run with
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            return _run(config, run_dir)
        except (Refused, Diverged) as error:
            with suppress(OSError):
                run_dir.rmdir()  # Hydra makes it before anything is checked
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # for the sweeper, which counts failures
            failed.append(error)
            return None

    sys.argv = ["nas-gate search", *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    finally:
        sys.argv = command
    if failed:
        raise failed[0]


def _run(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from rich.console import Console

    from nas_gate.described import setting_of
    from nas_gate.search import search
    from nas_gate.study.context import epoch_hook

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    here = Path.cwd()
    run_dir = run_dir.relative_to(here) if run_dir.is_relative_to(here) else run_dir
    settings, cache_dir = settings_of(plain), Path(plain["cache_dir"])
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return search(settings, run_dir, cache_dir=cache_dir, console=Console())
    may_differ = [setting_of(key) for key in HydraConfig.get().sweeper.may_differ]
    with (run_dir / "log.txt").open("a") as log:  # a study says one line about each trial
        console, hook = Console(file=log), epoch_hook()
        return search(settings, run_dir, cache_dir=cache_dir, console=console, on_epoch=hook, may_differ=may_differ)


def conf_dir() -> Path:
    """The folder of the shipped configuration."""
    return _shipped("conf")


def sweeps_dir() -> Path:
    """The folder of the shipped studies, one file each: the group `sweep` of the configuration."""
    return _shipped("sweeps")


def _shipped(name: str) -> Path:
    # inside an installed package, beside it in a checkout
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name} should lie in {package} or {package.parent}")


def _prepare_hydra() -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    register_resolvers()
    for file in sorted(sweeps_dir().glob("*.yaml")):
        ConfigStore.instance().store(group="sweep", name=file.stem, node=OmegaConf.load(file), package="_global_")


def register_resolvers() -> None:
    """Make known `${nas_gate.digest:}`, eight digits that follow from all that determines a result, and
    `${nas_gate.shares:}`, the targets that are asked for.
    """
    from omegaconf import OmegaConf

    from nas_gate import folders
    from nas_gate.described import PLACES, without_added

    def digest(*, _root_: DictConfig) -> str:
        whole: Any = OmegaConf.to_container(OmegaConf.masked_copy(_root_, list(SETTINGS)), resolve=True)
        whole["data"] = {key: value for key, value in whole["data"].items() if key not in PLACES}
        return folders.digest(without_added(whole), 8)

    def shares(*, _root_: DictConfig) -> str:
        targets = _root_.target if _root_.targets is None else _root_.targets
        return str(targets).strip("[]").replace(", ", "-")

    OmegaConf.register_new_resolver("nas_gate.digest", digest, replace=True)
    OmegaConf.register_new_resolver("nas_gate.shares", shares, replace=True)


# --- from configuration to plain values ---------------------------------------------------------------------

SETTINGS = (
    "model",
    "data",
    "method",
    "gate",
    "budget",
    "training",
    "hardware",
    "target",
    "targets",
    "metric",
    "limits",
    "latency",
    "round_to",
    "depth",
    "seed",
    "test",
    "task",
    "weights",
)
OTHERS = ("run", "run_dir", "cache_dir", "experiment")


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings that a resolved configuration describes; Refused names the key that is wrong."""
    from nas_gate.errors import Refused
    from nas_gate.search import Distillation, Gating, Named, Settings, Timing
    from nas_gate.training import Hardware, Recipe

    if unknown := sorted(config.keys() - {*SETTINGS, *OTHERS}):
        raise Refused(f"There is no key {unknown[0]!r}; valid keys: {', '.join((*SETTINGS, *OTHERS))}.")
    if missing := sorted(set(SETTINGS) - config.keys()):
        raise Refused(f"The key {missing[0]!r} is missing.")
    training = _mapping(config["training"], "training")
    parts = {"dense": Recipe, "cycle": Recipe, "gating": Gating, "distillation": Distillation}
    if unknown := sorted(training.keys() ^ parts.keys()):
        raise Refused(f"`training` must have exactly the keys {', '.join(parts)}; look at {unknown[0]!r}.")
    data, limits = dict(_mapping(config["data"], "data")), _mapping(config["limits"], "limits")
    return _made(
        Settings,
        {
            **{name: _made(Named, config[name], name) for name in ("model", "gate", "budget", "task")},
            "data": _made(Named, {"name": data.pop("name", None), "arguments": data}, "data"),
            **{name: _made(kind, training[name], f"training.{name}") for name, kind in parts.items()},
            "hardware": _made(Hardware, config["hardware"], "hardware"),
            **{name: config[name] for name in ("method", "target", "metric", "round_to", "depth", "seed")},
            **{name: config[name] for name in ("test", "weights")},
            "targets": _shares(config["targets"]),
            "limits": {name: _typed(x, float, f"limits.{name}") for name, x in limits.items() if x is not None},
            "latency": _made(Timing, config["latency"], "latency"),
        },
        "",
    )


def _shares(value: Any) -> tuple[float, ...] | None:
    from nas_gate.errors import Refused

    if value is None:
        return None
    if not isinstance(value, list) or not all(type(share) in (int, float) for share in value):
        raise Refused(f"`targets` must be a list of numbers, but is {value!r}.")
    return tuple(map(float, value))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    from nas_gate.errors import Refused

    if not isinstance(value, Mapping):
        raise Refused(f"`{where}` must be a mapping, but is {value!r}.")
    return value


def _made(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` from a mapping with exactly its fields (those with defaults may be left out)."""
    from nas_gate.errors import Refused

    values = _mapping(values, where)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, values.keys() - known.keys())):
        raise Refused(f"`{where}` has no key {unknown[0]!r}; valid keys: {', '.join(known)}.")
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, field in known.items():
        path = f"{where}.{name}".lstrip(".")
        if name in values:
            given[name] = _typed(values[name], hints[name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Refused(f"`{path}` is missing.")
    try:
        return kind(**given)
    except ValueError as error:
        raise Refused(f"{where}: {error}" if where else str(error)) from error


def _typed(value: Any, hint: Any, path: str) -> Any:
    from nas_gate.errors import Refused

    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in allowed:
        if kind is NoneType:
            if value is None:
                return None
            continue
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind not in (int, float, str, bool) or type(value) is kind:
            return value
    names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
    raise Refused(f"`{path}` must be {names}, but is {value!r}.")


# --- inspect ------------------------------------------------------------------------------------------------


def _inspect(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "nas-gate inspect",
        description=INSPECT_HELP,
        epilog=INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="model=... data=..., as in search")
    parser.add_argument(
        "--input",
        metavar="CxHxW",
        help="size of one input (default: of the data given, or what the model was made for)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--config-dir", metavar="DIR", help="configuration files of your own")
    options = parser.parse_intermixed_args(arguments)

    from nas_gate import analyze, inspect, models
    from nas_gate.search import example_input, load_data, refusing, seeded_model

    settings = settings_of(composed(options.overrides, options.config_dir))
    with refusing():
        natural = models.natural_input(settings.model.name, settings.model.arguments)
        named = any(override.lstrip("+").startswith("data") for override in options.overrides)
        given = named or settings.data != settings_of(composed([])).data  # an experiment, say, has data of its own
        if options.input is None and natural and not given:
            shape: tuple[int, ...] = natural
            model, _ = seeded_model(settings, shape[0])
        elif options.input is None:
            data = load_data(settings)
            shape = (data.in_channels, *data.image_size)
            model, _ = seeded_model(settings, data.in_channels, data.num_classes)
        else:
            shape = _shape(options.input)
            model, _ = seeded_model(settings, shape[0])
        structure = analyze(model.eval(), example_input(shape), depth=settings.depth)
    print(json.dumps(inspect.to_json(structure), indent=2) if options.json else inspect.describe(structure))


def composed(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The resolved configuration that overrides give, as plain values."""
    import hydra
    from omegaconf import OmegaConf

    from nas_gate.errors import Refused

    _prepare_hydra()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise Refused(f"`--config-dir` must be a folder, but {config_dir} is none.")
    more = [f"hydra.searchpath=[{_quoted(f'file://{Path(config_dir).resolve()}')}]"] if config_dir is not None else []
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose("config", [*overrides, *more])
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _quoted(value: str) -> str:
    """A value as Hydra's grammar reads any text."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _shape(text: str) -> tuple[int, ...]:
    from nas_gate.errors import Refused

    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise Refused(f"`--input` must be sizes joined by x, as in 3x32x32, but is {text!r}.")
    return tuple(map(int, sizes))


# --- finished candidates ------------------------------------------------------------------------------------


def _pareto(arguments: Sequence[str]) -> None:
    from nas_gate import commands

    commands.pareto(arguments)


def _report(arguments: Sequence[str]) -> None:
    from nas_gate import commands, reproduce

    commands.report(arguments, lambda: reproduce.shipped(composed, conf_dir()))


def _select(arguments: Sequence[str]) -> None:
    from nas_gate import commands

    commands.select(arguments)


def _export(arguments: Sequence[str]) -> None:
    from nas_gate import commands

    commands.export(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "search": _search,
    "inspect": _inspect,
    "pareto": _pareto,
    "report": _report,
    "select": _select,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())
