"""TNT: natural gradients with tensor-normal factors."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from curvature import TensorNormal
from curvature.signals import FisherKind
from precond.layerwise import PreconditionedOptimizer
from precond.methods import Taxonomy
from solvers import Cholesky, Damping, FactoredTikhonov


class TNT(PreconditionedOptimizer):
    r"""TNT: one Kronecker product per layer, from the per-sample gradients as matrices.

    .. math::
        C = \frac{1}{\operatorname{tr} L}\, L \otimes R, \quad L = \mathbb E[G G^\top],\; R = \mathbb E[G^\top G],
        \qquad d = (L' + \tfrac1\pi\sqrt\lambda I)^{-1}\, \nabla_W L\, (R' + \pi\sqrt\lambda I)^{-1}

    with the factors L' and R' of C. Shampoo's factors with the Fisher's per-sample gradients in place of the batch's
    mean, and with the inverse instead of a root. Prefer it to K-FAC where a layer is used at many positions, whose
    gradients K-FAC takes for uncorrelated. Costs what K-FAC costs where an example has one position; otherwise
    per-sample gradients are formed, a chunk at a time.

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units.
        damping: Shift :math:`\lambda` in units of the curvature, or a :class:`~solvers.Damping`.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        max_factor: Factors larger than this are kept as diagonals.
        curvature_ema: Weight of old statistics.
        momentum: Momentum.
        weight_decay: Decoupled weight decay.
        curvature_update_period: Steps between updates of the statistics.
        inverse_update_period: Steps between inverses.
        options: See :class:`PreconditionedOptimizer`.

    References:
        Ren and Goldfarb (2021), "Tensor normal training for deep learning models", https://arxiv.org/abs/2106.02925
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="Kronecker per dimension (tensor normal), per layer",
        solver="Cholesky",
        matrices=("Fisher",),
        forms=("Kronecker",),
        step="2(m²n + mn²)",
        refresh="B(m² + n²), inverse m³ + n³",
        memory="2(m² + n²)",
        paper="https://arxiv.org/abs/2106.02925",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        damping: float | Damping = 1e-3,
        fisher: FisherKind = "mc",
        samples: int = 1,
        max_factor: int = 16384,
        curvature_ema: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        curvature_update_period: int = 1,
        inverse_update_period: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=TensorNormal(fisher, samples, max_factor),
            damping=damping if isinstance(damping, Damping) else FactoredTikhonov(damping),
            solver=Cholesky(),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            weight_decay=weight_decay,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
