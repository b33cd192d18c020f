"""Natural gradients with exact blocks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from curvature import Curvature, DiagonalFisher, LayerFisher, UnitFisher
from curvature.losses.signals import FisherKind
from curvature.structures.whole import WholeFisher
from precond.layerwise.whole import WholeModelOptimizer
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Cholesky, Damping

Structure = Literal["full", "layer", "unit", "diagonal"]


class NaturalGradient(WholeModelOptimizer):
    r"""Natural gradient with exact dense blocks of the Fisher, of a size to choose.

    .. math:: d = (C + \lambda I)^{-1}\, \nabla L

    ==============  ============================================  =====================  ======================
    ``structure``   C                                             memory                 an inverse
    ==============  ============================================  =====================  ======================
    ``"full"``      one matrix over all P parameters              P^2                    P^3 / 3
    ``"layer"``     one per layer (weight and bias), p numbers    sum of p^2             sum of p^3 / 3
    ``"unit"``      one per output unit, with its d inputs        sum of p d             sum of p d^2 / 3
    ``"diagonal"``  one number per parameter                      P                      P
    ==============  ============================================  =====================  ======================

    The larger the block, the fewer steps and the more each costs; ``"full"`` is the reference that the other methods
    approximate, for models of some thousands of parameters. Per-sample gradients are formed, a chunk at a time, except
    for ``"diagonal"``. Where a block is larger than ``max_size`` the optimizer refuses.

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units; 1 is a Newton step on a quadratic loss.
        structure: ``"full"``, ``"layer"``, ``"unit"`` or ``"diagonal"``.
        damping: Shift :math:`\lambda` in units of the curvature, or a :class:`~solvers.Damping`.
        fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        max_size: Largest number of parameters of a dense block.
        curvature_ema: Weight of old statistics.
        momentum: Momentum.
        weight_decay: Decoupled weight decay.
        kl_clip: Bound on the predicted change of a step, without which large learning rates diverge; ``None`` for none.
        curvature_update_period: Steps between updates of the statistics.
        inverse_update_period: Steps between inverses.
        options: See :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If the structure is unknown, or a block too large.

    References:
        Amari (1998), "Natural gradient works efficiently in learning"; Le Roux, Manzagol and Bengio (2007), TONGA;
        Ollivier (2015), section 2, https://arxiv.org/abs/1303.0818
    """

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
        fisher: FisherKind = "mc",
        samples: int = 1,
        max_size: int = 8192,
        curvature_ema: Scheduled = 0.95,
        momentum: Scheduled = 0.0,
        weight_decay: Scheduled = 0.0,
        kl_clip: Scheduled | None = 1e-3,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            curvature=_curvature(structure, fisher, samples, max_size),
            damping=damping,
            solver=Cholesky(explicit=callable(inverse_update_period) or inverse_update_period > 2),
            lr=lr,
            curvature_ema=curvature_ema,
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )


def _curvature(structure: Structure, kind: FisherKind, samples: int, max_size: int) -> Curvature:
    match structure:
        case "full":
            return WholeFisher(kind, samples, max_size=max_size)
        case "layer":
            return LayerFisher(kind, samples, max_size)
        case "unit":
            return UnitFisher(kind, samples, max_size)
        case "diagonal":
            return DiagonalFisher(kind, samples)
    raise ValueError(f"structure must be one of {', '.join(get_args(Structure))}, got {structure!r}.")
