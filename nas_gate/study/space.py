"""The search space of a study: Hydra's override grammar in, Optuna distributions and overrides out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from nas_gate.search import Refused

SpaceFunction = Callable[[Trial], Mapping[str, Any]]
"""Asks a trial for parameters (`trial.suggest_float(...)`) and returns overrides, configuration key -> value."""


@dataclass(frozen=True)
class Axis:
    """One searched key: the distribution of its values and, where they are listed, how each is written."""

    distribution: BaseDistribution
    written: Mapping[Any, str]

    def write(self, value: Any) -> str:
        """`value` in the override grammar."""
        if self.written:
            return self.written[value]
        if isinstance(self.distribution, FloatDistribution) and self.distribution.step is not None:
            value = round(value, 12)  # low + k step, without the rounding of the sum
        return literal(value)

    def suggest(self, name: str, trial: Trial) -> Any:
        """The trial's value of this axis: the one that it has already, or a sampled one."""
        made = self.distribution
        if isinstance(made, FloatDistribution):
            return trial.suggest_float(name, made.low, made.high, step=made.step, log=made.log)
        if isinstance(made, IntDistribution):
            return trial.suggest_int(name, made.low, made.high, step=made.step, log=made.log)
        assert isinstance(made, CategoricalDistribution)
        return trial.suggest_categorical(name, made.choices)


@dataclass(frozen=True)
class Space:
    """What a study varies: `axes` by override key, and what `function` adds; `fixed` overrides are every trial's."""

    axes: Mapping[str, Axis]
    fixed: tuple[str, ...]
    text: Mapping[str, str]
    function: SpaceFunction | None = None

    def distributions(self) -> dict[str, BaseDistribution]:
        """For `study.ask(fixed_distributions=...)`."""
        return {name: axis.distribution for name, axis in self.axes.items()}

    def overrides(self, trial: Trial) -> list[str]:
        """The overrides of `trial`; parameters that it has not got yet are sampled."""
        searched = [f"{name}={axis.write(axis.suggest(name, trial))}" for name, axis in self.axes.items()]
        more: Mapping[str, Any] = self.function(trial) if self.function is not None else {}
        if not isinstance(more, Mapping):
            raise Refused(f"`space_function` must return a mapping of configuration keys to values, not {more!r}.")
        return [*self.fixed, *searched, *(f"{key}={literal(value)}" for key, value in more.items())]


def parse(params: Mapping[str, Any], arguments: Iterable[str], space_function: str | None = None) -> Space:
    """The space of `hydra.sweeper.params` and of command-line overrides, which come last and so win.

    Axes are `interval(a, b)`, `int(interval(a, b))` (both ends included), either of them within `tag(log, ...)`,
    `range(start, stop, step)` (stop excluded), `choice(a, b)` and `a,b`. Anything else is fixed. Refused quotes
    what cannot be understood.
    """
    parser = OverridesParser.create()
    axes: dict[str, Axis] = {}
    fixed: dict[str, str] = {}
    text: dict[str, str] = {}
    for line in (*(f"{key}={_plain(value)}" for key, value in params.items()), *arguments):
        try:
            override = parser.parse_override(line)
            name = override.get_key_element()
            axis = _axis(override) if override.is_sweep_override() else None
        except (HydraException, ValueError) as error:
            raise Refused(f"The search space {line!r} cannot be understood: {error}") from error
        for known in [known for known in (*axes, *fixed) if known.lstrip("+~") == name.lstrip("+~")]:
            axes.pop(known, None)
            fixed.pop(known, None)
            text.pop(known, None)
        if axis is None:
            fixed[name] = line
        else:
            axes[name] = axis
            text[name] = line.partition("=")[2]
    return Space(axes, tuple(fixed.values()), text, _imported(space_function))


def literal(value: Any) -> str:
    """A plain value (None, bool, number, string, list, mapping) in the override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{literal(key)}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(literal, value)) + "]"
    raise Refused(f"A value of the search space must be plain (number, string, list, mapping), but is {value!r}.")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else literal(value)


def _axis(override: Override) -> Axis:
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return _interval(sweep)
    if isinstance(sweep, RangeSweep):
        _no_tags(sweep.tags)
        return _range(sweep)
    if not override.is_choice_sweep():
        raise ValueError("it must be an interval, a range or a choice")
    _no_tags(getattr(sweep, "tags", set()))
    words = list(override.sweep_string_iterator())
    values = [item.text if isinstance(item, QuotedString) else item for item in override.sweep_iterator()]
    if not all(item is None or isinstance(item, (bool, int, float, str)) for item in values):
        values = list(words)
    if len(set(values)) < len(values):  # 1 and true, or 1 and 1.0, are equal to Python
        values = list(words)
    if len(set(values)) < len(values):
        raise ValueError("a value is named twice")
    return Axis(CategoricalDistribution(values), dict(zip(values, words)))


def _interval(sweep: IntervalSweep) -> Axis:
    low, high = sweep.start, sweep.end
    log = "log" in sweep.tags
    _no_tags(sweep.tags - {"log"})
    if low is None or high is None or not all(type(end) in (int, float) for end in (low, high)):
        raise ValueError("an interval has two numbers")
    if isinstance(low, int) and isinstance(high, int):
        return Axis(IntDistribution(low, high, log=log), {})
    return Axis(FloatDistribution(low, high, log=log), {})


def _range(sweep: RangeSweep) -> Axis:
    start, stop, step = (Decimal(str(value)) for value in (sweep.start, sweep.stop, sweep.step))
    count = math.ceil((stop - start) / step) if step else 0
    if count <= 0:
        raise ValueError(f"the range holds nothing (start {start}, stop {stop}, step {step})")
    low, high = sorted((start, start + (count - 1) * step))
    if all(isinstance(value, int) for value in (sweep.start, sweep.stop, sweep.step)):
        return Axis(IntDistribution(int(low), int(high), step=int(abs(step))), {})
    return Axis(FloatDistribution(float(low), float(high), step=float(abs(step))), {})


def _no_tags(tags: Iterable[str]) -> None:
    if unknown := sorted(tags):
        raise ValueError(f"there is no tag {unknown[0]!r} here; valid: `log`, for intervals")


def _imported(path: str | None) -> SpaceFunction | None:
    if path is None:
        return None
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"`space_function` must be an import path such as my_package.spaces:mine, not {path!r}: {error}")
    if not callable(function):
        raise Refused(f"`space_function` must name something callable, but {path!r} is {function!r}.")
    return function  # type: ignore[no-any-return]
