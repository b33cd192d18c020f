"""The trainable parameters a curvature is taken over, and their place in the flat vector."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, ItemsView, Iterable, Mapping, ValuesView
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter

from curvature.model.fully_sharded import named_parameters

#: A name or glob, a parameter, or a module.
Restriction = str | Tensor | nn.Module


class Parameters(Mapping[str, nn.Parameter]):
    """Trainable parameters by name, in ``named_parameters()`` order.

    The flat vector of the library is the concatenation of these parameters, each flattened row-major. A parameter
    that is used under several names (tied weights) appears once, under its first name.

    Args:
        model: Module whose parameters are meant.
        params: Restriction: names, globs (``"encoder.*"``), the parameter tensors themselves, or modules for all that
            are in them; ``None`` takes every trainable parameter. Frozen parameters never count.

    Raises:
        ValueError: If no parameter is left, an entry of ``params`` matches no trainable parameter, a parameter has no
            shape yet, or one was made in inference mode.
        TypeError: If a parameter is complex.
    """

    def __init__(self, model: nn.Module, params: Restriction | Iterable[Restriction] | None = None) -> None:
        trainable = {name: p for name, p in named_parameters(model) if p.requires_grad}
        if not trainable:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter: every requires_grad is False, or there are none. "
                "Call requires_grad_(True) on those that should count."
            )
        self._items = trainable if params is None else _select(trainable, params)
        for name, p in self._items.items():
            _check(name, p)
        starts = [*accumulate((p.numel() for p in self._items.values()), initial=0)]
        self.starts: dict[str, int] = dict(zip(self._items, starts, strict=False))
        self.size: int = starts[-1]

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._items[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    # Every step goes through them several times, which the ways of Mapping make a call for each parameter.

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def items(self) -> ItemsView[str, nn.Parameter]:
        """Names and parameters."""
        return self._items.items()

    def values(self) -> ValuesView[nn.Parameter]:
        """The parameters."""
        return self._items.values()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the parameters."""
        return reduce(torch.promote_types, (p.dtype for p in self._items.values()))

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
        pairs = ((tensors[name], p) for name, p in self._items.items())
        return torch.cat([t.reshape((*t.shape[: t.dim() - p.dim()], p.numel())) for t, p in pairs], dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split ``(*batch, size)`` into views ``{name: (*batch, *shape)}``."""
        if vector.shape[-1] != self.size:
            raise ValueError(f"expected a last dimension of {self.size} (all parameters), got {tuple(vector.shape)}.")
        out = {}
        for name, p in self._items.items():
            piece = vector[..., self.starts[name] : self.starts[name] + p.numel()]
            out[name] = piece.reshape((*vector.shape[:-1], *p.shape))
        return out


class SeenParameters(Parameters):
    """Parameters by the tensors that passes use in their place.

    Args:
        parameters: The parameters.
        seen: Parameter -> the tensor.
    """

    def __init__(self, parameters: Parameters, seen: Callable[[nn.Parameter], nn.Parameter]) -> None:
        vars(self).update(vars(parameters))
        self._seen = seen

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._seen(super().__getitem__(name))

    def items(self) -> ItemsView[str, nn.Parameter]:
        return Mapping.items(self)

    def values(self) -> ValuesView[nn.Parameter]:
        return Mapping.values(self)


def tensor_of_its_own(x: Tensor) -> Tensor:
    """A piece of a flat vector, as a tensor that may be seen as complex, or in another dtype, as a parameter may."""
    own = x.is_contiguous() and x.storage_offset() % 2 == 0 and not x.is_inference()  # which autograd cannot keep
    return x if own else x.clone(memory_format=torch.contiguous_format)


def _check(name: str, p: nn.Parameter) -> None:
    """Refuse what has no place in a flat vector of real numbers."""
    if isinstance(p, UninitializedParameter):
        raise ValueError(
            f"{name} has no shape yet: it belongs to a lazy module, which finds its shape in its first forward pass. "
            "Run the model once on some inputs before."
        )
    refuse_inference(p, name)
    if p.is_complex():
        raise TypeError(
            f"{name} is complex ({p.dtype}). Curvature is that of real parameters: keep real and imaginary part along "
            "a last axis of size 2, nn.Parameter(torch.view_as_real(w)), and use torch.view_as_complex in forward."
        )


def refuse_inference(p: Tensor, name: str) -> None:
    """Refuse what was made in inference mode, which has no derivative and may not be written to outside of it.

    Raises:
        ValueError: If it was.
    """
    if p.is_inference():
        raise ValueError(
            f"{name} was made under torch.inference_mode(), so that no derivative by it can be taken. Build the model, "
            "or load it, outside of inference mode, or under torch.no_grad()."
        )


def _select(trainable: dict[str, nn.Parameter], params: Restriction | Iterable[Restriction]) -> dict[str, nn.Parameter]:
    wanted = [params] if isinstance(params, (str, Tensor, nn.Module)) else list(params)
    names = {id(p): name for name, p in trainable.items()}
    chosen: set[str] = set()
    for entry in wanted:
        if isinstance(entry, str):
            hits = [name for name in trainable if name == entry or fnmatch.fnmatchcase(name, entry)]
        elif isinstance(entry, (Tensor, nn.Module)):
            tensors = entry.parameters() if isinstance(entry, nn.Module) else [entry]
            hits = [names[id(p)] for p in tensors if id(p) in names]
        else:
            raise TypeError(f"params= takes names, globs, parameters or modules, not {type(entry).__name__}.")
        if not hits:
            if isinstance(entry, nn.Module):
                shown = f"a {type(entry).__name__}, which has no trainable parameter of the model"
            else:
                shown = repr(entry) if isinstance(entry, str) else f"a tensor of shape {tuple(entry.shape)}"
                shown += ", which is no trainable parameter"
            raise ValueError(f"params= names {shown}. There are: {_names(trainable)}.")
        chosen.update(hits)
    if not chosen:
        raise ValueError(f"params= is empty; name at least one of {_names(trainable)}.")
    return {name: p for name, p in trainable.items() if name in chosen}


def _names(trainable: Mapping[str, Tensor], most: int = 8) -> str:
    names = list(trainable)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def with_values(model: nn.Module, values: Mapping[str, Tensor], run: Callable[[], Any]) -> Any:
    """What a function returns while a model has other tensors in the places of its parameters and buffers, by name."""
    return functional_call(_Running(model, run), {f"model.{name}": value for name, value in values.items()})


class _Running(nn.Module):
    """Runs a function beside a model, so that its values can be replaced without a call of the model."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Any:
        return self.run()
