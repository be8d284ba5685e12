"""What a study searches, from Hydra's override grammar to Optuna's distributions and back to overrides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from nas_gate.errors import Refused
from nas_gate.import_paths import imported

SpaceFunction = Callable[[Trial], Sequence[str]]


@dataclass(frozen=True)
class Parameter:
    """One searched key: the override that sets it (with its `+`, if any), and what its values are drawn from."""

    key: str
    distribution: BaseDistribution
    texts: Mapping[Any, str] = field(default_factory=dict)

    def override(self, value: Any) -> str:
        """`key=value`; choices as they were written, steps without the dust of binary fractions."""
        of = self.distribution
        if isinstance(of, FloatDistribution) and of.step is not None:
            low, step = Decimal(repr(of.low)), Decimal(repr(of.step))
            value = float(low + round((value - of.low) / of.step) * step)
        return f"{self.key}={self.texts.get(value, Transformer.str(value))}"

    def suggest(self, trial: Trial, name: str) -> Any:
        """The trial's value, drawn if it has none yet."""
        of = self.distribution
        if isinstance(of, FloatDistribution):
            return trial.suggest_float(name, of.low, of.high, step=of.step, log=of.log)
        if isinstance(of, IntDistribution):
            return trial.suggest_int(name, of.low, of.high, step=of.step, log=of.log)
        assert isinstance(of, CategoricalDistribution)
        return trial.suggest_categorical(name, of.choices)

    def ends(self) -> tuple[Any, ...]:
        """The lowest value and the highest; of choices, all."""
        of = self.distribution
        if isinstance(of, CategoricalDistribution):
            return tuple(of.choices)
        assert isinstance(of, FloatDistribution | IntDistribution)
        return tuple(sorted({of.low, of.high}))

    def check(self, name: str, value: Any) -> None:
        """Refused unless `value` can be drawn."""
        of = self.distribution
        if isinstance(of, CategoricalDistribution):
            possible = value in of.choices
        else:
            assert isinstance(of, FloatDistribution | IntDistribution)
            kind = (int, float) if isinstance(of, FloatDistribution) else (int,)
            possible = type(value) in kind and of.low <= value <= of.high
            if possible and of.step is not None:
                steps = (value - of.low) / of.step
                possible = math.isclose(steps, round(steps), abs_tol=1e-6)
        if not possible:
            raise Refused(f"enqueue: {name}={value} is no value of {name} in the space ({of}).")


@dataclass(frozen=True)
class Space:
    """The searched parameters by name, and `function` for what depends on them (its import path is `path`)."""

    parameters: Mapping[str, Parameter]
    function: SpaceFunction | None = None
    path: str | None = None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """As `study.ask` takes them."""
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    def overrides(self, trial: Trial) -> list[str]:
        """The overrides of a trial; values that it has already are kept, the others drawn."""
        given = [parameter.override(parameter.suggest(trial, name)) for name, parameter in self.parameters.items()]
        return given + (list(self.function(trial)) if self.function is not None else [])

    def ends(self) -> list[list[str]]:
        """The overrides of trials at the ends, one parameter at a time: first all at their first value, then each in
        turn at its others. What the function adds is left out.
        """
        first = {name: parameter.ends()[0] for name, parameter in self.parameters.items()}
        others = [{name: value} for name, parameter in self.parameters.items() for value in parameter.ends()[1:]]
        points = [first, *({**first, **other} for other in others)]
        return [[self.parameters[name].override(value) for name, value in point.items()] for point in points]

    def describe(self) -> dict[str, str]:
        """Every parameter's distribution, as text."""
        described = {name: str(of) for name, of in self.distributions.items()}
        return {**described, **({"space_function": self.path} if self.path else {})}


def parse(overrides: Sequence[str], config_loader: Any = None) -> tuple[dict[str, Parameter], list[str]]:
    """The parameters to search among `overrides`, by name, and the overrides that are fixed.

    A later override of the same key replaces an earlier one. Hydra refuses what is not in its grammar;
    Refused says what no distribution can be.
    """
    parsed = OverridesParser.create(config_loader=config_loader).parse_overrides(list(overrides))
    last = {override.key_or_group + f"@{override.package}": override for override in parsed}
    searched = {o.key_or_group: _parameter(o) for o in last.values() if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in last.values() if not o.is_sweep_override()]
    return searched, fixed


def load_function(path: str) -> SpaceFunction:
    """The function at an import path, as in `my_package.spaces:conditional`."""
    try:
        return imported(path, "space_function")
    except (ImportError, ValueError) as error:
        raise Refused(f"space_function must be `module:function`, but {path!r} cannot be imported: {error}") from error
    except TypeError as error:
        raise Refused(f"space_function must be a function: {error}") from error


def _parameter(override: Override) -> Parameter:
    key, value = override.get_key_element(), override.value()
    log = "log" in getattr(value, "tags", ())
    try:
        if unknown := sorted(getattr(value, "tags", set()) - {"log"}):
            raise ValueError(f"there is no tag {unknown[0]!r}; the only one is log")
        if isinstance(value, IntervalSweep):
            return Parameter(key, _interval(value.start, value.end, log))
        if isinstance(value, RangeSweep):
            return Parameter(key, _range(value, log))
        assert isinstance(value, ChoiceSweep | Glob)
        if log:
            raise ValueError("a choice has no logarithmic scale")
        choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
        texts = dict(zip(choices, override.sweep_string_iterator()))
        if not choices or len(texts) < len(choices):
            raise ValueError("a choice needs values, and different ones")
        return Parameter(key, CategoricalDistribution(choices), texts)
    except (ValueError, TypeError) as error:
        raise Refused(f"{override.input_line}: {error}") from error


def _interval(low: Any, high: Any, log: bool) -> BaseDistribution:
    if not low < high:
        raise ValueError("an interval must begin below its end")
    if isinstance(low, int) and isinstance(high, int) and not isinstance(low, bool):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _range(value: RangeSweep, log: bool) -> BaseDistribution:
    # in decimals, because the sum of binary fractions can miss the stop, which is exclusive
    start, stop, step = (Decimal(repr(number)) for number in (value.start, value.stop, value.step))
    if step == 0 or (points := math.ceil((stop - start) / step)) < 1:
        raise ValueError("the range is empty")
    low, high = sorted((start, start + (points - 1) * step))
    if all(isinstance(number, int) for number in (value.start, value.step)):
        return IntDistribution(int(low), int(high), step=int(abs(step)), log=log)
    return FloatDistribution(float(low), float(high), step=float(abs(step)), log=log)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Overrides that set `values`."""
    return [f"{key}={Transformer.str(value)}" for key, value in values.items()]
