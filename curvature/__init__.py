"""Curvature of a model's loss: what it is, estimated in the structures that can be inverted."""

from curvature import plots
from curvature.activation import activation_hessian
from curvature.block import Block
from curvature.checkpoint import Checkpoint, CheckpointError
from curvature.covariance import gradient_covariance
from curvature.coverage import Coverage, coverage
from curvature.dense import LayerFisher
from curvature.determinism import NondeterministicError, check_deterministic
from curvature.diagonal import DiagonalFisher
from curvature.dynamics import Dynamics, dynamics, kernel_eigenvalues
from curvature.eigenbasis import EigenbasisFisher
from curvature.eigenpairs import resumable_eigsh
from curvature.estimator import Curvature, CurvatureEstimator
from curvature.fisher import fisher
from curvature.foof import InputKronecker
from curvature.ggn import ggn
from curvature.gram import GramFisher
from curvature.hessian import hessian
from curvature.influence import Influence, influence, self_influence
from curvature.interpolation import Interpolation, interpolation
from curvature.inverse import InverseEstimator
from curvature.jacobian import jacobian
from curvature.kronbfgs import KroneckerBFGS
from curvature.kronecker import KroneckerFisher
from curvature.mixed import Mixed
from curvature.monitor import Monitor
from curvature.ntk import ntk
from curvature.persample import gradient_second_moment, gradient_variance, per_sample_gradients, per_sample_norms
from curvature.report import Report, report
from curvature.singd import SINGDFisher
from curvature.sketch import SketchedFisher
from curvature.subspace import Subspace, overlap, subspace
from curvature.surface import Surface, surface
from curvature.tnt import TensorNormal
from curvature.unitwise import UnitFisher

__all__ = [
    "Block",
    "Checkpoint",
    "CheckpointError",
    "Coverage",
    "Curvature",
    "CurvatureEstimator",
    "DiagonalFisher",
    "Dynamics",
    "EigenbasisFisher",
    "GramFisher",
    "Influence",
    "InputKronecker",
    "Interpolation",
    "InverseEstimator",
    "KroneckerBFGS",
    "KroneckerFisher",
    "LayerFisher",
    "Mixed",
    "Monitor",
    "NondeterministicError",
    "Report",
    "SINGDFisher",
    "SketchedFisher",
    "Subspace",
    "Surface",
    "TensorNormal",
    "UnitFisher",
    "activation_hessian",
    "check_deterministic",
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
    "report",
    "resumable_eigsh",
    "self_influence",
    "subspace",
    "surface",
]
