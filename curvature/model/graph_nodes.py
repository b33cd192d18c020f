"""The nodes of an autograd graph."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(tensors: Iterable[Tensor], until: Container[Any] = ()) -> Iterator[Any]:
    """Every node of the graph that leads to some tensors, once.

    Args:
        tensors: Those without a graph have no node.
        until: Nodes below which nothing is looked at.
    """
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        if node in until:
            continue
        following = [before for before, _ in node.next_functions if before is not None and before not in seen]
        seen.update(following)
        waiting.extend(following)
