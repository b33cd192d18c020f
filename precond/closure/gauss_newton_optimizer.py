"""Optimizers whose curvature is the Gauss-Newton matrix of a loss module that the closure calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from curvature.losses.loss import watched
from precond.closure.damped import DampedOptimizer
from precond.step.graph import Closure, GaussNewtonMatrix, LossCall, curved_outputs, loss_calls


class GaussNewtonClosureOptimizer(DampedOptimizer):
    """Base of the methods whose C is the Gauss-Newton matrix of a loss module that the closure calls.

    The loss module is watched while the closure runs, so outputs and targets are seen exactly as passed; several calls,
    and multiples of their values in the loss, are summed. Terms of the loss that do not go through the module, such as
    an L2 penalty, are in the gradient, but not in C.

    Args:
        model: The model, or parameters, groups, or named parameters.
        loss_fn: The loss module that the closure calls.
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        TypeError: If the loss is not a module.
        UnknownLossError: If it is of unknown type.
    """

    _calls: list[LossCall]

    def __init__(self, model: Any, loss_fn: Any, **options: Any) -> None:
        watched(loss_fn, type(self).__name__, "closure")  # refuses unknown losses now, before the first step
        self.loss_fn = loss_fn
        super().__init__(model.parameters() if isinstance(model, nn.Module) else model, **options)

    def second_order(self) -> bool:
        return False

    def keeps_graph(self) -> bool:
        return True

    def release(self) -> None:
        super().release()
        self._calls = []

    def _evaluate(self, closure: Closure | None) -> Any:
        with loss_calls(self.loss_fn) as calls:
            loss = super()._evaluate(closure)
        self._calls = calls
        return loss

    def matrix(self, params: list[Tensor]) -> GaussNewtonMatrix:
        """The Gauss-Newton matrix of the objective, at the last evaluation."""
        outputs = (
            [] if self.loss_graph is None else curved_outputs(self.loss_fn, self._calls, self.loss_graph, self.sign)
        )
        if not outputs:
            raise RuntimeError(
                f"the closure of {type(self).__name__} did not call the loss module given to the optimizer, "
                f"{self.loss_fn!r}, or its value is not in the loss that it returned."
            )
        return GaussNewtonMatrix(outputs, params)
