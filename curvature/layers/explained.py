"""Whether the recorded uses explain every way in which a parameter enters the graph, certain from the graph alone.

A kernel written as a ``torch.autograd.Function``, and whatever else function modes do not see, is a consumer of a
parameter that nobody recorded: the gradient that arrives through it belongs to no use. The graph has it as an edge into
the parameter from a node that no recorded call made.

Gradients that do not travel along edges are out of sight: a custom function may run a backward pass of its own, as
reentrant checkpointing does. :attr:`Explained.custom` names those that were met.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import get_gradient_edge

from curvature.model.fully_sharded import is_custom
from curvature.model.graph_nodes import between

_LEAF = (1 << 64) - 1  # sequence number of the nodes that accumulate gradients
with torch.inference_mode(False):  # wherever this is imported first
    _LEAF_NODE = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
_CAST = "ToCopyBackward0"


def now() -> int:
    """A mark in time: nodes that this thread makes from now on have this number or a higher one."""
    return 0 if torch.compiler.is_compiling() else int(_get_sequence_nr())  # nothing is recorded of compiled passes


def nodes_of_call(last: Any, since: int) -> set[Any]:
    """The nodes that a call made: those that lead to its output and are not older than the call.

    Args:
        last: The node of its result.
        since: :func:`now` before the call.
    """
    return set(between([last], lambda node: not since <= node._sequence_nr() < _LEAF))


class Explained:
    """The nodes of the recorded uses of parameters in one forward pass.

    Attributes:
        custom: Names of the custom functions met by :meth:`unexplained`; their backward is not looked into.
    """

    def __init__(self) -> None:
        self.custom: set[str] = set()
        self._uses: list[tuple[Any, int]] = []
        self._views: list[tuple[Any, int]] = []

    def add_use(self, output: Tensor, since: int) -> None:
        """A call of which a rule accounts for every parameter among its arguments.

        Args:
            output: Its result, before anything else happened to it.
            since: :func:`now` before the call.
        """
        self._uses.append((output.grad_fn, since))

    def join(self, other: Explained) -> None:
        """Take over the uses and views of another pass."""
        self._uses += other._uses
        self._views += other._views

    def add_view(self, output: Tensor, since: int) -> None:
        """A call that made a view of a parameter, whose uses are recorded as well."""
        self._views.append((output.grad_fn, since))

    def unexplained(self, outputs: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """The parameters with consumers that are no recorded use, each with the names of those.

        Args:
            outputs: Results of the pass, attached to their graph.
            parameters: Tensors by name.
        """
        names = _Names(parameters)
        recorded: set[Any] = set()
        followed: set[Any] = set()  # hand a gradient on to a parameter, and nothing else
        for last, since in self._uses:
            made = nodes_of_call(last, since)
            recorded |= made
            # A cast or transpose on the way: autocast lends the cast weight to whoever comes next.
            followed |= {node for node in made if node is not last and len(node.next_functions) == 1}
        for last, since in self._views:
            made = nodes_of_call(last, since)
            recorded |= made
            followed |= made
        found: dict[str, list[str]] = {}
        roots = [get_gradient_edge(t) for t in outputs if t.requires_grad]
        for edge in roots:
            if (own := names.get(edge.node, edge.output_nr)) is not None:
                found.setdefault(own, []).append("the output")
        start = [edge.node for edge in roots]
        watched = followed | names.inner
        others = self._others(start, recorded, watched)
        # Casts that autocast made in an earlier pass, or in a call that nobody saw.
        casts = {node for node, earlier, nr in others if node.name() == _CAST and names.get(earlier, nr) is not None}
        if casts:
            followed |= casts
            others = self._others(start, recorded, watched | casts)
        for node, earlier, nr in others:
            if earlier in followed:
                reached = _reached(earlier, followed, names)
            else:
                reached = {names.get(earlier, nr)} if node not in followed else set()
            for name in reached:
                if name is not None and node.name() not in (reasons := found.setdefault(name, [])):
                    reasons.append(node.name())
        return found

    def _others(self, start: list[Any], recorded: set[Any], watched: set[Any]) -> list[tuple[Any, Any, int]]:
        """The edges of the graph into leaves and watched nodes that do not start at a recorded node."""
        edges = []  # a walk along edges of its own: with one along nodes it would ask every node twice, in every step
        seen = set(start)
        waiting = [*seen]
        for node in waiting:  # grows on the way
            own = node in recorded
            for earlier, nr in node.next_functions:
                if earlier is None:
                    continue
                if not own and (type(earlier) is _LEAF_NODE or earlier in watched):
                    edges.append((node, earlier, nr))
                if earlier not in seen:
                    seen.add(earlier)
                    waiting.append(earlier)
        self.custom = {kind.__name__ for kind in set(map(type, seen)) if is_custom(kind)}
        return edges


class _Names:
    """Names of parameters by where gradients arrive for them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._leaves: dict[int, str] = {}
        self._others: dict[tuple[Any, int], str] = {}
        for name, p in parameters.items():
            if p.is_leaf:
                self._leaves.setdefault(id(p), name)
            else:
                edge = get_gradient_edge(p)
                self._others.setdefault((edge.node, edge.output_nr), name)
        self.inner = {node for node, _ in self._others}

    def get(self, node: Any, nr: int) -> str | None:
        """Name of the parameter whose gradient arrives there."""
        if type(node) is _LEAF_NODE:
            return self._leaves.get(id(node.variable))  # type: ignore[attr-defined]
        return self._others.get((node, nr))


def _reached(node: Any, followed: set[Any], names: _Names) -> set[str | None]:
    """The parameters to which a node hands its gradient on."""
    reached: set[str | None] = set()
    for earlier, nr in node.next_functions:
        reached |= _reached(earlier, followed, names) if earlier in followed else {names.get(earlier, nr)}
    return reached
