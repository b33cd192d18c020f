"""SENG: sketched empirical natural gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature.losses.signals import FisherKind
from curvature.structures.sketch import SketchedFisher
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.loop import Loop
from precond.step.methods import Taxonomy
from precond.step.options import CURVATURE_REGION, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Auto
from solvers.outcome.arguments import instance, whole


class SENG(LayerwiseMethod):
    r"""SENG: the empirical Fisher of one batch, layer by layer, inverted in a sketch and used for several steps.

    .. math:: d = \tfrac1\lambda \big(g - U^\top (\lambda I + S S^\top)^{-1} S\, \Omega g\big),
              \qquad S = U \Omega^\top

    with the per-sample gradients as the rows of U, scaled so that :math:`U^\top U` is the empirical Fisher of the
    batch, and :math:`\Omega` a random choice of ``sketch`` outputs times ``sketch`` inputs of the layer. With all of
    them it is :class:`SMWNaturalGradient` by layers. No per-sample gradient is formed outside of the sketch.

    Prefer it for wide layers and small batches. A refresh costs ``N^2`` inner products of length ``sketch`` (for one
    position per example; else ``N`` sketched gradients) and ``N^3 / 3`` per layer, a step two products with the stored
    activations and output gradients, which are the memory.

    ================================================ ===============================================
    Yang et al. (2020)                               here, in ``curvature`` and ``solvers``
    ================================================ ===============================================
    U: per-sample gradients of a batch               ``structures.gram.GramEstimator``
    :math:`\Omega`: outputs and inputs that are kept ``structures.sketch.Restriction``
    :math:`(\lambda I + S S^\top)^{-1} S\, \Omega g` ``structures.sketch.SketchedEstimator.improve``
    all of them kept: :math:`S = U`                  ``Woodbury``
    ================================================ ===============================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate; a step is ``lr / damping`` times the gradient where the curvature is small.
        damping: Shift :math:`\lambda` in units of the curvature, positive.
        fisher: ``"empirical"`` as in the paper, ``"mc"`` or ``"exact"``; or a :class:`~curvature.SketchedFisher`.
        sketch: Coordinates kept of each side of a layer.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default one whose bound is proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps for which the curvature of one batch is used.
        inverse_update_period: Of other curvature, which ``structures`` may ask for; and the burn-in, by
            :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If the damping is not positive.

    References:
        Yang, Xu, Wen, Chen and Xu (2020), "Sketchy empirical natural gradient methods for deep learning",
        https://arxiv.org/abs/2006.05924
    """

    fisher_types: ClassVar = {None: SketchedFisher}
    needs_damping: ClassVar = True
    keeps_rows: ClassVar = True
    absolute_damping: ClassVar = True
    taxonomy: ClassVar = Taxonomy(
        curvature="empirical Fisher of one batch",
        structure="sketched Gram matrix, per layer",
        solver="Woodbury",
        matrices=("Fisher",),
        forms=("low rank",),
        step="2Bmn",
        refresh="2B²s + B³/3 in a sketch of s",
        memory="B(m + n) + B²",
        paper="https://arxiv.org/abs/2006.05924",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        damping: Scheduled = 1.0,
        fisher: FisherKind | SketchedFisher = "empirical",
        sketch: int = 256,
        momentum: Scheduled | Momentum = 0.9,
        kl_clip: Scheduled | TrustRegion | None = CURVATURE_REGION,
        curvature_update_period: ScheduledInt = 10,
        inverse_update_period: ScheduledInt | Refresh = 1,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        whole("sketch", sketch)
        loop = instance("loop", options.get("loop", Loop()), Loop, "a Loop")
        super().__init__(
            model,
            loss_fn,
            curvature=self.curvature_of(fisher, size=sketch, seed=loop.seed),
            damping=damping,
            solver=Auto(),  # Woodbury, and what fits other structures
            lr=lr,
            curvature_ema=0.0,
            momentum=momentum,
            kl_clip=kl_clip,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            **options,
        )
