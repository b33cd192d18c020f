"""Squared errors that are written out, ``((z - y) ** 2).mean()``, in the graph of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from curvature.model.graph_nodes import (
    COPIES,
    SHAPES,
    below,
    chain,
    cuts_columns,
    entries_of_first,
    inputs_of,
    name_of,
    shape_of,
)

#: Beginnings of the names of nodes that hand numbers on as they are, or the other way round along an axis: rows stay
#: whole.
_PLAIN = (*COPIES, *SHAPES, "Flip")
#: Of products of two vectors that are added up.
_DOTS = ("Dot", "Vdot")
#: Of those that subtract.
_DIFFERENCES = ("Sub", "Rsub", "Add")


@dataclass(frozen=True)
class Square:
    """Squares of an output, less something, of which each has one weight.

    Attributes:
        node: Of the squares.
        weight: What each is multiplied by in what the backward pass was called on; ``None`` where numbers that the
            graph does not show come in.
        alone: Whether there is nothing else in it.
    """

    node: Any
    weight: float | None
    alone: bool


def squares(root: Tensor, ends: Set[Any]) -> list[Square]:
    """The squared errors that a number consists of, of outputs that end at some nodes.

    Squares with weights of their own, and other functions of an output, are none.
    """
    return list(_below(root.grad_fn, ends, Square(None, 1.0, True))) if root.numel() == 1 else []


def _below(node: Any, ends: Set[Any], so_far: Square) -> Iterator[Square]:
    if node is None or node in ends:
        return
    name, arguments = name_of(node), inputs_of(node)
    shape, weight, alone = shape_of(node), so_far.weight, so_far.alone
    power = _is_power(node)
    if power or (name.startswith(("Mul", *_DOTS)) and len(arguments) == 2):
        # A product of two differences has the curvature of a square, but not its value.
        told = power or arguments[0] is arguments[1] or weight is not None
        if told and all(_is_difference(argument, ends) for argument in arguments):
            yield Square(node, weight, alone)
    elif name.startswith("Mean"):
        ratio = prod(shape) / max(1, node._saved_self_sym_numel)
        yield from _below(arguments[0], ends, Square(node, None if weight is None else weight * ratio, alone))
    elif name.startswith(("Sum", *_PLAIN)):
        yield from _below(arguments[0], ends, so_far)
    elif name.startswith(("Mul", "Div")) and prod(shape) == len(arguments) == 1:
        yield from _below(arguments[0], ends, Square(node, None, alone))
    elif name.startswith(("Add", "Stack")):
        plain = getattr(node, "_saved_alpha", 1) == 1
        for argument in arguments:
            several = len(node.next_functions) > 1
            yield from _below(argument, ends, Square(node, weight if plain else None, alone and not several))


def square_of(node: Any, ends: Set[Any]) -> Any:
    """The output of which a node makes squared errors, less something else than the model gave, or ``None``."""
    name, arguments = name_of(node), inputs_of(node)
    product = name.startswith(("Mul", *_DOTS)) and len(arguments) == 2
    alone = len(arguments) == 1 and (name.startswith("MseLossBackward") or _is_power(node))
    if node in ends or "BackwardBackward" in name or not (product or alone):
        return None
    if not all(_is_difference(argument, ends) for argument in arguments):
        return None
    return next(end for end in below(arguments, ends) if end in ends)


def tells_no_value(node: Any) -> bool:
    """Whether a product of two differences is maybe of different targets: it has the curvature of a square alone."""
    first, *second = inputs_of(node)
    return bool(second) and second[0] is not first


def _is_power(node: Any) -> bool:
    """Whether a node squares, as far as is known: an exponent that is a tensor may be gone, or have several entries."""
    try:
        return bool(name_of(node).startswith("Pow") and node._saved_exponent == 2)
    except RuntimeError:
        return False


def _is_difference(start: Any, ends: Set[Any]) -> bool:
    """Whether something is an output, or rows picked from it once, less what does not depend on the model."""
    picked = False
    for node, _ in chain(start):
        if node in ends:
            return True
        name = name_of(node)
        if not name.startswith((*_DIFFERENCES, *_PLAIN, "Slice", "Select")):
            return False
        if name.startswith(_DIFFERENCES) and entries_of_first(node) != prod(shape_of(node)):
            return False  # entries count several times
        if name.startswith(("Slice", "Select")):
            picked = True
            if not _picks_rows(node):
                return False
        if getattr(node, "_saved_alpha", 1) != 1 or (picked and name.startswith(SHAPES)):
            return False  # moved before they are picked, the numbers of a row may be any
    return False


def _picks_rows(node: Any) -> bool:
    """Whether the last axis, along which the terms of a squared error lie, is left whole."""
    whole = node.name().startswith("Slice") and shape_of(node)[-1] == node._saved_self_sym_sizes[-1]
    return whole or not cuts_columns(node)
