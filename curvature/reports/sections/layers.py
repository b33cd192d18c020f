"""The largest eigenvalue of each layer's block on the diagonal."""

from __future__ import annotations

import torch

from curvature.reports.results import Eigenvalue, LayersResult, Matrix
from curvature.reports.sections.study import Study, names_of
from solvers import eigsh
from solvers.operators.decompositions import eigendecomposition
from solvers.outcome.solution import silenced

_PRODUCTS = (8, 30)  # for one layer


def products(study: Study, matrix: Matrix) -> tuple[int, int]:
    """Products at least, for one layer, and as a rule, for all of them."""
    sizes = [part.stop - part.start for part in study.layers.values()]
    return min(_PRODUCTS[0], *sizes), sum(min(_PRODUCTS[1], size) for size in sizes)


def layers(study: Study, matrix: Matrix, allotted: float) -> LayersResult:
    """Largest eigenvalues by layer, those with the largest trace first; the budget may not reach the others."""
    begun, rate = study.budget.spent, study.rates.get(matrix, 0.0)
    found: dict[str, Eigenvalue] = {}
    spent = 0
    for name in study.by_weight(matrix):
        size = study.layers[name].stop - study.layers[name].start
        least, usual = (min(number, size) for number in _PRODUCTS)
        left = allotted - (study.budget.spent - begun)
        if matrix not in study.dense and found and least * rate > left:
            break
        found[name], products_spent = _largest(study, matrix, name, max(least, min(3 * usual, left / max(rate, 1e-12))))
        spent += products_spent
    return LayersResult({name: found[name] for name in study.layers if name in found}, spent)


def _largest(study: Study, matrix: Matrix, name: str, limit: float) -> tuple[Eigenvalue, int]:
    part = study.layers[name]
    size = part.stop - part.start
    whole = study.operator(matrix)
    if matrix in study.dense:
        block, spent = study.dense[matrix][part, part], 0
    else:
        op = study.counted(whole.block(names_of(study, part)))
        if size > min(_PRODUCTS[1], limit):
            with silenced():  # the result says so itself
                pairs = eigsh(
                    op,
                    1,
                    rtol=study.rtol,
                    max_products=int(limit),
                    search_copies=False,
                    generator=study.generator("layers", matrix, name),
                    progress=False,
                )
            value = Eigenvalue(
                float(pairs.values[0]),
                float(pairs.residuals[0]),
                bool(pairs.converged[0]) and pairs.complete,
                _share(study, name, pairs.vectors[0]),
            )
            return value, pairs.products
        block, spent = op.to_dense().double(), size
    values, vectors = eigendecomposition((block + block.mT) / 2)
    rounding = torch.finfo(whole.dtype).eps * float(values.abs().max())
    return Eigenvalue(float(values[-1]), rounding, True, _share(study, name, vectors[:, -1])), spent


def _share(study: Study, name: str, vector: torch.Tensor) -> float:
    """Share of the layer's squared gradient along a vector."""
    assert study.gradient is not None
    gradient = study.gradient[study.layers[name]]
    size = float(gradient.square().sum())
    return float((vector.flatten().double() @ gradient).square()) / size if size > 0 else 0.0
