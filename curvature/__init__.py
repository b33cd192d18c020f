"""Hessian, Gauss-Newton and Fisher matrices of a loss: exact, or in structures that are cheap to invert."""

from curvature import neighbours as neighbours  # first: refuses a stranger called solvers
from curvature import plots
from curvature.comparison import Comparison, NotComparableWarning, compare
from curvature.compression import Allocation, CompressedLayer, Compression, Grid, allocate, prune, quantize, sensitivity
from curvature.estimation.checkpoint import Checkpoint, CheckpointError
from curvature.estimation.coverage import Coverage, coverage
from curvature.influences import Influence, influence, self_influence
from curvature.landscape.interpolation import Interpolation, interpolation
from curvature.landscape.surface import Surface, surface
from curvature.layers.block import Block
from curvature.matrices.activation import activation_hessian
from curvature.matrices.covariance import gradient_covariance
from curvature.matrices.fisher import fisher
from curvature.matrices.ggn import ggn
from curvature.matrices.hessian import hessian
from curvature.matrices.jacobian import jacobian
from curvature.matrices.ntk import ntk
from curvature.matrices.per_sample import (
    gradient_second_moment,
    gradient_variance,
    per_sample_gradients,
    per_sample_norms,
)
from curvature.matrices.resumable import resumable_eigsh
from curvature.model.determinism import NondeterministicError, NotOneLossWarning, check_deterministic
from curvature.reports import Report, report
from curvature.structures.diagonal import DiagonalFisher
from curvature.structures.ekfac import EigenbasisFisher
from curvature.structures.estimator import Curvature, CurvatureEstimator, MeanEstimator, MeansEstimator
from curvature.structures.foof import InputKronecker
from curvature.structures.gram import GramFisher
from curvature.structures.inverse import InverseEstimator
from curvature.structures.kbfgs import KroneckerBFGS
from curvature.structures.kfac import KroneckerFisher
from curvature.structures.layer import LayerFisher
from curvature.structures.mixed import Mixed
from curvature.structures.singd import SINGDFisher
from curvature.structures.sketch import SketchedFisher
from curvature.structures.tnt import TensorNormal
from curvature.structures.unit import UnitFisher
from curvature.training.dynamics import Dynamics, dynamics, kernel_eigenvalues
from curvature.training.monitor import Monitor
from curvature.training.subspace import Subspace, overlap, subspace
from solvers import __version__ as __version__

__all__ = [
    "Allocation",
    "Block",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "CompressedLayer",
    "Compression",
    "Coverage",
    "Curvature",
    "CurvatureEstimator",
    "DiagonalFisher",
    "Dynamics",
    "EigenbasisFisher",
    "GramFisher",
    "Grid",
    "Influence",
    "InputKronecker",
    "Interpolation",
    "InverseEstimator",
    "KroneckerBFGS",
    "KroneckerFisher",
    "LayerFisher",
    "MeanEstimator",
    "MeansEstimator",
    "Mixed",
    "Monitor",
    "NondeterministicError",
    "NotComparableWarning",
    "NotOneLossWarning",
    "Report",
    "SINGDFisher",
    "SketchedFisher",
    "Subspace",
    "Surface",
    "TensorNormal",
    "UnitFisher",
    "activation_hessian",
    "allocate",
    "check_deterministic",
    "compare",
    "coverage",
    "dynamics",
    "fisher",
    "ggn",
    "gradient_covariance",
    "gradient_second_moment",
    "gradient_variance",
    "hessian",
    "influence",
    "interpolation",
    "jacobian",
    "kernel_eigenvalues",
    "ntk",
    "overlap",
    "per_sample_gradients",
    "per_sample_norms",
    "plots",
    "prune",
    "quantize",
    "report",
    "resumable_eigsh",
    "self_influence",
    "sensitivity",
    "subspace",
    "surface",
]
