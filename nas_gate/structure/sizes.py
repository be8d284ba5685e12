"""Sizes and factors that a module's own code hands to torch: `x.reshape(B, N, C)`, `x[:, :C]`, `q * head_dim ** -0.5`.

Code that computes them from the shape of its input, or that has them as literals, would compute others in a smaller
model. Every call is known by its module and by what the code says there (`places.py`), so that other inputs, or
training mode, may take other branches. What has no source, and what torch compiles, knows a call by its function and
its number among that function's calls of one forward pass alone. "view:0@x.view(B,N,C)#0" has both. The analysis notes
the calls of the dense run, and removal corrects those of the smaller model.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import SymInt, Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nas_gate.modules import copied, recurrent
from nas_gate.structure.places import place_of_call

CONSTANTS = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}
"""Functions whose result has one value throughout."""

VIEWS = {"view": 1, "reshape": 1, "expand": 1, "unflatten": 2, "split": 1}
NORMS = {"layer_norm": 1, "rms_norm": 1}

FIRST = {**VIEWS, **NORMS, **CONSTANTS}
"""Functions that take sizes, by name, and the place of the first among their arguments."""

SCALED = {"mul", "mul_", "div", "div_", "true_divide"}
"""Functions whose second argument may be a number."""


SLICED = "__getitem__"
"""What `x[...]` calls: the ends of its slices are sizes, of what lies before them (negative ones, behind them)."""


def _ends(x: Tensor, index: Any) -> list[tuple[Any, int]]:
    """The ends of an index's slices, each with its dimension of the tensor; none where other tensors are indices."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
        return []
    taken = [isinstance(part, slice) or type(part) is int for part in parts]  # a dimension each
    ends, dim = [], 0
    for part, takes in zip(parts, taken):
        if isinstance(part, slice):
            ends += [(end, dim) for end in (part.start, part.stop) if isinstance(end, (int, SymInt))]
        dim += x.dim() - sum(taken) if part is Ellipsis else takes
    return ends


def _with_ends(index: Any, ends: Iterator[int]) -> Any:
    """An index with other ends of its slices."""
    if isinstance(index, tuple):
        return tuple(_with_ends(part, ends) for part in index)
    if not isinstance(index, slice):
        return index
    start, stop = (next(ends) if isinstance(end, (int, SymInt)) else end for end in (index.start, index.stop))
    return slice(start, stop, index.step)


def sizes_of(name: str, args: Sequence[Any]) -> list[int] | None:
    """The sizes that a call was given, None where it takes none."""
    if name == SLICED:
        return [end for end, _ in _ends(*args)] or None
    first = FIRST.get(name)
    if first is None or len(args) <= first or not (first == 0 or isinstance(args[0], Tensor)):
        return None
    given = args[first]
    sizes = (
        list(given) if isinstance(given, (tuple, list)) else list(args[first : first + 1 if name == "split" else None])
    )
    return sizes if all(isinstance(s, (int, SymInt)) for s in sizes) else None


def with_sizes(name: str, args: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, ...]:
    """The call's arguments with other sizes."""
    if name == SLICED:
        return args[0], _with_ends(args[1], iter(sizes))
    first = FIRST[name]
    given = args[first]
    if isinstance(given, (tuple, list)):
        return (*args[:first], type(given)(sizes), *args[first + 1 :])
    return (*args[:first], *sizes, *args[first + len(sizes) :])


def places_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[tuple[Tensor, int]]:
    """For every size that the call was given: a result that has it, or what it is a part of, and the dimension."""
    if name == SLICED:
        return [(args[0], dim) for _, dim in _ends(*args)]
    sizes = sizes_of(name, args)
    assert sizes is not None
    count = len(sizes)
    if name == "split":
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        return [(piece, dim % piece.dim()) for piece in out[:count]]
    first = 0
    if name == "unflatten":
        first = args[1] % args[0].dim()
    elif name in NORMS:
        first = out.dim() - count
    return [(out, first + i) for i in range(count)]


def factor_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """The number that a call multiplies or divides a tensor by, None where it has none."""
    if name == "scaled_dot_product_attention":
        factor = kwargs.get("scale")
    else:
        factor = args[1] if name in SCALED and len(args) == 2 and isinstance(args[0], Tensor) else None
    return factor if isinstance(factor, (int, float)) else None


def with_factor(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], factor: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with another factor."""
    if name == "scaled_dot_product_attention":
        return args, {**kwargs, "scale": factor}
    return (args[0], factor), dict(kwargs)


Result = TypeVar("Result")

OnSizes = Callable[[str, str, "list[int]"], "list[int]"]
"""(module, call, sizes) -> the sizes to use."""
OnFactor = Callable[[str, str, float], float]
"""(module, call, factor) -> the factor to use."""
OnResult = Callable[[str, str, "list[int]", "list[tuple[Tensor, int]]"], None]
"""(module, call, sizes, results that have them and their dimensions), after the call."""


class Calls(TorchFunctionMode):
    """Names the calls with sizes or factors, and lets them be changed.

    Numbers count from 0, for each running module and function, and for each place. A module's count the calls of its
    children, too, so that it can count without knowing them.
    """

    def __init__(self, on_sizes: OnSizes, on_factor: OnFactor, on_result: OnResult | None = None) -> None:
        super().__init__()
        self._on_sizes, self._on_factor, self._on_result = on_sizes, on_factor, on_result
        self._running: list[tuple[str, Counter[str]]] = [("", Counter())]

    def enter(self, path: str) -> None:
        """A module starts."""
        self._running.append((path, Counter()))

    def leave(self) -> None:
        """It ends."""
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        sizes, factor = sizes_of(name, args), factor_of(name, args, kwargs)
        if sizes is None and factor is None:
            return func(*args, **kwargs)
        path, counts = self._running[-1]
        call, place = f"{name}:{counts[name]}", "" if torch.compiler.is_dynamo_compiling() else place_of_call(STARTS)
        if place:
            call += f"@{place}#{counts[place]}"
        for _, numbers in self._running:
            numbers[name] += 1
            numbers[place] += 1
        if sizes is not None:
            used = self._on_sizes(path, call, sizes)
            out = func(*(args if used == sizes else with_sizes(name, args, used)), **kwargs)
            if self._on_result is not None:
                self._on_result(path, call, sizes, places_of(name, args, kwargs, out))
            return out
        assert factor is not None
        wanted = self._on_factor(path, call, factor)
        if wanted != factor:
            args, kwargs = with_factor(name, args, kwargs, wanted)
        return func(*args, **kwargs)


@contextmanager
def watched(model: nn.Module, calls: Calls) -> Iterator[None]:
    """Let `calls` see the model's run, module by module."""
    names = {m: n for n, m in model.named_modules() if n}

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            calls.enter(names[module])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if module in names:
            calls.leave()

    with ExitStack() as exits:
        exits.callback(register_module_forward_pre_hook(enter).remove)
        exits.callback(register_module_forward_hook(leave, always_call=True).remove)
        exits.enter_context(calls)
        yield


LARGE = 25_000_000
"""Parameters from which on a run takes longer than the Python that describes it without arithmetic."""


def ways_to_run(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """What to run where only sizes matter, in the order to try: a large model without its arithmetic first.

    That fails where code looks at values, or makes tensors of its own. Recurrent layers are run with arithmetic only:
    they are other operations on a processor.
    """
    large = sum(p.numel() for p in model.parameters()) >= LARGE and not recurrent(model)
    return [*([sizes_alone(model, args, kwargs)] if large else []), (model, tuple(args), dict(kwargs))]


def sizes_alone(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A copy of the model and its arguments whose numbers are on the meta device, where a run takes no arithmetic.

    Tensors of integers and booleans are kept: they are places, which decide what meets what.
    """

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        bare = torch.empty_like(value, device="meta")
        return nn.Parameter(bare, value.requires_grad) if isinstance(value, nn.Parameter) else bare

    model = copied(model, {id(t): empty(t) for t in (*model.parameters(), *model.buffers())})
    return model, *tree_map(empty, (tuple(args), dict(kwargs)))


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


class CorrectedForward:
    """Stands in for the `forward` of one module, and runs it with corrected sizes and factors.

    With `needs` it finds the corrections as it runs, and gives every call at once what the corrections will give it.
    """

    def __init__(self, module: nn.Module, corrections: Corrections, needs: Needs | None = None) -> None:
        self.module, self._needs = module, needs
        self.sizes, self.factors = dict(corrections.sizes), dict(corrections.factors)
        calls = [*self.sizes, *self.factors, *(() if needs is None else (*needs.sizes, *needs.factors))]
        self._known = {part: call for call in calls for part in call.split("@", 1)}  # by number, and by place
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
        met: set[str] = set()
        missed: dict[str, str] = {}
        with Calls(partial(self._sizes, met, missed), partial(self._factor, met, missed)):
            if self.earlier is not None:
                out = self.earlier(*args, **kwargs)
            else:
                out = type(self.module).forward(self.module, *args, **kwargs)
        for call, other in missed.items():
            if call not in met and self._needs is None:
                raise self._elsewhere(f"{other} stands in the place of {call}")
        return out

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, for those who ask (torch.export does)."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:
        """That of the module's own forward, by which torch.export says where an input belongs."""
        return type(self.module).forward.__code__

    def _met(self, met: set[str], missed: dict[str, str], call: str) -> str:
        """What a call is known as, noted in `met`; "" for others, in `missed` where one known has their number."""
        number, _, place = call.partition("@")
        known = self._known.get(place or number, "")
        if not known and (numbered := self._known.get(number, "")):
            if "@" in numbered:
                missed[numbered] = call
            else:  # of an earlier version
                known = numbered
        if known:
            met.add(known)
        return known

    def _sizes(self, met: set[str], missed: dict[str, str], path: str, call: str, sizes: list[int]) -> list[int]:
        known = self._met(met, missed, call)
        if self._needs is not None and known in self._needs.sizes and known not in self.sizes:
            right = self._needs.sizes[known]
            self.sizes[known] = {i: (n, int(size)) for i, (n, size) in enumerate(zip(right, sizes)) if n != size}
        result = list(sizes)
        wrong = self.sizes.get(known, {})
        if wrong and max(wrong) >= len(sizes):
            raise self._elsewhere(f"{call} has the sizes {sizes}")
        for position, (right_size, computed) in wrong.items():
            result[position] = sizes[position] * right_size // computed if computed else right_size
        return result

    def _factor(self, met: set[str], missed: dict[str, str], path: str, call: str, factor: float) -> float:
        known = self._met(met, missed, call)
        if self._needs is not None and self._needs.factors.get(known, factor) != factor:
            self.factors[known] = self._needs.factors[known], factor
        right, computed = self.factors.get(known, (factor, factor))
        if factor != computed and not math.isnan(computed):
            raise self._elsewhere(f"{call} has the factor {factor:g}, not {computed:g},")
        return right

    def _elsewhere(self, what: str) -> RuntimeError:
        """A call that is told by its number alone may be another one on another path, or the code may be other code."""
        return RuntimeError(
            f"the forward of {type(self.module).__name__} must take the path of the inputs and the mode that it was "
            f"analysed with, but {what} here"
        )


STARTS = (nn.Module._call_impl.__code__, CorrectedForward.__call__.__code__)
"""Code that runs a module's own forward."""


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
    failed = False
    try:
        result = run()
    except Exception:  # what was corrected may be to blame; the run without it tells
        if not any(forward.corrections() for forward in learning.values()):
            raise
        failed = True
    finally:
        for forward in learning.values():
            forward.withdraw()
    if failed:
        return run(), {}
    found = {path: corrections for path in sorted(learning) if (corrections := learning[path].corrections())}
    for path, corrections in found.items():
        correct(model.get_submodule(path), corrections)
    return result, found
