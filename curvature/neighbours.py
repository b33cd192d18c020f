"""Is ``solvers`` ours? Others use that name, too, and a stranger is refused before its contents can be missed."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec


def check_solvers() -> None:
    """Look at the package ``solvers`` that Python finds, and import it only if it is the one that came with this one.

    Raises:
        ImportError: If it is another one: a file of the user's with that name, or a package of another distribution.
    """
    spec = None if "solvers" in sys.modules else find_spec("solvers")
    module = sys.modules.get("solvers")
    folders = getattr(module, "__path__", None) if module else spec and spec.submodule_search_locations
    if folders and PathFinder.find_spec("solvers.rules", list(folders)):
        import solvers

        if hasattr(solvers, "LinearOperator"):
            return
    place = getattr(module, "__file__", None) or (spec and spec.origin) or (folders and list(folders)) or "nothing"
    raise ImportError(
        f"curvature and precond need the package `solvers` that was installed with them, and `import solvers` finds "
        f"{place}. Rename that file or folder, or take its folder from sys.path; where another distribution installed "
        "it, uninstall that and reinstall this one: `pip uninstall solvers`, `pip install --force-reinstall precond`.",
        name="solvers",
    )


check_solvers()
