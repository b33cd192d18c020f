"""What tells whether a backward pass wrote gradients, and whether they still stand when the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from torch import Tensor

from curvature.model.fully_sharded import FullyShard, Mark, shard_of

#: Parameter -> what its gradient is known by; none for those without.
Marks = dict[str, Mark]


class GradientMarks:
    """Marks of the gradients of some parameters.

    Args:
        parameters: The parameters at this moment, by name.
        shards: Those under ``fully_shard``, if there are any.
    """

    def __init__(self, parameters: Callable[[], Mapping[str, Tensor]], shards: FullyShard | None) -> None:
        self._parameters, self._shards = parameters, shards

    def now(self) -> Marks:
        """What tells whether a gradient was written since."""
        if self._shards is not None:
            marks = {name: self._shards.mark(p) for name, p in self._parameters().items()}
            return {name: mark for name, mark in marks.items() if mark}
        return {name: _mark(p.grad) for name, p in self._parameters().items() if p.grad is not None}

    def stand(self, marks: Marks, nonzero: Set[str] | None) -> bool:
        """Whether any of some gradients is there: not set to ``None`` or to zeros since.

        Args:
            marks: Of when they were written.
            nonzero: Parameters under ``fully_shard`` with a gradient that is not zero in some process, where known.
        """
        return any(self._stands(name, mark, nonzero) for name, mark in marks.items())

    def _stands(self, name: str, mark: Mark, nonzero: Set[str] | None) -> bool:
        parameter = self._parameters().get(name)
        if self._shards is not None and parameter is not None:
            if mark == self._shards.mark(parameter) or self._shards.waits(parameter):
                return True
            if nonzero is not None:
                return name in nonzero
        gradient = None if parameter is None else parameter.grad
        if gradient is None:
            return False
        return mark == _mark(gradient) or bool(shard_of(gradient).any())


def _mark(gradient: Tensor) -> Mark:
    return id(gradient), gradient._version
