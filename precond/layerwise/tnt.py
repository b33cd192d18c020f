"""TNT: natural gradients with tensor-normal factors."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from curvature import TensorNormal
from curvature.losses.signals import FisherKind
from precond.layerwise.blocks.refresh import DOUBLING_TO_10
from precond.layerwise.optimizer import PreconditionedOptimizer
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt
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
        kl_clip: Bound on the predicted change of a step, without which large learning rates diverge; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics.
        inverse_update_period: Steps between inverses; by default at steps 0, 1, 2, 4, 8 and then every 10.
        stagger: Spread the inverses of the blocks over the period.
        options: See :class:`PreconditionedOptimizer`.

    References:
        Ren and Goldfarb (2021), "Tensor normal training for deep learning models", https://arxiv.org/abs/2106.02925
    """

    damping_form: ClassVar = FactoredTikhonov
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
        damping: Scheduled | Damping = 1e-2,
        fisher: FisherKind = "mc",
        samples: int = 1,
        max_factor: int = 16384,
        curvature_ema: Scheduled = 0.95,
        momentum: Scheduled = 0.9,
        weight_decay: Scheduled = 0.0,
        kl_clip: Scheduled | None = 1e-3,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt = DOUBLING_TO_10,
        stagger: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=TensorNormal(fisher, samples, max_factor),
            damping=damping,
            solver=Cholesky(),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            stagger=stagger,
            **options,
        )
