"""What does importing solvers load?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_scipy_is_loaded_when_it_is_needed_and_not_before() -> None:
    def of_scipy(names: set[str]) -> set[str]:
        return {name for name in names if name.partition(".")[0] == "scipy"}

    assert of_scipy(loaded("import torch, solvers")) == of_scipy(loaded("import torch"))
    assert "scipy.sparse.linalg" in loaded("import torch, solvers\nsolvers.identity((2,)).to_scipy()")


def test_the_operators_a_file_may_name_are_known_once_solvers_is_imported() -> None:
    names = (
        "BlockDiagonal CholeskyInverse Congruence Dense Diagonal Eigen Flattened Kronecker LowRank Product Rows Scaled "
        "Segment Shifted Sum"
    )
    code = "\n".join(
        (
            "import solvers",
            f"for name in {names!r}.split():",
            "    try: solvers.from_state({'class': name})",
            "    except solvers.StructureError: raise SystemExit(f'{name} is unknown')",
            "    except (TypeError, KeyError): pass  # known, but nothing to make it of",
        )
    )
    loaded(code)
