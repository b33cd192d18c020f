"""Ways to damp a curvature matrix: operator in, operator out. Damping is in units of the matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import reduce
from math import inf
from typing import ClassVar, Self

import torch
from torch import Tensor

from solvers.operators.block_diagonal import BlockDiagonal
from solvers.operators.compositions import Shifted
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal
from solvers.operators.dispatch import open_to_rules, rule
from solvers.operators.kronecker import Kronecker
from solvers.operators.linear_operator import LinearOperator, Scalar
from solvers.outcome.arguments import number


class Damping(ABC):
    """Maps an operator to a damped one; frozen.

    Attributes:
        relative: True where the strength is a fraction of the operator's size, False where it is in its units.
    """

    relative: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, op: LinearOperator) -> LinearOperator:
        """The damped operator."""

    def deferred(self, op: LinearOperator) -> LinearOperator:
        """The damped operator, with shifts of matrices left to the solver that reads them where that saves a copy."""
        return self(op)

    def serves_stack(self, op: LinearOperator) -> bool:
        """Whether operators like this one can be damped in a stack (:meth:`in_stack`); a class says so for itself."""
        return False

    def in_stack(self, op: LinearOperator, floor: float = 0.0) -> LinearOperator:
        """Damp the operators of a stack ``(k, ...)``, each as if by itself, in the memory of the stack.

        Args:
            op: A stack (:func:`solvers.operators.stacked.stacked`) of operators that are served, to which nobody else
                refers.
            floor: Least strength, as a fraction of the mean eigenvalue of each operator.
        """
        raise TypeError(f"{self!r} damps no operators in a stack.")

    @property
    @abstractmethod
    def strength(self) -> Scalar:
        """The strength of the damping, which schedules and adaptation set."""

    @abstractmethod
    def with_strength(self, value: Scalar) -> Self:
        """The same damping with another strength."""


@dataclass(frozen=True)
class AbsoluteDamping(Damping):
    """A damping by ``lam >= 0``, a number or a 0-d tensor in units of the operator."""

    lam: Scalar

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _check(self.lam)

    @property
    def strength(self) -> Scalar:
        return self.lam

    def with_strength(self, value: Scalar) -> Self:
        return replace(self, lam=value)


@dataclass(frozen=True)
class Tikhonov(AbsoluteDamping):
    """Exactly ``C + lam I``; symbolic where the structure cannot absorb it.

    Args:
        lam: Shift >= 0, a number or a 0-d tensor, in units of C (a GGN doubles when the loss doubles).

    Raises:
        ValueError: If ``lam`` is negative, not finite, or no scalar.
    """

    def __call__(self, op: LinearOperator) -> LinearOperator:
        """``op + lam I``; a plain zero leaves ``op`` as it is."""
        return op if _is_plain_zero(self.lam) else op.shift(self.lam)

    def serves_stack(self, op: LinearOperator) -> bool:
        return type(self) is Tikhonov and isinstance(op, (Dense, Diagonal))

    def in_stack(self, op: LinearOperator, floor: float = 0.0) -> LinearOperator:
        return _shift_stack(op, _strengths(op, self.lam, floor))


@dataclass(frozen=True)
class FactoredTikhonov(AbsoluteDamping):
    r"""Damp each Kronecker factor so that the product stays a Kronecker product.

    .. math:: (B + \tfrac{1}{\pi}\sqrt{\lambda}\, I) \otimes (A + \pi\sqrt{\lambda}\, I), \quad
        \pi^2 = \frac{\operatorname{tr} A / d_A}{\operatorname{tr} B / d_B}

    and for k factors :math:`F_i + \lambda^{1/k} (t_i / \bar t)\, I` with mean traces
    :math:`t_i = \operatorname{tr} F_i / d_i` and their geometric mean :math:`\bar t`, for each group of a stack.
    Where a mean trace is not positive or not finite, all ratios are one. Approximates ``C + lam I``: exact on operators
    without Kronecker structure and on products of one factor; otherwise it adds the cross terms
    ``sqrt(lam) (pi B (x) I + I (x) A / pi)``. For the exact inverse use :class:`Tikhonov` with :class:`~solvers.Eigh`.

    Args:
        lam: Shift >= 0, a number or a 0-d tensor, in units of C.

    Raises:
        ValueError: If ``lam`` is negative, not finite, or no scalar.

    References:
        Martens and Grosse (2015), section 6.3, https://arxiv.org/abs/1503.05671
    """

    def __call__(self, op: LinearOperator) -> LinearOperator:
        """Damp Kronecker products by factor and block-diagonal operators by block."""
        return op if _is_plain_zero(self.lam) else factored_tikhonov(op, self.lam)

    def deferred(self, op: LinearOperator) -> LinearOperator:
        if _is_plain_zero(self.lam) or not (isinstance(op, Kronecker) and not op.stack):
            return self(op)
        if type(self) is not FactoredTikhonov or not all(isinstance(factor, Dense) for factor in op.factors):
            return self(op)
        return Kronecker(*(Shifted(f, s) for f, s in zip(op.factors, factor_shifts(op, self.lam), strict=True)))

    def serves_stack(self, op: LinearOperator) -> bool:
        leaves = op.factors if isinstance(op, Kronecker) else (op,)
        return type(self) is FactoredTikhonov and all(isinstance(leaf, (Dense, Diagonal)) for leaf in leaves)

    def in_stack(self, op: LinearOperator, floor: float = 0.0) -> LinearOperator:
        lam = _strengths(op, self.lam, floor)
        if _is_plain_zero(lam) or not isinstance(op, Kronecker):
            return _shift_stack(op, lam)
        return Kronecker(*(_shift_stack(f, shift) for f, shift in zip(op.factors, factor_shifts(op, lam), strict=True)))


@dataclass(frozen=True)
class RelativeTikhonov(Damping):
    r"""Shift every block by a fraction of its mean eigenvalue.

    .. math:: C_b + \varphi\, \tfrac{\operatorname{tr} C_b}{n_b}\, I

    so that the damping follows the scale of the loss and of each layer. Block-diagonal operators are damped block by
    block, all others as one. Needs an exact trace from the structure.

    Args:
        fraction: :math:`\varphi \ge 0`, a number or a 0-d tensor, without unit.

    Raises:
        ValueError: If ``fraction`` is negative, not finite, or no scalar.

    References:
        Grosse et al. (2023), "Studying large language model generalization with influence functions", https://arxiv.org/abs/2308.03296
    """

    fraction: Scalar = 0.1

    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the arguments."""
        _check(self.fraction)

    @property
    def strength(self) -> Scalar:
        return self.fraction

    def with_strength(self, value: Scalar) -> Self:
        return replace(self, fraction=value)

    def __call__(self, op: LinearOperator) -> LinearOperator:
        """Damp block-diagonal operators by block."""
        return op if _is_plain_zero(self.fraction) else relative_tikhonov(op, self.fraction)


@open_to_rules
def factored_tikhonov(op: LinearOperator, lam: Scalar) -> LinearOperator:
    """``op`` damped as :class:`FactoredTikhonov` says: shifted, where its class has no rule."""
    return op.shift(lam)


@rule(factored_tikhonov, BlockDiagonal)
def _factored_blocks(op: BlockDiagonal, lam: Scalar) -> BlockDiagonal:
    return op.map(lambda block: factored_tikhonov(block, lam))


@rule(factored_tikhonov, Kronecker)
def _factored_factors(op: Kronecker, lam: Scalar) -> Kronecker:
    return Kronecker(*(_shift_blocks(f, shift) for f, shift in zip(op.factors, factor_shifts(op, lam), strict=True)))


def factor_shifts(op: Kronecker, lam: Scalar) -> list[Tensor]:
    """What :class:`FactoredTikhonov` adds to each factor, ``(*stack,)``; ``lam`` is one number or ``(*stack,)``."""
    means = [factor.diagonal().mean(-1) for factor in op.factors]  # each (*stack,)
    stacked = torch.stack(means)
    usable = (torch.isfinite(stacked) & (stacked > 0)).all(0)
    logs = torch.where(usable, stacked, 1).log()
    ratios = (logs - logs.mean(0)).exp()  # mean traces over their geometric mean, free of overflow
    root = lam ** (1 / len(op.factors))
    return [root * ratio for ratio in ratios]


def _strengths(op: LinearOperator, lam: Scalar, floor: float) -> Scalar:
    """A damping of all operators of a stack ``(k, ...)``; one for each, ``(k,)``, where none is to be below a floor."""
    if not floor:
        return lam
    least = _traces(op).mul_(floor).div_(max(1, op.shape[1] // op.in_shape[0]))
    return torch.maximum(torch.as_tensor(lam, dtype=least.dtype, device=least.device), least)


def _traces(op: LinearOperator) -> Tensor:
    """The trace of each operator of a stack ``(k, ...)``, ``(k,)``."""
    if isinstance(op, Kronecker):
        return reduce(torch.mul, map(_traces, op.factors))
    return op.diagonal().flatten(1).sum(1)


@open_to_rules
def relative_tikhonov(op: LinearOperator, fraction: Scalar) -> LinearOperator:
    """``op`` damped as :class:`RelativeTikhonov` says: as one, where its class has no rule."""
    return op.shift(fraction * op.trace() / op.shape[1])


@rule(relative_tikhonov, BlockDiagonal)
def _relative_blocks(op: BlockDiagonal, fraction: Scalar) -> BlockDiagonal:
    return op.map(lambda block: relative_tikhonov(block, fraction))


def _shift_blocks(factor: LinearOperator, shift: Tensor) -> LinearOperator:
    """Shift each block of a stacked factor by its own number ``(*stack,)``."""
    if isinstance(factor, Dense):
        return factor.add_diagonal(shift)
    return factor.shift(shift if shift.ndim == 0 else shift.unsqueeze(-1))


def _shift_stack(op: LinearOperator, lam: Scalar) -> LinearOperator:
    """A stack of leaves plus one number for all, or one for each ``(k,)``, in place; a plain zero changes nothing."""
    if _is_plain_zero(lam):
        return op
    diagonal = op.diagonal()  # (k, ...), a view
    diagonal += lam.view(-1, *(1,) * (diagonal.ndim - 1)) if isinstance(lam, Tensor) and lam.ndim else lam
    return op


def _check(lam: Scalar) -> None:
    if isinstance(lam, float) and not 0 <= lam < inf:
        raise ValueError(f"damping must be finite and at least 0, not {lam:g}. It is in units of the matrix.")
    number("damping", lam, low=0, tensor=True, unit="It is in units of the matrix.")


def _is_plain_zero(lam: Scalar) -> bool:
    return not isinstance(lam, Tensor) and lam == 0
