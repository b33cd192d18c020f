"""Bayesian Laplace approximations: backends and posteriors for laplace-torch.

Importing this module needs laplace-torch (``pip install precond[laplace]``); nothing else in :mod:`curvature` does. It
also makes ``hessian_structure="kfac"``, ``"ekfac"``, ``"low_rank"`` and ``"low_rank_diag"`` known to
:func:`laplace.Laplace`.
"""

from __future__ import annotations

try:
    import laplace  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError("curvature.laplace needs laplace-torch: pip install precond[laplace]") from error

from curvature.laplace.backends.ggn import EFBackend, GGNBackend
from curvature.laplace.backends.hessian import HessianBackend
from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.matrix_free.evidence import Evidence, StochasticEvidence, evidence
from curvature.laplace.matrix_free.linearized import LinearizedLaplace
from curvature.laplace.matrix_free.predictive import Predictive
from curvature.laplace.matrix_free.sampling import PosteriorSampler, PosteriorSamples
from curvature.laplace.matrix_free.tuning import Tuned, optimize_evidence
from curvature.laplace.parametric.definite import IndefinitePosteriorError
from curvature.laplace.parametric.diagonal import DiagonalPosterior, LastLayerDiagonalPosterior
from curvature.laplace.parametric.files import load, save
from curvature.laplace.parametric.low_rank import LastLayerLowRankDiagPosterior, LowRankDiagPosterior
from curvature.laplace.parametric.online import OnlineLaplace
from curvature.laplace.parametric.posterior import (
    EKFACLaplace,
    KFACLaplace,
    LastLayerEKFACLaplace,
    LastLayerKFACLaplace,
    LowRankPosterior,
)

__all__ = [
    "BlockKron",
    "BlockKronDecomposed",
    "DiagonalPosterior",
    "EFBackend",
    "EKFACLaplace",
    "Evidence",
    "GGNBackend",
    "HessianBackend",
    "IndefinitePosteriorError",
    "KFACLaplace",
    "LastLayerDiagonalPosterior",
    "LastLayerEKFACLaplace",
    "LastLayerKFACLaplace",
    "LastLayerLowRankDiagPosterior",
    "LinearizedLaplace",
    "LowRankDiagPosterior",
    "LowRankPosterior",
    "OnlineLaplace",
    "PosteriorSampler",
    "PosteriorSamples",
    "Predictive",
    "StochasticEvidence",
    "Tuned",
    "evidence",
    "load",
    "optimize_evidence",
    "save",
]
