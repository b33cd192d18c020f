"""Arguments checked where they are given: what has another type or range is refused by the option's name.

Each function returns the value, so that a check can stand where the value is used. Of a wrong type is a ``TypeError``,
out of range a ``ValueError``; True and False are no numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

T = TypeVar("T")

#: Whole numbers end here, as torch's do.
_MOST = 2**63 - 1


def number(
    name: str,
    value: Any,
    *,
    low: float = -inf,
    high: float = inf,
    open_low: bool = False,
    open_high: bool = False,
    optional: bool = False,
    tensor: bool = False,
    unit: str = "",
) -> Any:
    """A finite real number in a range, given as a number.

    Args:
        name: Name of the argument.
        value: What was given.
        low: Least value.
        high: Largest value.
        open_low: Whether ``low`` itself is refused.
        open_high: Whether ``high`` itself is refused.
        optional: Whether None is allowed.
        tensor: Whether a 0-d tensor is allowed; one that is not on the CPU is not read.
        unit: A sentence to end the message.
    """
    if value is None and optional:
        return value

    def message() -> str:
        return _message(name, _sort(low, high, open_low, open_high, optional, tensor), value, unit)

    if type(value) is float:  # nearly always, and abstract classes take long to tell
        read = value
    elif isinstance(value, Tensor):
        if not tensor or value.dtype == torch.bool or value.is_complex():
            raise TypeError(message())
        if value.ndim:
            raise ValueError(message())
        if value.device.type != "cpu":
            return value
        read = float(value)
    elif not isinstance(value, bool) and isinstance(value, Real):
        try:
            read = float(value)
        except OverflowError:
            read = inf
    else:
        raise TypeError(message())
    above = low < read if open_low else low <= read
    below = read < high if open_high else read <= high
    if not (isfinite(read) and above and below):
        raise ValueError(message())
    return value


def whole(name: str, value: Any, *, low: int = 1, optional: bool = False) -> Any:
    """A whole number of at least ``low``, given as an int.

    Args:
        name: Name of the argument.
        value: What was given.
        low: Least value.
        optional: Whether None is allowed.
    """
    if value is None and optional:
        return value
    sort = f"a whole number of at least {low}{', or None' if optional else ''}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(_message(name, sort, value))
    if not low <= int(value) <= _MOST:
        raise ValueError(
            f"{name} is at least {low}{' and below 2^63' if int(value) > _MOST else ''}, not {_shown(value)}."
        )
    return value


def flag(name: str, value: Any, *, optional: bool = False) -> Any:
    """True or False.

    Args:
        name: Name of the argument.
        value: What was given.
        optional: Whether None is allowed.
    """
    if not isinstance(value, bool) and not (value is None and optional):
        raise TypeError(_message(name, "True, False or None" if optional else "True or False", value))
    return value


def choice(name: str, value: Any, of: Any, *, optional: bool = False) -> Any:
    """One of the values of a ``Literal``, or of some others.

    Args:
        name: Name of the argument.
        value: What was given.
        of: The ``Literal``, or the values.
        optional: Whether None is allowed.
    """
    values = get_args(of) or tuple(of)
    if value is None and optional:
        return value
    if not isinstance(value, str) or value not in values:
        others = " or None" if optional else ""
        raise ValueError(f"{name} is one of {', '.join(map(str, values))}{others}, not {_shown(value)}.")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...], example: str, *, optional: bool = False) -> Any:
    """An object of a class.

    Args:
        name: Name of the argument.
        value: What was given.
        kind: The class, or several.
        example: What is expected, in words.
        optional: Whether None is allowed.
    """
    if not isinstance(value, kind) and not (value is None and optional):
        raise TypeError(_message(name, f"{example}{', or None' if optional else ''}", value))
    return value


def function(name: str, value: Any, *, optional: bool = False) -> Any:
    """Something that can be called.

    Args:
        name: Name of the argument.
        value: What was given.
        optional: Whether None is allowed.
    """
    if not callable(value) and not (value is None and optional):
        raise TypeError(_message(name, f"a function{', or None' if optional else ''}", value))
    return value


def real_tensor(name: str, value: Any, *, optional: bool = False) -> Any:
    """A real floating-point tensor.

    Args:
        name: Name of the argument.
        value: What was given.
        optional: Whether None is allowed.
    """
    if value is None and optional:
        return value
    if not isinstance(value, Tensor):
        raise TypeError(_message(name, "a tensor", value))
    if not value.is_floating_point():
        raise TypeError(f"{name} is a real floating-point tensor, not {value.dtype}.")
    return value


def shape(name: str, value: Any) -> tuple[int, ...]:
    """A shape: a tuple of whole numbers of at least 0.

    Args:
        name: Name of the argument.
        value: What was given.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, Tensor)):
        raise TypeError(_message(name, "a shape such as (3, 4)", value))
    sizes = tuple(value)
    for size in sizes:
        whole(f"each size of {name}", size, low=0)
    return sizes


def device(name: str, value: Any, *, optional: bool = False) -> Any:
    """A device, or what names one; as a :class:`torch.device`, or None.

    Args:
        name: Name of the argument.
        value: What was given.
        optional: Whether None is allowed.
    """
    if value is None and optional:
        return value
    if not isinstance(value, (torch.device, str, int)) or isinstance(value, bool):
        raise TypeError(_message(name, "a torch.device or the name of one, such as 'cpu'", value))
    try:
        return torch.device(value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is a torch.device or the name of one, such as 'cpu', not {_shown(value)}.") from error


def all_of(name: str, values: Any, check: Callable[[str, Any], T]) -> tuple[T, ...]:
    """A sequence whose entries pass a check.

    Args:
        name: Name of the argument.
        values: What was given.
        check: The check of an entry, by its name.
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, Tensor)):
        raise TypeError(_message(name, "a sequence", values))
    return tuple(check(f"each of {name}", value) for value in values)


def fields_of(made: Any) -> None:
    """Check the fields of a dataclass whose annotation is a plain type: numbers, whole numbers, flags and words.

    Ranges are the class's own to check.

    Args:
        made: An instance, as it is made.
    """
    for field in dataclasses.fields(made):
        value, kinds = getattr(made, field.name), [kind.strip() for kind in str(field.type).split("|")]
        if value is None and "None" in kinds:
            continue
        match kinds[0]:
            case "Scheduled" | "ScheduledInt" if callable(value):
                pass
            case "float" | "Scheduled":
                number(field.name, value)
            case "int" | "ScheduledInt":
                whole(field.name, value, low=-_MOST)
            case "bool":
                flag(field.name, value)
            case _ if isinstance(field.default, str):
                instance(field.name, value, str, "a string")


def _sort(low: float, high: float, open_low: bool, open_high: bool, optional: bool, tensor: bool) -> str:
    bounds = []
    if low > -inf:
        bounds.append(f"{'above' if open_low else 'at least'} {low:g}")
    if high < inf:
        bounds.append(f"{'below' if open_high else 'at most'} {high:g}")
    kind = "a finite number or 0-d tensor" if tensor else "a finite number"
    return " ".join([kind, " and ".join(bounds)]).strip() + (", or None" if optional else "")


def _message(name: str, sort: str, value: Any, unit: str = "") -> str:
    return f"{name} is {sort}, not {_shown(value)}.{' ' if unit else ''}{unit}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if value.numel() != 1 else repr(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... of type {type(value).__name__}"
