"""The curvature of one layer as compression needs it: factors that were damped and can be taken apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from solvers import (
    Dense,
    Diagonal,
    Eigen,
    InexactWarning,
    Kronecker,
    LinearOperator,
    NonFiniteError,
    NotPositiveDefiniteError,
    SingularMatrixError,
    StructureError,
)

#: Damping is raised by this factor while a factorisation fails, up to the mean of the diagonal.
_RAISE = 10.0


@dataclass(frozen=True)
class Factor:
    r"""A damped factor :math:`A + \delta\,\overline{\operatorname{diag} A}\, I`, and its Cholesky factor.

    Attributes:
        matrix: ``(d, d)``, damped.
        root: Lower triangular L with ``L L^T`` the matrix.
        damping: The fraction :math:`\delta` that was needed.
        singular: Whether the factor without damping has no Cholesky factorisation: directions that the data never
            reached are decided by the damping alone.
    """

    matrix: Tensor
    root: Tensor
    damping: float
    singular: bool

    @property
    def unit(self) -> Tensor:
        """The unit lower triangular U of ``U D U^T``."""
        return self.root / self.root.diagonal()

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of the damped matrix."""
        return torch.cholesky_inverse(self.root)

    def permuted(self, order: Tensor) -> Factor:
        """The factor with its rows and columns in another order."""
        matrix = self.matrix[order][:, order]
        return Factor(matrix, torch.linalg.cholesky(matrix), self.damping, self.singular)


@dataclass(frozen=True)
class LayerCurvature:
    r"""The curvature of one matrix W ``(d_out, d_in)``: the operator, and the Kronecker product that rounding uses.

    Attributes:
        operator: The operator on ``(d_out, d_in)``, undamped: what predictions are computed by.
        inputs: Damped factor A of the inputs ``(d_in, d_in)``.
        outputs: Damped factor B of the outputs ``(d_out, d_out)``; ``None`` where it is the identity.
    """

    operator: LinearOperator
    inputs: Factor
    outputs: Factor | None

    def increase(self, error: Tensor) -> float:
        r"""The increase of the loss by the quadratic form, :math:`\tfrac12 \langle E, C E \rangle`."""
        error = error.to(self.operator.dtype)
        return float((error * (self.operator @ error)).sum() / 2)

    @property
    def damping(self) -> float:
        """The largest fraction of damping of the factors."""
        return max(factor.damping for factor in (self.inputs, self.outputs) if factor is not None)

    @property
    def singular(self) -> bool:
        """Whether a factor is singular without damping."""
        return any(factor.singular for factor in (self.inputs, self.outputs) if factor is not None)

    @property
    def importance(self) -> Tensor:
        """Diagonal of the operator ``(d_out, d_in)``: weights of single errors."""
        return self.operator.diagonal().clamp(min=0)


def layer_curvature(name: str, operator: LinearOperator, damping: float) -> LayerCurvature:
    """Take a layer's operator apart.

    Args:
        name: The layer, for messages.
        operator: On ``(d_out, d_in)``: a Kronecker product, eigenvalues in a Kronecker basis (whose nearest Kronecker
            product in that basis is used), or a diagonal (whose entries do not act on each other).
        damping: Fraction of each factor's mean diagonal.

    Raises:
        StructureError: If the operator is none of these.
        NonFiniteError: If it holds NaN or infinity.
        SingularMatrixError: If a factor is zero: no data reached the layer.
        NotPositiveDefiniteError: If a factor is indefinite beyond damping.
    """
    match operator:
        case Kronecker(factors=(left, right)):
            B, A = (None if _is_identity(left) else _dense(left)), _dense(right)
        case Eigen(basis=Kronecker(factors=(left, right)), values=values):
            b, a = _rank_one(name, values)
            B, A = _in_basis(left, b), _in_basis(right, a)
        case Diagonal(values=values) if values.dim() == 2:
            _check_finite(name, values)
            return LayerCurvature(operator, _identity_like(values, values.shape[1]), None)
        case _:
            raise StructureError(
                f"{name}: {operator!r} has no factors of inputs and outputs. Use structure='kfac', 'ekfac', 'foof' or "
                "'diagonal'."
            )
    inputs = _factor(f"{name}, factor of the inputs", A, damping)
    outputs = None if B is None else _factor(f"{name}, factor of the outputs", B, damping)
    return LayerCurvature(operator, inputs, outputs)


def _factor(name: str, matrix: Tensor, damping: float) -> Factor:
    """Damp and factorise in float64, with more damping, told, where that fails."""
    _check_finite(name, matrix)
    matrix = matrix.double()
    matrix = (matrix + matrix.mT) / 2
    diagonal = matrix.diagonal()
    size = float(diagonal.mean())
    if not size > 0:
        raise SingularMatrixError(
            f"{name}: the mean of its diagonal is {size:.3g}, so no data reached this layer or no gradient came back. "
            "Give data that use it, or leave it out with layers=."
        )
    singular = int(torch.linalg.cholesky_ex(matrix).info) != 0
    used = damping
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(used * size)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
        if used >= 1.0:
            lowest = float(torch.linalg.eigvalsh(matrix)[0])
            raise NotPositiveDefiniteError(
                f"{name}: its lowest eigenvalue is {lowest:.3g} beside a mean of {size:.3g}, so it is no curvature of "
                "a convex loss. Use a Fisher or Gauss-Newton matrix."
            )
        used = min(1.0, max(used, 1e-6) * _RAISE)
    if used != damping:
        warnings.warn(
            f"{name}: no Cholesky factorisation with damping={damping:g}; it took {used:g} of the mean diagonal. More "
            "data, or a larger damping=, make it definite.",
            InexactWarning,
            stacklevel=2,
        )
    return Factor(damped, root, used, singular)


def _rank_one(name: str, spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """The non-negative vectors whose outer product is nearest to a non-negative spectrum ``(d_out, d_in)``."""
    _check_finite(name, spectrum)
    u, s, vh = torch.linalg.svd(spectrum.double(), full_matrices=False)
    root = s[0].sqrt()
    return u[:, 0].abs() * root, vh[0].abs() * root  # the leading pair of a non-negative matrix has one sign (Perron)


def _in_basis(basis: LinearOperator, values: Tensor) -> Tensor:
    if not isinstance(basis, Dense):
        return torch.diag(values)  # an identity basis belongs to a diagonal factor
    Q = basis.matrix.double()
    return (Q * values) @ Q.mT


def _dense(factor: LinearOperator) -> Tensor:
    return factor.matrix if isinstance(factor, Dense) else torch.diag(factor.diagonal())


def _is_identity(factor: LinearOperator) -> bool:
    return isinstance(factor, Diagonal) and bool((factor.values == 1).all())


def _identity_like(values: Tensor, size: int) -> Factor:
    eye = torch.eye(size, dtype=torch.float64, device=values.device)
    return Factor(eye, eye, 0.0, False)


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{name}: its curvature holds NaN or infinity. Look at the data and the weights (curvature.report names "
            "what is not finite)."
        )
