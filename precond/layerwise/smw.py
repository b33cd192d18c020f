"""Natural gradients through the Gram matrix of per-sample gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from curvature import CurvatureEstimator, GramFisher
from curvature.losses.signals import FisherKind
from curvature.structures.whole import WholeFisher
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.method import LayerwiseOptions
from precond.layerwise.whole import WholeModelOptimizer
from precond.step.adaptive_rate import is_adaptive
from precond.step.methods import Taxonomy
from precond.step.options import WHOLE_REGION, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Auto, Damping, LinearOperator, Solver
from solvers.outcome.arguments import number


class SMWNaturalGradient(WholeModelOptimizer):
    r"""Exact damped natural gradient of one batch, solved in the number of its examples.

    With the N per-sample gradients as the rows of U, scaled so that :math:`C = U^\top U`,

    .. math:: d = (C + \lambda I)^{-1} b
              = \tfrac{1}{\lambda} \big(b - U^\top (U U^\top + \lambda I)^{-1} U b\big),
              \qquad b = \nabla L + \lambda \mu\, d_{previous}

    by the formula of Sherman, Morrison and Woodbury. The Gram matrix of a layer with one position per example is
    :math:`(a a^\top) \circ (g g^\top)`, so its per-sample gradients are never formed. With ``spring`` :math:`\mu > 0`
    the solution of a step is pulled towards that of the step before (SPRING), which carries information over batches,
    while the curvature itself has no memory.

    Prefer it where the batch is smaller than the model and the curvature is wanted exactly: physics-informed networks,
    variational Monte Carlo, regression. A step costs ``N^2`` inner products of layer inputs and of output gradients
    and ``N^3 / 3``; memory is that of activations and their gradients, until the next step. ``"exact"`` multiplies N
    by the number of outputs. Where an operation has no rule, or no batch axis, each example costs a backward pass.

    =========================================== ===================================================
    equation                                    here, in ``curvature``, ``solvers`` and ``precond``
    =========================================== ===================================================
    :math:`U`, of the whole model or of a layer ``WholeFisher``, ``structures.gram.GramEstimator``
    :math:`U U^\top`                            ``structures.gram.gram_of``
    :math:`(U U^\top + \lambda I)^{-1}` and d   ``Woodbury``
    SPRING: b, and d of the step before         ``layerwise.smw.SpringPreconditioner``
    =========================================== ===================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate, in natural-gradient units.
        structure: ``"dense"`` for one matrix over the whole model, ``"layer"`` for one per layer.
        damping: Shift :math:`\lambda` in units of the curvature; must be positive.
        fisher: ``"empirical"`` (free of extra passes), ``"mc"`` or ``"exact"``; or a
            :class:`~precond.WholeFisher` or :class:`~curvature.GramFisher`, which also
            say the structure.
        spring: :math:`\mu`, in [0, 1); 0.99 in the paper.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default 1e-2 of the loss at ``lr=0.1``, proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps for which the matrix of one batch is used.
        inverse_update_period: Of other curvature, which ``structures`` may ask for; and the burn-in, by
            :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Ren and Goldfarb (2019), https://arxiv.org/abs/1906.02353; Goldshlager, Abrahamsen and Lin (2024), SPRING,
        https://arxiv.org/abs/2401.10190
    """

    fisher_types: ClassVar = {"dense": WholeFisher, "layer": GramFisher}
    needs_damping: ClassVar = True
    keeps_rows: ClassVar = True
    absolute_damping: ClassVar = True  # it weighs the pull towards the last solution
    taxonomy: ClassVar = Taxonomy(
        curvature="Fisher (empirical, mc or exact), of one batch",
        structure="Gram matrix: whole model or per layer",
        solver="Woodbury",
        matrices=("Fisher",),
        forms=("low rank",),
        step="2B²(m + n) + 4Bmn, once B³/3",
        refresh="none",
        memory="B(m + n) + B²",
        paper="https://arxiv.org/abs/1906.02353",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        structure: Literal["dense", "layer"] = "dense",
        damping: Scheduled = 1e-3,
        fisher: FisherKind | WholeFisher | GramFisher = "empirical",
        spring: float = 0.0,
        momentum: Scheduled | Momentum = 0.0,
        kl_clip: Scheduled | TrustRegion | None = WHOLE_REGION,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 1,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        number("spring", spring)
        if not 0 <= spring < 1:
            raise ValueError(f"spring is the weight of the previous step, in [0, 1); got {spring}.")
        self.spring = spring
        curvature = self.curvature_with(structure, fisher, default="dense")
        if isinstance(curvature, WholeFisher):
            curvature = replace(curvature, gram=True)
        super().__init__(
            model,
            loss_fn,
            curvature=curvature,
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with self.transaction():
            super().add_param_group(param_group)
            if self.spring and is_adaptive(self.param_groups[-1]):
                raise ValueError(
                    "SMWNaturalGradient: adaptive_rate follows the slope along the momentum, and with spring= a "
                    "direction holds the last one itself. Give one of them."
                )

    def images(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if not self.spring:
            return gradients
        out = dict(gradients)
        for preconditioner in self.preconditioners.values():
            if isinstance(preconditioner, SpringPreconditioner) and preconditioner.image is not None:
                block = preconditioner.estimator.block
                parts = {name: torch.empty_like(self.parameters[name]) for name in block.names}
                block.write(preconditioner.image, parts)
                out |= {p: parts[name] for name in block.names if (p := self.parameters[name]) in gradients}
        return out

    def preconditioner(self, estimator: CurvatureEstimator) -> Preconditioner:
        return SpringPreconditioner(estimator, self.solver, self.spring)


class SpringPreconditioner(Preconditioner):
    r"""Solves pulled towards the previous solution: :math:`d = (C + \lambda I)^{-1} (g + \lambda \mu\, d_{previous})`.

    Args:
        estimator: Estimate of C.
        solver: Inverts.
        spring: :math:`\mu`.
    """

    def __init__(self, estimator: CurvatureEstimator, solver: Solver, spring: float) -> None:
        super().__init__(estimator, solver)
        self.spring = spring
        self.shift = 0.0
        self.previous: Tensor | None = None
        self.image: Tensor | None = None  # what the last solution is the solution for

    def refresh(self, damping: Damping, **options: Any) -> tuple[bool, LinearOperator | None]:
        self.shift = float(damping.strength)
        return super().refresh(damping, **options)

    def __matmul__(self, gradient: Tensor) -> Tensor:
        if not self.spring or self.inverse is None:
            return super().__matmul__(gradient)
        b = gradient.to(torch.promote_types(gradient.dtype, self.inverse.dtype))
        if self.previous is not None:
            b = b + self.shift * self.spring * self.previous
        self.image, self.previous = b, super().__matmul__(b)
        return self.previous.to(gradient.dtype)

    def state_dict(self) -> dict[str, Any]:
        out = {**super().state_dict(), "shift": self.shift}
        return out if self.previous is None else {**out, "previous": self.previous}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.shift, self.previous = float(saved["shift"]), saved.get("previous")
