"""A loss that saw some rows of the model's output, in the places that they have there.

Slicing positions away, picking rows by a mask, and ignoring their targets are one loss: here the first two become the
third.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvature.losses.elementwise import ElementwiseTerms
from curvature.losses.sum_of_losses import BatchDim, ClassDim, JoinedTerms
from curvature.losses.terms import Terms


class PickedTerms(Terms):
    """The terms of a loss on picked rows, as terms of all rows of which the others do not count.

    Args:
        inner: The terms as the loss saw them.
        rows: For every term of them, ``(T,)``, its row among the ``N * R`` of the model's output.
        shape: ``(N, R)``: examples and positions there.
        whole: The model's output.
    """

    def __init__(self, inner: Terms, rows: Tensor, shape: tuple[int, int], whole: Tensor) -> None:
        mask = torch.zeros(prod(shape), dtype=torch.bool, device=rows.device)
        mask[rows] = inner.mask.reshape(-1)
        super().__init__(inner.output, inner.layout, mask.reshape(shape), inner.total, inner.reduction)
        self.inner, self.picked, self.whole = inner, rows, whole
        self.hessian_is_fisher = inner.hessian_is_fisher

    @property
    def shape(self) -> tuple[int, int, int]:
        n, r = self.mask.shape
        return n, r, self.inner.shape[2]

    @property
    def columns(self) -> int:
        return self.inner.columns

    @property
    def rank(self) -> int:
        return self.inner.rank

    def rows(self, x: Tensor) -> Tensor:
        seen = self.inner.rows(x).flatten(-3, -2)  # (..., T, C)
        out = seen.new_zeros(*seen.shape[:-2], self.mask.numel(), seen.shape[-1])
        out[..., self.picked, :] = seen
        return out.reshape(*seen.shape[:-2], *self.mask.shape, seen.shape[-1])

    def unrows(self, rows: Tensor) -> Tensor:
        seen = rows.flatten(-3, -2)[..., self.picked, :]
        return self.inner.unrows(seen.reshape(*rows.shape[:-3], *self.inner.shape[:2], rows.shape[-1]))

    def values(self) -> Tensor:
        seen = self.inner.values().reshape(-1)
        out = seen.new_zeros(self.mask.numel())
        out[self.picked] = seen
        return out.reshape(self.mask.shape)

    def gradient(self) -> Tensor:
        return self.inner.gradient()

    def hessian_product(self, v: Tensor) -> Tensor:
        return self.inner.hessian_product(v)

    def sqrt_column(self, c: int) -> Tensor:
        return self.inner.sqrt_column(c)

    def fisher(self, strict: bool = True) -> PickedTerms:
        """Of the rows that the loss saw, see :meth:`Terms.fisher`."""
        other = copy.copy(self)
        other.inner = self.inner.fisher(strict)
        other.hessian_is_fisher = other.inner.hessian_is_fisher
        return other

    def only(self, counts: Tensor) -> PickedTerms:
        other = copy.copy(self)
        other.mask = self.mask & counts
        other.inner = self.inner.only(other.mask.reshape(-1)[self.picked].reshape(self.inner.mask.shape))
        return other

    def root(self, start: int, stop: int) -> Tensor:
        return self.inner.root(start, stop)

    def beyond_output(self) -> Tensor | None:
        return self.inner.beyond_output()

    def refuse_undefined(self) -> None:
        self.inner.refuse_undefined()

    def indefinite(self) -> bool:
        return self.inner.indefinite()

    @property
    def loss_name(self) -> str:
        return self.inner.loss_name

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.inner.sample(generator)


class ExampleTerms(PickedTerms):
    """Terms of a loss whose examples lie along an axis that the caller named."""


class GatheredTerms(JoinedTerms):
    """The terms of several calls of a loss on rows picked from one output, each with a weight.

    Args:
        parts: The terms of each call, and what their sum is multiplied by.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, PickedTerms]]) -> None:
        super().__init__(dict(enumerate(parts)), parts[0][1].reduction)
        self.whole = parts[0][1].whole


class ApartTerms(JoinedTerms):
    """The terms of several calls of a loss on outputs of their own, such as those of a list, each with a weight.

    Args:
        parts: As for :class:`GatheredTerms`.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Terms]]) -> None:
        super().__init__(dict(enumerate(parts)), parts[0][1].reduction)


def by_examples(terms: Terms, sizes: tuple[int, ...], axis: int, whole: Tensor) -> ExampleTerms:
    """Terms sorted by their examples.

    Args:
        terms: Terms on all rows of the output, in their order; or on picked ones.
        sizes: Sizes of the axes of the output that count its rows.
        axis: Which of these counts the examples.
        whole: The output.
    """
    number = prod(sizes)
    places = torch.arange(number, device=whole.device)
    sorted_places = torch.empty_like(places)
    sorted_places[places.reshape(sizes).movedim(axis, 0).reshape(-1)] = places
    inner, rows = (terms.inner, terms.picked) if isinstance(terms, PickedTerms) else (terms, places)
    return ExampleTerms(inner, sorted_places[rows], (sizes[axis], number // sizes[axis]), whole)


def along(terms: Terms, batch_dim: BatchDim, class_dim: ClassDim = None) -> Terms:
    """Terms on all of an output, or on the outputs of a sum of losses, sorted by the examples along an axis of it.

    They are what they would be if the examples were moved to the front: where a loss compares entry by entry, the last
    of the other axes is the class axis.

    Args:
        terms: The terms.
        batch_dim: The axis; by key for a sum of losses.
        class_dim: The class axis, if the caller named it.

    Raises:
        TypeError: If axes are given by key, and the loss is no sum of losses.
        ValueError: If the output has no such axis, it is the class axis, or the sum has no loss of that key.
    """
    if batch_dim is None:
        return terms
    if isinstance(terms, JoinedTerms):
        parts = terms.parts
        return terms.change(lambda key, part: along(part, axis_of(batch_dim, key, parts), axis_of(class_dim, key)))
    if isinstance(batch_dim, Mapping):
        raise TypeError(f"batch_dim={dict(batch_dim)} is for sums of losses; pass one axis.")
    shape = terms.layout.output_shape
    axis = checked_axis(batch_dim, len(shape))
    if class_dim is None and isinstance(terms, ElementwiseTerms) and (axis,) == terms.layout.class_axes and axis:
        terms = terms.along(axis - 1)
    classes = terms.layout.class_axes
    if axis in classes:
        raise ValueError(
            f"batch_dim={batch_dim} is the class axis of the output, of shape {tuple(shape)}; name the axis that "
            "counts the examples."
        )
    axes = [a for a in range(len(shape)) if a not in classes]
    return by_examples(terms, tuple(shape[a] for a in axes), axes.index(axis), terms.output)


def axis_of(axis: BatchDim | ClassDim, key: Any, keys: Container[Any] | None = None) -> int | None:
    """The axis that is named for one loss of a sum, if there is one.

    Raises:
        ValueError: If one is named for a loss that is not among ``keys``.
    """
    if not isinstance(axis, Mapping):
        return axis
    if keys is not None and (unknown := [name for name in axis if name not in keys]):
        raise ValueError(f"batch_dim names the loss {unknown[0]!r}, which the sum does not have.")
    return axis.get(key)


def checked_axis(batch_dim: int, rank: int) -> int:
    """A named axis of an output of some rank, counted from the front.

    Raises:
        ValueError: If there is none of that number.
    """
    if not -rank <= batch_dim < rank:
        raise ValueError(f"batch_dim={batch_dim} is no axis of an output with {rank} axes.")
    return batch_dim % rank


def picked_rows(
    pull: Callable[[Tensor], Tensor | None], terms: Terms, whole: Tensor
) -> tuple[Tensor, tuple[int, ...]] | None:
    """Which rows of a model's output the terms of a loss are on.

    What the loss saw may be a slice of the output, its rows in another order, or those that a mask picks. Numbers sent
    back from the terms tell: they must arrive unchanged, each at a row of its own.

    Args:
        pull: Takes a tensor like the one the loss saw back to the output; ``None`` where nothing arrives.
        terms: The terms of the loss.
        whole: The model's output.

    Returns:
        For every term its row, ``(T,)``, among the rows of the output, and the sizes of the axes that count these;
        ``None`` where what the loss saw is something else, such as a mean over positions.
    """
    n, r, c = terms.shape
    number = n * r
    tags = torch.arange(1, number + 1, device=terms.output.device)
    if not number:
        return None
    base = 128  # exact in bfloat16
    found, unit = torch.zeros_like(whole, dtype=torch.float64), 1
    while unit <= number:
        digit = (tags // unit % base).to(terms.output.dtype)
        sent = terms.unrows(digit.reshape(n, r, 1).expand(n, r, c))
        arrived = pull(sent.contiguous())
        if arrived is None or arrived.shape != whole.shape:
            return None
        found = found + arrived.detach().to(torch.float64) * unit
        unit *= base
    axes: list[int | None] = [axis for axis in reversed(range(found.dim())) if found.shape[axis] == c]
    for axis in axes or [None] if c == 1 else axes:
        one = found if axis is None else found.select(axis, 0)
        if axis is not None and not bool((found == one.unsqueeze(axis)).all()):
            continue
        flat = one.reshape(-1)
        rows = torch.nonzero(flat).squeeze(-1)
        order = flat[rows].round().long() - 1
        whole_numbers = len(rows) == number and bool((flat[rows] == order + 1).all())
        if whole_numbers and torch.equal(order.sort().values, tags - 1):
            place = torch.empty_like(rows)
            place[order] = rows
            return place, tuple(one.shape)
    return None
