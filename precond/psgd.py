"""PSGD with Kronecker factors."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from precond.closure import ClosureOptimizer, Vectors, rademacher
from precond.gradient import GradientOptimizer, Group, State, debiased, due, state_zeros, working_dtype
from precond.matrices import gram, merged_shape, multiply
from precond.methods import Taxonomy
from precond.schedules import Scheduled, ScheduledInt

Criterion = Literal["whitening", "hessian"]


class PSGD(ClosureOptimizer, GradientOptimizer):
    r"""PSGD: a preconditioner learnt by stochastic descent, without a solve, one Kronecker factor per axis.

    :math:`P = Q^\top Q` minimises

    .. math:: E[h^\top P h + v^\top P^{-1} v]

    with h the gradient and v white noise (``"whitening"``: :math:`P = E[g g^\top]^{-1/2}`), or :math:`h = H v` with
    random signs v (``"hessian"``: :math:`P = (H^2)^{-1/2} = |H|^{-1}`, the step of Newton's method). With
    :math:`C_k = (P h)_{(k)} (P h)_{(k)}^\top` and :math:`T_k = v_{(k)} v_{(k)}^\top` (its mean, ``numel / n_k``, for
    ``"whitening"``), each factor moves by

    .. math:: Q_k \leftarrow Q_k - \frac{\mu}{\ell_k} (C_k - T_k) Q_k

    with :math:`\ell_k` a running bound of the norm of :math:`C_k + T_k`, and is then turned towards a symmetric matrix,
    which changes P no more than the turn's second-order formula is off from a rotation. Gradients are fitted as if
    noise of size :math:`\delta = ` ``damping + eps * rms(h)`` were added, by its mean, so no random numbers are drawn
    for it. Every 100 steps the factors are scaled to equal size.

    A step costs about ``6 (m^3 + n^3)`` for the factors (less often with a longer ``curvature_update_period``) and ``2
    (m^2 n + m n^2)`` for the direction; only products, so it runs on any accelerator. Memory: one moment, a matrix per
    axis; axes beyond ``max_dim`` and vectors keep a diagonal.

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; for ``"whitening"`` about AdamW's, for ``"hessian"`` relative to Newton's step.
        beta: Decay of the average of gradients that P is applied to.
        criterion: ``"whitening"``, or ``"hessian"``, for which ``step`` needs a closure.
        preconditioner_lr: :math:`\mu`, in (0, 1); from about 0.4 on the factors may oscillate.
        damping: Absolute size of the noise, in units of the gradient.
        eps: Relative size of the noise.
        max_rms: Bound of the root mean square of a parameter's direction; ``None`` for none.
        weight_decay: Weight decay, decoupled unless ``decay`` says otherwise.
        curvature_update_period: Steps between updates of P.
        max_dim: Axes longer than this keep a diagonal.
        merge_dims: Join neighbouring axes up to this size; ``None`` keeps them apart.
        seed: Of the random signs.
        options: See :class:`SecondOrderOptimizer`.

    References:
        Li (2015), https://arxiv.org/abs/1512.04202; Pooladzandi and Li (2024), https://arxiv.org/abs/2402.04553
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment, or absolute Hessian",
        structure="Kronecker, one factor per axis",
        solver="multiplicative descent on the inverse's root",
        matrices=("gradient second moment", "Hessian"),
        forms=("Kronecker",),
        step="6(m²n + mn²) + 12(m³ + n³)",
        refresh="none",
        memory="m² + n²",
        paper="https://arxiv.org/abs/1512.04202",
    )
    needs: ClassVar[str] = "grad"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        criterion: Criterion = "whitening",
        preconditioner_lr: Scheduled = 0.1,
        damping: Scheduled = 1e-9,
        eps: Scheduled = 1e-6,
        max_rms: Scheduled | None = 1.1,
        weight_decay: Scheduled = 0.0,
        curvature_update_period: ScheduledInt = 1,
        max_dim: int = 8192,
        merge_dims: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion is one of {', '.join(get_args(Criterion))}, not {criterion!r}.")
        self.criterion, self.seed = criterion, seed
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            defaults={
                "betas": (beta,),
                "preconditioner_lr": preconditioner_lr,
                "damping": damping,
                "eps": eps,
                "max_rms": max_rms,
                "curvature_update_period": curvature_update_period,
                "max_dim": max_dim,
                "merge_dims": merge_dims,
            },
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        if not 0 < options["preconditioner_lr"] < 1:
            raise ValueError(f"preconditioner_lr is in (0, 1); got {options['preconditioner_lr']}.")
        if options["max_rms"] is not None and not options["max_rms"] > 0:
            raise ValueError(f"max_rms is positive, or None for no bound; got {options['max_rms']}.")

    def initial_state(self, p: Tensor, group: Group) -> State:
        shape = merged_shape(p.shape, group["merge_dims"]) or (1,)
        state: State = {"exp_avg": state_zeros(p, shape), "updates": 0}
        for axis, n in enumerate(shape):
            eye = torch.eye(n, dtype=working_dtype(p), device=p.device)
            state[f"root.{axis}"] = eye if len(shape) > 1 and n <= group["max_dim"] else eye.diagonal().clone()
            state[f"bound.{axis}"] = state_zeros(p, ())
        return state

    def closure_needed(self) -> bool:
        return self.criterion == "hessian"

    def second_order(self) -> bool:
        return self.criterion == "hessian" and due(self.steps + 1, self.common("curvature_update_period"))

    def directions(self, gradients: Vectors) -> Vectors:
        self._probes: Vectors = {}
        self._products: Vectors = {}
        if self.second_order():
            self._probes = {p: rademacher(p, self.seed, self.steps, index) for index, p in enumerate(gradients)}
            self._products = self.hessian_product(self._probes)
        return super().directions(gradients)

    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        beta, shape = group["betas"][0], state["exp_avg"].shape
        state["exp_avg"].lerp_(g.reshape(shape), 1 - beta)
        if self.criterion == "whitening" and due(state["step"], group["curvature_update_period"]):
            self._update(state, group, g.reshape(shape), None)
        elif p in self._probes:
            h, v = (x[p].to(g.dtype).reshape(shape) for x in (self._products, self._probes))
            self._update(state, group, h, v)
        out = _apply(debiased(state["exp_avg"], beta, state["step"]), _metrics(state, len(shape)))
        if group["max_rms"] is not None:
            rms = out.square().mean().sqrt()
            out = out * (group["max_rms"] / torch.maximum(rms, torch.full_like(rms, group["max_rms"])))
        return out.reshape(g.shape)

    def _update(self, state: State, group: Group, h: Tensor, v: Tensor | None) -> None:
        """One descent step on every factor."""
        ndim = h.ndim
        noise = group["damping"] + group["eps"] * h.square().mean().sqrt()
        if not state["updates"]:
            if not bool(h.any()):
                return  # nothing is known of its size
            scale = (_size(h) + noise) ** -0.5 * (1.0 if v is None else _size(v) ** 0.5)
            for axis in range(ndim):
                state[f"root.{axis}"].mul_(scale ** (1 / ndim))
        state["updates"] += 1
        metrics = _metrics(state, ndim)
        norms = [metric.square().sum() for metric in metrics.values()]
        image = _apply(h, metrics)
        for axis, metric in metrics.items():
            root, others = state[f"root.{axis}"], prod(n for k, n in enumerate(norms) if k != axis)
            dense = root.ndim == 2
            # The second term is the mean over the noise.
            c = _gram(image, axis, dense) + noise**2 * others * (metric @ metric if dense else metric.square())
            t: Any = h.numel() / h.shape[axis] if v is None else _gram(v, axis, dense)
            size = _norm(c) + t if v is None else _norm(c + t)
            bound = state[f"bound.{axis}"]
            bound.copy_(torch.maximum(0.9 * bound + 0.1 * size, size))
            if dense:
                change = c @ root - (t * root if v is None else t @ root)
            else:
                change = (c - t) * root
            root.sub_(change * (group["preconditioner_lr"] / bound))
            if dense:
                root.copy_(_turned(root))
        if state["updates"] % 100 == 0:
            sizes = torch.stack([state[f"root.{axis}"].abs().amax() for axis in range(ndim)])
            for axis, factor in enumerate(sizes.log().mean().exp() / sizes):
                state[f"root.{axis}"].mul_(factor)


def _metrics(state: State, ndim: int) -> dict[int, Tensor]:
    """The factors of P, or their diagonals."""
    roots = {axis: state[f"root.{axis}"] for axis in range(ndim)}
    return {axis: root.mT @ root if root.ndim == 2 else root.square() for axis, root in roots.items()}


def _apply(x: Tensor, metrics: dict[int, Tensor]) -> Tensor:
    for axis, metric in metrics.items():
        if metric.ndim == 1:
            x = x * metric.reshape([-1 if k == axis else 1 for k in range(x.ndim)])
    return multiply(x, {axis: metric for axis, metric in metrics.items() if metric.ndim == 2})


def _gram(x: Tensor, axis: int, dense: bool) -> Tensor:
    return gram(x, axis) if dense else x.square().movedim(axis, 0).reshape(x.shape[axis], -1).sum(1)


def _size(x: Tensor) -> Tensor:
    """Fourth root of the mean fourth power, which weighs large entries more than the mean square does."""
    largest = x.abs().amax()
    return largest * (x / largest).square().square().mean() ** 0.25


def _norm(matrix: Tensor) -> Tensor:
    """Spectral norm of a positive semi-definite matrix or diagonal, from below by two steps of the power method."""
    if matrix.ndim == 1:
        return matrix.amax()
    x = matrix[:, matrix.diagonal().argmax()]
    for _ in range(2):
        x = matrix @ (x / torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny))
    return torch.linalg.vector_norm(x)


def _turned(root: Tensor) -> Tensor:
    r"""Q after a small rotation that makes it more symmetric, which leaves :math:`Q^\top Q` as it is.

    For skew R, :math:`\operatorname{tr}(e^{aR} Q) \approx \operatorname{tr} Q + a \operatorname{tr}(R Q) + \tfrac12 a^2
    \operatorname{tr}(R^2 Q)` is largest at symmetric positive definite Q; the gradient direction is
    :math:`R = Q^\top - Q`.
    """
    skew = root.mT - root
    # Singular values of a skew matrix come in pairs, so this is at least the largest.
    size = torch.linalg.matrix_norm(skew) / 2**0.5
    skew = skew / size.clamp(min=torch.finfo(root.dtype).tiny)
    first = skew @ root
    second = skew @ first
    slope, bend = first.diagonal().sum(), second.diagonal().sum()
    longest = torch.full_like(slope, 1 / 8)  # the error of the formula is of third order
    a = torch.where(bend < 0, torch.minimum(-slope / bend, longest), longest)
    return root + a * (first + 0.5 * a * second)
