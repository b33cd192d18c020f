"""M-FAC: natural gradients from a window of past gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.distributed.sharded import is_sharded, layout_of, like, local, summed
from precond.gradient.optimizer import Group
from precond.step.base import SecondOrderOptimizer, UpdateOptions
from precond.step.divergence import squares_fit
from precond.step.methods import Taxonomy
from precond.step.options import Momentum, period
from precond.step.schedules import Scheduled
from solvers import CholeskyInverse, Dense
from solvers.direct.cholesky import cholesky_factor
from solvers.precision import working_dtype


class MFAC(SecondOrderOptimizer):
    r"""M-FAC: the empirical Fisher of the last m gradients, inverted exactly.

    .. math:: d = \Big(\lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top\Big)^{-1} g_m
              = m\, W^\top (m \lambda I + W W^\top)^{-1} e_m

    with the gradients of the last m steps as the rows of W, the present one the last of them. The parameters of a group
    share one matrix; separate groups give blocks. In the first m steps the sum runs over those taken.

    Prefer it where only gradients are at hand and memory is plentiful: it keeps m copies of the parameters. A step
    costs one row of the Gram matrix and one combination of the rows, ``O(m P)`` each, and ``m^3 / 3``. Damping below
    the rounding errors of the Gram matrix acts as if it were of their size.

    =========================================== ===============================================
    Frantar et al., section 3.2                 here
    =========================================== ===============================================
    the window W of gradients                   ``_solve``: ``window``, the oldest row replaced
    :math:`W W^\top`, one row and column a step ``_solve``: ``gram``
    :math:`m (m \lambda I + W W^\top)^{-1} e_m` ``_weights``, by Cholesky in float64
    the weights times the gradients             ``_solve``
    =========================================== ===============================================

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate.
        window: m, the number of gradients.
        damping: :math:`\lambda`, in units of squared gradients; must be positive.
        momentum: Momentum: its strength, or :class:`~precond.Momentum`.
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Frantar, Kurtic and Alistarh (2021), section 3.2, https://arxiv.org/abs/2107.03356
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="second moment of the batch gradients of a window of steps",
        structure="Gram matrix, whole model or per group",
        solver="Woodbury",
        matrices=("gradient second moment",),
        forms=("low rank",),
        step="4MP + M³/3 for a window of M",
        refresh="none",
        memory="MP",
        paper="https://arxiv.org/abs/2107.03356",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 256,
        damping: Scheduled = 1e-4,
        momentum: Scheduled | Momentum = 0.9,
        **options: Unpack[UpdateOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            defaults={"window": window, "damping": damping},
            **options,
        )

    def check(self, options: Group) -> None:
        super().check(options)
        period("window", options["window"])
        if not options["damping"] > 0:
            raise ValueError(f"damping must be positive: a window of gradients is singular. Got {options['damping']}.")

    takes_shards = True
    shapes_update = True

    # A gradient whose squares overflow counts as not finite.
    def takes(self, norm: float, gradients: dict[Tensor, Tensor]) -> bool:
        return squares_fit(norm, gradients.values())

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        out: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            present = {p: gradients[p] for p in group["params"] if p in gradients}
            if not any(p.numel() for p in present) or self.idle:
                out |= {p: torch.zeros_like(g, dtype=working_dtype(g)) for p, g in present.items()}
                if self.idle:
                    self._begin(group)
            else:
                out |= self._solve(group, present)
        return out

    def expected_state(self, p: Tensor, options: Group) -> dict[str, Any]:
        m = options["window"]
        gram = {"gram": torch.empty(m, m, device="meta"), "step": 0}
        first = any(p is first for group in self.param_groups for first in group["params"][:1])
        return {"window": torch.empty(m, *p.shape, device="meta"), **(gram if first else {})}

    def first_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        place: Any = {"dtype": working_dtype(p), "device": p.device}
        out = {
            name: torch.zeros(x.shape, **place) if isinstance(x, Tensor) and name != "window" else x
            for name, x in self.expected_state(p, group).items()
        }
        window = torch.zeros(group["window"], *local(p).shape, **place)
        shape = (group["window"], *p.shape)
        return {**out, "window": like(window, p, layout_of(p).axis + 1, shape) if is_sharded(p) else window}

    def _begin(self, group: Group) -> None:
        """Create the state of a group: gradients, with their Gram matrix and number beside the first of them."""
        for p in group["params"]:
            if "window" not in self.state[p]:
                self.state[p].update(self.first_state(p, group))

    def _solve(self, group: Group, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        self._begin(group)
        first = self.state[group["params"][0]]
        slot = first["step"] % group["window"]
        first["step"] += 1
        count = min(first["step"], group["window"])
        # The new row of the Gram matrix. A parameter without gradient counts as zero. The windows, which are too large
        # to be copied, get the new gradients when the parameters move.
        gram = first["gram"].clone()
        products = torch.zeros_like(gram[0])
        shares: dict[Any, tuple[Tensor, Tensor]] = {}  # of sharded parameters: one sum for all of a group of processes
        for p in group["params"]:
            window = local(self.state[p]["window"])
            new = local(gradients[p]).to(window, copy=True) if p in gradients else torch.zeros_like(window[slot])
            self.rows_written.append((window[slot], new))
            found = window.reshape(len(window), -1) @ new.reshape(-1)
            found[slot] = new.square().sum()
            if is_sharded(p):
                place = layout_of(p).group
                before = shares[place][1] if place in shares else torch.zeros_like(products)
                shares[place] = p, before + found.to(products)
            else:
                products += found.to(products)
        owners, parts = [p for p, _ in shares.values()], [part for _, part in shares.values()]
        for part in summed(parts, owners):
            products += part
        gram[slot] = gram[:, slot] = products
        first["gram"] = gram
        weights = self._weights(gram[:count, :count], slot, group["damping"])
        past = weights.index_fill(0, torch.tensor(slot, device=weights.device), 0)
        out = {}
        for p, g in gradients.items():
            window = local(self.state[p]["window"])
            d = torch.tensordot(past.to(window), window[:count], dims=1).add(local(g), alpha=float(weights[slot]))
            out[p] = like(d, g) if is_sharded(g) else d
        return out

    def touched(self) -> list[Tensor]:
        first = [self.state.get(p, {}) for group in self.param_groups for p in group["params"][:1]]
        return [state["gram"] for state in first if "gram" in state]

    @staticmethod
    def _weights(gram: Tensor, slot: int, damping: float) -> Tensor:
        """Weights ``(m,)`` of the gradients in the direction."""
        count, eps = len(gram), torch.finfo(gram.dtype).eps
        gram = gram.double()
        shift = (count * eps * gram.diagonal().amax()).clamp(min=count * damping)
        unit = torch.zeros_like(gram[0])
        unit[slot] = count
        return CholeskyInverse(cholesky_factor(Dense(gram, is_gram=True).add_diagonal(shift))).apply(unit)
