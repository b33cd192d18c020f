"""The step of every optimizer here: precondition, bound, momentum, decay, move."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from precond.step.divergence import advice, all_finite, broken_gradients
from precond.step.loop import Loop
from precond.step.options import Momentum, TrustRegion, WeightDecay, in_groups
from precond.step.scheduled import ScheduledOptimizer
from precond.step.schedules import Scheduled
from precond.step.signature import announced
from precond.step.trust_region import BoundRecord, Move, Slopes, bounded_move, inner, reference_lr
from precond.step.uncompiled import uncompiled
from precond.step.update import apply_update, regularized

log = logging.getLogger(__name__)


class StepOptions(TypedDict, total=False):
    """Options that every method has; explained at :class:`SecondOrderOptimizer`."""

    weight_decay: Scheduled | WeightDecay
    kl_clip: Scheduled | TrustRegion | None
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
        kl_clip: Bound on twice the predicted KL divergence of a step, momentum included: a number, the bound at the
            learning rate to begin with, or a :class:`TrustRegion`; ``None`` for none.
        maximize: Ascend.
        loop: The parts of the training loop that cannot be seen, see :class:`Loop`.
        defaults: Further options of the parameter groups, of the method's own.
    """

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "grad"
    #: Options that schedulers of torch must not take for the momentum of the method (``OneCycleLR``, ``CyclicLR``).
    uncycled: ClassVar[frozenset[str]] = frozenset()
    #: The settings of :class:`Loop` that affect the method.
    loop_settings: ClassVar[frozenset[str]] = frozenset({"nonfinite", "max_skips"})
    #: Names of the options that the constructor was given, so that one without effect is refused and a default is not.
    given: frozenset[str] = frozenset()
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        momentum: Scheduled | Momentum = 0.0,
        weight_decay: Scheduled | WeightDecay = 0.0,
        kl_clip: Scheduled | TrustRegion | None = None,
        maximize: bool = False,
        loop: Loop = Loop(),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            me = type(self).__name__
            raise TypeError(f"{me} takes parameters, not the model: {me}(model.parameters(), ...).")
        loop.require(self.loop_settings, type(self).__name__)
        self.loop = loop
        self.skipped = 0  # steps skipped because a gradient was not finite
        self.skipped_in_row = 0
        options = {
            "lr": lr,
            **in_groups({"momentum": momentum, "nesterov": False, "weight_decay": weight_decay, "decay": "decoupled"}),
            **in_groups({"kl_clip": kl_clip}),
            "maximize": maximize,
            **(defaults or {}),
        }
        self._prepared: dict[int, tuple[Tensor, int, Slopes]] = {}  # result of precondition(): d, its version
        self._measured: dict[Tensor, Tensor] = {}  # squared lengths of momenta in a metric that is new
        self._bounds = BoundRecord()
        self.idle = False  # the step saw only zero gradients and zero rates, so it does not count
        super().__init__(params, options)
        # A scheduler that cycles momentum writes it wherever `defaults` has it, also into a method without momentum.
        hidden = self.uncycled if options["momentum"] else self.uncycled | {"momentum"}
        self.reserved = {name: self.defaults.pop(name) for name in sorted(hidden)}
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

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within the block everything happens or nothing, whatever raises."""
        mark = self.mark()
        try:
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
        slopes = self._slopes_of(directions, gradients)
        for p, d in directions.items():
            if p.grad is not None and d is not p.grad:
                p.grad.copy_(d)
        # The slopes serve the bound, which belongs to the second half.
        self._prepared = {id(p): (p.grad, p.grad._version, s) for p, s in slopes.items() if p.grad is not None}
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
            move = self._bound(directions, gradients, prepared)
            scale = None if move is None else move.whole
            for group in self.param_groups:
                params = [p for p in group["params"] if p in directions]
                if params:
                    states, options = [self.state[p] for p in params], self.update_options(group)
                    apply_update(params, [directions[p] for p in params], states, options, scale)
        self._note(move)
        self._prepared, self._measured = {}, {}
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
        return {**own, "_prepared": {}, "_measured": {}, "_bounds": BoundRecord(), "idle": False}

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

    # The trust region

    def images(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``P^-1 d`` of every direction d; the gradient, unless there is more in d."""
        return gradients

    def _slopes_of(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Slopes]:
        images, out = self.images(directions, gradients), {}
        for p in gradients:
            if p not in directions:
                out[p] = Slopes(torch.zeros(()), None)
                continue
            v = self.state[p].get("momentum_buffer") if p in self.state else None
            out[p] = Slopes(inner(directions[p], images[p]), None if v is None else inner(v, images[p]))
        return out

    def _bound(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], prepared: bool) -> Move | None:
        """Shorten the directions, and say by how much the whole move is to be shortened."""
        groups = [self.update_options(group) for group in self.param_groups]
        if not directions or all(group["kl_clip"] is None for group in groups):
            return None
        if prepared:
            slopes = {p: self._prepared[id(p)][2] for p in directions}
        else:
            slopes = self._slopes_of(directions, gradients)
        lengths = {p: state["length"] for p in directions if "length" in (state := self.state.get(p, {}))}
        move = bounded_move(groups, slopes, lengths | self._measured)
        if move is not None:
            for p, d in directions.items():
                directions[p] = d * move.directions.to(d.dtype)
        return move

    def _note(self, move: Move | None) -> None:
        """Keep the lengths of the momenta, and tell once of a bound that is active most of the time."""
        lengths = {} if move is None else move.lengths
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state is not None and p in lengths:
                    if "length" in state:
                        state["length"].copy_(lengths[p])
                    else:
                        state["length"] = lengths[p].clone()
                elif state is not None and move is None:
                    state.pop("length", None)  # the momentum goes on without being measured
        if move is None:
            return
        self._bounds.add(move)
        if self._bounds.worth_telling():
            group = self.param_groups[0]
            log.warning(
                "%s: kl_clip=%g has shortened %.0f%% of the steps so far. It sets their length, with lr over %s, "
                "whatever the gradient%s. If that is not meant, raise kl_clip or the damping; metrics() has the share.",
                type(self).__name__,
                group["kl_clip"],
                100 * self._bounds.share,
                f"{reference_lr(group):g}",
                "" if group["kl_lr"] else " and the lr to begin with: TrustRegion(kl, lr=...) gives that an effect",
            )

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: ``lr`` and ``damping`` of the first group, ``steps``, ``skipped`` ones.

        With a bound (``kl_clip``) also ``bound``, the share of steps since the optimizer was made in which it was
        active, and ``kl``, the divergence that is predicted for the last move.
        """
        group = self.param_groups[0]
        out = {name: float(group[name]) for name in ("lr", "damping") if group.get(name) is not None}
        out |= {"steps": float(self.steps), "skipped": float(self.skipped)}
        if self._bounds.steps:
            out |= {"bound": self._bounds.share, "kl": self._bounds.kl}
        return out
