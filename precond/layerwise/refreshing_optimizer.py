"""Optimizers that keep an inverse for each block, and renew it now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.structures.inverse import InverseEstimator
from precond.distributed.kept_blocks import Refreshing
from precond.layerwise.blocks.by_owner import momenta_at_owners
from precond.layerwise.dampings import Dampings
from precond.layerwise.layer_optimizer import LayerOptimizer
from precond.layerwise.momenta import Momenta
from precond.step.journal import FAILURES, REFRESHES
from precond.step.loss_level import LossLevel
from solvers import Damping, LinearOperator


class RefreshingOptimizer(LayerOptimizer):
    """When which inverse is renewed, and by which damping: in units of C, or as a fraction of the level of the loss.

    What is done with the inverses is said by :class:`~precond.PreconditionedOptimizer`.
    """

    #: Whether refreshes are spread over their period, where the caller says nothing.
    staggers: ClassVar[bool] = False

    damping: Damping
    stagger: bool
    #: That of the step, where something is in units of the loss.
    loss_level: LossLevel | None

    def follow_loss(self) -> None:
        """Renew the level of the loss, kept in the state of the first trainable parameter, where something needs it.

        Checkpoints in the flat form leave out the states of frozen ones.
        """
        if not any("loss" in (group["kl_unit"], group["damping_unit"]) for group in self.param_groups):
            return
        params = [p for group in self.param_groups for p in group["params"]]  # a group may be empty
        first = next((p for p in params if p.requires_grad), params[0])
        keeper = next((p for p in params if "level" in self.state.get(p, ())), first)  # as others were frozen, or older
        before, latest = (self.state[keeper].get(name) for name in ("level", "loss"))  # older states have no "loss"
        self.loss_level = LossLevel.after(before, self.statistics.level, first, latest)
        saved = self.loss_level.saved(first)
        for name in saved:
            self.state[keeper].pop(name, None)
        self.state[first].update(saved)

    def bound_level(self) -> Tensor | float | None:
        return None if self.loss_level is None else self.loss_level.mean

    def best_of(
        self,
        candidates: list[float],
        now: dict[Tensor, Tensor],
        applied: Callable[[], dict[Tensor, Tensor]],
        promise: Callable[[dict[Tensor, Tensor]], float],
    ) -> dict[Tensor, Tensor]:
        """The directions, among some dampings of the factors, of which most is promised; their inverses stay.

        Args:
            candidates: The dampings; the first one is the present.
            now: Directions under that.
            applied: The directions under the inverses at hand.
            promise: Change of the loss that directions promise.
        """
        dampings = Dampings(self.damping, self.param_groups, self.parameters, self.loss_level)
        found: list[tuple[float, float, dict[Tensor, Tensor], dict[str, Any]]] = []
        for strength in candidates:
            for group in self.param_groups:
                group["factor_damping"] = strength
            if found:
                due = {n: {"damping": dampings.of(p.estimator.block)} for n, p in self.preconditioners.items()}
                if self.shared is None:
                    self.preconditioners.refresh(due)
                else:
                    self._refreshed_together(due)
                now = applied()
            inverses = {name: p.inverse for name, p in self.preconditioners.items()}
            promised = promise(now)
            found.append((promised if math.isfinite(promised) else math.inf, strength, now, inverses))
        _, strength, best, inverses = min(found, key=lambda entry: entry[0])
        for group in self.param_groups:
            group["factor_damping"] = strength
        for name, preconditioner in self.preconditioners.items():
            preconditioner.inverse = inverses[name]
        return best

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of C in the units of the damping's strength; 0 where no estimate of C is kept."""
        if self.damping.relative:
            return 1.0
        known = [p.estimator for p in self.preconditioners.values() if p.estimator.ready]
        kept = [e.operator() for e in known if not isinstance(e, InverseEstimator)]
        trace, size = float(sum(op.trace() for op in kept)), float(sum(op.shape[0] for op in kept))
        if self.shared is not None:
            both = torch.tensor([trace, size], dtype=torch.float64, device=self.shared.ranks.device)
            trace, size = self.shared.row_sum(both).tolist()
        return trace / size if size else 0.0

    def set_damping(self, damping: float) -> None:
        """Give all groups the same damping; it counts from the next refresh of each block."""
        for group in self.param_groups:
            group["damping"] = damping
        for preconditioner in self.preconditioners.values():
            preconditioner.unseen += 1

    def refresh_inverses(self, updated: bool) -> None:
        """Renew the inverses that are due, and after new statistics (``updated``) those that come at no cost."""
        period = self.option("inverse_update_period")
        slot = self.preconditioners.slots(period) if self.stagger else {}
        bounded = self.bounds_momenta
        dampings = Dampings(self.damping, self.param_groups, self.parameters, self.loss_level)
        momenta = Momenta(self.parameters, self.state, self.param_groups)
        whole: dict[str, Tensor] | None = None
        lengths: dict[str, dict[Tensor, Tensor]] = {}

        def measure(name: str, metric: LinearOperator | None, renewed: bool = True) -> None:
            """Measure the momentum of a block; where processes share the blocks, in the one that keeps it."""
            kept = self.preconditioners[name]
            lengths[name] = momenta.of_block(
                kept,
                lambda: metric or kept.metric(dampings.of(kept.estimator.block)),
                renewed=renewed,
                counts=self.shared is None or self.shared.counts(name),
                whole=whole,
            )

        def measure_new(names: Sequence[str], metric: LinearOperator | None) -> None:
            if len(names) == 1 or metric is None:
                for name in names:
                    measure(name, metric)
                return
            found = momenta.of_stack([self.preconditioners[name] for name in names], metric)
            lengths.update(zip(names, found, strict=True))

        todo: dict[str, dict[str, Any]] = {}
        for name, preconditioner in self.preconditioners.items():
            due = preconditioner.unseen > 0 and (self.steps - slot.get(name, 0)) % period == 0
            due = due or preconditioner.absent
            if due or updated:
                todo[name] = {
                    "damping": dampings.of(preconditioner.estimator.block),
                    "basis": due,
                    "applications": max(period, self.option("curvature_update_period")),
                }
        failures = {name: self.preconditioners[name].failures for name in todo}
        if self.shared is None:
            by_rows = {n: {**o, "rows": self.taps.count(n)} for n, o in todo.items()}
            new = self.preconditioners.refresh(by_rows, *([measure_new] if bounded else []))
            for name in self.preconditioners if bounded else ():
                if name not in new:
                    measure(name, None, False)
        else:
            new = self._refreshed_together(todo)
            if bounded:
                if self.shared.whole:
                    blocks = self.preconditioners
                    whole = momenta_at_owners(self.shared, blocks, self.parameters, self.state, new)
                for name in sorted(self.preconditioners):  # each process has them in an order of its own
                    measure(name, None, name in new)
        self.measured = {p: length for each in lengths.values() for p, length in each.items()}
        if self.shared is not None and bounded:
            self.measured = self.shared.added(self.measured)
        self.events[FAILURES] += sum(self.preconditioners[name].failures > failures[name] for name in todo)
        self.events[REFRESHES] += sum(todo[name]["basis"] and name in new for name in todo)
        if bounded:
            found = momenta.without_curvature(self.preconditioners.values())
            if self.shared is not None and self.shared.whole:
                found = self.shared.added({p: found[p] for p in self.parameters.values() if p in found})
            self.measured |= found

    def _refreshed_together(self, todo: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Refresh blocks in several processes; the names of those that are new."""
        assert self.shared is not None
        kept = {name: self.preconditioners[name] for name in todo}
        return self.shared.refresh(
            [Refreshing(n, kept[n], o.get("basis", True), partial(kept[n].attempt, **o)) for n, o in todo.items()]
        )
