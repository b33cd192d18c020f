"""An operator as somebody outside would write it: circulant matrices, by the fast Fourier transform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers import Dense, Eigen, LinearOperator, diagonalize, power, rule, storable
from solvers.operators.linear_operator import Scalar, Shape
from solvers.rules import BasisTask, PowerTask


@dataclass(frozen=True, eq=False, repr=False)
class PlainCirculant(LinearOperator):
    """``y = column * x``, a circular convolution; without any rule."""

    column: Tensor

    @property
    def in_shape(self) -> Shape:
        return tuple(self.column.shape)

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.column.dtype

    @property
    def device(self) -> torch.device:
        return self.column.device

    @property
    def symmetric(self) -> bool:
        return True

    def apply(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.clone()
        return torch.fft.irfft(torch.fft.rfft(self.column) * torch.fft.rfft(x), n=self.in_shape[0])

    def adjoint(self) -> PlainCirculant:
        return self


@storable
@dataclass(frozen=True, eq=False, repr=False)
class SymmetricCirculant(PlainCirculant):
    """A symmetric circulant matrix, in ``n log n``; a shift moves its first entry."""

    def shift(self, lam: Scalar) -> SymmetricCirculant:
        return SymmetricCirculant(self.column + lam * torch.eye(1, self.in_shape[0], dtype=self.dtype)[0])

    def diagonal(self) -> Tensor:
        return self.column[0].expand(self.in_shape)

    def logdet(self) -> Tensor:
        return torch.fft.fft(self.column).real.log().sum()


@rule(power, SymmetricCirculant)
def power_of_circulant(op: SymmetricCirculant, task: PowerTask) -> SymmetricCirculant:
    values = task.solver.spectral_power(torch.fft.rfft(op.column).real, task.exponent, op)
    return SymmetricCirculant(torch.fft.irfft(values, n=op.in_shape[0]))


@rule(diagonalize, SymmetricCirculant)
def eigen_of_circulant(op: SymmetricCirculant, task: BasisTask) -> Eigen:
    """The real Hartley basis: ``cas(2 pi i j / n) / sqrt(n)``."""
    n = op.in_shape[0]
    angle = 2 * torch.pi * torch.outer(torch.arange(n), torch.arange(n)).to(op.dtype) / n
    return Eigen(Dense((angle.cos() + angle.sin()) / n**0.5), torch.fft.fft(op.column).real)
