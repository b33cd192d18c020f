"""Hessian, Gauss-Newton and Fisher matrices of a loss: exact, or in structures that are cheap to invert."""

from typing import TYPE_CHECKING

from curvature import neighbours as neighbours  # first: refuses a stranger called solvers
from solvers import __version__ as __version__
from solvers.lazy import on_first_use
from solvers.operators.storable import stored_in

if TYPE_CHECKING:  # what each name is; loaded when it is first used, by the same list below
    from curvature import plots
    from curvature.comparison import Comparison, NotComparableWarning, compare
    from curvature.compression import (
        Allocation,
        CompressedLayer,
        Compression,
        Grid,
        allocate,
        prune,
        quantize,
        sensitivity,
    )
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
    from curvature.residuals.ggn import residual_ggn
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
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            ".comparison": "Comparison NotComparableWarning compare",
            ".compression": "Allocation CompressedLayer Compression Grid allocate prune quantize sensitivity",
            ".estimation.checkpoint": "Checkpoint CheckpointError",
            ".estimation.coverage": "Coverage coverage",
            ".influences": "Influence influence self_influence",
            ".landscape.interpolation": "Interpolation interpolation",
            ".landscape.surface": "Surface surface",
            ".layers.block": "Block",
            ".matrices.activation": "activation_hessian",
            ".matrices.covariance": "gradient_covariance",
            ".matrices.fisher": "fisher",
            ".matrices.ggn": "ggn",
            ".matrices.hessian": "hessian",
            ".matrices.jacobian": "jacobian",
            ".matrices.ntk": "ntk",
            ".matrices.per_sample": "gradient_second_moment gradient_variance per_sample_gradients per_sample_norms",
            ".matrices.resumable": "resumable_eigsh",
            ".model.determinism": "NondeterministicError NotOneLossWarning check_deterministic",
            ".reports": "Report report",
            ".residuals.ggn": "residual_ggn",
            ".structures.diagonal": "DiagonalFisher",
            ".structures.ekfac": "EigenbasisFisher",
            ".structures.estimator": "Curvature CurvatureEstimator MeanEstimator MeansEstimator",
            ".structures.foof": "InputKronecker",
            ".structures.gram": "GramFisher",
            ".structures.inverse": "InverseEstimator",
            ".structures.kbfgs": "KroneckerBFGS",
            ".structures.kfac": "KroneckerFisher",
            ".structures.layer": "LayerFisher",
            ".structures.mixed": "Mixed",
            ".structures.singd": "SINGDFisher",
            ".structures.sketch": "SketchedFisher",
            ".structures.tnt": "TensorNormal",
            ".structures.unit": "UnitFisher",
            ".training.dynamics": "Dynamics dynamics kernel_eigenvalues",
            ".training.monitor": "Monitor",
            ".training.subspace": "Subspace overlap subspace",
        },
    )

stored_in("curvature.layers.block", "Part", "Block", "Place")
stored_in("curvature.structures.gram", "OuterRows")
stored_in("curvature.structures.singd", "Blocks")
stored_in("curvature.structures.sketch", "Restriction")
stored_in("curvature.structures.whole", "JointRows")

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
    "residual_ggn",
    "resumable_eigsh",
    "self_influence",
    "sensitivity",
    "subspace",
    "surface",
]
