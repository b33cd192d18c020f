"""Constructor calls that mix up what a method takes, and what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn

#: Words by which loops and other libraries call the loss.
LOSS_WORDS = frozenset({"loss_fn", "criterion", "loss", "loss_func", "loss_function", "objective"})


def mistake(method: type, own: Signature, args: tuple[Any, ...], options: Mapping[str, Any]) -> str | None:
    """What is wrong with the positional arguments of a constructor, and how to write the call; ``None`` if nothing is.

    Args:
        method: The class that is called.
        own: Signature of its constructor, with ``self``.
        args: Positional arguments.
        options: Keyword arguments.
    """
    me, (_, *parameters) = method.__name__, own.parameters.values()
    names = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    given = {**dict(zip(names, args, strict=False)), **options}
    own_words = {p.name for p in parameters} & LOSS_WORDS
    words = bool(LOSS_WORDS.difference(own_words) & given.keys())
    if names[:2] == ["model", "loss_fn"]:
        closure = getattr(method, "needs", "layers") == "closure"
        return None if words else _with_model(me, given, len(args) - len(names), _call(me, parameters), closure)
    if names[:1] == ["params"]:
        words = words or any(isinstance(given.get(name), nn.Module) for name in own_words)  # PSGD has a criterion
        return _with_params(me, given, args[1:], words, getattr(method, "needs", "grad"))
    return None


def _with_model(me: str, given: Mapping[str, Any], more: int, call: str, closure: bool) -> str | None:
    model, loss = given.get("model"), given.get("loss_fn")
    if "model" in given and not isinstance(model, nn.Module):
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            return f"{me} takes the model first, then the loss: {call}."
        if closure:  # these take parameters as well
            return None if "loss_fn" in given else _without_loss(me, call)
        return (
            f"{me} learns from the layers of a model: pass the model itself, not {type(model).__name__} (such as "
            f"model.parameters()), and the loss that the loop calls: {call}. Methods that need gradients alone, such "
            f"as SOAP, take parameters.{_bound(me) if isinstance(model, list) else ''}"
        )
    if isinstance(model, nn.Module) and isinstance(loss, nn.Module) and not _trains(model) and _trains(loss):
        return f"{me} takes the model first, then the loss, which came the other way round: {call}."
    if isinstance(loss, Tensor):
        return f"{me} takes the loss itself, as nn.CrossEntropyLoss(), not its value on a batch (a Tensor): {call}."
    if isinstance(loss, (int, float)):
        return f"{me} takes the loss after the model, not {loss!r}: {call}; options are given by name."
    if more > 0:
        return f"{me} takes options by name, lr=... among them: {call}."
    if "model" in given and "loss_fn" not in given:
        return _without_loss(me, call)
    return None


def _bound(me: str) -> str:
    """For trainers, which make optimizers from lists of groups."""
    return f" A trainer that makes its optimizer itself takes precond.integrations.with_model({me}, model, loss_fn)."


def _without_loss(me: str, call: str) -> str:
    return (
        f"{me} needs the loss, too, and loss_fn is missing: {call}, with the module or function that the loop calls, "
        "such as nn.CrossEntropyLoss(); where the model computes its loss inside, with the module that describes it."
    )


def _with_params(me: str, given: Mapping[str, Any], others: tuple[Any, ...], words: bool, needs: str) -> str | None:
    params = given.get("params")
    loss = any(isinstance(x, nn.Module) or _names_a_loss(x) for x in others) or words
    model = isinstance(params, nn.Module)
    if not (loss or (model and me != "GaussNewton")):
        return None
    why = "its closure brings the loss, as step(closure)" if needs == "closure" else "gradients bring it all"
    what = "not the model" if model else "and no loss"
    what += " and its loss" if model and loss else ""
    return f"{me} takes parameters, {what}: {me}(model.parameters(), ...)" + (f"; {why}." if loss else ".")


def _names_a_loss(function: Any) -> bool:
    return callable(function) and getattr(function, "__module__", "") == torch.nn.functional.__name__


def _trains(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _call(me: str, parameters: list[Parameter]) -> str:
    """How a method is called, with all that has no default."""
    needed = (p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    return f"{me}({', '.join(f'{p.name}=...' if p.kind is p.KEYWORD_ONLY else p.name for p in needed)})"
