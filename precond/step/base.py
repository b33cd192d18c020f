"""The step of every optimizer here: precondition, bound, momentum, decay, move."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from precond.step.divergence import advice, all_finite, broken_gradients
from precond.step.loop import Loop
from precond.step.options import Momentum, WeightDecay, in_groups
from precond.step.scheduled import ScheduledOptimizer
from precond.step.schedules import Scheduled
from precond.step.signature import announced
from precond.step.uncompiled import uncompiled
from precond.step.update import apply_update, kl_scale, regularized
from solvers.outcome.arguments import flag, instance
from solvers.outcome.remedies import FLOAT64, PERTURBED, remedies


class StepOptions(TypedDict, total=False):
    """Options that every method has; explained at :class:`SecondOrderOptimizer`."""

    weight_decay: Scheduled | WeightDecay
    kl_clip: Scheduled | None
    maximize: bool
    loop: Loop


class MomentumOptions(StepOptions, total=False):
    """:class:`StepOptions`, and ``momentum`` for methods with the default one."""

    momentum: Scheduled | Momentum


@announced
class SecondOrderOptimizer(ScheduledOptimizer):
    """A ``torch.optim.Optimizer`` that owns the order of a step, not the mathematics of C.

    A step is: evaluate the closure if there is one; skip (or raise) if a gradient is not finite; add L2 weight decay;
    precondition; bound the step; momentum; other weight decay; move. :meth:`precondition` is the first half alone: it
    rewrites ``p.grad`` only, so that any ``torch.optim`` optimizer can do the second half.

    Every numeric option but ``lr`` may be a function of the number of steps taken before, see
    :class:`~precond.step.scheduled.ScheduledOptimizer`.

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate, non-negative.
        momentum: Momentum on the preconditioned gradient: its strength, or :class:`Momentum`.
        weight_decay: Strength of the weight decay, decoupled; or :class:`WeightDecay`.
        kl_clip: Bound c on ``sum lr^2 <d, g>``, the (doubled) predicted KL divergence of a step; ``None`` for none.
        maximize: Ascend.
        loop: The parts of the training loop that cannot be seen, see :class:`Loop`.
        defaults: Further options of the parameter groups, of the method's own.
    """

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "grad"
    #: The settings of :class:`Loop` that affect the method.
    loop_settings: ClassVar[frozenset[str]] = frozenset({"nonfinite", "max_skips"})
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        momentum: Scheduled | Momentum = 0.0,
        weight_decay: Scheduled | WeightDecay = 0.0,
        kl_clip: Scheduled | None = None,
        maximize: bool = False,
        loop: Loop = Loop(),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            me = type(self).__name__
            raise TypeError(f"{me} takes parameters, not the model: {me}(model.parameters(), ...).")
        instance("loop", loop, Loop, "a precond.Loop")
        flag("maximize", maximize)
        loop.require(self.loop_settings, type(self).__name__)
        self.loop = loop
        self.skipped = 0  # steps skipped because a gradient was not finite
        self.skipped_in_row = 0
        self.remedies: Counter[str] = Counter()  # of decompositions, see solvers.outcome.remedies
        options = {
            "lr": lr,
            **in_groups({"momentum": momentum, "nesterov": False, "weight_decay": weight_decay, "decay": "decoupled"}),
            "kl_clip": kl_clip,
            "maximize": maximize,
            **(defaults or {}),
        }
        self._prepared: dict[int, tuple[Tensor, int, Tensor]] = {}  # result of precondition(): d, version, <d, g>
        self.idle = False  # the step saw only zero gradients and zero rates, so it does not count
        super().__init__(params, options)
        if not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            raise ValueError(
                f"every parameter given to {type(self).__name__} is frozen; call requires_grad_(True) on those to be "
                "trained."
            )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        announced(cls)

    @abstractmethod
    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Update curvature and return ``P g`` for every parameter that has a gradient; must not alter the inputs.

        Args:
            gradients: Parameter -> gradient, true in scale.
        """

    def regularized(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Gradients with the L2 part of the weight decay."""
        return regularized(gradients, self.param_groups)

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options of a group for the second half of the step."""
        return group

    def on_skip(self) -> None:
        """A step is skipped: forget its statistics."""

    def after_step(self) -> None:
        """A step was taken, or its first half: prepare the next one."""

    def after_move(self) -> None:
        """The parameters are where the step has taken them."""

    def mark(self) -> Any:
        """What a step changes before the parameters move, as it is now, for :meth:`back_to`."""

    def back_to(self, mark: Any) -> None:
        """Undo the part of a step since :meth:`mark`, which raised."""

    def metrics(self) -> dict[str, float]:
        """What the run has met so far, as a flat dict of floats for any logger.

        ``steps`` and ``skipped`` are those taken and skipped; ``decompositions_in_float64`` and
        ``decompositions_perturbed`` count eigendecompositions and the like that failed in their own precision, and
        succeeded in float64 or only after a perturbation of the size of rounding errors.
        """
        counts = {name: self.remedies[name] for name in (FLOAT64, PERTURBED)}
        return {name: float(count) for name, count in {"steps": self.steps, "skipped": self.skipped, **counts}.items()}

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within the block everything happens or nothing, whatever raises."""
        mark = self.mark()
        try:
            with remedies(self.remedies):
                yield
        except BaseException:
            self.back_to(mark)
            raise

    @uncompiled
    @torch.no_grad()
    def precondition(self, closure: Callable[[], Any] | None = None) -> Any:
        """First half of :meth:`step`: replace every ``p.grad`` by ``P g``; no parameter moves.

        Returns:
            Whatever the closure returned.
        """
        self.apply_schedules()
        loss = self._evaluate(closure)
        gradients = self.true_gradients()
        if gradients is None:
            return loss
        self.idle = self._stands_still(gradients)
        with self._all_or_nothing():
            gradients = self.regularized(gradients)
            directions = self.directions(gradients)
        zero = torch.zeros(())
        products = {p: (directions[p] * g).sum() if p in directions else zero for p, g in gradients.items()}
        for p, d in directions.items():
            if p.grad is not None and d is not p.grad:
                p.grad.copy_(d)
        # The products serve the bound, which belongs to the second half.
        self._prepared = {id(p): (p.grad, p.grad._version, dg) for p, dg in products.items() if p.grad is not None}
        self._count()
        return loss

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class for its order.

        Args:
            closure: Re-evaluates the model, calls ``backward()`` and returns the loss.

        Returns:
            Whatever the closure returned, or ``None``.
        """
        if closure is not None or not self._is_prepared():
            self.apply_schedules()
        loss = self._evaluate(closure)
        gradients = self.true_gradients()
        if gradients is None:
            return loss
        prepared = self._is_prepared()
        self.idle = self._stands_still(gradients)
        with self._all_or_nothing():
            if not prepared:
                gradients = self.regularized(gradients)
            directions = dict(gradients) if prepared else self.directions(gradients)
            self._bound(directions, gradients, prepared)
            for group in self.param_groups:
                params = [p for p in group["params"] if p in directions]
                if params:
                    options = self.update_options(group)
                    apply_update(params, [directions[p] for p in params], [self.state[p] for p in params], options)
        self._prepared = {}
        if not prepared:
            self._count()
        self.after_move()
        return loss

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += not self.idle
        self.after_step()

    def _stands_still(self, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether gradients and rates are all zero, as in torch.distributed.checkpoint's step to create a state."""
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        return not any(bool(g.any()) for g in gradients.values())

    # State

    def __getstate__(self) -> dict[str, Any]:
        # A learning rate scheduler stores a wrapper of `step`, bound to this very object, as an attribute.
        own = {key: value for key, value in self.__dict__.items() if not key.startswith("_") and key != "step"}
        return {**own, "_prepared": {}, "idle": False}

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _with_gradient(self) -> list[Tensor]:
        # A parameter that was frozen during training may still have the gradient of the step before.
        params = (p for group in self.param_groups for p in group["params"])
        return [p for p in params if p.grad is not None and p.requires_grad]

    def true_gradients(self) -> dict[Tensor, Tensor] | None:
        """Gradients in their true scale, or ``None`` if the step is to be skipped."""
        found_inf = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            self.on_skip()
            return None
        gradients = {p: p.grad for p in self._with_gradient() if p.grad is not None}
        if not gradients:  # without gradients this does not count as a step
            self.on_skip()
            return None
        for p, g in gradients.items():
            if g.is_sparse:
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which {type(self).__name__} does "
                    "not take. Use sparse=False in the embedding."
                )
        if not self._finite(list(gradients.values())):
            self._skip(gradients)
            return None
        self.skipped_in_row = 0
        if scale is not None:
            gradients = {p: g / scale for p, g in gradients.items()}
        return gradients

    def _skip(self, gradients: dict[Tensor, Tensor]) -> None:
        """Skip the step, because a gradient is not finite, and warn.

        Raises:
            FloatingPointError: If that is asked for, or after too many such steps in a row.
        """
        self.skipped += 1
        self.skipped_in_row += 1
        self.on_skip()
        me, what = type(self).__name__, broken_gradients(gradients, self.name_of)
        if self.loop.nonfinite == "raise":
            raise FloatingPointError(
                f"{what}. Nothing was changed. Lower the learning rate, raise the damping, or look at the batch; "
                "loop=Loop(nonfinite='skip') goes on without it."
            )
        if self.skipped_in_row >= self.loop.max_skips:
            params = [p for group in self.param_groups for p in group["params"]]
            raise FloatingPointError(
                f"{me} skipped {self.skipped_in_row} steps in a row: {what}. Training has diverged: "
                f"{advice(params, self.name_of)}. max_skips={self.loop.max_skips} sets how many steps may be skipped."
            )
        warnings.warn(
            f"{me} skips a step ({self.skipped} so far): {what}. Parameters and statistics stay as they are.",
            RuntimeWarning,
            stacklevel=5,
        )

    #: Whether gradients are fit for a step.
    _finite = staticmethod(all_finite)

    def _is_prepared(self) -> bool:
        """Whether :meth:`precondition` wrote these very gradients."""
        if not self._prepared:
            return False
        for p in self._with_gradient():
            grad, version, _ = self._prepared.get(id(p), (None, -1, None))
            if grad is not p.grad or grad is None or grad._version != version:
                return False
        return True

    def _bound(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], prepared: bool) -> None:
        bounds = {group["kl_clip"] for group in self.param_groups} - {None}
        if not bounds or not directions:
            return
        products = [
            (self._prepared[id(p)][2] if prepared else (directions[p] * gradients[p]).sum(), float(group["lr"]))
            for group in self.param_groups
            for p in group["params"]
            if p in directions
        ]
        scale = kl_scale(products, min(bounds))
        for p, d in directions.items():
            directions[p] = d * scale.to(d.dtype)
