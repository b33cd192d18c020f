"""Operators of one kind and shape as one operator on a stack, which applies them all in one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

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


def stacked(operators: Sequence[LinearOperator]) -> LinearOperator:
    """The operators as one on tensors ``(k, *in_shape)``, in memory of its own.

    Args:
        operators: Of one :func:`kind`, which is not ``None``; matrices are Gram matrices all or none.
    """
    return _rebuilt(operators[0], iter([torch.stack(each) for each in zip(*map(_leaves, operators), strict=True)]))


def unstacked(operator: LinearOperator) -> list[LinearOperator]:
    """The k operators of a stack ``(k, ...)``, each in memory of its own: Kronecker products of leaves, and leaves.

    A leaf is a dataclass, all tensors of which begin with the stack.
    """
    if isinstance(operator, Kronecker):
        return [Kronecker(*parts) for parts in zip(*map(unstacked, operator.factors), strict=True)]
    leaf: Any = operator
    stacks = {f.name: stack for f in fields(leaf) if isinstance(stack := getattr(leaf, f.name), Tensor)}
    each = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
    return [replace(leaf, **{n: x.clone() for n, x in zip(stacks, xs, strict=True)}) for xs in each]


def kind(operator: LinearOperator) -> tuple[object, ...] | None:
    """What operators must have in common to be stacked: structure, shapes, dtype, device; ``None`` for no stack."""
    match operator:
        case Dense(matrix=leaf, is_gram=vouched):
            return Dense, tuple(leaf.shape), leaf.dtype, leaf.device, vouched
        case Diagonal(values=leaf):
            return Diagonal, tuple(leaf.shape), leaf.dtype, leaf.device
        case Kronecker(factors=(_, _) as parts):
            inner = tuple(map(kind, parts))
            return None if None in inner or operator.stack else (Kronecker, *inner)
        case Eigen():
            basis = kind(operator.basis)
            return None if basis is None else (Eigen, basis)
    return None


def longest_side(operator: LinearOperator) -> int:
    """The largest number of columns of its matrices; 0 for an operator without any."""
    match operator:
        case Dense(matrix=matrix):
            return matrix.shape[-1]
        case Kronecker():
            return max(map(longest_side, operator.factors))
        case Eigen():
            return longest_side(operator.basis)
    return 0


def numbers(operator: LinearOperator) -> int:
    """How many numbers an operator that has a :func:`kind` consists of."""
    return sum(leaf.numel() for leaf in _leaves(operator))


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
            return Dense(next(leaves), operator.is_gram)
        case Diagonal():
            return Diagonal(next(leaves))
        case Kronecker():
            return Kronecker(*(_rebuilt(factor, leaves) for factor in operator.factors))
        case Eigen():
            return Eigen(_rebuilt(operator.basis, leaves), next(leaves))
    raise TypeError(f"{operator!r} cannot be stacked.")
