"""AdaHessian."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from precond.closure.optimizer import ClosureOptimizer
from precond.gradient.optimizer import GradientMomentumOptions, GradientOptimizer, Group, State, debiased, state_zeros
from precond.step.graph import Vectors
from precond.step.methods import Taxonomy
from solvers.outcome.arguments import number


class AdaHessian(ClosureOptimizer, GradientOptimizer):
    r"""AdaHessian: Adam with the diagonal of the Hessian in place of the gradient.

    .. math::
        h = z \odot H z, \quad M \leftarrow \beta_1 M + (1 - \beta_1) g, \quad
        V \leftarrow \beta_2 V + (1 - \beta_2)\, s(h)^2, \quad
        d = \hat M / (\hat V^{\kappa / 2} + \epsilon)

    with random signs z and s the mean of the absolute values over the kernel of a convolution, elsewhere the absolute
    value. Signs come from ``seed`` and the step; the global random state is not used.

    A step costs a gradient and a product with the Hessian, about three gradients. Memory: two moments.

    ========================================================= ==================================================
    Yao et al., algorithm 1                                   here
    ========================================================= ==================================================
    :math:`z \odot H z`, with the same signs in a resumed run ``hutchinson_diagonal``: ``step.graph.rademacher``
    spatial averaging                                         ``direction``: the mean of ``h``
    M, V, and :math:`\hat V^{\kappa / 2} + \epsilon`          ``direction``
    ========================================================= ==================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        hessian_power: :math:`\kappa`, in (0, 1].
        options: See :class:`GradientOptimizer`.

    References:
        Yao et al. (2021), algorithm 1, https://arxiv.org/abs/2006.00719
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian, absolute, Hutchinson's estimate",
        structure="diagonal, averaged over kernels",
        solver="elementwise",
        matrices=("Hessian",),
        forms=("diagonal",),
        step="a product with H, about two gradients",
        refresh="none",
        memory="mn",
        paper="https://arxiv.org/abs/2006.00719",
    )
    loop_settings: ClassVar[frozenset[str]] = ClosureOptimizer.loop_settings | {"seed"}
    takes_shards = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        hessian_power: float = 1.0,
        **options: Unpack[GradientMomentumOptions],
    ) -> None:
        number("hessian_power", hessian_power)
        if not 0 < hessian_power <= 1:
            raise ValueError(f"hessian_power is in (0, 1]; got {hessian_power}.")
        super().__init__(
            params,
            lr=lr,
            defaults={"betas": betas, "eps": eps, "hessian_power": hessian_power},
            **options,
        )

    def initial_state(self, p: Tensor, group: Group) -> State:
        return {"exp_avg": state_zeros(p), "exp_avg_sq": state_zeros(p)}

    def directions(self, gradients: Vectors) -> Vectors:
        self._diagonal = self.hutchinson_diagonal(list(gradients), self.loop.seed)
        return super().directions(gradients)

    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        h = self._diagonal[p].abs()
        if h.ndim >= 3:
            h = h.mean(tuple(range(2, h.ndim)), keepdim=True)
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).add_(h.square(), alpha=1 - beta2)
        second = debiased(state["exp_avg_sq"], beta2, state["step"])
        root = second.sqrt() if group["hessian_power"] == 1 else second ** (group["hessian_power"] / 2)
        return debiased(state["exp_avg"], beta1, state["step"]) / (root + group["eps"])
