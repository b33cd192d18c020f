"""KL-Shampoo."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.gradient.bases import improve_bases, initial_bases
from precond.gradient.matrices import add_axis_gram, along, merged_shape, multiply, unfolded, worth_a_matrix
from precond.gradient.optimizer import Group, State, debiased, due, state_zeros
from precond.gradient.stacks import Stack, StackedMomentumOptions, StackedOptimizer, entries
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt
from solvers.outcome.arguments import flag


class KLShampoo(StackedOptimizer):
    r"""KL-Shampoo: the Kronecker factors that are nearest to the gradient's covariance in KL divergence.

    For a matrix, the factors are fitted together as those of a matrix normal distribution,

    .. math::
        S_a \leftarrow \beta_2 S_a + \frac{1 - \beta_2}{n} G S_b^{-1} G^\top, \qquad
        S_b \leftarrow \beta_2 S_b + \frac{1 - \beta_2}{m} G^\top S_a^{-1} G, \qquad
        D = S_a^{-1/2} \hat M S_b^{-1/2}

    with :math:`S = Q \operatorname{diag}(\lambda) Q^\top` in these powers: the eigenvalues :math:`\lambda` are averaged
    at every step from the diagonal of :math:`Q^\top \Delta S\, Q`, the bases Q take one step of orthogonal iteration
    every ``inverse_update_period`` steps. Tensors of any order have one factor per axis. All factors begin as the
    multiple of the identity that gives their product the first gradient's mean square, which counts as one gradient:
    at step t the weight of the old value is :math:`\min(\beta_2, t / (t + 1))`. Vectors take Adam's step.

    Against SOAP it keeps no second moment, so it needs less memory, and needs no grafting. Learning rates are Adam's.
    A step costs as much as SOAP's; memory: one moment, two matrices per axis, and the last
    direction where rates find themselves.

    ================================================================ ==================================================
    Lin et al.                                                       here
    ================================================================ ==================================================
    :math:`S_a` and :math:`S_b`, each whitened by the other          ``_update_factors``: ``matrices.add_axis_gram``
    :math:`\lambda` from the diagonal of :math:`Q^\top \Delta S\, Q` ``_update_factors``: ``eigenvalues.k``
    :math:`Q \leftarrow \operatorname{QR}(S Q)`                      ``bases.improve_bases``: :class:`solvers.Subspace`
    :math:`\lambda^{-1/2}`, from a smallest eigenvalue on            ``_root``
    :math:`S_a^{-1/2} \hat M S_b^{-1/2}`                             ``update``: ``matrices.multiply``
    ================================================================ ==================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate, in Adam's units: about the root mean square of the change of an entry while gradients agree.
            Without one it is 3e-2, and by default each parameter finds a multiple of that itself
            (:class:`~precond.AdaptiveRate`), which suits runs of hundreds of steps; begin with 3e-3 for tens of
            thousands. With one it is the method of the paper.
        betas: Decay of the average of gradients, and of the factors; ``None`` for (0.9, 0.95) where rates find
            themselves, and (0.95, 0.95) elsewhere.
        eps: For Adam's step, and the smallest eigenvalue of a factor relative to their mean.
        inverse_update_period: Steps between refreshes of the bases.
        max_dim: Axes longer than this have no factor.
        max_ratio: Axes longer than this many times all others together have none (rows of embeddings); ``None``
            for any.
        merge_dims: Join neighbouring axes up to this size; ``None`` keeps them apart.
        warm_average: Means of the gradients so far at first, as above; False for :math:`\beta_2` from the first step
            on, as published, where the identity still has a weight of 0.36 after 20 steps of 0.95, as a damping.
        options: See :class:`StackedOptimizer`.

    References:
        Lin et al. (2025), https://arxiv.org/abs/2509.03378
    """

    has_adam: ClassVar[bool] = True
    default_lr: ClassVar[float] = 3e-2
    by_rate: ClassVar = {"betas": ((0.9, 0.95), (0.95, 0.95))}
    taxonomy: ClassVar = Taxonomy(
        curvature="gradient covariance, nearest in KL divergence",
        structure="Kronecker, one factor per axis",
        solver="QR step per refresh, inverse root",
        matrices=("gradient second moment",),
        forms=("Kronecker",),
        step="8(m²n + mn²)",
        refresh="12(m³ + n³)",
        memory="2(m² + n²)",
        paper="https://arxiv.org/abs/2509.03378",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        betas: tuple[float, float] | None = None,
        eps: Scheduled = 1e-8,
        inverse_update_period: ScheduledInt = 10,
        max_dim: int = 10000,
        max_ratio: float | None = 4.0,
        merge_dims: int | None = None,
        warm_average: bool = True,
        **options: Unpack[StackedMomentumOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": betas,
                "eps": eps,
                "inverse_update_period": inverse_update_period,
                "max_dim": max_dim,
                "max_ratio": max_ratio,
                "merge_dims": merge_dims,
                "warm_average": warm_average,
            },
            **options,
        )

    @property
    def own_rate(self) -> AdaptiveRate:
        return AdaptiveRate()

    kept: ClassVar[frozenset[str]] = frozenset({"basis", "exp_avg"})

    def check(self, options: Group) -> None:
        super().check(options)
        flag("warm_average", options["warm_average"])

    def initial_state(self, p: Tensor, group: Group) -> State:
        shape = merged_shape(p.shape, group["merge_dims"])
        state: State = {"exp_avg": state_zeros(p, shape)}
        limits = group["max_dim"], group["max_ratio"]
        axes = [k for k, n in enumerate(shape) if n > 1 and worth_a_matrix(n, p.numel(), *limits)]
        axes = axes if len(shape) > 1 else []
        state |= initial_bases(p, {axis: shape[axis] for axis in axes})
        state |= {f"eigenvalues.{axis}": state_zeros(p, (shape[axis],)) for axis in axes}
        if not axes:
            state["exp_avg_sq"] = state_zeros(p, shape)
        return state

    def diagonal(self, state: State) -> bool:
        return "exp_avg_sq" in state

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, step, beta1 = stack.state, stack.step, group["betas"][0]
        g = g.reshape(state["exp_avg"].shape)
        bases = entries(state, "basis", g.ndim - 1)
        rotated = multiply(g, bases, transpose=True)
        state["exp_avg"] = state["exp_avg"].lerp(rotated, 1 - beta1)
        beta2 = group["betas"][1]
        old = min(beta2, step / (step + 1)) if group["warm_average"] else beta2
        _update_factors(rotated, state, group, list(bases), old)
        if due(step, group["inverse_update_period"]):
            self.renew(stack, lambda state: improve_bases(state, bases))
            bases = entries(state, "basis", g.ndim - 1)
        out = debiased(state["exp_avg"], beta1, step)
        for k in bases:
            out = out * _root(state, group, k, g.ndim - 1)
        return multiply(out, bases)


def _update_factors(rotated: Tensor, state: State, group: Group, axes: list[int], old: float) -> None:
    shape = rotated.shape
    first = rotated.square().flatten(1).mean(1, keepdim=True).pow(1 / len(axes))
    for k in axes:
        # Averages stay at zero until the first nonzero gradient, which may be this one.
        factor, eigenvalues = state[f"factor.{k}"], state[f"eigenvalues.{k}"]
        unknown = torch.where(eigenvalues.sum(1, keepdim=True) == 0, first, 0)
        eigenvalues.add_(unknown)
        factor.diagonal(dim1=-2, dim2=-1).add_(unknown)
    roots = {k: _root(state, group, k, len(shape) - 1) for k in axes}
    for k in axes:
        whitened = rotated
        for j in axes:
            if j != k:
                whitened = whitened * roots[j]
        weight = (1 - old) / (prod(shape[1:]) / shape[k + 1])
        # The diagonal of the change in its own basis, and the change itself.
        state[f"eigenvalues.{k}"].mul_(old).add_(unfolded(whitened, k).square().sum(-1), alpha=weight)
        whitened = multiply(whitened, {k: state[f"basis.{k}"]})
        add_axis_gram(state[f"factor.{k}"], whitened, k, old=old, new=weight)


def _root(state: State, group: Group, axis: int, ndim: int) -> Tensor:
    """Inverse roots of a factor's eigenvalues along its axis, zero before the first nonzero gradient."""
    eigenvalues = state[f"eigenvalues.{axis}"]
    floor = group["eps"] * eigenvalues.mean(1, keepdim=True)
    return along(torch.where(floor > 0, torch.maximum(eigenvalues, floor).rsqrt_(), 0), axis, ndim)
