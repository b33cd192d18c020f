"""The trust region of an optimizer: lengths of moves in the metric of the curvature, and how often they were cut."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from precond.step.adaptive_rate import followed
from precond.step.alike import Alike
from precond.step.checked import CheckedOptimizer
from precond.step.trust_region import BoundRecord, Move, Slopes, bounded_move, reference_lr

log = logging.getLogger(__name__)

#: Norms of gradients between which products with them can be taken in float32.
_PLAIN = 1e-10, 1e10


class BoundedOptimizer(CheckedOptimizer):
    """A :class:`CheckedOptimizer` whose steps stay within ``kl_clip``, see :class:`~precond.TrustRegion`."""

    #: Whether bounds may be in units of the loss (``TrustRegion(unit="loss")``).
    sees_loss: ClassVar[bool] = False
    #: Names of the options that the constructor was given, so that one without effect is refused and a default is not.
    given: frozenset[str] = frozenset()
    #: Squared lengths of momenta in a metric that is new.
    measured: dict[Tensor, Tensor]
    #: How often the bound was active.
    bounds: BoundRecord
    #: The parameters, those of one shape together.
    alike: Alike
    #: Factors of the moves of the step under way, of parameters whose rates learn.
    move_factors: dict[Tensor, Tensor | float]

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if options.get("kl_unit") == "loss" and not self.sees_loss:
            raise ValueError(
                f"{type(self).__name__} does not see the loss, so kl_clip cannot be in its units: leave out "
                "unit='loss'."
            )

    @property
    def bounds_momenta(self) -> bool:
        """Whether the bound is one of the whole move, for which the lengths of momenta have to be known."""
        bounded = any(group["kl_clip"] is not None for group in self.param_groups)
        return bounded and not any(group["kl_of"] == "direction" for group in self.param_groups)

    def bound_level(self) -> Tensor | float | None:
        """What bounds in units of the loss are multiplied by; ``None`` for a method that does not see the loss."""
        return None

    def images(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``P^-1 d`` of every direction d; the gradient, unless there is more in d."""
        return gradients

    def slopes_of(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> Slopes:
        """The slopes of directions, in the metric of the curvature that made them of the gradients."""
        apart = self.apart()
        params = [p for group in self.param_groups for p in group["params"] if p in directions and p not in apart]
        known = {p: self.state[p] for p in params if p in self.state}
        momenta = {p: state["momentum_buffer"] for p, state in known.items() if "momentum_buffer" in state}
        wide = not _PLAIN[0] < self.gradient_norm < _PLAIN[1]
        images = self.images(directions, gradients)
        return Slopes.of(*self.alike.split(params), directions, momenta, images, wide=wide)

    def shortened(
        self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], known: Slopes | None
    ) -> Move | None:
        """By how much the directions, and then the whole move, are to be shortened.

        Args:
            directions: Those of the step; may be changed in place.
            gradients: Those they come from.
            known: The slopes, where :meth:`~precond.step.base.SecondOrderOptimizer.precondition` found them.
        """
        groups = [self.update_options(group) for group in self.param_groups]
        if not directions or not (self.follows_rates or any(group["kl_clip"] is not None for group in groups)):
            return None
        slopes = self.slopes_of(directions, gradients) if known is None else known.of_those_in(directions)
        if self.follows_rates:
            self.move_factors = followed(slopes.params, slopes.momentum, self.state, groups)
        lengths = {p: state["length"] for p in slopes.params if "length" in (state := self.state.get(p, {}))}
        return bounded_move(groups, slopes, lengths | self.measured, self.bound_level(), self.move_factors)

    @property
    def follows_rates(self) -> bool:
        """Whether rates of parameters learn from the slopes along their momenta, see :class:`~precond.AdaptiveRate`."""
        return False

    def note_move(self, move: Move | None) -> BoundRecord:
        """Keep the lengths of the momenta; returns how often the bound was active, which is told once."""
        lengths = {} if move is None else move.lengths
        measured = move is not None and self.bounds_momenta
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state is not None and p in lengths:
                    state["length"] = lengths[p]
                elif state is not None and not measured:
                    state.pop("length", None)  # the momentum goes on without being measured
        if move is None:
            return self.bounds
        bounds, group = self.bounds.after(move), self.param_groups[0]
        chosen = "kl_clip" in self.given or group["kl_clip"] != self.defaults.get(
            "kl_clip"
        )  # a default is meant to bound
        if (
            group["kl_clip"] is None or not chosen or not bounds.worth_telling()
        ):  # a model's own region follows its steps
            return bounds
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
