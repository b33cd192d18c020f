"""Parameters of one shape, updated together as one stack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from precond.gradient.optimizer import GradientOptimizer, Group, State
from solvers import SolverError


class Stack:
    """Parameters of one shape, whose states are the slices of joint tensors.

    Writing into an entry of :attr:`state` writes into the state of each parameter, so checkpoints do not depend on
    stacks. A stack of one parameter uses its state directly.

    Attributes:
        params: The parameters.
        state: Name -> joint tensor ``(k, *shape)``.
    """

    def __init__(self, params: list[Tensor], states: list[State]) -> None:
        self.params, self._states = params, states
        names = [name for name, value in states[0].items() if isinstance(value, Tensor)]
        if len(states) == 1:
            # A slice of a former stack may be aligned so that products round otherwise than in separate memory.
            states[0].update({name: _own(states[0][name]) for name in names})
            self._slices = [{name: states[0][name] for name in names}]
            self.state = {name: value[None] for name, value in self._slices[0].items()}
            return
        self.state = {name: torch.stack([state[name] for state in states]) for name in names}
        self._slices = [{name: joint[i] for name, joint in self.state.items()} for i in range(len(states))]
        for state, slices in zip(states, self._slices, strict=True):
            state.update(slices)

    @property
    def step(self) -> int:
        """The number of the step, from 1; the same for all."""
        return int(self._states[0]["step"])

    def holds(self, states: Sequence[State]) -> bool:
        """Whether these are still the states, with the same entries."""
        return all(
            state is own and all(state[name] is value for name, value in slices.items())
            for state, own, slices in zip(states, self._states, self._slices, strict=True)
        )

    def part(self, index: int) -> State:
        """State of one of the parameters, as a stack of one."""
        return {name: joint[index : index + 1] for name, joint in self.state.items()}

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor ``(k, *shape)`` from one for each parameter."""
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


class StackedOptimizer(GradientOptimizer):
    """A :class:`GradientOptimizer` that is written for stacks of parameters of one shape.

    Many small matrices take many small operations one by one; together they take one operation of each kind.
    """

    @abstractmethod
    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        """Update the states with gradients and return the directions, both ``(k, *shape)``.

        Args:
            stack: The parameters and their states, which are to be changed in place.
            g: Gradients in float32 at least, not to be altered.
            group: Options.
        """

    def kind(self, p: Tensor, g: Tensor) -> Hashable:
        """A key that parameters stacked together share, besides shape and step."""
        return None

    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        return self.several([p], [g], group)[0]

    def several(self, params: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        for places, stack in self._stacked(params, gradients):
            directions = self.update(stack, stack.gather([gradients[i] for i in places]), group)
            out |= zip(places, directions.reshape(-1, *params[places[0]].shape), strict=True)
        return [out[i] for i in range(len(params))]

    def renew(self, stack: Stack, compute: Callable[[State], None], prefix: str = "") -> None:
        """Refresh what needs a decomposition; where one fails, only that parameter keeps its last good one.

        Args:
            stack: The parameters.
            compute: Writes the new entries into a stacked state, after everything that may fail.
            prefix: As for :meth:`refresh`.

        Raises:
            SolverError: As :meth:`refresh`.
        """
        try:
            compute(stack.state)
        except SolverError:
            for index, p in enumerate(stack.params):
                self.refresh(p, partial(compute, stack.part(index)), prefix)
            return
        for p in stack.params:
            self.state[p][f"{prefix}failures"] = 0

    def _stacked(self, params: list[Tensor], gradients: list[Tensor]) -> list[tuple[list[int], Stack]]:
        """Places of parameters that go together, and their stacks; those of the last step if nothing has changed."""
        known = self.__dict__.setdefault("_stacks", {})  # not in __init__, because copies start without it
        states = [self.state[p] for p in params]
        first = states[0]["step"]
        # Parameters that skipped a step get their own stack, also after a resume.
        kinds = [(id(p), self.kind(p, g), s["step"] - first) for p, g, s in zip(params, gradients, states, strict=True)]
        last, stacks = known.get(params[0], (None, []))
        if last == kinds and all(stack.holds([states[i] for i in places]) for places, stack in stacks):
            return stacks
        keys = [(p.shape, _layout(s), kind[1:]) for p, s, kind in zip(params, states, kinds, strict=True)]
        stacks = [
            (places, Stack([params[i] for i in places], [states[i] for i in places]))
            for places in alike(keys, [p.numel() for p in params])
        ]
        known[params[0]] = kinds, stacks
        return stacks


def alike(keys: Sequence[Hashable], sizes: Sequence[int], limit: int = 2**18) -> list[list[int]]:
    """Places with equal keys, up to a sum of sizes per stack.

    Stacks save the overhead of many small products; large matrices have little to save, and a stack is a copy.
    """
    stacks: dict[Hashable, list[list[int]]] = {}
    for place, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        found = stacks.setdefault(key, [[]])
        if found[-1] and (len(found[-1]) + 1) * size > limit:
            found.append([])
        found[-1].append(place)
    return [places for found in stacks.values() for places in found]


def _layout(state: State) -> Hashable:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tuple((name, value.shape, value.dtype, value.device) for name, value in tensors.items())


def _own(value: Tensor) -> Tensor:
    """The tensor, in separate memory."""
    whole = value.untyped_storage().nbytes() == prod(value.shape) * value.itemsize
    return value if whole else value.clone()


def entries(state: State, name: str, ndim: int) -> dict[int, Tensor]:
    """The entries ``name.k`` of a state, by their axis k, for the axes that have one."""
    return {k: state[f"{name}.{k}"] for k in range(ndim) if f"{name}.{k}" in state}


def write(state: State, entries: State) -> None:
    """Write new values into entries of a stacked state, in place."""
    for name, value in entries.items():
        state[name].copy_(value)
