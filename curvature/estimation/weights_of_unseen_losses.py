"""The weights of losses that are no calls of the module given to the optimizer, as the way to them tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.passes import Pass
from curvature.estimation.step import Step, Weight
from curvature.estimation.unseen_losses import FORMS
from curvature.estimation.ways_to_losses import Way
from curvature.estimation.weights_by_value import Rest, factor_by_value, factor_of_divergence, factor_of_squares
from curvature.losses import Terms, loss_for
from curvature.model.graph_nodes import entries_of_first


def weight_by_graph(
    step: Step, loss: nn.Module | None, origin: Pass, terms: Terms, gradient: Tensor, plain: bool
) -> Weight:
    """The weight of a loss, where its gradient does not tell and the way to it may.

    Args:
        step: Keeps the account of the losses.
        loss: Of the optimizer.
        origin: The pass at whose output the gradient arrived.
        terms: The loss on that output.
        gradient: What arrived.
        plain: A squared error of a weight that nothing tells is taken for a plain mean.
    """
    call, square = origin.unseen_loss, isinstance(loss, nn.MSELoss)
    untold = not plain and origin.followed if call is None else not call.adds and call.root is None
    if call is not None and call.share is None and not _sees_once(call.node, origin, terms):
        raise not_told()
    if square and (origin.beside or untold):
        raise not_told()
    if origin.beside:
        return _by_value(step, loss, origin, terms, gradient)
    if call is not None and not call.adds and square and call.root is not None:
        # From the value R = w (z - y)^2 and the gradient 2 w (z - y), with the weight w of every square.
        root = call.root.to(terms.total).reshape(())
        perfect = 1 / terms.total if call.reduction == "mean" else torch.ones_like(terms.total)
        weight = torch.where(root == 0, perfect, gradient.to(root).square().sum() / (4 * root))
    elif call is None or not call.adds:
        return _by_value(step, loss, origin, terms, gradient)
    elif call.share is not None:
        weight = torch.full_like(terms.total, call.share)
    else:
        entrywise = isinstance(loss, (nn.MSELoss, nn.BCEWithLogitsLoss))  # also those without a gradient
        total = torch.full_like(terms.total, entries_of_first(call.node)) if entrywise else terms.total
        weight = torch.ones_like(terms.total) if call.reduction == "sum" else 1 / total
    value = _of_squares(gradient, weight) if square else _confirmed(origin, terms, gradient, weight)
    if square and call.share is None:
        origin.told = value
    _note_value(step, loss, terms, weight, value)
    if call.reduction == "sum" and (call.adds or getattr(loss, "reduction", "mean") == "sum"):
        step.add_sum(0, weight * terms.total)
    else:
        step.absolute = True
        if call.reduction == "sum":
            step.seen.append(torch.stack([weight, terms.total]))
    return Weight(weight)


def _sees_once(node: Any, origin: Pass, terms: Terms) -> bool:
    """Whether a loss was called on as many entries as it sees of an output: not where it sees some of them twice."""
    if origin.picked:
        seen = int(terms.mask.sum()) * terms.shape[-1]
    else:
        seen = int(origin.parts[0].sum()) if origin.parts else terms.output.numel()
    return entries_of_first(node) == seen


def _confirmed(origin: Pass, terms: Terms, gradient: Tensor, weight: Tensor) -> Tensor | None:
    """The value of a loss with its weight; ``None`` where the way does not show it.

    Raises:
        TypeError: If it tells that the function had other options than those of the module (``pos_weight``).
    """
    seen, rest = _seen(origin)
    if seen is None or not seen.affine or rest is None:
        return None
    if origin.looks is not None:  # the graph is there
        factor = factor_by_value(terms, gradient, rest)
        if factor is not None and not bool((factor - weight).abs() <= 1e-3 * weight.abs()):
            raise not_told()
    return rest.value


def _by_value(step: Step, loss: nn.Module | None, origin: Pass, terms: Terms, gradient: Tensor) -> Weight:
    """The weight of a loss in natural parameters by its value; a plain mean where nothing tells, or is multiplied."""
    seen, rest = _seen(origin)
    factor = None if seen is None or rest is None or not seen.affine else _factor(seen, terms, gradient, rest)
    if factor is not None and rest is not None:
        step.absolute = True
        step.signs.append(torch.stack([factor < 0, factor > 0]))
        _note_value(step, loss, terms, factor, rest.value)
        step.seen.append(torch.stack([factor.abs(), terms.total.to(factor)]))
        return Weight(factor.abs())
    if origin.beside or (seen is not None and (seen.weighted or seen.others)):
        raise not_told()
    step.unscaled.add(origin.task)
    return Weight(1 / terms.total)


def _seen(origin: Pass) -> tuple[Way | None, Rest | None]:
    """The way to a pass, and the number; where it is repeated, after the backward passes, both are known."""
    return (origin.way, origin.rest) if origin.looks is None else origin.looks()


def _of_squares(gradient: Tensor, weight: Tensor) -> Tensor:
    """The sum ``w sum (z - y)^2`` from its gradient ``2 w (z - y)``."""
    return torch.where(weight == 0, 0, gradient.square().sum() / (4 * weight))


def _note_value(step: Step, loss: nn.Module | None, terms: Terms, weight: Tensor, value: Tensor | None) -> None:
    """Note the value of a loss with its weight, or the weight of its terms if its zero is no perfect one."""
    if value is not None and loss is not None:
        perfect = loss_for(loss).zero_when_perfect
        step.values.append((value.abs() if perfect else weight.abs() * terms.total).to(terms.total))


def _factor(seen: Way, terms: Terms, gradient: Tensor, rest: Rest) -> Tensor | None:
    return (factor_of_divergence if seen.divergence else factor_by_value)(terms, gradient, rest)


def weight_of_form(step: Step, loss: nn.Module | None, origin: Pass, terms: Terms, gradient: Tensor) -> Weight:
    """The weight of a loss of another kind than the optimizer's, on a pass of its own, from its value.

    Raises:
        Untold: If that does not tell.
    """
    if origin.share is not None:
        share = torch.full_like(terms.total, origin.share)
        _note_value(step, nn.MSELoss(), terms, share, _of_squares(gradient, share))
        enter(step, loss, share * terms.total)
        return Weight(share)
    seen, rest = _seen(origin)
    labels = origin.form is nn.CrossEntropyLoss
    if seen is None or rest is None or not seen.affine or (seen.picks and not labels):
        raise Untold
    kinds = {begin for begin in FORMS for core in seen.cores if core.name().startswith(begin)}
    if len(kinds) > 1 or not all(_has_no(core, "_saved_pos_weight", "_saved_weight") for core in seen.cores):
        raise Untold
    if origin.form is nn.MSELoss:
        factor = factor_of_squares(gradient, rest)
    else:
        factor = _factor(seen, terms, gradient, rest)
    if factor is None:
        raise Untold
    factor = factor.to(terms.total)
    _note_value(step, None if origin.form is None else origin.form(), terms, factor, rest.value)
    enter(step, loss, factor.abs() * terms.total)
    step.signs.append(torch.stack([factor < 0, factor > 0]))
    return Weight(factor.abs())


def enter(step: Step, loss: nn.Module | None, weight: Tensor) -> None:
    """Count a loss of another kind than the optimizer's, whose terms weigh so much in all, as that is reduced."""
    if getattr(loss, "reduction", "mean") == "sum":
        step.add_sum(0, weight)
    else:
        step.absolute = True


def _has_no(node: Any, *names: str) -> bool:
    """Whether a node was called without some tensors; those that it had may be gone."""
    try:
        return all(getattr(node, name, None) is None for name in names)
    except RuntimeError:
        return False


class Untold(Exception):
    """Nothing tells the weight of a loss of a known form, which is taken for a penalty."""


def not_told() -> TypeError:
    """The error where nothing tells what a loss that nobody saw is, and with which weight it counts."""
    return TypeError(
        "what backward() was called on holds a loss like the optimizer's that is no call of the module given to it, "
        "but of a function or another module, and neither its gradient nor the way to it tells its terms and their "
        "weight (a multiple of a squared error, weights of its entries, smoothed labels, a loss of a part of the "
        "output, ...). Call the given module in its place, with reduction='none' where its values are weighted, or let "
        "only calls of that module count: loop=Loop(capture='loss')."
    )
