"""The repository holds its own rules: layout, direction of imports, documented names, no optional imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import FunctionType

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("solvers", "curvature", "precond")
OPTIONAL = ("matplotlib", "laplace", "transformers", "peft", "sklearn")
# The one module whose purpose is an optional dependency: its classes inherit from it.
INTEGRATIONS = ("curvature.laplace",)

pytest_plugins = ["pytester"]


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    """The name of each package in turn."""
    if not (ROOT / request.param / "__init__.py").exists():
        pytest.skip(f"{request.param}/__init__.py does not exist yet")
    return request.param


def modules(package: str) -> list[str]:
    """Dotted names of all modules of a package, ``__main__`` excepted."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.stem != "__main__"]
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere, functions and TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listing.stdout.splitlines()]


def test_top_level_has_the_agreed_folders_and_files() -> None:
    tracked = tracked_files()
    folders = {path.parts[0] for path in tracked if len(path.parts) > 1}
    assert folders <= {*PACKAGES, "tests", "docs", ".ci", ".github"}
    files = {str(path) for path in tracked if len(path.parts) == 1}
    assert files == {
        *("setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "Makefile"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
        *(".gitignore", ".editorconfig", ".pre-commit-config.yaml"),
    }


def test_badges_say_what_the_setup_says() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    python = re.findall(r'python_requires=">=([\d.]+)"', setup)[0]
    torch = re.findall(r'"torch>=([\d.]+)"', setup)[0]
    licence = re.findall(r'license="(\w+)"', setup)[0]
    said = {"python": f"{python} or newer", "torch": f"{torch} or newer", "types": "in the package", "licence": licence}
    shown = dict(re.findall(r"!\[(\w+: [^]]+)\]\(docs/badges/(\w+)\.svg\)", (ROOT / "README.md").read_text("utf-8")))
    assert shown == {f"{left}: {right}": left for left, right in said.items()}
    assert {path.stem for path in (ROOT / "docs" / "badges").iterdir()} == set(said)
    for left, right in said.items():
        picture = (ROOT / "docs" / "badges" / f"{left}.svg").read_text(encoding="utf-8")
        assert re.findall(r">([^<>\n]+)</(?:title|text)>", picture) == [f"{left}: {right}", left, right]


def test_questions_of_an_issue_have_an_answer_here() -> None:
    """A template names commands and pages; they exist."""
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert [path.stem for path in templates] == ["crash", "method-or-layer", "training", "wrong-number"]
    for path in templates:
        head, _, body = path.read_text(encoding="utf-8").removeprefix("---\n").partition("---\n")
        assert {line.split(":")[0] for line in head.splitlines()} == {"name", "about", "title"}
        for page in re.findall(r"`(docs/[^`]+)`", body):
            assert (ROOT / page).exists(), page
        if path.stem != "method-or-layer":
            assert "python -m precond --version" in body


def test_every_test_folder_is_a_package() -> None:
    folders = {path.parent for path in tracked_files() if path.parts[0] == "tests" and path.suffix == ".py"}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").exists()] == []


def test_imports_point_one_way(package: str) -> None:
    forbidden = set(PACKAGES[PACKAGES.index(package) + 1 :]) | {"tests"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in (ROOT / package).rglob("*.py")
        if (found := imported_packages(path.read_text(encoding="utf-8")) & forbidden)
    }
    assert wrong == {}, f"{package} must not import these"


def test_import_finder_sees_every_form() -> None:
    source = """
import precond.kfac as k, numpy
from solvers.power import power
from . import tests
def lazy():
    from curvature import ggn
"""
    assert imported_packages(source) == {"precond", "numpy", "solvers", "curvature"}


def test_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_every_public_name_exists_and_is_documented(package: str) -> None:
    namespace = importlib.import_module(package)
    assert namespace.__doc__, f"{package} has no docstring"
    assert namespace.__all__, f"{package} exports nothing"
    assert len(set(namespace.__all__)) == len(namespace.__all__), "a name stands twice in __all__"
    assert [missing for name in namespace.__all__ for missing in undocumented(name, getattr(namespace, name))] == []


def undocumented(name: str, value: object) -> list[str]:
    """What lacks a docstring: the function, module or class itself, and the public methods of the class."""
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return []  # a constant or a type alias is documented by the comment beside it
    # A dataclass without a docstring is given its signature as one.
    missing = [] if value.__doc__ and not value.__doc__.startswith(f"{name}(") else [name]
    if inspect.isclass(value):
        methods = (property, cached_property, classmethod, staticmethod, FunctionType)
        for key, member in vars(value).items():
            if key.startswith("_") or not isinstance(member, methods):
                continue
            # An override inherits its docstring.
            if not any(vars(base)[key].__doc__ for base in value.__mro__ if key in vars(base)):
                missing.append(f"{name}.{key}")
    return missing


def test_documentation_check_sees_what_lacks_a_docstring() -> None:
    class Base:
        """Documented."""

        def method(self) -> None:
            """Documented."""

        @property
        def value(self) -> int:
            return 0

    @dataclass
    class Derived(Base):
        field: int = 0

        def method(self) -> None: ...

        @classmethod
        def make(cls) -> None: ...

        def _private(self) -> None: ...

    assert undocumented("Base", Base) == ["Base.value"]
    assert undocumented("Derived", Derived) == ["Derived", "Derived.make"]


def test_nothing_optional_is_imported_at_top_level() -> None:
    # Torch and scipy look for optional packages of their own, so they are imported before the watch begins.
    script = f"""
import importlib, sys
import numpy, scipy.linalg, scipy.sparse.linalg, torch, torch.distributed, tqdm

class Watch:
    found = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            self.found.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Watch())
for module in {[name for package in PACKAGES for name in modules(package) if not name.startswith(INTEGRATIONS)]!r}:
    importlib.import_module(module)
    assert not Watch.found, f"{{module}} imports {{Watch.found}} at top level"
"""
    outcome = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_installed_versions_are_those_that_setup_asks_for() -> None:
    wanted = [Requirement(line) for line in metadata.requires("precond") or []]
    assert wanted, "precond is not installed; run `make install`"
    unmet = {
        str(requirement): installed
        for requirement in wanted
        if (requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}))
        and (installed := metadata.version(requirement.name)) not in requirement.specifier
    }
    assert unmet == {}


def test_a_test_that_changes_global_settings_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("""
import torch

def test_dtype(): torch.set_default_dtype(torch.float64)
def test_threads(): torch.set_num_threads(torch.get_num_threads() + 1)
def test_deterministic(): torch.use_deterministic_algorithms(True)
def test_finds_all_mended(): pass
""")
    threads = torch.get_num_threads()
    # A process of its own: in this one, pytester would forget the modules of torch that are imported meanwhile.
    outcome = pytester.runpytest_subprocess("-p", "no:xdist")
    outcome.assert_outcomes(passed=4, errors=3)
    outcome.stdout.fnmatch_lines(
        [
            "*settings changed (default dtype: torch.float32 -> torch.float64)",
            f"*settings changed (number of threads: {threads} -> {threads + 1})",
            "*settings changed (deterministic algorithms: 0 -> 2)",
        ]
    )
