"""Backward passes that run inside one of ours: by a custom function, which calls ``torch.autograd.backward`` itself.

Checkpoints and reversible layers that are written by hand do so. What they add to ``.grad`` belongs to the user's own
passes; and the parameters they use are no leaves of the graph that we differentiate, so that nothing of them is seen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.model.fully_sharded import is_custom
from curvature.model.graph_nodes import below, edges_of


class InnerBackwardError(RuntimeError):
    """A custom function of the model runs a backward pass of its own, which hides parameters."""


class _Here(threading.local):
    """The parameters of the model whose passes this thread runs, and where to note those that are hidden."""

    parameters: tuple[Tensor, ...] = ()
    hidden: set[int] | None = None


_here = _Here()


@contextlib.contextmanager
def passes_of(parameters: Iterable[Any], hidden: set[int] | None = None) -> Iterator[None]:
    """Backward passes inside, in this thread, are our own, through a model that has these parameters.

    Args:
        parameters: All that are trained.
        hidden: Gets the parameters, by ``id``, that an inner pass wrote to, which is refused otherwise.
    """
    before = _here.parameters, _here.hidden
    _here.parameters, _here.hidden = _with(before[0], parameters), hidden
    try:
        yield
    finally:
        _here.parameters, _here.hidden = before


@contextlib.contextmanager
def gradients_kept(outputs: Iterable[Any], inputs: Iterable[Any]) -> Iterator[None]:
    """For one backward pass of our own: ``.grad`` of all parameters stays as it is.

    Where no custom function is on its way, it is not looked at: another thread may be at work on the same model.

    Args:
        outputs: What is differentiated: tensors, or edges of a graph.
        inputs: With respect to what.

    Raises:
        InnerBackwardError: If the pass wrote to the ``.grad`` of a parameter, and nobody takes note of that.
    """
    outputs = list(outputs)
    if not leads_to_custom(outputs):
        yield
        return
    before = [(p, p.grad) for p in _with(_here.parameters, inputs)]
    for p, gradient in before:
        if gradient is not None:
            p.grad = None
    written: list[Tensor] = []
    try:
        yield
    finally:
        for p, gradient in before:
            if (now := p.grad) is not gradient:
                p.grad = gradient
                if now is not None:
                    written.append(p)
    if written and _here.hidden is None:
        raise hiding(written, outputs)
    if written and _here.hidden is not None:
        _here.hidden.update(map(id, written))


def hiding(parameters: list[Tensor], outputs: Iterable[Any]) -> InnerBackwardError:
    """What is raised where these parameters are used inside a custom function on the way to some outputs."""
    kinds = {node.name() for node in below(outputs) if _is_custom(node)}
    return InnerBackwardError(
        f"the backward of {', '.join(sorted(kinds)) or 'the model'} runs a backward pass of its own "
        f"(torch.autograd.backward), which hides the parameters that it uses, {_shapes(parameters)}: no curvature "
        "would see them. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in its place, which "
        "saves the same memory, or a method that needs gradients alone, such as SOAP. All .grad are as they were."
    )


def entered_by(outputs: Iterable[Tensor]) -> list[GradientEdge]:
    """Where the gradients of the inputs of all custom functions arrive, on the way to some outputs."""
    return [GradientEdge(*edge) for node in below(outputs) if _is_custom(node) for edge in edges_of(node)]


def _with(known: tuple[Tensor, ...], tensors: Iterable[Any]) -> tuple[Tensor, ...]:
    """Known ones, and those of some others to which backward passes write, once each."""
    more = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
    return tuple({id(t): t for t in (*known, *more)}.values()) if more else known


def leads_to_custom(outputs: Iterable[Any]) -> bool:
    """Whether there are custom functions on the way to some tensors, which remember it, or to edges of a graph."""
    open_ones: list[Any] = []
    with torch._C.DisableTorchFunction():  # attributes of tensors are no calls of the user's
        for output in outputs:
            known: tuple[int, bool] | None = getattr(output, "_custom_on_the_way", None)
            if known is None or known[0] != output._version:
                open_ones.append(output)
            elif known[1]:
                return True
        found = any(map(_is_custom, below(open_ones)))  # their graphs have most nodes in common
        for output in open_ones:
            if isinstance(output, Tensor) and (not found or len(open_ones) == 1):
                setattr(output, "_custom_on_the_way", (output._version, found))  # noqa: B010
    return found


def _is_custom(node: Any) -> bool:
    return is_custom(type(node))


def _shapes(tensors: list[Tensor]) -> str:
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return f"one of shape {tuple(tensors[0].shape)}{more}"
