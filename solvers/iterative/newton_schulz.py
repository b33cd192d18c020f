"""Newton-Schulz iterations: square roots and polar factors by matrix products alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from math import log, prod
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative.matrix_iteration import MatrixIteration, distance_to_identity, settled
from solvers.operators.dense import symmetric_part
from solvers.outcome.arguments import flag, real_tensor, whole
from solvers.outcome.errors import NonFiniteError, NotConvergedError
from solvers.outcome.finite import is_finite
from solvers.outcome.solution import OnFailure

# Odd quintics x (a + b x^2 + c x^4), each the best one for what the one before leaves of [1e-3, 1]; the last one is
# Newton-Schulz's of order three, with p(1) = 1, and is repeated. Amsel et al. (2025), https://arxiv.org/abs/2505.16932
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
_NEWTON_SCHULZ = (1.875, -1.25, 0.375)
# The first quintics overshoot 1 if rounding lets x exceed its interval; the published remedy shrinks x by this much.
_SAFETY = 1.01


def _coefficients() -> Iterator[tuple[float, float, float]]:
    fast = ((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS)
    return chain(fast, repeat(_NEWTON_SCHULZ))


@dataclass(frozen=True)
class NewtonSchulz(MatrixIteration):
    """Inverse, square root and inverse square root of positive definite matrices; about ``8 n^3`` per step.

    The coupled iteration ``Y -> A^(1/2), Z -> A^(-1/2)`` with ``Y_0 = A / |A|, Z_0 = I``, driven by the Polar Express
    polynomials: some 10 steps for a condition of 1e6, where plain Newton-Schulz takes 25.

    Args:
        rtol: Bound of the true residual, ``|X^p A - I| <= rtol sqrt(n)`` for ``A^(-1/p)`` and ``|X^2 - A| <= rtol |A|``
            for the square root, in Frobenius norm. None takes ``10 sqrt(eps)``.
        max_steps: Steps at most.
        on_failure: Whether to "warn" or to "raise" if the residual is not met; never silent.

    References:
        Higham (2008), Functions of Matrices, section 6.3; Amsel et al. (2025), https://arxiv.org/abs/2505.16932
    """

    rtol: float | None = None
    max_steps: int = 40
    on_failure: OnFailure = "warn"

    exponents: ClassVar[tuple[float, ...] | None] = (-1, -0.5, 0.5)

    def iterate(self, matrix: Tensor, exponent: float) -> tuple[Tensor, int]:
        """Run the coupled iteration; both roots come at once."""
        n = matrix.shape[-1]
        size = torch.linalg.matrix_norm(matrix)[..., None, None]  # Frobenius, so the eigenvalues of Y lie in (0, 1]
        size = torch.where(size == 0, 1, size)
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        y, z = matrix / size, identity
        error = distance_to_identity(y)
        step = 0
        for step, (a, b, c) in enumerate(_coefficients(), 1):
            product = z @ y
            before, error = error, distance_to_identity(product)
            if step > self.max_steps or settled(error, before, n):
                break
            factor = a * identity + b * product + c * (product @ product)
            y, z = y @ factor, factor @ z
        root, inverse_root = size.sqrt() * y, z / size.sqrt()
        result = {-1: inverse_root @ inverse_root, -0.5: inverse_root, 0.5: root}[exponent]
        return symmetric_part(result), step - 1


Cubic = tuple[float, float, float]


def odd_polynomials(x: Tensor, coefficients: Sequence[Cubic]) -> Tensor:
    """X after each odd polynomial ``a X + b (X X^T) X + c (X X^T)^2 X`` in turn, for the (a, b, c) given.

    Several together are one polynomial of ``X X^T`` times X, so that wide matrices are multiplied less often, and all
    else is products of ``(m, m)``. Rounding of ``X X^T``, which its zero eigenvalues have as well, grows by ``a^2``
    in each step, so as many are taken together as keep that below 1e-3.

    Args:
        x: Matrices ``(*stack, m, n)``.
        coefficients: (a, b, c) of the polynomials.

    Returns:
        Of the same shape and dtype.
    """
    shape, left = x.shape, list(coefficients)
    x = x.reshape(-1, *shape[-2:])
    m, n = shape[-2:]
    while left:
        k, grown = 1, torch.finfo(x.dtype).eps
        while k < len(left) and (grown := grown * left[k - 1][0] ** 2) < 1e-3:
            k += 1
        together, left = left[:k], left[k:]
        if (4 * k - 3) * m + 2 * n < k * (2 * n + m):
            x = _polynomial_of(x @ x.mT, together) @ x
            continue
        for cubic in together:
            x = _odd_polynomial(x, x @ x.mT, cubic)
    return x.reshape(shape)


def _polynomial_of(squares: Tensor, coefficients: Sequence[Cubic]) -> Tensor:
    """``f_k(R_k) ... f_1(R_1)`` for ``f = a + b R + c R^2`` and ``R_{i+1} = R_i f_i(R_i)^2``, from ``R_1 = X X^T``."""
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(coefficients, 1):
        factor = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else product @ factor
        if i < len(coefficients):
            squares = squares @ factor @ factor
    assert product is not None
    return product


def _odd_polynomial(x: Tensor, squares: Tensor, cubic: Cubic) -> Tensor:
    """``a X + b R X + c R^2 X`` of ``X (k, m, n)``, given ``R = X X^T``."""
    a, b, c = cubic
    inner = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
    return torch.baddbmm(x, inner, x, beta=a)


def polar(matrix: Tensor, steps: int | None = None, *, together: bool = False) -> Tensor:
    r"""Orthogonal polar factor ``U V^T`` of ``M = U diag(s) V^T``, as Muon steps along; by matrix products alone.

    Args:
        matrix: ``(*stack, m, n)`` of any shape and full rank. In bfloat16 five steps come as near as in float32.
        steps: Number of Polar Express steps, unchecked: 5 bring the singular values above ``1e-3 |M|_F`` near one. None
            iterates until the factor is orthogonal to rounding.
        together: Take several of these steps as one polynomial where that costs less, as of wide matrices, at an error
            of up to 1e-3 of the norm; see :func:`odd_polynomials`.

    Returns:
        Factor of the same shape and dtype.

    Raises:
        NotConvergedError: If ``steps`` is None and the matrix is singular or nearly so.
        NonFiniteError: If ``steps`` is None and the matrix holds NaN or infinity.

    References:
        Amsel et al. (2025), https://arxiv.org/abs/2505.16932
    """
    real_tensor("matrix", matrix)
    whole("steps", steps, low=0, optional=True)
    flag("together", together)
    if matrix.ndim < 2:
        raise ValueError(f"matrix is (*stack, m, n), not {tuple(matrix.shape)}.")
    if matrix.shape[-2] > matrix.shape[-1]:
        return polar(matrix.mT, steps, together=together).mT
    size = torch.linalg.matrix_norm(matrix, keepdim=True)
    x = matrix / torch.where(size == 0, 1, size * _SAFETY)
    if steps is not None and together:
        return odd_polynomials(x, list(islice(_coefficients(), steps)))
    n, x = x.shape[-2], x.reshape(-1, *x.shape[-2:])
    # More steps would lift singular values that are rounding errors up to one, and pass them off as directions of M.
    growth = prod(a / _SAFETY for a, _, _ in _POLAR_EXPRESS)
    most = len(_POLAR_EXPRESS) + int(log(0.1 / torch.finfo(x.dtype).eps / growth, _NEWTON_SCHULZ[0]))
    error = torch.full_like(x[..., 0, 0], float("inf"))
    for step, cubic in enumerate(_coefficients()):
        if step == steps:
            return x.reshape(matrix.shape)
        squares = x @ x.mT
        if steps is None:
            before, error = error, distance_to_identity(squares)
            if step == most or settled(error, before, n):
                break
        x = _odd_polynomial(x, squares, cubic)
    worst = float(error.max()) if error.numel() else 0.0
    if not is_finite(matrix):
        raise NonFiniteError("The polar factor of a matrix with NaN or infinity does not exist.")
    if not worst <= 10 * torch.finfo(x.dtype).eps ** 0.5:
        raise NotConvergedError(
            f"The polar iteration ended {worst:.3g} away from orthogonal: the matrix {tuple(matrix.shape)} is singular "
            "or nearly so. Give steps= to take the factor as it is."
        )
    return x.reshape(matrix.shape)
