"""Trace and Frobenius norm, of the whole matrix and by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.reports.results import Matrix, Number, TraceResult
from curvature.reports.sections.study import BLOCK, Study
from solvers.estimates.estimate import Mean
from solvers.estimates.probes import norm, signs

_SAMPLES = (2 * BLOCK, 64)


def products(study: Study, matrix: Matrix) -> tuple[int, int]:
    """Products at least and as a rule: one for each random vector."""
    return _SAMPLES


def traces(study: Study, matrix: Matrix, allotted: float) -> TraceResult:
    r"""Trace, Frobenius norm and the layers' traces from the same products.

    Hutchinson's estimates for what is left of the matrix A when its known eigenpairs are taken out. With orthonormal V
    and :math:`V^\top A V = \Lambda` diagonal, as Ritz pairs have it converged or not, and
    :math:`B = A - V \Lambda V^\top`,

    .. math::
        \operatorname{tr} A_{ll} = \sum_i \lambda_i |v_{i,l}|^2 + \mathbb{E}\, z_l^\top (B z)_l, \qquad
        |A|_F^2 = \sum_i \lambda_i^2 + \mathbb{E}\, |B z|^2 .

    References:
        Hutchinson (1990), https://doi.org/10.1080/03610919008812866; Gambhir, Stathopoulos and Orginos (2017),
        https://arxiv.org/abs/1603.05988, for the deflation.
    """
    if matrix in study.dense:
        return _of_dense(study, study.dense[matrix])
    op = study.counted(study.operator(matrix))
    vectors, values = _known(study, matrix)
    generator, sums = study.generator("trace", matrix), Mean()
    begun, rate = study.budget.spent, study.block_rates[matrix]
    least, most = _SAMPLES
    while sums.count < most:
        z = signs(op, min(BLOCK, most - sums.count), generator)
        image = (op @ z).double()
        z = z.double()
        image = image - ((z @ vectors.mT) * values) @ vectors
        by_layer = [(z[:, part] * image[:, part]).sum(1) for part in study.layers.values()]
        sums.add(torch.stack([(z * image).sum(1), norm(image).square(), *by_layer], 1))
        if sums.count >= least and study.budget.spent - begun + BLOCK * rate > allotted:
            break
    return _result(study, sums, vectors, values)


def _known(study: Study, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Ritz vectors ``(k, P)`` and values ``(k,)``, float64; none where they were not computed."""
    vectors = study.vectors.get(matrix)
    if vectors is None or matrix not in study.eigenvalues:
        empty = torch.zeros(0, study.size, dtype=torch.float64, device=study.problem.parameters.device)
        return empty, empty[:, 0]
    values = [pair.value for pair in study.eigenvalues[matrix].largest]
    return vectors.double(), torch.tensor(values, dtype=torch.float64, device=vectors.device)


def _result(study: Study, sums: Mean, vectors: Tensor, values: Tensor) -> TraceResult:
    value, error = sums.value, sums.stderr
    square = float(value[1] + values.square().sum())
    root = square**0.5
    layers = {}
    for index, (name, part) in enumerate(study.layers.items(), start=2):
        known = float((values * vectors[:, part].square().sum(1)).sum())
        layers[name] = Number(float(value[index]) + known, float(error[index]), sums.count)
    return TraceResult(
        Number(float(value[0] + values.sum()), float(error[0]), sums.count),
        Number(root, float(error[1]) / (2 * root) if root > 0 else 0.0, sums.count),
        layers,
        sums.count,
    )


def _of_dense(study: Study, matrix: Tensor) -> TraceResult:
    diagonal = matrix.diagonal()
    layers = {name: Number(float(diagonal[part].sum())) for name, part in study.layers.items()}
    return TraceResult(Number(float(diagonal.sum())), Number(float(matrix.norm())), layers, study.size)
