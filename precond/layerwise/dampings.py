"""The damping of every block in a step, as the groups of its parameters have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvature import Block
from curvature.model.parameters import Parameters
from precond.step.loss_level import FollowingDamping, LossLevel
from solvers import Damping


class Dampings:
    """The dampings of a step, made once for all blocks that have the same strength.

    Args:
        form: The damping of the optimizer; the groups hold its strength.
        groups: The groups, looked at when a damping is asked for.
        parameters: Those that have curvature.
        level: What strengths in units of the loss are multiplied by; ``None`` where no loss was seen yet.
    """

    def __init__(
        self, form: Damping, groups: Sequence[Mapping[str, Any]], parameters: Parameters, level: LossLevel | None
    ) -> None:
        self.form, self.groups, self.parameters, self.level = form, groups, parameters, level
        self._made: dict[tuple[float, str], Damping] = {}  # by strength and unit

    def of(self, block: Block) -> Damping:
        """The damping of a block.

        Raises:
            ValueError: If its parameters are in groups with different ones.
        """
        pairs = {_strength_of(group) for group in self.groups}
        if len(pairs) > 1:
            group_of = {p: group for group in self.groups for p in group["params"]}
            pairs = {_strength_of(group_of[self.parameters[name]]) for name in block.names}
        if len(pairs) > 1:
            values = {value for value, _ in pairs}
            raise ValueError(
                f"the parameters of block {block.name} are in groups with different damping {sorted(values)}, but are "
                "inverted together. Use one damping for them, or bias='separate'."
            )
        pair = pairs.pop()
        if pair not in self._made:
            self._made[pair] = self._make(*pair)
        return self._made[pair]

    def _make(self, value: float, unit: str) -> Damping:
        if unit == "loss" and self.level is not None:
            mean = self.level.mean
            mean = mean.to(self.parameters.device) if isinstance(mean, Tensor) else mean
            return FollowingDamping(self.form.with_strength(value * mean))
        return self.form if value == float(self.form.strength) else self.form.with_strength(value)


def _strength_of(group: Mapping[str, Any]) -> tuple[float, str]:
    """The strength of the damping of a group's factors, and its unit."""
    own = group.get("factor_damping")
    return (group["damping"] if own is None else own), group["damping_unit"]
