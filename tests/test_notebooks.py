"""Every notebook runs, asserts what it says, and keeps outputs of the kinds that it makes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.notebooks import NOTEBOOKS, execute, kinds, read

PAGES = sorted(NOTEBOOKS.glob("*.ipynb"))
NEEDS = {"uncertain": ("laplace",)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_makes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("matplotlib", "sklearn", *NEEDS.get(path.stem, ())):
        pytest.importorskip(library)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    kept = read(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx`")  # laplace-torch says so each time
        made = execute(kept)
    assert kinds(made) == kinds(kept), "run python -m tests.notebooks"
    assert all(cell["execution_count"] is not None for cell in kept["cells"] if cell["cell_type"] == "code")
    assert path.stat().st_size < 200_000
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_raises_is_named() -> None:
    cells = [{"cell_type": "markdown", "source": ["# A"]}, {"cell_type": "code", "source": ["1 / 0"]}]
    with pytest.raises(ZeroDivisionError) as caught:
        execute({"cells": cells})
    assert caught.value.__notes__ == ["in cell 1: ['1 / 0']"]


def test_outputs_are_what_is_printed_the_last_value_and_figures() -> None:
    pytest.importorskip("matplotlib")
    sources = ["x = 2\nprint(x)\nx + 1", "x;", "import matplotlib.pyplot as plt\nplt.figure()", "x = 3"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    made = execute({"cells": cells})
    assert kinds(made) == [["stream", "execute_result"], [], ["display_data"], []]
    first = made["cells"][0]["outputs"]
    assert first[0]["text"] == ["2\n"] and first[1]["data"] == {"text/plain": ["3"]}
