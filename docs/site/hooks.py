"""What the site has beyond the pages in ``docs/``: pages of the root, sources, API reference, formulas.

MkDocs calls the functions ``on_...``; ``Markup`` is an extension of Griffe, which reads the docstrings.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the links and the pages can be looked at without the tools that build the site
    Extension = object

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("precond", "curvature", "solvers")

# Pages of the root, which a reader of the repository finds there.
PROJECT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "LICENSE": "project/licence.md",
}
TITLES = {"CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changelog", "LICENSE": "Licence"}

LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```[ \t]*)$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^([ ]*)(=+(?: +=+)+)\n(?:(.*)\n\1=[= ]+\n)?((?:.*\n)*?)\1=[= ]+$", re.MULTILINE)
EXAMPLE = re.compile(r"^([ ]*)>>> .*\n?(?:[ ]*\S.*\n?)*", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


# Links: the pages are written for the repository, where a link is a path.


def site_path(path: str) -> str:
    """Where a file of the repository is on the site.

    Args:
        path: Relative to the root of the repository.

    Returns:
        Relative to the root of the site: a page, or a file that is copied.
    """
    if path in PROJECT:
        return PROJECT[path]
    if path.startswith("docs/") and not path.startswith("docs/site/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"source/{path}.md"


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return next((path for path, made in PROJECT.items() if made == page), f"docs/{page}")


def targets(markdown: str, page: str) -> list[str]:
    """Files of the repository to which the links of a page lead, those inside code left out."""
    here = posixpath.dirname(repository_path(page))
    links = [match[2] for part in FENCE.split(markdown)[::2] for match in LINK.finditer(part)]
    paths = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("mailto:")]
    return [posixpath.normpath(posixpath.join(here, path)) for path in paths if path]


def with_links_of_the_site(markdown: str, page: str) -> str:
    """A page whose links between files of the repository are links between pages of the site."""
    here, there = posixpath.dirname(repository_path(page)), posixpath.dirname(page)

    def moved(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        if "://" in path or path.startswith("mailto:") or not path:
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(here, path)))
        return f"{match[1]}{posixpath.relpath(target, there or '.')}{mark}{anchor}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def with_bars_in_code(markdown: str) -> str:
    r"""Write ``|`` inside code in a table as it is: GitHub wants ``\|`` there, MkDocs would show the backslash."""
    rows = re.compile(r"^\|.*$", re.MULTILINE)
    return rows.sub(lambda row: re.sub("`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)


def as_page_of_the_site(markdown: str, page: str) -> str:
    """A page with what the repository and MkDocs write differently: links, tables, and marks behind a fence."""
    markdown = re.sub(r"^(```\w+) [\w-]+$", r"\1", markdown, flags=re.MULTILINE)
    return with_links_of_the_site(with_bars_in_code(markdown), page)


# Notebooks: a page for each, with the outputs that are kept in it.


def notebook_pages() -> dict[str, str]:
    """The notebooks in ``docs/`` as Markdown, by their place on the site."""
    paths = sorted((ROOT / "docs").rglob("*.ipynb"))
    return {str(path.relative_to(ROOT / "docs").with_suffix(".md")): notebook_page(path) for path in paths}


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: code, and below it what it printed and drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).rstrip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n")
            if "image/png" in data:
                address = f"data:image/png;base64,{data['image/png'].strip()}"
                parts.append(f'<img class="drawn" alt="{escape(_title(source))}" src="{address}">')
            elif text:
                parts.append(f"````text\n{text}\n````")
    parts.append(f'<a href="{path.name}">The notebook</a> itself, to run it.')
    return "\n\n".join(parts) + "\n"


def _title(source: str) -> str:
    """What a picture shows, for readers who do not see it: its labels and titles in the code."""
    found = re.findall(r"(?:title|xlabel|ylabel|label)=f?\"([^\"{]+)\"", source)
    return f"Picture: {', '.join(dict.fromkeys(found))}" if found else "Picture drawn by the code above"


# The API reference: a page for each folder of a package that defines public names.


def exports(package: str) -> dict[str, str]:
    """The public names of a package, in the order of ``__all__``, and the module that each comes from."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    sources: dict[str, str] = {}
    public: list[str] = []
    late = [node for test in tree.body if isinstance(test, ast.If) for node in test.body]  # if TYPE_CHECKING
    for node in [*tree.body, *late]:
        if isinstance(node, ast.ImportFrom) and node.module:
            sources |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
    return {name: sources[name] for name in public}


def homes() -> dict[str, str]:
    """The package that describes each public name: the lowest that offers it."""
    return {name: package for package in PACKAGES for name in exports(package)}


def api_pages() -> dict[str, str]:
    """The pages of the API reference, as Markdown for mkdocstrings, by their place on the site."""
    pages: dict[str, str] = {}
    home = homes()
    for package in PACKAGES:
        docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
        groups: dict[str, list[str]] = {}
        for name, module in exports(package).items():
            parts = module.split(".")
            if home[name] == package:
                group = parts[1] if len(parts) > 1 and parts[0] == package else "plots" if name == "plots" else "parts"
                groups.setdefault(group, []).append(name)
        index = [f"# {package}", docstring or ""]
        for group, members in sorted(groups.items()):
            title = group.replace("_", " ")
            blocks = [f"# {package}: {title}", *(f"::: {package}.{name}" for name in members)]
            pages[f"api/{package}/{group}.md"] = "\n\n".join(blocks) + "\n"
            index.append(f"- [{title}]({group}.md): {links(members, home)}")
        if borrowed := [name for name in exports(package) if home[name] != package]:
            index.append(f"Offered here, too: {links(borrowed, home)}.")
        pages[f"api/{package}/index.md"] = "\n\n".join(index) + "\n"
    return pages


def links(names: list[str], home: dict[str, str]) -> str:
    """References to public names."""
    return ", ".join(f"[`{name}`][{home[name]}.{name}]" for name in names)


def api_navigation() -> list[dict[str, Any]]:
    """The entries of the API reference in the navigation."""
    pages = sorted(api_pages())
    entries = []
    for package in PACKAGES:
        groups = [page for page in pages if page.startswith(f"api/{package}/") and not page.endswith("/index.md")]
        titles = [{Path(page).stem.replace("_", " "): page} for page in groups]
        entries.append({package: [f"api/{package}/index.md", *titles]})
    return entries


# What MkDocs calls.


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    config.nav.append({"API": api_navigation()})
    config.nav.append({"Project": [{TITLES[path]: page} for path, page in PROJECT.items() if path in TITLES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of something else than a file in ``docs/``."""
    from mkdocs.structure.files import File

    made = api_pages() | notebook_pages()
    for path, page in PROJECT.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        made[page] = text if path.endswith(".md") else f"# {TITLES[path]}\n\n{text}"
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()} | made
    for page, text in list(pages.items()):
        for path in targets(text, page) if not page.startswith("api/") else ():
            if site_path(path).startswith("source/"):
                source = (ROOT / path).read_text(encoding="utf-8")
                head = "---\nsearch:\n  exclude: true\n---\n"
                made[site_path(path)] = f"{head}# `{path}`\n\n````{Path(path).suffix[1:]}\n{source}````\n"
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files into links between pages."""
    made = page.file.src_uri.startswith(("api/", "source/"))
    return markdown if made else as_page_of_the_site(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        formula = unescape(match[2]).strip()[2:-2].strip()
        if match[1] == "div":
            return f'<div class="formula">{convert(formula, display="block")}</div>'
        return convert(formula)

    return FORMULA.sub(drawn, html)


# Docstrings: Sphinx's roles and directives as Markdown.


def as_markdown(docstring: str, homes: dict[str, str]) -> str:
    r"""A docstring whose roles and formulas are those of Markdown.

    Args:
        docstring: With ``:class:`Name``` and the like, ``:math:`x``` and ``.. math::``.
        homes: The package that describes each public name.
    """

    def table(match: re.Match[str]) -> str:
        indent, border, head, body = match.groups()
        columns = [(column.start(), column.end()) for column in re.finditer("=+", border)]
        starts, ends = [start for start, _ in columns], [end for _, end in columns[:-1]]
        rows: list[list[str]] = []
        for line in (head or "", *body.splitlines()):
            cells = [line[len(indent) :][a:b].strip() for a, b in zip(starts, [*ends, None], strict=True)]
            if cells[0] or len(rows) < 2:
                rows.append(cells)
            else:  # a line without a first cell goes on with the row above
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        rows.insert(1, ["---"] * len(columns))
        return "\n".join(f"{indent}| {' | '.join(row)} |" for row in rows)

    def block(match: re.Match[str]) -> str:
        lines = [line.strip() for line in match[2].strip().splitlines()]
        return "\n".join(["", *(match[1] + line for line in ("$$", *lines, "$$")), ""])

    def reference(match: re.Match[str]) -> str:
        shown = match[1].removeprefix("~")
        name = next((part for part in shown.split(".") if part in homes), None)
        shown = shown.rpartition(".")[2] if match[1].startswith("~") else shown
        return f"[`{shown}`][{homes[name]}.{name}]" if name else f"`{shown}`"

    directive = re.compile(r"^([ ]*)\.\. math::[ ]*((?:.*)(?:\n(?=\1[ ]+\S).*|\n(?=[ ]*\n\1[ ]+\S)(?!\s*\S))*)", re.M)
    docstring = TABLE.sub(table, docstring)
    docstring = directive.sub(block, docstring)
    docstring = EXAMPLE.sub(lambda match: f"{match[1]}```pycon\n{match[0].rstrip()}\n{match[1]}```\n", docstring)
    docstring = re.sub(r":math:`([^`]*)`", lambda match: f"${match[1].strip()}$", docstring)
    return re.sub(r":(?:class|func|meth|mod|attr|data|exc|obj):`([^`]*)`", reference, docstring)


class Markup(Extension):
    """Rewrites docstrings when they are read."""

    def __init__(self) -> None:
        self.homes = homes()

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, self.homes)
