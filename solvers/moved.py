"""Old import paths of modules that moved into folders, with a warning that names the new path.

One finder for the three packages, asked only where nothing else finds a module. The old path gives the same module
object as the new one. Where a public function has the name of the old module (``curvature.hessian``), importing the
module would hide the function, so an error names the new path instead.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Package -> folder -> modules that moved there, as ``old=new`` where the name changed too.
FOLDERS = {
    "solvers": {
        "direct": "auto cholesky eigh woodbury subspace=orthogonal_iteration",
        "eigenpairs": "eigsh lobpcg storage svds thick_restart",
        "estimates": "estimate lanczos leave_one_out logdet probes quadratic_form spectral_density trace"
        " diagonal_estimate=diagonal frobenius=frobenius_norm",
        "iterative": "cg coupled_newton lsmr matrix_iteration minres neumann newton_schulz nystrom",
        "operators": "congruence damping dense diagonal eigen flattened function kronecker linear_operator reshape"
        " blocks=block_diagonal lowrank=low_rank shifted=compositions spectrum=eigenvalue_power state=storable"
        " submatrix=compositions",
        "outcome": "checks errors progress info=solution",
        "": "power=rules",
    },
    "curvature": {
        "cli": "support",
        "estimation": "accumulation checkpoint checks collector coverage dataset plan snapshot capture=tape"
        " recording=tape",
        "landscape": "directions interpolation objective surface",
        "layers": "block recorder samples",
        "losses": "signals inference=from_gradient",
        "matrices": "activation covariance fisher ggn hessian jacobian ntk problem eigenpairs=resumable"
        " gaussnewton=full lowrank=low_rank persample=per_sample products=dataset_operator",
        "model": "data determinism hooks parameters pullback settings wrappers",
        "structures": "diagonal estimator foof gram inverse mixed singd sketch tnt whole average=weighted_mean"
        " dense=layer eigenbasis=ekfac kronbfgs=kbfgs kronecker=kfac unitwise=unit",
        "training": "dynamics history monitor step_rule subspace factors=factor_spectra",
        "": "influence=influences report=reports",
    },
    "curvature.laplace": {
        "backends": "batch hessian jacobians last_layer backend=base",
        "factors": "decomposed kron sums",
        "likelihoods": "likelihood=summed",
        "matrix_free": "evidence linearized predictive prior sampling traces tuning",
        "parametric": "archive diagonal files low_rank online posterior predictions",
    },
    "precond": {
        "closure": "adahessian affine curveball gauss_newton hessian_free newton psgd residuals sophia"
        " products=gauss_newton_optimizer",
        "gradient": "bases galore kl_shampoo matrices mfac muon shampoo soap splus stacks",
        "layerwise": "ekfac groups kbfgs kfac natural_gradient replay seng singd smw step_size tnt whole"
        " rules=structures",
        "layerwise.blocks": "block_state preconditioner refresh rows blocks=by_name",
        "step": "adapt averaging base divergence options scheduled schedules update",
        "": "methods=catalogue",
    },
}

#: Old path -> new path.
MOVED = {
    f"{package}.{old}": ".".join(part for part in (package, folder, new or old) if part)
    for package, folders in FOLDERS.items()
    for folder, names in folders.items()
    for old, _, new in (name.partition("=") for name in names.split())
}


class OldPath(Loader):
    """Loads a module of :data:`MOVED` by its old path ``spec.name``."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at its new path.

        Raises:
            ModuleNotFoundError: If a public name of the package is that of the module.
        """
        package, _, name = spec.name.rpartition(".")
        if not isinstance(getattr(sys.modules[package], name, None), ModuleType | None):
            raise ModuleNotFoundError(f"{spec.name} is no module any more; import {MOVED[spec.name]}.", name=spec.name)
        warnings.warn(f"{spec.name} has moved; import {MOVED[spec.name]}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(MOVED[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore ``__spec__``, into which the import system has written the old path."""
        module.__spec__ = self.spec


class OldPaths(MetaPathFinder):
    """Finds the modules of :data:`MOVED`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old path, ``None`` for every other."""
        return ModuleSpec(name, OldPath()) if name in MOVED else None


def install() -> None:
    """Install the finder for old paths, after all other finders."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
