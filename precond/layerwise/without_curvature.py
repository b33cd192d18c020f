"""What a layer-based optimizer does with parameters that get no curvature: Adam's step, or the plain gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvature.model.fully_sharded import named_parameters
from curvature.model.wrappers import unwrapped
from precond.layerwise.adam_step import SQUARES, AdamStep
from precond.step.adaptive_rate import is_adaptive
from precond.step.base import SecondOrderOptimizer
from solvers.precision import working_dtype


class WithoutCurvature(SecondOrderOptimizer):
    """An optimizer of a model in which some parameters have no curvature."""

    model: nn.Module
    #: Names of parameters that get no curvature, and the step that they take; ``None`` for the plain gradient.
    plain: dict[str, AdamStep | None]
    #: Likewise by ``id``: their names.
    _without: dict[int, str]
    #: The parameters that take Adam's step.
    adam_steps: dict[Tensor, AdamStep]
    #: Names of those that do so by default.
    tables: frozenset[str]
    #: What tables of embeddings get that ``structures`` does not name; ``None`` for the curvature of all others.
    table_step: ClassVar[AdamStep | None] = None

    def trainable(self) -> list[Tensor]:
        """The parameters of the groups that are not frozen."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def tracked(self) -> list[Tensor]:
        """Parameters that get curvature."""
        plain = self.without_curvature()
        return [p for p in self.trainable() if id(p) not in plain]

    def without_curvature(self) -> dict[int, str]:
        """Parameters that get no curvature, by ``id``, and their names."""
        return self._without

    def beside(self) -> dict[str, Tensor]:
        """Parameters that take Adam's step, by name."""
        return {self._without[id(p)]: p for p in self.adam_steps}

    def settle_tables(self) -> None:
        """Note the tables that take Adam's step by default."""
        self.tables = frozenset(name for name, step in self.plain.items() if step and step is self.table_step)
        self.find_plain()

    def curve_again(self, tables: Collection[str]) -> None:
        """Give tables that take Adam's step by default the curvature of the other layers."""
        self.plain = {name: step for name, step in self.plain.items() if name not in tables}
        self.tables -= set(tables)
        self.find_plain()

    def find_plain(self) -> None:
        """Find the parameters without curvature, and those of them that take Adam's step."""
        named = list(named_parameters(unwrapped(self.model))) if self.plain else []
        named = [(name, p) for name, p in named if name in self.plain]
        self._without = {id(p): name for name, p in named}
        self.adam_steps = {p: step for name, p in named if (step := self.plain[name]) is not None}

    def by_adam(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The directions of parameters that take Adam's step."""
        steps = {p: step for p, step in self.adam_steps.items() if p in gradients}
        groups = {p: group for group in self.param_groups for p in group["params"]} if steps else {}
        return {p: s.direction(p, gradients[p], self.state[p], groups[p], self.idle) for p, s in steps.items()}

    def touched(self) -> list[Tensor]:
        squares = [self.state[p].get(SQUARES) for p in self.adam_steps if p in self.state]
        return [*super().touched(), *(x for x in squares if x is not None)]

    def apart(self) -> Collection[Tensor]:
        return self.adam_steps

    def first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        step = self.adam_steps.get(p)
        if step is not None:
            return step.begin(p)
        return {"rate": torch.ones((), dtype=working_dtype(p), device=p.device)} if is_adaptive(group) else {}

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> Mapping[str, Any] | None:
        return self.first_state(p, options) or None
