"""PSGD with Kronecker factors."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from precond.closure.optimizer import ClosureOptimizer
from precond.gradient.matrices import (
    add_axis_gram,
    along,
    axis_gram,
    largest,
    merged_shape,
    multiply,
    unfolded,
    worth_a_matrix,
)
from precond.gradient.optimizer import Group, State, debiased, due, state_zeros
from precond.gradient.stacks import Stack, StackedMomentumOptions, StackedOptimizer, entries
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.graph import Vectors, rademacher
from precond.step.journal import REFRESHES
from precond.step.methods import Taxonomy
from precond.step.options import choice
from precond.step.schedules import Scheduled, ScheduledInt
from solvers.precision import working_dtype

Criterion = Literal["whitening", "hessian"]


class PSGD(ClosureOptimizer, StackedOptimizer):
    r"""PSGD: a preconditioner learnt by stochastic descent, without a solve, one Kronecker factor per axis.

    :math:`P = Q^\top Q` minimises

    .. math:: E[h^\top P h + v^\top P^{-1} v]

    with h the gradient and v white noise (``"whitening"``: :math:`P = E[g g^\top]^{-1/2}`), or :math:`h = H v` with
    random signs v (``"hessian"``: :math:`P = (H^2)^{-1/2} = |H|^{-1}`, the step of Newton's method). With
    :math:`C_k = (P h)_{(k)} (P h)_{(k)}^\top` and :math:`T_k = v_{(k)} v_{(k)}^\top` (its mean, ``numel / n_k``, for
    ``"whitening"``), each factor moves by

    .. math:: Q_k \leftarrow Q_k - \frac{\mu}{\ell_k} (C_k - T_k) Q_k

    with :math:`\ell_k` a running bound of the norm of :math:`C_k + T_k`, and is then turned towards a symmetric matrix,
    which changes P only by the error of the turn's second-order formula for a rotation. Gradients are fitted as if
    noise of size :math:`\delta = ` ``damping + eps * rms(h)`` were added, by its mean, so no random numbers are drawn
    for it. Every 100 steps the factors are scaled to equal size.

    A step costs about ``6 (m^3 + n^3)`` for the factors (less often with a longer ``curvature_update_period``) and ``2
    (m^2 n + m n^2)`` for the direction; only products, so it runs on any accelerator. Memory: one moment, the last
    direction where rates find themselves, a matrix per axis; axes beyond ``max_dim``, axes far longer than all others
    together (``max_ratio``) and vectors keep a diagonal.

    ====================================================== =====================================================
    Li (2015); Pooladzandi and Li (2024)                   here
    ====================================================== =====================================================
    h and v: the gradient, or :math:`H v` and random signs ``update``; ``directions``: ``step.graph.rademacher``
    :math:`C_k - T_k`, and the step of :math:`Q_k`         ``_learn``
    :math:`\ell_k`, by the power method                    ``_learn``: ``bound.k``, ``_norm``
    the noise of damping, by its mean                      ``_learn``: ``noise``
    the first size of Q                                    ``_learn``: ``_size``
    the rotation towards a symmetric Q                     ``_turned``
    factors of equal size                                  ``_balance``
    :math:`P M = Q^\top Q M`                               ``_metrics``, ``_apply``
    ====================================================== =====================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; for ``"whitening"`` about AdamW's, for ``"hessian"`` relative to Newton's step. Without one
            it is 3e-2, and by default for ``"whitening"`` each parameter finds a multiple of that itself
            (:class:`~precond.AdaptiveRate`). With one it is the method of the paper.
        beta: Decay of the average of gradients that P is applied to.
        criterion: ``"whitening"``, or ``"hessian"``, for which ``step`` needs a closure.
        preconditioner_lr: :math:`\mu`, in (0, 1); from about 0.4 on the factors may oscillate.
        damping: Absolute size of the noise, in units of the gradient.
        eps: Relative size of the noise.
        max_rms: Bound of the root mean square of a parameter's direction; ``None`` for none.
        curvature_update_period: Steps between updates of P.
        max_dim: Axes longer than this keep a diagonal.
        max_ratio: Axes longer than this many times all others together keep a diagonal; ``None`` for any.
        merge_dims: Join neighbouring axes up to this size; ``None`` keeps them apart.
        options: See :class:`StackedOptimizer`.

    References:
        Li (2015), https://arxiv.org/abs/1512.04202; Pooladzandi and Li (2024), https://arxiv.org/abs/2402.04553
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment, or absolute Hessian",
        structure="Kronecker, one factor per axis",
        solver="multiplicative descent on the inverse's root",
        matrices=("gradient second moment", "Hessian"),
        forms=("Kronecker",),
        step="6(m²n + mn²) + 10(m³ + n³) + 4(m² + n²)",
        refresh="none",
        memory="m² + n² + mn",
        paper="https://arxiv.org/abs/1512.04202",
    )
    needs: ClassVar[str] = "grad"
    default_lr: ClassVar[float] = 3e-2
    loop_settings: ClassVar[frozenset[str]] = ClosureOptimizer.loop_settings | {"seed"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        beta: float = 0.9,
        criterion: Criterion = "whitening",
        preconditioner_lr: Scheduled = 0.1,
        damping: Scheduled = 1e-9,
        eps: Scheduled = 1e-6,
        max_rms: Scheduled | None = 1.1,
        curvature_update_period: ScheduledInt = 1,
        max_dim: int = 8192,
        max_ratio: float | None = 4.0,
        merge_dims: int | None = None,
        **options: Unpack[StackedMomentumOptions],
    ) -> None:
        self.criterion = choice("criterion", criterion, Criterion)
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": (beta,),
                "preconditioner_lr": preconditioner_lr,
                "damping": damping,
                "eps": eps,
                "max_rms": max_rms,
                "curvature_update_period": curvature_update_period,
                "max_dim": max_dim,
                "max_ratio": max_ratio,
                "merge_dims": merge_dims,
            },
            **options,
        )

    @property
    def own_rate(self) -> AdaptiveRate | None:
        return AdaptiveRate() if self.criterion == "whitening" else None  # the length of Newton's step is known

    def check(self, options: Group) -> None:
        super().check(options)
        if not 0 < options["preconditioner_lr"] < 1:
            raise ValueError(f"preconditioner_lr is in (0, 1); got {options['preconditioner_lr']}.")
        if options["max_rms"] is not None and not options["max_rms"] > 0:
            raise ValueError(f"max_rms is positive, or None for no bound; got {options['max_rms']}.")

    kept: ClassVar[frozenset[str]] = frozenset({"root", "exp_avg"})

    def initial_state(self, p: Tensor, group: Group) -> State:
        shape = merged_shape(p.shape, group["merge_dims"]) or (1,)
        state: State = {"exp_avg": state_zeros(p, shape), "updates": 0}
        for axis, n in enumerate(shape):
            options: Any = {"dtype": working_dtype(p), "device": p.device}
            dense = len(shape) > 1 and worth_a_matrix(n, p.numel(), group["max_dim"], group["max_ratio"])
            state[f"root.{axis}"] = torch.eye(n, **options) if dense else torch.ones(n, **options)
            state[f"bound.{axis}"] = state_zeros(p, ())
        return state

    @property
    def takes_shards(self) -> bool:  # type: ignore[override]  # by the criterion
        return self.criterion == "whitening"

    def closure_needed(self) -> bool:
        return self.criterion == "hessian"

    def second_order(self) -> bool:
        return self.criterion == "hessian"

    def probed(self, params: list[Tensor]) -> list[Tensor]:
        if not self.second_order():
            return []
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        return [
            p
            for p in params
            if due(self.state.get(p, {}).get("step", 0) + 1, group_of[p]["curvature_update_period"]) and p.numel()
        ]

    def directions(self, gradients: Vectors) -> Vectors:
        self._probes: Vectors = {}
        self._products: Vectors = {}
        if probed := self.probed(list(gradients)):
            self._probes = {p: rademacher(p, self.loop.seed, self.steps, index) for index, p in enumerate(probed)}
            self._products = self.hessian_product(self._probes)
        return super().directions(gradients)

    def kind(self, p: Tensor, g: Tensor) -> int:
        """State of the size of P: known (2), can be read off now (1), or unknown, because all is zero (0)."""
        if self.state[p]["updates"]:
            return 2
        h = g if self.criterion == "whitening" else self._products.get(p)
        return int(h is not None and bool(h.any()))

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, step, beta = stack.state, stack.step, group["betas"][0]
        g = g.reshape(state["exp_avg"].shape)
        average = state["exp_avg"] = state["exp_avg"].lerp(g, 1 - beta)
        if self.criterion == "whitening" and due(step, group["curvature_update_period"]):
            self._learn(stack, group, g, None)
        elif stack.params[0] in self._probes:
            pairs = ([found[p].to(g.dtype) for p in stack.params] for found in (self._products, self._probes))
            h, v = (stack.gather(tensors).reshape(g.shape) for tensors in pairs)
            self._learn(stack, group, h, v)
        if step % 100 == 0:
            _balance(state, g.ndim - 1)
        out = _apply(debiased(average, beta, step), _metrics(stack, g.ndim - 1))
        if group["max_rms"] is not None:
            rms = _mean(out.square()).sqrt_()
            if self.asked:
                self.note_cut("clipped", rms > group["max_rms"])
            out = out * (group["max_rms"] / rms.clamp(min=group["max_rms"]))
        return out

    def _learn(self, stack: Stack, group: Group, h: Tensor, v: Tensor | None) -> None:
        """One descent step on every factor."""
        self.events[REFRESHES] += len(stack.params)
        state, roots = stack.state, entries(stack.state, "root", h.ndim - 1)
        noise = group["damping"] + group["eps"] * _mean(h.square()).sqrt_()
        if not self.state[stack.params[0]]["updates"]:
            if not self.kind(stack.params[0], h):
                return
            scale = (_size(h) + noise) ** -0.5 * (1.0 if v is None else _size(v) ** 0.5)
            for axis, root in roots.items():
                state[f"root.{axis}"] = roots[axis] = root * _like(scale ** (1 / len(roots)), root)
        for p in stack.params:
            self.state[p]["updates"] += 1
        metrics = _metrics(stack, len(roots))
        norms = [torch.linalg.vector_norm(metric.flatten(1), dim=1).square_() for metric in metrics.values()]
        image = _apply(h, metrics)
        for axis, metric in metrics.items():
            root, bound = roots[axis], state[f"bound.{axis}"]
            others = prod((n for k, n in enumerate(norms) if k != axis), start=noise.flatten() ** 2)
            dense = root.ndim == 3
            c = _gram(image, axis, dense)
            noisy = metric * _like(others.sqrt(), root)  # the mean over the noise
            if dense:
                add_axis_gram(c, noisy, 0, old=1, new=1)
            else:
                c.addcmul_(noisy, noisy)
            t: Any = h[0].numel() / h.shape[axis + 1] if v is None else _gram(v, axis, dense)
            size = _norm(c) + t if v is None else _norm(c + t)
            bound.copy_(torch.maximum(0.9 * bound + 0.1 * size, size))
            if not dense:
                change = (c - t) * root
            elif v is None:
                change = torch.baddbmm(root, c, root, beta=-t)
            else:
                change = (c - t) @ root
            root = root.addcmul(change, _like(group["preconditioner_lr"] / bound, root), value=-1)
            state[f"root.{axis}"] = _turned(root) if dense else root


def _balance(state: State, ndim: int) -> None:
    """Scale the factors to equal size; P stays the same."""
    roots = entries(state, "root", ndim)
    sizes = {axis: root.abs().flatten(1).amax(1) for axis, root in roots.items()}
    mean = torch.stack(list(sizes.values())).log().mean(0).exp()
    state.update({f"root.{axis}": root * _like(mean / sizes[axis], root) for axis, root in roots.items()})


def _metrics(stack: Stack, ndim: int) -> dict[int, Tensor]:
    """The factors of P ``(k, n, n)``, or their diagonals ``(k, n)``."""
    return {axis: stack.derived(f"root.{axis}", _metric) for axis in entries(stack.state, "root", ndim)}


def _metric(root: Tensor) -> Tensor:
    return axis_gram(root, 1) if root.ndim == 3 else root.square()


def _apply(x: Tensor, metrics: dict[int, Tensor]) -> Tensor:
    for axis, metric in metrics.items():
        if metric.ndim == 2:
            x = x * along(metric, axis, x.ndim - 1)
    return multiply(x, {axis: metric for axis, metric in metrics.items() if metric.ndim == 3})


def _gram(x: Tensor, axis: int, dense: bool) -> Tensor:
    return axis_gram(x, axis) if dense else unfolded(x, axis).square().sum(-1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """One number for each tensor of a stack, as a factor of ``x``."""
    return values.reshape(len(x), *[1] * (x.ndim - 1))


def _mean(x: Tensor) -> Tensor:
    """Mean of each tensor of a stack ``(k, *shape)``, ``(k, 1, ...)``."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def _size(x: Tensor) -> Tensor:
    """Fourth root of the mean fourth power, which weighs large entries more than the mean square does."""
    top = largest(x.abs())
    return top * _mean((x / top).square_().square_()) ** 0.25


def _norm(matrix: Tensor) -> Tensor:
    """Spectral norms of positive semi-definite matrices or diagonals, from below by two steps of the power method."""
    if matrix.ndim == 2:
        return matrix.amax(1)
    column = matrix.diagonal(dim1=-2, dim2=-1).argmax(1)
    x = matrix.gather(1, column[:, None, None].expand(len(matrix), 1, matrix.shape[2]))  # rows: it is symmetric
    for _ in range(2):
        x = x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x = torch.bmm(x, matrix)
    return torch.linalg.vector_norm(x, dim=(1, 2))


def _turned(root: Tensor) -> Tensor:
    r"""Q after a small rotation that makes it more symmetric; :math:`Q^\top Q` stays the same.

    For skew R, :math:`\operatorname{tr}(e^{aR} Q) \approx \operatorname{tr} Q + a \operatorname{tr}(R Q) + \tfrac12 a^2
    \operatorname{tr}(R^2 Q)` is largest at symmetric positive definite Q; the gradient direction is
    :math:`R = Q^\top - Q`.
    """
    skew = root.mT - root
    # Singular values of a skew matrix come in pairs, so this is at least the largest.
    size = torch.linalg.matrix_norm(skew, keepdim=True) / 2**0.5
    unit = torch.where(size > 0, 1 / size, 0)  # a symmetric root stays as it is
    first = skew @ root
    second = skew @ first
    slope, bend = (x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for x in (first, second))
    slope, bend = slope * unit, bend * unit.square()
    longest = torch.full_like(slope, 1 / 8)  # the error of the formula is of third order
    a = torch.where(bend < 0, torch.minimum(-slope / bend, longest), longest) * unit
    return root.addcmul(first, a).addcmul_(second, a * a, value=0.5)
