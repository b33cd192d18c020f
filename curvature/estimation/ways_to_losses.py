"""The way from a number to the output of a model, where that is affine in the statistics of an exponential family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvature.losses import Terms
from curvature.model.graph_nodes import below, only_moves

#: Beginnings of the names of nodes that add numbers up, or pick some of them.
_LINEAR = ("Neg", "Sum", "Mean", "Gather", "NllLoss", "MaskedFill", "Index", "Where", "ToCopy")
#: Of those that make log probabilities, or the mean of a Poisson variable.
_CORES = ("LogSoftmax", "Exp", "BinaryCrossEntropyWithLogits")


@dataclass(frozen=True)
class Way:
    """What the nodes between a number and an output tell, as far as names do.

    Attributes:
        affine: The number is a multiple of the loss of all terms and nothing else: its value tells the weight.
        weighted: Products or quotients are on the way whose size nobody knows.
    """

    affine: bool
    weighted: bool


def way(root: Tensor, ends: Set[Any]) -> Way:
    """Look at the way from what a backward pass was called on to the ends of a model's output."""
    leads, after = set[Any](), dict[Any, list[Any]]()
    for node in below([root.grad_fn], ends.__contains__):
        for before, _ in node.next_functions if node not in ends else ():
            after.setdefault(before, []).append(node)
    waiting = [end for end in ends if end in after]
    while waiting:
        node = waiting.pop()
        if node not in leads:
            leads.add(node)
            waiting += after.get(node, [])
    affine, weighted, scalars = True, False, 0
    for node in leads - ends:
        name, arguments = node.name(), [before for before, _ in node.next_functions if before is not None]
        if any(before not in leads for before in arguments):
            affine = False  # something else is added
        elif name.startswith(_CORES):
            direct = only_moves(arguments[0], ends)
            affine, weighted = affine and direct, weighted or not direct  # at a temperature
        elif name.startswith(("Mul", "Div")) and len(arguments) == 1:
            internal = name.endswith("1") or _is_core(arguments[0], ends)  # of torch, or by labels
            scalar = prod(node._input_metadata[0].shape) == 1
            scalars += scalar and not internal
            affine, weighted = affine and (scalar or internal), weighted or not (scalar or internal)
        elif name.startswith(("Add", "Sub", "Rsub")):
            affine &= len(arguments) == 2
        elif not name.startswith(_LINEAR) and not only_moves(node, {*arguments}):
            affine = False
    divided = scalars == 1 and any(n.name() == "DivBackward0" for n in leads if prod(n._input_metadata[0].shape) == 1)
    return Way(affine and len(leads) > len(leads & ends) > 0, weighted or (scalars > 0 and not divided))


def soft_labels(above: Sequence[Any], ends: Set[Any]) -> set[Any]:
    """Outputs of which a backward pass takes log probabilities, to which all else is linear: with labels in between.

    Args:
        above: The nodes of the pass, down to those of outputs and of known losses.
        ends: The former.
    """
    users: dict[Any, list[Any]] = {}
    for node in above:
        for before, _ in node.next_functions if node not in ends else ():
            users.setdefault(before, []).append(node)
    found: set[Any] = set()
    for node in above:
        if node not in ends and node.name().startswith("LogSoftmax"):
            of = {end for end in ends if end in set(below([node], ends.__contains__))}
            made = set(_makes(node, users)) - {node}
            plain = only_moves(node.next_functions[0][0], ends) and all(map(_is_linear, made))
            if plain and not any(user.name().startswith("NllLoss") for user in made):
                found |= of
    return found


def _makes(node: Any, users: dict[Any, list[Any]]) -> Iterator[Any]:
    """A node, and all that gets something of it."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        yield node
        new = [user for user in users.get(node, ()) if user not in seen]
        seen.update(new)
        waiting += new


def _is_linear(node: Any) -> bool:
    """Whether what a node gives is linear in what it gets, or adds a constant, by its name."""
    name, arguments = node.name(), [before for before, _ in node.next_functions if before is not None]
    if name.startswith(("Mul", "Div")):
        return len(arguments) == 1
    return name.startswith((*_LINEAR, "Add", "Sub", "Rsub")) or only_moves(node, {*arguments})


def _is_core(node: Any, ends: Set[Any]) -> bool:
    """Whether a node gives log probabilities, or the output."""
    return bool(node.name().startswith(_CORES[:1])) or only_moves(node, ends)


def factor_by_value(terms: Terms, gradient: Tensor, value: Tensor) -> Tensor | None:
    r"""What each term is multiplied by in a number that is a multiple of a loss in natural parameters and nothing else.

    A term is :math:`A(z) - t \cdot z`. From the number :math:`R = w \sum_n (A(z_n) - t_n \cdot z_n)` and its gradient
    :math:`G_n = w (\nabla A(z_n) - t_n)` the targets t drop out of
    :math:`R - \sum_n G_n \cdot z_n = w \sum_n (A(z_n) - z_n \cdot \nabla A(z_n))`.

    Args:
        terms: With any targets.
        gradient: G.
        value: R.

    Returns:
        w, 0-d; ``None`` where rounding hides it.
    """
    z = terms.output.detach().double()
    own = torch.where(terms.mask, terms.values().detach().double(), 0).sum()
    slope, arrived = (terms.gradient().detach().double() * z), gradient.double() * z
    left, unit = value.double() - arrived.sum(), own - slope.sum()
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(gradient.dtype).eps)
    size = value.double().abs() + arrived.abs().sum()
    if not bool((unit != 0) & (16 * eps * size <= 4 * eps**0.5 * left.abs())):
        return None
    if not bool(16 * eps * (own.abs() + slope.abs().sum()) <= 4 * eps**0.5 * unit.abs()):
        return None
    return (left / unit).to(terms.total)
