"""Structured linear operators and interchangeable solvers for them.

Knows nothing of neural networks: curvature estimates come as operators, optimisers and posteriors ask for their powers.
"""

from solvers.direct.auto import Auto
from solvers.direct.cholesky import Cholesky, CholeskyInverse
from solvers.direct.eigh import Eigh
from solvers.direct.orthogonal_iteration import Subspace
from solvers.direct.woodbury import Woodbury
from solvers.eigenpairs.eigsh import eigsh
from solvers.eigenpairs.result import Eigenpairs
from solvers.eigenpairs.svds import SingularTriplets, svds
from solvers.estimates.diagonal import diagonal
from solvers.estimates.estimate import Estimate
from solvers.estimates.frobenius_norm import frobenius_norm
from solvers.estimates.logdet import logdet
from solvers.estimates.quadratic_form import quadratic_form
from solvers.estimates.spectral_density import Density, spectral_density
from solvers.estimates.trace import trace
from solvers.fallback import Fallback, InFloat64, Jitter, Previous, ladder
from solvers.iterative.base import IterativeInverse, IterativeSolver
from solvers.iterative.cg import CG
from solvers.iterative.coupled_newton import CoupledNewton
from solvers.iterative.lsmr import LSMR
from solvers.iterative.matrix_iteration import MatrixIteration
from solvers.iterative.minres import MINRES
from solvers.iterative.neumann import Neumann
from solvers.iterative.newton_schulz import NewtonSchulz, polar
from solvers.iterative.nystrom import Nystrom
from solvers.moved import install as install_old_paths
from solvers.operators.block_diagonal import BlockDiagonal, Place, Segment
from solvers.operators.compositions import Product, Scaled, Shifted, Submatrix, Sum
from solvers.operators.congruence import Congruence
from solvers.operators.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from solvers.operators.dense import Dense
from solvers.operators.diagonal import Diagonal, identity
from solvers.operators.dispatch import rule
from solvers.operators.eigen import Eigen
from solvers.operators.flattened import Flattened
from solvers.operators.function import Function, from_scipy
from solvers.operators.kronecker import Kronecker
from solvers.operators.linear_operator import LinearOperator
from solvers.operators.low_rank import LowRank, Rows
from solvers.operators.reshape import Reshape
from solvers.operators.storable import from_state, state, storable
from solvers.outcome.errors import (
    InexactWarning,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotPositiveDefiniteError,
    NotSymmetricError,
    SingularMatrixError,
    SolverError,
    StructureError,
)
from solvers.outcome.solution import Solution, SolveInfo
from solvers.rules import diagonalize, power, solve
from solvers.solver import BasisSolver, Solver

__version__ = "0.1.0.dev0"  # of the distribution; setup.py reads it here

__all__ = [
    # Operators
    "BlockDiagonal",
    "CholeskyInverse",
    "Congruence",
    "Dense",
    "Diagonal",
    "Eigen",
    "Flattened",
    "Function",
    "IterativeInverse",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "Place",
    "Product",
    "Reshape",
    "Rows",
    "Scaled",
    "Segment",
    "Shifted",
    "Submatrix",
    "Sum",
    "from_scipy",
    "identity",
    # Damping
    "Damping",
    "FactoredTikhonov",
    "RelativeTikhonov",
    "Tikhonov",
    # Solvers
    "Auto",
    "BasisSolver",
    "CG",
    "Cholesky",
    "CoupledNewton",
    "Eigh",
    "Fallback",
    "InFloat64",
    "IterativeSolver",
    "Jitter",
    "LSMR",
    "MINRES",
    "MatrixIteration",
    "Neumann",
    "NewtonSchulz",
    "Nystrom",
    "Previous",
    "Solution",
    "SolveInfo",
    "Solver",
    "Subspace",
    "Woodbury",
    "ladder",
    # Rules
    "diagonalize",
    "polar",
    "power",
    "rule",
    "solve",
    # Estimates, with their errors
    "Density",
    "Eigenpairs",
    "Estimate",
    "SingularTriplets",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "logdet",
    "quadratic_form",
    "spectral_density",
    "svds",
    "trace",
    # State
    "from_state",
    "state",
    "storable",
    # Errors
    "InexactWarning",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "SingularMatrixError",
    "SolverError",
    "StructureError",
]

install_old_paths()
