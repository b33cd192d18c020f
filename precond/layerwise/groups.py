"""Parameters of a model as arguments of an optimizer: tensors, named ones, names, globs, groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from curvature.model.parameters import Parameters


def as_groups(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """Parameter groups as ``torch.optim`` wants them; other entries are left as they are.

    Args:
        model: Whose parameters are meant.
        params: ``None`` for all trainable ones, one tensor or name, or an iterable (read once) of tensors, ``(name,
            tensor)`` pairs, names, globs, or groups whose ``params`` are any of these.
    """
    if params is None:
        return [{"params": list(Parameters(model).values())}]
    entries: list[Any] = [params] if isinstance(params, (str, Tensor, dict)) else list(params)
    if any(isinstance(entry, dict) for entry in entries):
        return entries
    if not entries:  # a group may be empty, as trainers make them; nothing at all is a mistake
        return [{"params": list(Parameters(model, entries).values())}]
    return [{"params": entries}]


def members(model: nn.Module, params: Any) -> list[Any]:
    """The tensors, or ``(name, tensor)`` pairs, of one group.

    Frozen tensors are accepted, and move once they are unfrozen. Names and globs mean trainable ones.

    Raises:
        ValueError: If one is not of the model.
    """
    entries: list[Any] = [params] if isinstance(params, (str, Tensor)) else list(params)
    if any(isinstance(entry, str) for entry in entries):
        return list(Parameters(model, entries).values())
    own = {id(p) for p in model.parameters()}
    for entry in entries:
        tensor = entry[1] if isinstance(entry, tuple) else entry
        if isinstance(tensor, Tensor) and id(tensor) not in own:
            raise ValueError(
                f"params= holds a tensor of shape {tuple(tensor.shape)}, which is no trainable parameter of the model "
                f"({type(model).__name__}). Pass parameters of this very model, from model.named_parameters()."
            )
    return entries
