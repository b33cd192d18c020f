"""Structured linear operators and interchangeable solvers for them.

Knows nothing of neural networks: curvature estimates come as operators, optimisers and posteriors ask for their powers.
"""

from solvers.auto import Auto
from solvers.blocks import BlockDiagonal, Place, Segment
from solvers.cg import CG
from solvers.cholesky import Cholesky, CholeskyInverse
from solvers.congruence import Congruence
from solvers.coupled_newton import CoupledNewton
from solvers.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from solvers.dense import Dense
from solvers.diagonal import Diagonal, identity
from solvers.diagonal_estimate import diagonal
from solvers.eigen import Eigen
from solvers.eigenpairs import Eigenpairs
from solvers.eigh import Eigh
from solvers.eigsh import eigsh
from solvers.errors import (
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
from solvers.estimate import Estimate
from solvers.fallback import Fallback, InFloat64, Jitter, Previous, ladder
from solvers.flattened import Flattened
from solvers.frobenius import frobenius_norm
from solvers.function import Function, from_scipy
from solvers.info import Solution, SolveInfo
from solvers.iterative import IterativeInverse, IterativeSolver
from solvers.kronecker import Kronecker
from solvers.linear_operator import LinearOperator, Product, Scaled, Sum
from solvers.logdet import logdet
from solvers.lowrank import LowRank, Rows
from solvers.lsmr import LSMR
from solvers.matrix_iteration import MatrixIteration
from solvers.minres import MINRES
from solvers.neumann import Neumann
from solvers.newton_schulz import NewtonSchulz, polar
from solvers.nystrom import Nystrom
from solvers.power import diagonalize, power, solve
from solvers.quadratic_form import quadratic_form
from solvers.reshape import Reshape
from solvers.shifted import Shifted
from solvers.solver import BasisSolver, Solver
from solvers.spectral_density import Density, spectral_density
from solvers.state import from_state, state, storable
from solvers.submatrix import Submatrix
from solvers.subspace import Subspace
from solvers.svds import SingularTriplets, svds
from solvers.trace import trace
from solvers.woodbury import Woodbury

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
