"""How far diagonal and Kronecker structures are from the GGN."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from curvature.losses.signals import FisherKind
from curvature.matrices.fisher import fisher
from curvature.matrices.ggn import ggn
from curvature.reports.results import Distance, DistancesResult, Number
from curvature.reports.sections.study import BLOCK, Study, names_of
from curvature.structures.estimator import Curvature
from solvers import LinearOperator
from solvers.estimates.estimate import Mean
from solvers.estimates.probes import signs

_SAMPLES = (8, 32)
_SMALL = 64  # blocks of this size are formed: their distance is exact
_COLUMNS = 64  # backward passes per batch that an exact structure may take; beyond, gradients are sampled
_DRAWS = 16


def kind(study: Study, name: str) -> FisherKind:
    """The kind of a structure: its own, or exact where the size of the outputs allows it."""
    own = study.structures[name]
    return own.kind if isinstance(own, Curvature) else "exact" if study.columns <= _COLUMNS else "mc"


def passes(study: Study) -> float:
    """Cost of the structures, in gradients."""
    return sum(_passes(study, name) for name in study.structures)


def _passes(study: Study, name: str) -> float:
    own = study.structures[name]
    draws = own.samples if isinstance(own, Curvature) else _DRAWS
    return 2.0 + {"exact": study.columns, "mc": draws, "empirical": 1}[kind(study, name)]


def products(study: Study) -> tuple[int, int]:
    """Products with the GGN at least, for the whole matrix, and as a rule, with those for each layer."""
    sizes = [part.stop - part.start for part in study.layers.values()]
    return _SAMPLES[0], _SAMPLES[1] + sum(size if size <= _SMALL else _SAMPLES[1] for size in sizes)


def distances(study: Study, allotted: float, refuse: Any) -> DistancesResult:
    r"""Relative distance :math:`|S - G|_F / |G|_F` of each structure, of the whole matrix and by layer.

    Both norms come from the same random vectors, :math:`|A|_F^2 = \mathbb{E}\,|A z|^2`, so that most of their errors
    cancel in the ratio.

    Args:
        study: The study.
        allotted: The amount to spend.
        refuse: Called with the structure and the exception where one cannot be made.
    """
    begun, rate = study.budget.spent, study.block_rates["ggn"]
    built: dict[str, LinearOperator] = {}
    for structure in study.structures:
        try:
            built[structure] = _build(study, structure)
        except Exception as error:
            refuse(structure, error)
    if "ggn" in study.dense:
        return _exact(study, built)
    g = study.counted(study.operator("ggn"))

    def left() -> float:
        return (allotted - (study.budget.spent - begun)) / rate

    samples = int(max(_SAMPLES[0], min(_SAMPLES[1], left() / (1 + len(study.layers)))))
    whole, spent = _ratios(study, g, built, slice(0, study.size), samples, left(), "whole")
    layers: dict[str, dict[str, Number]] = {}
    for name in study.by_weight("ggn"):
        part = study.layers[name]
        if left() < min(samples, part.stop - part.start):
            continue
        block = study.counted(study.operator("ggn").block(names_of(study, part)))
        layers[name], count = _ratios(study, block, built, part, samples, left(), name)
        spent += count
    return _collect(study, whole, layers, spent)


def _build(study: Study, name: str) -> LinearOperator:
    structure, generator = study.structures[name], study.generator("distances", name)
    samples = None if isinstance(structure, Curvature) else _DRAWS
    options: dict[str, Any] = {"kind": kind(study, name), "samples": samples, "generator": generator, **study.options}
    matrix = fisher if options["kind"] == "empirical" else ggn
    op = matrix(*study.given, structure=structure, **options)  # type: ignore[arg-type]
    study.budget.count(_passes(study, name))
    return op


def _ratios(
    study: Study,
    block: LinearOperator,
    built: dict[str, LinearOperator],
    part: slice,
    samples: int,
    affordable: float,
    name: str,
) -> tuple[dict[str, Number], int]:
    """Distances within one block of the GGN, empty where it is zero; and the products they took."""
    size = part.stop - part.start
    if size <= samples or size <= min(_SMALL, affordable):
        unit = torch.eye(size, dtype=block.dtype, device=block.device)
        exact = (block @ unit).double()
        found = {s: float((_apply(op, unit, part, study.size) - exact).norm()) for s, op in built.items()}
        norm = float(exact.norm())
        return ({s: Number(distance / norm) for s, distance in found.items()} if norm > 0 else {}), size
    generator, sums = study.generator("distances", name), Mean()
    rows: list[Tensor] = []
    while sums.count < samples:
        z = signs(block, min(BLOCK, samples - sums.count), generator)
        image = (block @ z).double()
        columns = [image.square().sum(1)]
        columns += [(_apply(op, z, part, study.size) - image).square().sum(1) for op in built.values()]
        rows.append(torch.stack(columns, 1))
        sums.add(rows[-1])
    squares = torch.cat(rows)
    if not bool(squares[:, 0].any()):
        return {}, samples
    return {s: root_of_ratio(squares[:, i], squares[:, 0]) for i, s in enumerate(built, start=1)}, samples


def root_of_ratio(above: Tensor, below: Tensor) -> Number:
    r"""Root of the ratio of two means, from pairs ``(m,)``; to first order its error is that of :math:`a - r b`."""
    ratio = float(above.mean() / below.mean())
    error = Mean()
    error.add((above - ratio * below) / below.mean())
    root = sqrt(ratio)
    return Number(root, float(error.stderr) / (2 * root) if root > 0 else 0.0, len(below))


def _apply(op: LinearOperator, x: Tensor, part: slice, size: int) -> Tensor:
    """The block of a structure times rows of a segment, float64."""
    full = x.new_zeros(len(x), size)
    full[:, part] = x
    return (op @ full.to(op.dtype))[:, part].double()


def _exact(study: Study, built: dict[str, LinearOperator]) -> DistancesResult:
    g = study.dense["ggn"]
    dense = {structure: op.to_dense().double() for structure, op in built.items()}

    def ratios(part: slice) -> dict[str, Number]:
        norm = float(g[part, part].norm())
        if norm == 0:
            return {}
        return {s: Number(float((m[part, part] - g[part, part]).norm()) / norm) for s, m in dense.items()}

    layers = {name: ratios(part) for name, part in study.layers.items()}
    return _collect(study, ratios(slice(0, study.size)), layers, study.size)


def _collect(
    study: Study, whole: dict[str, Number], layers: dict[str, dict[str, Number]], spent: int
) -> DistancesResult:
    structures = {
        structure: Distance(
            kind(study, structure), value, {name: layers[name][structure] for name in study.layers if layers.get(name)}
        )
        for structure, value in whole.items()
    }
    return DistancesResult(structures, spent)
