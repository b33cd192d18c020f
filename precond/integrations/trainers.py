"""Optimizers under trainers that make or wrap them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from curvature.model.wrappers import unwrapped_optimizer
from precond.step.base import SecondOrderOptimizer


def with_model(method: type[SecondOrderOptimizer], model: nn.Module, loss_fn: Any) -> type[SecondOrderOptimizer]:
    """A method that takes a model, as the class that a trainer calls with parameter groups of its own.

    Trainers make optimizers as ``cls(groups, **options)``, where the groups hold weight decay by parameter. The class
    that this returns passes them on as ``method(model, loss_fn, params=groups, **options)``; what it makes is a plain
    ``method``. Methods that take parameters come back as they are.

    >>> model = nn.Linear(3, 2)
    >>> from precond import KFAC
    >>> cls = with_model(KFAC, model, nn.MSELoss())
    >>> optimizer = cls([{"params": [model.weight], "weight_decay": 0.1}], lr=0.1)  # as a trainer does
    >>> type(optimizer) is KFAC, optimizer.param_groups[0]["weight_decay"]
    (True, 0.1)

    Args:
        method: The class of the optimizer.
        model: The very model that the trainer trains.
        loss_fn: The loss module that describes what the trainer computes, as ``nn.CrossEntropyLoss()``.

    Raises:
        TypeError: If these are something else.
    """
    if not (isinstance(method, type) and issubclass(method, SecondOrderOptimizer)):
        raise TypeError(f"with_model takes an optimizer class of precond such as KFAC, not {method!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"with_model takes the model that is trained, not {type(model).__name__}.")
    if "loss_fn" not in inspect.signature(method).parameters:
        return method

    make: Any = method

    class Bound(method):  # type: ignore[misc, valid-type]  # mypy knows no classes that are chosen at run time
        def __new__(cls, params: Any, **options: Any) -> Any:
            if method.needs == "layers":
                return make(model, loss_fn, params=params, **options)
            return make(params, loss_fn, **options)  # these take parameters in the place of the model

    Bound.__name__ = Bound.__qualname__ = method.__name__
    return Bound


def inner_optimizer(optimizer: Any) -> SecondOrderOptimizer:
    """The optimizer of this package inside the wrapper of a trainer (Accelerate, Lightning, Fabric).

    Wrappers pass on ``step``, ``zero_grad`` and the groups. What else an optimizer answers is asked of this one:
    ``metrics()``, ``coverage()``, ``precondition()``, ``preconditioners``.

    Args:
        optimizer: A wrapper, or the optimizer itself.

    Raises:
        TypeError: If there is none of this package inside.
    """
    found = unwrapped_optimizer(optimizer)
    if not isinstance(found, SecondOrderOptimizer):
        raise TypeError(f"there is no optimizer of precond in this {type(optimizer).__name__}: {type(found).__name__}.")
    return found
