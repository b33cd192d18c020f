"""The wheel in environments of other versions: which Pythons, which torch, the lowest and the newest of the others.

``python -m tests.compatibility.matrix --python 3.11=/usr/bin/python3.11 --torch 2.9.0 --torch 2.13.0`` builds a wheel
of this checkout, installs it in an environment for each pair, first with the newest numpy, scipy and tqdm, then with
the lowest that exist for that Python, and runs ``smoke.py`` in each. Prints a table in Markdown, and appends each row
to ``--out`` as it comes. Environments are removed: each takes gigabytes where torch is a build for accelerators.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).resolve().with_name("smoke.py")
#: What setup.py asks for at least; for newer Pythons the first that have a wheel for them.
LOWEST = {
    "3.11": {"numpy": "1.26.0", "scipy": "1.12.0", "tqdm": "4.66.0"},
    "3.12": {"numpy": "1.26.0", "scipy": "1.12.0", "tqdm": "4.66.0"},
    "3.13": {"numpy": "2.1.0", "scipy": "1.14.1", "tqdm": "4.66.0"},
    "3.14": {"numpy": "2.3.2", "scipy": "1.16.1", "tqdm": "4.66.0"},
}


def run(command: list[str], folder: Path, seconds: int) -> tuple[str, str]:
    """``("", output)``, or what went wrong in its last line, and the output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not within {seconds} s", ""
    lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return ("" if ended.returncode == 0 else errors[-1].strip() if errors else f"exit {ended.returncode}"), ended.stdout


def wheel(folder: Path) -> Path:
    """A wheel of this checkout, built from a copy, where no earlier build has left modules that moved since."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests", "docs"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    wrong, _ = run(command, folder, 600)
    if wrong:
        raise SystemExit(f"the wheel cannot be built: {wrong}")
    return next(folder.glob("precond-*.whl"))


def cells(python: str, interpreter: str, torch: str, built: Path, place: Path, seconds: int) -> list[list[str]]:
    """The rows of one environment."""
    found = []
    environment = place / "environment"
    shutil.rmtree(environment, ignore_errors=True)
    wrong, _ = run([interpreter, "-m", "venv", str(environment)], place, 300)
    inside = str(environment / "bin" / "python")
    install = [inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    wrong = wrong or run([*install, f"torch=={torch}", str(built)], place, seconds)[0]
    for which in ("newest", "lowest"):
        if which == "lowest" and not wrong:
            wanted = [f"{name}=={version}" for name, version in LOWEST[python].items()]
            wrong = run([*install, "--only-binary=:all:", *wanted], place, seconds)[0]
        if wrong:
            found.append([python, torch, which, "", f"not installed: {wrong[:160]}"])
            break
        begun = time.monotonic()
        failed, printed = run([inside, str(SMOKE), str(place)], place, 600)
        versions = re.search(r"numpy \S+ scipy \S+ tqdm \S+", printed)
        outcome = f"fails: {failed[:200]}" if failed else f"works, {time.monotonic() - begun:.0f} s"
        found.append([python, torch, which, versions[0] if versions else "", outcome])
    shutil.rmtree(environment, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--python", action="append", metavar="VERSION=PATH", help="an interpreter (default: this one)")
    parser.add_argument("--torch", action="append", metavar="VERSION", help="(default: the pinned one)")
    parser.add_argument("--seconds", type=int, default=1800, help="for one installation (default: 1800)")
    parser.add_argument("--out", metavar="FILE", help="append rows there as they come")
    given = parser.parse_args()
    this = f"{sys.version_info.major}.{sys.version_info.minor}={sys.executable}"
    pinned = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        built = wheel(place)
        print("| Python | torch | others | versions | outcome |\n| --- | --- | --- | --- | --- |", flush=True)
        for interpreter in given.python or [this]:
            python, _, path = interpreter.partition("=")
            for torch in given.torch or pinned:
                for row in cells(python, path, torch, built, place, given.seconds):
                    line = f"| {' | '.join(row)} |"
                    print(line, flush=True)
                    if given.out:
                        with Path(given.out).open("a", encoding="utf-8") as out:
                            out.write(line + "\n")


if __name__ == "__main__":
    main()
