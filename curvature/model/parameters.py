"""The trainable parameters a curvature is taken over, and their place in the flat vector."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Parameters(Mapping[str, nn.Parameter]):
    """Trainable parameters by name, in ``named_parameters()`` order.

    The flat vector of the library is the concatenation of these parameters, each flattened row-major. A parameter
    that is used under several names (tied weights) appears once, under its first name.

    Args:
        model: Module whose parameters are meant.
        params: Restriction: names, globs (``"encoder.*"``) or the parameter tensors themselves; ``None`` takes every
            trainable parameter. Frozen parameters never count.

    Raises:
        ValueError: If no parameter is left, or an entry of ``params`` matches no trainable parameter.
    """

    def __init__(self, model: nn.Module, params: str | Tensor | Iterable[str | Tensor] | None = None) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter: every requires_grad is False, or there are none. "
                "Call requires_grad_(True) on those that should count."
            )
        self._items = trainable if params is None else _select(trainable, params)
        starts = [0]
        for p in self._items.values():
            starts.append(starts[-1] + p.numel())
        self.starts: dict[str, int] = dict(zip(self._items, starts, strict=False))
        self.size: int = starts[-1]

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._items[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the parameters."""
        dtype = next(iter(self._items.values())).dtype
        for p in self._items.values():
            dtype = torch.promote_types(dtype, p.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self._items.values())).device

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate one tensor per parameter; leading batch dimensions are kept.

        Args:
            tensors: ``{name: (*batch, *shape)}`` with the same batch for all.

        Returns:
            Tensor ``(*batch, size)``.
        """
        parts = []
        for name, p in self._items.items():
            t = tensors[name]
            parts.append(t.reshape((*t.shape[: t.dim() - p.dim()], p.numel())))
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split ``(*batch, size)`` into views ``{name: (*batch, *shape)}``."""
        if vector.shape[-1] != self.size:
            raise ValueError(f"expected a last dimension of {self.size} (all parameters), got {tuple(vector.shape)}.")
        out = {}
        for name, p in self._items.items():
            piece = vector[..., self.starts[name] : self.starts[name] + p.numel()]
            out[name] = piece.reshape((*vector.shape[:-1], *p.shape))
        return out


def _select(
    trainable: dict[str, nn.Parameter], params: str | Tensor | Iterable[str | Tensor]
) -> dict[str, nn.Parameter]:
    wanted = [params] if isinstance(params, (str, Tensor)) else list(params)
    names = {id(p): name for name, p in trainable.items()}
    chosen: set[str] = set()
    for entry in wanted:
        if isinstance(entry, str):
            hits = [name for name in trainable if name == entry or fnmatch.fnmatchcase(name, entry)]
        else:
            hits = [names[id(entry)]] if id(entry) in names else []
        if not hits:
            shown = repr(entry) if isinstance(entry, str) else f"a tensor of shape {tuple(entry.shape)}"
            raise ValueError(f"params= names {shown}, which is no trainable parameter. There are: {_names(trainable)}.")
        chosen.update(hits)
    if not chosen:
        raise ValueError(f"params= is empty; name at least one of {_names(trainable)}.")
    return {name: p for name, p in trainable.items() if name in chosen}


def _names(trainable: Mapping[str, Tensor], most: int = 8) -> str:
    names = list(trainable)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def numel(shape: Iterable[int]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)
