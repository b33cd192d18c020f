"""Natural gradients with exact blocks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor, nn

from curvature import DiagonalFisher, LayerFisher, UnitFisher
from curvature.losses.signals import FisherKind
from curvature.structures.whole import WholeFisher
from precond.layerwise.method import LayerwiseOptions
from precond.layerwise.whole import WholeModelOptimizer
from precond.step.methods import Taxonomy
from precond.step.options import WHOLE_REGION, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Cholesky, Damping

Structure = Literal["dense", "layer", "unit", "diagonal"]


class NaturalGradient(WholeModelOptimizer):
    r"""Natural gradient with exact dense blocks of the Fisher, of a chosen size.

    .. math:: d = (C + \lambda I)^{-1}\, \nabla L

    ==============  ============================================  =====================  ======================
    ``structure``   C                                             memory                 an inverse
    ==============  ============================================  =====================  ======================
    ``"dense"``     one matrix over all P parameters              P^2                    P^3 / 3
    ``"layer"``     one per layer (weight and bias), p numbers    sum of p^2             sum of p^3 / 3
    ``"unit"``      one per output unit, with its d inputs        sum of p d             sum of p d^2 / 3
    ``"diagonal"``  one number per parameter                      P                      P
    ==============  ============================================  =====================  ======================

    The larger the block, the fewer steps and the more each costs; ``"dense"`` is the reference that the other methods
    approximate, for models of some thousands of parameters. Per-sample gradients are formed, a chunk at a time, except
    for ``"diagonal"``. Where a block has more than ``max_size`` parameters, 8192 unless ``fisher`` says otherwise, the
    optimizer refuses.

    ============================== ===================================================
    equation                       here, in ``curvature`` and ``solvers``
    ============================== ===================================================
    C of the whole model           ``WholeFisher``
    C of layers, units, parameters ``LayerFisher``, ``UnitFisher``, ``DiagonalFisher``
    :math:`(C + \lambda I)^{-1}`   ``Tikhonov``, ``Cholesky``
    ============================== ===================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units; 1 is a Newton step on a quadratic loss.
        structure: ``"dense"``, ``"layer"``, ``"unit"`` or ``"diagonal"``.
        damping: Shift :math:`\lambda` in units of the curvature, or a :class:`~solvers.Damping`.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``; or a
            :class:`~precond.WholeFisher`, ``LayerFisher``, ``UnitFisher`` or ``DiagonalFisher``,
            which also say the structure and the largest size of a block.
        curvature_ema: Weight of old statistics.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default 1e-2 of the loss at ``lr=0.1``, proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics.
        inverse_update_period: Steps between inverses; a number, a function of the step count, or
            :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If the structure is unknown, or a block too large.

    References:
        Amari (1998), "Natural gradient works efficiently in learning"; Le Roux, Manzagol and Bengio (2007), TONGA;
        Ollivier (2015), section 2, https://arxiv.org/abs/1303.0818
    """

    fisher_types: ClassVar = {
        "dense": WholeFisher,
        "layer": LayerFisher,
        "unit": UnitFisher,
        "diagonal": DiagonalFisher,
    }
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (exact, mc or empirical)",
        structure="dense: whole model, per layer or per unit; or diagonal",
        solver="Cholesky",
        matrices=("Fisher",),
        forms=("dense", "diagonal"),
        step="2(mn)² by layer",
        refresh="B(mn)², inverse (mn)³",
        memory="2(mn)²",
        paper="https://arxiv.org/abs/1303.0818",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        structure: Structure = "layer",
        damping: Scheduled | Damping = 1e-3,
        fisher: FisherKind | WholeFisher | LayerFisher | UnitFisher | DiagonalFisher = "mc",
        curvature_ema: Scheduled = 0.95,
        momentum: Scheduled | Momentum = 0.0,
        kl_clip: Scheduled | TrustRegion | None = WHOLE_REGION,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 1,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        curvature = self.curvature_with(structure, fisher, default="layer")
        if isinstance(curvature, WholeFisher) and curvature.gram:
            raise ValueError(
                f"{type(self).__name__} keeps the matrix itself: WholeFisher(gram=False). SMWNaturalGradient works "
                "with the Gram matrix."
            )
        period = Refresh.of(inverse_update_period).period
        super().__init__(
            model,
            loss_fn,
            curvature=curvature,
            damping=damping,
            solver=Cholesky(explicit=callable(period) or period > 2),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
