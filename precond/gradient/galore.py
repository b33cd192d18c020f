"""GaLore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.gradient.matrices import leading_vectors, matrix_shape
from precond.gradient.optimizer import GradientMomentumOptions, GradientOptimizer, Group, State, due, state_zeros
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt

PREFIX = "inner."


class GaLore(GradientOptimizer):
    r"""GaLore: any ``torch.optim`` optimizer in a low-rank projection of the gradient.

    .. math:: R = P^\top G, \qquad D = \alpha\, P\, \operatorname{inner}(R), \qquad G \approx P \Sigma Q^\top

    with P the first ``rank`` left singular vectors of the gradient every ``inverse_update_period`` steps (right ones,
    from the right, where there are more rows than columns). The inner optimizer's state has the size of R. Tensors are
    matrices with their first axis as rows; vectors, and matrices whose smaller side is at most ``rank``, are not
    projected, so full rank is the inner optimizer itself.

    The inner optimizer runs with learning rate one; learning rate, weight decay and ``maximize`` belong to GaLore. Its
    ``betas``, if it has any, are entries of GaLore's groups, where schedulers cycle them (``OneCycleLR``).

    A step costs two products with P and the inner step, a refresh an SVD, ``O(m^2 n)``. Memory: ``r (m + 2 n)`` with
    Adam inside, instead of ``2 m n``.

    ============================================ ===========================================
    Zhao et al., algorithms 1 and 2              here
    ============================================ ===========================================
    P from an SVD of the gradient                ``direction``: ``matrices.leading_vectors``
    :math:`R = P^\top G`, :math:`D = \alpha P N` ``direction``
    :math:`N = \operatorname{inner}(R)`          ``_step``, on a tensor of R's shape
    ============================================ ===========================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate, in the units of the inner optimizer.
        rank: Rank of the projection.
        scale: :math:`\alpha`, on projected parameters.
        inverse_update_period: Steps between projections.
        inner: Makes the inner optimizer: ``inner(list of tensors, lr=1.0, **inner_options)``.
        inner_options: Its options, without ``lr`` and ``weight_decay``.
        options: See :class:`GradientOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Zhao et al. (2024), algorithms 1 and 2, https://arxiv.org/abs/2403.03507
    """

    #: The authors project the layers of attention and of perceptrons alone; no side is longer than this rank.
    by_role: ClassVar = {role: {"rank": 2**62} for role in ("embedding", "head", "norm", "bias", "vector")}
    taxonomy: ClassVar = Taxonomy(
        curvature="that of the inner optimizer",
        structure="low-rank projection of the gradient",
        solver="SVD",
        matrices=("gradient second moment",),
        forms=("low rank",),
        step="4rmn",
        refresh="SVD, O(m²n)",
        memory="r(m + 2n)",
        paper="https://arxiv.org/abs/2403.03507",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rank: int = 128,
        scale: Scheduled = 0.25,
        inverse_update_period: ScheduledInt = 200,
        inner: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        inner_options: dict[str, Any] | None = None,
        **options: Unpack[GradientMomentumOptions],
    ) -> None:
        self.inner, self.inner_options = inner, dict(inner_options or {})
        reserved = {"lr", "weight_decay", "maximize"} & set(self.inner_options)
        if reserved:
            raise ValueError(f"give {', '.join(sorted(reserved))} to GaLore, not in inner_options.")
        self._inner: dict[Tensor, tuple[torch.optim.Optimizer, Tensor]] = {}
        own = self._make_inner(torch.zeros(1))[0].defaults
        super().__init__(
            params,
            lr=lr,
            defaults={
                "rank": rank,
                "scale": scale,
                "inverse_update_period": inverse_update_period,
                **({"betas": own["betas"]} if "betas" in own else {}),
            },
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        if options["rank"] < 1:
            raise ValueError(f"rank must be at least 1; got {options['rank']}.")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inner = {}  # made again from the state, which holds all of theirs

    def initial_state(self, p: Tensor, group: Group) -> State:
        state, shape = {}, tuple(p.shape)
        if _projected(p, group):
            state["projection"] = state_zeros(p, (min(matrix_shape(shape)), group["rank"]))
            shape = (group["rank"], max(matrix_shape(shape)))
        # Flat checkpoints restore existing entries only; the inner optimizer starts without reading them.
        optimizer, proxy = self._make_inner(state_zeros(p, shape))
        proxy.grad = torch.zeros_like(proxy)
        _bare_step(optimizer)
        return {**state, **_entries(optimizer, proxy)}

    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        if "projection" not in state:
            return self._step(p, g, state, group)
        rows, columns = matrix_shape(g.shape)
        matrix = g.reshape(rows, columns)
        if rows > columns:
            matrix = matrix.mT  # below, the first side is the smaller one
        if due(state["step"], group["inverse_update_period"]):
            self.refresh(p, lambda: {"projection": leading_vectors(matrix, group["rank"])})
        projection = state["projection"]
        out = group["scale"] * projection @ self._step(p, projection.mT @ matrix, state, group)
        return (out.mT if rows > columns else out).reshape(g.shape)

    def _step(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        """Direction of the inner optimizer: its move from zero."""
        optimizer, proxy = self._inner_of(p, g, state)
        if "betas" in group:
            optimizer.param_groups[0]["betas"] = group["betas"]
        with torch.no_grad():
            proxy.zero_()
        proxy.grad = g.contiguous()
        _bare_step(optimizer)
        proxy.grad = None
        state.update(_entries(optimizer, proxy))
        return -proxy.detach()

    def _inner_of(self, p: Tensor, g: Tensor, state: State) -> tuple[torch.optim.Optimizer, Tensor]:
        if p not in self._inner:
            optimizer, proxy = self._make_inner(torch.zeros_like(g, memory_format=torch.contiguous_format))
            self._inner[p] = optimizer, proxy
        optimizer, proxy = self._inner[p]
        if state["step"] > 1:
            saved = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
            optimizer.state[proxy].update(saved)
        return optimizer, proxy

    def convert(self, p: Tensor) -> None:
        super().convert(p)
        self._inner.pop(p, None)  # made again in the new precision

    def back_to(self, mark: Any) -> None:
        super().back_to(mark)
        self._inner.clear()  # made again from the state, which holds all of theirs

    def _make_inner(self, proxy: Tensor) -> tuple[torch.optim.Optimizer, Tensor]:
        optimizer = self.inner([proxy.requires_grad_()], lr=1.0, **self.inner_options)
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0  # the proxy's would have no effect
        return optimizer, proxy


def _bare_step(optimizer: torch.optim.Optimizer) -> None:
    """A step without torch's hooks around the steps of all optimizers: the user's step is GaLore's."""
    step = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)  # type: ignore[attr-defined]


def _entries(optimizer: torch.optim.Optimizer, proxy: Tensor) -> State:
    return {f"{PREFIX}{key}": value for key, value in optimizer.state[proxy].items() if value is not None}


def _projected(p: Tensor, group: Group) -> bool:
    return p.ndim >= 2 and min(matrix_shape(p.shape)) > group["rank"]
