r"""Kronecker products: one factor per tensor dimension.

With tensors flattened row-major, ``(B (x) A) vec(G) = vec(B G A^T)``: the first factor acts on the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from solvers.operators.bases import Derived
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.linear_operator import LinearOperator, Scalar, Shape, answer
from solvers.operators.storable import storable
from solvers.outcome.arguments import instance


@storable
@dataclass(frozen=True, eq=False, repr=False, init=False)
class Kronecker(Derived):
    r"""``F_1 (x) F_2 (x) ... (x) F_k``, acting on tensors ``(*stack, n_1, ..., n_k)``, factor i on dimension i.

    Costs one matrix product per factor, :math:`O(\prod_j n_j \sum_i n_i)`, and memory for the factors only.

    >>> B, A, G = torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.ones(2, 2)
    >>> torch.equal(Kronecker(B, A) @ G, B @ G @ A.T)
    True
    >>> Kronecker(B, A).inverse(damping=0.5)
    Eigen(Kronecker(2x2, 2x2))

    Args:
        *factors: Matrices ``(*stack, n_i, n_i)`` or operators on ``(*stack, n_i)``; all with the same leading ``stack``
            (a stack is block-diagonal: one Kronecker product per group of a grouped convolution).

    Raises:
        ValueError: If factors are missing, or stacks or dtypes differ.
    """

    factors: tuple[LinearOperator, ...]

    def __init__(self, *factors: Tensor | LinearOperator) -> None:
        """Wrap matrices as Dense and check that the factors fit."""
        if not factors:
            raise ValueError("Kronecker needs at least one factor.")
        for factor in factors:
            instance("a factor", factor, (Tensor, LinearOperator), "a matrix or a LinearOperator")
        operators = tuple(factor if isinstance(factor, LinearOperator) else Dense(factor) for factor in factors)
        for op in operators:
            if not op.in_shape or op.in_shape[:-1] != op.out_shape[:-1]:
                raise ValueError(f"A factor acts on tensors (*stack, n); {op!r} acts on {op.in_shape}.")
        if len({(op.in_shape[:-1], op.dtype) for op in operators}) != 1:
            raise ValueError(
                f"The factors need the same stack and dtype, not "
                f"{', '.join(f'{op!r} ({op.dtype})' for op in operators)}."
            )
        object.__setattr__(self, "factors", operators)

    @classmethod
    def from_fields(cls, **fields: Any) -> Self:
        return cls(*fields["factors"])

    @property
    def stack(self) -> Shape:
        """Leading dimensions that all factors share: one Kronecker product each."""
        return self.factors[0].in_shape[:-1]

    @cached_property
    def in_shape(self) -> Shape:
        return (*self.stack, *(op.in_shape[-1] for op in self.factors))

    @cached_property
    def out_shape(self) -> Shape:
        return (*self.stack, *(op.out_shape[-1] for op in self.factors))

    @property
    def source(self) -> LinearOperator:
        return self.factors[0]

    @property
    def symmetric(self) -> bool:
        return all(op.symmetric for op in self.factors)

    def apply(self, x: Tensor) -> Tensor:
        match self.factors:
            case (Dense(matrix=left), Dense(matrix=right)) if left.ndim == right.ndim == 2:
                return left @ (x @ right.mT)  # the common cases, without bookkeeping
            case (Dense(matrix=left), Dense(matrix=right)) if left.ndim == right.ndim == x.ndim == 3:
                return torch.bmm(left, torch.bmm(x, right.mT))
        before: Shape = ()
        after = tuple(op.in_shape[-1] for op in self.factors)
        for factor in self.factors:
            after = after[1:]
            x = _apply_along(factor, x, before, after)
            before = (*before, factor.out_shape[-1])
        return x

    def apply_adjoint(self, x: Tensor) -> Tensor:
        match self.factors:
            case (Dense(matrix=left), Dense(matrix=right)) if left.ndim == right.ndim == 2:
                return left.mT @ (x @ right)
            case (Dense(matrix=left), Dense(matrix=right)) if left.ndim == right.ndim == x.ndim == 3:
                return torch.bmm(left.mT, torch.bmm(x, right))
        return self.adjoint().apply(x)

    def map(self, function: Callable[[LinearOperator], LinearOperator]) -> Kronecker:
        """The Kronecker product of ``function(factor)``."""
        return Kronecker(*map(function, self.factors))

    def adjoint(self) -> Kronecker:
        return self.map(lambda op: op.adjoint())

    def shift(self, lam: Scalar) -> LinearOperator:
        if len(self.factors) == 1:
            return Kronecker(self.factors[0].shift(lam))
        return super().shift(lam)

    def scale(self, scalar: Scalar) -> Kronecker:
        first, *others = self.factors
        return Kronecker(scalar * first, *others)

    def compose(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Kronecker) and len(other.factors) == len(self.factors) and other.stack == self.stack:
            return Kronecker(*(left @ right for left, right in zip(self.factors, other.factors, strict=True)))
        return super().compose(other)

    def to_dense(self) -> Tensor:
        if self.stack:
            return super().to_dense()
        return reduce(torch.kron, (op.to_dense().contiguous() for op in self.factors))

    def diagonal(self) -> Tensor:
        return outer(op.diagonal() for op in self.factors)

    def trace(self) -> Tensor:
        return reduce(torch.mul, (op.diagonal().sum(-1) for op in self.factors)).sum()

    def logdet(self) -> Tensor:
        sizes = [op.in_shape[-1] for op in self.factors]
        total = prod(sizes)
        return reduce(torch.add, (total // max(n, 1) * op.logdet() for n, op in zip(sizes, self.factors, strict=True)))

    def shifted_logdet(self, lam: Scalar) -> Tensor:
        return answer("bases", self).shift(lam).logdet()

    def frobenius_norm(self) -> Tensor:
        if not self.stack:
            return reduce(torch.mul, (op.frobenius_norm() for op in self.factors))
        return reduce(torch.mul, map(self._block_norms, self.factors)).square().sum().sqrt()

    def _block_norms(self, factor: LinearOperator) -> Tensor:
        """Frobenius norm of each block of a stack."""
        match factor:
            case Dense():
                return torch.linalg.matrix_norm(factor.matrix)
            case Diagonal():
                return torch.linalg.vector_norm(factor.values, dim=-1)
        raise self.no_exact("frobenius_norm", "solvers.frobenius_norm(op) for an estimate with its error")

    def __repr__(self) -> str:
        return f"Kronecker({', '.join(map(_short, self.factors))})"


def outer(vectors: Iterable[Tensor]) -> Tensor:
    """``(*stack, n_1), (*stack, n_2), ...`` to their outer product ``(*stack, n_1, n_2, ...)`` within each block."""
    return reduce(lambda left, right: left.unsqueeze(-1) * _lift(right, left), vectors)


def _lift(vector: Tensor, like: Tensor) -> Tensor:
    """``(*stack, n)`` to ``(*stack, 1, ..., 1, n)``, one dimension more than ``like``."""
    stack = vector.shape[:-1]
    return vector.reshape(*stack, *(1,) * (like.ndim - len(stack)), vector.shape[-1])


def _apply_along(factor: LinearOperator, x: Tensor, before: Shape, after: Shape) -> Tensor:
    """Apply an operator on ``(*stack, n)`` to the middle of ``x (*batch, *stack, *before, n, *after)``."""
    stack, n, m = factor.in_shape[:-1], factor.in_shape[-1], factor.out_shape[-1]
    batch = x.shape[: x.ndim - len(stack) - len(before) - 1 - len(after)]
    result = (*batch, *stack, *before, m, *after)
    x = x.reshape(prod(batch), *stack, prod(before), n, prod(after))
    if isinstance(factor, Diagonal):
        return (factor.values.unsqueeze(-1).unsqueeze(-3) * x).reshape(result)
    if isinstance(factor, Dense) and not (stack and batch):
        # Matrix products on the tensor as it lies. A batch of stacks would copy the matrices for each element.
        if not after:
            return (x.squeeze(-1) @ factor.matrix.mT).reshape(result)
        return (factor.matrix.unsqueeze(-3) @ x if stack else factor.matrix @ x).reshape(result)
    x = x.movedim((-3, -1), (1, 2))  # (batch, before, after, *stack, n)
    return factor.apply(x).movedim((1, 2), (-3, -1)).reshape(result)


def _short(factor: LinearOperator) -> str:
    """A factor inside the short form of a product."""
    return "x".join(map(str, factor.matrix.shape)) if isinstance(factor, Dense) else repr(factor)
