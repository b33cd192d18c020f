"""Are runs that a benchmark has kept made again when the code is another, and only then?"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from tests.benchmarks import defaults, fingerprint, pinn


def test_a_digest_is_of_contents_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    files = [tmp_path / name for name in ("a.py", "b.py")]
    found = set()
    for contents in (("x", "y"), ("x", "z"), ("xy", ""), ("y", "x"), ("x", "y")):
        for path, text in zip(files, contents, strict=True):
            path.write_text(text)
        found.add(fingerprint.digest(files))
        assert fingerprint.digest(reversed(files)) in found
    assert len(found) == 4


def test_runs_of_torch_do_not_depend_on_our_packages():
    assert defaults.code_of("SOAP") == defaults.code_of("Muon(lr=0.1)")
    assert defaults.code_of("AdamW(lr=0.1)") == defaults.code_of("TorchMuon") != defaults.code_of("SOAP")


def test_runs_of_other_code_are_made_again(tmp_path, monkeypatch):
    made = []

    def run(method: str, problem: str, seed: int) -> defaults.Run:
        made.append(method)
        return defaults.Run(method, problem, seed, 1, [1.0], 1.0, "", defaults.code_of(method))

    monkeypatch.setattr(defaults, "run", run)
    path = tmp_path / "runs.jsonl"
    old = asdict(run("SOAP", "words", 0)) | {"losses": [7.0]}
    nameless = {key: value for key, value in old.items() if key != "code"}  # as files of before have it
    path.write_text("".join(json.dumps(row) + "\n" for row in (nameless, old | {"code": "another"})))
    made.clear()
    for _ in range(2):
        assert defaults.Results(path).get("SOAP", "words", 0).losses == [1.0]
    assert made == ["SOAP"] and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("change", [{}, {"code": "another"}, {"seed": 1}])
def test_curves_of_another_key_are_made_again(change, tmp_path):
    path, key = tmp_path / "curves.jsonl", {"seed": 0, "settings": {"lr": 0.1}, "code": "this"}
    curves = [pinn.Curve([1.0], [error], [1]) for error in (0.5, 0.25)]
    pinn.kept(path, key, lambda: curves[0])
    assert pinn.kept(path, key | change, lambda: curves[1]) == curves[bool(change)]
