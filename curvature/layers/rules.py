"""The rules that recognise uses of parameters in calls of torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from curvature.layers.site import Observer, Site

T = TypeVar("T")

#: Recognises a use in ``(recorder, output, args, kwargs)`` of a call.
Rule = Callable[[Observer, Tensor, tuple[Any, ...], Mapping[str, Any]], Site | None]
#: Function -> rule that recognises a use in a call of it.
RULES: dict[Any, Rule] = {}
#: Runs in the place of a call, on ``(recorder, args, kwargs)``.
Replacement = Callable[[Observer, tuple[Any, ...], Mapping[str, Any]], Any]
#: Function -> its replacement in a pass of our own.
REPLACEMENTS: dict[Any, Replacement] = {}
#: Module type -> the result of a rule for it (for the table of :func:`curvature.coverage` before any forward pass).
MODULES: dict[type[nn.Module], str] = {}


def rule_for(*functions: Any, modules: Mapping[type[nn.Module], str] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for the torch functions it recognises.

    A rule is called as ``rule(recorder, output, args, kwargs)`` after the function ran, and returns a :class:`Site` if
    a tracked parameter was used in a way it covers, else ``None``.

    Args:
        functions: Functions as ``__torch_function__`` reports them, such as ``torch.nn.functional.linear``.
        modules: Module types whose parameters the rule covers, with the structure they get.
    """
    return _registering(RULES, functions, modules)


def replacement_for(
    *functions: Any, modules: Mapping[type[nn.Module], str] | None = None
) -> Callable[[Replacement], Replacement]:
    """Register an equal computation for fused functions whose inner activations cannot be seen.

    In a pass of our own, whose result only we use (``Recorder(own_pass=True)``), ``replacement(recorder, args,
    kwargs)`` is called in place of the function. It adds its uses with :meth:`Observer.add` and returns the function's
    result up to rounding; or ``None`` if it does not cover the call, which then runs as it is.

    Args:
        functions: Functions as ``__torch_function__`` reports them.
        modules: Module types whose parameters the replacement covers, with the structure they get.
    """
    return _registering(REPLACEMENTS, functions, modules)


def _registering(
    table: dict[Any, T], functions: tuple[Any, ...], modules: Mapping[type[nn.Module], str] | None
) -> Callable[[T], T]:
    def register(entry: T) -> T:
        table.update(dict.fromkeys(functions, entry))
        MODULES.update(modules or {})
        return entry

    return register


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; absent ones are missing from the result."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
