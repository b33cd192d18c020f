"""The option that lets the quadratic model of a batch choose learning rate and momentum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from precond.step.adapt import LevenbergMarquardt
from precond.step.options import TrustRegion
from precond.step.options import period as check_period
from solvers import Damping
from solvers.outcome.arguments import fields_of


@dataclass(frozen=True)
class QuadraticModel:
    r"""Learning rate and momentum that minimise the damped quadratic model of the current batch.

    .. math:: \begin{pmatrix} \alpha \\ \mu \end{pmatrix} = -\big[V^\top (C + (\lambda + \eta) I) V\big]^{-1} V^\top g,
        \qquad V = (-d, m_{previous}), \qquad m = V (\alpha, \mu)^\top

    with the preconditioned gradient d, the previous move, the exact Gauss-Newton matrix C of the batch, the damping
    :math:`\lambda` of the groups and the strength :math:`\eta` of L2 weight decay. At the first step, and where the two
    vectors are parallel, the shortest solution is taken. The optimizer's ``lr`` multiplies the move; 1 is the method's.

    A step that raises the loss of its own batch is halved until it does not, at most ten times; the length that is left
    (:math:`m^\top C m`) is the trust region of the next steps, and grows by two, in length, when one that it bounds
    keeps three quarters of its promise. ``kl_clip=None`` leaves this out.

    The factors of a Kronecker product may have a damping :math:`\gamma^2` of their own (the entry ``factor_damping``)
    that begins at :math:`\lambda`: every ``factor_period`` steps the inverses are computed for three values of it, and
    the one stays whose step the model promises most. Otherwise :math:`\gamma^2 = \lambda`, which follows the rule at
    once; on a deep autoencoder that was ahead for the first hundred steps.

    Costs two more forward passes of the batch, two backward passes, and one more for each vector.

    Args:
        momentum: Whether the previous move takes part.
        max_kl: An upper bound on :math:`m^\top C m` before ``lr``, in place of the optimizer's ``kl_clip``, which
            bounds it otherwise; the move is shortened to it.
        fraction: Share of the batch that C is taken from, every ``round(1 / fraction)``-th example; the gradient is
            that of all. A quarter is the paper's (section 8). Needs a plain loop, with the examples along the first
            axis.
        factor_period: Steps between choices of :math:`\gamma`, 20 in the paper; ``None`` for
            :math:`\gamma^2 = \lambda`. Without effect where the damping is not :class:`~solvers.FactoredTikhonov`.

    Raises:
        ValueError: If the bound is not positive, or the fraction not in (0, 1].

    References:
        Martens and Grosse (2015), sections 6.6 (:math:`\gamma`) and 7, https://arxiv.org/abs/1503.05671
    """

    momentum: bool = True
    max_kl: float | None = None
    fraction: float = 1.0
    factor_period: int | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        fields_of(self)
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"max_kl must be positive, or None for no bound; got {self.max_kl}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is a share of the batch, in (0, 1]; got {self.fraction}.")
        if self.factor_period is not None:
            check_period("factor_period", self.factor_period)

    def refuse_beside(self, me: str, given: Collection[str], momentum: Any, kl_clip: Any) -> None:
        """Refuse options that were given and that the quadratic model overrides.

        Args:
            me: The method.
            given: Names of the options that were given.
            momentum: Its momentum.
            kl_clip: Its bound.

        Raises:
            ValueError: Naming the option, and what to give in its place.
        """
        if "momentum" in given and momentum != 0:
            raise ValueError(
                f"{me}: momentum={momentum!r} has no effect with step_size=QuadraticModel(), which finds the momentum "
                "of each step itself. Leave it out; QuadraticModel(momentum=False) takes none."
            )
        if "kl_clip" in given and kl_clip is not None and self.max_kl is not None:
            raise ValueError(f"{me}: kl_clip={kl_clip!r} and {self!r} both bound the move; give one of them.")
        if "kl_clip" in given and isinstance(kl_clip, TrustRegion) and kl_clip.unit == "loss":
            raise ValueError(
                f"{me}: step_size=QuadraticModel() bounds the move in the curvature of the batch; give kl_clip as a "
                "number, without unit='loss'."
            )
        if isinstance(kl_clip, TrustRegion) and kl_clip.of == "direction":
            raise ValueError(
                f"{me}: step_size=QuadraticModel() has no bound before momentum; give kl_clip as a number."
            )


def refuse_unjudged(
    me: str, step_size: QuadraticModel | None, rule: LevenbergMarquardt | None, damping: Any, maximize: bool
) -> None:
    """Refuse what does not go with steps that are judged by their quadratic model.

    Args:
        me: The method.
        step_size: Chooses learning rate and momentum.
        rule: Adapts the damping.
        damping: As it was given.
        maximize: Ascend.

    Raises:
        ValueError: Naming the option, and what to give in its place.
    """
    if rule is not None:
        judges_next = step_size is not None and rule.next_batch is not False
        rule.refuse(me, "attempts", *(() if judges_next else ("relative_maximum",)))
        if rule.next_batch and step_size is None:
            raise ValueError(
                f"{me}: next_batch=True of its damping_rule has no effect without step_size=QuadraticModel(), whose "
                "steps it judges; leave it out."
            )
        if callable(damping) and not isinstance(damping, Damping):
            raise ValueError(
                "damping is both a function of the step count and adapted by damping_rule; give one of them."
            )
    if maximize:
        raise ValueError("step_size and damping_rule minimise: maximize=True has no meaning for them. Negate the loss.")
