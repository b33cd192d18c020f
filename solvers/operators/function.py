"""A matrix known by its products."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from solvers.operators.bases import Free
from solvers.operators.linear_operator import Shape
from solvers.outcome.arguments import device as checked_device
from solvers.outcome.arguments import flag, function, instance, shape
from solvers.outcome.errors import StructureError
from solvers.precision import Autocast

if TYPE_CHECKING:
    import scipy.sparse.linalg

Product = Callable[[Tensor], Tensor]


class Function(Free):
    """A linear map given as a function, known by its products alone.

    Args:
        matvec: Maps ``(*batch, *in_shape)`` to ``(*batch, *out_shape)``; linear, which is not checked. It is called
            within the autocast regions in which the operator is made.
        in_shape: Shape it acts on.
        out_shape: Shape it returns; ``in_shape`` if left out.
        rmatvec: The adjoint's product. Not needed for a symmetric map.
        symmetric: Whether the map equals its adjoint.
        dtype: Type of its input and output.
        device: Where it runs.
        batched: False if ``matvec`` takes one tensor at a time; batches are then looped over.

    Raises:
        ValueError: If ``symmetric`` but not square.
    """

    def __init__(
        self,
        matvec: Product,
        in_shape: Shape,
        out_shape: Shape | None = None,
        *,
        rmatvec: Product | None = None,
        symmetric: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batched: bool = True,
    ) -> None:
        function("matvec", matvec)
        function("rmatvec", rmatvec, optional=True)
        flag("symmetric", symmetric)
        flag("batched", batched)
        instance("dtype", dtype, torch.dtype, "a torch.dtype", optional=True)
        super().__init__(
            shape("in_shape", in_shape),
            shape("out_shape", in_shape if out_shape is None else out_shape),
            torch.get_default_dtype() if dtype is None else dtype,
            checked_device("device", "cpu" if device is None else device),
        )
        here = Autocast()  # a function that runs a model is that of the region where the operator is made
        self.matvec, self.rmatvec = here.around(matvec), None if rmatvec is None else here.around(rmatvec)
        self._symmetric, self.batched = symmetric, batched
        if symmetric and self.in_shape != self.out_shape:
            raise ValueError(f"A symmetric map is square, but this one goes from {in_shape} to {out_shape}.")

    @property
    def symmetric(self) -> bool:
        return self._symmetric

    def apply(self, x: Tensor) -> Tensor:
        if self.batched:
            return self.matvec(x)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        rows = [self.matvec(row) for row in x.reshape(prod(batch), *self.in_shape)]
        return torch.stack(rows).reshape(*batch, *self.out_shape) if rows else x.new_zeros(*batch, *self.out_shape)

    def adjoint(self) -> Function:
        if self.symmetric:
            return self
        if self.rmatvec is None:
            raise StructureError(f"{self!r} has no adjoint: give rmatvec=, or symmetric=True if it is its own.")
        return Function(
            self.rmatvec,
            self.out_shape,
            self.in_shape,
            rmatvec=self.matvec,
            dtype=self.dtype,
            device=self.device,
            batched=self.batched,
        )

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Function:
        if dtype in (None, self.dtype) and device in (None, self.device):
            return self
        raise StructureError(f"{self!r} cannot be converted: a function runs where and as it was written.")


def from_scipy(
    op: scipy.sparse.linalg.LinearOperator,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Function:
    """A SciPy operator ``(m, n)`` as one that acts on tensors ``(n,)``; products run in SciPy, on the host."""
    if not (hasattr(op, "matmat") and hasattr(op, "rmatmat")):
        raise TypeError(f"op is a scipy.sparse.linalg.LinearOperator, not {op!r}; aslinearoperator makes one.")

    instance("dtype", dtype, torch.dtype, "a torch.dtype")

    def product(matmat: Callable) -> Product:
        def apply(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).detach().cpu().numpy()
            y = torch.as_tensor(matmat(rows.T).T, dtype=dtype, device=x.device)
            return y.reshape(*x.shape[:-1], y.shape[-1])

        return apply

    return Function(
        product(op.matmat),
        (op.shape[1],),
        (op.shape[0],),
        rmatvec=product(op.rmatmat),
        symmetric=symmetric,
        dtype=dtype,
        device=device,
    )
