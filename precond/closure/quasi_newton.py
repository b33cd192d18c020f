"""Quasi-Newton methods: an inverse Hessian learned from the gradients along the way, and a line search."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from curvature.model.inner_backward import gradients_kept
from precond.closure.line_search import strong_wolfe
from precond.closure.optimizer import ClosureOptimizer
from precond.step.base import MomentumOptions
from precond.step.divergence import all_finite
from precond.step.graph import flatten, unflatten
from solvers.outcome.arguments import whole

#: ``b, h, size, fresh`` to :math:`\tau` and :math:`\phi`; see :meth:`QuasiNewton.scales`.
Scales = Callable[[float, float, int, bool], tuple[float, float]]


@dataclass(frozen=True)
class Secant:
    r"""What a step has shown of the Hessian B: a move s and the change y of the gradient along it.

    Attributes:
        s: ``(P,)``.
        y: ``(P,)``.
        slope: :math:`y^\top s`, positive.
        b: :math:`s^\top H^{-1} s / y^\top s` with the inverse Hessian H that gave the move.
    """

    s: Tensor
    y: Tensor
    slope: float
    b: float


class InverseHessian(ABC):
    """An estimate H of the inverse Hessian, positive definite; immutable."""

    @abstractmethod
    def apply(self, g: Tensor) -> Tensor:
        """``H g``."""

    @abstractmethod
    def updated(self, pair: Secant) -> InverseHessian:
        """The estimate that agrees with a secant, ``H y = s``."""

    @property
    @abstractmethod
    def fresh(self) -> bool:
        """Whether it is the identity, before the first secant."""


@dataclass(frozen=True)
class DenseInverse(InverseHessian):
    r"""The self-scaled Broyden family, dense.

    .. math:: H \leftarrow \frac{1}{\tau} \Big(H - \frac{H y y^\top H}{y^\top H y} + \phi\, (y^\top H y)\, v v^\top\Big)
        + \frac{s s^\top}{y^\top s}, \qquad v = \frac{s}{y^\top s} - \frac{H y}{y^\top H y}

    Args:
        scales: Gives :math:`\tau` and :math:`\phi`, see :meth:`QuasiNewton.scales`.
        matrix: H; ``None`` for the identity.
    """

    scales: Scales
    matrix: Tensor | None = None

    @property
    def fresh(self) -> bool:
        return self.matrix is None

    def apply(self, g: Tensor) -> Tensor:
        return g.clone() if self.matrix is None else self.matrix @ g

    def updated(self, pair: Secant) -> DenseInverse:
        u = self.apply(pair.y)
        size = float(pair.y @ u)
        tau, phi = self.scales(pair.b, size / pair.slope, len(u), self.fresh)
        # The family expanded in s and u = H y: one symmetric update of rank two.
        W = torch.stack([pair.s, u], 1)
        cross = -phi / (tau * pair.slope)
        first = phi * size / (tau * pair.slope**2) + 1 / pair.slope
        M = u.new_tensor([[first, cross], [cross, (phi - 1) / (tau * size)]])
        if not math.isfinite(1 / tau) or not bool(M.isfinite().all()):
            return self
        old = torch.eye(len(u), dtype=u.dtype, device=u.device) if self.matrix is None else self.matrix
        return replace(self, matrix=torch.addmm(old, W @ M, W.mT, beta=1 / tau))


class QuasiNewton(ClosureOptimizer):
    r"""Base of the quasi-Newton methods, which differ in the update of the inverse Hessian H.

    Each of the ``iterations`` of a step moves along :math:`-H g` as far as a line search for the strong Wolfe
    conditions says (:func:`~precond.closure.line_search.strong_wolfe`; the step length 1 first, and the length 1 of the
    move while H is unknown), and updates H by the change of the gradient. Where the search fails, H begins again, and
    the step ends when it fails even then: values cannot be told apart any more. H goes on from step to step; moves and
    changes of the gradient are always those of one closure, so points may be redrawn between steps.

    An iteration costs one evaluation of the loss and its gradient, seldom more. Use float64.

    Args:
        params: The model, or parameters, groups, or named parameters; all are solved for together.
        lr: Multiplies the move of a step; 1 is the method's.
        iterations: Iterations of a step, each with its line search.
        wolfe: The constants :math:`(c_1, c_2)` of the Wolfe conditions.
        options: See :class:`SecondOrderOptimizer`.
    """

    needs: ClassVar[str] = "closure"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        iterations: int = 20,
        wolfe: tuple[float, float] = (1e-4, 0.9),
        **options: Unpack[MomentumOptions],
    ) -> None:
        self.iterations = whole("iterations", iterations, low=1)
        if not (isinstance(wolfe, tuple) and len(wolfe) == 2 and 0 < wolfe[0] < wolfe[1] < 1):
            raise ValueError(f"wolfe holds the constants c1 and c2 of the conditions, 0 < c1 < c2 < 1; got {wolfe!r}.")
        self.wolfe = wolfe
        params = params.parameters() if isinstance(params, torch.nn.Module) else params
        super().__init__(params, lr=lr, **options)

    @abstractmethod
    def scales(self, b: float, h: float, size: int, fresh: bool) -> tuple[float, float]:
        r""":math:`\tau` and :math:`\phi` of an update.

        Args:
            b: :math:`s^\top H^{-1} s / y^\top s`.
            h: :math:`y^\top H y / y^\top s`.
            size: Number of parameters.
            fresh: Whether H is still the identity.
        """

    def second_order(self) -> bool:
        return False

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        params, sign, value = self.parameters(), self.sign, float(self.value)
        if not math.isfinite(value):  # no step can be judged by such a loss: refused, aloud
            return {p: torch.full_like(p, torch.nan) for p in gradients}
        if not all_finite(self.touched()):
            raise FloatingPointError(
                f"{type(self).__name__}: the estimate of the inverse Hessian in the state is not finite. Nothing was "
                "changed. Load a state that is, or begin with a new optimizer."
            )
        g = sign * flatten({p: gradients.get(p, torch.zeros_like(p)) for p in params})
        inverse, moved = self.inverse(params), torch.zeros_like(g)
        start = flatten({p: p.detach() for p in params})
        for _ in range(self.iterations):
            smallest = torch.finfo(g.dtype).eps * float((start + moved).norm())
            found = self._iterate(inverse, g, value, moved, params, smallest)
            if found is None:
                break
            inverse, g, value, moved = found
        self.keep(inverse, params)
        directions = unflatten(-sign * moved, params)
        return {p: directions[p] for p in gradients}

    def _iterate(
        self, inverse: InverseHessian, g: Tensor, value: float, moved: Tensor, params: list[Tensor], smallest: float
    ) -> tuple[InverseHessian, Tensor, float, Tensor] | None:
        """One line search.

        Args:
            inverse: H.
            g: The gradient of what is minimised.
            value: What is minimised.
            moved: The move of the step so far.
            params: The parameters.
            smallest: Moves below this are rounding errors.

        Returns:
            The next estimate, gradient, value and move; ``None`` if there is nothing to gain.
        """

        def again() -> tuple[InverseHessian, Tensor, float, Tensor] | None:
            return None if inverse.fresh else self._iterate(self.first(params), g, value, moved, params, smallest)

        direction = -inverse.apply(g)
        slope, length = float(g @ direction), float(direction.norm())
        if length <= smallest:
            return None
        if not (slope < 0 and math.isfinite(slope)):  # overflow counts as well
            return again()
        seen: dict[float, tuple[float, Tensor]] = {}

        def evaluate(step: float) -> tuple[float, float]:
            seen[step] = self._at(moved + step * direction, params)
            return seen[step][0], float(seen[step][1] @ direction)

        c1, c2 = self.wolfe
        start = min(1.0, 1 / float(g.norm())) if inverse.fresh else 1.0
        noise = 10 * torch.finfo(g.dtype).eps * abs(value)
        step = strong_wolfe(
            evaluate, value, slope, start, decrease=c1, curvature=c2, noise=noise, resolution=smallest / length
        )
        if step is None:
            return again()
        after, there = seen[step]
        s, y = step * direction, there - g
        product = float(y @ s)
        if product > torch.finfo(g.dtype).eps * float(s.norm() * y.norm()):
            b = -step * float(s @ g) / product
            inverse = inverse.updated(Secant(s, y, product, b)) if 0 < b < math.inf else inverse
        return inverse, there, after, moved + s

    @torch.enable_grad()
    def _at(self, move: Tensor, params: list[Tensor]) -> tuple[float, Tensor]:
        """What is minimised, and its gradient, at ``p + move``."""
        with self.moved(unflatten(move, params)):
            loss = self.loss(self.required_closure())
            with gradients_kept([loss], params):
                slopes = torch.autograd.grad(loss, params, allow_unused=True)
        found = {p: torch.zeros_like(p) if s is None else s for p, s in zip(params, slopes, strict=True)}
        return self.sign * float(loss.detach()), self.sign * flatten(found)

    # The estimate between steps

    def first(self, params: list[Tensor]) -> InverseHessian:
        """The estimate before the first secant."""
        return DenseInverse(self.scales)

    def inverse(self, params: list[Tensor]) -> InverseHessian:
        """The estimate that a former step has left, where it was of the same parameters."""
        matrix = self.state[params[0]].get("inverse")
        size = sum(p.numel() for p in params)
        return DenseInverse(self.scales, matrix if matrix is not None and len(matrix) == size else None)

    def keep(self, inverse: InverseHessian, params: list[Tensor]) -> None:
        """Leave an estimate in the state: a matrix, with the first parameter."""
        assert isinstance(inverse, DenseInverse)
        self.state[params[0]].pop("inverse", None)
        if inverse.matrix is not None:
            self.state[params[0]]["inverse"] = inverse.matrix

    def touched(self) -> list[Tensor]:
        return [state["inverse"] for p in self.parameters()[:1] if "inverse" in (state := self.state.get(p, {}))]

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        params = self.parameters()
        size = sum(q.numel() for q in params)
        return {"inverse": torch.empty(size, size, device="meta")} if p is params[0] else {}
