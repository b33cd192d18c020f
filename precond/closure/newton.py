"""Newton's method."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from precond.closure.affine import affine_hessian
from precond.closure.damped import DampedOptimizer
from precond.step.adapt import LevenbergMarquardt
from precond.step.base import MomentumOptions
from precond.step.graph import flatten, unflatten
from precond.step.methods import Taxonomy
from precond.step.options import choice
from solvers import Cholesky, Dense, Eigen, Eigh, LinearOperator, NotPositiveDefiniteError, Tikhonov, power

Mode = Literal["plain", "absolute"]


class Newton(DampedOptimizer):
    r"""Newton's method with the dense Hessian.

    .. math:: d = (H + \lambda I)^{-1} g \quad \text{(plain)}, \qquad
        d = (|H| + \lambda I)^{-1} g \quad \text{(absolute)}

    where :math:`|H|` has the absolute eigenvalues: saddle-free Newton. All parameters are solved for together.

    Prefer it for small smooth problems solved to high accuracy, such as convex ones with up to a few thousand
    parameters. A step costs P products with the Hessian (each about two gradients), and ``P^3 / 3`` (plain) or ``9
    P^3`` (absolute); memory ``P^2``. Generalized linear models, such as logistic regression with a ridge, are
    recognised and cost a fraction: see :func:`precond.closure.affine.affine_hessian`. Use float64: the accuracy of the
    minimiser is that of the gradient.

    =============================== ======================================================================
    equation                        here
    =============================== ======================================================================
    H, dense                        ``hessian``: ``step.graph.second_derivatives``
    H of a generalized linear model ``affine.affine_hessian``
    :math:`(H + \lambda I)^{-1} g`  ``directions``: :class:`~solvers.Tikhonov`, :class:`~solvers.Cholesky`
    Dauphin et al.: :math:`|H|`     ``directions``: :class:`~solvers.Eigen` of the absolute eigenvalues
    damping by the ratio, rejection ``damped_direction``: :class:`LevenbergMarquardt`
    =============================== ======================================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Step length; 1 is Newton's.
        damping: :math:`\lambda`, in units of the Hessian.
        mode: ``"plain"``, or ``"absolute"`` where the Hessian is indefinite.
        damping_rule: Adapts the damping, and rejects steps that do not lower the loss: :class:`LevenbergMarquardt`, or
            ``None``.
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        NotPositiveDefiniteError: In ``step``: for ``"plain"`` without a rule, if the damped Hessian is indefinite.

    References:
        Nocedal and Wright (2006), chapter 3; Dauphin et al. (2014), https://arxiv.org/abs/1406.2572
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian, plain or absolute",
        structure="dense",
        solver="Cholesky or eigh",
        matrices=("Hessian",),
        forms=("dense",),
        step="P products with H, P³/3",
        refresh="none",
        memory="P²",
        paper="https://arxiv.org/abs/1406.2572",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 0.0,
        mode: Mode = "plain",
        damping_rule: LevenbergMarquardt | None = None,
        **options: Unpack[MomentumOptions],
    ) -> None:
        self.mode = choice("mode", mode, Mode)
        self.rule = self.ruled(damping_rule, judges=True)
        super().__init__(params, lr=lr, defaults={"damping": damping}, **options)

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        params = list(gradients)
        sign, g = self.sign, self.sign * flatten(gradients)
        curvature: LinearOperator = Dense(sign * self._hessian(params))
        if self.mode == "absolute":
            values, basis = Eigh().basis(curvature.to_dense())
            curvature = Eigen(Dense(basis), values.abs())  # one decomposition serves every damping

        def solve(damping: float) -> Tensor:
            return self._inverse(curvature, damping) @ g

        direction = self.damped_direction(self.rule, g, solve, lambda v: v @ (curvature @ v))
        return unflatten(sign * direction, params)

    def _hessian(self, params: list[Tensor]) -> Tensor:
        closure = self.required_closure()
        assert self.loss_value is not None
        structured = affine_hessian(lambda: self.loss(closure), params, self.loss_value)
        return self.hessian(params) if structured is None else structured

    def _inverse(self, curvature: LinearOperator, damping: float) -> LinearOperator:
        solver = Cholesky(explicit=False) if self.mode == "plain" else Eigh()
        try:
            return power(Tikhonov(damping)(curvature), -1, solver)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(
                f"Newton: the Hessian with a damping of {damping:g} is not positive definite, so the step need not "
                f"lower the loss. Use mode='absolute', damping_rule=LevenbergMarquardt(), or more damping. {error}"
            ) from error
