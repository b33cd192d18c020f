"""What each example sends to rows that serve them all, such as those of a table of positions looked up once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.estimation.arrivals import Arrived, have_grown
from curvature.layers import Site
from curvature.losses.signals import Signals
from curvature.model.graph_nodes import below, shape_of
from curvature.model.pullback import pull_back

#: Nodes that hand on what arrives at them, summed over the axes along which they repeated what they got.
_REPEATS = ("AddBackward0", "SubBackward0", "ExpandBackward0", "RepeatBackward0")


@dataclass(frozen=True)
class Meeting:
    """Where rows that serve all examples are repeated for each of them.

    Attributes:
        edge: Edge of the result, which has the examples along an axis.
        examples: Number of examples.
        axis: That axis, of which they are the outermost part (windows or heads may lie inside).
        repeated: All axes along which the rows are repeated.
        own: Edge of what is repeated.
        factor: What it is multiplied by (the ``alpha`` of a sum).
    """

    edge: GradientEdge
    examples: int
    axis: int
    repeated: tuple[int, ...]
    own: GradientEdge
    factor: float

    def apart(self, arrived: Tensor) -> Tensor:
        """What each example sends to :attr:`own`, ``(n, *shape)``, from what arrived at :attr:`edge`."""
        rows = self.by_example(arrived).sum([axis + 1 for axis in self.repeated]) * self.factor
        return rows.reshape(self.examples, *_shape(self.own))

    def by_example(self, arrived: Tensor) -> Tensor:
        """What arrived at :attr:`edge`, with the examples first; what lies inside of them keeps the place."""
        return arrived.unflatten(self.axis, (self.examples, -1)).movedim(self.axis, 0)


class SharedRows:
    """Uses whose rows serve all examples, and what each example sends to them.

    Where a pass shows the sum in which the rows meet the examples, one signal tells: what arrives at the result of that
    sum is laid out by examples, as if the rows had been made once for each. Elsewhere (products with shared rows) it
    takes a backward pass per example.

    Args:
        output: What the loss saw, attached to its graph.
        sites: The uses.
        signals: What is sent back.
    """

    def __init__(self, output: Tensor, sites: Sequence[Site], signals: Signals) -> None:
        self._output, self._signals, self._sites = output, signals, sites
        users = _users(output) if sites else {}
        self._meetings = {id(site): _meetings(users, site.edge, signals.examples) for site in sites}

    @property
    def meetings(self) -> list[Meeting]:
        """The sums to look at; what arrives at their results is handed over by their ``id``."""
        return [meeting for found in self._meetings.values() for meeting in found or ()]

    def of(self, sites: Iterable[Site]) -> SharedRows:
        """Those of some uses alone."""
        out = SharedRows(self._output, (), self._signals)
        out._sites = [site for site in sites if id(site) in self._meetings]
        out._meetings = {id(site): self._meetings[id(site)] for site in out._sites}
        return out

    def check(self, plain: Arrived, tagged: Iterable[tuple[Tensor, Arrived]]) -> None:
        """Rely on the sums only if what arrives grows by the weights of the examples, wherever lengths agree.

        Args:
            plain: What arrived under the signal of :meth:`~curvature.losses.signals.Signals.probe`.
            tagged: Weights of the examples, and what arrived under the signal with these.
        """
        pairs = [(m, plain[id(m)], w, arrived[id(m)]) for w, arrived in tagged for m in self.meetings]
        if not all(_grew(meeting, before, weights, after) for meeting, before, weights, after in pairs):
            self._meetings = {key: None if found else found for key, found in self._meetings.items()}

    def arriving(self, signal: Tensor, arrived: Arrived) -> dict[int, Tensor]:
        """What each example sends to the edges of the uses, ``(n, *shape)`` by the ``id`` of the site.

        Args:
            signal: What is sent back.
            arrived: What arrived under it at the results of the sums.
        """
        out: dict[int, Tensor] = {}
        for site in self._sites:
            for meeting in self._meetings[id(site)] or ():
                gradient = arrived[id(meeting)]
                if gradient is not None:
                    each = _down(meeting.own, site.edge, meeting.apart(gradient))
                    out[id(site)] = out[id(site)] + each if id(site) in out else each
        return out | self._one_by_one([site for site in self._sites if self._meetings[id(site)] is None], signal)

    def _one_by_one(self, sites: Sequence[Site], signal: Tensor) -> dict[int, Tensor]:
        if not sites:
            return {}
        edges = [site.edge for site in sites]
        zeros = {id(site): torch.zeros(_shape(site.edge)).to(signal) for site in sites}
        sent = (self._signals.weighted(signal, one) for one in torch.eye(self._signals.examples, device=signal.device))
        columns = zip(*(pull_back([self._output], edges, [one]) for one in sent), strict=True)
        return {
            key: torch.stack([zero if g is None else g.to(zero) for g in column])
            for (key, zero), column in zip(zeros.items(), columns, strict=True)
        }


def _grew(meeting: Meeting, before: Tensor | None, weights: Tensor, after: Tensor | None) -> bool:
    """Whether what arrived for each example has grown by its weight."""
    if before is None or after is None:
        return before is after
    rows, now = (meeting.by_example(g.reshape(_shape(meeting.edge))).flatten(1) for g in (before, after))
    return have_grown(rows, weights, now)


def _down(start: GradientEdge, end: GradientEdge, gradients: Tensor) -> Tensor:
    """Gradients ``(n, *shape)`` of one place as gradients of an earlier one."""
    if (start.node, start.output_nr) == (end.node, end.output_nr):
        return gradients
    outputs: list[Any] = [start]  # an edge serves as a tensor does
    found = [pull_back(outputs, [end], [g])[0] for g in gradients]
    zero = torch.zeros(_shape(end)).to(gradients)
    return torch.stack([zero if g is None else g for g in found])


def _shape(edge: GradientEdge) -> tuple[int, ...]:
    return shape_of(edge.node, edge.output_nr)


def _users(output: Tensor) -> dict[tuple[Any, int], list[tuple[Any, int]]]:
    """The nodes of a graph that each result goes into, and the number of the argument; the end goes into ``None``."""
    users: dict[tuple[Any, int], list[tuple[Any, int]]] = {(output.grad_fn, output.output_nr): [(None, 0)]}
    for node in below([output]):
        for argument, (before, number) in enumerate(node.next_functions):
            if before is not None:
                users.setdefault((before, number), []).append((node, argument))
    return users


def _meetings(
    users: Mapping[tuple[Any, int], list[tuple[Any, int]]], start: GradientEdge, examples: int
) -> list[Meeting] | None:
    """Where a result, or what is made of it, is repeated for the examples; ``None`` if it reaches the end elsewhere.

    Whatever lies between, and whoever else takes part there, gradients go through it example by example.
    """
    found: list[Meeting] = []
    waiting, seen = [start], set()
    while waiting:
        edge = waiting.pop()
        for node, argument in users.get((edge.node, edge.output_nr), ()):
            if node is None:
                return None
            meeting = _meeting(node, argument, edge, examples) if node.name() in _REPEATS else None
            if meeting is not None:
                found.append(meeting)
            elif node not in seen:
                seen.add(node)
                waiting += [GradientEdge(node, number) for number in range(len(node._input_metadata))]
    return found


def _meeting(node: Any, argument: int, own: GradientEdge, examples: int) -> Meeting | None:
    """A node that repeats an argument along an axis that may hold the examples."""
    whole = GradientEdge(node, 0)
    after, before = _shape(whole), _shape(own)
    before = (1,) * (len(after) - len(before)) + before
    repeated = tuple(axis for axis, size in enumerate(after) if before[axis] != size)
    held = [axis for axis in repeated if after[axis] % examples == 0]
    if not held or any(before[axis] != 1 for axis in repeated):
        return None
    sign = -1.0 if node.name() == "SubBackward0" else 1.0
    factor = sign * float(node._saved_alpha) if argument else 1.0
    return Meeting(whole, examples, min(held, key=lambda axis: after[axis] != examples), repeated, own, factor)
