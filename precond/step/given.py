"""What an optimizer is given to train, parameters or groups of them, told from what is mistaken for it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvature.model.parameters import refuse_inference
from precond.step.other_names import KERNELS, counterpart

#: How near the name of an option a key of a group may come before it is taken for that option misspelt.
NEAR = 0.8


def listed(params: Any, method: str) -> list[Any]:
    """The parameters or groups of a constructor, as a list.

    Args:
        params: Parameters, pairs of a name and a parameter, or groups.
        method: Name of the optimizer's class, for the messages.

    Raises:
        TypeError: If these are something else.
        ValueError: If there are none.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, not one tensor alone: "
            f"{method}([parameter], ...)."
        )
    if isinstance(params, Mapping):
        meant = "a list of groups" if "params" in params else "parameters, model.parameters() or a list of groups"
        raise TypeError(f"{method} takes {meant}, not one {type(params).__name__}: {method}([...], ...).")
    try:
        found = list(params)
    except TypeError:
        raise TypeError(
            f"{method} takes parameters, such as model.parameters(), or groups of them, not {type(params).__name__}."
        ) from None
    if not found:
        raise ValueError(
            f"{method} got an empty parameter list. A generator such as model.parameters() can be gone through once; "
            "call it anew, or make a list."
        )
    return found


def group_of(given: Any, method: type, known: Mapping[str, Any]) -> dict[str, Any]:
    """One group of parameters; keys that are no options are labels of the user's, unless they nearly are options.

    Args:
        given: The group.
        method: Class of the optimizer.
        known: The options that its groups have.

    Raises:
        TypeError: If it is no group, or has an option that the method does not have.
        ValueError: If it has no parameters.
    """
    me = method.__name__
    if not isinstance(given, Mapping):
        raise TypeError(
            f"a parameter group of {me} is a dict, {{'params': [...], 'lr': ...}}, not {type(given).__name__}."
        )
    if "params" not in given:
        raise ValueError(
            f"a parameter group of {me} lacks 'params': it has {', '.join(map(repr, given)) or 'nothing'}."
        )
    options = sorted({*inspect.signature(method).parameters, *known} - {"params", "model", "loss_fn"})
    wrong = {name: hint for name in given if name not in {*options, *KERNELS} and (hint := _meant(name, options))}
    if wrong:
        raise TypeError(f"a parameter group of {me} has no option {' '.join(wrong.values())}")
    return dict(given)


def _meant(key: Any, options: list[str]) -> str | None:
    """Which option a key of a group was meant for, as the rest of a sentence; ``None`` if it is a label."""
    # Schedulers and loops keep numbers beside an option under its name and a word: base_momentum, weight_decay_mult.
    if not isinstance(key, str) or any(key.startswith(f"{o}_") or key.endswith(f"_{o}") for o in options):
        return None
    hint = counterpart(key, options)
    close = difflib.get_close_matches(key, options, n=1, cutoff=NEAR)
    return hint or (f"{key!r}; did you mean {close[0]!r}?" if close else None)


def require_parameters(params: Any, method: str) -> list[Any]:
    """The parameters of a group, each once.

    Raises:
        TypeError: If one is no parameter.
        ValueError: If one is not to be trained by itself, or comes twice.
    """
    if isinstance(params, (set, frozenset)):
        raise TypeError(f"{method} takes parameters in order; those of a set come in another one in every run.")
    found = [params] if isinstance(params, Tensor) else list(params)
    for each in found:
        _require_parameter(each, method)
    tensors = [each[1] if isinstance(each, tuple) else each for each in found]
    if len({id(p) for p in tensors}) < len(tensors):
        twice = next(p for i, p in enumerate(tensors) if any(p is other for other in tensors[:i]))
        raise ValueError(
            f"{method} got a parameter group with duplicate parameters, one of shape {tuple(twice.shape)}, which would "
            "move twice. Pass each once; a weight that two layers share is one parameter, as in model.parameters()."
        )
    return found


def has_closure(closure: Any, method: str, needs: str) -> bool:
    """Whether a step was given a closure.

    Args:
        closure: What it was given.
        method: Name of the optimizer's class, for the messages.
        needs: What the method needs of a step.

    Raises:
        TypeError: If it is something else, such as the value of the loss.
    """
    if closure is None:
        return False
    if not callable(closure):
        mend = "step(lambda: loss_fn(model(x), y))" if needs == "closure" else "loss.backward(), then step() alone"
        what = type(closure).__name__
        raise TypeError(f"step of {method} takes a function that computes the loss, not its value ({what}): {mend}.")
    return True


def _require_parameter(given: Any, method: str) -> None:
    named = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)
    tensor = given[1] if named else given
    if isinstance(tensor, str):
        raise TypeError(
            f"{method} takes parameters, not their names such as {tensor!r}: "
            f"{method}([p for name, p in model.named_parameters() if ...], ...)."
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{method} takes parameters, which are tensors, not {type(tensor).__name__}.")
    if not (tensor.is_leaf or tensor.retains_grad):
        raise ValueError(
            f"{method} can't optimize a non-leaf Tensor, one of shape {tuple(tensor.shape)} computed from others. "
            "Pass what it is computed from, or make it a parameter: torch.nn.Parameter(tensor.detach())."
        )
    if tensor.requires_grad:
        refuse_inference(tensor, given[0] if named else f"a parameter of shape {tuple(tensor.shape)}")
