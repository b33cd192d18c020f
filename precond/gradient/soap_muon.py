"""SOAP-Muon."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from precond.gradient.bases import eigenbases, improve_bases, initial_bases
from precond.gradient.matrices import add_axis_gram, matrix_shape, multiply, resolved, rotated_root, worth_a_matrix
from precond.gradient.muon import Polynomial, Precision, Scaling, orthogonalized, polar_scale, polar_work
from precond.gradient.optimizer import Group, State, due, state_zeros
from precond.gradient.stacks import Stack, StackedOptimizer, StackedOptions, entries
from precond.step.methods import Taxonomy
from precond.step.norm_control import is_matrix
from precond.step.options import Momentum, choice
from precond.step.schedules import FIXED, Scheduled, ScheduledInt
from solvers.outcome.arguments import number


class SOAPMuon(StackedOptimizer):
    r"""SOAP-Muon: Muon's step for momentum that SOAP has preconditioned.

    .. math:: M \leftarrow \mu M + (1 - \mu) G, \quad N = (1 - \mu) G + \mu M, \quad
        V \leftarrow \beta V + (1 - \beta) (Q_L^\top G\, Q_R)^{\odot 2}, \quad
        D = s\, Q_L \operatorname{polar}\!\Big(\frac{Q_L^\top N Q_R}{\sqrt{\hat V} + \epsilon}\Big) Q_R^\top

    (without Nesterov, N = M), then :math:`L \leftarrow \beta L + (1 - \beta) G G^\top` and likewise R, and one step of
    orthogonal iteration on :math:`Q_L, Q_R`, by default after every step. The momentum is kept in the bases, and turns
    along with them. Matrices are as in :class:`Muon`; vectors, numbers, matrices without a basis, and groups with
    ``orthogonalize=False`` take AdamW's step: :func:`precond.param_groups` finds embeddings and output layers.

    A step costs SOAP's ``6(m^2 n + m n^2)``, Muon's ``22 m^2 n + 10 m^3`` for ``m <= n``, and a refresh at each.

    =============================================================== ==============================================
    Track 3 of modded-nanogpt                                       here
    =============================================================== ==============================================
    Nesterov's momentum                                             ``update``: ``exp_avg``
    second moment in the bases of L and R                           ``update``: ``exp_avg_sq``, ``rotated_root``
    Newton-Schulz after that                                        ``muon.orthogonalized``
    bases renewed at every step                                     ``bases.improve_bases``
    AdamW for the others                                            ``gradient.optimizer.adam``
    =============================================================== ==============================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; with ``scaling="adam"`` the entries of a matrix move by 0.2 of it in the root mean square.
        momentum: :math:`\mu`, with Nesterov's look-ahead; ``Momentum(0.95)`` for none.
        curvature_ema: :math:`\beta`, of the factors and of V.
        scaling: s, see :class:`Muon`.
        polynomial: Five steps of ``"polar_express"`` or ``"quintic"``, see :class:`Muon`.
        precision: Of the polynomial's products, see :class:`Muon`; bases and factors are in full precision.
        orthogonalize: False for AdamW whatever the shape.
        betas: For AdamW.
        eps: Added to the roots of second moments.
        inverse_update_period: Steps between refreshes of the bases.
        max_dim: Axes longer than this have no basis.
        max_ratio: Axes longer than this many times the other have no basis; ``None`` for any.
        options: See :class:`StackedOptimizer`.

    References:
        Track 3 of modded-nanogpt (2026), https://github.com/KellerJordan/modded-nanogpt/pull/278, at every step
        https://github.com/KellerJordan/modded-nanogpt/pull/321; Vyas et al. (2024), SOAP,
        https://arxiv.org/abs/2409.11321; Jordan et al. (2024), Muon, https://kellerjordan.github.io/posts/muon/
    """

    uncycled: ClassVar[frozenset[str]] = frozenset({"betas"})  # of AdamW; the method's momentum is `momentum`
    fixed: ClassVar[frozenset[str]] = FIXED | {"curvature_ema"}
    by_role: ClassVar = {
        role: {"orthogonalize": False} for role in ("experts", "embedding", "head", "norm", "bias", "vector")
    }
    has_adam: ClassVar[bool] = True
    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment",
        structure="diagonal in a Kronecker eigenbasis, then one-sided matrix",
        solver="eigh, then a QR step per refresh; Newton-Schulz",
        matrices=("gradient second moment",),
        forms=("Kronecker eigenbasis",),
        step="26m²n + 6mn² + 10m³ for m ≤ n",
        refresh="12(m³ + n³)",
        memory="2(m² + n²) + mn",
        paper="https://github.com/KellerJordan/modded-nanogpt/pull/278",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-2,
        *,
        momentum: Scheduled | Momentum = 0.95,
        curvature_ema: float = 0.95,
        scaling: Scaling = "adam",
        polynomial: Polynomial = "polar_express",
        precision: Precision = "auto",
        orthogonalize: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: Scheduled = 1e-8,
        inverse_update_period: ScheduledInt = 1,
        max_dim: int = 10000,
        max_ratio: float | None = 4.0,
        **options: Unpack[StackedOptions],
    ) -> None:
        if not (isinstance(momentum, Momentum) or callable(momentum)):
            number("momentum", momentum)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum if isinstance(momentum, Momentum) else Momentum(momentum, nesterov=True),
            defaults={
                "curvature_ema": curvature_ema,
                "scaling": scaling,
                "polynomial": polynomial,
                "precision": precision,
                "orthogonalize": orthogonalize,
                "betas": betas,
                "eps": eps,
                "inverse_update_period": inverse_update_period,
                "max_dim": max_dim,
                "max_ratio": max_ratio,
            },
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        choice("scaling", options["scaling"], Scaling)
        choice("polynomial", options["polynomial"], Polynomial)
        choice("precision", options["precision"], Precision)
        if not options["momentum"] < 1:
            raise ValueError(f"momentum is the weight of old gradients, in [0, 1); got {options['momentum']}.")
        number("curvature_ema", options["curvature_ema"], low=0, high=1, open_high=True)

    def update_options(self, group: Group) -> Group:
        return {**group, "momentum": 0.0}  # the direction includes it already

    kept: ClassVar[frozenset[str]] = frozenset({"basis", "exp_avg", "exp_avg_sq"})

    def work(self, p: Tensor, group: Group) -> float:
        return super().work(p, group) + (
            polar_work(p, group) if not self.diagonal(self.expected_state(p, group)) else 0
        )

    def initial_state(self, p: Tensor, group: Group) -> State:
        if is_matrix(p) and group["orthogonalize"]:
            shape, limits = matrix_shape(p.shape), (group["max_dim"], group["max_ratio"])
            sizes = {axis: n for axis, n in enumerate(shape) if n > 1 and worth_a_matrix(n, p.numel(), *limits)}
            if sizes:
                moments = {name: state_zeros(p, shape) for name in ("exp_avg", "exp_avg_sq")}
                return {**moments, **initial_bases(p, sizes)}
        return {"exp_avg": state_zeros(p), "exp_avg_sq": state_zeros(p)}

    def diagonal(self, state: State) -> bool:
        return not any(key.startswith("factor.") for key in state)

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, step, momentum, ema = stack.state, stack.step, group["momentum"], group["curvature_ema"]
        g = g.reshape(state["exp_avg"].shape)
        bases = entries(state, "basis", 2)
        if step == 1:
            _update_factors(state, g, ema)
            self.renew(stack, lambda state: eigenbases(state, bases))
            bases = entries(state, "basis", 2)
        rotated = multiply(g, bases, transpose=True)
        if step == 1 and bases:
            rotated = resolved(rotated)
        ahead = state["exp_avg"] = state["exp_avg"].lerp(rotated, 1 - momentum)
        if group["nesterov"]:
            ahead = rotated.lerp(ahead, momentum)
        second = state["exp_avg_sq"] = state["exp_avg_sq"].mul(ema).addcmul_(rotated, rotated, value=1 - ema)
        whitened = ahead / rotated_root(second, 1 - ema**step, group["eps"])
        # Rotations commute with the polar factor.
        turned = orthogonalized(whitened, group["polynomial"], group["precision"])
        turned.mul_(polar_scale(whitened, group["scaling"]))
        out = multiply(turned, bases)
        if step > 1:
            _update_factors(state, g, ema)
            if due(step, group["inverse_update_period"]):
                self.renew(stack, lambda state: improve_bases(state, bases))
        return out


def _update_factors(state: State, g: Tensor, ema: float) -> None:
    for axis, factor in entries(state, "factor", 2).items():
        add_axis_gram(factor, g, axis, old=ema, new=1 - ema)
