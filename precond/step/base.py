"""The step of every optimizer here: precondition, bound, momentum, decay, move."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from precond.distributed.ranks import check_group
from precond.distributed.sharded import any_sharded, tell
from precond.step.alike import Alike
from precond.step.autocast import outside_of_autocast
from precond.step.averaging import swapped
from precond.step.bounded import BoundedOptimizer
from precond.step.described import described
from precond.step.given import has_closure
from precond.step.journal import FAILURES, REFRESHES, lengths, norm, shares
from precond.step.lookahead import EMANesterov, iterate
from precond.step.loop import Loop
from precond.step.norm_control import NormControl
from precond.step.options import Momentum, TrustRegion, WeightDecay, in_groups
from precond.step.schedules import Scheduled
from precond.step.signature import announced
from precond.step.transaction import Transaction
from precond.step.trust_region import BoundRecord, Slopes
from precond.step.uncompiled import uncompiled
from precond.step.update import apply_update, regularized
from solvers.outcome.arguments import flag, instance
from solvers.outcome.remedies import FLOAT64, PERTURBED, remedies
from solvers.precision import full_float32


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


class UpdateOptions(StepOptions, total=False):
    """:class:`StepOptions`, and what is done with the update of methods that use gradients alone."""

    norm_control: NormControl | None
    lookahead: Scheduled | EMANesterov | None


@announced
class SecondOrderOptimizer(BoundedOptimizer):
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
        norm_control: Of methods that use gradients alone: control of the norm of matrices and of their updates, by
            :class:`~precond.Hyperball`, :class:`~precond.UpdateFloor`, :class:`~precond.RadialBrake` or a tuple of
            them.
        lookahead: Likewise: gradients ahead of the iterate, the strength or :class:`~precond.EMANesterov`.
        defaults: Further options of the parameter groups, of the method's own.
    """

    #: Whether the update may be changed after momentum, by ``norm_control`` and ``lookahead``.
    shapes_update: ClassVar[bool] = False
    #: Options that schedulers of torch must not take for the momentum of the method (``OneCycleLR``, ``CyclicLR``).
    uncycled: ClassVar[frozenset[str]] = frozenset()
    #: Options of the groups of some roles, as the method's authors treat them; see :func:`precond.param_groups`.
    by_role: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    #: The settings of :class:`Loop` that affect the method.
    loop_settings: ClassVar[frozenset[str]] = frozenset({"nonfinite", "max_skips"})
    _step_supports_amp_scaling = True
    #: Change of the objective in the last step that was compared with its quadratic model: promised, and true.
    judged: tuple[float, float] | None = None
    _lengths_moved: tuple[Tensor, ...] = ()  # norm of each parameter's last move

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
        norm_control: NormControl | None = None,
        lookahead: Scheduled | EMANesterov | None = None,
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
        self.skipped = self.skipped_in_row = 0
        self.remedies: Counter[str] = Counter()  # of decompositions, see solvers.outcome.remedies
        self.events = Counter()
        #: Name -> numbers of cut entries, and of all, in the last step.
        self.cut: dict[str, list[tuple[Tensor, int]]] = {}
        options = {
            "lr": lr,
            **in_groups({"momentum": momentum, "nesterov": False, "weight_decay": weight_decay, "decay": "decoupled"}),
            **in_groups({"kl_clip": kl_clip}),
            "maximize": maximize,
            **(defaults or {}),
        }
        if self.shapes_update or norm_control is not None or lookahead is not None:
            options |= {"lookahead_decay": EMANesterov.decay}
            options |= in_groups({"norm_control": norm_control, "lookahead": lookahead})
        self._prepared: dict[int, tuple[Tensor, int]] = {}  # result of precondition(): d, its version
        self._prepared_slopes: Slopes | None = None  # of that result
        self.gradient_norm, self.measured = math.inf, {}
        self.bounds, self.alike = BoundRecord(), Alike()
        self.idle = False  # the step saw only zero gradients and zero rates, so it does not count
        #: Values that parameters take at the end of the step under way.
        self.coming: dict[Tensor, Tensor] = {}
        #: Parts of the state and their new values, for methods that write into large tensors; written with the move.
        self.rows_written: list[tuple[Tensor, Tensor]] = []
        self.move_factors: dict[Tensor, Tensor | float] = {}
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
        groups, schedules = getattr(self, "param_groups", []), getattr(self, "schedules", [])
        return described(type(self).__name__, self.steps, groups, schedules)

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

    def regularized(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Gradients with the L2 part of the weight decay."""
        return regularized(gradients, self.param_groups)

    def check(self, options: dict[str, Any]) -> None:
        if not self.shapes_update and ("hyperball" in options or options.get("lookahead") is not None):
            raise ValueError(
                f"{type(self).__name__} takes no norm_control and no lookahead, which change the step behind its back. "
                "They are options of the methods that use gradients alone, such as SOAP and Muon."
            )
        super().check(options)

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

    @uncompiled
    @outside_of_autocast
    @torch.no_grad()
    def precondition(self, closure: Callable[[], Any] | None = None) -> Any:
        """First half of :meth:`step`: replace every ``p.grad`` by ``P g``; no parameter moves.

        Returns:
            Whatever the closure returned.
        """
        whole = self.transaction(has_closure(closure, type(self).__name__, self.needs))
        with whole:
            self.apply_schedules()
            loss = self._evaluate(closure)
            whole.tell = self._tell
            gradients = self.true_gradients()
        if gradients is None:
            return loss
        with remedies(self.remedies), self._precision(), whole:
            self.idle, self.coming, self.rows_written, self.move_factors = self.stands_still(gradients), {}, [], {}
            self.same_precision(gradients)
            self.cut = {}
            gradients = self.regularized(gradients)
            directions = self.directions_of_all(gradients)
            self.before_move()
            fit, whole.tell = self.is_fit(directions), None
            if fit:
                self.skipped_in_row = 0
                self._write_directions(whole, directions, gradients)
        if not fit:
            self.refuse_results(whole, gradients, directions)
        return loss

    def _write_directions(
        self, whole: Transaction, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]
    ) -> None:
        slopes = self.slopes_of(directions, gradients)
        written = [(p.grad, d) for p, d in directions.items() if p.grad is not None and d is not p.grad]
        whole.move([*written, *self.rows_written], self._count)
        whole.end()
        # The slopes serve the bound, which belongs to the second half.
        self._prepared = {id(p): (p.grad, p.grad._version) for p in gradients if p.grad is not None}
        self._prepared_slopes = slopes

    @uncompiled
    @outside_of_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class for its order.

        Whatever raises, parameters, state and groups are as they were, and the same batch may be tried again.

        Args:
            closure: Re-evaluates the model, calls ``backward()`` and returns the loss.

        Returns:
            Whatever the closure returned, or ``None``.
        """
        whole = self.transaction(has_closure(closure, type(self).__name__, self.needs))
        with whole:
            if closure is not None or not self._is_prepared():
                self.apply_schedules()
            loss = self._evaluate(closure)
            whole.tell = self._tell
            gradients = self.true_gradients()
        if gradients is None:
            return loss
        with remedies(self.remedies), self._precision(), whole:
            values, bounds = self._values(gradients)
            fit, whole.tell = self.is_fit(values), None  # the last that the processes decide together
            if fit:
                self._move(whole, values, bounds)
        if not fit:
            self.refuse_results(whole, gradients, values)
        return loss

    def _tell(self, error: BaseException, handled: BaseException | None = None) -> None:
        """An error of this process is one in all that take the step together: they wait for its next decision.

        Not one of the closure, where they wait for its gradient.
        """
        with suppress(ValueError, NotImplementedError):  # of who belongs together, which all of them raise
            if self.ranks is not None:
                self.ranks.tell(error, handled)
            else:
                tell((p for group in self.param_groups for p in group["params"]), error, handled)

    def _values(self, gradients: dict[Tensor, Tensor]) -> tuple[dict[Tensor, Tensor], BoundRecord]:
        """The values that parameters are to take, and how often the bound was active with this step."""
        prepared = self._is_prepared()
        self.idle, self.coming, self.rows_written, self.move_factors = self.stands_still(gradients), {}, [], {}
        self.same_precision(gradients)
        if not prepared:
            self.cut = {}
            gradients = self.regularized(gradients)
        directions = dict(gradients if prepared else self.directions_of_all(gradients))
        move = self.shortened(directions, gradients, self._prepared_slopes if prepared else None)
        scale, shortened = (None, 1.0) if move is None else (move.whole, move.directions)
        apart = self.apart()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p in directions]
            options = self.update_options({**group, "lookahead": None} if self.idle else group)
            by_kind = (
                ([p for p in moving if p not in apart], options, scale, shortened),
                ([p for p in moving if p in apart], {**options, "momentum": 0.0, "nesterov": False}, None, 1.0),
            )
            for params, own, whole, each in by_kind:
                if params:
                    states = [self.state[p] for p in params]
                    rates = [self.move_factors.get(p, 1.0) for p in params] if self.move_factors else ()
                    given = (directions.pop(p) for p in params)  # which makes room for the values
                    found = apply_update(params, list(given), states, own, whole, shortened=each, rates=rates)
                    self.coming |= zip(params, found, strict=True)
        if not prepared:
            self.before_move()
        return dict(self.coming), self.note_move(move)

    def _move(self, whole: Transaction, values: dict[Tensor, Tensor], bounds: BoundRecord) -> None:
        """Write them, with all that follows from that."""
        prepared = self._is_prepared()

        def last() -> None:
            self._prepared, self._prepared_slopes, self.measured, self.bounds = {}, None, {}, bounds
            self.coming, self.rows_written, self.skipped_in_row = {}, [], 0
            if not prepared:
                self._count()

        asked = self.asked and (self.ranks is not None or not any_sharded(values))
        before = {p: p.detach().clone() for p in values} if asked and self.follows_move else {}
        found = lengths((value, p) for p, value in values.items()) if asked and not before else []
        whole.move([*values.items(), *self.rows_written], last, more_follows=self.follows_move)
        self.after_move()
        self._lengths_moved = tuple(found or lengths(before.items()))
        whole.end()

    @contextmanager
    def without_lookahead(self) -> Iterator[None]:
        """Within the block the parameters hold the iterates, and not the points ahead of them (``lookahead``)."""
        params = [p for group in self.param_groups for p in group["params"] if self.state.get(p, {}).get("lookahead")]
        with swapped((p, iterate(p, self.state[p])) for p in params):
            yield

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += not self.idle
        if self.idle:
            self.begin_states()
        self.after_step()

    # State

    def __getstate__(self) -> dict[str, Any]:
        # A learning rate scheduler stores a wrapper of `step`, bound to this very object, as an attribute.
        own = {key: value for key, value in self.__dict__.items() if not key.startswith("_") and key != "step"}
        fresh: dict[str, Any] = {
            "_prepared": {},
            "_prepared_slopes": None,
            "gradient_norm": math.inf,
            "measured": {},
            "idle": False,
            "process_group": None,
            "_ranks": None,
        }
        now: dict[str, Any] = {"coming": {}, "rows_written": [], "move_factors": {}}
        return {**own, **fresh, **now, "bounds": BoundRecord(), "alike": Alike()}

    def _precision(self) -> AbstractContextManager[None]:
        """In which float32 products are taken; in those that call the closure, the user's."""
        return nullcontext() if self.needs == "closure" else full_float32

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _is_prepared(self) -> bool:
        """Whether :meth:`precondition` wrote these very gradients."""
        if not self._prepared:
            return False
        for p in self.with_gradient():
            grad, version = self._prepared.get(id(p), (None, -1))
            if grad is not p.grad or grad is None or grad._version != version:
                return False
        return True

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
                                      first call on; on shards by methods that learn from layers
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
        if self.bounds.steps:
            out |= {"bound": self.bounds.share, "kl": self.bounds.kl}
        if self._lengths_moved:
            out["step_norm"] = norm(self._lengths_moved)
        if self.judged is not None:
            out |= dict(zip(("predicted_change", "actual_change"), self.judged, strict=True))
        return out | shares(self.cut)
