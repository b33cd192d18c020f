"""Self-scaled BFGS, dense or of limited memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.closure.quasi_newton import InverseHessian, QuasiNewton, Secant
from precond.step.base import MomentumOptions
from precond.step.graph import flatten, unflatten
from precond.step.methods import Taxonomy
from solvers.outcome.arguments import whole
from solvers.precision import working_dtype


@dataclass(frozen=True)
class RecentInverse(InverseHessian):
    r"""Self-scaled BFGS from the last pairs, by the recursion in two loops.

    .. math:: H_{k+1} = \frac{1}{\tau_k} \Big(I - \frac{s_k y_k^\top}{y_k^\top s_k}\Big) H_k
        \Big(I - \frac{y_k s_k^\top}{y_k^\top s_k}\Big) + \frac{s_k s_k^\top}{y_k^\top s_k}

    A pair that is forgotten leaves its factor :math:`1 / \tau` behind, so as long as none is, this is the dense method.

    Args:
        window: Pairs that are kept.
        s: Moves, the oldest first, ``(k, P)``.
        y: Changes of the gradient, ``(k, P)``.
        tau: ``(k,)``.
        base: Multiple of the identity that stands for everything forgotten.

    References:
        Nocedal and Wright (2006), algorithm 7.4 (which has no scaling)
    """

    window: int
    s: Tensor
    y: Tensor
    tau: tuple[float, ...] = ()
    base: float = 1.0

    @property
    def fresh(self) -> bool:
        return not self.tau

    def apply(self, g: Tensor) -> Tensor:
        q, weights = g.clone(), []
        slopes = (self.s * self.y).sum(1)
        for i in reversed(range(len(self.tau))):
            weights.append((self.s[i] @ q) / slopes[i])
            q = q - weights[-1] * self.y[i]
        q = self.base * q
        for i, weight in enumerate(reversed(weights)):
            q = q / self.tau[i]
            q = q + (weight - (self.y[i] @ q) / slopes[i]) * self.s[i]
        return q

    def updated(self, pair: Secant) -> RecentInverse:
        h = float(pair.y @ pair.y) / pair.slope  # of the identity, for which alone it counts
        tau, drop = _tau(pair.b, h, self.fresh), len(self.tau) == self.window
        if not 0 < tau < math.inf:  # of what overflows
            return self
        return replace(
            self,
            s=torch.cat([self.s[drop:], pair.s.unsqueeze(0)]),
            y=torch.cat([self.y[drop:], pair.y.unsqueeze(0)]),
            tau=(*self.tau[drop:], tau),
            base=self.base / self.tau[0] if drop else self.base,
        )


def _tau(b: float, h: float, fresh: bool) -> float:
    """By which the inverse Hessian is divided; see :class:`SSBFGS`."""
    return h if fresh else min(1.0, 1 / b)


class SSBFGS(QuasiNewton):
    r"""Self-scaled BFGS, dense or of limited memory.

    BFGS, with the inverse Hessian H enlarged before an update wherever it is too small along the move s:

    .. math:: H \leftarrow \frac{1}{\tau} \Big(I - \frac{s y^\top}{y^\top s}\Big) H
        \Big(I - \frac{y s^\top}{y^\top s}\Big) + \frac{s s^\top}{y^\top s}, \qquad
        \tau = \min\Big(1, \frac{y^\top s}{s^\top H^{-1} s}\Big)

    with the change y of the gradient along s. At the first update :math:`\tau = y^\top y / y^\top s` gives H, the
    identity so far, the scale of the problem.

    Prefer it where :class:`SSBroyden` would fit but for its memory: with ``window=m`` H is known from the last m pairs
    alone, at 4mP an iteration and 2mP numbers; otherwise it is dense, ``P^2``.

    ============================== =============================================================
    Urbán, Stefanou and Pons       here
    ============================== =============================================================
    the update                     ``quasi_newton.DenseInverse``, ``RecentInverse``
    :math:`\tau` (Al-Baali)        ``scales``
    the line search (strong Wolfe) ``line_search.strong_wolfe``: Nocedal and Wright, 3.5 and 3.6
    ============================== =============================================================

    Args:
        params: The model, or parameters, groups, or named parameters; all are solved for together.
        lr: Multiplies the move of a step; 1 is the method's.
        window: Pairs that H is made from; ``None`` for all of them, in a dense matrix.
        iterations: Iterations of a step, each with its line search.
        wolfe: The constants :math:`(c_1, c_2)` of the Wolfe conditions.
        options: See :class:`SecondOrderOptimizer`.

    References:
        Al-Baali (1998); Urbán, Stefanou and Pons (2025), equation 11, https://arxiv.org/abs/2405.04230; Kiyani et al.
        (2025), https://arxiv.org/abs/2501.16371
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian, from differences of gradients",
        structure="dense, or low rank from a window of pairs",
        solver="self-scaled BFGS updates",
        matrices=("Hessian",),
        forms=("dense", "low rank"),
        step="a line search and 6P², or 8MP for a window of M, for each iteration",
        refresh="none",
        memory="P², or 2MP",
        paper="https://arxiv.org/abs/2405.04230",
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        window: int | None = None,
        iterations: int = 20,
        wolfe: tuple[float, float] = (1e-4, 0.9),
        **options: Unpack[MomentumOptions],
    ) -> None:
        self.window = whole("window", window, optional=True)
        super().__init__(params, lr=lr, iterations=iterations, wolfe=wolfe, **options)

    def scales(self, b: float, h: float, size: int, fresh: bool) -> tuple[float, float]:
        return _tau(b, h, fresh), 1.0

    def first(self, params: list[Tensor]) -> InverseHessian:
        if self.window is None:
            return super().first(params)
        none = flatten({p: p.detach() for p in params}).new_zeros(0, sum(p.numel() for p in params))
        return RecentInverse(self.window, none, none)

    def inverse(self, params: list[Tensor]) -> InverseHessian:
        head = self.state[params[0]]
        if self.window is None or head.get("pairs", 0) == 0 or any("moves" not in self.state[p] for p in params):
            return super().inverse(params) if self.window is None else self.first(params)
        count = head["pairs"]
        s, y = (
            torch.cat([self.state[p][name][:count].reshape(count, -1) for p in params], 1)
            for name in ("moves", "changes")
        )
        return RecentInverse(self.window, s, y, tuple(head["scales"][:count].tolist()), float(head["base"]))

    def keep(self, inverse: InverseHessian, params: list[Tensor]) -> None:
        if not isinstance(inverse, RecentInverse):
            super().keep(inverse, params)
            return
        count, head = len(inverse.tau), self.state[params[0]]
        rows = {"moves": inverse.s, "changes": inverse.y}
        for name, matrix in rows.items():
            parts = [unflatten(row, params) for row in matrix]
            for p in params:
                kept = p.new_zeros(inverse.window, *p.shape, dtype=working_dtype(p))
                for slot, part in zip(kept, parts, strict=False):
                    slot.copy_(part[p])
                self.state[p][name] = kept
        head["scales"] = inverse.s.new_tensor([*inverse.tau, *[1.0] * (inverse.window - count)])
        head["base"], head["pairs"] = inverse.base, count

    def touched(self) -> list[Tensor]:
        if self.window is None:
            return super().touched()
        return [
            state[name]
            for p in self.parameters()
            for name in ("moves", "changes", "scales")
            if name in (state := self.state.get(p, {}))
        ]

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        if self.window is None:
            return super().expected_state(p, options)
        shape = (self.window, *p.shape)
        out: dict[str, Any] = {name: torch.empty(shape, device="meta") for name in ("moves", "changes")}
        first = {"scales": torch.empty(self.window, device="meta"), "base": 1.0, "pairs": 0}
        return out | (first if p is self.parameters()[0] else {})
