"""Calls of a recorded pass, where the examples lie in their arguments, and the registry of rules for results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(Enum):
    """States without an axis."""

    CONSTANT = "depends on no example"
    EMPTY = "memory nobody has written yet"
    MIXED = "entries may depend on several examples"


CONSTANT, EMPTY, MIXED = Kind.CONSTANT, Kind.EMPTY, Kind.MIXED


@dataclass(frozen=True)
class Axis:
    """Axis ``axis`` has ``outer * N * inner`` entries, the example is the middle index.

    Every entry of the tensor depends on its own example at most.
    """

    axis: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Iota:
    """A constant whose entries are their index along ``axis``, as ``arange(n)[:, None]``."""

    axis: int


State = Kind | Axis | Iota
#: Axis labels of a tensor, in the order of its axes.
Labels = Sequence[Any]


class Handle:
    """One value of one tensor in a recorded pass; holds no memory of it.

    Attributes:
        ref: Weak reference to the tensor.
        index: Serial number in the pass.
        shape: Shape of the tensor.
        version: Its version counter when it was seen.
        grad: Whether it required gradients then.
        before: What the same tensor was before, where a function returned one of its arguments.
    """

    __slots__ = ("before", "grad", "index", "ref", "shape", "version")

    def __init__(self, ref: Callable[[], Any], index: int, shape: tuple[int, ...], version: int, grad: bool) -> None:
        self.ref, self.index, self.shape, self.version, self.grad = ref, index, shape, version, grad
        self.before: Handle | None = None


class Items(tuple[Any, ...]):
    """A list among the arguments; in an index it means something else than a tuple."""

    __slots__ = ()


@dataclass(frozen=True)
class Mask:
    """A boolean tensor in an index."""

    handle: Handle


@dataclass(frozen=True)
class Opaque:
    """An argument that is not looked into, with the tensors found in it."""

    kind: type
    handles: tuple[Handle, ...] = ()


def handles(tree: Any) -> Iterator[Handle]:
    """All tensors among frozen arguments."""
    for item in tree:
        kind = type(item)
        if kind is Handle:
            yield item
        elif kind is tuple or kind is Items:
            yield from handles(item)
        elif kind is Mask:
            yield item.handle
        elif kind is Opaque:
            yield from item.handles


class Call:
    """A recorded call during interpretation: its arguments, results, and the states of the former."""

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: tuple[Handle, ...],
        states: Sequence[State],
        batch: int,
    ) -> None:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        self.func, self.args, self.kwargs, self.outputs, self.batch = func, args, kwargs, outputs, batch
        self._states = states

    def state(self, handle: Any) -> State:
        """State of an argument; whatever is no tensor is constant."""
        if type(handle) is not Handle:
            return CONSTANT
        state = self._states[handle.index]
        return CONSTANT if type(state) is Iota else state

    def iota(self, handle: Handle) -> Iota | None:
        """The axis along which a constant counts."""
        state = self._states[handle.index]
        return state if type(state) is Iota else None

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def bound(self) -> dict[str, Any]:
        """Arguments by name, for functions written in Python."""
        signature = inspect.signature(self.func)
        bound = signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @cached_property
    def read(self) -> tuple[Handle, ...]:
        """The tensor arguments that the results depend on: all but ``out`` and those that are only written."""
        found = tuple(handles(self.args))
        if self.kwargs:
            found += tuple(handles(v for k, v in self.kwargs.items() if k != "out"))
        unread = UNREAD[self.func](self) if self.func in UNREAD else ()
        return tuple([h for h in found if not any(h is u for u in unread)]) if unread else found

    def besides(self, *named: Any) -> tuple[Handle, ...]:
        """The tensors it reads without those named; one that is given twice is named once."""
        rest = [*self.read]
        for handle in named:
            at = next((i for i, h in enumerate(rest) if h is handle), None)
            if at is not None:
                del rest[at]
        return tuple(rest)

    def constant(self, *items: Any) -> bool:
        """Whether none of the arguments depends on an example."""
        return all(self.state(h) is CONSTANT for h in handles(items))


Result = State | Sequence[State]
Rule = Callable[[Call], Result]

#: Function -> rule.
RULES: dict[Any, Rule] = {}
#: Functions whose results may share memory with an argument.
SHARING: set[Any] = set()
#: Functions whose results are the entries of their first argument.
COPYING: set[Any] = set()
#: Functions whose results look at no values of their arguments.
SHAPES: set[Any] = set()
#: Functions that give memory nobody has written.
UNWRITTEN: set[Any] = set()
#: Arguments that a call writes but does not read.
UNREAD: dict[Any, Callable[[Call], tuple[Any, ...]]] = {}
#: Functions through which memory is handed to code that no function mode sees.
EXPOSING: set[Any] = set()
#: Functions without a result that change their first argument.
ASSIGNING: set[Any] = {
    Tensor.__setitem__,
    *(vars(torch._C.TensorBase)[name].__set__ for name in ("data", "real", "imag")),
}

PLACES = (torch, Tensor, F, torch._C._nn, torch._C._VariableFunctions)


def functions(names: str, places: Iterable[Any] = PLACES) -> list[Any]:
    """All functions of these names in torch's namespaces; ``+`` after a name adds its in-place variant."""
    found = []
    for name in names.split():
        variants = (name[:-1], f"{name[:-1]}_") if name.endswith("+") else (name,)
        found += [getattr(place, v) for place in places for v in variants if callable(getattr(place, v, None))]
    return found


def getters(names: str) -> list[Any]:
    """Getters of properties of tensors, as function modes report them."""
    return [vars(torch._C.TensorBase)[name].__get__ for name in names.split()]


def dunders(names: str) -> list[Any]:
    """Operators of tensors."""
    return [f for name in names.split() if (f := getattr(Tensor, f"__{name}__", None)) is not None]


def rule(names: str, *more: Any, sharing: bool = False, places: Iterable[Any] = PLACES) -> Callable[[Rule], Rule]:
    """Register a rule for the functions of these names."""

    def register(f: Rule) -> Rule:
        found = [*functions(names, places), *more]
        RULES.update(dict.fromkeys(found, f))
        if sharing:
            SHARING.update(found)
        return f

    return register


def contract(call: Call, out: Labels, *operands: tuple[Any, Labels], shape: Sequence[int] | None = None) -> State:
    """State of a result with axes ``out``, of operands with their axes: sums, products, softmax over the rest."""
    shape = call.outputs[0].shape if shape is None else shape
    found: State = CONSTANT
    for handle, labels in operands:
        state = call.state(handle)
        if state is CONSTANT:
            continue
        if not isinstance(state, Axis) or len(labels) != len(handle.shape) or labels[state.axis] not in out:
            return MIXED
        place = list(out).index(labels[state.axis])
        if place >= len(shape) or shape[place] != handle.shape[state.axis]:
            return MIXED
        mapped = Axis(place, state.outer, state.inner)
        if found not in (CONSTANT, mapped):
            return MIXED
        found = mapped
    return found


def right(handle: Handle, width: int) -> Labels:
    """Labels of a tensor that broadcasts into one with ``width`` axes."""
    return range(width - len(handle.shape), width)


def broadcast(call: Call, items: Iterable[Any], shape: Sequence[int]) -> State:
    """State of an elementwise function of these."""
    width = len(shape)
    tensors = list(handles(items))
    if any(len(h.shape) > width for h in tensors):
        return MIXED
    return contract(call, range(width), *((h, right(h, width)) for h in tensors), shape=shape)


def axis_of(call: Call, handle: Any) -> Axis | None:
    """The example axis of an argument, ``None`` for a constant."""
    state = call.state(handle)
    return state if isinstance(state, Axis) else None


def dims_of(value: Any, ndim: int) -> tuple[int, ...] | None:
    """Axes named by a ``dim`` argument, counted from the left; ``None`` where it names none."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        value = (value,)
    if not isinstance(value, tuple) or not all(type(d) is int for d in value):
        return None
    return tuple(d % max(ndim, 1) for d in value)
