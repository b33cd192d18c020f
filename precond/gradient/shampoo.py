"""Shampoo."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor

from precond.gradient.matrices import (
    add_axis_gram,
    blocks,
    eigenbasis,
    merged_shape,
    multiply,
    rotated_root,
    symmetric_power,
    worth_a_matrix,
)
from precond.gradient.optimizer import Group, State, debiased, due, state_zeros
from precond.gradient.stacks import Stack, StackedMomentumOptions, StackedOptimizer, entries
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.methods import Taxonomy
from precond.step.schedules import DOUBLING_TO_10, FIXED, Scheduled, ScheduledInt

Grafting = Literal["sgd", "adagrad", "rmsprop", "adam"]

Region = Any  # index of a block in a stack


class Shampoo(StackedOptimizer):
    r"""Shampoo: one factor per axis of each block, rooted.

    .. math::
        L_k \leftarrow \beta_2 L_k + (1 - \beta_2)\, G_{(k)} G_{(k)}^\top, \qquad
        D = \hat M \times_1 \hat L_1^{-1/(2K)} \cdots \times_K \hat L_K^{-1/(2K)}

    with M the average of gradients, hats for averages divided by their weight, and K the number of axes. Parameters are
    merged (neighbouring axes joined up to ``block_size``) and cut into blocks of at most ``block_size`` along each
    axis; vectors are blocks with one axis. Axes of a block that are far longer than all others together have no factor
    and do not count in K; a block without factors takes the step of the grafted method. Under grafting each block takes
    its length from a diagonal method:

    .. math:: D \leftarrow \frac{\lVert D_{graft} \rVert}{\lVert D \rVert}\, D

    With ``eigenvalue_correction`` the roots of the factors' eigenvalues are replaced by the second moment in their
    eigenbasis, updated at every step, :math:`V \leftarrow \beta_2 V + (1 - \beta_2) (Q^\top G)^{\odot 2}`; grafting is
    then not needed. When the basis changes, V is carried over by the squares of the rotation's entries.

    A step costs ``2 (m^2 n + m n^2)`` multiplications for a block, a refresh ``9 (m^3 + n^3)``. Memory: two averages,
    two matrices per axis, and the last direction where rates find themselves. If a refresh fails in float32
    and in float64 the last root stays; the fourth failure in a row raises with the block's name.

    =============================================================== ==============================================
    paper                                                           here
    =============================================================== ==============================================
    Gupta et al.: :math:`L_k \leftarrow L_k + G_{(k)} G_{(k)}^\top` ``_learn``: ``matrices.add_axis_gram``
    Gupta et al.: :math:`L_k^{-1/(2K)}`                             ``_new_roots``: ``matrices.symmetric_power``
    Gupta et al.: the product along every axis                      ``_apply``: ``matrices.multiply``
    Anil et al.: grafting                                           ``_graft``, and its length in ``update``
    Anil et al.: merged axes, blocks                                ``matrices.merged_shape``, ``matrices.blocks``
    Shi et al.: averages divided by their weight                    ``_learn``: ``weight``; ``optimizer.debiased``
    Shi et al.: a failed root keeps the last one                    ``GradientOptimizer.refresh``
    Eschenhagen et al.: V in the eigenbasis, its root               ``_learn``; ``matrices.rotated_root``
    Eschenhagen et al.: V when the basis changes                    ``_new_basis``
    =============================================================== ==============================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; in the units of the grafted method: with ``"adam"`` a block moves as far as Adam would
            move it, entries by at most about ``lr``. Without one it is 3e-2, and by default each parameter finds a
            multiple of that itself (:class:`~precond.AdaptiveRate`), which suits runs of hundreds of steps; begin with
            1e-3 for tens of thousands. With one it is the published method.
        betas: Decay of the averages of gradients and of their squares; ``None`` for (0.9, 0.95) where rates find
            themselves, and the usual (0.9, 0.999) elsewhere.
        curvature_ema: Decay of the factors; the second of ``betas`` if ``None``, 1 for sums as in the first paper.
        damping: Smallest eigenvalue of a factor, in units of the squared gradient.
        eps: Added to the root of second moments.
        exponent: Power of each factor in place of ``-1 / (2 K)``.
        grafting: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, or ``None`` for Shampoo's own length.
        eigenvalue_correction: See above; not together with ``exponent``.
        inverse_update_period: Steps between roots; ``None`` for 10, of which the first gradient's root serves the first
            ones, or where rates find themselves also after steps 2, 4 and 8 (:class:`~precond.Doubling`).
        start_step: First step that uses the factors; grafting alone before.
        block_size: Largest side of a block.
        max_ratio: Axes longer than this many times all others of their block together have no factor (rows of
            embeddings); ``None`` for any. Where nothing diagonal says the direction (``grafting=None`` or ``"sgd"``) a
            block keeps the factor of its shortest axis.
        options: See :class:`StackedOptimizer`.

    Raises:
        ValueError: If an option is out of range, or options exclude each other.

    References:
        Gupta, Koren and Singer (2018), https://arxiv.org/abs/1802.09568; Anil et al. (2020), section 4 (grafting,
        blocks), https://arxiv.org/abs/2002.09018; Shi et al. (2023), the distributed implementation,
        https://arxiv.org/abs/2309.06497; Eschenhagen et al. (2025), eigenvalue correction,
        https://arxiv.org/abs/2506.03595
    """

    default_lr: ClassVar[float] = 3e-2
    by_rate: ClassVar = {"betas": ((0.9, 0.95), (0.9, 0.999)), "inverse_update_period": (DOUBLING_TO_10, 10)}
    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment",
        structure="Kronecker, one factor per axis, in blocks",
        solver="eigh, inverse root",
        matrices=("gradient second moment",),
        forms=("Kronecker",),
        step="4(m²n + mn²)",
        refresh="11(m³ + n³)",
        memory="2(m² + n²) + mn",
        paper="https://arxiv.org/abs/1802.09568",
    )

    fixed: ClassVar[frozenset[str]] = FIXED | {"curvature_ema"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        betas: tuple[float, float] | None = None,
        curvature_ema: float | None = None,
        damping: Scheduled = 1e-12,
        eps: Scheduled = 1e-8,
        exponent: float | None = None,
        grafting: Grafting | None = "adam",
        eigenvalue_correction: bool = False,
        inverse_update_period: ScheduledInt | None = None,
        start_step: int = 1,
        block_size: int = 1024,
        max_ratio: float | None = 4.0,
        **options: Unpack[StackedMomentumOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": betas,
                "curvature_ema": curvature_ema,
                "damping": damping,
                "eps": eps,
                "exponent": exponent,
                "grafting": grafting,
                "eigenvalue_correction": eigenvalue_correction,
                "inverse_update_period": inverse_update_period,
                "start_step": start_step,
                "block_size": block_size,
                "max_ratio": max_ratio,
            },
            **options,
        )

    @property
    def own_rate(self) -> AdaptiveRate:
        return AdaptiveRate()

    kept: ClassVar[frozenset[str]] = frozenset({"root", "exp_avg", "graft_sq"})

    def check(self, options: Group) -> None:
        super().check(options)
        if options["grafting"] not in (None, *get_args(Grafting)):
            raise ValueError(
                f"grafting is one of {', '.join(get_args(Grafting))}, or None; got {options['grafting']!r}."
            )
        if not options["damping"] > 0:
            raise ValueError(f"damping must be positive, because factors may be singular; got {options['damping']}.")
        if options["eigenvalue_correction"] and options["exponent"] is not None:
            raise ValueError("eigenvalue_correction=True has no factors to raise to an exponent; leave exponent out.")
        if options["start_step"] > 1 and options["grafting"] is None:
            raise ValueError(f"start_step={options['start_step']} needs a grafting method for the steps before.")

    def initial_state(self, p: Tensor, group: Group) -> State:
        shape = merged_shape(p.shape, group["block_size"])
        state: State = {"exp_avg": state_zeros(p, shape)}
        if group["grafting"] not in (None, "sgd"):
            state["graft_sq"] = state_zeros(p, shape)
        if group["eigenvalue_correction"]:
            state["exp_avg_sq"] = state_zeros(p, shape)
        for b, region in enumerate(blocks(shape, group["block_size"])):
            sizes = [len(range(*where.indices(size))) for size, where in zip(shape, region, strict=True)]
            for axis, n in _axes(sizes, group).items():
                state[f"{b}.factor.{axis}"] = state_zeros(p, (n, n))
                # A root, or the basis where eigenvalues are corrected.
                state[f"{b}.root.{axis}"] = torch.eye(n, dtype=state["exp_avg"].dtype, device=p.device)
        return state

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, step, beta1 = stack.state, stack.step, group["betas"][0]
        g = g.reshape(state["exp_avg"].shape)
        state["exp_avg"] = state["exp_avg"].lerp(g, 1 - beta1)
        momentum = debiased(state["exp_avg"], beta1, step)
        graft = None if group["grafting"] is None else _graft(g, momentum, state, step, group)
        regions = list(blocks(g.shape[1:], group["block_size"]))
        outs = []
        for b, region in enumerate(regions):
            part = (slice(None), *region) if len(regions) > 1 else ...
            self._learn(stack, g[part], group, b, part)
            if step < group["start_step"]:
                assert graft is not None
                outs.append(graft[part])
                continue
            matrices = entries(state, f"{b}.root", g.ndim - 1)
            if graft is not None and not matrices:
                outs.append(graft[part])
                continue
            d = _apply(momentum[part], state, step, group, matrices, part)
            if graft is not None:
                d = d * (_length(graft[part]) / _length(d).clamp(min=torch.finfo(d.dtype).tiny))
            outs.append(d)
        if len(regions) == 1:
            return outs[0]
        out = torch.empty_like(g)
        for region, d in zip(regions, outs, strict=True):
            out[(slice(None), *region)] = d
        return out

    def _learn(self, stack: Stack, g: Tensor, group: Group, b: int, part: Region) -> None:
        """Fold gradients into the factors of block b and refresh them when due."""
        state, step, beta2 = stack.state, stack.step, group["betas"][1]
        ema = beta2 if group["curvature_ema"] is None else group["curvature_ema"]
        for axis, factor in entries(state, f"{b}.factor", g.ndim - 1).items():
            add_axis_gram(factor, g, axis, old=ema, new=1 - ema if ema < 1 else 1)
        if due(step, group["inverse_update_period"]) or step == group["start_step"]:
            weight = 1 - ema**step if ema < 1 else 1
            if group["eigenvalue_correction"]:
                self.renew(stack, lambda state: _new_basis(state, b, g.ndim - 1, part), f"{b}.")
            else:
                self.renew(stack, lambda state: _new_roots(state, group, b, g.ndim - 1, weight), f"{b}.")
        if group["eigenvalue_correction"]:
            squares = multiply(g, entries(state, f"{b}.root", g.ndim - 1), transpose=True).square_()
            state["exp_avg_sq"][part].lerp_(squares, 1 - beta2)


def _axes(sizes: Sequence[int], group: Group) -> dict[int, int]:
    """Axes of a block that have a factor, and their sizes."""
    found = {k: n for k, n in enumerate(sizes) if worth_a_matrix(n, prod(sizes), n, group["max_ratio"])}
    needed = not group["eigenvalue_correction"] and group["grafting"] in (None, "sgd")
    return found if found or not needed else {sizes.index(min(sizes)): min(sizes)}


def _apply(m: Tensor, state: State, step: int, group: Group, matrices: dict[int, Tensor], part: Region) -> Tensor:
    if not group["eigenvalue_correction"]:
        return multiply(m, matrices)
    root = rotated_root(state["exp_avg_sq"][part], 1 - group["betas"][1] ** step, group["eps"])
    return multiply(multiply(m, matrices, transpose=True) / root, matrices)


def _new_roots(state: State, group: Group, b: int, ndim: int, weight: float) -> State:
    factors = {axis: factor / weight for axis, factor in entries(state, f"{b}.factor", ndim).items()}
    exponent = -1 / (2 * max(1, len(factors))) if group["exponent"] is None else group["exponent"]
    damping = group["damping"]
    return {f"{b}.root.{axis}": symmetric_power(factor, exponent, damping) for axis, factor in factors.items()}


def _new_basis(state: State, b: int, ndim: int, part: Region) -> State:
    old, factors = entries(state, f"{b}.root", ndim), entries(state, f"{b}.factor", ndim)
    new = {axis: eigenbasis(factor) for axis, factor in factors.items()}
    squares = {axis: (old[axis].mT @ basis).square() for axis, basis in new.items()}
    # The average along the old axes, expressed in the new ones.
    state["exp_avg_sq"][part] = multiply(state["exp_avg_sq"][part], squares, transpose=True)
    return {f"{b}.root.{axis}": basis for axis, basis in new.items()}


def _graft(g: Tensor, momentum: Tensor, state: State, step: int, group: Group) -> Tensor:
    """Direction of the grafted method, applied to the average of gradients."""
    kind, beta2 = group["grafting"], group["betas"][1]
    if kind == "sgd":
        return momentum
    square = state["graft_sq"].mul(1 if kind == "adagrad" else beta2)
    state["graft_sq"] = square.addcmul_(g, g, value=1 if kind == "adagrad" else 1 - beta2)
    second = debiased(square, beta2, step) if kind == "adam" else square
    return momentum / second.sqrt().add_(group["eps"])


def _length(x: Tensor) -> Tensor:
    """Norm of each tensor of a stack ``(k, *shape)``, ``(k, 1, ...)``."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
