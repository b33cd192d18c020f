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

from curvature.laplace.backends import EFBackend, GGNBackend
from curvature.laplace.decomposed import BlockKronDecomposed
from curvature.laplace.diagonal import DiagonalPosterior, LastLayerDiagonalPosterior
from curvature.laplace.evidence import Evidence, StochasticEvidence, evidence
from curvature.laplace.files import load, save
from curvature.laplace.hessian import HessianBackend
from curvature.laplace.kron import BlockKron
from curvature.laplace.linearized import LinearizedLaplace
from curvature.laplace.low_rank import LastLayerLowRankDiagPosterior, LowRankDiagPosterior
from curvature.laplace.online import OnlineLaplace
from curvature.laplace.posterior import (
    EKFACLaplace,
    KFACLaplace,
    LastLayerEKFACLaplace,
    LastLayerKFACLaplace,
    LowRankPosterior,
)
from curvature.laplace.predictive import Predictive
from curvature.laplace.sampling import PosteriorSampler, PosteriorSamples
from curvature.laplace.tuning import Tuned, optimize_evidence

__all__ = [
    "BlockKron",
    "BlockKronDecomposed",
    "DiagonalPosterior",
    "EFBackend",
    "EKFACLaplace",
    "Evidence",
    "GGNBackend",
    "HessianBackend",
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
