"""Spectra of the curvature that an optimizer holds, from the form it is stored in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.structures.inverse import InverseEstimator
from solvers import Dense, Diagonal, Eigen, Flattened, Kronecker, LinearOperator
from solvers.operators.decompositions import eigenvalues
from solvers.precision import widen


def factor_spectra(optimizer: Any, damping: float) -> dict[str, float]:
    """Trace, largest eigenvalue and condition number of the curvature of each block; no pass over data.

    A decomposition of the Kronecker factors is the cost. Blocks that estimate the inverse, or have no estimate
    yet, are left out, as are eigenvalues that the form of a block does not give.

    Args:
        optimizer: Has ``preconditioners``, ``{name: object}`` whose ``estimator.operator()`` is a block's curvature.
        damping: Shift for the condition number, that of ``C + damping I``.

    Returns:
        ``{"name/trace": ..., "name/largest": ..., "name/condition": ...}``.
    """
    row: dict[str, float] = {}
    for name, preconditioner in optimizer.preconditioners.items():
        estimator = preconditioner.estimator
        if not estimator.ready or isinstance(estimator, InverseEstimator):
            continue
        op = estimator.operator()
        row[f"{name}/trace"] = float(op.trace())
        ends = _ends(op)
        if ends is not None:
            low, high = (max(float(end), 0.0) for end in ends)  # below zero by rounding
            row[f"{name}/largest"] = high
            row[f"{name}/condition"] = (high + damping) / (low + damping) if low + damping > 0 else float("inf")
    return row


def _ends(op: LinearOperator) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest eigenvalue of a positive semi-definite operator, where its form gives them cheaply."""
    if isinstance(op, Flattened):
        return _ends(op.op)
    if isinstance(op, Kronecker):
        spectra = [_spectrum(factor) for factor in op.factors]
        if any(spectrum is None for spectrum in spectra):
            return None
        low, high = torch.ones(()), torch.ones(())
        for spectrum in spectra:
            assert spectrum is not None
            low, high = low.to(spectrum) * spectrum.amin(-1), high.to(spectrum) * spectrum.amax(-1)
        return low.min(), high.max()
    spectrum = op.values if isinstance(op, Eigen) else _spectrum(op)
    return None if spectrum is None else (spectrum.min(), spectrum.max())


def _spectrum(op: LinearOperator) -> Tensor | None:
    if isinstance(op, Diagonal):
        return op.values
    return eigenvalues(widen(op.matrix)) if isinstance(op, Dense) else None
