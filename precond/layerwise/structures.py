"""The structure of the curvature in each part of a model, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from curvature import Curvature, DiagonalFisher
from curvature.estimation.coverage import Row
from curvature.structures.by_name import BLOCKS
from curvature.structures.mixed import Mixed, label
from curvature.structures.whole import WholeFisher
from solvers.outcome.arguments import instance

#: Layers (a module, a class of modules, a name or a glob) -> structure by name or as an object; a dict of options that
#: differ from those of the structure of all others (``"*"``); or ``None`` for plain gradients.
Structures = Mapping[Any, str | Curvature | Mapping[str, Any] | None]


@dataclass(frozen=True)
class _NoCurvature(DiagonalFisher):
    """Marks parameters that get no curvature."""


def with_structures(curvature: Curvature, structures: Structures | None) -> Curvature | Structures:
    """The curvature of a method, and its replacements in parts of the model.

    Raises:
        ValueError: If an option is not one of the curvature.
    """
    instance("structures", structures, Mapping, "a mapping of layers to structures", optional=True)
    if not structures:
        return curvature
    return {"*": curvature, **{layers: _resolved(layers, value, curvature) for layers, value in structures.items()}}


def on_model(curvature: Curvature | Structures, model: nn.Module) -> tuple[Curvature, frozenset[str]]:
    """The curvature of a model, and the names of the parameters that get none.

    Args:
        curvature: For all layers, or by layers.
        model: The model.

    Raises:
        ValueError: If layers are named that are not in the model, or a structure is unknown or fits no part.
    """
    if not isinstance(curvature, Mapping):
        return curvature.on(model), frozenset()
    default = _default(curvature)
    chosen = {layers: _resolved(layers, value, default) for layers, value in curvature.items()}
    marks = {layers: _NoCurvature() if value is None else DiagonalFisher() for layers, value in chosen.items()}
    marked = Mixed({"*": DiagonalFisher(), **marks}).on(model).chosen
    assert marked is not None
    plain = frozenset(name for name, mark in marked.items() if isinstance(mark, _NoCurvature))
    structures = {layers: value for layers, value in chosen.items() if value is not None}
    if structures.keys() <= {"*"}:
        return default.on(model), plain
    if isinstance(default, WholeFisher):
        raise ValueError("one matrix over the whole model has no structures for its parts; take one of blocks.")
    return Mixed({"*": default, **structures}, default.kind, default.samples).on(model), plain


def _default(structures: Structures) -> Curvature:
    """The curvature of layers that are not named, which dicts of options refer to."""
    given = [structures.get("*"), *structures.values()]
    found = next((value for value in given if isinstance(value, (str, Curvature))), None)
    if isinstance(found, str):
        if found not in BLOCKS:
            raise ValueError(f"a structure is one of {sorted(BLOCKS)} or a Curvature; got {found!r}.")
        found = BLOCKS[found]()
    if found is None:
        raise ValueError("curvature= needs a structure for the layers that it does not name: {'*': 'kfac'}.")
    return found


def _resolved(layers: Any, value: Any, default: Curvature) -> str | Curvature | None:
    """The structure of some layers; a dict of options is the default with these."""
    if not isinstance(value, Mapping):
        return value
    try:
        return replace(default, **value)
    except TypeError as error:
        raise ValueError(
            f"structures has {sorted(value)} for {label(layers)}, but these are not options of {default!r}."
        ) from error


def plain_row(name: str, p: Tensor) -> Row:
    """The row of a parameter without curvature in the coverage table."""
    return Row(name, tuple(p.shape), "-", "ignored", 0, "no rule: None in structures=, trained by its plain gradient")
