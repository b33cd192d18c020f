"""Products in a backward pass of which nobody reads the numbers, and which therefore need not be taken.

Where a gradient is differentiated once more, the pass that makes it is run for its graph: second derivatives take the
activations and the output gradients that the graph holds, and the gradients of the weights themselves are thrown away.
They are a third of a plain gradient's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.model.hooks import nothing
from curvature.model.trees import tensors_in

_aten = torch.ops.aten
#: Types of tensors that are memory and nothing else.
_TYPES = Tensor, nn.Parameter
#: Entries of the least result that is put off: of smaller ones the look for readers would cost what is saved.
LEAST = 1 << 14


class Unread(TorchDispatchMode):
    """Takes products when something reads them: any operation, but for those that only look at memory in another way.

    Inside of a backward pass with ``create_graph``. The graph is that of the products; numbers that are read are those
    they would be, to the bit. Nothing may read memory past torch's operations, as custom functions do by NumPy.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, _Waiting] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler, for seconds, to keep it away from the method below."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no call of the user's
            if self._waiting and not func.is_view:
                self._read(tensors_in((args, kwargs)))
            put_off = None if kwargs else _PUT_OFF.get(func)
            if put_off is None or not all(map(_is_plain, tensors_in(args))):
                return func(*args, **(kwargs or {}))
            results, waiting = put_off(args)
            self._waiting.update((_memory(w), entry) for entry in waiting for w in entry.results)
            return results

    def close(self, results: Iterable[Tensor | None]) -> None:
        """Take what is left, but for what these tensors hold, whose numbers nobody will read."""
        with torch._C.DisableTorchFunction():
            for result in tensors_in(list(results)):
                if _is_plain(result):
                    self._waiting.pop(_memory(result), None)
            self._take_all()

    def _take_all(self) -> None:
        for entry in list(self._waiting.values()):
            entry.take()
        self._waiting.clear()

    def _read(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) not in _TYPES:  # one of those that wait may be in it
                self._take_all()
                return
            entry = self._waiting.get(_memory(tensor)) if tensor.layout == torch.strided else None
            if entry is not None:
                for result in entry.results:
                    self._waiting.pop(_memory(result), None)
                entry.take()


class _Waiting:
    """A function that writes its results when it is taken."""

    def __init__(self, results: list[Tensor], write: Callable[[list[Tensor]], object]) -> None:
        self.results, self._write = results, write

    def take(self) -> None:
        """Let the results have their numbers; once."""
        write, self._write = self._write, nothing
        write(self.results)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _TYPES and tensor.layout == torch.strided


_Put = tuple[Any, list[_Waiting]]


def _product(args: tuple[Tensor, Tensor]) -> _Put:
    a, b = args
    if a.shape[0] * b.shape[1] < LEAST or a.dtype != b.dtype:
        return _aten.mm.default(a, b), []
    out = a.new_empty(a.shape[0], b.shape[1])
    return out, [_Waiting([out], lambda results: _aten.mm.out(a, b, out=results[0]))]


def _rows(args: tuple[Any, ...]) -> _Put:
    gradient, _, number, *_ = args
    if number * gradient.shape[-1] < LEAST:
        return _aten.embedding_dense_backward.default(*args), []
    out = gradient.new_empty(number, gradient.shape[-1])
    return out, [_Waiting([out], lambda results: results[0].copy_(_aten.embedding_dense_backward.default(*args)))]


def _convolution(args: tuple[Any, ...]) -> _Put:
    """The gradient of the input at once, those of weight and bias, which are made together, when they are read."""
    *rest, mask = args
    weight, sizes = args[2], args[3]
    if not mask[1] or weight.numel() < LEAST:
        return _aten.convolution_backward.default(*args), []
    shapes = weight.shape, sizes if mask[2] else None
    own = [None if shape is None else weight.new_empty(shape) for shape in shapes]
    of_input = _aten.convolution_backward.default(*rest, [True, False, False])[0] if mask[0] else None

    def write(results: list[Tensor]) -> None:
        found = _aten.convolution_backward.default(*rest, [False, *mask[1:]])
        for result, made in zip(results, found[1:], strict=False):
            result.copy_(made)

    return (of_input, *own), [_Waiting([t for t in own if t is not None], write)]


#: Operations -> what they return at once, and what waits.
_PUT_OFF: dict[Any, Callable[[Any], _Put]] = {
    _aten.mm.default: _product,
    _aten.embedding_dense_backward.default: _rows,
    _aten.convolution_backward.default: _convolution,
}
