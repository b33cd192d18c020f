"""The structure of the curvature in each part of a model, or none."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from curvature import Curvature, DiagonalFisher
from curvature.estimation.coverage import Row
from curvature.structures.by_name import BLOCKS
from curvature.structures.mixed import Mixed, label
from curvature.structures.whole import WholeFisher
from precond.layerwise.adam_step import AdamStep, embeddings
from solvers.outcome.arguments import instance

#: Layers (a module, a class of modules, a name or a glob) -> structure by name or as an object; a dict of options that
#: differ from those of the structure of all others (``"*"``); an :class:`~precond.AdamStep`; or ``None`` for plain
#: gradients.
Structures = Mapping[Any, str | Curvature | AdamStep | Mapping[str, Any] | None]


@dataclass(frozen=True)
class _NoCurvature(DiagonalFisher):
    """Marks parameters that get no curvature, and says what they get."""

    step: AdamStep | None = None


def with_structures(curvature: Curvature, structures: Structures | None) -> Curvature | Structures:
    """The curvature of a method, and its replacements in parts of the model.

    Raises:
        ValueError: If an option is not one of the curvature.
    """
    instance("structures", structures, Mapping, "a mapping of layers to structures", optional=True)
    if not structures:
        return curvature
    return {"*": curvature, **{layers: _resolved(layers, value, curvature) for layers, value in structures.items()}}


def on_model(
    curvature: Curvature | Structures, model: nn.Module, tables: AdamStep | None = None
) -> tuple[Curvature, dict[str, AdamStep | None]]:
    """The curvature of a model, and what parameters that get none have in its place; ``None`` for the plain gradient.

    Args:
        curvature: For all layers, or by layers.
        model: The model.
        tables: What tables of embeddings get that nothing is said of.

    Raises:
        ValueError: If layers are named that are not in the model, or a structure is unknown or fits no part.
    """
    names = embeddings(model) if tables is not None else []
    if names and not isinstance(curvature, Mapping):
        curvature = {"*": curvature}
    if not isinstance(curvature, Mapping):
        return curvature.on(model), {}
    # Of several names that fit, the last one counts.
    curvature = {**{glob.escape(name): tables for name in names}, **curvature}
    default = _default(curvature)
    chosen = {layers: _resolved(layers, value, default) for layers, value in curvature.items()}
    marks = {layers: _mark(value) for layers, value in chosen.items()}
    marked = Mixed({"*": DiagonalFisher(), **marks}).on(model).chosen
    assert marked is not None
    plain = {name: mark.step for name, mark in marked.items() if isinstance(mark, _NoCurvature)}
    structures: dict[Any, str | Curvature] = {
        layers: value for layers, value in chosen.items() if not (value is None or isinstance(value, AdamStep))
    }
    if structures.keys() <= {"*"}:
        return default.on(model), plain
    if isinstance(default, WholeFisher):
        raise ValueError("one matrix over the whole model has no structures for its parts; take one of blocks.")
    return Mixed({"*": default, **structures}, default.kind, default.samples).on(model), plain


def _mark(value: str | Curvature | AdamStep | None) -> Curvature:
    return _NoCurvature(step=value) if value is None or isinstance(value, AdamStep) else DiagonalFisher()


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


def _resolved(layers: Any, value: Any, default: Curvature) -> str | Curvature | AdamStep | None:
    """The structure of some layers; a dict of options is the default with these."""
    if not isinstance(value, Mapping):
        return value
    try:
        return replace(default, **value)
    except TypeError as error:
        raise ValueError(
            f"structures has {sorted(value)} for {label(layers)}, but these are not options of {default!r}."
        ) from error


def plain_row(name: str, p: Tensor, step: AdamStep | None) -> Row:
    """The row of a parameter without curvature in the coverage table."""
    if step is not None:
        return Row(
            name, tuple(p.shape), name, "diagonal", p.numel(), f"root of averaged squares of gradients: {step!r}"
        )
    return Row(name, tuple(p.shape), "-", "ignored", 0, "no rule: None in structures=, trained by its plain gradient")
