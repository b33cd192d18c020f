"""SOAP."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from precond.gradient.bases import eigenbases, improve_bases, initial_bases
from precond.gradient.matrices import add_axis_gram, merged_shape, multiply, resolved, rotated_root, worth_a_matrix
from precond.gradient.optimizer import Group, State, due, state_zeros
from precond.gradient.stacks import Stack, StackedMomentumOptions, StackedOptimizer, entries
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt


class SOAP(StackedOptimizer):
    r"""SOAP: Adam in the eigenbasis of Shampoo's factors.

    .. math::
        M \leftarrow \beta_1 M + (1 - \beta_1) G, \quad G' = Q_L^\top G\, Q_R, \quad
        V \leftarrow \beta_2 V + (1 - \beta_2)\, G' \odot G', \quad
        D = Q_L \frac{Q_L^\top \hat M\, Q_R}{\sqrt{\hat V} + \epsilon}\, Q_R^\top

    then :math:`L \leftarrow \beta L + (1 - \beta) G G^\top` and likewise R; every ``inverse_update_period`` steps,
    after the move, one step of orthogonal iteration, :math:`Q_L \leftarrow \operatorname{QR}(L Q_L)`, by
    :class:`solvers.Subspace`, whose columns keep their order, so that V stays valid. The momentum is kept rotated,
    which is equivalent between refreshes, and turns along with the bases. The first bases are the eigenvectors of the
    first gradient's factors; the first step already moves.

    Prefer it as the replacement for AdamW where matrices are not too large: learning rates carry over. Tensors of any
    order have one basis per axis; vectors and axes beyond ``max_dim`` are not rotated, which leaves Adam.

    A step costs ``m^2 n + m n^2`` multiplications each for the rotation of the gradient, the way back, and the factors;
    a refresh ``O(m^3 + n^3)``. Memory: two moments, two factors, two bases, and the last
    direction where rates find themselves.

    ========================================================== =====================================================
    Vyas et al., algorithm 3                                   here
    ========================================================== =====================================================
    :math:`G' = Q_L^\top G\, Q_R`, and the way back            ``update``: ``matrices.multiply``
    :math:`M' = Q_L^\top M Q_R`, the momentum rotated          ``update``: ``exp_avg``
    V, and :math:`M' / (\sqrt V + \epsilon)`                   ``update``: ``exp_avg_sq``, ``matrices.rotated_root``
    :math:`L \leftarrow \beta L + (1 - \beta) G G^\top`, and R ``_update_factors``: ``matrices.add_axis_gram``
    the first basis: eigenvectors of L and R                   ``bases.eigenbases``
    :math:`Q_L \leftarrow \operatorname{QR}(L Q_L)`            ``bases.improve_bases``: :class:`solvers.Subspace`
    Adam where nothing is rotated                              ``gradient.optimizer.adam``
    ========================================================== =====================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate: about the largest change of a rotated entry in a step, as Adam's. Without one it is 3e-2, and
            by default each parameter finds a multiple of that itself (:class:`~precond.AdaptiveRate`), which suits runs
            of hundreds of steps; for tens of thousands begin with 3e-3. With one it is the method of the paper.
        betas: Decay of first and second moment; ``None`` for (0.9, 0.95) where rates find themselves, and the published
            (0.95, 0.95) elsewhere.
        curvature_ema: Decay of the factors; the second of ``betas`` if ``None``.
        eps: Added to the root of the second moment.
        inverse_update_period: Steps between refreshes of the bases.
        max_dim: Axes longer than this are not rotated.
        max_ratio: Axes longer than this many times all others together are not rotated (rows of embeddings); ``None``
            for any.
        merge_dims: Join neighbouring axes up to this size (convolutions); ``None`` keeps them apart.
        rotate_vectors: Also rotate parameters of one axis.
        options: See :class:`StackedOptimizer`.

    References:
        Vyas et al. (2024), algorithm 3, https://arxiv.org/abs/2409.11321
    """

    has_adam: ClassVar[bool] = True
    default_lr: ClassVar[float] = 3e-2
    by_rate: ClassVar = {"betas": ((0.9, 0.95), (0.95, 0.95))}
    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment",
        structure="diagonal in a Kronecker eigenbasis",
        solver="eigh, then a QR step per refresh",
        matrices=("gradient second moment",),
        forms=("Kronecker eigenbasis",),
        step="6(m²n + mn²)",
        refresh="12(m³ + n³)",
        memory="2(m² + n²) + 2mn",
        paper="https://arxiv.org/abs/2409.11321",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        betas: tuple[float, float] | None = None,
        curvature_ema: Scheduled | None = None,
        eps: Scheduled = 1e-8,
        inverse_update_period: ScheduledInt = 10,
        max_dim: int = 10000,
        max_ratio: float | None = 4.0,
        merge_dims: int | None = None,
        rotate_vectors: bool = False,
        **options: Unpack[StackedMomentumOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": betas,
                "curvature_ema": curvature_ema,
                "eps": eps,
                "inverse_update_period": inverse_update_period,
                "max_dim": max_dim,
                "max_ratio": max_ratio,
                "merge_dims": merge_dims,
                "rotate_vectors": rotate_vectors,
            },
            **options,
        )

    @property
    def own_rate(self) -> AdaptiveRate:
        return AdaptiveRate()

    kept: ClassVar[frozenset[str]] = frozenset({"basis", "exp_avg", "exp_avg_sq"})

    def initial_state(self, p: Tensor, group: Group) -> State:
        shape = merged_shape(p.shape, group["merge_dims"])
        state: State = {"exp_avg": state_zeros(p, shape), "exp_avg_sq": state_zeros(p, shape)}
        if len(shape) > 1 or group["rotate_vectors"]:
            limits = group["max_dim"], group["max_ratio"]
            sizes = {axis: n for axis, n in enumerate(shape) if n > 1 and worth_a_matrix(n, p.numel(), *limits)}
            state |= initial_bases(p, sizes)
        return state

    def diagonal(self, state: State) -> bool:
        return not any(key.startswith("factor.") for key in state)

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, step = stack.state, stack.step
        beta1, beta2 = group["betas"]
        g = g.reshape(state["exp_avg"].shape)
        bases = entries(state, "basis", g.ndim - 1)
        if step == 1:
            _update_factors(state, g, group)
            self.renew(stack, lambda state: eigenbases(state, bases))
            bases = entries(state, "basis", g.ndim - 1)
        rotated = multiply(g, bases, transpose=True)
        if step == 1 and bases:
            rotated = resolved(rotated)
        momentum = state["exp_avg"] = state["exp_avg"].lerp(rotated, 1 - beta1)
        second = state["exp_avg_sq"] = state["exp_avg_sq"].mul(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        root = rotated_root(second, 1 - beta2**step, group["eps"])
        out = multiply(momentum / root.mul_(1 - beta1**step), bases)
        if step > 1:
            _update_factors(state, g, group)
            if due(step, group["inverse_update_period"]):
                self.renew(stack, lambda state: improve_bases(state, bases))
        return out


def _update_factors(state: State, g: Tensor, group: Group) -> None:
    ema = group["betas"][1] if group["curvature_ema"] is None else group["curvature_ema"]
    for axis, factor in entries(state, "factor", g.ndim - 1).items():
        add_axis_gram(factor, g, axis, old=ema, new=1 - ema)
