"""Which operation took in what: the dataflow of one run, as a list of nodes in the order in which they ran.

A node is an operation, or a tensor that no operation of the run made (a *leaf*: a parameter, a buffer, an input, a
constant). An operation in place makes a new node for the same tensor, so every node stands for one state of a value.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_T = TypeVar("_T")


@dataclass(frozen=True)
class Node:
    """One operation or leaf.

    `arguments` holds its arguments by their schema names, tensors as indices of nodes in lists; `outputs` the sizes
    of its results; `prices` and `macs` are what `Findings` has of it: the indices of its prices, and what it costs.
    """

    op: Any = None
    where: str = ""
    leaf: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[int, ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    prices: range = range(0)
    macs: int = 0


@dataclass(frozen=True)
class Ref:
    """A tensor argument: the node that made it."""

    node: int


def found_in(values: Iterable[Any], kind: type[_T]) -> list[_T]:
    """All of a kind among the arguments or results of an ATen operation, and in the lists among them, in order."""
    found: list[_T] = []
    for value in values:
        if isinstance(value, kind):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += found_in(value, kind)
    return found


class Graph:
    """The nodes of a run, each with the nodes that consume it."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.consumers: list[list[int]] = []
        self.results: set[int] = set()
        """Nodes that the model returns."""
        self.tuples: dict[str, int | str | None] = {}
        """Of every module that ran: how many outputs in a tuple (None: one tensor), or why neither."""
        self._of: Any = WeakTensorKeyDictionary()
        self._leaves: dict[str, int] = {}
        self._live: set[int] | None = None

    def leaf(self, tensor: Tensor, name: str) -> None:
        """A tensor that exists before the run."""
        self._of[tensor] = self._leaves[name] = self._add(Node(leaf=name, outputs=(tuple(tensor.shape),)))

    def references(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with their tensors as they are now, before an operation in place changes them."""
        return {name: self._referenced(value) for name, value in arguments.items()}

    def record(
        self, op: Any, where: str, arguments: Mapping[str, Any], outputs: Iterable[Tensor], prices: range, macs: int
    ) -> None:
        """An operation that has run; `arguments` are those of `references`."""
        outputs = list(outputs)
        sizes = tuple(tuple(o.shape) for o in outputs)
        sources = tuple(dict.fromkeys(ref.node for ref in found_in(arguments.values(), Ref)))
        index = self._add(Node(op, where, None, arguments, sources, sizes, prices, macs))
        for tensor in outputs:
            self._of[tensor] = index

    def made(self, tensor: Tensor) -> Node:
        """The operation that gave a tensor, or its leaf."""
        return self.nodes[self._reference(tensor).node]

    def multiplies(self, leaf: str) -> bool:
        """Whether a leaf, as it is or moved, is a factor of a multiplication."""
        waiting = [self._leaves[leaf]] if leaf in self._leaves else []
        while waiting:
            for index in self.consumers[waiting.pop()]:
                if self.nodes[index].op is torch.ops.aten.mul:
                    return True
                if len(self.nodes[index].sources) == 1:
                    waiting.append(index)
        return False

    def result(self, tensor: Tensor) -> None:
        """A tensor that the model returns."""
        self.results.add(self._reference(tensor).node)

    def module(self, path: str, out: Any) -> None:
        """What a module has returned."""
        shape: int | str | None = f"gives a {type(out).__name__}"
        if isinstance(out, Tensor):
            shape = None
        elif type(out) is tuple and out and isinstance(out[0], Tensor):
            shape = len(out)
        if self.tuples.setdefault(path, shape) != shape:
            self.tuples[path] = "gives different things in different calls"

    def _referenced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._reference(value)
        return [self._referenced(v) for v in value] if isinstance(value, (list, tuple)) else value

    def _reference(self, tensor: Tensor) -> Ref:
        node = self._of.get(tensor)
        if node is None:
            self.leaf(tensor, "")
            node = self._of[tensor]
        return Ref(node)

    def _add(self, node: Node) -> int:
        index = len(self.nodes)
        self.nodes.append(node)
        self.consumers.append([])
        for source in node.sources:
            self.consumers[source].append(index)
        return index

    def between(self, first: int, last: int) -> set[int]:
        """Nodes that `last` is computed through from `first`, with `last`, without `first`; none where it is not."""
        seen, waiting = {last}, [last]
        while waiting:
            for source in self.nodes[waiting.pop()].sources:
                if source >= first and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        reached = {first}
        for node in sorted(seen):
            if any(source in reached for source in self.nodes[node].sources):
                reached.add(node)
        return reached - {first} if last in reached else set()

    def live(self) -> set[int]:
        """Nodes that the model's results depend on."""
        if self._live is None:
            live = set(self.results)
            for node in range(len(self.nodes) - 1, -1, -1):
                if node in live:
                    live.update(self.nodes[node].sources)
            self._live = live
        return self._live

    def only_for(self, last: int, consumer: int) -> set[int]:
        """Nodes whose results reach the model's through `last`, and from there through `consumer`, alone."""
        inside: set[int] = set()
        known, waiting = {last}, [-last]
        while waiting:  # in descending order: all consumers of a node are decided before it is
            node = -heapq.heappop(waiting)
            needed = self.live().intersection(self.consumers[node])
            if node in self.results or not needed <= ({consumer} if node == last else inside):
                continue
            inside.add(node)
            for source in self.nodes[node].sources:
                if source not in known:
                    known.add(source)
                    heapq.heappush(waiting, -source)
        return inside


def under(name: str, path: str) -> bool:
    """Whether a module or tensor is the module at `path` or inside it."""
    return not path or name == path or name.startswith(f"{path}.")
