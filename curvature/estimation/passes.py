"""What a tape holds: forward passes, calls of the loss on what they gave, and who reads while gradients arrive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvature.estimation.selection import SeenPart
from curvature.estimation.ways_to_losses import Way
from curvature.estimation.weights_by_value import Rest
from curvature.layers.recorder import Recorder
from curvature.model.moment import Moment

#: Stands for the model's output among the arguments of a loss.
OUTPUT = object()
#: Positional and named arguments of a model.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class TapedLoss:
    """A call of the loss.

    Attributes:
        module: The loss module that was called, or one that does what the called function did.
        args: Positional arguments; :data:`OUTPUT` stands for the tensor the loss saw.
        kwargs: Named arguments likewise.
        output: What the loss saw, with its graph, until the backward pass has ended.
        passes: The forward passes that led to it.
        place: Which output of its pass it is on: 0 for the first that a loss was called on, and so on; the same for all
            parts of one.
        value: What the loss returned, without its graph.
        weight: Derivative of what ``backward()`` was called on by the value, over all backward passes that ended;
            ``None`` as long as none did.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    passes: list[Pass]
    place: int
    value: Tensor
    weight: Tensor | None = None
    shape: tuple[int, ...] = ()  # of the output as the loss saw it
    whole: bool = False  # that is all of the model's output in its order
    edited: bool = False  # what a pass returned was changed in place before
    inside: bool = False  # the model called it
    selection: SeenPart | None = None  # of what a pass returned, if it was looked for
    looked: bool = False  # since the pass was expected to be run again
    arriving: Tensor | None = None  # the weight over the backward pass under way
    number: int = -1  # of the node of its value in the graph
    part_of: Hashable = None  # what tells that output
    aggregated: bool | None = None  # it has one term for each example, if somebody looked
    tell: Callable[[], bool] | None = None  # the same, since its gradient arrived; the graph may be gone by now
    alive: Callable[[], Any] = lambda: None  # a hook that lives as long as a gradient may arrive at the value
    brought: frozenset[str] = frozenset()  # parameters whose gradients it has brought

    def seen(self, output: Any) -> Any:
        """An output of the pass, repeated, as this loss sees it."""
        return output.reshape(self.shape) if isinstance(output, Tensor) else output

    def arguments(self, output: Any, other: Callable[[Any], Any] = lambda value: value) -> tuple[tuple[Any, ...], dict]:
        """The arguments with ``output`` in the place of what the loss saw, and others changed by a function."""
        fill = lambda value: output if value is OUTPUT else other(value)  # noqa: E731
        return tuple(map(fill, self.args)), {key: fill(value) for key, value in self.kwargs.items()}


@dataclass(frozen=True)
class UnseenLoss:
    """A call of a loss function that the backward pass under way goes through.

    Attributes:
        node: Its node.
        reduction: Whether its values are averaged or added up, by itself or by the loop.
        adds: Whether this is added to the rest as it is.
        root: What the backward pass was called on, if that is a multiple of this and nothing else.
        moved: Whether it sees an output, or what only views, casts and picked rows made of it, as far as names tell.
    """

    node: Any
    reduction: Literal["mean", "sum"] | None
    adds: bool
    root: Tensor | None
    moved: bool
    share: float | None = None  # what each of its squares is multiplied by, where it is written out and the way tells


@dataclass(eq=False)
class Pass:
    """A forward pass of the model.

    Attributes:
        inputs: Positional and named arguments of the model.
        random: Random states at its beginning.
        moment: The model at its beginning.
        recorder: The uses of parameters in it; ``None`` if none were recorded.
        output: What the loss is expected to see; ``None`` where the model's result does not tell.
        edges: Where gradients of the tensors that the model returned arrive.
        calls: Calls of the loss that it led to.
        autocast: The dtype to which operations cast in it; ``None`` without autocast.
    """

    inputs: Inputs
    random: list[Tensor]
    moment: Moment
    autocast: torch.dtype | None = None
    recorder: Recorder | None = None
    output: Any = None
    edges: tuple[GradientEdge, ...] = ()
    end: Any = None  # the node of ``output`` in the graph
    calls: list[TapedLoss] = field(default_factory=list)
    examples: int = -1  # size of the first axis of the output
    returned: list[Tensor] = field(default_factory=list)  # all that the model returned, where it may be repeated
    own: TapedLoss | None = None  # the loss that the model returned, where nobody saw what it consists of
    loss: Tensor | None = None  # the same of a repeated pass, with its graph
    gradient: Tensor | None = None  # that arrived at ``output``, where the loss was not called on all of it
    arriving: Tensor | None = None  # the same over the backward pass under way
    seen: Tensor | None = None  # the output itself, without its graph
    handles: list[Any] = field(default_factory=list)  # of hooks on tensors
    at_output: Any = None  # the one of these on the output
    released: bool = False  # nothing can arrive any more
    beside: bool = False  # ``gradient`` is of several losses, or of what is besides the calls that were seen
    unseen_loss: UnseenLoss | None = None  # that loss, where it is a single one and somebody can tell
    parts: list[Tensor] = field(default_factory=list)  # entries of ``output`` that cuts leave to losses nobody saw
    picked: bool = False  # those see some of it that indices or masks pick, which are gone
    filled: bool = False  # or with something else in some places
    penalty: bool = False  # the loss of the step is elsewhere, and no node above is one of its kind
    silent: bool = False  # beside the loss of the step, which is what the curvature is of, and has not its form
    form: type[nn.Module] | None = None  # the module of the only loss above it, if of another kind, or told by value
    share: float | None = None  # what the squares of that are multiplied by, where the way shows it and no value does
    labelled: bool = False  # a loss with labels that are probabilities, or counts, is above it
    left_out: bool = False  # rounding hides its weight, so that it counts in no curvature
    way: Way | None = None  # from what the backward pass was called on, where nobody saw a loss
    rest: Rest | None = None  # of that, without other losses
    looks: Callable[[], tuple[Way | None, Rest | None]] | None = None  # for both, while the backward pass is under way
    told: Tensor | None = None  # what the loss of ``unseen_loss`` adds to that number, where its gradient tells
    followed: bool = False  # what the backward pass was called on is known, so that the graph shows all losses
    edited: bool = False  # ``output`` was changed in place before the loss
    size: Tensor | None = None  # largest entry of all that arrived, of which ``gradient`` is a part
    task: int = -1  # the backward pass that brought it
    brought: frozenset[str] = frozenset()  # parameters whose gradients it has brought, by losses that nobody saw
    again: bool = False  # it hides something, or another input counts the examples than was thought: to be repeated
    unseen: set[str] = field(default_factory=set)  # parameters with a gradient in it that no statistics reached

    @property
    def last(self) -> set[Any]:
        """The nodes where its output ends in the graph: several, where that was changed in place."""
        return {self.end, self.output.grad_fn} - {None}

    @property
    def ends(self) -> set[Any]:
        """The nodes where all that the model returned ends."""
        return self.last | {edge.node for edge in self.edges}

    @property
    def counted(self) -> list[TapedLoss]:
        """The calls of the loss at which a gradient arrived for good."""
        return [call for call in self.calls if call.weight is not None]

    @property
    def own_weight(self) -> Tensor | None:
        """What arrived at the loss that the model returned, for good."""
        return None if self.own is None else self.own.weight

    @property
    def opaque(self) -> bool:
        """Whether custom functions were met in its graph, which may hide uses of parameters."""
        return self.recorder is not None and bool(self.recorder.explained.custom)


class Reader:
    """Computes something while gradients arrive, for good once their backward pass has ended; nothing, by itself."""

    def called(self, call: TapedLoss) -> None:
        """The loss was called."""

    def begin(self) -> None:
        """A backward pass begins that may count."""

    def arrived(self, call: TapedLoss, gradient: Tensor) -> None:
        """A gradient arrived at the value of a loss; the graph below still stands."""

    def arrived_at_input(self, call: TapedLoss, gradient: Tensor) -> None:
        """A gradient arrived at what the loss was called on, where the reader asked for it."""

    def arrives_at_output(self, origin: Pass) -> None:
        """All that comes to the output of a pass has arrived; the graph below still stands."""

    def arrived_at_output(self, origin: Pass, gradient: Tensor) -> None:
        """A gradient arrived at the output of a pass, besides what calls of the loss explain."""

    def not_told(self) -> None:
        """A gradient arrived at a pass from a loss that nobody saw."""

    def keep(self, written: Collection[str], known: Sequence[TapedLoss | Pass]) -> None:
        """The backward pass has ended, and its gradients are in ``p.grad`` of these parameters.

        Args:
            written: The parameters.
            known: The calls of the loss at which gradients arrived; without any, the passes at whose outputs they did.
        """

    def drop(self) -> None:
        """It raised, or brought nothing to the parameters: whatever it began is to be forgotten."""

    def gone(self, left: Collection[str]) -> None:
        """Whatever was kept is to be forgotten but for these parameters: the gradients of others are gone."""

    def take_back(self) -> None:
        """What the last backward pass brought is to be forgotten as well: ``p.grad`` is what it was before."""

    def clear(self) -> None:
        """Whatever was kept is to be forgotten as well: its gradients are gone from ``p.grad``."""


def release(origin: Pass) -> None:
    """Let go of the graph of a pass: cycles through autograd are invisible to Python's garbage collector."""
    for handle in filter(None, (*origin.handles, origin.at_output)):
        handle.remove()
    origin.at_output = origin.looks = None
    origin.handles, origin.recorder, origin.output, origin.edges, origin.end = [], None, None, (), None
    origin.returned = []
    origin.released = True
    for call in origin.calls:
        call.output = call.tell = None


def merged(recorders: list[Recorder]) -> Recorder:
    """Several forward passes that led to one loss, as one."""
    first = recorders[0]
    if len(recorders) == 1:
        return first
    out = Recorder({}, (), first.batch)
    out.parts = recorders
    for recorder in recorders:
        out.explained.join(recorder.explained)
        out.sites += recorder.sites
        out.examples_interact |= recorder.examples_interact
        for name, operations in recorder.unknown.items():
            out.unknown.setdefault(name, set()).update(operations)
    return out
