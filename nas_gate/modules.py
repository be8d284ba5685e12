"""Modules of ours in a user's network: a choice among operators, the zero of a closed branch; copies of networks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_TABLES = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, modules and hooks."""


def copied(model: nn.Module, tensors: Mapping[int, Any] | None = None) -> nn.Module:
    """What copy.deepcopy gives, in half the time; `tensors` takes the place of those with these identities.

    Every module holds about ten empty tables of hooks, which copy.deepcopy takes longer for than for the rest. What a
    module has computed and keeps (the weight of torch.nn.utils.weight_norm, a list of features), which copy.deepcopy
    refuses, is a constant in the copy.
    """
    memo = dict(tensors or {})
    for module in model.modules():
        values = vars(module).values()
        memo.update({id(v): OrderedDict() for v in values if type(v) is OrderedDict and not v})
        kept = [v for name, v in vars(module).items() if name not in _TABLES]
        memo.update({id(v): v.detach().clone() for v in tree_leaves(kept) if isinstance(v, Tensor) and not v.is_leaf})
    return copy.deepcopy(model, memo)


def fresh(values: Any) -> Any:
    """Arguments of a call with copies of their tensors, which it may change in place."""

    def again(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return tree_map(again, values)


def recurrent(model: nn.Module) -> bool:
    """Whether the model has recurrent layers, which libraries run as single operations that depend on the device."""
    return any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules())


class Zero(nn.Module):
    """What is left of a module in a residual branch that was removed: zeros of its first tensor argument's size.

    No parameters, no multiply-accumulates. The zeros are a new tensor, so that an operation in place on them leaves
    the shortcut alone. Where the module gave a tuple of `outputs` values, the others are None.
    """

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the first tensor, alone or as the first of a tuple."""
        zeros = torch.zeros_like(next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        return zeros if self.outputs is None else (zeros, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """The size of the tuple, if it is one."""
        return "" if self.outputs is None else f"outputs={self.outputs}"


class Choice(nn.Module):
    """One of several modules with equal output shapes: gates decide which one.

    In an attached model exactly one candidate is open at every step, the one of the largest gate weight (the first
    of equal ones, so the first candidate at the beginning), and all receive the gradient of its gate: `forward` is
    the sum of all candidates, each times its keep, of which one is 1 and the others are 0. Removal puts the chosen
    candidate in the choice's place.

    Without gates a choice is its first candidate in evaluation mode; that is also what the dense network computes
    and costs. In training mode it is a candidate drawn anew for every call, each as likely as the others (Guo et
    al.: "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020), so that training the
    network before gates are attached trains all candidates. Torch's random state decides.

    Args:
        candidates: at least two modules that take the same arguments and give one tensor of the same shape. They
            must not change their arguments in place, and not share parameters.

    Raises:
        ValueError: fewer than two candidates, or candidates that share a parameter.
    """

    keep: Tensor | None

    def __init__(self, candidates: Iterable[nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        if len(self.candidates) < 2:
            raise ValueError(f"a Choice needs at least two candidates, but got {len(self.candidates)}")
        owner: dict[int, int] = {}
        for index, candidate in enumerate(self.candidates):
            for name, parameter in candidate.named_parameters():
                if (first := owner.setdefault(id(parameter), index)) != index:
                    raise ValueError(
                        f"the candidates of a Choice must not share parameters, but {name!r} of candidate {index} is "
                        f"also in candidate {first}"
                    )
        self.register_buffer("keep", None, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the open candidate gives."""
        if self.keep is None:
            index = int(torch.randint(len(self.candidates), ())) if self.training else 0
            alone: Tensor = self.candidates[index](*args, **kwargs)
            return alone
        outputs = [candidate(*args, **kwargs) for candidate in self.candidates]
        result: Tensor = outputs[0] * self.keep[0]
        for index, output in enumerate(outputs[1:], 1):
            if output.shape != outputs[0].shape:
                raise ValueError(
                    f"all candidates of a Choice must give the same shape, but candidate 0 gives "
                    f"{tuple(outputs[0].shape)} and candidate {index} {tuple(output.shape)}"
                )
            result = result + output * self.keep[index]
        return result


def choices_of(model: nn.Module) -> list[str]:
    """The paths of a model's choices."""
    return [path for path, module in model.named_modules() if isinstance(module, Choice)]
