"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from typing import Any


def on_first_use(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package (PEP 562) whose public names load when asked for.

    Modules and folders of the package are found as its attributes, too, as if it had imported them, but not the modules
    in these folders: ``curvature.structures.kfac`` needs ``import curvature.structures.kfac``. Type checkers and
    editors read the imports that the package writes below ``if TYPE_CHECKING``; ``tests/test_house.py`` holds both to
    one list.

    Args:
        package: The package's ``__name__``.
        names: Module, a leading dot for one of the package -> names that it defines, with spaces between them.
    """
    homes = {name: module for module, defined in names.items() for name in defined.split()}

    def load(name: str) -> Any:
        module = sys.modules[package]
        if name in homes:
            value = getattr(importlib.import_module(homes[name], package), name)
        elif not name.startswith("_") and PathFinder.find_spec(f"{package}.{name}", list(module.__path__)):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)  # found without this function from now on
        return value

    def listed() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return load, listed
