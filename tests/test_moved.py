"""Old module paths: the module of the new path, with a warning that names it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import curvature
import precond
import solvers
from solvers.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]


def is_hidden(old: str) -> bool:
    """Whether a public name of the package is that of the old module."""
    package, _, name = old.rpartition(".")
    return not isinstance(getattr(importlib.import_module(package), name, None), ModuleType | None)


HIDDEN = [old for old in MOVED if is_hidden(old)]


def forget_old_paths() -> None:
    for old in MOVED:
        sys.modules.pop(old, None)
        package, _, name = old.rpartition(".")
        if old not in HIDDEN:
            vars(importlib.import_module(package)).pop(name, None)


@pytest.fixture(autouse=True)
def first_import() -> Iterator[None]:
    """Every test is the first to import an old path, and leaves none behind."""
    forget_old_paths()
    yield
    forget_old_paths()


@pytest.mark.parametrize(("old", "new"), [pair for pair in MOVED.items() if pair[0] not in HIDDEN])
def test_an_old_path_gives_the_new_module(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} has moved; import {new}."):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == new and module.__spec__ is not None and module.__spec__.name == new


@pytest.mark.parametrize("old", HIDDEN)
def test_a_public_name_is_not_replaced_by_a_module(old: str) -> None:
    package, _, name = old.rpartition(".")
    before = getattr(importlib.import_module(package), name)
    with pytest.raises(ModuleNotFoundError, match=f"{old} is no module any more; import {MOVED[old]}."):
        importlib.import_module(old)
    assert getattr(importlib.import_module(package), name) is before


def test_imports_of_older_pages() -> None:
    with pytest.warns(DeprecationWarning, match="has moved"):
        from curvature.checkpoint import CheckpointError  # type: ignore[import-not-found]
        from curvature.dataset import estimate  # type: ignore[import-not-found]
        from curvature.estimator import MeanEstimator  # type: ignore[import-not-found]
        from solvers.errors import SolverError  # type: ignore[import-not-found]
    from curvature.layers.linear import LinearSite
    from precond.gradient import GradientOptimizer

    assert CheckpointError is curvature.CheckpointError and SolverError is solvers.SolverError
    assert issubclass(MeanEstimator, curvature.CurvatureEstimator) and callable(estimate)
    assert issubclass(precond.SOAP, GradientOptimizer) and isinstance(LinearSite, type)


def test_the_warning_points_at_the_import_and_comes_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import precond\nfrom precond.kfac import KFAC\nfrom precond.kfac import KFAC as K\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("DeprecationWarning") == 1
    assert "script.py:2: DeprecationWarning: precond.kfac has moved; import precond.layerwise.kfac." in outcome.stderr


@pytest.mark.parametrize(
    "name", ["curvature.nothing", "precond.kfac.nothing", "solvers.hessian", "curvature.report.view"]
)
@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_an_unknown_module_is_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_looking_for_a_module_imports_and_warns_nothing() -> None:
    with warnings.catch_warnings(record=True) as found:
        assert importlib.util.find_spec("curvature.collector") is not None
        assert importlib.util.find_spec("curvature.nothing") is None
    assert found == [] and "curvature.collector" not in sys.modules


def test_pickles_name_the_new_path_and_old_ones_load() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from curvature.kronecker import KroneckerFisher  # type: ignore[import-not-found]
    assert b"curvature.structures.kfac" in pickle.dumps(KroneckerFisher)
    with pytest.warns(DeprecationWarning, match="import curvature.structures.kfac"):
        sys.modules.pop("curvature.kronecker")
        assert pickle.loads(b"ccurvature.kronecker\nKroneckerFisher\n.") is curvature.KroneckerFisher
