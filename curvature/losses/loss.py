"""The contract of a loss, and the registry that finds it for the user's loss function."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from curvature.losses.errors import EMPIRICAL, UnknownLossError
from curvature.losses.terms import Terms


class Loss(nn.Module, ABC):
    """A loss function together with its derivatives with respect to the model's output.

    Wraps the user's own object and reads its options whenever :meth:`terms` is called, so that later changes of, say,
    ``label_smoothing`` are honoured. It is a module, and calling it calls that object: a training loop uses it as any
    other loss.

    Args:
        loss_fn: The user's loss module.
    """

    #: Whether values are at least zero, and zero for a perfect fit, so that they are a scale for curvature.
    zero_when_perfect: bool = False

    def __init__(self, loss_fn: Any) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, output: Any, target: Any, *extra: Any) -> Any:
        """What the user's loss function returns."""
        return self.loss_fn(output, target, *extra)

    def __copy__(self) -> Self:
        """A copy whose loss function can be replaced, which a module's table of submodules would share."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._modules = dict(self._modules)
        return other

    @property
    def reduction(self) -> str:
        """``"mean"``, ``"sum"`` or ``"none"``."""
        return self.check_reduction(self.loss_fn.reduction)

    def summed(self) -> Self:
        """The loss that sums the same terms.

        Raises:
            ValueError: If the loss function has no such option.
        """
        if self.reduction == "sum":
            return self
        other = copy.copy(self)
        if isinstance(getattr(other.loss_fn, "reduction", None), str):
            other.loss_fn = copy.copy(other.loss_fn)
            other.loss_fn.reduction = "sum"
        if other.reduction != "sum":
            raise ValueError(f"{self!r} has the reduction {self.reduction!r} for good; give one that sums its terms.")
        return other

    def check_reduction(self, reduction: str) -> str:
        """The reduction itself if it is a known one; a ValueError otherwise."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{self!r}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
        return reduction

    @abstractmethod
    def terms(
        self,
        output: Tensor,
        target: Tensor,
        *extra: Tensor,
        class_dim: int | None = None,
        mask: Tensor | None = None,
        as_called: bool = False,
        check: bool = False,
    ) -> Terms:
        """The loss of one batch as a sum of terms.

        Args:
            output: The model's output.
            target: The target of the loss.
            extra: Further arguments of the loss (the variance of ``nn.GaussianNLLLoss``).
            class_dim: Axis of the output that holds the outputs of one term. None: found from the shapes.
            mask: Which terms count; boolean, of the output's shape without its class axis.
            as_called: The arguments are exactly those the loss module was called with, so the class axis is the one
                PyTorch takes, without a search.
            check: Also look at the values (targets out of range, no term that counts). Waits for the device.

        Raises:
            AmbiguousClassAxisError: If the shapes allow more than one class axis; pass ``class_dim``.
            ValueError: If shapes, or with ``check`` values, do not fit the loss.
        """

    def evaluate(self, output: Any, *given: Any) -> Tensor:
        """The user's loss itself, on what it takes as its output, a target, and further arguments."""
        value: Tensor = self.loss_fn(output, *given)
        return value

    def reads(self, result: Any) -> bool:
        """Whether the loss takes as its output what a model returned, in the place of one tensor of it."""
        return False

    def joined(self, result: Any) -> Tensor:
        """Where :meth:`reads`, all of it as one tensor, as the loss's terms have it."""
        raise NotImplementedError

    def refuse_extra(self, extra: tuple[Tensor, ...]) -> None:
        """Raise a TypeError if there are further arguments."""
        if extra:
            raise TypeError(f"{self!r} takes an output and a target, got {len(extra)} further argument(s).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss_fn!r})"


_REGISTRY: dict[type[nn.Module], type[Loss]] = {}

#: The functional forms stand for the module with the same keyword options.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.kl_div: nn.KLDivLoss,
}

L = TypeVar("L", bound=type[Loss])


def register_loss(*module_types: type[nn.Module]) -> Callable[[L], L]:
    """Class decorator: the decorated :class:`Loss` serves loss modules of these types.

    A subclass of a registered module is served as well unless it overrides ``forward``.

    Example:
        A loss that treats every entry alike needs its value and two derivatives:

        >>> import torch
        >>> from curvature.losses import ElementwiseLoss, loss_for, register_loss
        >>> class LogCoshLoss(torch.nn.Module):
        ...     reduction = "mean"
        ...     def forward(self, output, target):
        ...         return (output - target).cosh().log().mean()
        >>> @register_loss(LogCoshLoss)
        ... class LogCosh(ElementwiseLoss):
        ...     def value(self, z, y):
        ...         return (z - y).cosh().log()
        ...     def slope(self, z, y):
        ...         return (z - y).tanh()
        ...     def curvature(self, z, y):
        ...         return 1 - (z - y).tanh() ** 2
        >>> terms = loss_for(LogCoshLoss()).terms(torch.zeros(2, 3), torch.zeros(2, 3))
        >>> terms.hessian_product(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def register(loss: L) -> L:
        for module_type in module_types:
            _REGISTRY[module_type] = loss
        return loss

    return register


def registered() -> tuple[type[nn.Module], ...]:
    """Types of loss modules whose derivatives are known."""
    return tuple(_REGISTRY)


def loss_for(loss_fn: nn.Module | Loss | Callable[..., Tensor]) -> Loss:
    """The :class:`Loss` for the user's loss function.

    Args:
        loss_fn: A loss module, a :class:`Loss` (returned as is), or one of PyTorch's functional losses, alone or in a
            ``functools.partial`` with keyword options.

    Raises:
        UnknownLossError: If no :class:`Loss` is registered for its type.
    """
    if isinstance(loss_fn, Loss):
        return loss_fn
    module = loss_fn if isinstance(loss_fn, nn.Module) else _module_of(loss_fn)
    kind: Any = type(module)
    for base in kind.__mro__:
        if base in _REGISTRY and kind.forward is base.forward:
            return _REGISTRY[base](module)
    name = type(loss_fn).__name__ if isinstance(loss_fn, nn.Module) else repr(loss_fn)
    raise UnknownLossError(
        f"No derivatives are known for the loss {name}. {more_arguments(loss_fn)}"
        f"(a) With {EMPIRICAL} none are needed. (b) Any twice-differentiable loss per example works as "
        "curvature.losses.AutogradLoss(loss_fn, reduction='mean'), which a training loop calls in its place. "
        "(c) Register it with one small class:\n"
        f"    @curvature.losses.register_loss({name if isinstance(loss_fn, nn.Module) else 'MyLossModule'})\n"
        "    class MyLoss(curvature.losses.ElementwiseLoss):\n"
        "        def value(self, z, y): ...      # l(z; y), entry by entry\n"
        "        def slope(self, z, y): ...      # dl/dz\n"
        "        def curvature(self, z, y): ...  # d2l/dz2\n"
        "A subclass of a known loss that overrides forward counts as unknown, since its terms may differ."
    )


def check_loss(name: str, value: Any) -> Any:
    """Refuse what is no loss: neither a module, nor a function, nor a :class:`Loss`.

    Args:
        name: Name of the argument.
        value: What was given.

    Raises:
        TypeError: If it is none, or a class in place of a loss.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} is a loss, not a class: write {value.__name__}().")
    if not (isinstance(value, Loss) or callable(value)):
        text = repr(value)
        shown = text if len(text) < 80 and not isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is a loss module such as nn.CrossEntropyLoss(), or a function, not {shown}.")
    return value


def more_arguments(loss_fn: Any) -> str:
    """What to do with a loss that cannot be called with an output and a target; empty where it can."""
    try:
        parameters = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn).parameters
    except (TypeError, ValueError):  # no function, or one that does not tell
        return ""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [name for name, p in parameters.items() if p.kind in positional and p.default is p.empty]
    if len(needed) <= 2:
        return ""
    return (
        f"It takes {', '.join(needed)}, where an output of the model and a target are compared: write a function of "
        "these two, such as lambda output, target: loss_fn(*output, target) for a model that returns several tensors, "
        "and pass output=lambda result: result, so that it gets all of them; its Hessian on one batch takes it. "
    )


def watched(loss_fn: Any, what: str, where: str) -> Loss:
    """The :class:`Loss` for a module whose calls are watched while a training loop runs.

    Args:
        loss_fn: The module, or a :class:`Loss`.
        what: What watches it, for messages.
        where: What calls it, ``"loop"`` or ``"closure"``.

    Raises:
        TypeError: If it is a function, whose calls nobody sees.
        UnknownLossError: If it is of unknown type.
    """
    if not isinstance(loss_fn, nn.Module):
        module = _module_of(loss_fn)
        name = getattr(loss_fn, "__name__", "loss_fn")
        made = f"AutogradLoss({name}, reduction='mean')" if module is None else f"torch.nn.{type(module).__name__}()"
        raise TypeError(
            f"{what} needs the loss module that the {where} calls, not {type(loss_fn).__name__}: calls of a function "
            f"are not seen. Pass {'curvature.losses.' if module is None else ''}{made}, and call that in the {where}."
        )
    return loss_for(loss_fn)


def module_called(loss_fn: Any) -> nn.Module | None:
    """The module whose calls a training loop shows, whether it calls a :class:`Loss` or the module inside.

    Of one of PyTorch's functional losses it is the module of its kind, which no loop calls.
    """
    inner = loss_fn.loss_fn if isinstance(loss_fn, Loss) else loss_fn
    if isinstance(inner, nn.Module):
        return inner
    return loss_fn if isinstance(loss_fn, nn.Module) else _module_of(loss_fn)


def _module_of(function: Any) -> nn.Module | None:
    """The loss module that a functional loss stands for, or None."""
    options = {}
    if isinstance(function, partial) and not function.args:
        function, options = function.func, function.keywords
    try:
        return FUNCTIONS[function](**options)
    except (KeyError, TypeError):  # not a functional loss, not hashable, or an option the module does not have
        return None


def called(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """What a call of one of PyTorch's functional losses did, as a loss module and the arguments of its call.

    Args:
        function: The function, such as ``torch.nn.functional.cross_entropy``.
        args: Positional arguments.
        kwargs: Named arguments.

    Returns:
        The module and the tensors it compares, output first; ``None`` for any other function.
    """
    kind = FUNCTIONS.get(function)
    if kind is None:
        return None
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in given.items() if name in known}
    rest = tuple(value for name, value in given.items() if name not in known and value is not None)
    return kind(**options), rest
