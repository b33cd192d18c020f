"""K-BFGS."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from curvature.estimation.passes import Pass
from curvature.estimation.step_collector import ApartCollector, StepCollector
from curvature.structures.kbfgs import KroneckerBFGS, KroneckerBFGSEstimator
from precond.distributed.ranks import check_fraction
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.method import LayerwiseMethod, LayerwiseOptions
from precond.step.methods import Taxonomy
from precond.step.options import CURVATURE_REGION, Momentum, Refresh, TrustRegion
from precond.step.schedules import Scheduled, ScheduledInt
from solvers import Cholesky


class KBFGS(LayerwiseMethod):
    r"""K-BFGS: K-FAC's Kronecker structure, with both inverses kept up to date by BFGS.

    .. math:: d = H_B\, \nabla_W L\, H_A

    with :math:`H_A \approx (A + \sqrt\lambda I)^{-1}` from the second moment A of the layer's inputs, and
    :math:`H_B \approx (B + \sqrt\lambda I)^{-1}` from how much the gradient with respect to the layer's outputs changes
    in a step: after the parameters have moved, :meth:`step` runs the same batch once more, forward and backward through
    the activations, with the same random numbers, and leaves buffers and gradients as they were. Pairs are damped
    twice by Powell's rule, with ``mu`` for the inverse and with :math:`\sqrt\lambda` for the identity.

    Prefer it to K-FAC where decompositions are what costs: no matrix is factorised after the first step, and an update
    is ``O(d^2)``. In return each update costs a second pass, and inputs are kept until the step ends. The curvature
    along a step is that of the loss itself (its Hessian in the layer's outputs), not a Fisher.

    After :meth:`precondition`, when another optimizer moves the parameters, the second pass runs at the next forward
    pass that is watched; a checkpoint between the two leaves that pair out.

    ==================================== ===================================================
    Goldfarb, Ren and Bahamou (2020)     here, in ``curvature`` and ``precond``
    ==================================== ===================================================
    A: second moment of inputs           ``structures.kfac.KroneckerEstimator``
    :math:`H_A` by BFGS                  ``structures.kbfgs.KroneckerBFGSEstimator.improve``
    :math:`H_B` by BFGS, from two passes ``structures.kbfgs.KroneckerBFGSEstimator.end``
    BFGS update of an inverse            ``structures.kbfgs.bfgs``
    algorithm 3: double damping          ``structures.kbfgs.double_damped``
    the second pass over a batch         ``KBFGS.after_move``
    ==================================== ===================================================

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        lr: Learning rate.
        damping: :math:`\lambda` in units of the curvature, positive.
        curvature: A :class:`~curvature.KroneckerBFGS`, which has the ``mu`` of Powell's damping, the multiple of the
            identity that :math:`H_B` begins with (``initial``), and the largest side of a layer; others get a diagonal.
        curvature_ema: Weight of old statistics and of old pairs.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        kl_clip: Bound on twice the predicted divergence of a move, momentum included, without which large learning
            rates diverge: a number, the bound at the learning rate to begin with; or a :class:`~precond.TrustRegion`,
            by default one whose bound is proportional to ``lr ** 2``; ``None`` for none.
        curvature_update_period: Steps between updates, each with a second pass.
        inverse_update_period: Of other curvature, which ``structures`` may ask for; and the burn-in, by
            :class:`~precond.Refresh`.
        options: See :class:`LayerwiseMethod` and :class:`PreconditionedOptimizer`.

    Raises:
        ValueError: If an option is out of range, or ``maximize`` is asked for: BFGS looks for a minimum.

    References:
        Goldfarb, Ren and Bahamou (2020), https://arxiv.org/abs/2006.08877
    """

    needs_damping: ClassVar = True
    absolute_damping: ClassVar = True
    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian by secant pairs",
        structure="Kronecker, per layer",
        solver="BFGS",
        matrices=("Hessian",),
        forms=("Kronecker",),
        step="2(m²n + mn²)",
        refresh="a second pass, Bn² + O(m² + n²)",
        memory="m² + 2n²",
        paper="https://arxiv.org/abs/2006.08877",
    )

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        lr: float | Tensor,
        damping: Scheduled = 0.1,
        curvature: KroneckerBFGS = KroneckerBFGS(),
        curvature_ema: Scheduled = 0.9,
        momentum: Scheduled | Momentum = 0.9,
        kl_clip: Scheduled | TrustRegion | None = CURVATURE_REGION,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 1,
        **options: Unpack[LayerwiseOptions],
    ) -> None:
        if not isinstance(curvature, KroneckerBFGS):
            raise TypeError(f"{type(self).__name__}: curvature is a KroneckerBFGS(...), not {curvature!r}.")
        if check_fraction(options.get("memory_fraction", 1.0)) != 1:
            raise NotImplementedError(
                "KBFGS needs the averages of all blocks in every process, before and after a step: leave out "
                f"memory_fraction={options['memory_fraction']}."
            )
        if options.get("maximize") is True:
            raise ValueError("KBFGS minimises: maximize=True has no meaning for it. Negate the loss.")
        self._passes: list[Pass] = []  # of the last step, to be run again
        self._waits = False  # whether they are; another process may have some where this one has none
        self._seen = 0  # calls of the loss in the step, of all processes
        self._scale: Tensor | float = 1.0  # of a GradScaler in them
        super().__init__(
            model,
            loss_fn,
            curvature=curvature,
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
        if self.statistics.loss is None:
            raise ValueError(
                f"KBFGS evaluates the loss once more after a step, and {type(loss_fn).__name__} is of unknown type. "
                "Pass curvature.losses.AutogradLoss(loss_fn, reduction='mean') and call that in the loop, or register "
                "it (curvature.losses.register_loss)."
            )
        self.tape.repeats = True

    def unserved_on_shards(self) -> list[str]:
        return [*super().unserved_on_shards(), "second passes on the same batch"]

    def after_move(self) -> None:
        super().after_move()  # a step that is shortened or taken back ends here
        if self.taken_back:  # it teaches nothing
            self._passes, self._waits = [], False
            for _, estimator, weights in self._estimators():
                estimator.end(weights)
        self._run_again()

    @property
    def follows_move(self) -> bool:
        return self._waits or super().follows_move

    def collector(self) -> StepCollector:
        return ApartCollector(self.parameters, self.begin_block, joint=self.curvature.joint, forget=self.drop_block)

    def follow(self) -> None:
        # Called before a pass is recorded: parameters that another optimizer moved are where they were moved to.
        self._run_again()
        super().follow()

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        passes = self.tape.passes if self.statistics.armed else []
        self._seen = 0
        out = super().directions(gradients)
        if self._seen:
            self._passes, self._scale, self._waits = passes, self.loss_scale(), True
            for _, estimator, weights in self._estimators():
                estimator.begin(weights)
        return out

    def finish_statistics(self, gradients: dict[str, Tensor]) -> int:
        self._seen = super().finish_statistics(gradients)
        return self._seen

    def _estimators(self) -> list[tuple[Preconditioner, KroneckerBFGSEstimator, Tensor]]:
        """Blocks that learn from pairs, and their parameters."""
        found = []
        for preconditioner in self.preconditioners.values():
            estimator = preconditioner.estimator
            if isinstance(estimator, KroneckerBFGSEstimator):
                found.append((preconditioner, estimator, estimator.block.read(self.parameters)))
        return found

    def _run_again(self) -> None:
        """The second pass, on the batch of the last step."""
        if not self._waits:
            return
        with self.transaction():
            passes, self._passes, self._waits = self._passes, [], False
            seen = self.again(passes, self._scale)
            for preconditioner, estimator, weights in self._estimators():
                estimator.end(weights)
                if preconditioner.inverse is not None:
                    preconditioner.inverse = estimator.operator()
            self.on_skip()  # what the pass left in other estimates is not a step
        if not seen:
            raise RuntimeError(
                "KBFGS could not repeat the batch of the last step, because it did not see how the loss came about. "
                "Call the loss module given to the optimizer on the output of the model."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_passes": [], "_waits": False}
