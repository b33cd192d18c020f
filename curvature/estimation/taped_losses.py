"""Calls of a loss as a tape notes them: on which passes, and on which of their outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.passes import OUTPUT, Pass, TapedLoss
from curvature.losses.loss import called
from curvature.model.data import inspection
from curvature.model.graph_nodes import UnseenLoss, calls_beside
from curvature.model.wrappers import passed_on

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


def taped(
    module: nn.Module, args: Any, kwargs: Any, z: Any, value: Tensor, passes: list[Pass], inside: bool
) -> TapedLoss:
    """Note a call of the loss on ``z`` in the passes that led to it."""
    call = TapedLoss(
        module,
        tuple(OUTPUT if a is z else a for a in args),
        {key: OUTPUT if a is z else a for key, a in kwargs.items()},
        z,
        passes,
        _place(passes, z),
        value,
        shape=tuple(z.shape) if isinstance(z, Tensor) else (),
        whole=any(same_numbers(origin.output, z) for origin in passes),
        inside=inside,
    )
    for origin in passes:
        origin.calls.append(call)
    return call


def called_again(again: Pass, func: Any, args: Any, kwargs: Any, value: Any) -> None:
    """One of torch's loss functions was called in a repeated pass; its value keeps its graph."""
    found = called(func, args, kwargs)
    if found is not None and isinstance(value, Tensor) and value.requires_grad and found[1][0].requires_grad:
        taped(found[0], found[1], {}, found[1][0], value, [again], True).alive = lambda: True


def beside(
    loss: nn.Module | None, passes: list[Pass], calls: list[TapedLoss]
) -> tuple[dict[Any, list[UnseenLoss]], set[Any] | None]:
    """The losses that nobody saw, by the nodes where passes end to which the backward pass under way comes.

    They are of the kind of the optimizer's, called as functions or by another module. Losses of other kinds are
    penalties, which count nowhere, and so is one that is put together from other operations. See :func:`calls_beside`.
    """
    kind = next((name for cls, name in _NODES.items() if isinstance(loss, cls)), "no loss")
    ends = {edge.node for origin in passes for edge in origin.edges}
    ends |= {o.output.grad_fn for o in passes if isinstance(o.output, Tensor) and o.output.grad_fn is not None}
    return calls_beside(kind, ends, {call.number for call in calls})


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


def _place(passes: list[Pass], z: Any) -> int:
    """Which output of its pass a loss is called on: a number for each tensor."""
    if not passes:
        return 0
    known = {call.place for call in passes[0].calls if call.output is z}
    return known.pop() if known else len({call.place for call in passes[0].calls})


def same_numbers(output: Any, z: Any) -> bool:
    """Whether the loss sees the output, or a view of all of it in its order."""
    if z is output:
        return True
    output = passed_on(output, z)
    if z is output:
        return True
    if not isinstance(output, Tensor) or not isinstance(z, Tensor):
        return False
    plain = z.numel() == output.numel() and z.is_contiguous() and output.is_contiguous()
    return plain and z.data_ptr() == output.data_ptr() and z.requires_grad == output.requires_grad
