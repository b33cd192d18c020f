"""The house: which folder may import which, and what no module may do to another. See docs/architecture.md."""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("solvers", "curvature", "precond")

#: Room -> rooms it imports, read from the top down: a room imports only those below it. A room is a folder, or a module
#: with a row of its own; a package stands for the public names of its ``__init__.py``. A dot begins the name of a room
#: of the same package. Every arrow is used, so that a new one is written down here on purpose.
HOUSE: dict[str, str] = {
    "precond.__main__": ".command_line",
    "precond.command_line": ".demo .catalogue solvers",
    "precond.demo": ".layerwise .step solvers solvers.files",
    "precond.taxonomy": ".catalogue .step",
    "precond": ".catalogue .distributed .layerwise .layerwise.blocks .closure .gradient .step curvature"
    " curvature.structures curvature.residuals curvature.neighbours solvers solvers.lazy .fitting .grouping",
    "precond.catalogue": ".layerwise .closure .gradient .step",
    "precond.integrations": ".step curvature.model",
    "precond.grouping": ".step curvature.estimation curvature.layers curvature.model solvers.outcome",
    "precond.layerwise": ".layerwise.blocks .distributed .step curvature curvature.estimation curvature.structures"
    " curvature.losses curvature.model solvers solvers.outcome solvers.precision",
    "precond.layerwise.blocks": ".distributed .step curvature curvature.estimation curvature.structures"
    " curvature.layers curvature.model solvers solvers.operators solvers.precision solvers.outcome",
    "precond.closure": ".distributed .gradient .step curvature.estimation curvature.residuals curvature.losses"
    " curvature.model solvers solvers.precision solvers.outcome solvers.triangles",
    "precond.fitting": ".step curvature.model solvers.outcome",
    "precond.gradient": ".distributed .step solvers solvers.iterative solvers.direct solvers.precision"
    " solvers.operators"
    " solvers.outcome solvers.triangles",
    "precond.step": ".distributed curvature.estimation curvature.losses curvature.model solvers solvers.precision"
    " solvers.outcome solvers.tree",
    "precond.distributed": "curvature.estimation curvature.structures curvature.layers curvature.model solvers"
    " solvers.tree",
    "curvature.__main__": ".cli",
    "curvature.cli": ".comparison .reports .plots .matrices .estimation .structures .layers .losses .model solvers"
    " solvers.outcome solvers.eigenpairs solvers.estimates solvers.tree solvers.files .compression",
    "curvature.laplace": ".laplace.parametric .laplace.matrix_free .laplace.backends .laplace.factors",
    "curvature.laplace.posteriors": ".laplace.backends .laplace.factors .losses .model",
    "curvature.laplace.parametric": ".laplace.backends .laplace.factors .matrices .estimation .losses solvers"
    " solvers.tree solvers.files solvers.outcome",
    "curvature.laplace.matrix_free": ".laplace.likelihoods .matrices .losses .model solvers solvers.estimates"
    " solvers.outcome solvers.precision solvers.operators",
    "curvature.laplace.backends": ".laplace.factors .laplace.likelihoods .matrices .estimation .structures .layers"
    " .losses .model solvers solvers.operators solvers.precision solvers.outcome solvers.triangles",
    "curvature.laplace.factors": ".structures .layers solvers solvers.operators solvers.precision solvers.triangles",
    "curvature.laplace.likelihoods": ".losses",
    "curvature": ".comparison .reports .plots .influences .training .landscape .matrices .residuals .estimation"
    " .structures"
    " .layers .model .compression .neighbours solvers solvers.lazy solvers.operators",
    "curvature.neighbours": "solvers",
    "curvature.comparison": ".reports .reports.pages .reports.results .plots solvers solvers.files",
    "curvature.reports": ".reports.sections .reports.pages .reports.results .estimation .structures .losses .model"
    " solvers.tree solvers.files solvers.outcome",
    "curvature.reports.sections": ".reports.results .matrices .estimation .structures .losses .model solvers"
    " solvers.estimates solvers.operators solvers.outcome .compression",
    "curvature.reports.pages": ".reports.results .plots solvers",
    "curvature.reports.results": ".estimation",
    "curvature.plots": ".training .landscape .model solvers solvers.outcome .compression",
    "curvature.influences": ".matrices .estimation .structures .layers .losses .model solvers solvers.tree"
    " solvers.precision solvers.operators solvers.outcome",
    "curvature.compression": ".matrices .estimation .structures .layers .losses .model solvers solvers.outcome",
    "curvature.training": ".matrices .structures .layers .losses .model solvers solvers.precision solvers.operators"
    " solvers.files solvers.outcome",
    "curvature.landscape": ".matrices .estimation .losses .model solvers solvers.outcome",
    "curvature.matrices": ".estimation .structures .layers .losses .model solvers solvers.eigenpairs solvers.precision"
    " solvers.outcome solvers.pages solvers.triangles",
    "curvature.residuals": ".layers .model solvers solvers.outcome solvers.triangles",
    "curvature.estimation": ".structures .layers .losses .model solvers solvers.tree solvers.files solvers.precision"
    " solvers.outcome",
    "curvature.structures": ".layers .losses .model solvers solvers.operators solvers.precision solvers.outcome"
    " solvers.triangles",
    "curvature.layers": ".layers.axes .losses .model solvers solvers.pages solvers.precision solvers.triangles",
    "curvature.layers.axes": ".model",
    "curvature.losses": "solvers.precision solvers.outcome",
    "curvature.model": "solvers.outcome",
    "solvers": ".moved .fallback .rules .iterative .direct .solver .eigenpairs .estimates .operators .outcome",
    "solvers.moved": "",
    "solvers.fallback": ".rules .direct .solver .operators .outcome",
    "solvers.rules": ".iterative .direct .solver .operators .outcome .precision",
    "solvers.iterative": ".solver .operators .outcome .precision",
    "solvers.direct": ".solver .operators .outcome .precision .triangles",
    "solvers.solver": ".operators .outcome",
    "solvers.eigenpairs": ".estimates .operators .outcome .precision",
    "solvers.estimates": ".operators .outcome .precision",
    "solvers.operators": ".tree .outcome .precision",
    "solvers.lazy": "",
    "solvers.tree": "",
    "solvers.triangles": "",
    "solvers.outcome": "",
    "solvers.pages": "",
    "solvers.precision": "",
    "solvers.files": "",
}

#: Modules of ours that are imported inside a function, and why.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    ("curvature.neighbours", "solvers"): "another package of that name is recognised before its code runs",
}

#: Modules that register forward hooks on modules of the user's, and hooks on parameters, and what for.
HOOKS: dict[str, str] = {
    "curvature.estimation.recording": "the passes of a training loop",
    "curvature.estimation.tape": "the calls of the loss in it",
    "curvature.estimation.followed_layer": "single layers, in steps without statistics",
    "curvature.model.data": "the labels that a module inside a wrapper gets, during one call on data",
    "curvature.matrices.activation": "the result of one module, during passes over data",
    "precond.distributed.closures": "which parallel modules a closure calls, while it runs",
    "precond.step.graph": "the calls of the loss in a closure, while it runs",
}
#: How such hooks are registered.
_REGISTERS = re.compile(
    r"register_(module_)?(forward|full_backward|backward)_(pre_)?hook|register_post_accumulate_grad_hook"
)

#: Class names that stand twice, both of them public and each the word of its field.
SHARED_NAMES: dict[str, str] = {
    "Subspace": "curvature.Subspace, leading eigenvectors over training; solvers.Subspace, the iteration",
}

#: Private names by which other libraries offer something, read of objects of theirs.
LENT = {
    "_key": "laplace-torch finds a posterior's class by it",
    "_fields": "typing.NamedTuple",
    "_make": "typing.NamedTuple",
}


@dataclass(frozen=True)
class Import:
    """One import of a module of the tree.

    Attributes:
        source: The module that imports.
        target: The module that is imported, or that defines the imported name.
        late: Whether it stands inside a function.
    """

    source: str
    target: str
    late: bool


class Tree:
    """The modules of some packages, read as text.

    Args:
        root: Folder that holds the packages.
        packages: Their names.
    """

    def __init__(self, root: Path, packages: tuple[str, ...] = PACKAGES) -> None:
        self.root = root
        self.files: dict[str, Path] = {}
        for package in packages:
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    @cached_property
    def sources(self) -> dict[str, ast.Module]:
        """Module -> its syntax tree."""
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}

    @cached_property
    def packages(self) -> list[str]:
        """Modules that are folders."""
        return [name for name, path in self.files.items() if path.name == "__init__.py"]

    @cached_property
    def imports(self) -> list[Import]:
        """All imports of modules of the tree, inside functions and for type checking too."""
        found = []
        for module, source in self.sources.items():
            late = {id(node) for function in functions(source) for node in ast.walk(function)}
            for node in ast.walk(source):
                targets = {target for target in self._targets(module, node) if target != module}
                found += [Import(module, target, id(node) in late) for target in sorted(targets)]
        return found

    def _targets(self, module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in self.files)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                here = module.split(".") + ([""] if module in self.packages else [])
                origin = ".".join([*here[: -node.level], *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                if name in self.files or origin in self.files:
                    yield name if name in self.files else origin


def functions(source: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(source) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def room(module: str, house: Collection[str]) -> str:
    """The row a module belongs to: the longest that begins its name."""
    parts = module.split(".")
    names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((name for name in names if name in house), module)


def arrows(tree: Tree, house: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
    """Arrows between rooms, each with the modules that draw it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for each in tree.imports:
        pair = room(each.source, house), room(each.target, house)
        if pair[0] != pair[1]:
            found[pair].append(f"{each.source} imports {each.target}")
    return found


def below(name: str, house: Mapping[str, str]) -> list[str]:
    """The rooms that a row allows."""
    package = name.partition(".")[0]
    return [package + target if target.startswith(".") else target for target in house[name].split()]


def broken_walls(tree: Tree, house: Mapping[str, str]) -> list[str]:
    """Folders without a row, rows without a folder, rows that look upwards, arrows not allowed, arrows not used."""
    found = [f"{name} has no row" for name in tree.packages if name not in house]
    found += [f"{name} is no module" for name in house if name not in tree.files]
    allowed = {(name, target) for name in house for target in below(name, house)}
    order = list(house)
    for source, target in sorted(allowed):
        if target not in house or order.index(target) <= order.index(source):
            found.append(f"the row of {source} names {target}, which does not stand below it")
    drawn = arrows(tree, house)
    found += [f"{text}: no arrow from {a} to {b}" for a, b in sorted(set(drawn) - allowed) for text in drawn[a, b]]
    return found + [f"no module draws the arrow from {a} to {b}" for a, b in sorted(allowed - set(drawn))]


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (the strong components of more than one node)."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        stack = [start]
        while stack:
            new = edges.get(stack.pop(), set()) - seen
            seen |= new
            stack += new
        reached[start] = seen
    groups = {tuple(sorted({b for b in seen if a in reached.get(b, ())})) for a, seen in reached.items() if a in seen}
    return [list(group) for group in sorted(groups)]


def circles_of_files(tree: Tree) -> list[list[str]]:
    edges: dict[str, set[str]] = defaultdict(set)
    for each in tree.imports:
        edges[each.source].add(each.target)
    return circles(edges)


def late_imports(tree: Tree) -> set[tuple[str, str]]:
    return {(each.source, each.target) for each in tree.imports if each.late}


def hidden_modules(modules: list[str]) -> list[str]:
    """Modules that ``import package.module as m`` would not give, and public names that equal a submodule's."""
    loaded = {name: importlib.import_module(name) for name in modules}
    found = []
    for name, module in loaded.items():
        package, _, last = name.rpartition(".")
        if not package:
            continue
        value = getattr(loaded[package], last)
        if value is not module:
            kind = "another module" if isinstance(value, ModuleType) else f"a {type(value).__name__}"
            found.append(f"{name} is hidden by {kind} of its name")
    return found


def repeated_classes(tree: Tree) -> dict[str, list[str]]:
    """Class name -> modules that define it, where these are several."""
    places: dict[str, list[str]] = defaultdict(list)
    for module, source in tree.sources.items():
        for node in ast.walk(source):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    return {name: modules for name, modules in sorted(places.items()) if len(modules) > 1}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node: ast.AST) -> bool:
    match node:
        case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
            return True
    return False


def own_names(node: ast.ClassDef | ast.Module) -> set[str]:
    """Private names that a class or a module defines: variables, functions, classes, and what ``self`` is given."""
    found = set()
    for each in ast.walk(node):
        match each:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=value, attr=name, ctx=ast.Store()) if is_self(value):
                found.add(name)
    return {name for name in found if is_private(name)}


def used_names(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private names that are imported, or are attributes of something; with whether that is ``self``."""
    for each in ast.walk(node):
        match each:
            case ast.ImportFrom():
                yield from ((alias.name, False) for alias in each.names if is_private(alias.name))
            case ast.Attribute(value=value, attr=name) if is_private(name):
                yield name, is_self(value)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[value, ast.Constant(value=str(name)), *_]
            ):
                if is_private(name):
                    yield name, is_self(value)


def borrowed_names(tree: Tree) -> list[str]:
    """Private names of one module of ours that another uses, on ``self`` if a base class of ours has them.

    Those of other libraries are theirs to lend.
    """
    classes: dict[str, list[tuple[str, ast.ClassDef]]] = defaultdict(list)
    own = {module: own_names(source) for module, source in tree.sources.items()}
    for module, source in tree.sources.items():
        for node in ast.walk(source):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append((module, node))

    def ancestors(node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            for module, found in classes.get(getattr(name, "id", getattr(name, "attr", "")), []):
                if found is not node:
                    yield module, found
                    yield from ancestors(found)

    borrowed = set()
    for module, source in tree.sources.items():
        for name, of_self in used_names(source):
            if not of_self and name not in own[module] and name not in LENT:
                borrowed |= {(module, name, owner) for owner, names in own.items() if name in names}
        for node in ast.walk(source):
            if isinstance(node, ast.ClassDef):
                lent = {(name, owner) for owner, base in ancestors(node) for name in own_names(base)}
                names = {name for name, of_self in used_names(node) if of_self} - own[module]
                borrowed |= {(module, name, owner) for name, owner in lent if name in names}
    return [f"{module} uses {name} of {owner}" for module, name, owner in sorted(borrowed)]


def folders_without_docstring(tree: Tree) -> list[str]:
    folders = {path.parent for path in tree.files.values()}
    missing = [str(folder.relative_to(tree.root)) for folder in folders if not (folder / "__init__.py").exists()]
    return sorted(missing + [name for name in tree.packages if not ast.get_docstring(tree.sources[name])])


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(ROOT)


def test_imports_follow_the_arrows(tree: Tree) -> None:
    assert broken_walls(tree, HOUSE) == []


def test_no_circle_of_files(tree: Tree) -> None:
    assert circles_of_files(tree) == []


def test_no_import_hides_in_a_function(tree: Tree) -> None:
    assert late_imports(tree) == set(LATE_IMPORTS)


def hooked(tree: Tree) -> set[str]:
    """Modules in which hooks on modules and parameters are registered."""
    return {
        module
        for module, source in tree.sources.items()
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and _REGISTERS.fullmatch(getattr(node.func, "attr", getattr(node.func, "id", "")))
    }


def test_hooks_on_models_are_registered_in_few_places(tree: Tree) -> None:
    assert hooked(tree) == set(HOOKS)


def test_every_module_is_found_under_its_name(tree: Tree) -> None:
    assert hidden_modules([name for name in tree.files if not name.endswith("__main__")]) == []


def test_no_class_name_stands_twice(tree: Tree) -> None:
    public = [set(importlib.import_module(package).__all__) for package in PACKAGES]
    twice = repeated_classes(tree)
    assert [(name, places) for name, places in twice.items() if name not in SHARED_NAMES] == []
    for name in SHARED_NAMES:
        assert len(twice.get(name, [])) == 2 and sum(name in names for names in public) == 2, f"{name} is no such pair"


def test_no_private_name_is_used_by_another_module(tree: Tree) -> None:
    assert borrowed_names(tree) == []


@pytest.mark.parametrize("package", ["curvature", "precond"])
def test_names_that_load_late_are_those_that_type_checkers_see(tree: Tree, package: str) -> None:
    source = tree.sources[package]
    (test,) = (node for node in source.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module)
        for node in test.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" not in tree.files  # a module of the package is found without a list
    }
    (table,) = (node for node in ast.walk(test.orelse[0]) if isinstance(node, ast.Dict))
    homes: dict[str, str] = ast.literal_eval(table)
    late = {(name, importlib.util.resolve_name(home, package)) for home in homes for name in homes[home].split()}
    assert late == seen
    public = importlib.import_module(package)
    for name, home in late:
        assert getattr(public, name) is getattr(importlib.import_module(home), name)
    assert set(public.__all__) <= set(dir(public))


def test_every_folder_says_what_it_holds(tree: Tree) -> None:
    assert folders_without_docstring(tree) == []


def rows_of(page: str) -> dict[str, int]:
    """Room -> row of the page's tree, which is drawn from the ground up."""
    tree = page.partition("## The tree")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in tree.splitlines() if line.startswith("|")]
    paths = [(path, i) for i, row in enumerate(rows) for path in re.findall(r"`([\w/.]+)`", row)]
    return {path.removesuffix(".py").strip("/").replace("/", "."): i for path, i in paths}


def test_the_page_on_the_architecture_draws_this_house() -> None:
    rows = rows_of((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    # Modules beside a package's own names, which the page leaves out.
    faces = {"catalogue", "lazy", "moved", "neighbours", "taxonomy", "command_line", "__main__"}
    drawn = {name: rows[room(name, rows)] for name in HOUSE if name not in PACKAGES and name.split(".")[1] not in faces}
    assert [name for name in rows if room(name, HOUSE) != name] == []
    assert set(rows) - set(PACKAGES) == {".".join(name.split(".")[:2]) for name in drawn}
    upward = [(a, b) for a in drawn for b in below(a, HOUSE) if drawn.get(b, -1) > drawn[a]]
    assert upward == [], "the page's tree has these the other way round"


# The checks themselves, on a small house that stands, and on what brings it down.

SMALL_HOUSE = {"upper": ".floor .ground", "upper.floor": "upper.ground", "upper.ground": ""}
SMALL = {
    "upper/__init__.py": '"""All."""\nfrom upper.floor.work import Work\nfrom upper.ground import base\n',
    "upper/floor/__init__.py": '"""Work."""\n',
    "upper/floor/work.py": "from upper.ground.base import Base\n\n"
    "class Work(Base):\n    def go(self): return self._go\n    def _go(self): ...\n",
    "upper/ground/__init__.py": '"""Base."""\n',
    "upper/ground/base.py": "import torch\n\nclass Base:\n    _size = 1\n    def size(self): return self._size\n",
}


def small_tree(root: Path, changes: Mapping[str, str]) -> Tree:
    """The small house with some files added or written anew."""
    for name, text in {**SMALL, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Tree(root, ("upper",))


def test_a_house_that_stands(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, {})
    assert broken_walls(tree, SMALL_HOUSE) == []
    assert circles_of_files(tree) == [] and late_imports(tree) == set() and repeated_classes(tree) == {}
    assert borrowed_names(tree) == [] and folders_without_docstring(tree) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "import upper.floor.work",
            "upper.ground.new imports upper.floor.work: no arrow from upper.ground to upper.floor",
        ),
        ("from upper.floor import work", "upper.ground.new imports upper.floor.work: no arrow"),
        ("from ..floor import work", "upper.ground.new imports upper.floor.work: no arrow"),
        ("from ..floor.work import Work", "upper.ground.new imports upper.floor.work: no arrow"),
        ("def late():\n    from upper import Work", "upper.ground.new imports upper: no arrow"),
        ("if TYPE_CHECKING:\n    import upper.floor", "upper.ground.new imports upper.floor: no arrow"),
    ],
)
def test_an_arrow_that_is_not_allowed_is_seen(tmp_path: Path, text: str, complaint: str) -> None:
    tree = small_tree(tmp_path, {"upper/ground/new.py": text})
    assert [found.startswith(complaint) for found in broken_walls(tree, SMALL_HOUSE)] == [True]


@pytest.mark.parametrize(
    ("house", "complaint"),
    [
        ({"upper": "upper.floor upper.ground", "upper.ground": ""}, "upper.floor has no row"),
        ({**SMALL_HOUSE, "upper.gone": ""}, "upper.gone is no module"),
        (
            {**SMALL_HOUSE, "upper.ground": "upper.floor"},
            "the row of upper.ground names upper.floor, which does not stand",
        ),
        ({**SMALL_HOUSE, "upper.floor": ""}, "upper.floor.work imports upper.ground.base: no arrow"),
        ({**SMALL_HOUSE, "upper.floor.work": ""}, "no module draws the arrow from upper.floor to upper.ground"),
    ],
)
def test_a_wrong_table_is_seen(tmp_path: Path, house: dict[str, str], complaint: str) -> None:
    found = broken_walls(small_tree(tmp_path, {}), house)
    assert any(text.startswith(complaint) for text in found), found


def test_a_circle_is_seen(tmp_path: Path) -> None:
    changes = {"upper/ground/base.py": "import upper.ground.other", "upper/ground/other.py": "from . import base"}
    assert circles_of_files(small_tree(tmp_path, changes)) == [["upper.ground.base", "upper.ground.other"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"e"}, "e": {"d", "a"}}) == [["b", "c"], ["d", "e"]]


@pytest.mark.parametrize(
    "text", ["def f():\n    import {}", "class A:\n    async def f(self):\n        from {} import Base"]
)
def test_an_import_in_a_function_is_seen(tmp_path: Path, text: str) -> None:
    tree = small_tree(tmp_path, {"upper/floor/new.py": text.format("upper.ground.base") + "\n    import numpy"})
    assert late_imports(tree) == {("upper.floor.new", "upper.ground.base")}


@pytest.mark.parametrize(
    "call", ["module.register_forward_hook(f)", "register_module_forward_pre_hook(f)", "p.register_hook(f)"]
)
def test_a_hook_on_a_module_is_seen(tmp_path: Path, call: str) -> None:
    tree = small_tree(tmp_path, {"upper/floor/new.py": f"def g(module, p, f):\n    return [{call}]"})
    assert hooked(tree) == (set() if call.startswith("p.") else {"upper.floor.new"}), "those on tensors are no matter"


def test_a_hidden_module_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("hiding", "hiding/inner", "hiding/plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hiding/__init__.py").write_text("from hiding.inner import work\nimport hiding.plain as plain\n")
    (tmp_path / "hiding/inner/__init__.py").write_text("from hiding.inner.work import work\n")
    (tmp_path / "hiding/inner/work.py").write_text("def work(): ...\n")
    (tmp_path / "hiding/plain/__init__.py").write_text("")
    names = list(Tree(tmp_path, ("hiding",)).files)
    assert hidden_modules(names) == ["hiding.inner.work is hidden by a function of its name"]


def test_a_repeated_class_is_seen(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, {"upper/ground/new.py": "def f():\n    class Work: ..."})
    assert repeated_classes(tree) == {"Work": ["upper.floor.work", "upper.ground.new"]}


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("from upper.ground.base import Base\nBase()._size", ["upper.floor.new uses _size of upper.ground.base"]),
        ("import upper.ground.base as b\nb.Base._size = 2", ["upper.floor.new uses _size of upper.ground.base"]),
        ("getattr(object(), '_size', None)", ["upper.floor.new uses _size of upper.ground.base"]),
        (
            "from upper.floor.work import Work\nclass C(Work):\n    def f(self): self._go()",
            ["upper.floor.new uses _go of upper.floor.work"],
        ),
        (
            "from upper.floor.work import Work\nclass C(Work):\n    def f(self): super()._size",
            ["upper.floor.new uses _size of upper.ground.base"],
        ),
        ("from upper.ground.base import _helper", []),  # nothing of ours defines it
        ("import torch\nclass C(torch.Tensor):\n    def f(self): self._size", []),  # of a library's class
        ("class C:\n    _size = 2\nC()._size", []),  # its own
    ],
)
def test_a_private_name_of_another_module_is_seen(tmp_path: Path, text: str, complaints: list[str]) -> None:
    assert borrowed_names(small_tree(tmp_path, {"upper/floor/new.py": text})) == complaints


def test_a_folder_without_docstring_is_seen(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, {"upper/ground/__init__.py": "base = 1\n", "upper/attic/box.py": ""})
    assert folders_without_docstring(tree) == ["upper.ground", "upper/attic"]
