"""Muon."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from precond.gradient.matrices import matrix_shape, worth_a_matrix
from precond.gradient.optimizer import Group, State, state_zeros
from precond.gradient.stacks import Stack, StackedOptimizer, StackedOptions
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.methods import Taxonomy
from precond.step.options import Momentum, choice
from precond.step.schedules import Scheduled
from solvers.iterative.newton_schulz import odd_polynomials, polar
from solvers.outcome.arguments import number
from solvers.precision import multiplies_bfloat16_faster

Scaling = Literal["adam", "spectral", "none"]
Polynomial = Literal["quintic", "polar_express"]
Precision = Literal["auto", "bfloat16", "full"]

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5


class Muon(StackedOptimizer):
    r"""Muon: momentum with its singular values set to one.

    .. math:: M \leftarrow \mu M + (1 - \mu) G, \quad N = (1 - \mu) G + \mu M, \quad
        D = s\, \operatorname{polar}(N), \quad \operatorname{polar}(U \Sigma V^\top) = U V^\top

    (without Nesterov, N = M). The polar factor comes from a few steps of Newton-Schulz, products only. Tensors with
    more than two axes are matrices with their first axis as rows (convolutions), or stacks of matrices along all but
    the last two axes (``stacked=True``, for experts). Vectors, numbers, matrices of far more rows than columns, and
    groups with ``orthogonalize=False`` take AdamW's step with ``betas`` and ``eps``. :func:`precond.param_groups` finds
    embeddings and keeps them so. The method's author keeps output layers so as well, which this does where they have
    many more outputs than inputs: others reach more targets as matrices (docs/benchmarks.md).

    A step costs about ``6 k m^2 n`` multiplications for k iterations, ``m <= n``. Memory: one average, and the last
    direction where rates find themselves.

    ========================================= =========================================
    paper                                     here
    ========================================= =========================================
    Jordan et al.: momentum, Nesterov         ``update``
    Jordan et al.: Newton-Schulz, quintic     ``orthogonalized``, ``QUINTIC``
    Jordan et al.: convolutions as matrices   ``matrices.matrix_shape``
    Amsel et al.: Polar Express               ``solvers.iterative.newton_schulz.polar``
    Liu et al.: :math:`0.2 \sqrt{\max(m, n)}` ``polar_scale``
    AdamW for the others                      ``gradient.optimizer.adam``
    ========================================= =========================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; with ``scaling="adam"`` the entries of a matrix move by 0.2 of it in the root mean square, as
            AdamW's do, whatever the gradient. Without one it is 3e-2, and by default each parameter finds a multiple of
            that itself (``AdaptiveRate(1.2)``), which suits runs of hundreds of steps; begin with 3e-3 for tens of
            thousands. With one it is the method of the paper.
        momentum: :math:`\mu`, before the orthogonalisation, with Nesterov's look-ahead; ``Momentum(0.95)`` for none.
        scaling: s: ``"adam"`` for ``0.2 sqrt(max(m, n))``, entries as large as AdamW's; ``"spectral"`` for
            ``sqrt(max(1, m / n))``; ``"none"`` for 1, a learning rate in units of spectral norm per step.
        polynomial: Five steps of ``"polar_express"`` (singular values end between 0.85 and 1) or of the first paper's
            ``"quintic"`` (between 0.7 and 1.2).
        precision: Of the products: ``"full"`` is that of the state, float32 or float64; ``"bfloat16"``; ``"auto"``
            takes bfloat16 for float32 where the device multiplies it several times as fast. What five steps leave of
            the polynomial's error, 0.12 of a singular value, is far above the rounding.
        orthogonalize: False for AdamW whatever the shape.
        max_ratio: Matrices with more rows than this many times their columns take AdamW's step: tables of embeddings,
            of whose rows a batch uses few, and heads of large vocabularies (256 entries or fewer count as 256);
            ``None`` keeps all to the method.
        stacked: Whether leading axes count matrices.
        betas: For AdamW.
        eps: For AdamW.
        options: See :class:`StackedOptimizer`.

    References:
        Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/; Liu et al. (2025), the scaling,
        https://arxiv.org/abs/2502.16982; Amsel et al. (2025), Polar Express, https://arxiv.org/abs/2505.16932
    """

    uncycled: ClassVar[frozenset[str]] = frozenset({"betas"})  # of AdamW; the method's momentum is `momentum`
    by_role: ClassVar = {
        **{role: {"orthogonalize": False} for role in ("embedding", "norm", "bias", "vector")},
        "experts": {"stacked": True},
    }
    has_adam: ClassVar[bool] = True
    default_lr: ClassVar[float] = 3e-2
    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment, of the momentum alone",
        structure="one-sided matrix",
        solver="Newton-Schulz",
        matrices=("gradient second moment",),
        forms=("Kronecker",),
        step="20m²n + 10m³ for m ≤ n",
        refresh="none",
        memory="mn",
        paper="https://kellerjordan.github.io/posts/muon/",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        *,
        momentum: Scheduled | Momentum = 0.95,
        scaling: Scaling = "adam",
        polynomial: Polynomial = "polar_express",
        precision: Precision = "auto",
        orthogonalize: bool = True,
        max_ratio: float | None = 4.0,
        stacked: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: Scheduled = 1e-8,
        **options: Unpack[StackedOptions],
    ) -> None:
        if not (isinstance(momentum, Momentum) or callable(momentum)):
            number("momentum", momentum)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum if isinstance(momentum, Momentum) else Momentum(momentum, nesterov=True),
            defaults={
                "scaling": scaling,
                "polynomial": polynomial,
                "precision": precision,
                "orthogonalize": orthogonalize,
                "max_ratio": max_ratio,
                "stacked": stacked,
                "betas": betas,
                "eps": eps,
            },
            **options,
        )

    @property
    def own_rate(self) -> AdaptiveRate:
        return AdaptiveRate(1.2)

    def check(self, options: Group) -> None:
        super().check(options)
        choice("scaling", options["scaling"], Scaling)
        choice("polynomial", options["polynomial"], Polynomial)
        choice("precision", options["precision"], Precision)
        if not options["momentum"] < 1:
            raise ValueError(f"momentum is the weight of old gradients, in [0, 1); got {options['momentum']}.")

    def update_options(self, group: Group) -> Group:
        return {**group, "momentum": 0.0}  # the direction includes it already

    kept: ClassVar[frozenset[str]] = frozenset({"momentum_buffer"})

    def work(self, p: Tensor, group: Group) -> float:
        return super().work(p, group) + (polar_work(p, group) if p.numel() and _is_matrix(p, group) else 0)

    def initial_state(self, p: Tensor, group: Group) -> State:
        if _is_matrix(p, group):
            return {"momentum_buffer": state_zeros(p)}
        return {"exp_avg": state_zeros(p), "exp_avg_sq": state_zeros(p)}

    def diagonal(self, state: State) -> bool:
        return "exp_avg_sq" in state

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        momentum = group["momentum"]
        update = buffer = stack.state["momentum_buffer"] = stack.state["momentum_buffer"].lerp(g, 1 - momentum)
        if group["nesterov"]:
            update = g.lerp(buffer, momentum)
        if not group["stacked"]:
            update = update.reshape(-1, *matrix_shape(g.shape[1:]))
        polar = orthogonalized(update, group["polynomial"], group["precision"])
        return polar.mul_(polar_scale(update, group["scaling"]))


def _is_matrix(p: Tensor, group: Group) -> bool:
    if p.ndim < 2 or not group["orthogonalize"]:
        return False
    rows, columns = p.shape[-2:] if group["stacked"] else matrix_shape(tuple(p.shape))
    return worth_a_matrix(rows, rows * columns, rows, group["max_ratio"])


def polar_work(p: Tensor, group: Group) -> float:
    """Multiplications of five steps on ``(m, n)``, m <= n: ``5 (2 m^2 n + m^3)``, for each matrix of a stack."""
    stack = prod(p.shape[:-2]) if group.get("stacked") else 1
    m, n = sorted(p.shape[-2:] if group.get("stacked") else matrix_shape(tuple(p.shape)))
    return 5.0 * stack * (2 * m * m * n + m**3)


def polar_scale(matrices: Tensor, scaling: Scaling) -> float:
    """The factor s of polar factors ``(*stack, m, n)``; see :class:`Muon`."""
    rows, columns = matrices.shape[-2:]
    if scaling == "adam":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1, rows / columns) ** 0.5 if scaling == "spectral" else 1.0


def orthogonalized(matrix: Tensor, polynomial: Polynomial, precision: Precision = "full") -> Tensor:
    """Polar factor up to the polynomial's accuracy, ``(*stack, m, n)``; zero for a zero matrix."""
    # Squares of very small or very large entries leave the floating range.
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    x = matrix / torch.where(largest == 0, 1, largest)
    if polynomial == "quintic":
        size = torch.linalg.matrix_norm(x, keepdim=True)
        x = x / torch.where(size == 0, 1, size)
    fast = matrix.dtype == torch.float32 and multiplies_bfloat16_faster(matrix.device)
    if precision == "bfloat16" or (precision == "auto" and fast):
        x = x.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    if polynomial == "polar_express":
        x = polar(x, steps=5, together=True)
    else:
        x = odd_polynomials(x, QUINTIC)
    return (x if wide else x.mT).to(matrix)
