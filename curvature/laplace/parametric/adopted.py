"""Methods of laplace-torch's posteriors that answer otherwise where the backend is one of this package.

``Laplace(model, ..., backend=GGNBackend)`` makes an object of laplace-torch, whose formulas are for outputs ``(M, C)``
and positive semi-definite curvature. A method that is put in front of its own here has the word first, and passes on
what it has nothing to say about; posteriors with other backends never reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from curvature.laplace.backends.batch import BatchBackend


def is_served(la: Any) -> bool:
    """Whether the curvature of a posterior comes from a backend of this package."""
    kind = la._backend_cls
    return isinstance(kind, type) and issubclass(kind, BatchBackend)


def in_front_of(*kinds: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function answer for the method or property of its name in some classes of laplace-torch.

    Args:
        kinds: Classes that define it.

    Returns:
        A decorator for ``function(la, plain, *args, **kwargs)``, where ``plain(*args, **kwargs)`` is what the class
        itself would do.
    """

    def install(function: Callable[..., Any]) -> Callable[..., Any]:
        for kind in kinds:
            own = vars(kind)[function.__name__]
            if isinstance(own, property):
                assert own.fget is not None
                joined: Any = property(_joined(own.fget, function), own.fset, own.fdel, own.__doc__)
            else:
                joined = _joined(own, function)
            setattr(kind, function.__name__, joined)
        return function

    return install


def _joined(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_served(self):
            return plain(self, *args, **kwargs)
        return function(self, plain.__get__(self), *args, **kwargs)

    return method
