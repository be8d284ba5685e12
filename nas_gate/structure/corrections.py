"""Corrections of what a module's own code computes in a smaller model: found in its first run, applied in every other.

See `sizes.py` for how calls are known.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from nas_gate.structure.places import STARTS
from nas_gate.structure.sizes import Calls, parts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Corrections:
    """What one module's forward pass computes otherwise than the smaller model needs it.

    `sizes` maps a call to {position: (right, computed)}: a size is multiplied by right / computed, for it may be a
    multiple of the batch. `factors` maps a call to (right, computed): the factor of the dense model, and the one that
    it stands for; NaN where that is not known.
    """

    sizes: Mapping[str, Mapping[int, tuple[int, int]]]
    factors: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Needs:
    """The sizes and factors that the calls of one module's forward pass need in a smaller model."""

    sizes: Mapping[str, Sequence[int]]
    factors: Mapping[str, float]


class _Met:
    """What one forward pass of a module has met: known calls, how many calls at each place, others in known places."""

    def __init__(self) -> None:
        self.calls: set[str] = set()
        self.places: Counter[str] = Counter()
        self.instead: dict[str, str] = {}


class CorrectedForward:
    """Stands in for the `forward` of one module, and runs it with corrected sizes and factors.

    With `needs` it finds the corrections as it runs, and gives every call at once what the corrections will give it.
    """

    def __init__(self, module: nn.Module, corrections: Corrections, needs: Needs | None = None) -> None:
        self.module, self._needs = module, needs
        self.sizes, self.factors = dict(corrections.sizes), dict(corrections.factors)
        calls = [*self.sizes, *self.factors, *(() if needs is None else (*needs.sizes, *needs.factors))]
        self._numbered = {parts(call).number: call for call in calls}
        self._placed: dict[str, dict[int, str]] = {}
        for call in calls:
            if place := parts(call).place:
                self._placed.setdefault(place, {})[parts(call).occurrence] = call
        self.earlier: Callable[..., Any] | None = module.__dict__.get("forward")  # of a model that was cut before

    def corrections(self) -> Corrections | None:
        """What is corrected, None where nothing is."""
        sizes = {call: wrong for call, wrong in self.sizes.items() if wrong}
        return Corrections(sizes, self.factors) if sizes or self.factors else None

    def withdraw(self) -> None:
        """Let the module run as it did before."""
        if self.earlier is None:
            del self.module.forward
        else:
            self.module.forward = self.earlier

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                f"the forward of {type(self.module).__name__} has corrected sizes, which torch.jit.trace would lose: "
                "use torch.export, or nas-gate export"
            )
        module, met = self._called(), _Met()
        with Calls(module, partial(self._sizes, met), partial(self._factor, met)):
            if self.earlier is not None:
                out = self.earlier(*args, **kwargs)
            else:
                out = type(module).forward(module, *args, **kwargs)
        if self._needs is None:
            self._check(met)
        return out

    def _called(self) -> nn.Module:
        """The module that is called: a shallow copy (nn.DataParallel makes such ones) shares this forward."""
        if not torch.compiler.is_dynamo_compiling():
            caller = sys._getframe(2).f_locals.get("self")
            if isinstance(caller, nn.Module) and vars(caller).get("forward") is self:
                return caller
        return self.module

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, for those who ask (torch.export does)."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:
        """That of the module's own forward, by which torch.export says where an input belongs."""
        return type(self.module).forward.__code__

    def _known(self, met: _Met, call: str, alike: Callable[[str], bool]) -> str:
        """What a call is known as, "" for others; where one of those looks `alike` a known one, that is noted."""
        name = parts(call)
        met.places[name.place] += 1
        if not name.place:
            known = self._numbered.get(name.number, "")
        elif name.place in self._placed:
            known = self._at(name.place, name.occurrence)
        else:
            known = self._called_elsewhere(name.place)
            if not known and (numbered := self._numbered.get(name.number, "")):
                if not parts(numbered).place:  # of an earlier version
                    known = numbered
                elif alike(numbered):
                    met.instead[numbered] = call
        met.calls.add(known)
        return known

    def _at(self, place: str, occurrence: int) -> str:
        """What is known of an occurrence at a place; of any one where all have the same correction, as in a loop."""
        calls = self._placed[place]
        return next(iter(calls.values())) if self._is_same(place) else calls.get(occurrence, "")

    def _is_same(self, place: str) -> bool:
        calls = [*self._placed[place].values()]
        same = all(self._correction(call) == self._correction(calls[0]) for call in calls)
        return self._needs is None and same and len(calls) == parts(calls[0]).of

    def _correction(self, call: str) -> Any:
        return self.sizes.get(call), self.factors.get(call)

    def _called_elsewhere(self, place: str) -> str:
        """What is known of the same expression in a helper that other lines call, where that is one thing only."""
        function, _, text = place.partition("@")
        _, helped, last = text.rpartition(" > ")
        places = (
            [p for p in self._placed if p.endswith(f" > {last}") and p.startswith(f"{function}@")] if helped else []
        )
        calls = [call for p in places if self._is_same(p) for call in self._placed[p].values()]
        same = all(self._correction(call) == self._correction(calls[0]) for call in calls)
        return calls[0] if calls and same and all(map(self._is_same, places)) else ""

    def _check(self, met: _Met) -> None:
        """Raise RuntimeError where this was another path, on which nobody knows what to correct."""
        for call, other in met.instead.items():
            if call not in met.calls:
                raise self._elsewhere(f"{other} stands in the place of {call}")
        for place, calls in self._placed.items():
            of = parts(next(iter(calls.values()))).of
            if met.places[place] not in (0, of) and not self._is_same(place):
                raise self._elsewhere(f"{place} runs {met.places[place]} times, not {of},")

    def _sizes(self, met: _Met, path: str, call: str, sizes: list[int]) -> list[int]:
        def alike(other: str) -> bool:
            wrong = self.sizes.get(other, {})
            return (
                bool(wrong) and max(wrong) < len(sizes) and all(sizes[i] % n == 0 for i, (_, n) in wrong.items() if n)
            )

        known = self._known(met, call, alike)
        if self._needs is not None and known in self._needs.sizes and known not in self.sizes:
            right = self._needs.sizes[known]
            self.sizes[known] = {i: (n, int(size)) for i, (n, size) in enumerate(zip(right, sizes)) if n != size}
        result = list(sizes)
        wrong = self.sizes.get(known, {})
        if wrong and max(wrong) >= len(sizes):
            raise self._elsewhere(f"{call} has the sizes {sizes}")
        for position, (right_size, computed) in wrong.items():
            if computed and sizes[position] % computed:
                raise self._elsewhere(f"{call} has the size {sizes[position]}, no multiple of {computed},")
            result[position] = sizes[position] * right_size // computed if computed else right_size
        return result

    def _factor(self, met: _Met, path: str, call: str, factor: float) -> float:
        known = self._known(met, call, lambda other: self.factors.get(other, (0.0, math.nan))[1] == factor)
        if self._needs is not None and self._needs.factors.get(known, factor) != factor:
            self.factors[known] = self._needs.factors[known], factor
        right, computed = self.factors.get(known, (factor, factor))
        if factor != computed and not math.isnan(computed):
            raise self._elsewhere(f"{call} has the factor {factor:g}, not {computed:g},")
        return right

    def _elsewhere(self, what: str) -> RuntimeError:
        """Another call may stand where a known one was, on another path or in code that was changed."""
        return RuntimeError(
            f"the forward of {type(self.module).__name__} must take the path of the inputs and the mode that it was "
            f"analysed with, but {what} here"
        )


STARTS[CorrectedForward.__call__.__code__] = "module"


def correct(module: nn.Module, corrections: Corrections) -> None:
    """Let a module's forward pass run with corrected sizes and factors; in place. Its class stays what it is."""
    module.forward = CorrectedForward(module, corrections)


def first_run(
    model: nn.Module, needs: Mapping[str, Needs], run: Callable[[], Result]
) -> tuple[Result, dict[str, Corrections]]:
    """What the first run of a smaller model gives, and the corrections that it finds, by module.

    The modules are corrected in place. Where the run fails with corrections (its calls may not be those of the dense
    run, from which the `needs` of modules come), it is repeated without any.
    """
    learning = {
        path: CorrectedForward(model.get_submodule(path), Corrections({}, {}), of) for path, of in needs.items()
    }
    for forward in learning.values():
        forward.module.forward = forward
    failed: Exception | None = None
    try:
        result = run()
    except Exception as error:  # what was corrected may be to blame; the run without it tells
        if not any(forward.corrections() for forward in learning.values()):
            raise
        failed = error
    finally:
        for forward in learning.values():
            forward.withdraw()
    if failed is not None:
        try:
            return run(), {}
        except Exception:  # then corrections are not to blame
            raise failed from None
    found = {path: corrections for path in sorted(learning) if (corrections := learning[path].corrections())}
    for path, corrections in found.items():
        correct(model.get_submodule(path), corrections)
    return result, found
