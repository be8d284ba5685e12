"""Sizes and factors that a module's own code hands to torch: `x.reshape(B, N, C)`, `x[:, :C]`, `q * head_dim ** -0.5`.

Code that computes them from the shape of its input, or that has them as literals, would compute others in a smaller
model. Every call is known by its module and by what the code says there (`places.py`), so that other inputs, or
training mode, may take other branches, and loops run more or fewer times. What has no source, and what torch compiles,
knows a call by its function and its number among that function's calls of one forward pass alone. The name of a call
has both: "view:3@x.view(B,N,C)#0/2" is the fourth view, and the first of two at that place. The analysis notes the
calls of the dense run, and removal corrects those of the smaller model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

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


OnSizes = Callable[[str, str, "list[int]"], "list[int]"]
"""(module, call, sizes) -> the sizes to use."""
OnFactor = Callable[[str, str, float], float]
"""(module, call, factor) -> the factor to use."""
OnResult = Callable[[str, str, "list[int]", "list[tuple[Tensor, int]]"], None]
"""(module, call, sizes, results that have them and their dimensions), after the call."""


class Calls(TorchFunctionMode):
    """Names the calls with sizes or factors, and lets them be changed.

    Numbers count from 0, for each running module and function, those of a module's children, too, so that it can count
    without knowing them; at its places a module's own calls alone count.
    """

    def __init__(
        self, module: nn.Module, on_sizes: OnSizes, on_factor: OnFactor, on_result: OnResult | None = None
    ) -> None:
        super().__init__()
        self._on_sizes, self._on_factor, self._on_result = on_sizes, on_factor, on_result
        self._running: list[tuple[str, nn.Module, Counter[str]]] = [("", module, Counter())]

    def enter(self, path: str, module: nn.Module) -> None:
        """A module starts."""
        self._running.append((path, module, Counter()))

    def leave(self) -> None:
        """It ends."""
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        sizes, factor = sizes_of(name, args), factor_of(name, args, kwargs)
        if sizes is None and factor is None:
            return func(*args, **kwargs)
        path, module, counts = self._running[-1]
        call, recomputed = f"{name}:{counts[name]}", False
        for _, _, numbers in self._running:
            numbers[name] += 1
        if not torch.compiler.is_dynamo_compiling():
            place = place_of_call()
            if place.module is not None and place.module is not module:
                return func(*args, **kwargs)
            if place.text:
                key = f"{name}@{place.text}"
                call += f"@{place.text}#{counts[key]}"
                counts[key] += 1
            recomputed = place.recomputed and (module.training or torch.is_grad_enabled())
        if sizes is not None:
            used = self._on_sizes(path, call, sizes)
            changed = used != sizes
            out = func(*(with_sizes(name, args, used) if changed else args), **kwargs)
            if self._on_result is not None:
                self._on_result(path, call, sizes, places_of(name, args, kwargs, out))
        else:
            assert factor is not None
            wanted = self._on_factor(path, call, factor)
            changed = wanted != factor
            if changed:
                args, kwargs = with_factor(name, args, kwargs, wanted)
            out = func(*args, **kwargs)
        if changed and recomputed:
            raise RuntimeError(
                f"{call} in {type(module).__name__} is corrected, which torch.utils.checkpoint does not see when it "
                "recomputes: let it recompute the whole module, or nothing of it"
            )
        return out


@contextmanager
def watched(model: nn.Module, calls: Calls) -> Iterator[None]:
    """Let `calls` see the model's run, module by module."""
    names = {m: n for n, m in model.named_modules() if n}

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            calls.enter(names[module], module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if module in names:
            calls.leave()

    with ExitStack() as exits:
        exits.callback(register_module_forward_pre_hook(enter).remove)
        exits.callback(register_module_forward_hook(leave, always_call=True).remove)
        exits.enter_context(calls)
        yield


class Name(NamedTuple):
    """The parts of a call's name; `place` has the function, too, and is "" where it is not known."""

    number: str
    place: str
    occurrence: int
    of: int


def parts(call: str) -> Name:
    """What a call's name says; a total of 0 is not known."""
    number, _, rest = call.partition("@")
    text, _, which = rest.rpartition("#")
    occurrence, _, total = which.partition("/")
    function = number.partition(":")[0]
    return Name(number, f"{function}@{text}" if text else "", int(occurrence or 0), int(total or 0))


def with_totals(calls: Iterable[str]) -> dict[str, str]:
    """The names of all calls of one forward pass, each with the number of calls at its place."""
    calls = list(calls)
    total = Counter(parts(call).place for call in calls)
    return {call: f"{call}/{total[place]}" if (place := parts(call).place) else call for call in calls}


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
