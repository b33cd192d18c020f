"""CurveBall."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.closure.gauss_newton_optimizer import GaussNewtonClosureOptimizer
from precond.step.adapt import LevenbergMarquardt
from precond.step.base import MomentumOptions
from precond.step.graph import flatten, unflatten
from precond.step.methods import Taxonomy
from precond.step.schedules import FIXED

_RULE = LevenbergMarquardt(decrease=0.999**5, increase=0.999**-5, lower=0.5, upper=1.5, period=5)


class CurveBall(GaussNewtonClosureOptimizer):
    r"""CurveBall: one step of momentum on Newton's linear system for each step on the parameters.

    .. math::
        \Delta = (G + \lambda I) z + g, \qquad z \leftarrow \rho z - \beta \Delta, \qquad \theta \leftarrow \theta + z

    with :math:`\rho, \beta` that minimise the damped model :math:`g^\top z' + \tfrac12 z'^\top (G + \lambda I) z'` of
    the new z, by the solution of a 2 x 2 system; while z is zero only :math:`\beta` counts. No learning rate is needed.
    Every fifth step, from the first on, the damping is adapted by the change of the loss on the same batch
    over that of the damped model: multiplied by ``0.999 ** 5`` where the ratio is above 3/2, divided by it below 1/2.

    A step costs a gradient and two products with G, and where the damping is adapted one more evaluation of the loss.
    Memory: one vector.

    ========================================== ================================================
    Henriques et al.                           here
    ========================================== ================================================
    :math:`\Delta = (G + \lambda I) z + g`     ``directions``: ``step.graph.GaussNewtonMatrix``
    :math:`\rho, \beta` from a 2 x 2 system    ``directions``: ``coefficients``
    :math:`z \leftarrow \rho z - \beta \Delta` ``directions``: ``remember``
    :math:`\lambda` by the ratio               ``directions``: ``_RULE``
    ========================================== ================================================

    Args:
        model: The model, or parameters, groups, or named parameters.
        loss_fn: The loss module that the closure calls.
        lr: Multiplies the step; 1 is the method's.
        damping: :math:`\lambda` at the start, in units of G.
        damping_rule: How the damping is adapted, by default as above; ``None`` leaves it.
        options: See :class:`GaussNewtonClosureOptimizer`.

    References:
        Henriques et al. (2019), https://arxiv.org/abs/1805.08095; the constants as in the authors' code,
        https://github.com/jotaf98/pytorch-curveball, which starts from a damping of 10
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="GGN",
        structure="matrix-free",
        solver="one heavy-ball step",
        matrices=("GGN",),
        forms=("matrix-free",),
        step="two products with G, about four gradients",
        refresh="none",
        memory="mn",
        paper="https://arxiv.org/abs/1805.08095",
    )

    fixed: ClassVar[frozenset[str]] = FIXED | {"damping"}  # it is adapted

    def __init__(
        self,
        model: Any,
        loss_fn: Any,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1.0,
        damping_rule: LevenbergMarquardt | None = _RULE,
        **options: Unpack[MomentumOptions],
    ) -> None:
        self.rule = self.ruled(damping_rule, judges=False)
        super().__init__(model, loss_fn, lr=lr, defaults={"damping": damping}, **options)

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        params = list(gradients)
        g = self.sign * flatten(gradients)
        z = self.remembered("velocity", params)
        matrix, damping = self.matrix(params), float(self.common("damping"))
        image = matrix.product(z) + damping * z
        basis = torch.stack([z, -(image + g)], 1)  # (P, 2)
        images = torch.stack([image, matrix.product(basis[:, 1]) + damping * basis[:, 1]], 1)
        # By pseudo-inverse, because z starts at zero and may become parallel to the slope.
        coefficients = -(torch.linalg.pinv(basis.mT @ images, hermitian=True) @ (basis.mT @ g))
        z = basis @ coefficients
        if not bool(torch.isfinite(z).all()):
            raise FloatingPointError(
                "CurveBall: the quadratic model of the batch overflows. Nothing was changed. Lower the scale of the "
                "loss, or train in float64."
            )
        predicted = -float(g @ z + 0.5 * coefficients @ (basis.mT @ images) @ coefficients)
        if self.rule is not None and self.steps % self.rule.period == 0:
            change = float(self.value) - float(self.value_at(unflatten(z, params)))
            self.judged = (-predicted, -change)
            self.set_damping(self.rule.judged(damping, change, predicted))
        self.remember("velocity", z, params)
        return unflatten(-self.sign * z, params)
