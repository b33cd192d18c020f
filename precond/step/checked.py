"""The gradients of a step: their true scale, whether they are fit for a step, and what is said where they are not."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping

from torch import Tensor
from torch.distributed import ProcessGroup

from precond.distributed.ranks import Ranks, group_of
from precond.distributed.sharded import any_sharded, refuse_left_behind
from precond.distributed.verdict import verdict
from precond.step.divergence import Diverged, advice, all_finite, broken_gradients, broken_results, largest_norm
from precond.step.journal import FAILURES
from precond.step.loop import Loop
from precond.step.stateful import StatefulOptimizer
from precond.step.transaction import Transaction

#: Steps in a row without any gradient after which that is told.
EMPTY_STEPS = 3


class CheckedOptimizer(StatefulOptimizer):
    """A :class:`StatefulOptimizer` that looks at gradients and results before it takes them, in all processes alike."""

    loop: Loop
    process_group: ProcessGroup | None
    #: Refreshes, and those that failed.
    events: Counter[str]
    #: Steps skipped because a gradient was not finite, and those of them since the last step that was taken.
    skipped = 0
    skipped_in_row = 0
    #: The largest norm of the gradients of the step; infinite if not known.
    gradient_norm = math.inf
    #: Whether :meth:`metrics` was called, so that steps measure what takes work.
    asked = False
    _ranks: Ranks | None = None
    _reason = ""  # why a step is refused whose results are finite
    _empty_in_row = 0  # steps without any gradient

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

    def touched(self) -> list[Tensor]:
        """What the step has written to the state, beside the parameters' own entries ``momentum_buffer``."""
        return []

    def is_fit(self, results: Mapping[Tensor, Tensor]) -> bool:
        """Whether results of the step are fit to be written: they are finite; one wait for the device.

        A momentum that is not finite shows in the value of its parameter.
        """
        fit = all_finite([*results.values(), *self.touched()])
        if self.ranks is None:
            return fit
        sharded = any_sharded(results.values())
        asked = [float(self.asked)] if sharded else []  # measuring a move on shards takes all processes
        table = self.ranks.numbers([float(fit), float(self.events[FAILURES]), *asked])
        if sharded:
            self.asked = any(row[2] for row in table)
        if len({row[1] for row in table}) > 1:  # the decompositions of some are older than those of others
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

    def refuse_results(
        self, whole: Transaction, gradients: dict[Tensor, Tensor], results: Mapping[Tensor, Tensor]
    ) -> None:
        """Skip the step, because what it would write is not finite."""
        reason = self._reason
        whole.go_back()
        self.skip(gradients, reason or broken_results(results, self.state_dict()["state"], self.name_of))

    def stands_still(self, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether gradients and rates are all zero, as in torch.distributed.checkpoint's step to create a state."""
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        return not any(bool(g.any()) for g in gradients.values())

    def expects_checkpoint(self) -> bool:
        """Whether the step is one of torch.distributed.checkpoint, which creates the state: nothing can move."""
        gradients = {p: p.grad for p in self.with_gradient() if p.grad is not None}
        if not gradients or not self.stands_still(gradients):
            return False
        self.begin_states()
        return True

    def with_gradient(self) -> list[Tensor]:
        """The parameters that have a gradient."""
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
        gradients = {p: p.grad for p in self.with_gradient() if p.grad is not None}
        if not gradients:  # without gradients this does not count as a step
            self.on_empty()
            self.on_skip()
            return None
        self._empty_in_row = 0
        self._refuse_sparse(gradients)
        self.gradient_norm = largest_norm(list(gradients.values()))
        if not self.takes(self.gradient_norm, gradients):
            self.skip(gradients)
            return None
        if scale is not None:
            self.gradient_norm, gradients = math.inf, {p: g / scale for p, g in gradients.items()}
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
        gradients = {p: p.grad for p in self.with_gradient() if p.grad is not None}
        fit = True

        def finite() -> bool:
            nonlocal fit
            self._refuse_sparse(gradients)
            self.gradient_norm = largest_norm(list(gradients.values()))
            fit = self.takes(self.gradient_norm, gradients)
            return fit

        found = verdict(ranks, params, gradients, quiet, finite)
        if found == "broken":
            self.skip(gradients, "a gradient holds NaN or inf in another process" if fit else "")
        elif found == "quiet":
            self.on_skip()
        if found != "go":
            return None
        if scale is None:
            return gradients
        self.gradient_norm = math.inf
        return {p: g / scale for p, g in gradients.items()}

    def skip(self, gradients: dict[Tensor, Tensor], what: str = "") -> None:
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
