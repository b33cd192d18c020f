"""Settings for the parts of the training loop that an optimizer cannot see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from curvature.estimation.tape import Mode
from curvature.losses import BatchDim
from curvature.model.arguments import axes
from curvature.model.data import Output
from precond.step.options import period
from solvers.outcome.arguments import fields_of, function

NonFinite = Literal["skip", "raise"]


@dataclass(frozen=True)
class Loop:
    """The training loop around an optimizer, where it differs from the plain one.

    Methods that use gradients alone take ``nonfinite`` and ``max_skips``, and refuse the others.

    Args:
        output: Picks the output tensor where the model returns something else and the loss is computed inside.
        class_dim: Class axis of the output, where it cannot be read off.
        capture: How statistics are obtained: ``"auto"``, ``"loss"`` (from the loss module), ``"gradient"`` (from the
            gradient at the model's output) or ``"shadow"`` (from a repeated forward pass).
        eval_mode: Also learn from forward passes in eval mode.
        nonfinite: What to do if a gradient holds NaN or inf: ``"skip"`` the step with a warning and leave all
            statistics as they were, or ``"raise"``.
        max_skips: Steps in a row that may be skipped so before an error says that training has diverged; those that a
            ``GradScaler`` skips while it looks for its scale do not count.
        seed: Seed of the method's own draws; the global random state is never used.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.

    Raises:
        ValueError: If a value is out of range.
    """

    output: Output | None = None
    class_dim: int | None = None
    capture: Mode = "auto"
    eval_mode: bool = False
    nonfinite: NonFinite = "skip"
    max_skips: int = 20
    seed: int = 0
    batch_dim: BatchDim = None

    def __post_init__(self) -> None:
        """Validate the values that are not validated elsewhere."""
        fields_of(self)
        function("output", self.output, optional=True)
        axes("batch_dim", self.batch_dim)
        if self.nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite must be 'skip' or 'raise', got {self.nonfinite!r}.")
        period("max_skips", self.max_skips)

    def require(self, used: Iterable[str], method: str) -> None:
        """Refuse settings that a method does not use.

        Args:
            used: Names of the settings that it uses.
            method: Its name.

        Raises:
            ValueError: Naming the setting, the method and what it uses.
        """
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in given:
            if name not in used:
                raise ValueError(
                    f"{method}: loop=Loop({name}={getattr(self, name)!r}) has no effect on it; of Loop it uses "
                    f"{', '.join(sorted(used))}."
                )
