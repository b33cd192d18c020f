"""Optimizers whose curvature comes from a model's layers."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from curvature import Block, Curvature, CurvatureEstimator
from curvature.estimation.coverage import Coverage, describe_loss, table
from curvature.estimation.passes import Pass
from curvature.estimation.statistics import Statistics
from curvature.estimation.step_collector import StepCollector
from curvature.estimation.tape import Tape
from curvature.losses.loss import check_loss
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped
from curvature.structures.estimator import Form
from curvature.structures.inverse import InverseEstimator
from precond.distributed.checkpoint import unpacked
from precond.distributed.curvature import Refreshing, SharedCurvature
from precond.distributed.ranks import Ranks, check_fraction, group_of, world_rank, world_size
from precond.layerwise.blocks.block_state import (
    add_blocks,
    copied,
    load_block,
    saved_block,
    saved_form,
    split_blocks,
)
from precond.layerwise.blocks.by_name import Preconditioners
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.blocks.rows import GradientRows, RowTaps
from precond.layerwise.groups import as_groups, members
from precond.layerwise.membership import Membership
from precond.layerwise.step_size import QuadraticModel, StepModel
from precond.layerwise.structures import Structures, on_model, plain_row
from precond.step.adapt import LevenbergMarquardt
from precond.step.base import SecondOrderOptimizer
from precond.step.journal import FAILURES, REFRESHES
from precond.step.loading import require_layout
from precond.step.loop import Loop
from precond.step.loss_level import FollowingDamping, LossLevel
from precond.step.options import LossDamping, Momentum, Refresh, TrustRegion, WeightDecay
from precond.step.schedules import Scheduled, ScheduledInt, at_start, value_at
from precond.step.trust_region import BoundRecord, Move, products, reference_lr, vectors
from solvers import Damping, Eigen, FactoredTikhonov, LinearOperator, Solver, Tikhonov
from solvers.outcome.arguments import flag, instance, number


class PreconditionedOptimizer(SecondOrderOptimizer):
    """Any curvature of layers, any damping, any solver, under the plain training loop.

    The loop stays ``optimizer.zero_grad(); loss = loss_fn(model(x), y); loss.backward(); optimizer.step()``. On steps
    that update the curvature the optimizer watches the forward pass and the loss; activations are released when the
    step ends. Nothing the loop computes changes: gradients, buffers and the global random stream are bit-identical.

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls, or one that describes the loss computed elsewhere.
        curvature: What to estimate, such as ``KroneckerFisher("mc")``; or a mapping of layers to structures, with one
            for all others, as ``{"*": KroneckerFisher("mc"), "head": "layer", nn.LayerNorm: None}``
            (:class:`~precond.layerwise.method.LayerwiseMethod` has the rules).
        damping: How to damp, in units of C; a number, or a function of the step count, stands for ``damping_form`` of
            it; :class:`~precond.LossDamping` is a fraction of the loss. The groups hold its strength: what is written
            there, by a schedule or a rule, counts from the next refresh of a block.
        solver: How to invert or root.
        exponent: Power of the damped C; -1 for natural gradients.
        lr: Learning rate.
        curvature_ema: Weight of old statistics in the running average, in [0, 1).
        curvature_update_period: Steps between updates of the statistics; a number, or a function of the step count. A
            parameter that had no gradient when they were due gets its own in one of its next steps.
        inverse_update_period: Steps between decompositions and inverses, of the statistics at hand: a number, a
            function of the step count such as :class:`~precond.Doubling`, or :class:`~precond.Refresh`.
        momentum: Momentum on the preconditioned gradient: its strength, or :class:`~precond.Momentum`.
        weight_decay: Strength of the weight decay, decoupled; or :class:`~precond.WeightDecay`.
        kl_clip: Bound on twice the predicted KL divergence of a step, momentum included: a number, the bound at the
            learning rate to begin with, or a :class:`~precond.TrustRegion`; ``None`` for none. After
            :meth:`precondition` :meth:`step` bounds it all the same; another optimizer's step is its own.
        step_size: Learning rate and momentum from the quadratic model of the batch, in place of ``momentum``; ``lr``
            then multiplies the move, and ``kl_clip``, if given, bounds it in the exact curvature of the batch. See
            :class:`QuadraticModel`.
        damping_rule: Adapts the damping after each step by how much the loss of its batch has fallen, over how much the
            undamped quadratic model had promised, and may take steps back. All groups share the damping.
        params: Parameters, named parameters, names, globs, or parameter groups of these (dicts with ``params``); all
            trainable ones by default. Frozen ones stay where they are until they are unfrozen.
        maximize: Ascend.
        loop: What cannot be seen of the training loop, see :class:`~precond.Loop`.
        process_group: Processes whose gradients the loop averages by hand; those of a model in
            ``DistributedDataParallel`` are found.
        memory_fraction: Share of the processes that keep each block, from 1 over their number (least memory, and a
            message with the directions in each step) to 1 (all have everything).

    Raises:
        ValueError: If an option is out of range or there is nothing to train.
        UnknownLossError: If the loss is of unknown type and the curvature is not empirical.
    """

    needs: ClassVar[str] = "layers"
    sees_loss: ClassVar[bool] = True
    #: What a number stands for as ``damping``.
    damping_form: ClassVar[type[Tikhonov | FactoredTikhonov]] = Tikhonov
    #: Whether there is no inverse without damping.
    needs_damping: ClassVar[bool] = False
    #: Whether refreshes are spread over their period, where the caller says nothing.
    staggers: ClassVar[bool] = False
    loop_settings: ClassVar = frozenset(field.name for field in fields(Loop))
    #: Whether the damping must be in units of C, as where an inverse is learned and no C is kept.
    absolute_damping: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        curvature: Curvature | Structures,
        damping: Damping | LossDamping | Scheduled,
        solver: Solver,
        exponent: float = -1.0,
        lr: float | Tensor,
        curvature_ema: Scheduled = 0.95,
        curvature_update_period: ScheduledInt = 1,
        inverse_update_period: ScheduledInt | Refresh = 1,
        momentum: Scheduled | Momentum = 0.0,
        weight_decay: Scheduled | WeightDecay = 0.0,
        kl_clip: Scheduled | TrustRegion | None = None,
        step_size: QuadraticModel | None = None,
        damping_rule: LevenbergMarquardt | None = None,
        params: Any = None,
        maximize: bool = False,
        loop: Loop = Loop(),
        process_group: ProcessGroup | None = None,
        memory_fraction: float = 1.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} learns from the layers of a model: pass the model itself, not "
                f"{type(model).__name__} (such as model.parameters())."
            )
        instance("damping_rule", damping_rule, LevenbergMarquardt, "a LevenbergMarquardt", optional=True)
        instance("step_size", step_size, QuadraticModel, "a QuadraticModel", optional=True)
        instance("solver", solver, Solver, "a solvers.Solver such as Cholesky()")
        flag("maximize", maximize)
        if damping_rule is not None:
            damping_rule.refuse(type(self).__name__, "attempts")
        if damping_rule is not None and callable(damping) and not isinstance(damping, Damping):
            raise ValueError(
                "damping is both a function of the step count and adapted by damping_rule; give one of them."
            )
        if maximize and (damping_rule is not None or step_size is not None):
            raise ValueError(
                "step_size and damping_rule minimise: maximize=True has no meaning for them. Negate the loss."
            )
        if step_size is not None:
            self._refuse_beside(step_size, momentum, kl_clip)
        damping_unit = "loss" if isinstance(damping, LossDamping) else "curvature"
        if isinstance(damping, LossDamping):
            if step_size is not None or damping_rule is not None or self.absolute_damping:
                damping_unit = "curvature"  # they compare it with the curvature itself
                if "damping" in self.given:
                    raise ValueError(
                        f"{type(self).__name__}: {damping!r} is in units of the loss, but step_size, damping_rule and "
                        "learned inverses need a damping in units of C: give a number."
                    )
            damping = damping.fraction
        self.curvature, self.plain = on_model(curvature, unwrapped(model))
        self.damping = damping if isinstance(damping, Damping) else type(self).damping_form(at_start(damping))
        self.solver, self.exponent = solver, exponent
        refresh = Refresh.of(inverse_update_period)
        self.stagger = self.staggers if refresh.stagger is None else refresh.stagger
        self.burn_in = refresh.burn_in
        for name, absolute in ((type(self).__name__, self.absolute_damping), ("step_size", step_size is not None)):
            if absolute and self.damping.relative:
                raise ValueError(f"{name} needs a damping in units of C, such as Tikhonov(1e-3), not {self.damping!r}.")
        self.step_size, self.damping_rule = step_size, damping_rule
        self.model, self.loss_fn = model, check_loss("loss_fn", loss_fn)
        self.preconditioners = Preconditioners()
        self._statistics: Statistics | None = None
        self._step_model: StepModel | None = None
        self._reported: set[str] = set()
        self._members: Membership | None = None
        self._level: LossLevel | None = None
        self._dampings: dict[tuple[float, str], Damping] = {}  # of the step, by value and unit
        self._burning = False  # the step is one of the burn-in
        self._taps = RowTaps()
        self._shared: SharedCurvature | None = None
        self.memory_fraction = check_fraction(memory_fraction)
        super().__init__(
            as_groups(unwrapped(model), params),
            lr=lr,
            momentum=momentum if step_size is None else 0.0,
            weight_decay=weight_decay,
            kl_clip=kl_clip if step_size is None or "kl_clip" in self.given else None,
            maximize=maximize,
            loop=loop,
            process_group=process_group,
            defaults={
                **({} if step_size is None else {"region": None, "factor_damping": self._factor_damping()}),
                "damping": float(damping.strength) if isinstance(damping, Damping) else damping,
                "damping_unit": damping_unit,
                "curvature_ema": curvature_ema,
                "curvature_update_period": curvature_update_period,
                "inverse_update_period": refresh.period,
            },
        )
        self._connect()

    def _factor_damping(self) -> float | None:
        """Where the damping that the factors have for themselves begins; ``None`` where they have none."""
        apart = self.step_size is not None and self.step_size.factor_period is not None
        return float(self.damping.strength) if apart and isinstance(self.damping, FactoredTikhonov) else None

    def _refuse_beside(self, step_size: QuadraticModel, momentum: Any, kl_clip: Any) -> None:
        """Refuse options that were given and that the quadratic model overrides.

        Raises:
            ValueError: Naming the option, and what to give in its place.
        """
        me = type(self).__name__
        if "momentum" in self.given and momentum != 0:
            raise ValueError(
                f"{me}: momentum={momentum!r} has no effect with step_size=QuadraticModel(), which finds the momentum "
                "of each step itself. Leave it out; QuadraticModel(momentum=False) takes none."
            )
        if "kl_clip" in self.given and kl_clip is not None and step_size.max_kl is not None:
            raise ValueError(f"{me}: kl_clip={kl_clip!r} and {step_size!r} both bound the move; give one of them.")
        if "kl_clip" in self.given and isinstance(kl_clip, TrustRegion) and kl_clip.unit == "loss":
            raise ValueError(
                f"{me}: step_size=QuadraticModel() bounds the move in the curvature of the batch; give kl_clip as a "
                "number, without unit='loss'."
            )
        if isinstance(kl_clip, TrustRegion) and kl_clip.of == "direction":
            raise ValueError(
                f"{me}: step_size=QuadraticModel() has no bound before momentum; give kl_clip as a number."
            )

    def _connect(self) -> None:
        """Track the parameters of the groups, and hook the model."""
        self._members = Membership(unwrapped(self.model), type(self).__name__)
        self.parameters = Parameters(unwrapped(self.model), self._tracked())
        self.tape = Tape(
            self.model,
            self.loss_fn,
            lambda: self.parameters,
            output=self.loop.output,
            mode=self.loop.capture,
            eval_mode=self.loop.eval_mode,
            before_pass=self._follow,
        )
        loop = self.loop
        self._statistics = Statistics(
            self.tape, self.loss_fn, self._collector(), self.curvature, loop.class_dim, loop.batch_dim
        )
        if self.step_size is not None or self.damping_rule is not None:
            guarded = "kl_clip" not in self.given or self.param_groups[0]["kl_clip"] is not None
            self._step_model = StepModel(self, self.step_size, self.damping_rule, guarded)
            self.tape.repeats = True
        self._arm()

    def name_of(self, parameter: Tensor) -> str:
        names = (name for name, p in unwrapped(self.model).named_parameters() if p is parameter)
        return next(names, None) or super().name_of(parameter)

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _tracked(self) -> list[Tensor]:
        """Parameters that get curvature."""
        plain = self._plain()
        return [p for p in self._trainable() if id(p) not in plain]

    def _plain(self) -> dict[int, str]:
        """Parameters that get none, by ``id``, and their names."""
        if not self.plain:
            return {}
        return {id(p): name for name, p in unwrapped(self.model).named_parameters() if name in self.plain}

    def _collector(self) -> StepCollector:
        return StepCollector(self.parameters, self.begin_block, joint=self.curvature.joint, forget=self.drop_block)

    def _follow(self) -> None:
        """Notice parameters that were added, frozen or unfrozen; blocks that stay whole keep their statistics."""
        trainable = self._tracked()
        if not trainable or {id(p) for p in trainable} == {id(p) for p in self.parameters.values()}:
            return
        self._taps.close()
        self.parameters = Parameters(unwrapped(self.model), trainable)
        for name, preconditioner in list(self.preconditioners.items()):
            if not all(part in self.parameters for part in preconditioner.estimator.block.names):
                self.drop_block(name)
        collector = self._collector()
        collector.estimators = self.statistics.collector.estimators
        self.statistics.collector = collector

    def drop_block(self, name: str) -> None:
        """Forget the statistics and the preconditioner of a block."""
        self._taps.close()
        self.preconditioners.pop(name, None)
        self.statistics.collector.estimators.pop(name, None)

    @property
    def statistics(self) -> Statistics:
        """What the passes of the current step have brought."""
        assert self._statistics is not None
        return self._statistics

    def coverage(self) -> Coverage:
        """Which curvature every parameter has, as far as recorded passes used them; see :func:`curvature.coverage`."""
        collector = self.statistics.collector
        rows = table(self.parameters, collector)
        plain = self._plain()
        rows += [plain_row(plain[id(p)], p) for p in self._trainable() if id(p) in plain]
        # By identity, since a wrapper of torch.compile around a layer changes names.
        order = {id(p): index for index, p in enumerate(unwrapped(self.model).parameters())}
        own = {**self.parameters, **{name: p for p in self._trainable() if (name := plain.get(id(p)))}}
        rows.sort(key=lambda row: order.get(id(own[row.parameter]), len(order)))
        return Coverage(tuple(rows), describe_loss(self.loss_fn), True)

    def detach(self) -> None:
        """Remove every hook from model and loss; the optimizer keeps its last inverses."""
        self.statistics.disarm()
        self.tape.close()
        self._taps.close()

    def begin_block(self, block: Block, form: Form) -> CurvatureEstimator:
        """The estimate and the preconditioner of a block that is seen for the first time, or loaded."""
        for name, old in list(self.preconditioners.items()):
            if old.estimator.block.overlaps(block):  # its parameters were in another block before one was (un)frozen
                self.drop_block(name)
        estimator = self.curvature.estimator(block, form)
        self.preconditioners[block.name] = Preconditioner(estimator, self.solver, self.exponent)
        self.preconditioners[block.name].form = form
        return estimator

    def leave(self, name: str) -> None:
        """Leave a block to other processes, but for what every process needs of it."""
        before = self.preconditioners[name]
        cost, shared, known = before.cost, before.estimator.shared(), name in self.statistics.collector.estimators
        estimator = self.begin_block(before.estimator.block, before.form)
        if shared:
            estimator.take_shared(shared)
        after = self.preconditioners[name]
        after.elsewhere, after.unseen, after.failures = cost, before.unseen, before.failures
        if known:
            self.statistics.collector.estimators[name] = estimator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        damping = param_group.get("damping")
        if damping is not None and "damping_unit" not in param_group:  # of a group of its own
            follows = isinstance(damping, LossDamping)
            own = {"damping": damping.fraction if isinstance(damping, LossDamping) else damping}
            param_group = {**param_group, **own, "damping_unit": "loss" if follows else "curvature"}
        with self.transaction():
            super().add_param_group({**param_group, "params": members(unwrapped(self.model), param_group["params"])})
            if self._statistics is not None:
                self._follow()

    # The step

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        ema = options["curvature_ema"]
        number("curvature_ema", ema)
        if not 0 <= ema < 1:
            raise ValueError(f"curvature_ema is the weight of old statistics, in [0, 1); got {ema}.")
        if self.needs_damping and not options["damping"] > 0:
            raise ValueError(
                f"damping must be positive: the matrix that {type(self).__name__} inverts is singular. Got "
                f"{options['damping']}."
            )

    def option(self, name: str) -> Any:
        """The value of an option at the coming step, which all groups must share because blocks may span them.

        Raises:
            ValueError: If they do not.
        """
        values = {
            value_at(name, schedules[name], self.steps) if name in schedules else group[name]
            for group, schedules in zip(self.param_groups, self.schedules, strict=True)
        }
        if len(values) > 1:
            raise ValueError(
                f"{type(self).__name__} needs one {name} for all groups, because blocks may span several; they have "
                f"{sorted(values)}."
            )
        return values.pop()

    def _arm(self) -> None:
        period = self.option("curvature_update_period")
        if self.steps % period == 0 or self._overdue(period):
            rank = world_rank() if self._ranks is None else self._ranks.rank
            words = f"{self.loop.seed},{rank},{self.steps}"
            self.statistics.arm(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))
        else:
            self.statistics.disarm()

    def _keep_time(self, present: Mapping[str, Tensor]) -> None:
        """Count the own steps of parameters that were absent when statistics were due, since they had theirs."""
        for name, p in self.parameters.items():
            late = p in self.state and "waited" in self.state[p]
            if self.statistics.armed and (late or name not in present):
                self.state[p]["waited"] = 0 if name in present else self.state[p].get("waited", 0)
            elif late and name in present:
                self.state[p]["waited"] += 1

    def _overdue(self, period: int) -> bool:
        """Whether a parameter waits for statistics by its own clock: a head, say, that is used in every other step."""
        late = {n: self.state[p]["waited"] for n, p in self.parameters.items() if self.state.get(p, {}).get("waited")}
        if not late:
            return False
        known = {name for p in self.preconditioners.values() for name in p.estimator.block.names}
        return any(waited >= (period if name in known else 1) for name, waited in late.items())

    def on_skip(self) -> None:
        self.preconditioners.discard()
        if self._step_model is not None:
            self._step_model.clear()
        self._arm()

    def after_step(self) -> None:
        self._taps.clear()
        if self._step_model is not None and not self._step_model.undecided:
            self._step_model.clear()
        if self._shared is None:
            self._taps.watch(unwrapped(self.model), self.preconditioners)
        self._arm()

    def mark(self) -> Any:
        if self._statistics is None:
            return None
        collector = self.statistics.collector
        refreshes = any(p.unseen or p.inverse is None for p in self.preconditioners.values())
        changes = self.statistics.armed or self.follows_move or refreshes  # otherwise all estimates stay as they are
        known = [(entries, dict(entries)) for entries in (collector.estimators, collector.operations, collector.forms)]
        return (
            (self.statistics.mark(), collector, collector.plan.mark(), known),
            [(p, p.mark(changes)) for p in self.preconditioners.values()],
            None if self._step_model is None else self._step_model.mark(),
        )

    def back_to(self, mark: Any) -> None:
        if mark is None:
            return
        (statistics, collector, plan, known), blocks, step_model = mark
        self.statistics.back_to(statistics)
        self.statistics.collector = collector
        collector.plan.back_to(plan)
        for entries, before in known:
            entries.clear()
            entries.update(before)
        for preconditioner, before in blocks:
            preconditioner.back_to(before)
        if self._step_model is not None:
            self._step_model.back_to(step_model)

    @property
    def follows_move(self) -> bool:
        return self._step_model is not None and self._step_model.undecided

    def directions_of_all(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return self.directions(gradients)  # which meets the other processes by itself

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        self._follow()
        by_name = {name: gradients[p] for name, p in self.parameters.items() if p in gradients}
        self._look_at_members(by_name)
        given = {p: g for p, g in gradients.items() if p.requires_grad}  # what is frozen stays where it is
        gradients = {self.parameters[name]: g for name, g in by_name.items()}
        rows = self._rows(by_name)
        updated = False
        batches = 0
        if self.statistics.armed:
            batches = self.finish_statistics(by_name)
            updated = self._update_curvature(gradients, batches)
        self._follow_loss()
        if not self.idle:
            self._keep_time(by_name)
        self.idle = self.idle and batches == 0
        self._burning = self.steps < self.burn_in
        if self._burning:
            return {p: torch.zeros_like(g) for p, g in given.items()}
        self._refresh(updated)
        out = self._applied(by_name, rows, given)
        candidates = [] if self._step_model is None else self._step_model.candidates()
        if candidates and self._shared is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: QuadraticModel(factor_period=) compares dampings in one process only. Leave "
                "it out where several train together."
            )
        return self._best(candidates, out, by_name, rows, given) if candidates else out

    def _applied(
        self, gradients: dict[str, Tensor], rows: dict[str, GradientRows], given: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """``P g`` of every parameter."""
        results = {name: torch.empty_like(g, memory_format=torch.contiguous_format) for name, g in gradients.items()}
        for name, rest in self.preconditioners.apply(gradients, rows, results, self._shared).items():
            self._report_plain(name, rest)
        plain = self._plain()
        out = {self.parameters[name]: d for name, d in results.items()}
        return out | {p: g.clone() for p, g in given.items() if id(p) in plain}

    def _look_at_members(self, present: Mapping[str, Tensor]) -> None:
        """Look for layers that have gone or come: where a gradient is missing, and in ever rarer steps."""
        assert self._members is not None
        if len(present) < len(self.parameters):
            self._members.require(self.parameters, self.parameters.keys() - present.keys())
        if self.steps & (self.steps - 1) == 0:
            self._members.tell_untrained(p for group in self.param_groups for p in group["params"])

    def on_empty(self) -> None:
        self._look_at_members({})
        super().on_empty()

    @property
    def ranks(self) -> Ranks | None:
        if self._ranks is None and (self.process_group is not None or self.tape.parallel is not None):
            group = group_of(self.process_group, self.tape.parallel)
            if group is not None:
                self._ranks = Ranks(group, self.parameters.device, self.memory_fraction)
                self._shared = SharedCurvature(self._ranks)
                self._taps.close()
        return self._ranks

    def finish_statistics(self, gradients: dict[str, Tensor]) -> int:
        """Close the statistics of the step; returns the calls of the loss that count, in all processes."""
        if self._shared is not None:
            try:
                return self._shared.finish(self, gradients, self.loss_scale())
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{type(self).__name__} does not run in several processes: {error}"
                ) from error
        if self.memory_fraction != 1:
            raise ValueError(
                f"{type(self).__name__}: memory_fraction={self.memory_fraction} says which of several processes keep a "
                "block, but this one trains alone. Wrap the model in DistributedDataParallel; give process_group= if "
                "gradients are averaged by hand; or leave memory_fraction out."
            )
        self.statistics.finish(gradients, self.loss_scale())
        return self.statistics.batches

    def again(self, passes: list[Pass], scale: Tensor | float) -> bool:
        """Collect from passes of an earlier step, in all processes; whether there was anything in any."""
        if self._shared is None:
            return self.statistics.again(passes, scale)
        self._shared.ranks.together(lambda: (float(self.statistics.again(passes, scale, settles=False)),), 1)
        return self._shared.again(self, scale)

    def _follow_loss(self) -> None:
        """Renew the level of the loss, which is kept in the state of the first parameter, where something needs it."""
        if not any("loss" in (group["kl_unit"], group["damping_unit"]) for group in self.param_groups):
            return
        first = next(p for group in self.param_groups for p in group["params"])  # a group may be empty
        before = self.state[first].get("level")
        self._level = LossLevel.after(before, self.statistics.level, first)
        self.state[first]["level"] = self._level.saved(before)

    def bound_level(self) -> Tensor | None:
        return None if self._level is None else self._level.bound

    def _best(
        self,
        candidates: list[float],
        now: dict[Tensor, Tensor],
        gradients: dict[str, Tensor],
        rows: dict[str, GradientRows],
        given: dict[Tensor, Tensor],
    ) -> dict[Tensor, Tensor]:
        """The directions, among some dampings of the factors, of which the quadratic model promises most."""
        assert self._step_model is not None
        found: list[tuple[float, float, dict[Tensor, Tensor], dict[str, Any]]] = []
        for strength in candidates:
            for group in self.param_groups:
                group["factor_damping"] = strength
            if found:  # the first one is the present
                for preconditioner in self.preconditioners.values():
                    preconditioner.refresh(self._damping(preconditioner.estimator.block), basis=True)
                now = self._applied(gradients, rows, given)
            inverses = {name: p.inverse for name, p in self.preconditioners.items()}
            promise = self._step_model.promise(now, {p: given[p] for p in now})
            found.append((promise if math.isfinite(promise) else math.inf, strength, now, inverses))
        _, strength, best, inverses = min(found, key=lambda entry: entry[0])
        for group in self.param_groups:
            group["factor_damping"] = strength
        for name, preconditioner in self.preconditioners.items():
            preconditioner.inverse = inverses[name]
        return best

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if self._step_model is None or closure is None:
            return super()._evaluate(closure)
        return self._step_model.evaluated(closure)

    def _bound(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], prepared: bool) -> Move | None:
        sized = self._step_model is not None and directions and not prepared and not self._burning
        if self._step_model is None or not sized:
            return super()._bound(directions, gradients, prepared)
        move = None if self.step_size is not None else super()._bound(directions, gradients, prepared)
        directions.update(self._step_model.size(directions, gradients))
        return move or self._step_model.bounded

    def after_move(self) -> None:
        if self._step_model is not None:
            self._step_model.judge()
            self._step_model.clear()

    @property
    def coefficients(self) -> Tensor | None:
        """Learning rate and momentum that ``step_size`` chose for the last step, ``(1,)`` or ``(2,)``."""
        return None if self._step_model is None else self._step_model.coefficients

    @property
    def taken_back(self) -> bool:
        """Whether the last step was taken back, by ``damping_rule`` or ``step_size``."""
        return self._step_model is not None and self._step_model.taken_back

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of C in the units of the damping's strength; 0 where no estimate of C is kept."""
        if self.damping.relative:
            return 1.0
        known = [p.estimator for p in self.preconditioners.values() if p.estimator.ready]
        kept = [e.operator() for e in known if not isinstance(e, InverseEstimator)]
        trace, size = float(sum(op.trace() for op in kept)), float(sum(op.shape[0] for op in kept))
        if self._shared is not None:
            trace, size = self._shared.row_sum(torch.tensor([trace, size], dtype=torch.float64)).tolist()
        return trace / size if size else 0.0

    def over_ranks(self, value: Tensor) -> Tensor:
        """The mean of numbers over the processes that take the step together; the same bits in all."""
        return value if self.ranks is None else self.ranks.mean(value)

    def set_damping(self, damping: float) -> None:
        """Give all groups the same damping; it counts from the next refresh of each block."""
        for group in self.param_groups:
            group["damping"] = damping
        for preconditioner in self.preconditioners.values():
            preconditioner.unseen += 1

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        # During burn-in nothing moves, not even by weight decay.
        return {**group, "weight_decay": 0.0} if self._burning else group

    def loss_scale(self) -> Tensor | float:
        """What a GradScaler multiplied the loss by."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and getattr(self, "found_inf", None) is not None:  # the gradients were unscaled before
            return scale_in_use()
        return 1.0 if scale is None else scale

    def _rows(self, gradients: dict[str, Tensor]) -> dict[str, GradientRows]:
        if getattr(self, "grad_scale", None) is not None or world_size() > 1:
            return {}  # gradients that were scaled or summed over processes after the rows were seen
        return self._taps.rows(gradients, self.preconditioners)

    def _report_plain(self, name: str, gradient: Tensor) -> None:
        """Say once that a gradient has no curvature and goes through as it is."""
        if name not in self._reported and bool(gradient.any()):
            self._reported.add(name)
            warnings.warn(
                f"{type(self).__name__}: {name} has a gradient but no curvature yet, because no recorded forward pass "
                "used it. It is trained with its plain gradient until one does.",
                UserWarning,
                stacklevel=5,
            )

    def _update_curvature(self, gradients: dict[Tensor, Tensor], batches: int) -> bool:
        """Fold the statistics of the step into the averages, if there are any."""
        if batches == 0:
            self._explain_missing(gradients)
            return False
        if self._shared is not None:
            bad = self._shared.commit(self, self.preconditioners, self.option("curvature_ema"))
        else:
            self._warn_of_others()
            bad = self.preconditioners.commit(self.option("curvature_ema"))
        if bad:
            warnings.warn(
                f"{type(self).__name__}: the statistics of {', '.join(bad[:3])} hold NaN or inf although the gradients "
                "do not; this step leaves the curvature as it is.",
                RuntimeWarning,
                stacklevel=5,
            )
        return not bad

    def _warn_of_others(self) -> None:
        if world_size() > 1 and self.process_group is None and "processes" not in self._reported:
            self._reported.add("processes")
            warnings.warn(
                f"{type(self).__name__} runs in one of {world_size()} processes, with the curvature of its own data "
                "alone: unless all see the same data, their parameters drift apart. Wrap the model in "
                "DistributedDataParallel, or say with process_group= who averages gradients by hand; a group of this "
                "process alone says that it trains a model of its own.",
                UserWarning,
                stacklevel=6,
            )

    def _refresh(self, updated: bool) -> None:
        """Renew the inverses that are due, and after new statistics those that come at no cost."""
        period = self.option("inverse_update_period")
        slot = self.preconditioners.slots(period) if self.stagger else {}
        bounded = any(group["kl_clip"] is not None for group in self.param_groups)
        self._measured, self._dampings = {}, {}
        tasks: list[Refreshing] = []
        for name, preconditioner in self.preconditioners.items():
            due = preconditioner.unseen > 0 and (self.steps - slot.get(name, 0)) % period == 0
            due = due or preconditioner.absent
            damped = None
            if due or updated:
                before, failures = preconditioner.inverse, preconditioner.failures
                options: dict[str, Any] = {
                    "damping": self._damping(preconditioner.estimator.block),
                    "basis": due,
                    "applications": max(period, self.option("curvature_update_period")),
                }
                if self._shared is not None:
                    tasks.append(Refreshing(name, preconditioner, due, partial(preconditioner.attempt, **options)))
                    continue
                damped = preconditioner.refresh(rows=self._taps.count(name), **options)
                self.events[FAILURES] += preconditioner.failures > failures
                self.events[REFRESHES] += due and preconditioner.inverse is not before
            if bounded and self._shared is None:
                self._measure(preconditioner, damped, damped is not None)
        if self._shared is not None:
            failed = {task.name: task.kept.failures for task in tasks}
            new = self._shared.refresh(tasks)
            self.events[FAILURES] += sum(task.kept.failures > failed[task.name] for task in tasks)
            self.events[REFRESHES] += sum(task.basis and task.name in new for task in tasks)
            if bounded:
                for name in sorted(self.preconditioners):  # each process has them in an order of its own
                    self._measure(self.preconditioners[name], None, name in new)
                self._measured = self._shared.added(self._measured)
        if bounded:
            self._measure_plain()

    def _measure(self, preconditioner: Preconditioner, damped: LinearOperator | None, renewed: bool) -> None:
        r"""Measure the momentum of a block, :math:`v^\top M v`, where its metric M is new or it was never measured.

        A block counts as a whole, for the first of its parameters with the largest rate; where several processes share
        the blocks, in the one that keeps it.
        """
        block = preconditioner.estimator.block
        states = {name: self.state[p] for name in block.names if (p := self.parameters[name]) in self.state}
        momenta = {name: s["momentum_buffer"] for name, s in states.items() if "momentum_buffer" in s}
        if not momenta or not (renewed or any("length" not in states[name] for name in momenta)):
            return
        if preconditioner.absent or not preconditioner.keeps_curvature:
            return  # measured with the plain gradients, or carried on from the step before
        names = list(momenta)
        if len(self.param_groups) > 1:
            rate = {p: reference_lr(group) for group in self.param_groups for p in group["params"]}
            names.sort(key=lambda name: -rate[self.parameters[name]])
        if self._shared is None or self._shared.counts(block.name):
            damped = damped or preconditioner.damped(self._damping(block))
            assert damped is not None
            v = {n: momenta.get(n, self.parameters[n].new_zeros(()).expand_as(self.parameters[n])) for n in block.names}
            x = block.read(v).to(damped.dtype)
            if isinstance(damped, Eigen):  # half the products
                x = damped.basis.adjoint() @ x
                image = damped.values * x
            else:
                image = damped @ x
            length = products(vectors([image], True), vectors([x], True))[0]
        else:
            length = torch.zeros((), dtype=torch.float64, device=self.parameters[names[0]].device)
        rest = torch.zeros_like(length)
        self._measured |= {self.parameters[name]: rest if i else length for i, name in enumerate(names)}

    def _measure_plain(self) -> None:
        """Measure momenta of parameters whose gradients go through as they are, where that was never done."""
        known = {p: self.state[p] for p in self.parameters.values() if p in self.state}
        wanted = {p for p, state in known.items() if "momentum_buffer" in state and "length" not in state}
        for preconditioner in self.preconditioners.values() if wanted else ():
            if not preconditioner.absent:
                wanted -= {self.parameters[name] for name in preconditioner.estimator.block.names}
        for p in wanted:
            v = vectors([known[p]["momentum_buffer"]], True)
            self._measured[p] = products(v, v)[0]

    def _damping(self, block: Block) -> Damping:
        pairs = {_damping_of(group) for group in self.param_groups}
        if len(pairs) > 1:
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            pairs = {_damping_of(group_of[self.parameters[name]]) for name in block.names}
        if len(pairs) > 1:
            values = {value for value, _ in pairs}
            raise ValueError(
                f"the parameters of block {block.name} are in groups with different damping {sorted(values)}, but are "
                "inverted together. Use one damping for them, or bias='separate'."
            )
        pair = pairs.pop()
        if pair not in self._dampings:
            self._dampings[pair] = self._damping_now(*pair)
        return self._dampings[pair]

    def _damping_now(self, value: float, unit: str) -> Damping:
        if unit == "loss" and self._level is not None:
            return FollowingDamping(self.damping.with_strength(value * self._level.mean.to(self.parameters.device)))
        return self.damping if value == float(self.damping.strength) else self.damping.with_strength(value)

    def _still(self) -> bool:
        """Whether nothing can move; torch.distributed.checkpoint takes such a step to create the state."""
        return all(float(group["lr"]) == 0 for group in self.param_groups)

    def _explain_missing(self, gradients: dict[Tensor, Tensor]) -> None:
        """A refresh without statistics: harmless if nothing can move, else an error that says why."""
        if self._still() or not gradients:
            return
        training = unwrapped(self.model).training
        raise RuntimeError(
            f"{type(self).__name__}.step(): no forward pass was captured since the last step, so the curvature cannot "
            "be updated. Check that (a) the loop calls the model given to the optimizer, "
            + (
                ""
                if training
                else "in train mode (it is in eval mode now: call model.train(), or pass loop=Loop(eval_mode=True)), "
            )
            + "with gradients enabled; (b) it calls the loss module given to the optimizer, or backward() reaches the "
            "model's output; (c) step() is called once per backward(). loop=Loop(capture='shadow') repeats the forward "
            "pass instead of watching it."
        )

    # State

    def complete(self, saved: dict[str, Any]) -> None:
        """Add the blocks' states under their first parameter.

        With ``memory_fraction`` below 1 all processes call it together, and all get the state of all blocks.
        """
        index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        first = {name: index[id(p)] for name, p in self.parameters.items()}
        states = None if self._shared is None else self._shared.states(self.preconditioners)
        add_blocks(saved, self.preconditioners, first, (), states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; factors keep their dtype whatever the parameters' is.

        Raises:
            ValueError: If blocks are not those of the model and the method, or hold NaN; nothing has changed then.
        """
        require_layout(state_dict, type(self).__name__)
        plain, blocks = split_blocks(unpacked(state_dict, type(self).__name__))
        with self.transaction():
            super().load_state_dict(plain)
            estimators = self.statistics.collector.estimators
            estimators.clear()
            self.preconditioners.clear()
            for name, saved in copied(blocks, self.parameters.device).items():
                whose = f"{type(self).__name__}: the saved state of block {name}"
                block = saved_block(name, saved, self.parameters, whose)
                estimators[name] = self.begin_block(block, saved_form(saved))
                load_block(self.preconditioners[name], saved, whose)
            self.after_load()
        self._taps.close()
        if self._shared is None:
            self._taps.watch(unwrapped(self.model), self.preconditioners)
        self._arm()

    def after_load(self) -> None:
        """The blocks were restored."""

    def __getstate__(self) -> dict[str, Any]:
        if any(p.elsewhere is not None for p in self.preconditioners.values()):
            raise NotImplementedError(
                f"a copy or a pickle of {type(self).__name__} would lack the blocks that other processes keep. Make "
                "the optimizer again and load its state_dict(), which has all of them."
            )
        own = {
            **self.__dict__,
            "_statistics": None,
            "tape": None,
            "_step_model": None,
            "_prepared": {},
            "_prepared_slopes": None,
            "_measured": {},
            "_level": None,
            "_dampings": {},
            "_bounds": BoundRecord(),
            "_taps": RowTaps(),
            "_members": None,
            "_shared": None,
            "_ranks": None,
            "process_group": None,
        }
        own.pop("step", None)  # a learning rate scheduler's wrapper, bound to this very object
        return own

    def __setstate__(self, saved: dict[str, Any]) -> None:
        if "model" not in saved:  # the base class restores groups and state in this way
            super().__setstate__(saved)
            return
        self.__dict__.update(saved)
        estimators = {name: p.estimator for name, p in self.preconditioners.items()}
        self._connect()
        self.statistics.collector.estimators = estimators
        self._taps.watch(unwrapped(self.model), self.preconditioners)


def _damping_of(group: Mapping[str, Any]) -> tuple[float, str]:
    """The damping of a group's factors, and its unit."""
    own = group.get("factor_damping")
    return (group["damping"] if own is None else own), group["damping_unit"]


def scale_in_use() -> Tensor | float:
    """The scale of the GradScaler whose ``step()`` is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler.get_scale()
        frame = frame.f_back
    return 1.0
