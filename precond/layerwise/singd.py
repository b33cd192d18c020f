"""SINGD: structured inverse-free natural gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature.losses.signals import FisherKind
from curvature.structures.kfac import Sharing
from curvature.structures.singd import FactorStructure, SINGDFisher
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.methods import Taxonomy
from precond.step.options import CURVATURE_REGION, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Cholesky
from solvers.outcome.arguments import choice


class SINGD(LayerwiseMethod):
    r"""SINGD: K-FAC without matrix inversions, with structured factors of the inverse updated by products.

    .. math:: d = L L^\top\, \nabla_W L\, K K^\top, \qquad
        K \leftarrow K (I - \beta m_K),\quad m_K \leftarrow \alpha m_K + \tfrac12 \Pi\Big(
        \tfrac{\operatorname{tr} H_L}{d_L} H_K + \lambda \tfrac{\operatorname{tr} L^\top L}{d_L} K^\top K - I\Big)

    with :math:`H_K = K^\top A K` from the layer's inputs, and L likewise from its output gradients. ``structure`` keeps
    the factors dense, lower triangular, block-diagonal or diagonal, and with them memory and cost. With
    ``SINGDFisher(coupled=False)`` it is IKFAC, which follows K-FAC's own damped inverses.

    Prefer it in low precision, where decompositions fail, and where factors must be small. An update costs some
    products of a factor's size; a step two products with the gradient.

    ======================================= ============================================
    Lin et al. (2024), sections 3 and 4     here, in ``curvature``
    ======================================= ============================================
    :math:`A, B`: moments, in the structure ``structures.singd.BlockMoments``
    :math:`m_K` and K, :math:`m_L` and L    ``structures.singd.SINGDEstimator.improve``
    :math:`L L^\top` and :math:`K K^\top`   ``structures.singd.SINGDEstimator.operator``
    IKFAC: each factor by itself            ``SINGDFisher``, by ``coupled``
    ======================================= ============================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units.
        structure: ``"dense"``, ``"triangular"``, ``"block"`` or ``"diagonal"``: of both factors.
        damping: Shift :math:`\lambda` in units of the curvature.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; or a :class:`~curvature.SINGDFisher`, which has :math:`\beta`
            (``factor_lr``), :math:`\alpha` (``factor_momentum``), the multiple of the identity that :math:`C^{-1}`
            begins with (``initial``), the size of blocks, and ``coupled``.
        sharing: ``"expand"`` or ``"reduce"`` for layers used at several positions.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default one whose bound is proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates of the factors.
        inverse_update_period: Of other curvature, which ``structures`` may ask for; and the burn-in, by
            :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner and Makhzani (2024), "Structured inverse-free natural
        gradient descent", https://arxiv.org/abs/2312.05705
    """

    fisher_types: ClassVar = {None: SINGDFisher}
    absolute_damping: ClassVar = True
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="Kronecker, per layer; factors dense, triangular, block or diagonal",
        solver="multiplicative updates of the inverse",
        matrices=("Fisher",),
        forms=("Kronecker",),
        step="2(m²n + mn²)",
        refresh="2B(m² + n²) + 8(m³ + n³)",
        memory="2(m² + n²)",
        paper="https://arxiv.org/abs/2312.05705",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        structure: FactorStructure = "dense",
        damping: Scheduled = 1e-3,
        fisher: FisherKind | SINGDFisher = "mc",
        sharing: Sharing = "expand",
        momentum: Scheduled | Momentum = 0.9,
        kl_clip: Scheduled | TrustRegion | None = CURVATURE_REGION,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 1,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        choice("structure", structure, FactorStructure)
        super().__init__(
            model,
            loss_fn,
            curvature=self.curvature_of(fisher, sharing=sharing, factor=structure),
            damping=damping,
            solver=Cholesky(),
            lr=lr,
            curvature_ema=0.0,  # the factors are the memory
            momentum=momentum,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
