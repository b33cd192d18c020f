"""Second-order optimizers with the interface of ``torch.optim``."""

from curvature import DiagonalFisher, EigenbasisFisher, KroneckerFisher
from precond.adahessian import AdaHessian
from precond.adapt import LevenbergMarquardt
from precond.averaging import IterateAverage
from precond.base import SecondOrderOptimizer
from precond.curveball import CurveBall
from precond.ekfac import EKFAC
from precond.galore import GaLore
from precond.gauss_newton import GaussNewton
from precond.hessian_free import HessianFree
from precond.kbfgs import KBFGS
from precond.kfac import KFAC
from precond.kl_shampoo import KLShampoo
from precond.layerwise import PreconditionedOptimizer
from precond.methods import Method, Taxonomy, methods
from precond.mfac import MFAC
from precond.muon import Muon
from precond.natural_gradient import NaturalGradient
from precond.newton import Newton
from precond.preconditioner import Preconditioner
from precond.psgd import PSGD
from precond.refresh import Doubling
from precond.residuals import PointwiseResidual
from precond.seng import SENG
from precond.shampoo import Shampoo
from precond.singd import SINGD
from precond.smw import SMWNaturalGradient
from precond.soap import SOAP
from precond.sophia import Sophia
from precond.splus import SPlus
from precond.step_size import QuadraticModel
from precond.tnt import TNT
from solvers import Cholesky, Eigh, FactoredTikhonov, Tikhonov

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
    "Sophia",
    "SPlus",
    "TNT",
    # what there is
    "Doubling",
    "IterateAverage",
    "LevenbergMarquardt",
    "Method",
    "methods",
    "PointwiseResidual",
    "QuadraticModel",
    "Taxonomy",
    # parts to choose from
    "Cholesky",
    "DiagonalFisher",
    "EigenbasisFisher",
    "Eigh",
    "FactoredTikhonov",
    "KroneckerFisher",
    "Preconditioner",
    "Tikhonov",
]
