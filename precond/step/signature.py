"""Constructors that editors complete and ``help()`` shows whole, and that refuse unknown options by name."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from inspect import Parameter, Signature
from typing import Any, ForwardRef

from torch import nn

from precond.step.calls import mistake
from precond.step.other_names import counterpart
from precond.step.renamed import fold


def announced(cls: type) -> type:
    """Show all parameters of a class's constructor in its signature, and let it refuse others by name.

    ``**options: Unpack[SomeTypedDict]`` stands for the keys of the dictionary, with the defaults that a base class has
    for them; ``**options`` of any other type for all keywords of the base class.

    The names of the options that a user gives are kept as ``given``: one that another overrides is refused, a default
    is not.
    """
    init = vars(cls).get("__init__")
    if init is None:
        return cls
    signature, own = _expanded(cls, init), inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **options: Any) -> None:
        outermost = "given" not in vars(self)  # which the user calls
        if outermost and (wrong := mistake(type(self), own, args, options)):
            raise TypeError(wrong)
        options = fold(type(self), signature, options)
        if unknown := [name for name in options if name not in signature.parameters]:
            raise TypeError(refusal(type(self).__name__, unknown, signature.parameters))
        try:
            own.bind(self, *args, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}. {_usage(type(self).__name__, own, args)}") from None
        if outermost:
            self.given = frozenset(options)
        init(self, *args, **options)

    this = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    wrapper.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
    cls.__init__ = wrapper  # type: ignore[misc]
    cls.__signature__ = signature  # type: ignore[attr-defined]
    return cls


def refusal(method: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """The message about keywords that a method does not have.

    Args:
        method: Name of the class that was called.
        unknown: The keywords.
        known: Names of its own parameters.
    """
    known = list(known)
    hints = []
    for name in unknown:
        hint = counterpart(name, known)
        if hint is None:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}."
        hints.append(hint)
    return f"{method} has no option {' '.join(hints)} Its parameters are {', '.join(known)}."


def _usage(method: str, own: Signature, args: tuple[Any, ...]) -> str:
    """How a method is called, with all that has no default."""
    _, *needed = (p for p in own.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    call = ", ".join(f"{p.name}=..." if p.kind is p.KEYWORD_ONLY else p.name for p in needed)
    message = f"Call {method}({call})"
    if args and needed[0].annotation == "nn.Module" and not isinstance(args[0], nn.Module):
        message += f", with the model itself, not {type(args[0]).__name__} (such as model.parameters())"
    return f"{message}; options are given by name."


def _expanded(cls: type, init: Callable[..., None]) -> Signature:
    _, *own = inspect.signature(init).parameters.values()
    out = {p.name: p for p in own if p.kind is not Parameter.VAR_KEYWORD}
    for options in own:
        if options.kind is Parameter.VAR_KEYWORD:
            out |= {p.name: p for p in _others(cls, init, options) if p.name not in out}
    return Signature(list(out.values()))


def _others(cls: type, init: Callable[..., None], options: Parameter) -> Iterator[Parameter]:
    """The keywords that ``**options`` stands for."""
    inherited: dict[str, Parameter] = {}
    for base in cls.__mro__[1:]:
        if isinstance(found := vars(base).get("__signature__"), Signature):
            inherited = {name: p for name, p in found.parameters.items()} | inherited
    annotation = options.annotation
    if isinstance(annotation, str) and "Unpack" in annotation:
        (keys,) = eval(annotation, init.__globals__).__args__
        for name, kind in keys.__annotations__.items():
            default = inherited[name].default if name in inherited else Parameter.empty
            text = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=text)
        return
    yield from (p for p in inherited.values() if p.kind is Parameter.KEYWORD_ONLY)
