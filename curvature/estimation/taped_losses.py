"""Calls of a loss as a tape notes them: on which passes, and on which of their outputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, nn

from curvature.estimation.parts_of_outputs import output_of
from curvature.estimation.passes import OUTPUT, Pass, TapedLoss
from curvature.losses.loss import called
from curvature.model.data import loss_in
from curvature.model.graph_nodes import below
from curvature.model.trees import tensors_in
from curvature.model.wrappers import passed_on


def taped(
    module: nn.Module, args: Any, kwargs: Any, z: Any, value: Tensor, passes: list[Pass], inside: bool
) -> TapedLoss:
    """Note a call of the loss on ``z`` in the passes that led to it."""
    targets = [a for a in (*args[1:2], kwargs.get("target")) if isinstance(a, Tensor)]
    key = output_of(module, z, targets[0] if targets else None)
    call = TapedLoss(
        module,
        tuple(OUTPUT if a is z else a for a in args),
        {key: OUTPUT if a is z else a for key, a in kwargs.items()},
        z,
        passes,
        _place(passes, key),
        value,
        shape=tuple(z.shape) if isinstance(z, Tensor) else (),
        whole=any(same_numbers(origin.output, z) for origin in passes),
        edited=not inside and any(map(_is_edited, passes)),
        inside=inside,
        part_of=key,
    )
    for origin in passes:
        origin.calls.append(call)
    return call


def called_again(again: Pass, func: Any, args: Any, kwargs: Any, value: Any) -> None:
    """One of torch's loss functions was called in a repeated pass; its value keeps its graph."""
    found = called(func, args, kwargs)
    if found is not None and isinstance(value, Tensor) and value.requires_grad and found[1][0].requires_grad:
        call = taped(found[0], found[1], {}, found[1][0], value, [again], True)
        call.alive, call.number = lambda: True, number_of(value)


def number_of(value: Tensor) -> int:
    """The number of the node of a tensor in the graph; those it was computed from have smaller ones."""
    return value.grad_fn._sequence_nr() if value.grad_fn is not None else -1


def own_loss(result: Any, calls: list[TapedLoss], hidden: bool) -> Tensor | None:
    """The loss in what a model returned.

    That may be all it returned: a number, or a value for each term, which comes from losses that were called inside.

    Args:
        result: What it returned.
        calls: Calls of losses inside.
        hidden: Whether nobody saw these: then one number is a loss.
    """
    found = loss_in(result)
    outputs = [t for t in tensors_in(result) if t.requires_grad]
    if found is not None or len(outputs) != 1:
        return found
    (one,) = outputs
    numbers = {call.number for call in calls if one.numel() == 1 or one.shape == call.value.shape}
    ends = lambda node: node._sequence_nr() <= max(numbers)  # noqa: E731
    told = bool(numbers) and any(node._sequence_nr() in numbers for node in below([one], ends))
    return one if told or (hidden and one.dim() == 0) else None


def leading_to(z: Any, passes: list[Pass], parameters: Iterable[Tensor]) -> list[Pass] | None:
    """The passes that something was computed from; ``None`` if it has nothing to do with the model.

    A loss module may serve several models. Where a model returned no tensor that autograd knows, its parameters tell.

    Args:
        z: What a loss was called on.
        passes: Those that were recorded.
        parameters: Of the model, as the passes use them.
    """
    waiting = [origin for origin in passes if not origin.released]
    direct = [origin for origin in waiting if origin.output is z]
    if direct:
        return direct + feeding(direct, waiting, parameters)
    ends = {edge.node: origin for origin in waiting for edge in origin.edges}
    tracked = {id(p) for p in parameters}
    reached = list(below(tensors_in(z), ends))
    found = {id(ends[node]) for node in reached if node in ends}
    uses = any(id(getattr(node, "variable", None)) in tracked for node in reached)
    if not found and not uses:
        return None
    last = [origin for origin in waiting if id(origin) in found or (uses and not origin.edges)]
    return last + feeding(last, waiting, parameters)


def feeding(last: list[Pass], passes: list[Pass], parameters: Iterable[Tensor]) -> list[Pass]:
    """Further passes, whose outputs are inputs of some; arguments as for :func:`leading_to`."""
    inputs = [t for origin in last for t in tensors_in(origin.inputs) if t.grad_fn is not None]
    before = (leading_to(inputs, passes, parameters) or []) if inputs else []
    return [origin for origin in before if origin not in last]


def _place(passes: list[Pass], key: Hashable) -> int:
    """Which output of its pass a loss is called on: a number for each key."""
    if not passes:
        return 0
    known = {call.part_of: call.place for call in passes[0].calls}
    return known.get(key, len(set(known.values())))


def _is_edited(origin: Pass) -> bool:
    """Whether some of what a pass returned was changed in place since, as far as autograd knows."""
    ends = {edge.node for edge in origin.edges}
    outputs = [t for t in (origin.output, *origin.returned) if isinstance(t, Tensor)]
    return any(t.requires_grad and t.grad_fn is not None and t.grad_fn not in ends for t in outputs)


def same_numbers(output: Any, z: Any) -> bool:
    """Whether the loss sees the output, or a view of all of it in its order."""
    output = passed_on(output, z)
    if z is output:
        return True
    if not isinstance(output, Tensor) or not isinstance(z, Tensor):
        return False
    plain = z.numel() == output.numel() and z.is_contiguous() and output.is_contiguous()
    return plain and z.data_ptr() == output.data_ptr() and z.requires_grad == output.requires_grad
