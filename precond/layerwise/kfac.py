"""K-FAC."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature import KroneckerFisher
from curvature.losses.signals import FisherKind
from curvature.structures.kfac import Sharing
from precond.layerwise.adam_step import AdamStep
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.methods import Taxonomy
from precond.step.options import NESTEROV, TRUST_REGION, LossDamping, Momentum, Refresh, TrustRegion
from precond.step.schedules import DOUBLING_TO_5, DOUBLING_TO_10, Scheduled, ScheduledInt
from solvers import Cholesky, Damping, FactoredTikhonov


class KFAC(LayerwiseMethod):
    r"""K-FAC: natural gradient with one Kronecker product per layer.

    .. math:: d = (B + \tfrac{1}{\pi}\sqrt\lambda I)^{-1}\, \nabla_W L\, (A + \pi\sqrt\lambda I)^{-1}

    Prefer it for deterministic or large-batch problems, autoencoders and regression, and wherever AdamW needs many
    steps. Parameters outside linear and convolutional layers get small exact blocks (norms) or a diagonal
    (everything else), so that all are covered; tables of embeddings take Adam's step (:class:`~precond.AdamStep`).

    A step costs the gradient, two triangular products per layer, and on steps that update the curvature one backward
    pass through the activations plus ``O(rows * d^2)``; an inverse ``O(d^3)`` per factor d. Memory: two factors and
    their inverses per layer.

    ========================================== ================================================================
    Martens and Grosse (2015)                  here, in ``curvature``, ``solvers`` and ``precond``
    ========================================== ================================================================
    section 3: :math:`B \otimes A`             ``structures.kfac.KroneckerEstimator``
    section 4.2: inverses block by block       ``layerwise.blocks.preconditioner.Preconditioner``, ``Cholesky``
    section 5: targets drawn by the model      ``losses.signals.Signals`` of kind ``"mc"``
    section 5: running averages                ``structures.weighted_mean.WeightedMean``
    section 6.3: factored damping, :math:`\pi` ``FactoredTikhonov``
    sections 6.4, 7: step length, momentum     ``QuadraticModel``, by ``step_size``
    section 6.5: adapting :math:`\lambda`      ``LevenbergMarquardt``, by ``damping_rule``
    Ba et al. (2017), section 5: step bound    ``step.trust_region.bounded_move``
    Grosse and Martens (2016): convolutions    ``layers.conv``
    Eschenhagen et al. (2023), section 3       ``structures.kfac.KroneckerEstimator``, by ``sharing``
    ========================================== ================================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units: at 1, without momentum, a step minimises the quadratic model.
            At the default ``kl_clip`` lets a move change 1.2e-2 of the loss; where it binds, that share goes with the
            square of the learning rate. 0.01 to 0.3 is common.
        damping: Shift :math:`\lambda`: by default 1e-2 of the loss, and smaller as that falls
            (:class:`~precond.LossDamping`). A number is in units of the curvature; or a :class:`~solvers.Damping`.
        fisher: ``"mc"`` (sampled labels, the default), ``"exact"`` (one backward pass per output), ``"empirical"``; or
            a :class:`~curvature.KroneckerFisher` with its number of samples, its bias and its largest factor.
        sharing: ``"expand"`` or ``"reduce"`` for layers used at several positions; or
            ``"auto"``, the default: ``"reduce"`` for dense layers in passes whose loss has one term for each example
            (vision transformers), ``"expand"`` elsewhere, see :class:`~curvature.KroneckerFisher`. A ``fisher`` that
            is an object keeps its own.
        curvature_ema: Weight of old statistics.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`; by default 0.9 with Nesterov's look-ahead.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default 3e-3 of the loss at ``lr=0.1``, proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics, by default at steps 0, 1, 2, 4, 5 and then
            every 5; with 1 a step costs nearly twice as much on small models, and small batches gain.
        inverse_update_period: Steps between inverses, spread over the blocks; by default at steps 0, 1, 2, 4, 8 and
            then every 10. A number, a function of the step count, or :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`. Tables of embeddings take
            :class:`~precond.AdamStep` unless ``structures={nn.Embedding: {}}`` gives them the curvature of all others.

    References:
        Martens and Grosse (2015), https://arxiv.org/abs/1503.05671; Grosse and Martens (2016),
        https://arxiv.org/abs/1602.01407; Ba, Grosse and Martens (2017), https://openreview.net/forum?id=SkkTMpjex;
        Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636
    """

    damping_form: ClassVar = FactoredTikhonov
    fisher_types: ClassVar = {None: KroneckerFisher}
    staggers: ClassVar = True
    table_step: ClassVar = AdamStep()
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="Kronecker, per layer",
        solver="Cholesky",
        matrices=("Fisher",),
        forms=("Kronecker",),
        step="2(m²n + mn²)",
        refresh="B(m² + n²), inverse m³ + n³",
        memory="2(m² + n²)",
        paper="https://arxiv.org/abs/1503.05671",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor = 0.2,
        damping: Scheduled | Damping | LossDamping = LossDamping(1e-2),
        fisher: FisherKind | KroneckerFisher = "mc",
        sharing: Sharing | None = None,
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
            curvature=self.curvature_of(fisher, sharing=self.sharing_of(fisher, sharing)),
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
