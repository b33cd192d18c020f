"""Diagonal prior precisions: one number for all parameters, for each tensor, or for each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.model.arguments import Check
from solvers.outcome.arguments import number, real_tensor


def number_or_tensor(**limits: Any) -> Check:
    """A number in a range, or a real tensor of such; shapes are looked at where the parameters are known."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return number(name, value, **limits)
        for end in (value.min(), value.max()) if real_tensor(name, value).numel() else ():
            number(name, float(end), **limits)
        return value

    return check


@dataclass(frozen=True, eq=False)
class Prior:
    """A diagonal prior precision: one number, one per parameter tensor, or one per parameter.

    Attributes:
        values: The G numbers ``(G,)``, float64.
        sizes: How many parameters each of them holds for; ``None`` for one each.
    """

    values: Tensor
    sizes: tuple[int, ...] | None

    @classmethod
    def of(cls, value: float | Tensor, tensors: tuple[int, ...], device: torch.device) -> Prior:
        """Read the user's argument, as laplace-torch does.

        Args:
            value: A number, ``(tensors,)`` or ``(P,)``.
            tensors: Sizes of the parameter tensors.
            device: Where the numbers go.

        Raises:
            ValueError: If the shape fits none of these, or a number is not positive.
        """
        values = torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(-1)
        total = sum(tensors)
        if len(values) not in (1, len(tensors), total) or torch.as_tensor(value).dim() > 1:
            raise ValueError(
                f"prior_precision is one number, one per parameter tensor ({len(tensors)}) or one per parameter "
                f"({total}), not of shape {tuple(torch.as_tensor(value).shape)}."
            )
        if not bool(((values > 0) & values.isfinite()).all()):
            raise ValueError(f"prior_precision is positive and finite, not {float(values.min()):g} at its smallest.")
        sizes = (total,) if len(values) == 1 else None if len(values) == total else tensors
        return cls(values, sizes)

    def expand(self) -> Tensor:
        """One number per parameter, ``(P,)``."""
        if self.sizes is None:
            return self.values
        return self.values.repeat_interleave(torch.tensor(self.sizes, device=self.values.device))

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the parameters of each number, ``(*batch, P)`` to ``(*batch, G)``, float64."""
        if self.sizes is None:
            return x.double()
        return torch.stack([part.sum(-1, dtype=torch.float64) for part in x.split(self.sizes, -1)], -1)
