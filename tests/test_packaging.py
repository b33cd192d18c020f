"""What is installed: one version, a description that an index can show, and a refusal of a stranger called solvers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import curvature
import precond
import solvers
from precond.catalogue import methods
from precond.command_line import main

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, path: tuple[Path, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd or ROOT, timeout=120
    )


def test_there_is_one_version() -> None:
    assert precond.__version__ == curvature.__version__ == solvers.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == precond.__version__
    asked = python("setup.py", "--version")
    assert asked.stdout.split()[-1] == precond.__version__, asked.stderr


def test_the_description_for_an_index_has_no_link_into_the_repository() -> None:
    page = python("setup.py", "--long-description").stdout
    assert "# precond" in page and "```python" in page and "which optimizer, which solver" in page
    assert re.findall(r"\]\((?!https?:)[^)]*\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL)) == []


def test_the_command_line_lists_the_methods_within_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[:2] for line in lines if not line.startswith(" ")]
    assert listed == [[method.name, method.needs] for method in methods()]
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"precond {precond.__version__}\n"


REFUSED = "ImportError: curvature and precond need the package `solvers` that was installed with them"


@pytest.mark.parametrize(
    "name,script",
    [
        ("solvers.py", "import precond"),
        ("solvers.py", "import curvature.matrices.ggn"),
        ("solvers.py", "import solvers, precond"),
        ("solvers/__init__.py", "import precond"),
    ],
)
def test_a_stranger_called_solvers_is_refused(name: str, script: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("def solve(): ...\n")
    outcome = python("-c", script, path=(tmp_path,), cwd=tmp_path)
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith(REFUSED) and str(place) in last and "pip install --force-reinstall precond" in last


def test_a_folder_of_that_name_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "solvers").mkdir()  # a namespace, before which Python takes any package along the path
    outcome = python("-c", "import precond, solvers; print(solvers.__file__)", path=(tmp_path,), cwd=tmp_path)
    assert outcome.stdout.strip() == str(ROOT / "solvers" / "__init__.py"), outcome.stderr


def test_a_script_of_that_name_is_refused_before_it_imports_itself(tmp_path: Path) -> None:
    script = tmp_path / "solvers.py"
    script.write_text("from precond import KFAC\n")
    outcome = python(str(script))
    assert outcome.stderr.strip().splitlines()[-1].startswith(REFUSED) and str(script) in outcome.stderr


def test_a_package_whose_face_another_distribution_wrote_over_is_refused() -> None:
    script = "import sys, types; m = types.ModuleType('solvers'); m.__path__ = ['solvers']; sys.modules['solvers'] = m"
    outcome = python("-c", f"{script}; import precond")
    assert outcome.stderr.strip().splitlines()[-1].startswith(REFUSED)
