"""Optimizers that learn the curvature of a model's layers, from what they see of the training loop."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from curvature import Block, Curvature, CurvatureEstimator
from curvature.estimation.coverage import Coverage, describe_loss, table
from curvature.estimation.passes import Pass
from curvature.estimation.statistics import Statistics
from curvature.estimation.step_collector import StepCollector
from curvature.estimation.tape import Tape
from curvature.model.fully_sharded import named_parameters
from curvature.model.graph_nodes import only_moves
from curvature.model.parameters import Parameters, SeenParameters
from curvature.model.synchronized import refuse_synchronized, world_size
from curvature.model.wrappers import unwrapped
from curvature.structures.estimator import Form
from precond.distributed.curvature import SharedCurvature
from precond.distributed.ranks import Ranks, group_of, world_rank
from precond.layerwise.blocks.by_name import Preconditioners
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.layerwise.blocks.rows import RowTaps
from precond.layerwise.groups import members
from precond.layerwise.membership import Membership
from precond.layerwise.outside_of_curvature import WORDS
from precond.layerwise.structures import plain_row
from precond.layerwise.without_curvature import WithoutCurvature
from precond.step.grad_scaler import scale_in_use
from precond.step.options import LossDamping
from precond.step.schedules import value_at
from solvers import Solver


class LayerOptimizer(WithoutCurvature):
    """An optimizer that watches a model, and estimates the curvature of its blocks.

    Which parameters have curvature, in which blocks, when statistics are due, and what they bring in one process or in
    several. What is done with the curvature is said by :class:`~precond.PreconditionedOptimizer`.
    """

    needs: ClassVar[str] = "layers"

    loss_fn: Any
    curvature: Curvature
    solver: Solver
    exponent: float
    parameters: Parameters
    tape: Tape
    #: The blocks.
    preconditioners: Preconditioners
    #: Layers whose gradients are at hand as products of few rows.
    taps: RowTaps
    #: What several processes do together; ``None`` for one.
    shared: SharedCurvature | None
    memory_fraction: float
    _statistics: Statistics | None
    _members: Membership | None
    _reported: set[str]
    detached: bool = False  # for good, copies included

    def watch(self) -> None:
        """Track the parameters of the groups, and hook the model."""
        refuse_synchronized(unwrapped(self.model), type(self).__name__)
        self._members = Membership(unwrapped(self.model), type(self).__name__)
        self.find_plain()
        self.parameters = Parameters(unwrapped(self.model), self.tracked() or self.trainable())
        self.tape = Tape(
            self.model,
            self.loss_fn,
            lambda: self.parameters,
            output=self.loop.output,
            mode=self.loop.capture,
            eval_mode=self.loop.eval_mode,
            before_pass=self.follow,
        )
        loop = self.loop
        self._statistics = Statistics(
            self.tape, self.loss_fn, self.collector(), self.curvature, loop.class_dim, loop.batch_dim
        )

    def name_of(self, parameter: Tensor) -> str:
        names = (name for name, p in named_parameters(unwrapped(self.model)) if p is parameter)
        return next(names, None) or super().name_of(parameter)

    @property
    def seen_parameters(self) -> Parameters:
        """The tracked parameters by the tensors that passes use in their place: whole ones under ``fully_shard``."""
        shards = self.tape.shards
        return self.parameters if shards is None else SeenParameters(self.parameters, shards.whole)

    def collector(self) -> StepCollector:
        """What hands the samples of a pass to the blocks."""
        return StepCollector(self.seen_parameters, self.begin_block, joint=self.curvature.joint, forget=self.drop_block)

    def follow(self) -> None:
        """Notice parameters that were added, frozen or unfrozen; blocks that stay whole keep their statistics.

        Raises:
            NotImplementedError: If a layer sends messages in the pass that is to be watched.
        """
        if self._statistics is not None and self.statistics.armed:
            refuse_synchronized(unwrapped(self.model), type(self).__name__)
        trainable = self.tracked()
        if not trainable or {id(p) for p in trainable} == {id(p) for p in self.parameters.values()}:
            return
        self.taps.close()
        self.parameters = Parameters(unwrapped(self.model), trainable)
        self.drop_absent()
        collector = self.collector()
        collector.estimators = self.statistics.collector.estimators
        self.statistics.collector = collector

    def drop_absent(self) -> None:
        """Forget blocks with parameters that are not tracked."""
        for name, preconditioner in list(self.preconditioners.items()):
            if not all(part in self.parameters for part in preconditioner.estimator.block.names):
                self.drop_block(name)

    def drop_block(self, name: str) -> None:
        """Forget the statistics and the preconditioner of a block."""
        self.taps.close()
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
        plain = self.without_curvature()
        rows += [plain_row(plain[id(p)], p, self.plain[plain[id(p)]]) for p in self.trainable() if id(p) in plain]
        # By identity, since a wrapper of torch.compile around a layer changes names.
        order = {id(p): index for index, p in enumerate(unwrapped(self.model).parameters())}
        own = {**self.parameters, **{name: p for p in self.trainable() if (name := plain.get(id(p)))}}
        rows.sort(key=lambda row: order.get(id(own[row.parameter]), len(order)))
        return Coverage(tuple(rows), describe_loss(self.loss_fn), True)

    def detach(self) -> None:
        """Remove every hook from model and loss for good; steps go on with the last inverses."""
        self.detached = True
        self.statistics.disarm()
        self.tape.close()
        self.taps.close()

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
        param_group = self.group_of(param_group)
        damping = param_group.get("damping")
        if damping is not None and "damping_unit" not in param_group:  # of a group of its own
            follows = isinstance(damping, LossDamping)
            own = {"damping": damping.fraction if isinstance(damping, LossDamping) else damping}
            param_group = {**param_group, **own, "damping_unit": "loss" if follows else "curvature"}
        with self.transaction():
            super().add_param_group({**param_group, "params": members(unwrapped(self.model), param_group["params"])})
            if self._statistics is not None:
                self.find_plain()
                self.follow()
                new = {id(p) for p in self.param_groups[-1]["params"]}
                for p in self.parameters.values():
                    if id(p) in new:  # by their own clock: without curvature until a step brings it
                        self.state[p]["waited"] = self.option("curvature_update_period")
                self.arm()

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

    def arm(self) -> None:
        """Watch the coming step, if its statistics are due and :meth:`detach` was not called."""
        period = self.option("curvature_update_period")
        needed = any(p not in self.adam_steps for p in self.parameters.values())
        if needed and self.tape.handles and (self.steps % period == 0 or self._overdue(period)):
            rank = world_rank() if self._ranks is None else self._ranks.rank
            words = f"{self.loop.seed},{rank},{self.steps}"
            self.statistics.arm(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))
        else:
            self.statistics.disarm()

    def keep_time(self, present: Mapping[str, Tensor]) -> None:
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
        self.arm()

    def after_step(self) -> None:
        self.taps.clear()
        if self.shared is None:
            self.taps.watch(self.tape, self.preconditioners)
        self.arm()

    def mark(self) -> Any:
        if self._statistics is None:
            return None
        collector = self.statistics.collector
        changes = self.statistics.armed or self.follows_move  # otherwise estimates change by refreshes alone
        known = [(entries, dict(entries)) for entries in (collector.estimators, collector.operations, collector.forms)]
        return (
            (self.statistics.mark(), collector, collector.plan.mark(), known),
            [(p, p.mark(changes or p.changes_estimate)) for p in self.preconditioners.values()],
        )

    def back_to(self, mark: Any) -> None:
        if mark is None:
            return
        (statistics, collector, plan, known), blocks = mark
        self.statistics.back_to(statistics)
        self.statistics.collector = collector
        collector.plan.back_to(plan)
        for entries, before in known:
            entries.clear()
            entries.update(before)
        for preconditioner, before in blocks:
            preconditioner.back_to(before)

    def look_at_members(self, present: Mapping[str, Tensor]) -> None:
        """Look for layers that have gone or come: where a gradient is missing, and in ever rarer steps."""
        assert self._members is not None
        if len(present) < len(self.parameters) + len(self.adam_steps):
            members = {**self.parameters, **self.beside()}
            self._members.require(members, members.keys() - present.keys())
        if self.steps & (self.steps - 1) == 0:
            self._members.tell_untrained(p for group in self.param_groups for p in group["params"])

    def on_empty(self) -> None:
        self.look_at_members({})
        super().on_empty()

    @property
    def ranks(self) -> Ranks | None:
        if self._ranks is None and (self.process_group is not None or self.tape.parallel is not None):
            group = group_of(self.process_group, self.tape.parallel)
            if group is not None:
                refuse_synchronized(unwrapped(self.model), type(self).__name__)
                self._ranks = Ranks(group, self.parameters.device, self.memory_fraction)
                self.shared = SharedCurvature(self._ranks)
                self.taps.close()
        return self._ranks

    def finish_statistics(self, gradients: dict[str, Tensor]) -> int:
        """Close the statistics of the step; returns the calls of the loss that count, in all processes."""
        if self.shared is not None:
            try:
                return self.shared.finish(self, gradients, self.loss_scale())
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
        if self.shared is None:
            return self.statistics.again(passes, scale)
        self.shared.ranks.together(lambda: (float(self.statistics.again(passes, scale, settles=False)),), 1)
        return self.shared.again(self, scale)

    def loss_scale(self) -> Tensor | float:
        """What the loss was multiplied by, and the gradients that stand were not: by a GradScaler, say."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and getattr(self, "found_inf", None) is not None:  # the gradients were unscaled before
            return scale_in_use()
        if scale is None and self.shared is None and self.tape.parallel is None:
            return self.tape.divided_by()  # by hand, or unscaled before a plain step
        return 1.0 if scale is None else scale

    def report_plain(self, name: str, gradient: Tensor) -> None:
        """Say once that a gradient has no curvature and goes through as it is."""
        if name not in self._reported and name not in self.beside() and bool(gradient.any()):
            self._reported.add(name)
            warnings.warn(
                f"{type(self).__name__}: {name} has a gradient but no curvature yet, because no recorded forward pass "
                "used it (calls of the model are recorded, of its parts alone none). It is trained with its plain "
                "gradient until one does.",
                UserWarning,
                stacklevel=5,
            )

    def update_curvature(self, gradients: dict[Tensor, Tensor], batches: int) -> bool:
        """Fold the statistics of the step into the averages, if there are any."""
        if batches == 0:
            self._explain_missing(gradients)
            return False
        self._warn_of_the_loop()
        if self.shared is not None:
            bad = self.shared.commit(self, self.preconditioners, self.option("curvature_ema"))
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

    def _warn_of_the_loop(self) -> None:
        """Say once what the loop does that the curvature has no part of."""
        tape = self.tape
        outside = (c for c in tape.outside if c.weight is not None and isinstance(c.output, Tensor))
        away = tape.passes and (
            tape.elsewhere or tape.aside or any(not only_moves(c.output.grad_fn) for c in outside)  # not of weights
        )
        found = {
            "outside": away,
            "left out": tape.left_out,
            "by hand": tape.by_hand and self.shared is None,  # which averages gradients
            "in parts": tape.in_parts,
        }
        for what in (what for what, seen in found.items() if seen):
            self._warn_once(what, f"{type(self).__name__}: {WORDS[what]}")

    def _warn_of_others(self) -> None:
        if world_size() > 1 and self.process_group is None:
            self._warn_once(
                "processes",
                f"{type(self).__name__} runs in one of {world_size()} processes, with the curvature of its own data "
                "alone: unless all see the same data, their parameters drift apart. Wrap the model in "
                "DistributedDataParallel, or say with process_group= who averages gradients by hand; a group of this "
                "process alone says that it trains a model of its own.",
            )

    def _warn_once(self, what: str, words: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            warnings.warn(words, UserWarning, stacklevel=7)

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
            "model's output (of several tensors, say which: loop=Loop(output=lambda result: result[0])); (c) step() is "
            "called once per backward(), for which torch.autograd.grad stands where all that it returns is written to "
            "p.grad as it is, or added to it. "
            "loop=Loop(capture='shadow') repeats the forward pass instead of watching it."
        )
