"""Gauss-Newton products through the graph that a closure leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.losses import Terms, loss_for
from precond.closure.optimizer import Closure, ClosureOptimizer, flatten, unflatten
from solvers import Function


@dataclass(frozen=True, eq=False)
class Part:
    """An output of the model, and the Hessian of the loss in it.

    Args:
        output: With its graph.
        hessian: Product of the loss's Hessian with a tensor of the output's shape.
        terms: The loss on this output, where it is one.
        scale: Weight of the sum of its terms in the loss.
    """

    output: Tensor
    hessian: Callable[[Tensor], Tensor]
    terms: Terms | None = None
    scale: float = 1.0


class GaussNewtonMatrix:
    r""":math:`C = \sum_i J_i^\top H_i J_i` on the flat vector of some parameters, by products.

    Jacobian-vector products are derivatives of vector-Jacobian products in their cotangent, so any model that
    backpropagates twice will do. Costs two backward passes to begin with, and about three for each product.

    Args:
        parts: Outputs and Hessians.
        params: The parameters.
    """

    def __init__(self, parts: list[Part], params: list[Tensor]) -> None:
        self.parts, self.params = parts, params
        self._seeds = [torch.zeros_like(part.output, requires_grad=True) for part in parts]
        with torch.enable_grad():
            outputs = [part.output for part in parts]
            found = torch.autograd.grad(outputs, params, self._seeds, create_graph=True, allow_unused=True)
        self._images = {p: image for p, image in zip(params, found, strict=True) if image is not None}

    def push(self, v: Tensor) -> list[Tensor]:
        """``J_i v`` for each output."""
        vectors = unflatten(v, self.params)
        images = list(self._images)
        found = torch.autograd.grad(
            [self._images[p] for p in images],
            self._seeds,
            [vectors[p].to(p.dtype) for p in images],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(s) if x is None else x for s, x in zip(self._seeds, found, strict=True)]

    def pull(self, cotangents: list[Tensor]) -> Tensor:
        """``sum_i J_i^T u_i``."""
        outputs = [part.output for part in self.parts]
        found = torch.autograd.grad(outputs, self.params, cotangents, retain_graph=True, allow_unused=True)
        return flatten({p: torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)})

    def product(self, v: Tensor) -> Tensor:
        """``C v`` for one vector ``(P,)``."""
        return self.pull([part.hessian(x) for part, x in zip(self.parts, self.push(v), strict=True)])

    def gram(self, vectors: list[Tensor]) -> Tensor:
        """``V^T C V`` for the vectors as columns of V, in float64: half of a product with C for each."""
        return gram(self.parts, [self.push(v) for v in vectors])

    def operator(self) -> Function:
        """C as an operator."""
        size = sum(p.numel() for p in self.params)
        example = flatten({p: p.new_empty(p.shape) for p in self.params})
        return Function(
            self.product, (size,), symmetric=True, dtype=example.dtype, device=example.device, batched=False
        )

    def sampled_diagonal(self, samples: int, generator: torch.Generator) -> Tensor:
        """Unbiased estimate of the diagonal of C, non-negative: mean square of pulled-back draws, ``(P,)``."""
        total: Tensor | float = 0.0
        for _ in range(samples):
            draws = []
            for part in self.parts:
                assert part.terms is not None
                draws.append(part.scale**0.5 * part.terms.sample(generator))
            total = total + self.pull(draws).square()
        return torch.as_tensor(total) / samples


def gram(parts: list[Part], images: list[list[Tensor]]) -> Tensor:
    """``V^T C V`` from the images ``J_i v`` of each vector, in float64."""
    curved = [[part.hessian(x) for part, x in zip(parts, image, strict=True)] for image in images]
    entries = [[sum((x * y).double().sum() for x, y in zip(a, b, strict=True)) for b in curved] for a in images]
    found = torch.stack([torch.stack([torch.as_tensor(entry) for entry in row]) for row in entries]).cpu()
    return (found + found.mT) / 2


class GaussNewtonClosureOptimizer(ClosureOptimizer):
    """Base of the methods whose C is the Gauss-Newton matrix of a loss module that the closure calls.

    The loss module is watched while the closure runs, so outputs and targets are seen exactly as passed; several calls,
    and multiples of their values in the loss, are summed. Terms of the loss that do not go through the module, such as
    an L2 penalty, are in the gradient, but not in C.

    Args:
        model: The model, or parameters, groups, or named parameters.
        loss_fn: The loss module that the closure calls.
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        TypeError: If the loss is no module.
        UnknownLossError: If it is of unknown type.
    """

    _calls: list[tuple[tuple, dict, Tensor]]

    def __init__(self, model: Any, loss_fn: Any, **options: Any) -> None:
        if not isinstance(loss_fn, nn.Module):
            raise TypeError(
                f"{type(self).__name__} watches the loss while the closure runs, so it needs the loss module that the "
                f"closure calls, such as nn.MSELoss(), not {type(loss_fn).__name__}."
            )
        self.loss_fn = loss_fn
        loss_for(loss_fn)  # refuses unknown losses now rather than in the first step
        super().__init__(model.parameters() if isinstance(model, nn.Module) else model, **options)

    def second_order(self) -> bool:
        return False

    def keeps_graph(self) -> bool:
        return True

    def release(self) -> None:
        super().release()
        self._calls = []

    def _evaluate(self, closure: Closure | None) -> Any:
        calls: list[tuple[tuple, dict, Tensor]] = []
        handle = self.loss_fn.register_forward_hook(
            lambda module, args, kwargs, value: calls.append((args, kwargs, value)), with_kwargs=True
        )
        try:
            loss = super()._evaluate(closure)
        finally:
            handle.remove()
        self._calls = calls
        return loss

    def matrix(self, params: list[Tensor]) -> GaussNewtonMatrix:
        """The Gauss-Newton matrix of what is minimised, at the last evaluation."""
        parts = [part for call in self._calls if (part := self._part(*call)) is not None]
        if not parts:
            raise RuntimeError(
                f"the closure of {type(self).__name__} did not call the loss module given to the optimizer, "
                f"{self.loss_fn!r}, or its value is not in the loss that it returned."
            )
        return GaussNewtonMatrix(parts, params)

    def _part(self, args: tuple, kwargs: dict, value: Tensor) -> Part | None:
        if not value.requires_grad or self._loss is None:
            return None
        weight: Tensor | None = torch.autograd.grad(self._loss, value, retain_graph=True, allow_unused=True)[0]
        if weight is None:
            return None
        return loss_part(self.loss_fn, args, kwargs, self.sign * float(weight.sum()))


def loss_part(loss_fn: nn.Module, args: tuple, kwargs: dict, weight: float) -> Part:
    """The output that a loss module was called on, with the Hessian of ``weight`` times its value.

    Raises:
        ValueError: If the module gives one value per term, or the weight is negative.
    """
    given = list(args)
    given += [kwargs[name] for name in ("input", "target")[len(args) :]]
    terms = loss_for(loss_fn).terms(*given, as_called=True)
    if terms.reduction == "none":
        raise ValueError(f"{loss_fn!r} returned one value per term, but its Hessian needs reduction='mean' or 'sum'.")
    scale = weight / (float(terms.total) if terms.reduction == "mean" else 1.0)
    if scale < 0:
        raise ValueError(
            f"what is minimised holds a negative multiple of {loss_fn!r}, whose Gauss-Newton matrix is not positive "
            "semi-definite. maximize=True and a negated loss both turn signs."
        )
    return Part(given[0], lambda x: scale * terms.hessian_product(x), terms, scale)
