"""The ends of the spectrum, and how much of the gradient lies there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.reports.results import Eigenvalue, EigenvaluesResult, Matrix, Number
from curvature.reports.sections.study import Study
from solvers import Eigenpairs, eigsh
from solvers.outcome.solution import silenced

_MOST = 2000  # products for one end of the spectrum, without another limit
_FEW = 2  # largest eigenvalues where there is no time for all
_SMALLEST = 3  # how many of the lowest eigenvalues are shown; what matters is whether there are negative ones


def products(study: Study, matrix: Matrix) -> tuple[int, int]:
    """Products at least, for an eigenvalue or two at each end, and as a rule, a basis and a restart or two."""
    top, bottom = _counts(study, matrix)
    return 4 * (min(_FEW, top) + min(1, bottom)), (4 * top + 60) + (2 * bottom + 50 if bottom else 0)


def _counts(study: Study, matrix: Matrix) -> tuple[int, int]:
    """Pairs at the upper end, with one more that tells the gap, and at the lower end: a GGN has none below zero."""
    top = min(study.k + 1, study.size)
    return top, min(_SMALLEST, study.k, study.size) if matrix == "hessian" else 0


def eigenvalues(study: Study, matrix: Matrix, allotted: float) -> EigenvaluesResult:
    """The largest eigenvalues, for the Hessian also the smallest, and the share of the gradient along them."""
    top, bottom = _counts(study, matrix)
    lower: Eigenpairs | None
    if matrix in study.dense:
        upper, lower = _from_dense(study, matrix, top)
    else:
        if allotted < 2 * (top + bottom) * study.rates[matrix]:  # fewer of them, in place of none
            top, bottom = min(_FEW, top), min(1, bottom)
        begun, share = study.budget.spent, (top + 15) / (top + 15 + (bottom + 12 if bottom else 0))
        upper = _search(study, matrix, top, "LA", 0.0, share * allotted)
        atol = study.rtol * float(upper.values.abs().max())
        # Whether the lowest eigenvalue is negative matters on the scale of the largest.
        lower = _search(study, matrix, bottom, "SA", atol, allotted - (study.budget.spent - begun)) if bottom else None
    study.vectors[matrix] = upper.vectors[: study.k].reshape(-1, study.size)
    kept = slice(0, study.k)
    return EigenvaluesResult(
        _rows(study, upper, kept),
        () if lower is None else _rows(study, lower, slice(None)),
        upper.complete,
        lower is None or lower.complete,
        _alignment(study, upper),
        upper.products + (0 if lower is None or matrix in study.dense else lower.products),
    )


def _from_dense(study: Study, matrix: Matrix, top: int) -> tuple[Eigenpairs, Eigenpairs]:
    """Both ends of a matrix that was formed; residuals are those of its rounding."""
    values, vectors = study.spectrum[matrix]
    eps = torch.finfo(study.operator(matrix).dtype).eps
    residual = eps * values.abs().max().expand(len(values)).clone()

    def pairs(index: Tensor) -> Eigenpairs:
        chosen = vectors[:, index].mT
        return Eigenpairs(
            values[index], chosen, residual[index], torch.ones_like(index, dtype=torch.bool), True, study.size, {}
        )

    order = torch.arange(len(values), device=values.device)
    return pairs(order.flip(0)[:top]), pairs(order[: min(_SMALLEST, study.k, study.size)])


class _Stop(Exception):
    """Raised when the allotted amount is spent."""


def _search(study: Study, matrix: Matrix, k: int, which: str, atol: float, allotted: float) -> Eigenpairs:
    """Lanczos within the allotted amount; its state is stored, and a stored one is continued."""
    op = study.counted(study.operator(matrix))
    name = f"{matrix} {which}"
    running: dict[str, Any] = study.store.content["running"]
    before: dict[str, Tensor] | None = running.get(name)
    rate, begun = study.rates[matrix], study.budget.spent
    last: dict[str, Tensor] | None = before

    def checkpoint(state: dict[str, Tensor]) -> None:
        nonlocal last
        last = state
        running[name] = state
        study.store.offer()
        # the true residuals at the end take k products, and ten steps pass before the next look
        if study.budget.spent - begun + (k + 10) * rate > allotted:
            raise _Stop

    spent = 0 if before is None else int(before["products"])
    limit = max(2 * k, spent + int(min(allotted / rate, _MOST)))
    options: dict[str, Any] = {"rtol": study.rtol, "atol": atol, "progress": False}
    start = study.start.get(matrix) if which == "LA" else None
    with silenced():  # the result says so itself
        try:
            fresh: dict[str, Any] = {"generator": study.generator("eigenvalues", name), "v0": start}
            pairs = eigsh(
                op,
                k,
                which,  # type: ignore[arg-type]
                max_products=limit,
                checkpoint=checkpoint,
                **(fresh if before is None else {"state": before}),
                **options,
            )
        except _Stop:
            pairs = eigsh(op, k, which, max_products=2 * k, state=last, **options)  # type: ignore[arg-type]
    running.pop(name, None)
    return pairs


def _rows(study: Study, pairs: Eigenpairs, kept: slice) -> tuple[Eigenvalue, ...]:
    shares = _shares(study, pairs.vectors)
    columns = (pairs.values, pairs.residuals, pairs.converged, shares)
    rows = zip(*(column[kept].tolist() for column in columns), strict=True)
    return tuple(Eigenvalue(value, residual, converged, share) for value, residual, converged, share in rows)


def _shares(study: Study, vectors: Tensor) -> Tensor:
    """Share of the squared gradient along each vector; zero for a zero gradient."""
    assert study.gradient is not None
    size = study.gradient.square().sum()
    along = (vectors.reshape(-1, study.size).double() @ study.gradient).square()
    return along / torch.where(size > 0, size, 1)


def _alignment(study: Study, pairs: Eigenpairs) -> Number | None:
    r"""Share of the squared gradient within the space of the first k vectors.

    A space with residuals R is turned against the true one by an angle of at most :math:`|R|_F / \delta`, where delta
    is the distance of its eigenvalues from all others (Davis and Kahan, 1970), and the share moves by no more than the
    sine of it.
    """
    assert study.gradient is not None and study.loss is not None
    if study.loss.gradient_norm == 0 or len(pairs.values) < min(study.k + 1, study.size):
        return None
    share = float(_shares(study, pairs.vectors[: study.k]).sum().clamp(max=1))
    if study.size <= study.k:
        return Number(1.0)
    values, residuals = pairs.values.double(), pairs.residuals.double()
    gap = float(values[study.k - 1] - residuals[study.k - 1] - values[study.k] - residuals[study.k])
    turned = float(residuals[: study.k].norm())
    return Number(share, min(1.0, turned / gap) if gap > 0 else 1.0)
