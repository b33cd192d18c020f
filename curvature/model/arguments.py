"""Arguments of the public functions, checked before anything is computed, by one table of the names that recur.

A name means the same at every door, so it is checked by the same function: those of :data:`COMMON`, beside which a door
names the checks of its own options. A door whose options are not all checked cannot be made.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.model.data import is_one_batch, split_batch
from curvature.model.streams import outside_of_inference
from solvers.outcome.arguments import choice, flag, function, instance, number, whole

P = ParamSpec("P")
R = TypeVar("R")
#: Takes the name of an argument and its value, and refuses what the argument cannot mean.
Check = Callable[[str, Any], Any]


def checked(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A door: a function that checks its arguments by their names, and is then called.

    Args:
        own: Checks of the door's own options, or in place of those in :data:`COMMON`. Further keywords that the
            function takes by ``**options`` are checked where a name is known.

    Raises:
        TypeError: Where it is made, if an argument has no check.
    """
    checks = {**COMMON, **own}

    def door(called: Callable[P, R]) -> Callable[P, R]:
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(called).parameters.values()
        names = [p.name for p in parameters if p.kind not in variadic]
        alone = "process_group" not in names and all(p.kind != inspect.Parameter.VAR_KEYWORD for p in parameters)
        if missing := [name for name in names if name not in checks and name != "self"]:
            raise TypeError(f"{called.__qualname__} does not check {', '.join(missing)}.")

        @functools.wraps(called)
        def checking(*args: P.args, **kwargs: P.kwargs) -> R:
            shared = kwargs.get("process_group") is not None  # then a process may have no data at all
            if alone and "process_group" in kwargs:
                raise TypeError(_of_one_process(called.__qualname__))
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if name in checks and not (shared and name == "data" and isinstance(value, list) and not value):
                    checks[name](name, value)
            with outside_of_inference():
                return called(*args, **kwargs)

        return checking

    return door


def _of_one_process(name: str) -> str:
    name = name.removesuffix(".__init__")
    return (
        f"{name} works on the data of one process and takes no process_group=. Call it with the data of this process "
        "alone. Over processes there are hessian, ggn, fisher, gradient_covariance (and what solvers makes of them), "
        "gradient_second_moment, gradient_variance, influence, self_influence, report and the posteriors of "
        "curvature.laplace."
    )


def optional(check: Check) -> Check:
    """The same check, and ``None``."""
    return lambda name, value: None if value is None else check(name, value)


def anything(name: str, value: Any) -> Any:
    """No check here: the function itself says what the argument may be, before it computes anything."""
    return value


def count(low: int = 1) -> Check:
    """A whole number of at least ``low``."""
    return lambda name, value: whole(name, value, low=low)


def real(**limits: Any) -> Check:
    """A number in a range, see :func:`solvers.outcome.arguments.number`."""
    return lambda name, value: number(name, value, **limits)


def one_of(words: Any) -> Check:
    """One of the values of a ``Literal``."""
    return lambda name, value: choice(name, value, words)


def a(kind: type | tuple[type, ...], words: str) -> Check:
    """An object of a class, which the words name."""
    return lambda name, value: instance(name, value, kind, words)


def several(kind: type, words: str) -> Check:
    """A sequence of objects of a class, or a mapping to objects or to sequences of them."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
            raise TypeError(f"{name} holds {words}, not {_short(value)}.")
        for entry in value.values() if isinstance(value, Mapping) else value:
            for one in entry if isinstance(entry, Sequence) and isinstance(value, Mapping) else [entry]:
                instance(f"each of {name}", one, kind, words)
        return value

    return check


def module(name: str, value: Any) -> Any:
    """A model."""
    instance(name, value, nn.Module, "a torch.nn.Module")
    if isinstance(value, nn.modules.loss._Loss):
        raise TypeError(f"{name} is the model, not the loss {value!r}. The order is model, loss_fn, data.")
    return value


def data(name: str, value: Any) -> Any:
    """One batch ``(x, y)`` or an iterable of batches; only lists and tuples are looked into."""
    sort = "one batch (x, y) or an iterable of batches such as a list or a DataLoader"
    # A Sequential is iterable, and so are tensors and strings.
    if isinstance(value, (nn.Module, Tensor, str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {sort}, not {_short(value)}.")
    if type(value) in (list, tuple) and not is_one_batch(value):  # a subclass may load its batches as it is read
        if not value:
            raise ValueError(f"{name} has no batches: is it a list that nothing was put into?")
        for entry in value:
            if not (isinstance(entry, Mapping) or (isinstance(entry, (list, tuple)) and len(entry) == 2)):
                try:
                    split_batch(entry)
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from None
    return value


def batch(name: str, value: Any) -> Any:
    """One batch ``(x, y)``; the function itself says what to do with several."""
    if isinstance(value, (nn.Module, Tensor, str, bytes, Number)) or not value:
        raise TypeError(f"{name} is one batch (x, y), not {'empty' if value == [] else f'a {type(value).__name__}'}.")
    return value


def group(name: str, value: Any) -> Any:
    """Processes of torch.distributed, or ``None``."""
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(f"{name} is a process group such as torch.distributed.group.WORLD, not {_short(value)}.")
    return value


def inputs(name: str, value: Any) -> Any:
    """Inputs of a model: tensors, tuples or mappings of them, or objects of the user's."""
    if value is None or isinstance(value, (nn.Module, Number, str, bytes)) or (value == [] and isinstance(value, list)):
        raise TypeError(f"{name} holds inputs of the model, such as a tensor, not {_short(value)}.")
    return value


def restriction(name: str, value: Any) -> Any:
    """Names, globs, parameters or modules, or an iterable of them; which of them exist, the model says."""
    single = (str, Tensor, nn.Module)
    entries = value if isinstance(value, (list, tuple, set, frozenset)) else ()
    wrong = [entry for entry in entries if not isinstance(entry, single)]
    if value is not None and not isinstance(value, (*single, Iterable)):
        wrong = [value]
    if wrong:
        raise TypeError(f"{name} takes names, globs, parameters or modules, not {_short(wrong[0])}.")
    return value


def axes(name: str, value: Any) -> Any:
    """An axis, several by the keys of a sum of losses, or None."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            whole(f"{name}[{key!r}]", entry, low=-(2**62))
        return value
    return whole(name, value, low=-(2**62), optional=True)


def path(name: str, value: Any) -> Any:
    """A path."""
    if value == "" or not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is a path, not {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 and not isinstance(value, Tensor) else f"a {type(value).__name__}"


#: Names that mean the same at every door.
COMMON: dict[str, Check] = {
    "model": module,
    "data": data,
    "batch": batch,
    "x": inputs,
    "params": restriction,
    "output": lambda name, value: function(name, value, optional=True),
    "class_dim": axes,
    "batch_dim": axes,
    "keep_graph": lambda name, value: flag(name, value, optional=True),
    "progress": lambda name, value: flag(name, value, optional=True),
    "process_group": group,
    "generator": optional(a(torch.Generator, "a torch.Generator")),
    "seed": count(-(2**63) + 1),
    "memory": count(),
    "k": count(),
    "max_products": count(),
    "rtol": real(low=0.0),
}
