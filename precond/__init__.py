"""Second-order optimizers with the interface of ``torch.optim``."""

from typing import TYPE_CHECKING

from curvature import neighbours as neighbours  # first: refuses a stranger called solvers
from solvers import Cholesky, Eigh, FactoredTikhonov, Tikhonov
from solvers import __version__ as __version__
from solvers.lazy import on_first_use

if TYPE_CHECKING:  # what each name is; loaded when it is first used, by the same list below
    from curvature import (
        DiagonalFisher,
        EigenbasisFisher,
        GramFisher,
        KroneckerBFGS,
        KroneckerFisher,
        LayerFisher,
        SINGDFisher,
        SketchedFisher,
        TensorNormal,
        UnitFisher,
    )
    from curvature.residuals.points import PointwiseResidual
    from curvature.residuals.taylor import directional_derivatives, laplacian
    from curvature.structures.whole import WholeFisher
    from precond.catalogue import Method, methods
    from precond.closure.adahessian import AdaHessian
    from precond.closure.curveball import CurveBall
    from precond.closure.gauss_newton import GaussNewton
    from precond.closure.hessian_free import HessianFree
    from precond.closure.newton import Newton
    from precond.closure.psgd import PSGD
    from precond.closure.sophia import Sophia
    from precond.closure.ssbfgs import SSBFGS
    from precond.closure.ssbroyden import SSBroyden
    from precond.distributed.layer_planner import LayerPlan
    from precond.distributed.planner import ShardPlan, plan
    from precond.fitting import LeastSquaresResult, least_squares
    from precond.gradient.galore import GaLore
    from precond.gradient.kl_shampoo import KLShampoo
    from precond.gradient.mfac import MFAC
    from precond.gradient.muon import Muon
    from precond.gradient.shampoo import Shampoo
    from precond.gradient.soap import SOAP
    from precond.gradient.soap_muon import SOAPMuon
    from precond.gradient.splus import SPlus
    from precond.grouping.groups import param_groups
    from precond.layerwise.adam_step import AdamStep
    from precond.layerwise.blocks.preconditioner import Preconditioner
    from precond.layerwise.ekfac import EKFAC
    from precond.layerwise.kbfgs import KBFGS
    from precond.layerwise.kfac import KFAC
    from precond.layerwise.natural_gradient import NaturalGradient
    from precond.layerwise.optimizer import PreconditionedOptimizer
    from precond.layerwise.quadratic_model import QuadraticModel
    from precond.layerwise.seng import SENG
    from precond.layerwise.singd import SINGD
    from precond.layerwise.smw import SMWNaturalGradient
    from precond.layerwise.tnt import TNT
    from precond.step.adapt import LevenbergMarquardt
    from precond.step.adaptive_rate import AdaptiveRate
    from precond.step.averaging import IterateAverage
    from precond.step.base import SecondOrderOptimizer
    from precond.step.lookahead import EMANesterov
    from precond.step.loop import Loop
    from precond.step.methods import Taxonomy
    from precond.step.norm_control import Hyperball, RadialBrake, UpdateFloor
    from precond.step.options import LossDamping, Momentum, Refresh, Tables, TrustRegion, Vectors, WeightDecay
    from precond.step.schedules import Doubling
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "curvature": "DiagonalFisher EigenbasisFisher GramFisher KroneckerBFGS KroneckerFisher LayerFisher"
            " SINGDFisher SketchedFisher TensorNormal UnitFisher",
            "curvature.residuals.points": "PointwiseResidual",
            "curvature.residuals.taylor": "directional_derivatives laplacian",
            "curvature.structures.whole": "WholeFisher",
            ".catalogue": "Method methods",
            ".closure.adahessian": "AdaHessian",
            ".closure.curveball": "CurveBall",
            ".closure.gauss_newton": "GaussNewton",
            ".closure.hessian_free": "HessianFree",
            ".closure.newton": "Newton",
            ".closure.psgd": "PSGD",
            ".closure.sophia": "Sophia",
            ".closure.ssbfgs": "SSBFGS",
            ".closure.ssbroyden": "SSBroyden",
            ".distributed.layer_planner": "LayerPlan",
            ".distributed.planner": "ShardPlan plan",
            ".fitting": "LeastSquaresResult least_squares",
            ".gradient.galore": "GaLore",
            ".gradient.kl_shampoo": "KLShampoo",
            ".gradient.mfac": "MFAC",
            ".gradient.muon": "Muon",
            ".gradient.shampoo": "Shampoo",
            ".gradient.soap": "SOAP",
            ".gradient.soap_muon": "SOAPMuon",
            ".gradient.splus": "SPlus",
            ".grouping.groups": "param_groups",
            ".layerwise.adam_step": "AdamStep",
            ".layerwise.blocks.preconditioner": "Preconditioner",
            ".step.schedules": "Doubling",
            ".layerwise.ekfac": "EKFAC",
            ".layerwise.kbfgs": "KBFGS",
            ".layerwise.kfac": "KFAC",
            ".layerwise.natural_gradient": "NaturalGradient",
            ".layerwise.optimizer": "PreconditionedOptimizer",
            ".layerwise.quadratic_model": "QuadraticModel",
            ".layerwise.seng": "SENG",
            ".layerwise.singd": "SINGD",
            ".layerwise.smw": "SMWNaturalGradient",
            ".layerwise.tnt": "TNT",
            ".step.adapt": "LevenbergMarquardt",
            ".step.adaptive_rate": "AdaptiveRate",
            ".step.averaging": "IterateAverage",
            ".step.base": "SecondOrderOptimizer",
            ".step.lookahead": "EMANesterov",
            ".step.loop": "Loop",
            ".step.methods": "Taxonomy",
            ".step.norm_control": "Hyperball RadialBrake UpdateFloor",
            ".step.options": "LossDamping Momentum Refresh Tables TrustRegion Vectors WeightDecay",
        },
    )

__all__ = [
    # optimizers
    "AdaHessian",
    "CurveBall",
    "EKFAC",
    "GaLore",
    "GaussNewton",
    "HessianFree",
    "KBFGS",
    "KFAC",
    "KLShampoo",
    "MFAC",
    "Muon",
    "NaturalGradient",
    "Newton",
    "PreconditionedOptimizer",
    "PSGD",
    "SecondOrderOptimizer",
    "SENG",
    "Shampoo",
    "SINGD",
    "SMWNaturalGradient",
    "SOAP",
    "SOAPMuon",
    "Sophia",
    "SPlus",
    "SSBFGS",
    "SSBroyden",
    "TNT",
    # options as objects
    "AdamStep",
    "AdaptiveRate",
    "EMANesterov",
    "Hyperball",
    "Loop",
    "LossDamping",
    "Momentum",
    "RadialBrake",
    "Refresh",
    "Tables",
    "TrustRegion",
    "UpdateFloor",
    "Vectors",
    "WeightDecay",
    # groups of parameters
    "param_groups",
    # the list of methods
    "directional_derivatives",
    "Doubling",
    "IterateAverage",
    "laplacian",
    "LayerPlan",
    "LevenbergMarquardt",
    "LeastSquaresResult",
    "least_squares",
    "Method",
    "methods",
    "plan",
    "PointwiseResidual",
    "QuadraticModel",
    "ShardPlan",
    "Taxonomy",
    # parts to choose from
    "Cholesky",
    "DiagonalFisher",
    "EigenbasisFisher",
    "Eigh",
    "FactoredTikhonov",
    "GramFisher",
    "KroneckerBFGS",
    "KroneckerFisher",
    "LayerFisher",
    "Preconditioner",
    "SINGDFisher",
    "SketchedFisher",
    "TensorNormal",
    "Tikhonov",
    "UnitFisher",
    "WholeFisher",
]
