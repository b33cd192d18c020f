"""The losses of a pass, and what arrived at them, when the pass is run again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvature.estimation.passes import Pass, TapedLoss
from curvature.estimation.tape import Tape


def brought(origin: Pass) -> bool:
    """Whether a gradient arrived for good at anything that is told when a pass is run again."""
    return bool(_calls(origin)) or origin.gradient is not None or origin.own_weight is not None


def _calls(origin: Pass) -> list[TapedLoss]:
    return [call for call in origin.counted if call.whole or call.inside or call.looked]


def arrivals_again(tape: Tape, origin: Pass, again: Pass) -> Iterator[tuple[TapedLoss, Tensor]]:
    """The calls of losses on what a repeated pass gave, each with the gradient that arrived at its value.

    Afterwards ``again.gradient`` is what arrived at the output besides, of losses that nobody saw.

    Args:
        tape: Of the step.
        origin: The pass as the user ran it.
        again: The pass as it was run again.
    """
    calls, rest = _calls(origin), list(again.calls)
    inside: dict[TapedLoss, TapedLoss] = {}
    for call in (call for call in origin.calls if call.inside):
        same = next((c for c in rest if c.shape == call.shape and torch.equal(c.value.detach(), call.value)), None)
        if same is not None:
            inside[call] = same
            rest.remove(same)
    arrived, own = _through_own_loss(tape, again, origin.own_weight)
    arrived = [(call, weight) for call, weight in arrived if call in rest]  # the others were seen by themselves
    if own is not None:
        again.calls = [call for call, _ in arrived]
    yield from arrived
    origin.beside |= own is not None and origin.unseen_loss is not None
    seen = {call: inside.get(call) or _seen_again(call, again) for call in calls}
    again.calls = list(seen.values())
    for call in calls:
        seen[call].arriving = call.weight
    for call in calls:
        assert call.weight is not None
        yield seen[call], call.weight
    if origin.gradient is not None and (origin.beside or not (calls or own is not None)):
        if origin.edited:
            raise _not_repeated(tuple(again.output.shape))
        again.gradient = origin.gradient if own is None else origin.gradient - own


def _seen_again(call: TapedLoss, again: Pass) -> TapedLoss:
    """A call of the loss on what a repeated pass returned."""
    if call.edited:
        raise _not_repeated(call.shape)
    if call.selection is not None:
        z = call.selection.of(again.returned)
    elif call.whole:  # of several outputs
        z = call.seen(again.output)
    else:
        raise _not_repeated(call.shape)
    return TapedLoss(*(call.module, call.args, call.kwargs, z, [again], call.place, call.value), alive=lambda: True)


def _through_own_loss(
    tape: Tape, again: Pass, weight: Tensor | None
) -> tuple[list[tuple[TapedLoss, Tensor]], Tensor | None]:
    """Hand the gradient at the loss that a repeated pass computed on to the calls of losses that it consists of.

    Returns:
        What it sends to these, and to the output; ``None`` where it consists of none that were seen.
    """
    calls = [call for call in again.calls if call.value.requires_grad]
    if not calls or weight is None or again.loss is None:
        return [], None
    output = again.output if isinstance(again.output, Tensor) and again.output.requires_grad else None
    ends = [call.value for call in calls] + ([] if output is None else [output])
    with tape.own_pass([again], again.loss):
        weights = torch.autograd.grad(again.loss, ends, weight, retain_graph=True, allow_unused=True)
    found = [(call, arrived) for call, arrived in zip(calls, weights, strict=False) if arrived is not None]
    sent = None if output is None else weights[-1]
    return found, torch.zeros_like(again.loss) if sent is None else sent


def _not_repeated(shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        "the curvature of a step is taken from a repeated forward pass here (of a compiled model, a reentrant "
        f"checkpoint, or Loop(capture='shadow')), and the loss saw a tensor of shape {shape} that was computed from "
        "the output outside of the model (or is the output, changed in place), by another model or from several "
        "passes. Let the model compute what the loss sees, or give the optimizer a model that is not compiled."
    )
