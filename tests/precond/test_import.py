"""What does importing precond load beyond torch? The operators of solvers, and a method when it is named."""

from __future__ import annotations

import pytest

from tests.solvers.test_import import loaded

OURS = ("precond", "curvature", "solvers")


def test_importing_loads_little_beyond_torch() -> None:
    before, after = loaded("import torch"), loaded("import torch, precond")
    foreign = {name.partition(".")[0] for name in after - before} - {"precond", "curvature", "solvers"}
    # Modules of Python's own that take milliseconds; a package of others would take tenths of a second.
    assert foreign <= {"fractions", "hmac", "html", "secrets"}


@pytest.mark.parametrize(("code", "most"), [("import precond", 85), ("import precond\nprecond.Muon", 215)])
def test_a_method_is_loaded_when_it_is_named_and_no_other(code: str, most: int) -> None:
    names = {name for name in loaded(code) if name.partition(".")[0] in OURS}
    assert len(names) <= most  # 74 of 510 files; 206 with what a step is made of
    assert {name for name in names if name.startswith(("precond.gradient.", "precond.layerwise."))} <= {
        f"precond.gradient.{file}" for file in ("cautious", "matrices", "muon", "optimizer", "rows", "stacks")
    }


def test_all_methods_are_listed_before_any_was_named_and_folders_are_attributes() -> None:
    code = """
import curvature, precond
assert len(precond.methods()) == 25
precond.layerwise, curvature.structures, curvature.plots
assert not hasattr(precond, "KFACC") and not hasattr(curvature, "_path")
"""
    loaded(code)


def test_the_operators_a_file_may_name_are_known_once_curvature_is_imported() -> None:
    """Every storable class of curvature, whose modules are loaded when a file names it."""
    code = """
import curvature, solvers, sys
from solvers.operators import storable
known = dict(storable._HOMES)
for name in known:
    assert known[name] not in sys.modules or name in storable._KINDS, name
    try: solvers.from_state({"class": name})
    except solvers.StructureError: raise SystemExit(f"{name} is unknown")
    except (TypeError, KeyError): pass  # known, but nothing to make it of
import precond
precond.methods()
from curvature import *
late = {name: kind.__module__ for name, kind in storable._KINDS.items() if not kind.__module__.startswith("solvers.")}
assert late == known, late
"""
    loaded(code)
