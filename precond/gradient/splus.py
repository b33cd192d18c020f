"""SPlus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.distributed.sharded import is_sharded
from precond.gradient.bases import eigenbases, initial_bases
from precond.gradient.matrices import axis_gram, largest, matrix_shape, multiply, worth_a_matrix
from precond.gradient.optimizer import Group, State, due, state_zeros
from precond.gradient.stacks import Stack, StackedMomentumOptions, StackedOptimizer, entries
from precond.step.averaging import swapped, update_average
from precond.step.methods import Taxonomy
from precond.step.schedules import Scheduled, ScheduledInt
from solvers.precision import working_dtype


class SPlus(StackedOptimizer):
    r"""SPlus: the sign of the momentum in Shampoo's eigenbasis, and an average of the iterates.

    .. math:: D = \frac{2}{m + n}\, Q_L \operatorname{sign}(Q_L^\top M Q_R)\, Q_R^\top

    with M the average of gradients, :math:`Q_L` and :math:`Q_R` the eigenvectors of the averages L of
    :math:`G G^\top` and R of :math:`G^\top G`, computed every ``inverse_update_period`` steps. The sign bounds the step
    for a basis of any age. Tensors are matrices with their first axis as rows; vectors, and matrices with both
    sides beyond ``max_dim``, move by ``vector_scale * sign(M)``.

    The iterates themselves are noisy: evaluate under :meth:`averaged`.

    A step costs ``3 (m^2 n + m n^2)`` multiplications, a refresh ``9 (m^3 + n^3)``. Memory: one moment, one average of
    the parameters, two matrices per side.

    ==================================================== =================================================
    Frans et al.                                         here
    ==================================================== =================================================
    M, and L and R of :math:`G G^\top`, :math:`G^\top G` ``update``: ``matrices.gram``
    eigenvectors of L and R, now and then                ``bases.eigenbases``
    :math:`\operatorname{sign}(Q_L^\top M Q_R)`          ``rotated_sign``
    :math:`2 / (m + n)`, the scale that carries over     ``update``
    the average of the iterates                          ``before_move``: ``step.averaging.update_average``
    evaluation under it                                  ``averaged``: ``step.averaging.swapped``
    ==================================================== =================================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate: a step has the spectral norm of at most ``2 lr sqrt(m n) / (m + n)``, about ten times
            the learning rate of AdamW.
        betas: Decay of the average of gradients, and of the factors.
        average_decay: Decay of the average of the iterates. The paper's 0.999 suits long runs at a constant rate; under
            a schedule that ends at zero so long an average undoes it.
        vector_scale: Scale of parameters without a basis.
        inverse_update_period: Steps between decompositions.
        max_dim: Sides longer than this are not rotated.
        max_ratio: Sides longer than this many times the other are not rotated; ``None`` for any ratio.
        options: See :class:`StackedOptimizer`.

    References:
        Frans, Levine and Abbeel (2025), https://arxiv.org/abs/2506.07254
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="gradient second moment",
        structure="sign in a Kronecker eigenbasis",
        solver="eigh",
        matrices=("gradient second moment",),
        forms=("Kronecker eigenbasis",),
        step="6(m²n + mn²)",
        refresh="9(m³ + n³)",
        memory="2(m² + n²) + mn",
        paper="https://arxiv.org/abs/2506.07254",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        average_decay: float = 0.95,
        vector_scale: Scheduled = 1e-3,
        inverse_update_period: ScheduledInt = 100,
        max_dim: int = 10000,
        max_ratio: float | None = 4.0,
        **options: Unpack[StackedMomentumOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            defaults={
                "betas": betas,
                "average_decay": average_decay,
                "vector_scale": vector_scale,
                "inverse_update_period": inverse_update_period,
                "max_dim": max_dim,
                "max_ratio": max_ratio,
            },
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        if not 0 <= options["average_decay"] < 1:
            raise ValueError(
                f"average_decay is the weight of the old average, in [0, 1); got {options['average_decay']}."
            )

    kept: ClassVar[frozenset[str]] = frozenset({"basis", "exp_avg"})

    def shard_state(self, p: Tensor) -> State:
        return {"average": p.detach().to(working_dtype(p), copy=True)}

    def initial_state(self, p: Tensor, group: Group) -> State:
        state: State = {"exp_avg": state_zeros(p), **self.shard_state(p)}
        if p.ndim >= 2:
            sizes, limits = enumerate(matrix_shape(p.shape)), (group["max_dim"], group["max_ratio"])
            state |= initial_bases(p, {k: n for k, n in sizes if worth_a_matrix(n, p.numel(), *limits)})
        return state

    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        state, (beta1, beta2) = stack.state, group["betas"]
        momentum = state["exp_avg"] = state["exp_avg"].lerp(g, 1 - beta1)
        bases = entries(state, "basis", 2)
        if not bases:
            return group["vector_scale"] * momentum.sign()
        rows, columns = matrix_shape(g.shape[1:])
        g, momentum = (x.reshape(-1, rows, columns) for x in (g, momentum))
        for axis, factor in entries(state, "factor", 2).items():
            factor.lerp_(axis_gram(g, axis), 1 - beta2)
        if due(stack.step, group["inverse_update_period"]):
            self.renew(stack, lambda state: eigenbases(state, bases))
            bases = entries(state, "basis", 2)
        return multiply(rotated_sign(multiply(momentum, bases, transpose=True)), bases).mul_(2 / (rows + columns))

    def before_move(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if state.get("step", 0) > 0 and p.numel():
                    # The step has a copy only of the states of those with a gradient, and of their own process.
                    if p not in self.coming or is_sharded(p):
                        state["average"] = state["average"].clone()
                    value = self.coming.get(p, p.detach()).to(p.dtype)
                    update_average(state["average"], value, group["average_decay"], state["step"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold the averages of their iterates."""
        params = [p for group in self.param_groups for p in group["params"] if "average" in self.state.get(p, {})]
        with swapped((p, self.state[p]["average"]) for p in params):
            yield


def rotated_sign(x: Tensor) -> Tensor:
    """Sign of entries in a rotated basis ``(k, *shape)``, zero for those that are rounding errors of the rotation."""
    size = x.abs()
    floor = largest(size).mul_(64 * torch.finfo(x.dtype).eps)
    return torch.where(size > floor, x.sign(), 0)
