"""The blocks of an optimizer as the processes see them: kept by some, refreshed by these, and published to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature.structures.estimator import CurvatureEstimator
from solvers import LinearOperator


class Kept(Protocol):
    """A block, which a process keeps or leaves to others."""

    estimator: CurvatureEstimator
    inverse: LinearOperator | None
    elsewhere: int | None
    unseen: int
    failures: int

    @property
    def cost(self) -> int | None:
        """Cost of its refresh, ``None`` before it has an inverse."""
        ...

    def mark(self) -> Any:
        """Inverse and estimate as they are now."""
        ...

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since a mark."""
        ...

    def commit(self, ema: float) -> None:
        """Fold the statistics of the step into the estimate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        ...

    def failed(self, error: Exception) -> None:
        """Count a refresh that failed."""
        ...

    def __matmul__(self, gradient: Tensor) -> Tensor:
        """``P g`` for a gradient in block form."""
        ...


@dataclass(frozen=True)
class Refreshing:
    """A refresh that is due.

    Attributes:
        name: Of the block.
        kept: The block.
        basis: Whether decompositions are redone.
        attempt: Does it; whether anything changed.
    """

    name: str
    kept: Kept
    basis: bool
    attempt: Callable[[], bool]


@dataclass(frozen=True)
class Published:
    """A tensor that a block publishes, as it lies in memory: products of other layouts round otherwise.

    Attributes:
        key: Its name.
        shape: Its shape.
        stride: Its strides.
        dtype: Its dtype.
    """

    key: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Published:
        """That of a tensor."""
        return cls(key, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of this shape."""
        return tensor.new_empty_strided(self.shape, self.stride).copy_(tensor)
