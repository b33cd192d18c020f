"""Inverse Hessians from the last pairs of moves and changes of the gradient, without a matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from precond.closure.quasi_newton import InverseHessian, QuasiNewton, Scales, Secant
from precond.step.base import MomentumOptions
from precond.step.graph import flatten, unflatten
from solvers.outcome.arguments import whole
from solvers.precision import working_dtype


@dataclass(frozen=True)
class RecentInverse(InverseHessian):
    r"""A member of the self-scaled Broyden family made from the last pairs.

    A pair that is forgotten leaves its factor :math:`1 / \tau` behind, so as long as none is, this is the dense method.

    Args:
        scales: Gives :math:`\tau` and :math:`\phi`, see :meth:`QuasiNewton.scales`.
        window: Pairs that are kept.
        s: Moves, the oldest first, ``(k, P)``.
        y: Changes of the gradient, ``(k, P)``.
        tau: ``(k,)``.
        phi: ``(k,)``.
        base: Multiple of the identity that stands for everything forgotten.
    """

    scales: Scales
    window: int
    s: Tensor
    y: Tensor
    tau: tuple[float, ...] = ()
    phi: tuple[float, ...] = ()
    base: float = 1.0

    @property
    def fresh(self) -> bool:
        return not self.tau

    @abstractmethod
    def square(self, y: Tensor) -> float:
        """``y^T H y``, or that of the identity where it counts for that alone."""

    def updated(self, pair: Secant) -> RecentInverse:
        h, drop = self.square(pair.y) / pair.slope, len(self.tau) == self.window
        tau, phi = self.scales(pair.b, h, len(pair.s), self.fresh)
        if not 0 < tau < math.inf or not math.isfinite(phi):  # of what overflows
            return self
        return replace(
            self,
            s=torch.cat([self.s[drop:], pair.s.unsqueeze(0)]),
            y=torch.cat([self.y[drop:], pair.y.unsqueeze(0)]),
            tau=(*self.tau[drop:], tau),
            phi=(*(max(p, 0.0) if drop else p for p in self.phi[drop:]), phi),
            base=self.base / self.tau[0] if drop else self.base,
        )


@dataclass(frozen=True)
class RecentBFGS(RecentInverse):
    r"""That of BFGS, :math:`\phi = 1`, by the recursion in two loops.

    .. math:: H_{k+1} = \frac{1}{\tau_k} \Big(I - \frac{s_k y_k^\top}{y_k^\top s_k}\Big) H_k
        \Big(I - \frac{y_k s_k^\top}{y_k^\top s_k}\Big) + \frac{s_k s_k^\top}{y_k^\top s_k}

    References:
        Nocedal and Wright (2006), algorithm 7.4 (which has no scaling)
    """

    def square(self, y: Tensor) -> float:
        return float(y @ y)

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


@dataclass(frozen=True)
class RecentFamily(RecentInverse):
    r"""That of any :math:`\phi`, from the images :math:`u_k = H_k y_k`.

    With :math:`a_k = s_k^\top g / y_k^\top s_k` and :math:`b_k = u_k^\top g / y_k^\top u_k`,

    .. math:: H_{k+1} g = \frac{1}{\tau_k} \Big(H_k g - (b_k + \phi_k (a_k - b_k))\, u_k
        + \phi_k \frac{y_k^\top u_k}{y_k^\top s_k} (a_k - b_k)\, s_k\Big) + a_k s_k

    so H g takes the products of s and u with g. The images hold for the pairs that are kept: when the oldest is
    forgotten all are made again, at ``4 k^2 P``. There :math:`\phi < 0` need not leave H positive definite, which it
    does where nothing is forgotten, and is taken as zero.

    References:
        Byrd, Nocedal and Schnabel (1994), section 2, for compact forms of the family
    """

    def square(self, y: Tensor) -> float:
        return float(y @ self.apply(y))

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        r"""All u, ``(k, P)``, and the products :math:`y_k^\top u_k`."""
        T, slopes = self.base * self.y, (self.s * self.y).sum(1)
        sizes = slopes.clone()
        for k, (tau, phi) in enumerate(zip(self.tau, self.phi, strict=True)):
            rest, u = self.y[k + 1 :], T[k]
            sizes[k] = self.y[k] @ u
            in_s, in_u = _weights(rest @ self.s[k] / slopes[k], rest @ u / sizes[k], tau, phi, sizes[k] / slopes[k])
            T[k + 1 :] = T[k + 1 :] / tau + torch.outer(in_s, self.s[k]) + torch.outer(in_u, u)
        return T, sizes

    def apply(self, g: Tensor) -> Tensor:
        if self.fresh:
            return self.base * g
        u, sizes = self.images
        slopes, tau, phi = (self.s * self.y).sum(1), g.new_tensor(self.tau), g.new_tensor(self.phi)
        in_s, in_u = _weights(self.s @ g / slopes, u @ g / sizes, tau, phi, sizes / slopes)
        later = (1 / tau).flip(0).cumprod(0).flip(0)  # what the factors of this pair and all later ones come to
        return self.base * later[0] * g + (in_s * later * tau) @ self.s + (in_u * later * tau) @ u


def _weights(a: Tensor, b: Tensor, tau: Tensor | float, phi: Tensor | float, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Of s and u in the image of a vector; see :class:`RecentFamily`."""
    bent = phi * (a - b)
    return bent * ratio / tau + a, -(b + bent) / tau


class WindowedQuasiNewton(QuasiNewton):
    """Base of the methods that keep a dense H, or make it from a window of pairs; arguments as for :class:`SSBFGS`."""

    #: The estimate from a window.
    recent: ClassVar[type[RecentInverse]]

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

    def first(self, params: list[Tensor]) -> InverseHessian:
        if self.window is None:
            return super().first(params)
        none = flatten({p: p.detach() for p in params}).new_zeros(0, sum(p.numel() for p in params))
        return self.recent(self.scales, self.window, none, none)

    def inverse(self, params: list[Tensor]) -> InverseHessian:
        head = self.state[params[0]]
        if self.window is None or head.get("pairs", 0) == 0 or any("moves" not in self.state[p] for p in params):
            return super().inverse(params) if self.window is None else self.first(params)
        count = head["pairs"]
        s, y = (
            torch.cat([self.state[p][name][:count].reshape(count, -1) for p in params], 1)
            for name in ("moves", "changes")
        )
        tau = tuple(head["scales"][:count].tolist())
        phi = tuple(head["members"][:count].tolist()) if "members" in head else (1.0,) * count  # BFGS's, saved before
        return self.recent(self.scales, self.window, s, y, tau, phi, float(head["base"]))

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
        for name, numbers in (("scales", inverse.tau), ("members", inverse.phi)):
            head[name] = inverse.s.new_tensor([*numbers, *[1.0] * (inverse.window - count)])
        head["base"], head["pairs"] = inverse.base, count

    def touched(self) -> list[Tensor]:
        if self.window is None:
            return super().touched()
        return [
            state[name]
            for p in self.parameters()
            for name in ("moves", "changes", "scales", "members")
            if name in (state := self.state.get(p, {}))
        ]

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        if self.window is None:
            return super().expected_state(p, options)
        shape = (self.window, *p.shape)
        out: dict[str, Any] = {name: torch.empty(shape, device="meta") for name in ("moves", "changes")}
        numbers = {name: torch.empty(self.window, device="meta") for name in ("scales", "members")}
        first = numbers | {"base": 1.0, "pairs": 0}
        return out | (first if p is self.parameters()[0] else {})
