"""The input of a command: a model, a loss and data, from a function of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from curvature.model.data import is_one_batch, map_tensors
from solvers.outcome.memory import is_out_of_memory

#: Keywords of the library's functions that a source may add.
OPTIONS = ("params", "output", "class_dim", "batch_dim")
_EXPECTED = (
    "(model, loss_fn, data), or a dict with the keys 'model', 'loss_fn', 'data' and, where needed, "
    f"{', '.join(map(repr, OPTIONS))}"
)


class UsageError(Exception):
    """The request makes no sense; the message says what does."""


@dataclass(frozen=True)
class Source:
    """A loss over data, as a function of a model's parameters.

    Attributes:
        name: Where it came from.
        model: The model.
        loss_fn: The loss.
        data: One batch or a re-iterable of batches.
        options: ``params``, ``output``, ``class_dim`` and ``batch_dim``, as far as they were given.
    """

    name: str
    model: nn.Module
    loss_fn: Any
    data: Any
    options: dict[str, Any]

    def to(self, device: str | None, dtype: torch.dtype | None) -> Source:
        """The same on another device and in another precision; the data follow batch by batch."""
        for module in (self.model, self.loss_fn):
            if isinstance(module, nn.Module):
                try:
                    module.to(device=device, dtype=dtype)
                except (RuntimeError, AssertionError) as error:
                    if is_out_of_memory(error):
                        raise
                    raise UsageError(f"the model cannot go to device {device!r}: {_first_line(error)}") from error
        data = self.data if dtype is None else _Converted.of(self.data, dtype)
        return Source(self.name, self.model, self.loss_fn, data, self.options)


def load(place: str) -> Source:
    """Import a function, call it, and look at what it returns.

    Args:
        place: ``module:function`` or ``path/to/file.py:function``; modules are looked for in the current folder first.

    Raises:
        UsageError: If the function is missing, raises, or returns something else.
    """
    where, colon, name = place.rpartition(":")
    if not (colon and where and name.isidentifier()):
        raise UsageError(f"{place!r} names no function: write module:function or path/to/file.py:function.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _from_file(where) if where.endswith(".py") else _from_path(where)
    function = getattr(module, name, None)
    if function is None:
        raise UsageError(f"{where} has no function {name!r}; {_offered(module)}.")
    if not callable(function):
        raise UsageError(f"{place} is a {type(function).__name__}, not a function that returns {_EXPECTED}.")
    try:
        returned = function()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{place} raised {type(error).__name__}: {_first_line(error)}") from error
    return _checked(place, returned)


def _checked(place: str, returned: Any) -> Source:
    if isinstance(returned, Mapping):
        known = {"model", "loss_fn", "data", *OPTIONS}
        if missing := [key for key in ("model", "loss_fn", "data") if key not in returned]:
            raise UsageError(f"{place} returned a dict without {missing[0]!r}; expected {_EXPECTED}.")
        if unknown := [key for key in returned if key not in known]:
            raise UsageError(f"{place} returned a dict with the key {unknown[0]!r}; expected {_EXPECTED}.")
        parts = dict(returned)
    elif isinstance(returned, (tuple, list)) and len(returned) == 3:
        parts = dict(zip(("model", "loss_fn", "data"), returned, strict=True))
    else:
        length = f" of length {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise UsageError(f"{place} returned a {type(returned).__name__}{length}; expected {_EXPECTED}.")
    model, loss_fn, data = (parts.pop(key) for key in ("model", "loss_fn", "data"))
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model that {place} returned is a {type(model).__name__}, not a torch.nn.Module.")
    if not callable(loss_fn):
        raise UsageError(f"the loss that {place} returned is a {type(loss_fn).__name__}, which cannot be called.")
    if isinstance(data, Iterator):
        raise UsageError(
            f"the data that {place} returned are a one-shot iterator ({type(data).__name__}), but several passes over "
            "them are needed; return one batch (x, y), a list of batches or a DataLoader."
        )
    if isinstance(data, (str, Tensor)) or not isinstance(data, Iterable):
        raise UsageError(
            f"the data that {place} returned are a {type(data).__name__}, not one batch (x, y), a list of batches or a "
            "DataLoader."
        )
    return Source(place, model, loss_fn, data, {key: value for key, value in parts.items() if value is not None})


def _from_path(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {error.name!r} in the current folder or among the installed ones; a file is named "
                "by its path, as in path/to/file.py:function."
            ) from error
        raise UsageError(f"{name} could not be imported: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{name} could not be imported: {type(error).__name__}: {_first_line(error)}") from error


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"there is no file {place}.")
    spec = importlib.util.spec_from_file_location(f"_source_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes of the file look up their module there
    sys.path.insert(0, str(path.parent.resolve()))  # for modules beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{place} could not be run: {type(error).__name__}: {_first_line(error)}") from error
    return module


def _offered(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Callable) and getattr(value, "__module__", None) == module.__name__ and name[0] != "_"  # type: ignore[arg-type]
    ]
    return f"it has {', '.join(own[:8])}" if own else "it has none at all"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


class _Converted:
    """Batches with their floating-point tensors in another precision."""

    def __init__(self, batches: Iterable[Any], dtype: torch.dtype) -> None:
        self.batches, self.dtype = batches, dtype

    @classmethod
    def of(cls, data: Any, dtype: torch.dtype) -> Any:
        return cls([data], dtype)._one(data) if is_one_batch(data) else cls(data, dtype)

    def __iter__(self) -> Iterator[Any]:
        return map(self._one, self.batches)

    def _one(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t.to(self.dtype) if t.is_floating_point() else t)
