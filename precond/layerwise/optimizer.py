"""Optimizers whose curvature comes from a model's layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from curvature import Curvature
from curvature.estimation.statistics import Statistics
from curvature.losses.loss import check_loss
from curvature.model.fully_sharded import FullyShard
from curvature.model.synchronized import world_size
from curvature.model.wrappers import unwrapped
from precond.distributed.checkpoint import unpacked
from precond.distributed.curvature import SharedCurvature
from precond.distributed.exchange import cut_as
from precond.distributed.mesh_ranks import mesh_ranks, refuse_on_shards
from precond.distributed.ranks import check_fraction
from precond.layerwise.blocks.block_state import (
    add_blocks,
    copied,
    load_block,
    saved_block,
    saved_form,
    split_blocks,
)
from precond.layerwise.blocks.by_name import Preconditioners
from precond.layerwise.blocks.by_owner import directions_by_owners
from precond.layerwise.blocks.rows import GradientRows, RowTaps
from precond.layerwise.blocks.stacks import BlockStacks
from precond.layerwise.groups import as_groups
from precond.layerwise.membership import Membership
from precond.layerwise.quadratic_model import QuadraticModel, refuse_unjudged
from precond.layerwise.refreshing_optimizer import RefreshingOptimizer
from precond.layerwise.step_size import StepModel
from precond.layerwise.structures import Structures, on_model
from precond.step.adapt import LevenbergMarquardt
from precond.step.adaptive_rate import AdaptiveRate, is_adaptive, refuse_unfollowed
from precond.step.alike import Alike
from precond.step.loading import require_layout
from precond.step.loop import Loop
from precond.step.options import LossDamping, Momentum, Refresh, TrustRegion, WeightDecay, in_groups
from precond.step.schedules import Scheduled, ScheduledInt, at_start
from precond.step.trust_region import BoundRecord, Move, Slopes, scaled
from solvers import Damping, FactoredTikhonov, Solver, Tikhonov
from solvers.outcome.arguments import flag, instance, number


class PreconditionedOptimizer(RefreshingOptimizer):
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
        adaptive_rate: A rate for each parameter that finds itself, from ``lr`` upwards, by the slope along its
            momentum: :class:`~precond.AdaptiveRate`; ``None`` for ``lr``. The reference of ``kl_clip`` goes with it.
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
            ``DistributedDataParallel`` or under ``fully_shard`` are found.
        memory_fraction: Share of the processes that keep each block, from 1 over their number (least memory, and a
            message with the directions in each step) to 1 (all have everything). Under ``fully_shard`` the owner of a
            parameter keeps its blocks.

    Raises:
        ValueError: If an option is out of range or there is nothing to train.
        UnknownLossError: If the loss is of unknown type and the curvature is not empirical.
        NotImplementedError: If the model is under ``fully_shard`` and an option needs whole parameters.
    """

    sees_loss: ClassVar[bool] = True
    #: What a number stands for as ``damping``.
    damping_form: ClassVar[type[Tikhonov | FactoredTikhonov]] = Tikhonov
    #: Whether there is no inverse without damping.
    needs_damping: ClassVar[bool] = False
    loop_settings: ClassVar = frozenset(field.name for field in fields(Loop))
    #: Whether the curvature is that of the rows of one batch, which do not add up over processes.
    keeps_rows: ClassVar[bool] = False
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
        adaptive_rate: AdaptiveRate | None = None,
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
        if step_size is not None or damping_rule is not None:
            refuse_unjudged(type(self).__name__, step_size, damping_rule, damping, maximize)
        if step_size is not None:
            step_size.refuse_beside(type(self).__name__, self.given, momentum, kl_clip)
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
        judged = step_size is not None or damping_rule is not None  # by a quadratic model of whole steps
        self.curvature, self.plain = on_model(curvature, unwrapped(model), None if judged else self.table_step)
        if judged and any(self.plain.values()):
            raise ValueError(
                f"{type(self).__name__}: step_size and damping_rule judge steps by their quadratic model, to which an "
                "AdamStep in structures= does not belong; leave it out."
            )
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
        self.loss_level = None
        self._burning = False  # the step is one of the burn-in
        self.taps = RowTaps()
        self._stacks = BlockStacks()
        self.shared: SharedCurvature | None = None
        self.memory_fraction = check_fraction(memory_fraction)
        self.takes_shards = FullyShard.of(unwrapped(model)) is not None
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
                **({} if step_size is None else self._of_the_model()),
                "damping": float(damping.strength) if isinstance(damping, Damping) else damping,
                "damping_unit": damping_unit,
                **({} if adaptive_rate is None else in_groups({"adaptive_rate": adaptive_rate})),
                "curvature_ema": curvature_ema,
                "curvature_update_period": curvature_update_period,
                "inverse_update_period": refresh.period,
            },
        )
        self.settle_tables()
        self._connect()

    def _of_the_model(self) -> dict[str, float | None]:
        """Options of the groups in which the quadratic model keeps its state."""
        return {"region": None, "promised": None, "kept": None, "factor_damping": self._factor_damping()}

    def _factor_damping(self) -> float | None:
        """Where the damping that the factors have for themselves begins; ``None`` where they have none."""
        apart = self.step_size is not None and self.step_size.factor_period is not None
        return float(self.damping.strength) if apart and isinstance(self.damping, FactoredTikhonov) else None

    def _connect(self) -> None:
        """Hook the model, and prepare for the first step."""
        self.watch()
        if self.step_size is not None or self.damping_rule is not None:
            guarded = "kl_clip" not in self.given or self.param_groups[0]["kl_clip"] is not None
            self._step_model = StepModel(self, self.step_size, self.damping_rule, guarded)
            self.tape.repeats = True
        if self.tape.shards is not None:
            refuse_on_shards(type(self).__name__, self.unserved_on_shards(), keeps_rows=self.keeps_rows)
            self._ranks = mesh_ranks(self.parameters, self.tape.shards, type(self).__name__)
            self.shared = SharedCurvature(self._ranks, whole=True)
        self.arm()

    def unserved_on_shards(self) -> list[str]:
        """Options that need whole parameters in every process, and are refused where ``fully_shard`` cuts them."""
        wanted = {
            "process_group= (the mesh says who belongs together)": self.process_group,
            "memory_fraction= (the owner of a parameter keeps its blocks)": "memory_fraction" in self.given,
            "Loop(capture='shadow')": self.loop.capture == "shadow",
        }
        return [name for name, value in wanted.items() if value]

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with self.transaction():
            super().add_param_group(param_group)
            scheduled = "momentum" in self.schedules[-1]
            refuse_unfollowed(type(self).__name__, self.param_groups[-1], scheduled, self.step_size is not None)

    def on_skip(self) -> None:
        if self._step_model is not None:
            self._step_model.clear()
        super().on_skip()

    def after_step(self) -> None:
        if self._step_model is not None and not self._step_model.undecided:
            self._step_model.clear()
        super().after_step()

    def mark(self) -> Any:
        return super().mark(), None if self._step_model is None else self._step_model.mark()

    def back_to(self, mark: Any) -> None:
        learned, step_model = mark
        super().back_to(learned)
        if self._step_model is not None:
            self._step_model.back_to(step_model)

    @property
    def follows_move(self) -> bool:
        return self._step_model is not None and self._step_model.undecided

    def directions_of_all(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return self.directions(gradients)  # which meets the other processes by itself

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        self.follow()
        by_name = {name: gradients[p] for name, p in self.parameters.items() if p in gradients}
        self.look_at_members({**by_name, **{name: p for name, p in self.beside().items() if p in gradients}})
        given = {p: g for p, g in gradients.items() if p.requires_grad}  # what is frozen stays where it is
        gradients = {self.parameters[name]: g for name, g in by_name.items()}
        rows = self._rows(by_name)
        updated = False
        batches = 0
        if self.statistics.armed:
            batches = self.finish_statistics(by_name)
            updated = self.update_curvature(gradients, batches)
        self.follow_loss()
        if not self.idle:
            self.keep_time(by_name)
        self.idle = self.idle and batches == 0
        self._burning = self.steps < self.burn_in
        if self._burning:
            return {p: torch.zeros_like(g) for p, g in given.items()}
        self.refresh_inverses(updated)
        out = self._applied(by_name, rows, given) | self.by_adam(given)
        candidates = [] if self._step_model is None else self._step_model.candidates()
        if not candidates:
            return out
        assert self._step_model is not None
        promise, applied = self._step_model.promise, partial(self._applied, by_name, rows, given)
        return self.best_of(candidates, out, applied, lambda d: promise(d, {p: given[p] for p in d}))

    def _applied(
        self, gradients: dict[str, Tensor], rows: dict[str, GradientRows], given: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """``P g`` of every parameter."""
        if self.shared is not None and self.shared.whole:
            tell = self.report_plain
            return directions_by_owners(self.shared, self.preconditioners, self.parameters, gradients, given, tell)
        stacks = self._stacks.of(self.preconditioners, self.parameters) if self.shared is None else []
        results, unchanged = self.preconditioners.apply(gradients, rows, stacks, self.shared)
        for name, rest in unchanged.items():
            self.report_plain(name, rest)
        plain = self.without_curvature()
        out = {self.parameters[name]: d for name, d in results.items()}
        return out | {p: g.clone() for p, g in given.items() if id(p) in plain}

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if self._step_model is None or closure is None:
            return super()._evaluate(closure)
        return self._step_model.evaluated(closure)

    def shortened(
        self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], known: Slopes | None
    ) -> Move | None:
        sized = self._step_model is not None and directions and known is None and not self._burning
        if self._step_model is None or not sized:
            return super().shortened(directions, gradients, known)
        move = None if self.step_size is not None else super().shortened(directions, gradients, known)
        if move is not None:
            directions.update(zip(directions, scaled(list(directions.values()), move.directions), strict=True))
            move = replace(move, directions=1.0)
        directions.update(self._step_model.size(directions, gradients))
        return move or self._step_model.bounded

    @property
    def follows_rates(self) -> bool:
        return any(map(is_adaptive, self.param_groups))

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

    def over_ranks(self, work: Callable[[], Tensor], width: int) -> Tensor:
        """The mean of computed numbers over the processes that take the step together; the same bits in all."""
        return work() if self.ranks is None else self.ranks.mean(work, width)

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        # During burn-in nothing moves, not even by weight decay.
        return {**group, "weight_decay": 0.0} if self._burning else group

    def _rows(self, gradients: dict[str, Tensor]) -> dict[str, GradientRows]:
        if getattr(self, "grad_scale", None) is not None or world_size() > 1:
            return {}  # gradients that were scaled or summed over processes after the rows were seen
        return self.taps.rows(gradients)

    # State

    def complete(self, saved: dict[str, Any]) -> None:
        """Add the blocks' states under their first parameter.

        With ``memory_fraction`` below 1 all processes call it together, and all get the state of all blocks.
        """
        index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        first = {name: index[id(p)] for name, p in self.parameters.items()}
        states = None if self.shared is None else self.shared.states(self.preconditioners)
        add_blocks(saved, self.preconditioners, first, (), states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; factors keep their dtype whatever the parameters' is.

        Raises:
            ValueError: If blocks are not those of the model and the method, or hold NaN; nothing has changed then.

        Statistics of passes whose gradients wait for the step are lost: where they were due, the step refuses these
        gradients, unless they are cleared.
        """
        with self.loading():
            require_layout(state_dict, type(self).__name__)
            plain, blocks = split_blocks(unpacked(state_dict, self.method_name()))
            super().load_state_dict(plain)
            estimators = self.statistics.collector.estimators
            estimators.clear()
            self.preconditioners.clear()
            known = {**self.parameters, **self.beside()}
            whoses = {name: f"{type(self).__name__}: the saved state of block {name}" for name in blocks}
            shapes = {name: saved_block(name, saved, known, whoses[name]) for name, saved in blocks.items()}
            if again := self.tables & {part for block in shapes.values() for part in block.names}:
                self.curve_again(again)  # the saved run had curvature for them, and goes on with it
                self.follow()
            for name, saved in copied(blocks, self.parameters.device).items():
                whose, block = whoses[name], shapes[name]
                if not all(part in self.parameters for part in block.names):
                    warnings.warn(
                        f"{whose} is not taken over, because its parameters take Adam's step now. For the curvature "
                        "that they had, give structures={nn.Embedding: {}}.",
                        UserWarning,
                        stacklevel=2,
                    )
                    continue
                estimators[name] = self.begin_block(block, saved_form(saved))
                load_block(self.preconditioners[name], saved, whose)
            self.after_load()
        self.taps.close()
        if self.shared is None:
            self.taps.watch(self.tape, self.preconditioners)
        behind = self.tape.standing()
        self.arm()
        self.tape.behind = behind if self.statistics.armed else None

    def after_load(self) -> None:
        """The blocks were restored."""

    def gather(self) -> None:
        if self.tape.shards is not None:
            for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
                self.state[p].update(cut_as(p, self.state[p]))

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
            "measured": {},
            "loss_level": None,
            "bounds": BoundRecord(),
            "alike": Alike(),
            "taps": RowTaps(),
            "_stacks": BlockStacks(),
            "_members": None,
            "shared": None,
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
        self.preconditioners.discard()  # the pass under way is of the original, as its gradients are
        self.drop_absent()
        self.taps.watch(self.tape, self.preconditioners)
        if self.detached:
            self.detach()
