"""SINGD: structured inverse-free natural gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from curvature.losses.signals import FisherKind
from curvature.structures.kfac import Sharing
from curvature.structures.singd import FactorStructure, SINGDFisher
from precond.layerwise.optimizer import PreconditionedOptimizer
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Cholesky


class SINGD(PreconditionedOptimizer):
    r"""SINGD: K-FAC without any inverse, with structured factors of the inverse that move by products.

    .. math:: d = L L^\top\, \nabla_W L\, K K^\top, \qquad
        K \leftarrow K (I - \beta m_K),\quad m_K \leftarrow \alpha m_K + \tfrac12 \Pi\Big(
        \tfrac{\operatorname{tr} H_L}{d_L} H_K + \lambda \tfrac{\operatorname{tr} L^\top L}{d_L} K^\top K - I\Big)

    with :math:`H_K = K^\top A K` from the layer's inputs, and L likewise from its output gradients. ``structure`` keeps
    the factors dense, lower triangular, block-diagonal or diagonal, and with them memory and cost. With
    ``coupled=False`` it is IKFAC, which follows K-FAC's own damped inverses.

    Prefer it in low precision, where decompositions fail, and where factors must be small. An update costs some
    products of a factor's size; a step two products with the gradient.

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units.
        structure: ``"dense"``, ``"triangular"``, ``"block"`` or ``"diagonal"``: of both factors.
        block_size: Size of the blocks for ``"block"``.
        damping: Shift :math:`\lambda` in units of the curvature.
        factor_lr: :math:`\beta`, in (0, 1).
        factor_momentum: :math:`\alpha`, in [0, 1).
        initial: Multiple of the identity that :math:`C^{-1}` begins with; it moves towards its value at the rate of
            ``factor_lr``.
        coupled: False for IKFAC.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        sharing: ``"expand"`` or ``"reduce"`` for layers used at several positions.
        max_factor: Factors larger than this are diagonal.
        momentum: Momentum.
        weight_decay: Decoupled weight decay.
        kl_clip: Bound on the predicted change of a step, without which large learning rates diverge; ``None`` for none.
        curvature_update_period: Steps between updates of the factors.
        options: See :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner and Makhzani (2024), "Structured inverse-free natural
        gradient descent", https://arxiv.org/abs/2312.05705
    """

    absolute_damping: ClassVar = True
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="Kronecker, per layer; factors dense, triangular, block or diagonal",
        solver="multiplicative updates of the inverse",
        matrices=("Fisher",),
        forms=("Kronecker",),
        step="2(m²n + mn²)",
        refresh="2B(m² + n²) + 12(m³ + n³)",
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
        block_size: int = 32,
        damping: Scheduled = 1e-3,
        factor_lr: float = 0.05,
        factor_momentum: float = 0.5,
        initial: float = 1.0,
        coupled: bool = True,
        fisher: FisherKind = "mc",
        samples: int = 1,
        sharing: Sharing = "expand",
        max_factor: int = 16384,
        momentum: Scheduled = 0.9,
        weight_decay: Scheduled = 0.0,
        kl_clip: Scheduled | None = 1e-3,
        curvature_update_period: ScheduledInt = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=SINGDFisher(
                fisher,
                samples,
                sharing,
                max_factor=max_factor,
                factor=structure,
                block_size=block_size,
                factor_lr=factor_lr,
                factor_momentum=factor_momentum,
                initial=initial,
                coupled=coupled,
            ),
            damping=damping,
            solver=Cholesky(),
            lr=lr,
            curvature_ema=0.0,  # the factors are the memory
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            **options,
        )
