"""TNT: natural gradients with tensor-normal factors."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature import TensorNormal
from curvature.losses.signals import FisherKind
from precond.layerwise.adam_step import AdamStep
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.methods import Taxonomy
from precond.step.options import NESTEROV, TRUST_REGION, LossDamping, Momentum, Refresh, TrustRegion
from precond.step.schedules import DOUBLING_TO_5, DOUBLING_TO_10, Scheduled, ScheduledInt
from solvers import Cholesky, Damping, FactoredTikhonov


class TNT(LayerwiseMethod):
    r"""TNT: one Kronecker product per layer, from the per-sample gradients as matrices.

    .. math::
        C = \frac{1}{\operatorname{tr} L}\, L \otimes R, \quad L = \mathbb E[G G^\top],\; R = \mathbb E[G^\top G],
        \qquad d = (L' + \tfrac1\pi\sqrt\lambda I)^{-1}\, \nabla_W L\, (R' + \pi\sqrt\lambda I)^{-1}

    with the factors L' and R' of C. Shampoo's factors with the Fisher's per-sample gradients in place of the batch's
    mean, and with the inverse instead of a root. Prefer it to K-FAC where a layer is used at many positions, whose
    gradients K-FAC takes for uncorrelated. Costs what K-FAC costs where an example has one position; otherwise
    per-sample gradients are formed, a chunk at a time.

    ================================== =================================================
    Ren and Goldfarb (2021)            here, in ``curvature`` and ``solvers``
    ================================== =================================================
    L and R, from per-sample gradients ``structures.tnt.TensorNormalEstimator.update``
    C, with the trace of L and R       ``structures.tnt.TensorNormalEstimator.operator``
    targets drawn by the model         ``losses.signals.Signals`` of kind ``"mc"``
    damping factor by factor           ``FactoredTikhonov``
    ================================== =================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units.
        damping: Shift :math:`\lambda`: by default 1e-2 of the loss, and smaller as that falls
            (:class:`~precond.LossDamping`). A number is in units of the curvature; or a :class:`~solvers.Damping`.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; or a :class:`~curvature.TensorNormal`.
        curvature_ema: Weight of old statistics.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default 3e-3 of the loss at ``lr=0.1``, proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics, see :class:`KFAC`.
        inverse_update_period: Steps between inverses, spread over the blocks; by default at steps 0, 1, 2, 4, 8 and
            then every 10. A number, a function of the step count, or :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`. Tables of embeddings take
            :class:`~precond.AdamStep` unless ``structures={nn.Embedding: {}}`` gives them the curvature of all others.

    References:
        Ren and Goldfarb (2021), "Tensor normal training for deep learning models", https://arxiv.org/abs/2106.02925
    """

    damping_form: ClassVar = FactoredTikhonov
    fisher_types: ClassVar = {None: TensorNormal}
    staggers: ClassVar = True
    table_step: ClassVar = AdamStep()
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
        lr: float | Tensor = 0.2,
        damping: Scheduled | Damping | LossDamping = LossDamping(1e-2),
        fisher: FisherKind | TensorNormal = "mc",
        curvature_ema: Scheduled = 0.95,
        momentum: Scheduled | Momentum = NESTEROV,
        kl_clip: Scheduled | TrustRegion | None = TRUST_REGION,
        curvature_update_period: ScheduledInt = DOUBLING_TO_5,
        inverse_update_period: ScheduledInt | Refresh = DOUBLING_TO_10,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=self.curvature_of(fisher),
            damping=damping,
            solver=Cholesky(),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
