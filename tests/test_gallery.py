"""Every script of the gallery runs, asserts its own results, and makes its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("*.py"))
#: They train for more than ten seconds each.
LONG = ("gpt2", "influence", "lm_head", "policy", "spectrum")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:By default `link_approx`:UserWarning")  # laplace-torch says so each time
@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=[pytest.mark.long] * (path.stem in LONG), id=path.stem) for path in SCRIPTS],
)
def test_a_script_holds_what_it_says(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    runpy.run_path(str(script))["main"](tmp_path)
    plt.close("all")
    assert (tmp_path / f"{script.stem}.png").stat().st_size > 10_000, "it made no picture"


def test_the_page_shows_every_script_and_its_picture() -> None:
    page = (GALLERY / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"({script.name})" in page and f"({script.stem}.png)" in page, f"{script.name} is not on the page"
        assert (GALLERY / f"{script.stem}.png").exists(), f"run python {script.relative_to(GALLERY.parents[1])}"
