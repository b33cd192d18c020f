"""Operators of one kind and shape as one operator on a stack, which applies them all in one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.eigen import Eigen
from solvers.operators.kronecker import Kronecker
from solvers.operators.linear_operator import LinearOperator


class Stacked:
    """Copies of k operators in one on tensors ``(k, *in_shape)``, kept up to date one by one.

    >>> twice, thrice = Dense(2 * torch.eye(2)), Dense(3 * torch.eye(2))
    >>> Stacked([twice, thrice]).operator @ torch.ones(2, 2)
    tensor([[2., 2.],
            [3., 3.]])

    Args:
        operators: Of one :func:`kind`, which is not ``None``.
    """

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self._members: list[LinearOperator | None] = list(operators)
        self._leaves = [torch.stack(each) for each in zip(*map(_leaves, operators), strict=True)]
        self.operator = _rebuilt(operators[0], iter(self._leaves))

    def take(self, operators: Sequence[LinearOperator]) -> None:
        """Copy those of the operators, all of the same kind as before, that are others than before."""
        for i, operator in enumerate(operators):
            if self._members[i] is not operator:
                self._members[i] = None  # half of it, if something interrupts
                for leaf, value in zip(self._leaves, _leaves(operator), strict=True):
                    leaf[i] = value
                self._members[i] = operator


def kind(operator: LinearOperator) -> tuple[object, ...] | None:
    """What operators must have in common to be stacked: structure, shapes, dtype, device; ``None`` for no stack."""
    match operator:
        case Dense(matrix=leaf) | Diagonal(values=leaf):
            return type(operator), tuple(leaf.shape), leaf.dtype, leaf.device
        case Kronecker(factors=(_, _) as parts):
            inner = tuple(map(kind, parts))
            return None if None in inner or operator.stack else (Kronecker, *inner)
        case Eigen():
            basis = kind(operator.basis)
            return None if basis is None else (Eigen, basis)
    return None


def _leaves(operator: LinearOperator) -> list[Tensor]:
    match operator:
        case Dense():
            return [operator.matrix]
        case Diagonal():
            return [operator.values]
        case Kronecker():
            return [leaf for factor in operator.factors for leaf in _leaves(factor)]
        case Eigen():
            return [*_leaves(operator.basis), operator.values]
    raise TypeError(f"{operator!r} cannot be stacked.")


def _rebuilt(operator: LinearOperator, leaves: Iterator[Tensor]) -> LinearOperator:
    """The operator with other numbers."""
    match operator:
        case Dense():
            return Dense(next(leaves))
        case Diagonal():
            return Diagonal(next(leaves))
        case Kronecker():
            return Kronecker(*(_rebuilt(factor, leaves) for factor in operator.factors))
        case Eigen():
            return Eigen(_rebuilt(operator.basis, leaves), next(leaves))
    raise TypeError(f"{operator!r} cannot be stacked.")
