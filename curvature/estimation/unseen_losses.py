"""Losses that nobody saw: like the optimizer's, but no calls of its module, found in the graph of a backward pass.

What they are is told by the gradient at the model's output, and their weight by it or by the way to them
(:mod:`curvature.estimation.weights_of_unseen_losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.called_functions import calls_beside
from curvature.estimation.passes import Pass, TapedLoss, UnseenLoss
from curvature.estimation.reached_entries import reached_entries
from curvature.estimation.squares_by_hand import square_of, squares, tells_no_value
from curvature.estimation.ways_to_losses import OTHERS, Way, at_temperatures, soft_labels, way
from curvature.estimation.weights_by_value import Rest
from curvature.model.backward_under_way import begins_with_one, called_on, numbers_called_on
from curvature.model.data import inspection
from curvature.model.graph_nodes import PICKS, PRODUCTS, below, between, inputs_of, name_of, node_of, only_moves

#: How those of layers begin.
_LAYERS = (*PRODUCTS, "Embedding")
#: How the names of the nodes of loss functions begin, by the module that calls them.
_NODES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "NllLoss",
    nn.NLLLoss: "NllLoss",
    nn.MSELoss: "MseLoss",
    nn.BCEWithLogitsLoss: "BinaryCrossEntropyWithLogits",
    nn.BCELoss: "BinaryCrossEntropyBackward",
    nn.SmoothL1Loss: "SmoothL1Loss",
    nn.HuberLoss: "HuberLoss",
}
#: The same of all loss functions of torch that have nodes.
_LOSSES = (*_NODES.values(), *OTHERS)
#: Losses of which a pass has one of another kind than the optimizer's, by the beginnings of their nodes' names.
FORMS: dict[str, type[nn.Module]] = {
    "LogSoftmax": nn.CrossEntropyLoss,
    "BinaryCrossEntropyWithLogits": nn.BCEWithLogitsLoss,
    "Exp": nn.PoissonNLLLoss,
}
#: Beginnings of the names of nodes that pick entries as numbers tell.
_PARTS = ("Index", "Gather", "Masked", "ToCopy")
#: Of those that pick entries by numbers that are gone when the gradient has come through.
_BY_VALUE = ("Index", "MaskedSelect", "Take")
#: Of those that put numbers in the places of some.
_FILLS = ("Where", "MaskedFill", "MaskedScatter")


class UnseenLosses:
    """The losses that a backward pass goes through to the passes of a model, besides calls of the optimizer's module.

    They are of the kind of the optimizer's, called as functions or by another module, or with labels that are
    probabilities, of which a graph shows logarithms and what is linear in them. On a pass of their own, or beside the
    module, they may be of another kind whose form is known: squared errors, cross-entropies, and that of Poisson
    variables, with fixed targets. Others are penalties, which count nowhere, and so is one of other operations.

    Args:
        loss: The module given to the optimizer.

    Attributes:
        elsewhere: Whether the backward pass under way goes through a loss to parameters, and no pass led to it: through
            another model that has them too, say.
    """

    def __init__(self, loss: nn.Module | None) -> None:
        self._kind = next((name for cls, name in _NODES.items() if isinstance(loss, cls)), "no loss")
        self._counts = isinstance(loss, nn.PoissonNLLLoss)
        self._found: dict[Any, list[UnseenLoss]] = {}  # by ends of passes below them
        self._known: set[int] = set()
        self._is_there = False  # a loss of the step is known: a call, or a node of the kind
        self._labelled: set[Any] = set()  # outputs with probabilities as labels
        self._tempered: set[Any] = set()  # outputs at a temperature
        self.elsewhere = False
        self._calls: dict[int, TapedLoss] = {}  # by the numbers of their nodes
        self._squares: dict[Any, list[Any]] = {}  # the nodes of squared errors, by the ends of passes below
        self._told: dict[Any, Pass] = {}  # passes below losses that were found, by the nodes of these
        self._direct: set[Any] | None = None  # these ends, and those to which it comes otherwise, but not by other ends

    def look(self, passes: list[Pass], calls: list[TapedLoss], parameters: Iterable[Tensor]) -> None:
        """A backward pass begins: find them, by the nodes where passes end, above these and the known calls."""
        ends = {edge.node for origin in passes for edge in origin.edges}
        ends |= {o.output.grad_fn for o in passes if isinstance(o.output, Tensor) and o.output.grad_fn is not None}
        self._calls = {call.number: call for call in calls}
        self._known, self._told = (known := set(self._calls)), {}
        tracked = {id(p) for p in parameters}
        self._found, self._direct, above = calls_beside(self._kind, ends, known, tracked)
        self._squares = {}
        for node in above:
            if node._sequence_nr() not in known and (end := square_of(node, ends)) is not None:
                self._squares.setdefault(end, []).append(node)
        reached = {node._sequence_nr() for node in above} & known
        alive = (c for c in calls if c.weight is not None or c.number in reached or c.alive() is not None)
        self._is_there = bool(self._found) or any(alive)
        looks = self._is_there and self._kind == _NODES[nn.CrossEntropyLoss]
        self._labelled = soft_labels(above, ends) if looks else set()
        self._tempered = at_temperatures(above, ends) if looks else set()
        leaves = [node for node in above if id(getattr(node, "variable", None)) in tracked]
        self.elsewhere = bool(leaves) and any(
            node.name().startswith(tuple(_NODES.values()))
            and node._sequence_nr() not in known
            and _uses(node, ends, set(leaves))
            for node in above
        )

    def above(self, origin: Pass, known: bool, later: bool) -> list[UnseenLoss] | None:
        """Those above the output of a pass, at which the gradient has arrived.

        Args:
            origin: The pass.
            known: Whether known calls of the loss are above it.
            later: Whether the gradient may be read when the graph is gone.

        Returns:
            The losses, which are not found again; ``None`` where the output was an input of another pass alone, whose
            losses tell.
        """
        own, ends = origin.last, origin.ends
        unseen = [call for end in own for call in self._found.pop(end, [])]
        if not known and self._direct is not None and not ends & self._direct:
            return None
        origin.followed, square = self._direct is not None, self._kind == _NODES[nn.MSELoss]
        origin.labelled = not ends.isdisjoint(self._labelled) or self._is_of_counts(origin)
        origin.left_out |= known and not ends.isdisjoint(self._tempered)
        origin.penalty = self._is_there and not (unseen or known or square or origin.labelled)
        origin.way = origin.rest = origin.told = origin.form = origin.share = None
        origin.looks = partial(self._look, origin)
        self._told |= {call.node: origin for call in unseen}
        if square and not (unseen or known):
            unseen = _by_hand(ends)
        beside = known and not (unseen or origin.labelled) and self._direct is not None and bool(own & self._direct)
        if not known or (beside and (not self._square_of(origin) or self._has_targets(origin, own))):
            origin.form = self._form(origin, unseen)
        if origin.form is not None:
            origin.penalty, unseen = False, []
        if later and (origin.form is not None or (not square and (origin.labelled or unseen or not known))):
            self.read_later(origin)
        if beside and origin.form is None:
            written = self._is_written(origin, own) or self._compares(own, ends)
            origin.penalty, origin.silent = not square, not written  # its gradient tells, but for squares
            origin.left_out |= square and written
        origin.parts += [part for call in unseen if (part := _part_seen(call.node, origin)) is not None]
        names = [node.name() for call in unseen for node in between([call.node], own)]
        origin.picked |= any(name.startswith(_BY_VALUE) for name in names)
        origin.filled |= any(name.startswith(_FILLS) for name in names)
        alone = not unseen or not self._compares(own, ends | {call.node for call in unseen})  # their gradients add up
        return [replace(call, moved=call.moved and alone and not self._hides_rows(call, own)) for call in unseen]

    def _is_written(self, origin: Pass, ends: Set[Any]) -> bool:
        """Whether what is beside the module on an output has the form of a loss of the optimizer's kind."""
        if self._kind == _NODES[nn.MSELoss]:
            return self._has_targets(origin, ends)
        way_there, _ = self._seen(origin)
        return way_there is not None and way_there.linear and bool(way_there.cores)

    def _compares(self, own: Set[Any], found: Set[Any]) -> bool:
        """Whether a loss function of torch, or a difference from fixed numbers, sees an output besides known losses.

        Args:
            own: Where the output ends.
            found: This, where others of its pass end, and the nodes of losses that were found.
        """
        until = self._until(found)
        others = [node for node in below(called_on(), until) if not until(node)]
        flat = {before for node in others if name_of(node).startswith("Abs") for before in inputs_of(node)}
        for node in others:
            fixed = name_of(node).startswith("Sub") and any(before is None for before, _ in node.next_functions)
            loss = name_of(node).startswith(_LOSSES) and "BackwardBackward" not in name_of(node)
            if (loss or (fixed and node not in flat)) and not own.isdisjoint(below([node], until)):
                return True
        return False

    def _has_targets(self, origin: Pass, ends: Set[Any]) -> bool:
        """Whether squares above an output are of differences from something, which a penalty's are not."""
        found = self._square_of(origin)
        return any(name_of(one).startswith(("MseLoss", "Sub", "Rsub")) for one in between(found, ends))

    def _form(self, origin: Pass, unseen: list[UnseenLoss]) -> type[nn.Module] | None:
        """The loss above an output, of another kind than the optimizer's, or a squared error that its value tells."""
        if not (self._is_there or self._kind in _NODES.values() or self._counts) or origin.labelled:
            return None
        square = self._kind == _NODES[nn.MSELoss]
        if unseen and not (square and unseen[0].share is None and not unseen[0].adds and unseen[0].root is None):
            return None
        found, _ = self._seen(origin)
        if found is None:
            return None
        if not square and any(map(tells_no_value, self._square_of(origin))):
            written = _by_hand(origin.ends)
            origin.share = written[0].share if written else None
            return None if origin.share is None else nn.MSELoss
        if self._square_of(origin):
            return nn.MSELoss if not square or (len(unseen) < 2 and found.affine and not found.picks) else None
        names = [cls for begin, cls in FORMS.items() if any(core.name().startswith(begin) for core in found.cores)]
        own = names and (_NODES.get(names[0]) == self._kind or (self._counts and names[0] is nn.PoissonNLLLoss))
        known = found.linear and all(core.name().startswith(tuple(FORMS)) for core in found.cores)
        if not (names and known):
            origin.left_out |= self._is_there and not square and self._moves(origin)
        return names[0] if names and known and not own else None

    def _moves(self, origin: Pass) -> bool:
        """Whether an output has a loss of a known form that sees parts of it, and nobody tells which."""
        ends, until = origin.ends, self._until(origin.ends)
        losses = (_NODES[cls] + "Backward0" for cls in (nn.MSELoss, nn.BCEWithLogitsLoss))
        names = tuple(name for name in losses if not name.startswith(self._kind))
        for node in below(called_on(), until):
            if name_of(node).startswith(names) and len(arguments := inputs_of(node)) == 1:
                ways = set(below(arguments, ends))
                moves = (name_of(one).startswith(_PARTS) or only_moves(one, {*inputs_of(one)}) for one in ways - ends)
                if ways & ends and all(moves):
                    return True
        return False

    def _square_of(self, origin: Pass) -> set[Any]:
        return {node for end in origin.ends for node in self._squares.get(end, [])}

    def _until(self, ends: Set[Any]) -> Callable[[Any], bool]:
        """What tells whether a node is one of some ends, or that of a known call."""
        return lambda node: node in ends or node._sequence_nr() in self._known

    def _hides_rows(self, call: UnseenLoss, ends: Set[Any]) -> bool:
        """Whether a loss sees some rows of an output, of which something unknown sees others, so none tells which."""
        if not any(node.name().startswith(PICKS) for node in between([call.node], ends)):
            return False
        return not ends.isdisjoint(below(called_on(), self._until(ends | {call.node})))

    def read_later(self, origin: Pass) -> None:
        """Look at the way to a pass now, whose gradient will be read when it is repeated."""
        several = origin.gradient is not None  # whose sum will be read
        origin.way, origin.rest = (Way(False, True), None) if several else self._seen(origin)

    def others_told(self, origin: Pass) -> None:
        """The backward pass has ended: take from its number what all other losses have told."""
        origin.looks = None
        if origin.way is not None and origin.rest is not None:
            try:
                origin.rest = self._without(origin.rest, origin.way)
            except NotYetTold:  # by a pass that is repeated as well
                origin.rest = None

    def _look(self, origin: Pass) -> tuple[Way | None, Rest | None]:
        found, rest = self._seen(origin)
        return found, None if found is None or rest is None else self._without(rest, found)

    def _is_of_counts(self, origin: Pass) -> bool:
        """Whether the loss of Poisson variables is above an output, for which there is no node."""
        if not (self._counts and self._is_there):
            return False
        found, _ = self._seen(origin)
        return found is not None and found.affine and found.exponential

    def _seen(self, origin: Pass) -> tuple[Way | None, Rest | None]:
        """The way to the output of a pass from what the backward pass under way was called on, and the sum of that."""
        roots, parts = called_on(), numbers_called_on()
        if not parts or not isinstance(origin.output, Tensor):
            return None, None
        rest = Rest(reduce(torch.add, parts), reduce(torch.add, map(torch.abs, parts)))
        ends = origin.ends
        mine = {node for node, one in self._told.items() if one is origin}
        found = {call.node for calls in self._found.values() for call in calls} | self._told.keys() - mine
        if squared := self._square_of(origin):
            ends = squared  # an output less something is no multiple of it
        known = lambda node: node._sequence_nr() in self._known or node in found - ends  # noqa: E731
        if squared and squared == set(map(node_of, roots)):
            return Way(True, False), rest
        looked = way(roots, ends, known, bool(squared))
        return replace(looked, affine=looked.affine and len(squared) < 2), rest

    def _without(self, rest: Rest, found: Way) -> Rest | None:
        """A number without those that other losses on the way have told; ``None`` where one tells nothing.

        Raises:
            NotYetTold: If the gradient of one has not arrived.
        """
        for node in found.others:
            if (call := self._calls.get(node._sequence_nr())) is not None:
                arrived = call.arriving
                if arrived is None:
                    raise NotYetTold
                rest = rest.less((arrived * call.value).sum())
            elif node not in self._told:
                raise NotYetTold
        for origin in {self._told[node] for node in found.others if node in self._told}:  # of several losses, maybe
            if origin.told is None:
                return None
            rest = rest.less(origin.told)
        return rest

    @property
    def left(self) -> bool:
        """Whether there are some above passes at whose output no gradient arrived."""
        return bool(self._found)


def _part_seen(loss: Any, origin: Pass) -> Tensor | None:
    """The entries of an output that cuts leave to a loss; ``None`` for all of them."""
    packed = origin.recorder is not None and any(site.packed for site in origin.recorder.sites)
    found = reached_entries(loss, 0, packed, origin.last)
    part = found.get((origin.output.grad_fn, origin.output.output_nr))
    return None if part is None or bool(part.all()) else part.expand(origin.output.shape)


def _uses(loss: Any, ends: Set[Any], leaves: Set[Any]) -> bool:
    """Whether a loss is of what some parameters made, and not of themselves, as a penalty on weights is."""
    ways = list(below([loss], ends))
    if not any(node.name().startswith(_LAYERS) for node in ways):
        return False
    return not leaves.isdisjoint(ways) and ends.isdisjoint(ways) and not any(map(only_moves, inputs_of(loss)))


def _by_hand(ends: Set[Any]) -> list[UnseenLoss]:
    """The squared error that is written out above an output, if there is one, whose weight can be told."""
    roots = called_on()
    found = squares(roots[0], ends) if len(roots) == 1 and isinstance(roots[0], Tensor) else []
    weight = found[0].weight if len(found) == 1 and begins_with_one() else None
    if len(found) != 1 or (weight is None and not found[0].alone):
        return []
    root = numbers_called_on()[0] if weight is None else None
    return [UnseenLoss(found[0].node, "sum" if weight == 1 else "mean", root is None, root, True, weight)]


def explained(output: Tensor, calls: list[TapedLoss]) -> Tensor | None:
    """The gradient at a model's output of some calls of the loss, with the weights that arrived at them.

    ``None`` where the way from the output to what a call saw is not there any more.
    """
    total = torch.zeros_like(output)
    with inspection(), torch.enable_grad():
        for call in calls:
            z = call.output.detach().requires_grad_()
            args, kwargs = call.arguments(z)
            (sent,) = torch.autograd.grad(call.module(*args, **kwargs), z, call.arriving)
            if call.whole:
                total += sent.reshape(output.shape).to(output.dtype)
                continue
            try:
                total += torch.autograd.grad(call.output, output, sent, retain_graph=True)[0]
            except RuntimeError:  # it had saved something
                return None
    return total


class NotYetTold(Exception):
    """The weight of a loss depends on those of others, whose gradients have not arrived yet."""
