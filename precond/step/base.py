"""The step of every optimizer here: precondition, bound, momentum, decay, move."""

from __future__ import annotations

import logging
import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from precond.distributed.agreement import verdict
from precond.distributed.checkpoint import PACKED, asked_by_checkpoint, counted, packed, unpacked
from precond.distributed.ranks import Ranks, check_group, group_of
from precond.distributed.sharded import refuse_left_behind
from precond.step.described import described
from precond.step.divergence import Diverged, advice, all_finite, broken_gradients, broken_results, largest_norm
from precond.step.journal import FAILURES, REFRESHES, lengths, norm, shares
from precond.step.loop import Loop
from precond.step.options import Momentum, TrustRegion, WeightDecay, in_groups
from precond.step.scheduled import ScheduledOptimizer
from precond.step.schedules import Scheduled
from precond.step.signature import announced
from precond.step.transaction import Transaction
from precond.step.trust_region import BoundRecord, Move, Slopes, bounded_move, reference_lr, scaled
from precond.step.uncompiled import uncompiled
from precond.step.update import apply_update, regularized
from solvers.outcome.arguments import flag, instance
from solvers.outcome.remedies import FLOAT64, PERTURBED, remedies
from solvers.precision import working_dtype

log = logging.getLogger(__name__)

#: Norms of gradients between which products with them can be taken in float32.
_PLAIN = 1e-10, 1e10

#: Steps in a row without any gradient after which that is told.
EMPTY_STEPS = 3


class StepOptions(TypedDict, total=False):
    """Options that every method has; explained at :class:`SecondOrderOptimizer`."""

    weight_decay: Scheduled | WeightDecay
    kl_clip: Scheduled | TrustRegion | None
    maximize: bool
    loop: Loop
    process_group: ProcessGroup | None


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
        process_group: Processes whose gradients the loop averages by hand; they decide together whether a step is
            taken. Those of a model in ``DistributedDataParallel`` need no mention.
        defaults: Further options of the parameter groups, of the method's own.
    """

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "grad"
    #: Whether bounds may be in units of the loss (``TrustRegion(unit="loss")``).
    sees_loss: ClassVar[bool] = False
    #: Options that schedulers of torch must not take for the momentum of the method (``OneCycleLR``, ``CyclicLR``).
    uncycled: ClassVar[frozenset[str]] = frozenset()
    #: Options of the groups of some roles, as the method's authors treat them; see :func:`precond.param_groups`.
    by_role: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    #: The settings of :class:`Loop` that affect the method.
    loop_settings: ClassVar[frozenset[str]] = frozenset({"nonfinite", "max_skips"})
    #: Names of the options that the constructor was given, so that one without effect is refused and a default is not.
    given: frozenset[str] = frozenset()
    _reason = ""  # why a step is refused whose results are finite
    _step_supports_amp_scaling = True
    #: Change of the objective in the last step that was compared with its quadratic model: promised, and true.
    judged: tuple[float, float] | None = None
    #: Whether :meth:`metrics` was called, so that steps measure what takes work.
    asked = False
    _lengths_moved: tuple[Tensor, ...] = ()  # norm of each parameter's last move
    _empty_in_row = 0  # steps without any gradient

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
        process_group: ProcessGroup | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            me = type(self).__name__
            raise TypeError(f"{me} takes parameters, not the model: {me}(model.parameters(), ...).")
        instance("loop", loop, Loop, "a precond.Loop")
        flag("maximize", maximize)
        loop.require(self.loop_settings, type(self).__name__)
        self.loop = loop
        self.process_group = check_group(process_group)
        if self.process_group is not None and self.needs == "closure":
            raise NotImplementedError(
                f"{type(self).__name__} differentiates the loss of its closure itself, so process_group= has no "
                "effect. It runs in one process; KFAC, EKFAC and the methods that use gradients alone run in several."
            )
        self._ranks: Ranks | None = None
        self.skipped = 0  # steps skipped because a gradient was not finite
        self.skipped_in_row = 0
        self.remedies: Counter[str] = Counter()  # of decompositions, see solvers.outcome.remedies
        self.events: Counter[str] = Counter()  # refreshes, and those that failed
        #: Name -> numbers of cut entries, and of all, in the last step.
        self.cut: dict[str, list[tuple[Tensor, int]]] = {}
        options = {
            "lr": lr,
            **in_groups({"momentum": momentum, "nesterov": False, "weight_decay": weight_decay, "decay": "decoupled"}),
            **in_groups({"kl_clip": kl_clip}),
            "maximize": maximize,
            **(defaults or {}),
        }
        self._prepared: dict[int, tuple[Tensor, int]] = {}  # result of precondition(): d, its version
        self._prepared_slopes: Slopes | None = None  # of that result
        self._norm = math.inf  # the largest of the gradients; infinite if not known
        self._measured: dict[Tensor, Tensor] = {}  # squared lengths of momenta in a metric that is new
        self._bounds = BoundRecord()
        self.idle = False  # the step saw only zero gradients and zero rates, so it does not count
        #: Values that parameters take at the end of the step under way.
        self.coming: dict[Tensor, Tensor] = {}
        #: Parts of the state and their new values, for methods that write into large tensors; written with the move.
        self.rows_written: list[tuple[Tensor, Tensor]] = []
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

    def __repr__(self) -> str:
        """The options, and the groups where there are several."""
        return described(type(self).__name__, self.steps, getattr(self, "param_groups", []))

    @abstractmethod
    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Update curvature and return ``P g`` for every parameter that has a gradient; must not alter the inputs.

        Args:
            gradients: Parameter -> gradient, true in scale.
        """

    def directions_of_all(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """:meth:`directions`, in all processes or in none."""
        if self.ranks is None:
            return self.directions(gradients)
        found: dict[Tensor, Tensor] = {}
        self.ranks.together(lambda: found.update(self.directions(gradients)))
        return found

    def bound_level(self) -> Tensor | None:
        """What bounds in units of the loss are multiplied by, 0-d; ``None`` for a method that does not see the loss."""
        return None

    def regularized(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Gradients with the L2 part of the weight decay."""
        return regularized(gradients, self.param_groups)

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options of a group for the second half of the step."""
        return group

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if options.get("kl_unit") == "loss" and not self.sees_loss:
            raise ValueError(
                f"{type(self).__name__} does not see the loss, so kl_clip cannot be in its units: leave out "
                "unit='loss'."
            )

    def on_skip(self) -> None:
        """A step is skipped: forget its statistics."""

    def on_empty(self) -> None:
        """No parameter has a gradient; told when it goes on, because nothing would be trained."""
        self._empty_in_row += 1
        if self._empty_in_row == EMPTY_STEPS:
            warnings.warn(
                f"{type(self).__name__}: no parameter had a gradient in the last {EMPTY_STEPS} steps, so nothing was "
                "trained. Call backward() before step(); make the optimizer for the model that the loop trains, after "
                "its layers are complete.",
                RuntimeWarning,
                stacklevel=5,
            )

    def before_move(self) -> None:
        """All values that the step gives are known (:attr:`coming`; none in its first half), and nothing has moved."""

    def after_move(self) -> None:
        """The parameters are where the step has taken them; where this may raise, :attr:`follows_move` must be true."""

    def after_step(self) -> None:
        """A step was taken, or its first half: prepare the next one. Must not raise."""

    @property
    def follows_move(self) -> bool:
        """Whether something that may raise follows the move, see :meth:`after_move`."""
        return False

    # Whole or not at all

    def mark(self) -> Any:
        """What is kept in objects of the method's own, as it is now, for :meth:`back_to`.

        Attributes, the groups and the state are looked after by :class:`~precond.step.transaction.Transaction`.
        """

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since :meth:`mark`, because something raised."""

    def transaction(self, random: bool = False) -> Transaction:
        """A block in which everything happens or nothing, whatever raises.

        Args:
            random: Whether the global random streams are put back as well, because the user's closure draws from them.
        """
        mark = self.mark()
        device = next(p.device for group in self.param_groups for p in group["params"]) if random else None
        return Transaction(self, lambda: self.back_to(mark), device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with self.transaction():
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, in torch's layout; for ``torch.distributed.checkpoint`` complete as a template."""
        asked = asked_by_checkpoint()
        if asked:
            self._expect_checkpoint()
        out = super().state_dict()
        out["state"] = {key: {n: x for n, x in own.items() if n != PACKED} for key, own in out["state"].items()}
        out["state"] = {key: own for key, own in out["state"].items() if own}
        out["state"] = self.spread(out["state"])
        self.complete(out)
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        if asked:
            for group, schedules in zip(self.param_groups, self.schedules, strict=True):
                for p in group["params"]:
                    entries = out["state"].get(numbers[p], {})
                    out["state"][numbers[p]] = packed(entries, self._template(p, entries, group, schedules))
        counted(out, {number for p, number in numbers.items() if p.requires_grad})
        return out

    def spread(self, states: dict[int, Any]) -> dict[int, Any]:
        """States by number, with what single processes keep laid out over all of them."""
        return states

    def gather(self) -> None:
        """After loading: keep what belongs to this process."""

    def complete(self, saved: dict[str, Any]) -> None:
        """Add to a ``state_dict`` what the method keeps elsewhere."""

    def first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Entries that the state of a parameter has from its first step on, as they are before it."""
        return {}

    def _template(
        self, p: Tensor, known: Mapping[str, Any], group: dict[str, Any], schedules: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the state of every parameter holds in a checkpoint, with the values that it has before a first step."""
        # A state without entries before its first step is packed whole, by a fresh optimizer and by one that has run.
        begins = type(self).first_state is not SecondOrderOptimizer.first_state
        out = dict(self.expected_state(p, group) or {}) if begins else {}
        if not out.keys() <= known.keys():
            out = self.first_state(p, group)
        own = self.update_options({**group, "momentum": 1.0} if "momentum" in schedules else group)
        if own["momentum"] and self.needs != "closure":
            dtype = working_dtype(p) if self.needs == "grad" else p.dtype
            out.setdefault("momentum_buffer", torch.zeros_like(p, dtype=dtype))
        return out

    def expects_checkpoint(self) -> bool:
        """Whether the step is one of torch.distributed.checkpoint, which creates the state: nothing can move."""
        gradients = {p: p.grad for p in self._with_gradient() if p.grad is not None}
        if not gradients or not self._stands_still(gradients):
            return False
        self._expect_checkpoint()
        return True

    def _expect_checkpoint(self) -> None:
        """Give all states their first entries: the flat form of a checkpoint restores those only that are there."""
        for group, schedules in zip(self.param_groups, self.schedules, strict=True):
            for p in group["params"]:
                if p.requires_grad:
                    own = self.state[p]
                    own.update({**self._template(p, own, group, schedules), PACKED: 0, **own})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If entries are missing, or are not those of the parameters; nothing has changed then.
        """
        state_dict = unpacked(state_dict, type(self).__name__)
        with self.transaction():
            super().load_state_dict(state_dict)
            self.gather()

    @uncompiled
    @torch.no_grad()
    def precondition(self, closure: Callable[[], Any] | None = None) -> Any:
        """First half of :meth:`step`: replace every ``p.grad`` by ``P g``; no parameter moves.

        Returns:
            Whatever the closure returned.
        """
        whole = self.transaction(closure is not None)
        with whole:
            self.apply_schedules()
            loss = self._evaluate(closure)
            gradients = self.true_gradients()
        if gradients is None:
            return loss
        with remedies(self.remedies), whole:
            self.idle, self.coming, self.rows_written = self._stands_still(gradients), {}, []
            self._same_precision(gradients)
            self.cut = {}
            gradients = self.regularized(gradients)
            directions = self.directions_of_all(gradients)
            self.before_move()
            fit = self._fit(directions)
            if fit:
                self.skipped_in_row = 0
                self._write_directions(whole, directions, gradients)
        if not fit:
            self._refuse(whole, gradients, directions)
        return loss

    def _write_directions(
        self, whole: Transaction, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]
    ) -> None:
        slopes = self._slopes_of(directions, gradients)
        written = [(p.grad, d) for p, d in directions.items() if p.grad is not None and d is not p.grad]
        whole.move([*written, *self.rows_written], self._count)
        whole.end()
        # The slopes serve the bound, which belongs to the second half.
        self._prepared = {id(p): (p.grad, p.grad._version) for p in gradients if p.grad is not None}
        self._prepared_slopes = slopes

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class for its order.

        Whatever raises, parameters, state and groups are as they were, and the same batch may be tried again.

        Args:
            closure: Re-evaluates the model, calls ``backward()`` and returns the loss.

        Returns:
            Whatever the closure returned, or ``None``.
        """
        whole = self.transaction(closure is not None)
        with whole:
            if closure is not None or not self._is_prepared():
                self.apply_schedules()
            loss = self._evaluate(closure)
            gradients = self.true_gradients()
        if gradients is None:
            return loss
        with remedies(self.remedies), whole:
            values, bounds = self._values(gradients)
            if fit := self._fit(values):
                self._move(whole, values, bounds)
        if not fit:
            self._refuse(whole, gradients, values)
        return loss

    def _same_precision(self, gradients: dict[Tensor, Tensor]) -> None:
        """Take the state along where the model went on in another precision, by ``model.double()``."""
        known = self.__dict__.setdefault("_precisions", {})  # not in __init__, because copies start without it
        for p in gradients:
            if known.get(p, p.dtype) != p.dtype:
                self.convert(p)
        known.update({p: p.dtype for p in gradients})

    def convert(self, p: Tensor) -> None:
        """A parameter is in another precision than before: convert its state."""
        dtype, state = working_dtype(p), self.state[p]
        wide = {k: x for k, x in state.items() if isinstance(x, Tensor) and x.ndim and x.is_floating_point()}
        state.update({name: x.to(dtype) for name, x in wide.items()})

    def _values(self, gradients: dict[Tensor, Tensor]) -> tuple[dict[Tensor, Tensor], BoundRecord]:
        """The values that parameters are to take, and how often the bound was active with this step."""
        prepared = self._is_prepared()
        self.idle, self.coming, self.rows_written = self._stands_still(gradients), {}, []
        self._same_precision(gradients)
        if not prepared:
            self.cut = {}
            gradients = self.regularized(gradients)
        directions = dict(gradients) if prepared else self.directions_of_all(gradients)
        move = self._bound(directions, gradients, prepared)
        scale = None if move is None else move.whole
        for group in self.param_groups:
            params = [p for p in group["params"] if p in directions]
            if params:
                given, states = [directions[p] for p in params], [self.state[p] for p in params]
                found = apply_update(params, given, states, self.update_options(group), scale)
                self.coming |= zip(params, found, strict=True)
        if not prepared:
            self.before_move()
        return dict(self.coming), self._noted(move)

    def _move(self, whole: Transaction, values: dict[Tensor, Tensor], bounds: BoundRecord) -> None:
        """Write them, with all that follows from that."""
        prepared = self._is_prepared()

        def last() -> None:
            self._prepared, self._prepared_slopes, self._measured, self._bounds = {}, None, {}, bounds
            self.coming, self.rows_written, self.skipped_in_row = {}, [], 0
            if not prepared:
                self._count()

        before = {p: p.detach().clone() for p in values} if self.asked and self.follows_move else {}
        found = lengths((value, p) for p, value in values.items()) if self.asked and not before else []
        whole.move([*values.items(), *self.rows_written], last, more_follows=self.follows_move)
        self.after_move()
        self._lengths_moved = tuple(found or lengths(before.items()))
        whole.end()

    def touched(self) -> list[Tensor]:
        """What the step has written to the state, beside the parameters' own entries ``momentum_buffer``."""
        return []

    def _fit(self, results: Mapping[Tensor, Tensor]) -> bool:
        """Whether results of the step are fit to be written: they are finite; one wait for the device.

        A momentum that is not finite shows in the value of its parameter.
        """
        fit = all_finite([*results.values(), *self.touched()])
        if self.ranks is None:
            return fit
        table = self.ranks.numbers([float(fit), float(self.events[FAILURES])])
        if len({failed for _, failed in table}) > 1:  # the decompositions of some are older than those of others
            self._reason = "a decomposition failed in some processes and not in others"
        return all(row[0] for row in table) and not self._reason

    @property
    def ranks(self) -> Ranks | None:
        """The processes that take the steps together; ``None`` for one process."""
        if self._ranks is None and self.process_group is not None:
            group = group_of(self.process_group, None)
            if group is not None:
                self._ranks = Ranks(group, next(p for g in self.param_groups for p in g["params"]).device)
        return self._ranks

    def _refuse(self, whole: Transaction, gradients: dict[Tensor, Tensor], results: Mapping[Tensor, Tensor]) -> None:
        """Skip the step, because what it would write is not finite."""
        reason = self._reason
        whole.go_back()
        self._skip(gradients, reason or broken_results(results, self.state_dict()["state"], self.name_of))

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += not self.idle
        if self.idle:
            self._expect_checkpoint()
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
        fresh: dict[str, Any] = {
            "_prepared": {},
            "_prepared_slopes": None,
            "_norm": math.inf,
            "_measured": {},
            "idle": False,
            "process_group": None,
            "_ranks": None,
        }
        return {**own, **fresh, "_bounds": BoundRecord(), "coming": {}, "rows_written": []}

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
        if self.ranks is not None:
            return self._common_gradients(self.ranks, found_inf is not None and bool(found_inf), scale)
        if found_inf is not None and bool(found_inf):
            self.on_skip()
            return None
        if not self.steps and "_looked" not in self.__dict__:
            self._looked = True
            refuse_left_behind((p for group in self.param_groups for p in group["params"]), type(self).__name__)
        gradients = {p: p.grad for p in self._with_gradient() if p.grad is not None}
        if not gradients:  # without gradients this does not count as a step
            self.on_empty()
            self.on_skip()
            return None
        self._empty_in_row = 0
        self._refuse_sparse(gradients)
        self._norm = largest_norm(list(gradients.values()))
        if not self.takes(self._norm, gradients):
            self._skip(gradients)
            return None
        if scale is not None:
            self._norm, gradients = math.inf, {p: g / scale for p, g in gradients.items()}
        return gradients

    def _refuse_sparse(self, gradients: Mapping[Tensor, Tensor]) -> None:
        for p, g in gradients.items():
            if g.is_sparse:
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient, which {type(self).__name__} does "
                    "not take. Use sparse=False in the embedding."
                )

    def _common_gradients(self, ranks: Ranks, quiet: bool, scale: Tensor | None) -> dict[Tensor, Tensor] | None:
        """As :meth:`true_gradients`, where several processes take the step or none."""
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = {p: p.grad for p in self._with_gradient() if p.grad is not None}
        fit = True

        def finite() -> bool:
            nonlocal fit
            self._refuse_sparse(gradients)
            self._norm = largest_norm(list(gradients.values()))
            fit = self.takes(self._norm, gradients)
            return fit

        found = verdict(ranks, params, gradients, quiet, finite)
        if found == "broken":
            self._skip(gradients, "a gradient holds NaN or inf in another process" if fit else "")
        elif found == "quiet":
            self.on_skip()
        if found != "go":
            return None
        if scale is None:
            return gradients
        self._norm = math.inf
        return {p: g / scale for p, g in gradients.items()}

    def _skip(self, gradients: dict[Tensor, Tensor], what: str = "") -> None:
        """Skip the step, because a gradient or what was made of it is not finite, and warn.

        Raises:
            FloatingPointError: If that is asked for, or after too many such steps in a row.
        """
        self.skipped += 1
        self.skipped_in_row += 1
        self.on_skip()
        me, what = type(self).__name__, what or broken_gradients(gradients, self.name_of)
        if self.loop.nonfinite == "raise":
            raise Diverged(
                f"{what}. Nothing was changed. Lower the learning rate, raise the damping, or look at the batch; "
                "loop=Loop(nonfinite='skip') goes on without it."
            )
        if self.skipped_in_row >= self.loop.max_skips:
            params = [p for group in self.param_groups for p in group["params"]]
            raise Diverged(
                f"{me} skipped {self.skipped_in_row} steps in a row: {what}. Training has diverged: "
                f"{advice(params, self.name_of)}. max_skips={self.loop.max_skips} sets how many steps may be skipped."
            )
        warnings.warn(
            f"{me} skips a step ({self.skipped} so far): {what}. Parameters and statistics stay as they are.",
            RuntimeWarning,
            stacklevel=5,
        )

    def takes(self, norm: float, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether gradients, of which the largest norm is given, are fit for a step."""
        return math.isfinite(norm)

    def _is_prepared(self) -> bool:
        """Whether :meth:`precondition` wrote these very gradients."""
        if not self._prepared:
            return False
        for p in self._with_gradient():
            grad, version = self._prepared.get(id(p), (None, -1))
            if grad is not p.grad or grad is None or grad._version != version:
                return False
        return True

    # The trust region

    def images(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``P^-1 d`` of every direction d; the gradient, unless there is more in d."""
        return gradients

    def _slopes_of(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> Slopes:
        params = [p for group in self.param_groups for p in group["params"] if p in directions]
        known = {p: self.state[p] for p in params if p in self.state}
        momenta = {p: state["momentum_buffer"] for p, state in known.items() if "momentum_buffer" in state}
        wide = not _PLAIN[0] < self._norm < _PLAIN[1]
        return Slopes.of(params, directions, momenta, self.images(directions, gradients), wide=wide)

    def _bound(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], prepared: bool) -> Move | None:
        """Shorten the directions, and say by how much the whole move is to be shortened."""
        groups = [self.update_options(group) for group in self.param_groups]
        if not directions or all(group["kl_clip"] is None for group in groups):
            return None
        known = self._prepared_slopes if prepared else None
        slopes = self._slopes_of(directions, gradients) if known is None else known.of_those_in(directions)
        lengths = {p: state["length"] for p in slopes.params if "length" in (state := self.state.get(p, {}))}
        move = bounded_move(groups, slopes, lengths | self._measured, self.bound_level())
        if move is not None:
            directions.update(zip(directions, scaled(list(directions.values()), move.directions), strict=True))
        return move

    def _noted(self, move: Move | None) -> BoundRecord:
        """Keep the lengths of the momenta; returns how often the bound was active, which is told once."""
        lengths = {} if move is None else move.lengths
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state is not None and p in lengths:
                    state["length"] = lengths[p]
                elif state is not None and move is None:
                    state.pop("length", None)  # the momentum goes on without being measured
        if move is None:
            return self._bounds
        bounds = self._bounds.after(move)
        if not bounds.worth_telling():
            return bounds
        group = self.param_groups[0]
        log.warning(
            "%s: kl_clip=%g has shortened %.0f%% of the steps so far. It sets their length, with lr over %s, "
            "whatever the gradient%s. If that is not meant, raise kl_clip or the damping; metrics() has the share.",
            type(self).__name__,
            group["kl_clip"],
            100 * bounds.share,
            f"{reference_lr(group):g}",
            "" if group["kl_lr"] else " and the lr to begin with: TrustRegion(kl, lr=...) gives that an effect",
        )
        return replace(bounds, told=True)

    def note_cut(self, name: str, active: Tensor) -> None:
        """Count what a bound of the method's own has cut in this step, where somebody asks.

        Args:
            name: Of the share in :meth:`metrics`.
            active: Whether an entry was cut, bool.
        """
        if self.asked:
            self.cut.setdefault(name, []).append((active.sum(), active.numel()))

    def metrics(self) -> dict[str, float]:
        """What the run has met so far, as a flat dict of floats for any logger; waits for the device.

        ============================= ================================================================================
        ``lr``, ``damping``           of the first group
        ``steps``, ``skipped``        steps taken, and those that were skipped
        ``step_norm``                 norm of the last move of the parameters, weight decay included; measured from the
                                      first call on
        ``predicted_change``,         change of the loss of its batch in the last step that was compared with its
        ``actual_change``             quadratic model (by a ``damping_rule`` or ``step_size``): promised, and true
        ``bound``, ``kl``             with ``kl_clip``: share of the steps since the optimizer was made that the bound
                                      has shortened, and twice the divergence predicted for the last move
        ``clipped``                   share that a bound of the method's own has cut in the last step (``Sophia``: of
                                      the entries; ``PSGD``: of the parameters); measured from the first call on
        ``refreshes``, ``failures``   inverses, roots, bases and diagonals that were renewed, and those that were not,
                                      because that failed and the last good one stays; summed over blocks
        ``decompositions_in_float64`` decompositions that failed in their own precision and succeeded in float64,
        ``decompositions_perturbed``  or only after a perturbation of the size of rounding errors
        ============================= ================================================================================

        Counts are those since the optimizer was made. A step costs what it did until this is called first.
        """
        self.asked = True
        group = self.param_groups[0]
        out = {name: float(group[name]) for name in ("lr", "damping") if group.get(name) is not None}
        out |= {"steps": float(self.steps), "skipped": float(self.skipped)}
        out |= {name: float(self.events[name]) for name in (REFRESHES, FAILURES)}
        out |= {name: float(self.remedies[name]) for name in (FLOAT64, PERTURBED)}
        if self._bounds.steps:
            out |= {"bound": self._bounds.share, "kl": self._bounds.kl}
        if self._lengths_moved:
            out["step_norm"] = norm(self._lengths_moved)
        if self.judged is not None:
            out |= dict(zip(("predicted_change", "actual_change"), self.judged, strict=True))
        return out | shares(self.cut)
