"""Functions with one rule per operator class, open to classes defined outside the library."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeVar

from solvers.operators.linear_operator import LinearOperator

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_rules: dict[Callable[..., Any], Any] = {}  # open function -> the singledispatch function that holds its rules


def rule(function: Callable[..., Any], kind: type[LinearOperator]) -> Callable[[F], F]:
    """Decorator: add the rule of an open function for a class of operators and its subclasses.

    | function | the rule takes | and returns |
    | --- | --- | --- |
    | :func:`~solvers.power` | ``(op, task)``, a :class:`~solvers.rules.PowerTask` | ``op ** task.exponent`` |
    | :func:`~solvers.diagonalize` | ``(op, task)``, a :class:`~solvers.rules.BasisTask` | an :class:`~solvers.Eigen` |
    | :func:`~solvers.operators.damping.factored_tikhonov` | ``(op, lam)`` | the damped operator |
    | :func:`~solvers.operators.damping.relative_tikhonov` | ``(op, fraction)`` | the damped operator |
    | :func:`precond.layerwise.blocks.refresh.refresh_cost` | ``(inverse)`` | number of operations |

    >>> import torch
    >>> from solvers import Diagonal, power, rule
    >>> class Signs(Diagonal):
    ...     "A diagonal of 1 and -1."
    >>> @rule(power, Signs)
    ... def power_of_signs(op, task):
    ...     return op if task.exponent == -1 else task.leaf(op)
    >>> power(Signs(torch.tensor([1.0, -1.0])), -1)
    Diagonal(2)

    Args:
        function: One of the functions above.
        kind: Class of the operators.

    Raises:
        ValueError: If the function takes no rules, or has one for the class.
        TypeError: If ``kind`` is not a class of operators.
    """
    if not callable(function):
        raise TypeError(f"function is one that takes rules, such as solvers.power, not {function!r}.")
    if function not in _rules:
        raise ValueError(f"{function!r} takes no rules; {', '.join(f.__name__ for f in _rules)} do.")
    if not (isinstance(kind, type) and issubclass(kind, LinearOperator)):
        raise TypeError(f"A rule is for a kind of LinearOperator, a subclass, not for {kind!r}.")
    rules = _rules[function]
    if kind in rules.registry:
        raise ValueError(f"{function.__name__} has a rule for {kind.__name__}; derive a class to treat it differently.")
    return rules.register(kind)


def rules_of(function: Callable[..., Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator: the default of an open function, for classes without a rule; calls go to the rule that fits."""

    def register(default: Callable[..., T]) -> Callable[..., T]:
        _rules[function] = singledispatch(default)
        return _rules[function]

    return register


def open_to_rules(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: let :func:`rule` add to a function of an operator; its body serves classes without a rule."""
    rules = singledispatch(function)
    _rules[rules] = rules
    return rules


def advice(function: str, op: LinearOperator) -> str:
    """The end of a refusal: which rule would serve ``op``, where its class is defined outside this library."""
    kind = type(op)
    if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    return f" {kind.__name__} joins {function} by a rule: @solvers.rule(solvers.{function}, {kind.__name__})."
