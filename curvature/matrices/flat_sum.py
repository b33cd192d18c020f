"""Where the products of batches with a block of vectors are added up, in flat vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.model.parameters import Parameters
from solvers.outcome.finite import is_finite
from solvers.pages import fresh

#: Which vectors of a block: one, without an axis for it, or several.
Part = int | slice


class FlatSum:
    """Sums of products over the batches, ``(k, P)``, and whether they are finite.

    The product of the only batch is divided and looked at as it is written, while it is in a cache: three passes over
    memory become one.

    Args:
        parameters: Those along the flat vectors.
        number: k.
        dtype: Type of the sums.
        device: Where they lie.

    Attributes:
        out: The sums; undefined before anything was added.
        empty: Whether no batch was added.
    """

    def __init__(self, parameters: Parameters, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.out = fresh(number, parameters.size, dtype=dtype, device=device)
        self.empty = True
        self._places = list(parameters.unflatten(self.out).values())
        self._finite: bool | None = None

    def add(self, part: Part, product: Sequence[Tensor]) -> None:
        """Add the product of a batch with some vectors, one tensor for each parameter."""
        write = torch._foreach_copy_ if self.empty else torch._foreach_add_
        write([place[part] for place in self._places], list(product))

    def put(self, part: Part, product: Sequence[Tensor], divisor: Tensor | float) -> None:
        """Take the product of the only batch with some vectors, and divide it."""
        divided = not isinstance(divisor, float) or divisor != 1.0
        with torch._C.DisableTorchFunction():  # these are no calls of the user's
            for whole, piece in zip(self._places, product, strict=True):
                place = whole[part]
                if divided and piece.dtype == place.dtype:
                    torch.div(piece, divisor, out=place)
                    continue
                place.copy_(piece)
                if divided:
                    place /= divisor
        if self.out.device.type == "cpu":  # others would be waited for each time
            self._finite = self._finite is not False and is_finite(self.out[part])

    def next_batch(self) -> None:
        """All vectors had the product of a batch: those of the next are added to it."""
        self.empty = False

    def divide(self, divisor: Tensor | float) -> None:
        """Divide what was added."""
        if not isinstance(divisor, float) or divisor != 1.0:
            self.out /= divisor

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite; waits for the device."""
        return is_finite(self.out) if self._finite is None else self._finite
