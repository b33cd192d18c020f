"""Optimizers that evaluate the loss themselves: ``step(closure)``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvature.estimation.finite import refuse_nonfinite
from curvature.model.inner_backward import gradients_kept
from curvature.model.kernels import differentiable_kernels
from curvature.model.pullback import pull_back, refuse_outside_of_autograd
from curvature.model.wrappers import plain_checkpoints
from precond.distributed.closures import parallel_calls, refuse_closure
from precond.step.base import SecondOrderOptimizer
from precond.step.graph import (
    BackwardDoesNothing,
    Closure,
    Vectors,
    flatten,
    has_graph,
    loss_tensor,
    parameters_at,
    rademacher,
    reached,
    second_derivatives,
    unflatten,
)
from precond.step.journal import REFRESHES
from precond.step.uncompiled import uncompiled


class ClosureOptimizer(SecondOrderOptimizer):
    """Base of the methods that need more of the loss than its gradient.

    The closure computes the loss on one fixed batch and returns it, as a tensor with its graph. It may call
    ``backward()`` and ``zero_grad()``, as the closures of ``torch.optim.LBFGS`` do, but need not: the optimizer
    differentiates the loss itself. Trainers' closures (Lightning) call ``backward()`` and return the bare number: the
    loss is then what they called that on, and gradients that they clip afterwards count as clipped. A closure may be
    called several times in a step, with other values of the parameters, so it should be deterministic.

    L2 weight decay is part of the loss: of its value, which ``step`` returns, its gradient and Hessian.
    """

    needs: ClassVar[str] = "closure"

    _closure: Closure | None = None
    #: The loss of the step with its graph, where the step runs backward through it again.
    loss_graph: Tensor | None = None
    #: Its value.
    loss_value: Tensor | None = None
    _slopes: Vectors | None = None
    # Gradients that a step left in the parameters, with their versions: they are no part of the next one.
    _left: Mapping[Tensor, tuple[weakref.ref[Tensor], int]] = MappingProxyType({})

    @uncompiled
    def step(self, closure: Closure | None = None) -> Any:
        if closure is None and self.closure_needed() and self.expects_checkpoint():
            return None
        with self._released(closure):
            return super().step(closure)

    @uncompiled
    def precondition(self, closure: Closure | None = None) -> Any:
        with self._released(closure):
            return super().precondition(closure)

    @contextmanager
    def _released(self, closure: Closure | None) -> Iterator[None]:
        """Within the block the graph of the closure is held, of kernels that can be differentiated as often as needed.

        Raises:
            TypeError: If a closure is needed and missing.
        """
        if closure is None and self.closure_needed():
            raise TypeError(
                f"{type(self).__name__} needs second derivatives: call step(closure) with a function that computes the "
                "loss of one batch and returns it."
            )
        try:
            # For the whole step: a checkpointed layer runs again while the graph is differentiated.
            twice = self.second_order() or self.keeps_graph()
            with plain_checkpoints(), differentiable_kernels() if twice else nullcontext():
                yield
        finally:
            self.release()

    def release(self) -> None:
        """Forget the graph of the last evaluation, and note which gradients the step leaves behind."""
        self._closure = self.loss_graph = self.loss_value = self._slopes = None
        self._left = {p: (weakref.ref(p.grad), p.grad._version) for p in self.parameters() if p.grad is not None}

    def mark(self) -> Any:
        return super().mark(), [(p, p.grad) for p in self.parameters()]

    def back_to(self, mark: Any) -> None:
        inner, gradients = mark
        super().back_to(inner)
        for p, gradient in gradients:
            p.grad = gradient

    # Evaluation

    def closure_needed(self) -> bool:
        """Whether the steps need more than the gradients of a plain loop."""
        return True

    def second_order(self) -> bool:
        """Whether steps need second derivatives at all; :meth:`probed` says of which parameters."""
        return True

    def probed(self, params: list[Tensor]) -> list[Tensor]:
        """Those of some parameters whose second derivatives a step needs, if the loss reaches them.

        Work that is due every so many steps follows the parameter's own clock: one that is absent in some steps, as
        the heads of several tasks that are used in turn, would else miss all of it.
        """
        return params if self.second_order() else []

    def keeps_graph(self) -> bool:
        """Whether this step runs backward through the loss's graph again, without second derivatives."""
        return False

    def parameters(self) -> list[Tensor]:
        """The parameters that are trained, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def run(self, closure: Closure, instead: Callable[[Tensor], None] | None = None) -> tuple[Any, list[Tensor]]:
        """The closure's result, with its graph, and the tensors on which it called ``backward()``.

        Gradients stay, though it may call ``zero_grad()``.

        Args:
            closure: The closure.
            instead: What ``backward()`` does, with the tensor; by default it leaves zeros, for closures that go on to
                clip their gradients or to take their norm.
        """
        own = [(p, p.grad) for p in self.parameters()]
        for p, _ in own:
            p.grad = None

        def zeros(_: Tensor) -> None:
            for p, _grad in own:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

        mode = BackwardDoesNothing(instead or zeros)
        try:
            with torch.enable_grad(), mode:
                return closure(), mode.called
        finally:
            for p, grad in own:
                p.grad = grad

    def loss(self, closure: Closure) -> Tensor:
        """The loss as a number with its graph: what the closure returns, or else what it called ``backward()`` on.

        Raises:
            TypeError: If there is neither.
        """
        result, called = self.run(closure)
        return loss_tensor(result, type(self).__name__, called) + self._penalty()

    def _penalty(self) -> Tensor | float:
        """The sum of squares that L2 weight decay adds to the objective."""
        total: Tensor | float = 0.0
        for group in self.param_groups:
            if group["decay"] == "l2" and group["weight_decay"]:
                sign = -1 if group["maximize"] else 1
                squares = sum((p.square().sum() for p in group["params"] if p.requires_grad), torch.zeros(()))
                total = total + sign * 0.5 * group["weight_decay"] * squares
        return total

    def regularized(self, gradients: Vectors) -> Vectors:
        """Gradients with the L2 part of the weight decay; those of a closure include it already."""
        return super().regularized(gradients) if self._slopes is None else gradients

    @torch.enable_grad()
    def _evaluate(self, closure: Closure | None) -> Any:
        if closure is None:
            return None
        with parallel_calls() as parallel:
            return self._result(closure, parallel)

    def _result(self, closure: Closure, parallel: list[nn.Module]) -> Any:
        self._closure, params = closure, self.parameters()
        if not self.closure_needed():
            before = {p: (p.grad, p.grad._version) for p in params if p.grad is not None}
            result = closure()
            if any(p.grad is not None and not _same(p.grad, before.get(p)) for p in params):
                return result  # it ran the backward pass, as in a plain loop
            if result is None and before and all(p.grad is not None and _same(p.grad, b) for p, b in before.items()):
                return None  # it does nothing, as that of Lightning's manual optimization: the loop ran the pass
            loss = loss_tensor(result, type(self).__name__) + self._penalty()
            refuse_closure(type(self).__name__, parallel, self.ranks)
            slopes = self._differentiated(loss, params)
            return self.evaluated(loss.detach(), dict(zip(params, slopes, strict=True)))
        return self._first_evaluation(closure, params, parallel)

    def _first_evaluation(self, closure: Closure, params: list[Tensor], parallel: list[nn.Module]) -> Tensor:
        """Run the closure, and differentiate the loss; see :meth:`evaluated`.

        A closure of one's own returns the loss with its graph. That of a trainer calls ``backward()`` and returns a
        number: the loss is then what it called that on, and the gradients are those that it leaves behind, which it may
        have clipped.
        """
        slopes: dict[Tensor, Tensor] = {}
        accumulated = self._accumulated(params)

        def backward(loss: Tensor) -> None:
            if accumulated is not None and accumulated[0].grad is accumulated[1] and accumulated[1]._version == 0:
                raise RuntimeError(
                    f"the closure of {type(self).__name__} adds its gradients to those of other backward passes, whose "
                    "curvature the optimizer cannot see. Compute the whole loss in one closure; in a trainer, do not "
                    "accumulate gradients over batches (accumulate_grad_batches=1)."
                )
            with torch.enable_grad():
                for p, slope in zip(params, self._differentiated(loss.reshape(()), params, again=True), strict=True):
                    if slope is not None:
                        slopes[p] = slopes[p] + slope if p in slopes else slope
                        found = slope.detach().to(p.dtype)
                        p.grad = found.clone() if p.grad is None else p.grad.add_(found)

        left: dict[Tensor, Tensor | None] = {}

        def watched() -> Any:
            if accumulated is not None:
                accumulated[0].grad = accumulated[1]
            result = closure()
            left.update({p: p.grad for p in params})
            return result

        result, called = self.run(watched, backward)
        refuse_closure(type(self).__name__, parallel, self.ranks)
        mine = has_graph(result) and not (len(called) == 1 and result is called[0])
        loss, penalty = loss_tensor(result, type(self).__name__, called), self._penalty()
        if mine or not called:
            self.loss_graph, loss = None, loss + penalty
            found = self._differentiated(loss, params)
            return self.evaluated(loss.detach(), dict(zip(params, found, strict=True)))
        if isinstance(penalty, Tensor):
            extra = torch.autograd.grad(penalty, params, create_graph=True, allow_unused=True)
            for p, slope in zip(params, extra, strict=True):
                if slope is not None:
                    slopes[p], grad = slopes[p] + slope if p in slopes else slope, left[p]
                    left[p] = slope.detach().to(p.dtype) if grad is None else grad + slope.detach().to(p.dtype)
        self.evaluated((loss + penalty).detach(), {p: slopes.get(p) for p in params})
        for p in params:
            p.grad = left[p] if p in slopes else None
        return (loss + penalty).detach()

    def _accumulated(self, params: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """A parameter that has a gradient which no step of ours left there, and zeros to put in its place."""
        for p in params:
            if p.grad is not None:
                reference, version = self._left.get(p, (None, -1))
                if reference is None or reference() is not p.grad or p.grad._version != version:
                    return p, torch.zeros_like(p)
        return None

    def _differentiated(self, loss: Tensor, params: list[Tensor], again: bool = False) -> tuple[Tensor | None, ...]:
        """Derivatives of a loss, with their graph where second ones are needed; keeps the loss's graph if it is.

        Args:
            loss: The loss.
            params: The parameters.
            again: Whether something with the same graph may be differentiated afterwards.
        """
        probed = self.probed(params)
        twice = bool(probed) and (len(probed) == len(params) or bool(reached(loss, probed)))
        keep = twice or self.keeps_graph()
        if twice:
            refuse_outside_of_autograd(loss, probed)
        try:
            with gradients_kept([loss], params):
                slopes = torch.autograd.grad(
                    loss, params, create_graph=twice, retain_graph=keep or again or None, allow_unused=True
                )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                f"the closure of {type(self).__name__} freed the graph of the loss by torch.autograd.backward or "
                "torch.autograd.grad. Return the loss without differentiating it, or pass retain_graph=True."
            ) from error
        if keep:
            self.loss_graph = loss if self.loss_graph is None else self.loss_graph + loss
        return slopes

    def evaluated(self, value: Tensor, slopes: Mapping[Tensor, Tensor | None]) -> Tensor:
        """Keep the closure's result, write the gradients of all parameters, and return the value.

        Args:
            value: The loss, without graph.
            slopes: Derivative by parameter, with a graph where it will be differentiated again; ``None`` for none.
        """
        self.loss_value, self._slopes = value, {p: g for p, g in slopes.items() if g is not None}
        for p in slopes:
            p.grad = self._slopes[p].detach().to(p.dtype).clone() if p in self._slopes else None
        return value

    @property
    def differentiated(self) -> list[Tensor]:
        """The parameters that the loss of the step reaches."""
        return list(self._slopes or {})

    def true_gradients(self) -> Vectors | None:
        gradients = super().true_gradients()
        if gradients is None or self._slopes is None:
            return gradients
        # Without those that the loss does not reach, whose grad comes from elsewhere.
        return {p: g for p, g in gradients.items() if p in self._slopes}

    def value_at(self, moves: Mapping[Tensor, Tensor]) -> Tensor:
        """The objective at ``p + move``; the parameters stay as they are, bit for bit."""
        with self.moved(moves):
            return self.sign * self.objective(self.required_closure())

    @staticmethod
    def moved(moves: Mapping[Tensor, Tensor]) -> AbstractContextManager[None]:
        """Within the block the parameters are at ``p + move``; afterwards as they were, bit for bit."""
        return parameters_at({p: (p.data + move).to(p.dtype) for p, move in moves.items()})

    def required_closure(self) -> Closure:
        """The closure of the step."""
        assert self._closure is not None
        return self._closure

    def objective(self, closure: Closure) -> Tensor:
        """The loss at the current parameters, without graph."""
        return self.loss(closure).detach()

    @property
    def value(self) -> Tensor:
        """The objective at the start of the step."""
        assert self.loss_value is not None
        return self.sign * self.loss_value

    @property
    def sign(self) -> int:
        """-1 if the loss is maximised.

        Raises:
            ValueError: If the groups disagree.
        """
        return -1 if self.common("maximize") else 1

    def common(self, option: str) -> Any:
        """An option that all groups must share, because their parameters are solved for together.

        Raises:
            ValueError: If they do not.
        """
        values = {float(group[option]) for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(
                f"{type(self).__name__} solves for all parameters together and needs one {option}, but the groups have "
                f"{sorted(values)}."
            )
        return self.param_groups[0][option]

    # Second derivatives

    @torch.enable_grad()
    def hessian_product(self, v: Mapping[Tensor, Tensor]) -> Vectors:
        """Product of the loss's Hessian with a vector, by parameter."""
        assert self._slopes is not None
        params = list(v)
        pairs = [(self._slopes[p], v[p]) for p in params if p in self._slopes and self._slopes[p].requires_grad]
        out: tuple[Tensor | None, ...] = (None,) * len(params)
        if pairs:
            slopes, vectors = zip(*pairs, strict=True)
            out = tuple(pull_back(slopes, params, vectors))
        return {p: torch.zeros_like(p) if h is None else h.detach() for p, h in zip(params, out, strict=True)}

    def hessian(self, params: list[Tensor], chunk: int = 64) -> Tensor:
        """Dense Hessian on the concatenated parameters, ``(P, P)``, by products with the identity."""
        assert self._slopes is not None
        matrix = second_derivatives([self._slopes.get(p) for p in params], params, chunk)
        refuse_nonfinite(matrix, "the Hessian")
        return matrix

    def hutchinson_diagonal(self, params: list[Tensor], seed: int) -> Vectors:
        """``z * (H z)`` of the objective with random signs z, which depend on the seed and the step alone."""
        self.events[REFRESHES] += len(params)
        sign, draws = self.sign, enumerate(params)
        signs = {p: rademacher(p, seed, int(self.state[p].get("step", 0)), index) for index, p in draws}
        product = self.hessian_product(signs)
        refuse_nonfinite(flatten(product), "a product with the Hessian")
        return {p: sign * signs[p] * product[p] for p in params}

    # Vectors that are kept from step to step

    def remembered(self, name: str, params: list[Tensor]) -> Tensor:
        """The flat vector that a former step left in the state, or zero."""
        return flatten({p: self.state[p].get(name, torch.zeros_like(p)) for p in params})

    def remember(self, name: str, vector: Tensor, params: list[Tensor]) -> None:
        """Leave a flat vector in the state."""
        for p, part in unflatten(vector, params).items():
            self.state[p][name] = part.clone()


def _same(gradient: Tensor, before: tuple[Tensor, int] | None) -> bool:
    """Whether a gradient is what it was, and nothing was written to it."""
    return before is not None and gradient is before[0] and gradient._version == before[1]
