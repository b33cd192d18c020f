"""The argument ``structure=``: a name, a curvature object, or a structure for each part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvature.losses.signals import FisherKind, check_kind
from curvature.structures.blocks import BLOCKS
from curvature.structures.estimator import Curvature
from curvature.structures.mixed import Mixed, Rules

__all__ = ["BLOCKS", "curvature_of", "kind_of"]


def kind_of(structure: str | Curvature | Rules, kind: FisherKind | None, default: FisherKind) -> FisherKind:
    """The kind given in a call, else that of its curvature (the first one in a mapping), else the default."""
    own = _curvatures(structure)
    chosen = kind if kind is not None else own[0].kind if own else default
    check_kind(chosen)
    return chosen


def curvature_of(
    structure: str | Curvature | Rules,
    kind: FisherKind | None = None,
    samples: int | None = None,
    *,
    default: FisherKind = "mc",
    **options: Any,
) -> Curvature:
    """The curvature that a structure stands for.

    Args:
        structure: A name in :data:`BLOCKS`, a curvature (returned as it is), or ``{rule: structure}`` for parts of a
            model, see :class:`~curvature.Mixed`.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``; see :func:`kind_of` for ``None``.
        samples: Draws per batch for ``"mc"``; ``None`` takes those of the curvature, 1 for a name.
        default: Kind of a structure given by name where ``kind`` is ``None``.
        options: Options of a structure given by name.

    Raises:
        ValueError: If the structure is unknown, or a curvature has another kind or number of samples than the call.
        TypeError: If there are options beside a curvature or a mapping, or a name does not have them.
    """
    own = _curvatures(structure)
    kind = kind_of(structure, kind, default)
    samples = samples if samples is not None else own[0].samples if own else 1
    if isinstance(structure, str) and structure in BLOCKS:
        return BLOCKS[structure](kind, samples, **options)
    if not isinstance(structure, (Curvature, Mapping)):
        raise ValueError(f"structure must be one of {sorted(BLOCKS)}, a Curvature or a mapping, got {structure!r}.")
    if options:
        raise TypeError(
            f"{', '.join(options)}: options go with a structure given by name, but it is {structure!r} here, which has "
            "its own. Give them to the curvature object, as in KroneckerFisher(sharing='reduce')."
        )
    if isinstance(structure, Mapping):
        return Mixed(structure, kind, samples)
    if structure.kind != kind:
        raise ValueError(
            f"the call says kind={kind!r}, but {structure!r} kind={structure.kind!r}. Say it in one place."
        )
    if kind == "mc" and structure.samples != samples:
        raise ValueError(
            f"the call says samples={samples}, but {structure!r} samples={structure.samples}. Say it in one place."
        )
    return structure


def _curvatures(structure: str | Curvature | Rules) -> list[Curvature]:
    """The curvature objects in an argument."""
    given = structure.values() if isinstance(structure, Mapping) else [structure]
    return [entry for entry in given if isinstance(entry, Curvature)]
