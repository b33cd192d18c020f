"""EKFAC."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature import EigenbasisFisher
from curvature.losses.signals import FisherKind
from curvature.structures.kfac import Sharing
from precond.layerwise.adam_step import AdamStep
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.methods import Taxonomy
from precond.step.options import NESTEROV, TRUST_REGION, LossDamping, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Damping, Eigh


class EKFAC(LayerwiseMethod):
    r"""EKFAC: K-FAC's eigenbasis, with the exact second moment of the gradient in that basis.

    .. math:: d = Q_B \frac{Q_B^\top\, \nabla_W L\, Q_A}{s + \lambda} Q_A^\top

    The spectrum s is renewed on every curvature update, the basis every ``inverse_update_period`` steps, so it serves
    long periods better than K-FAC; damping is exact. An eigendecomposition costs about ten times an inverse.

    ===================================================== ======================================================
    George et al. (2018)                                  here, in ``curvature`` and ``solvers``
    ===================================================== ======================================================
    A and B                                               ``structures.kfac.KroneckerEstimator``
    :math:`Q_A, Q_B`: eigenvectors of A and B             ``structures.ekfac.EigenbasisEstimator.refresh_basis``
    s: second moment of :math:`Q_B^\top \nabla_W L\, Q_A` ``structures.ekfac.EigenbasisEstimator.update``
    :math:`1 / (s + \lambda)` between the rotations       ``Tikhonov`` and ``Eigh`` of an ``Eigen``
    ===================================================== ======================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate.
        damping: Shift: by default 3e-2 of the loss, and smaller as that falls
            (:class:`~precond.LossDamping`). A number is in units of the curvature; or a :class:`~solvers.Damping`.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; or an :class:`~curvature.EigenbasisFisher`.
        sharing: Of the factors whose eigenbasis is taken: ``"expand"`` or ``"reduce"`` for layers used at several
            positions; or ``"auto"``, the default, see :class:`KFAC`.
        curvature_ema: Weight of old statistics.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`; by default 0.9 with Nesterov's look-ahead.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default 3e-3 of the loss at ``lr=0.1``, proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics, by default 1; ``Doubling(5)``, the default of
            :class:`KFAC`, halves the cost of a step on small models.
        inverse_update_period: Steps between eigenbases, spread over the blocks; a number, a function of the step
            count, or :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`. Tables of embeddings take
            :class:`~precond.AdamStep` unless ``structures={nn.Embedding: {}}`` gives them the curvature of all others.

    References:
        George et al. (2018), https://arxiv.org/abs/1806.03884
    """

    fisher_types: ClassVar = {None: EigenbasisFisher}
    staggers: ClassVar = True
    table_step: ClassVar = AdamStep()
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="diagonal in a Kronecker eigenbasis, per layer",
        solver="eigh",
        matrices=("Fisher",),
        forms=("Kronecker eigenbasis",),
        step="4(m²n + mn²)",
        refresh="2B(m² + n²) + 2Bmn, basis 9(m³ + n³)",
        memory="2(m² + n²) + mn",
        paper="https://arxiv.org/abs/1806.03884",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor = 0.2,
        damping: Scheduled | Damping | LossDamping = LossDamping(3e-2),
        fisher: FisherKind | EigenbasisFisher = "mc",
        sharing: Sharing | None = None,
        curvature_ema: Scheduled = 0.95,
        momentum: Scheduled | Momentum = NESTEROV,
        kl_clip: Scheduled | TrustRegion | None = TRUST_REGION,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 10,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=self.curvature_of(fisher, sharing=self.sharing_of(fisher, sharing)),
            damping=damping,
            solver=Eigh(),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
