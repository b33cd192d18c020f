"""Run the notebooks of ``docs/notebooks`` without Jupyter: ``python -m tests.notebooks`` writes their outputs.

A notebook is JSON. Its code cells run one after the other in one namespace; what they print, the value of a last
expression, and the figures that they leave open are their outputs, as Jupyter would show them.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def read(path: Path) -> dict[str, Any]:
    """The notebook of a file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook as Jupyter does."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells.

    Raises:
        Exception: Whatever a cell raises, with the number of the cell in a note.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            count += 1
            try:
                outputs = _run("".join(cell["source"]), namespace, count)
            except Exception as error:
                error.add_note(f"in cell {number}: {cell['source'][:1]}")
                raise
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _run(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    import matplotlib.pyplot as plt

    if count == 1:
        plt.close("all")  # pictures of whoever ran before
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"<cell {count}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    figures = [plt.figure(number) for number in plt.get_fignums()]
    if value is not None and not figures:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    for figure in figures:
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=80, facecolor="white")
        data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n"}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """The kinds of the outputs of each code cell."""
    return [
        [output["output_type"] for output in cell["outputs"]]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    warnings.simplefilter("ignore")
    for place in sys.argv[1:] or sorted(map(str, NOTEBOOKS.glob("*.ipynb"))):
        write(Path(place), execute(read(Path(place))))
        print(place)
