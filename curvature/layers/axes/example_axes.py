"""Where the examples lie in every activation of a forward pass, certain from the operations alone.

Every function call is noted with its arguments, as shapes and serial numbers. Which axis of which input counts the
examples is often known only when outputs and targets have been seen; :meth:`ExampleAxes.resolve` then interprets the
calls by the rules of this package, for as many readings of the inputs as are tried.

What a result says holds for the recorded calls. Where values decided in Python which calls are made, it holds given
those decisions. The statistics of a batch norm in train mode count as fixed. The backward of a custom
``autograd.Function`` is not looked at.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from curvature.layers.axes.calls import (
    ASSIGNING,
    CONSTANT,
    COPYING,
    EMPTY,
    EXPOSING,
    MIXED,
    RULES,
    SHAPES,
    SHARING,
    UNWRITTEN,
    Axis,
    Call,
    Handle,
    Iota,
    Items,
    Mask,
    Opaque,
    State,
    handles,
)
from curvature.model.moment import writes

_PLAIN = frozenset(
    (int, float, bool, str, complex, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)
)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_RECORDED = ASSIGNING | EXPOSING
_Log = list[tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Handle, ...]]]


def touched(tensor: Tensor) -> None:
    """Stands in the record for a change of a tensor that no recorded call explains."""


class ExampleAxes:
    """The calls of one forward pass, with what is needed to tell where the examples lie.

    Keeps no tensor of the pass alive. Tensors that exist before it are inputs (:meth:`start`) or constants; of one that
    is first seen as an argument nothing is known.

    Args:
        constants: Tensors that depend on no example (parameters, buffers), by ``id``. One mapping serves many passes.
    """

    def __init__(self, constants: Mapping[int, Tensor] | None = None) -> None:
        self._known_constants = constants or {}
        self._live: dict[int, Handle] = {}
        self._log: _Log = []
        self._count = 0
        self._constants: list[int] = []
        self._claims: dict[int, int] = {}
        self._inputs: list[tuple[Handle, int | None]] = []
        self._bumped: int | None = None
        self._resolved: tuple[int, Resolved] | None = None

    def start(self, tensor: Tensor, axis: int | None = 0) -> int:
        """Declare an input whose axis ``axis`` holds the examples, ``None`` where none does; returns its number."""
        self._inputs.append((self._new(tensor), axis))
        return len(self._inputs) - 1

    def constant(self, tensor: Tensor) -> None:
        """Declare a tensor that depends on no example."""
        self._constants.append(self._new(tensor).index)

    def claim(self, handle: Handle, axis: int) -> None:
        """Count the entries along an axis to the examples if they depend on none, as those of a repeated table do."""
        self._claims[handle.index] = axis

    def handle(self, tensor: Tensor) -> Handle:
        """The present value of a tensor, to ask for its state when the tensor may be gone."""
        known = self._live.get(id(tensor))
        if known is not None and known.ref() is tensor:
            if known.version == writes(tensor) and (known.grad or not tensor.requires_grad):
                return known
            new = self._new(tensor)
            if new.version == self._bumped:
                new.version -= 1  # as it was before the call that is being recorded
            self._log.append((touched, (known,), (), (new,)))
            return new
        new = self._new(tensor)
        if self._known_constants.get(id(tensor)) is tensor:
            self._constants.append(new.index)
        return new

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Record a call that has just been made."""
        single = type(output) is Tensor or isinstance(output, Tensor)
        if single:
            if id(output) in self._live:
                return self._call_again(func, args, kwargs, output)
        elif not isinstance(output, (tuple, list)):
            if func not in _RECORDED:
                return None
            if func in ASSIGNING:
                return self._call_again(func, args, kwargs, args[0])
        elif type(output) is torch.Size:
            return None
        frozen = self._frozen_index(args) if func in _INDEXING else self._frozen(args)
        named = tuple([(k, self._freeze(v)) for k, v in kwargs.items()]) if kwargs else ()
        self._log.append((func, frozen, named, (self._new(output),) if single else self._results(output)))
        return None

    def _call_again(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Record a call whose result is a tensor that may be known: changed in place, or handed through."""
        before = self._live.get(id(output))
        if before is not None and before.ref() is not output:
            before = None
        if before is None and func in ASSIGNING:
            before = self._new(output)
            before.version -= 1
        version = writes(output)
        if before is not None:
            if before.version != version:
                self._bumped = version
            # The argument is what it was: its version must not look like a change of unknown origin.
            seen, before.version = before.version, version
            grad, before.grad = before.grad, output.requires_grad
        frozen = self._frozen_index(args) if func in _INDEXING else self._frozen(args)
        named = tuple([(k, self._freeze(v)) for k, v in kwargs.items()]) if kwargs else ()
        self._bumped = None
        new = self._new(output)
        if before is not None:
            before.version, before.grad = seen, grad
            new.before = before
        self._log.append((func, frozen, named, (new,)))

    @property
    def batch(self) -> int | None:
        """Number of examples as the first input has it."""
        return next((h.shape[axis] for h, axis in self._inputs if axis is not None and len(h.shape) > axis), None)

    def of(self, tensor: Tensor | Handle) -> State:
        """State of a tensor with the inputs as they were declared."""
        if self._resolved is None or self._resolved[0] != len(self._log):
            self._resolved = len(self._log), self.resolve()
        return self._resolved[1].of(self.handle(tensor) if isinstance(tensor, Tensor) else tensor)

    def resolve(self, axes: Mapping[int, int | Axis | None] | None = None, batch: int | None = None) -> Resolved:
        """Interpret the calls.

        Args:
            axes: Axis of the examples by number of the input, where it is not the declared one.
            batch: Number of examples, by default :attr:`batch`.
        """
        axes = {i: axis for i, (_, axis) in enumerate(self._inputs)} | dict(axes or {})
        if batch is None:
            sizes = [self._inputs[i][0].shape[a] for i, a in axes.items() if isinstance(a, int)]
            batch = sizes[0] if sizes else 1
        states: list[State] = [MIXED] * self._count
        for index in self._constants:
            states[index] = CONSTANT
        for i, axis in axes.items():
            handle = self._inputs[i][0]
            state = CONSTANT if axis is None else axis if isinstance(axis, Axis) else Axis(axis % len(handle.shape))
            states[handle.index] = _fitting(state, handle.shape, batch)
        return Resolved(self, self._log, states, batch, self._claims)

    def _new(self, tensor: Tensor) -> Handle:
        index = self._count
        self._live[id(tensor)] = handle = Handle(
            weakref.ref(tensor), index, tensor.shape, writes(tensor), tensor.requires_grad
        )
        self._count = index + 1
        return handle

    def _results(self, output: Any) -> tuple[Handle, ...]:
        if isinstance(output, Tensor):
            return (self._new(output),)
        if isinstance(output, (tuple, list)):
            return tuple([handle for item in output for handle in self._results(item)])
        return ()

    def _frozen(self, items: Any) -> tuple[Any, ...]:
        """The items as a tuple, with handles in place of tensors; the usual kinds without a further call."""
        out: list[Any] = []
        live = self._live
        for item in items:
            kind = type(item)
            if kind is Tensor or kind is Parameter:
                known = live.get(id(item))
                if (
                    known is not None
                    and known.ref() is item
                    and known.version == writes(item)
                    and (known.grad or not item.requires_grad)
                ):
                    out.append(known)
                else:
                    out.append(self.handle(item))
            elif kind in _PLAIN:
                out.append(item)
            else:
                out.append(self._freeze(item))
        return tuple(out)

    def _freeze(self, item: Any) -> Any:
        kind = type(item)
        if isinstance(item, Tensor):
            return self.handle(item)
        if kind in _PLAIN:
            return item
        if isinstance(item, tuple):
            return self._frozen(item)
        if kind is list:
            return Items(self._frozen(item))
        if kind is slice:
            ends = [self._freeze(end) for end in (item.start, item.stop, item.step)]
            return slice(*ends) if all(e is None or type(e) is int for e in ends) else Opaque(slice)
        if hasattr(kind, "__index__"):
            return operator.index(item)
        inside = item.values() if isinstance(item, Mapping) else ()
        return Opaque(kind, tuple(handles(self._frozen(tuple(inside)))))

    def _frozen_index(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of indexing, in which boolean tensors mean something else than integers."""
        x, index, *rest = args
        return (self.handle(x), self._part(index), *self._frozen(rest))

    def _part(self, part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple([self._part(p) for p in part])
        frozen = self._freeze(part)
        return Mask(frozen) if type(frozen) is Handle and part.dtype in (torch.bool, torch.uint8) else frozen


class Resolved:
    """Where the examples lie, for one reading of the inputs.

    Attributes:
        batch: Number of examples.
    """

    def __init__(
        self, axes: ExampleAxes, log: _Log, states: list[State], batch: int, claims: Mapping[int, int]
    ) -> None:
        self.batch, self._claims = batch, claims
        self._axes, self._log, self._states = axes, log, states
        self._made: set[int] = set()  # memory that a factory gave, which others may have written to
        self._versions: dict[int, int] = {}  # after changes of the same memory through other tensors
        self._mates: dict[int, list[int]] = _sharing(log)
        self._seen = 0
        self._continue()

    def of(self, tensor: Tensor | Handle) -> State:
        """:data:`CONSTANT`, :class:`Axis` or :data:`MIXED`."""
        state = self._states[self._index(tensor)]
        return CONSTANT if isinstance(state, Iota) else MIXED if state is EMPTY else state

    def _index(self, tensor: Tensor | Handle) -> int:
        index = (self._axes.handle(tensor) if isinstance(tensor, Tensor) else tensor).index
        if index >= len(self._states):  # its present value is first looked at now
            self._states += [MIXED] * (index + 1 - len(self._states))
            self._continue()
        return index

    def _continue(self) -> None:
        """Interpret what was recorded since the last time."""
        for func, args, kwargs, outputs in self._log[self._seen :]:
            if func is touched:
                self._touched(args[0], outputs[0])
            else:
                self._interpret(Call(func, args, dict(kwargs) if kwargs else {}, outputs, self._states, self.batch))
        self._seen = len(self._log)

    def _interpret(self, call: Call) -> None:
        func, read = call.func, call.read
        if func in EXPOSING:
            for handle in read:
                if handle.index in self._made:
                    self._mix(handle)
        if not call.outputs:
            return
        for out, state in zip(call.outputs, self._results(call, read), strict=True):
            old = out.before
            if 0 in out.shape:
                state = CONSTANT
            elif state is CONSTANT and out.index in self._claims:
                state = Axis(self._claims[out.index])
            if old is not None and old.version != out.version:
                if out.version != self._versions.get(old.index, old.version) + 1:
                    state = MIXED
                changed = state is MIXED or self._states[old.index] != state
                for mate in self._mates.get(old.index, ()):
                    if mate < out.index:
                        self._versions[mate] = out.version
                        if changed and mate != old.index:  # the same axis lies elsewhere in another view
                            self._states[mate] = MIXED
            self._states[out.index] = _fitting(state, out.shape, call.batch)

    def _results(self, call: Call, read: Sequence[Handle]) -> list[State]:
        func, outputs = call.func, call.outputs
        n = len(outputs)
        if not read or (func in SHAPES and len(read) == 1):
            self._made.update(out.index for out in outputs)
            iota = func is torch.arange and _counts(call, outputs[0].shape[0])
            return [EMPTY if func in UNWRITTEN else Iota(0) if iota else CONSTANT] * n
        if func in SHARING and read[0].index in self._made:
            self._made.update(out.index for out in outputs)
        states = [self._states[h.index] for h in read]
        if EMPTY in states:
            if func in SHARING and len(read) == 1:
                return [EMPTY] * n
            if func is not Tensor.__setitem__ or EMPTY in states[1:]:
                return [MIXED] * n
            self._states[read[0].index], states[0] = CONSTANT, CONSTANT
        if MIXED in states:
            return [MIXED] * n
        if Axis in map(type, states):
            return self._by_rule(call)
        first = states[0]
        return self._counting(call, read[0], first) if isinstance(first, Iota) and _copies(call) else [CONSTANT] * n

    def _counting(self, call: Call, x: Handle, iota: Iota) -> list[State]:
        """Views of a constant that counts may count as well: along the axis where examples would lie."""
        states = [*self._states]
        states[x.index] = Axis(iota.axis)
        found = self._by_rule(Call(call.func, call.args, call.kwargs, call.outputs, states, x.shape[iota.axis]))
        return [Iota(s.axis) if isinstance(s, Axis) and (s.outer, s.inner) == (1, 1) else CONSTANT for s in found]

    def _by_rule(self, call: Call) -> list[State]:
        n = len(call.outputs)
        rule = RULES.get(call.func)
        try:
            found = MIXED if rule is None else rule(call)
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
            found = MIXED  # a form of the call that the rule does not know
        if not isinstance(found, list):
            return [found] * n  # type: ignore[list-item]
        return found if len(found) == n else [MIXED] * n

    def _touched(self, old: Handle, new: Handle) -> None:
        """A tensor was found changed: by calls on memory it shares, or by what nobody recorded."""
        state = self._states[old.index]
        explained = new.version == self._versions.get(old.index, old.version)
        if not explained or (new.grad and not old.grad and old.index in self._made and old.version == new.version):
            state = MIXED
        self._states[new.index] = state

    def _mix(self, handle: Handle) -> None:
        for index in {handle.index, *self._mates.get(handle.index, ())}:
            self._states[index] = MIXED


def _fitting(state: State, shape: tuple[int, ...], batch: int) -> State:
    """The state, or :data:`MIXED` where it contradicts the shape."""
    if not isinstance(state, Axis):
        return state
    fits = state.axis < len(shape) and shape[state.axis] == state.outer * batch * state.inner
    return state if fits else MIXED


def _counts(call: Call, size: int) -> bool:
    """Whether ``arange`` counts from zero in steps of one."""
    numbers = [a for a in (*call.args, *(call.kwargs[k] for k in ("start", "end", "step") if k in call.kwargs))]
    return numbers in ([size], [0, size], [0, size, 1])


def _copies(call: Call) -> bool:
    """Whether the entries of the results are those of the first argument, not rounded and not cut off."""
    types = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, torch.dtype)]
    return call.func in COPYING and all(t in (torch.int32, torch.int64) for t in types)


def _sharing(log: _Log) -> dict[int, list[int]]:
    """Values that may lie in the same memory, by serial number; empty where nothing is changed in place."""
    exposed = any(func in EXPOSING for func, *_ in log)
    if not exposed and not any(o.before is not None and o.before.version != o.version for *_, out in log for o in out):
        return {}
    groups: dict[int, list[int]] = {}
    for func, args, kwargs, outputs in log:
        arguments: list[Handle] = []
        if func is touched or func not in RULES:
            arguments = [*handles(args), *handles(v for _, v in kwargs)]
        elif func in SHARING:
            arguments = [*handles(args)][:1]
        for out in outputs:
            shared = arguments + ([out.before] if out.before is not None else [])
            for handle in shared if func not in SHAPES else ():
                _join(groups, out.index, handle.index)
    return groups


def _join(groups: dict[int, list[int]], a: int, b: int) -> None:
    first, second = groups.setdefault(a, [a]), groups.setdefault(b, [b])
    if first is not second:
        small, large = sorted((first, second), key=len)
        large += small
        for index in small:
            groups[index] = large
