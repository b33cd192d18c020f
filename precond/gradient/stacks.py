"""Parameters of one shape, updated together as one stack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from precond.distributed.sharded import is_sharded
from precond.gradient.optimizer import GradientMomentumOptions, GradientOptimizer, GradientOptions, Group, State
from precond.gradient.rows import normalized_rows, row_state
from precond.step.adaptive_rate import OWN
from precond.step.journal import REFRESHES
from precond.step.loading import OCCASIONAL
from solvers import SolverError
from solvers.outcome.arguments import number

#: Entries of a state that the rest of the step replaces, parameter by parameter: a joint tensor of them would be made
#: anew in every step. A method whose own they are says so by :attr:`StackedOptimizer.kept`.
LATER = OCCASIONAL | OWN | {"momentum_buffer"}


class StackedOptions(GradientOptions, total=False):
    """Options that every method of :class:`StackedOptimizer` has."""

    row_normalization: float | None


class StackedMomentumOptions(StackedOptions, GradientMomentumOptions, total=False):
    """:class:`StackedOptions`, and ``momentum`` for methods with the default one."""


class Stack:
    """Parameters of one shape, whose states are the slices of joint tensors.

    Between :meth:`open` and :meth:`close` a step works on copies, to which it may write; closing hands slices of them
    to the states, so checkpoints do not depend on stacks. A stack of one parameter uses its state directly.

    Args:
        params: The parameters.
        states: Their states.
        names: Of the entries that lie in joint tensors, the same in all states.

    Attributes:
        params: The parameters.
        state: Name -> joint tensor ``(k, *shape)``, of the step that is open.
    """

    def __init__(self, params: list[Tensor], states: list[State], names: Sequence[str]) -> None:
        self.params, self._states = params, states
        if len(states) == 1:
            # A slice of a former stack may be aligned so that products round otherwise than in separate memory.
            states[0].update({name: _own(states[0][name]) for name in names})
            joint = {name: states[0][name][None] for name in names}
            self._kept = joint, [{name: states[0][name] for name in names}]
        else:
            self._kept = self._sliced({name: torch.stack([state[name] for state in states]) for name in names})
            self._hand_out()
        self.state: State = {}
        self._derived: dict[str, tuple[Tensor, Tensor]] = {}

    def derived(self, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute`` of an entry of the state, once for as long as the entry is the same; not to be altered."""
        entry = self.state[name]
        if name not in self._derived or self._derived[name][0] is not entry:
            self._derived[name] = entry, compute(entry)
        return self._derived[name][1]

    def _sliced(self, joint: State) -> tuple[State, list[State]]:
        parts = {name: value.unbind() for name, value in joint.items()}
        return joint, [{name: part[i] for name, part in parts.items()} for i in range(len(self._states))]

    def _hand_out(self) -> None:
        for state, slices in zip(self._states, self._kept[1], strict=True):
            state.update(slices)

    def open(self, kept: frozenset[str] = frozenset()) -> None:
        """Begin a step: copy the entries, but for those with one of these words in their names."""
        self.state = {name: x if kept.intersection(name.split(".")) else x.clone() for name, x in self._kept[0].items()}

    def close(self) -> dict[str, Tensor]:
        """Hand the state of the step to the parameters; returns what it has written."""
        before, old = self._kept
        written = {name: x for name, x in self.state.items() if x is not before[name]}
        slices = self._sliced(written)[1]
        self._kept = self.state, [last | new for last, new in zip(old, slices, strict=True)]
        self._hand_out()
        self.state = {}
        return written

    @property
    def step(self) -> int:
        """The number of the step, from 1; the same for all."""
        return int(self._states[0]["step"])

    def holds(self, states: Sequence[State]) -> bool:
        """Whether these are still the states, with the same entries."""
        return all(
            state is own and all(state[name] is value for name, value in slices.items())
            for state, own, slices in zip(states, self._states, self._kept[1], strict=True)
        )

    def renew_part(self, index: int, compute: Callable[[State], State]) -> None:
        """Compute new entries for one of the parameters alone."""
        new = compute({name: joint[index : index + 1] for name, joint in self.state.items()})
        for name, value in new.items():
            if self.state[name] is self._kept[0][name]:  # that of the step before
                self.state[name] = self.state[name].clone()
            self.state[name][index : index + 1] = value

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor ``(k, *shape)`` from one for each parameter."""
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


class StackedOptimizer(GradientOptimizer):
    """A :class:`GradientOptimizer` that is written for stacks of parameters of one shape.

    Many small matrices take many small operations one by one; together they take one operation of each kind.

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; ``None`` as for :class:`GradientOptimizer`.
        row_normalization: Divide the rows of the direction of each matrix (the first axis, which counts outputs) by the
            root of their mean squares, averaged over the steps with this weight of the old value, and restore its norm:
            NorMuon's normalisation (:func:`~precond.gradient.rows.normalized_rows`), of which the paper has 0.95.
            ``None`` for none.
        defaults: Further options of the parameter groups, of the method's own.
        options: See :class:`GradientOptimizer`.
    """

    #: Words in the names of entries that :meth:`update` and :meth:`renew` replace: a step copies the others before it
    #: writes to them.
    kept: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor | None,
        row_normalization: float | None = None,
        defaults: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        defaults = {"row_normalization": row_normalization, **(defaults or {})}
        super().__init__(params, lr=lr, defaults=defaults, **options)

    def check(self, options: Group) -> None:
        super().check(options)
        number("row_normalization", options.get("row_normalization"), low=0, high=1, open_high=True, optional=True)

    def first_state(self, p: Tensor, group: Group) -> State:
        state, part = super().first_state(p, group), self.part(p, group)
        return state if self.diagonal(state) or not part.numel() else {**state, **row_state(part, group)}

    @abstractmethod
    def update(self, stack: Stack, g: Tensor, group: Group) -> Tensor:
        """Update the states with gradients and return the directions, both ``(k, *shape)``.

        Args:
            stack: The parameters and their states, which are to be changed in place: those of :attr:`kept` excepted,
                they are copies.
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
            stack.open(self.kept)
            directions = self.update(stack, stack.gather([gradients[i] for i in places]), group)
            if "row_sq" in stack.state:
                directions = directions.reshape(-1, *gradients[places[0]].shape)
                directions = normalized_rows(directions, stack.state, group)
            # A factor enters directions by way of its basis or root, which is looked at with them.
            self.written += [x for name, x in stack.close().items() if "factor" not in name.split(".")]
            out |= zip(places, directions.reshape(-1, *gradients[places[0]].shape), strict=True)
        return [out[i] for i in range(len(params))]

    def renew(self, stack: Stack, compute: Callable[[State], State], prefix: str = "") -> None:
        """Refresh what needs a decomposition; where one fails, only that parameter keeps its last good one.

        Args:
            stack: The parameters.
            compute: Returns the new entries of a stacked state.
            prefix: As for :meth:`refresh`.

        Raises:
            SolverError: As :meth:`refresh`.
        """
        try:
            new = compute(stack.state)
        except SolverError:
            for index, p in enumerate(stack.params):
                self.refresh(p, partial(stack.renew_part, index, compute), prefix)
            return
        stack.state.update({name: value.contiguous() for name, value in new.items()})
        for p in stack.params:
            self.state[p][f"{prefix}failures"] = 0
        self.events[REFRESHES] += len(stack.params)

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
        layouts = [self._layout(state) for state in states]
        keys = [(g.shape, layout, kind[1:]) for g, layout, kind in zip(gradients, layouts, kinds, strict=True)]
        stacks = [
            (
                places,
                Stack(
                    [params[i] for i in places], [states[i] for i in places], [name for name, *_ in layouts[places[0]]]
                ),
            )
            for places in alike(keys, [g.numel() for g in gradients])
        ]
        known[params[0]] = kinds, stacks
        return stacks

    def _layout(self, state: State) -> tuple[tuple[Any, ...], ...]:
        """Names, shapes, types and devices of the entries that :meth:`update` has to do with."""
        others = LATER - self.kept
        tensors = {name: x for name, x in state.items() if isinstance(x, Tensor) and not is_sharded(x)}
        return tuple((name, x.shape, x.dtype, x.device) for name, x in tensors.items() if name not in others)


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


def _own(value: Tensor) -> Tensor:
    """The tensor, in separate memory."""
    whole = value.untyped_storage().nbytes() == prod(value.shape) * value.itemsize
    return value if whole else value.clone()


def entries(state: State, name: str, ndim: int) -> dict[int, Tensor]:
    """The entries ``name.k`` of a state, by their axis k, for the axes that have one."""
    return {k: state[f"{name}.{k}"] for k in range(ndim) if f"{name}.{k}" in state}
