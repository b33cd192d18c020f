"""The command line: right numbers, one clear sentence for whatever is wrong, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvature
import solvers
from curvature.cli import main
from curvature.estimation.checkpoint import load

SOURCE = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.002)
        return x

def problem(*layers, seed=0, batches=2, loss=nn.CrossEntropyLoss):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *layers, nn.Linear(5, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    data = [(torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(batches)]
    return model, loss(), data

def as_dict():
    model, loss_fn, data = problem()
    return {"model": model, "loss_fn": loss_fn, "data": data, "params": "0.*", "output": lambda z: 2 * z}

def slow(): return problem(Slow())
def one_batch():
    model, loss_fn, data = problem()
    return model, loss_fn, data[0]
def dropout(): return problem(nn.Dropout(0.5))
def batch_norm(): return problem(nn.BatchNorm1d(5))
def no_data(): return problem(batches=0)
def unknown_loss():
    model, _, data = problem()
    return model, lambda z, y: z.square().mean() ** 2, data  # the examples meet in the square
def bad_loss():
    model, loss_fn, data = problem()
    data[1][0][2, 1] = float("nan")
    return model, loss_fn, data
def one_shot():
    model, loss_fn, data = problem()
    return model, loss_fn, (batch for batch in data)
def strings():
    model, loss_fn, data = problem()
    return model, loss_fn, (["a", "b"], data[0][1][:2])
def whole_numbers():
    model, loss_fn, data = problem()
    return model, loss_fn, [(x.long(), y) for x, y in data]
def frozen():
    model, loss_fn, data = problem()
    return model.requires_grad_(False), loss_fn, data
def raises(): raise KeyError("weights.pt")
def needs(argument): pass
def two(): return 1, 2
def nothing(): pass
def no_model(): return problem, nn.MSELoss(), []
def no_loss(): return problem()[0], "mse", []
def text(): return problem()[0], nn.MSELoss(), "data"
def missing(): return {"model": problem()[0], "data": []}
def misspelt(): return {**as_dict(), "parms": "0.*"}
value = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and no traces in the interpreter."""
    (tmp_path / "training.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("training", "broken", "_source_training", "_source_broken"):
        sys.modules.pop(name, None)


def problem() -> tuple[nn.Module, nn.Module, Any]:
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    return namespace["problem"]()


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


# Right answers


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_eigenvalues(matrix: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, "eigs", "training:problem", "--matrix", matrix, "-k", "4", "--dtype", "float64", "--rtol", "1e-8"
    )
    model, loss_fn, data = problem()
    data = [(x.double(), y) for x, y in data]
    op: Any = getattr(curvature, matrix)(model.double(), loss_fn, data)
    expected = torch.linalg.eigvalsh(op.to_dense()).flip(0)[:4]
    torch.testing.assert_close(torch.tensor(found["values"], dtype=torch.float64), expected, rtol=1e-12, atol=0)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert found["loss"] == pytest.approx(loss_fn(model(x), y).item(), rel=1e-12)
    assert found["parameters"] == 43 and found["converged"] == [True] * 4 and found["complete"]
    assert found["model"] == "Sequential" and found["loss_fn"] == "CrossEntropyLoss" and found["matrix"] == matrix


def test_trace_and_density(capsys: pytest.CaptureFixture[str]) -> None:
    exact = float(torch.trace(curvature.hessian(*problem()).to_dense()))
    found = answer(capsys, "trace", "training.py:problem")
    assert found["value"] == pytest.approx(exact, rel=1e-5) and found["stderr"] == 0
    found = answer(capsys, "trace", "training.py:problem", "--method", "hutchinson", "--samples", "30")
    assert abs(found["value"] - exact) <= 4 * found["stderr"] and found["products"] == 30
    other = answer(capsys, "trace", "training.py:problem", "--method", "hutchinson", "--samples", "30", "--seed", "1")
    assert other["value"] != found["value"]
    found = answer(capsys, "density", "training.py:problem", "--samples", "4", "--steps", "43")
    grid, density = torch.tensor(found["grid"]), torch.tensor(found["density"])
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=0.01)
    assert abs(found["moments"]["value"][0] - exact / 43) <= 4 * found["moments"]["stderr"][0]


def test_options_of_the_source_and_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    model, loss_fn, data = problem()
    op = curvature.hessian(model, loss_fn, data, params="0.*", output=lambda z: 2 * z)
    expected = float(torch.linalg.eigvalsh(op.to_dense())[0])
    found = answer(capsys, "eigs", "training:as_dict", "-k", "1", "--which", "SA")
    assert found["values"][0] == pytest.approx(expected, rel=1e-4) and found["parameters"] == 25
    assert answer(capsys, "eigs", "training:as_dict", "-k", "1", "--params", "0.bias")["parameters"] == 5
    assert answer(capsys, "eigs", "training:dropout", "-k", "1", "--eval")["parameters"] == 43
    assert answer(capsys, "eigs", "training:dropout", "-k", "1", "--no-check")["parameters"] == 43
    assert answer(capsys, "eigs", "training:one_batch", "-k", "99")["values"][42] < 0, "all there are"
    one_batch = answer(capsys, "eigs", "training:one_batch", "-k", "1", "--dtype", "float64", "--device", "cpu")
    assert one_batch["converged"] == [True]


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eigs", "training:problem", "-k", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Hessian of Sequential (43 parameters) under CrossEntropyLoss, loss ")
    assert shown.err == "", "no bar where there is no terminal"
    values = solvers.eigsh(curvature.hessian(*problem()), 2, rtol=1e-3).values.tolist()
    rows = [line.split() for line in shown.out.splitlines() if line[:1].isdigit()]
    assert [float(row[1]) for row in rows if len(row) == 3] == [pytest.approx(value, rel=1e-3) for value in values]
    assert main(["trace", "training:problem", "--method", "hutch++", "--samples", "30"]) == 0
    assert " +- " in capsys.readouterr().out
    assert main(["density", "training:problem", "--samples", "3", "--steps", "20"]) == 0
    assert "#####" in capsys.readouterr().out
    assert main(["coverage", "training:problem"]) == 0
    assert "0.weight+bias  5x4+5   kronecker" in capsys.readouterr().out


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["report", "training:one_batch", "-k", "2", "--matrix", "hessian", "--quiet"]
    assert main([*arguments, "--out", "report.json", "--resume", "report.run"]) == 0
    shown = capsys.readouterr().out
    assert "CrossEntropyLoss" in shown
    content = json.loads((tmp_path / "report.json").read_text())
    model, loss_fn, data = problem()
    expected = torch.linalg.eigvalsh(curvature.hessian(model, loss_fn, data[0]).to_dense()).flip(0)[:2].tolist()
    found = [pair["value"] for pair in content["eigenvalues"]["hessian"]["largest"]]
    assert found == [pytest.approx(value, rel=1e-4) for value in expected]
    assert main([*arguments, "--dry-run"]) == 0
    assert "eigenvalues" in capsys.readouterr().out


def test_quantize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = answer(capsys, "quantize", "training:problem", "--bits", "3.5", "--out", "few.pt")
    assert found["bits"] <= 3.5 and [row["name"] for row in found["layers"]] == ["0.weight", "2.weight"]
    expected = curvature.quantize(*problem(), bits=3.5, progress=False)
    assert found["loss_after"] == pytest.approx(expected.loss_after, rel=1e-6)
    saved = load(tmp_path / "few.pt")
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in expected.model.state_dict().items())
    assert torch.equal(saved["codes"]["2.weight.codes"], expected.codes["2.weight"].codes)


def test_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["eigs", "training:problem", "-k", "3", "--resume", "run.pt", "--storage", ".", "--vectors", "v.pt"]
    found = answer(capsys, *arguments)
    saved = load(tmp_path / "v.pt")
    assert torch.tensor(found["values"]).equal(saved["values"]) and saved["vectors"].shape == (3, 43)
    op = curvature.hessian(*problem())
    residuals = op @ saved["vectors"] - saved["values"].unsqueeze(1) * saved["vectors"]
    assert bool((residuals.norm(dim=1) <= 1e-3 * saved["values"]).all())
    assert answer(capsys, *arguments)["values"] == found["values"]
    assert main(["eigs", "training:problem", "-k", "4", "--resume", "run.pt"]) == 1
    assert "run.pt belongs to another computation. Different are k (3 there, 4 here)" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="matplotlib draws the density")
    assert main(["density", "training:problem", "--samples", "3", "--steps", "20", "--out", "density.svg"]) == 0
    assert "<svg" in (tmp_path / "density.svg").read_text()


# Wrong ones


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("training", "'training' names no function: write module:function or path/to/file.py:function."),
        ("training:", "names no function"),
        ("absent:problem", "there is no module 'absent' in the current folder"),
        ("absent.inner:problem", "there is no module 'absent'"),
        ("absent.py:problem", "there is no file absent.py."),
        ("broken:problem", "broken could not be imported: No module named 'not_installed_anywhere'"),
        ("broken.py:problem", "broken.py could not be run: ModuleNotFoundError: No module named"),
        ("training:absent", "training has no function 'absent'; it has Slow, problem, as_dict, slow,"),
        ("training:value", "training:value is a int, not a function that returns (model, loss_fn, data), or a dict"),
        ("training:raises", "training:raises raised KeyError: 'weights.pt'"),
        ("training:needs", "training:needs raised TypeError: needs() missing 1 required positional argument"),
        ("training:two", "training:two returned a tuple of length 2; expected (model, loss_fn, data)"),
        ("training:nothing", "training:nothing returned a NoneType; expected (model, loss_fn, data)"),
        ("training:no_model", "the model that training:no_model returned is a function, not a torch.nn.Module."),
        ("training:no_loss", "the loss that training:no_loss returned is a str, which cannot be called."),
        ("training:text", "the data that training:text returned are a str, not one batch (x, y)"),
        ("training:one_shot", "are a one-shot iterator (generator), but several passes over them are needed"),
        ("training:missing", "training:missing returned a dict without 'loss_fn'"),
        ("training:misspelt", "training:misspelt returned a dict with the key 'parms'"),
    ],
)
def test_wrong_sources(source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eigs", source]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
    assert shown.err.startswith("curvature: error: ") and shown.err.count("\n") == 1, "one line"


@pytest.mark.parametrize("command", ["eigs", "report"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("training:dropout", "dropout is active in 2"),
        ("training:no_data", "data has no batches"),
        ("training:bad_loss", "nan"),
        ("training:unknown_loss", ""),
        ("training:frozen", "has no trainable parameter"),
        ("training:strings", "must be Tensor, not list"),
        ("training:whole_numbers", "same dtype"),
    ],
)
def test_refusals(command: str, source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, source]) == 1
    shown = capsys.readouterr()
    assert message.lower() in shown.err.lower() and shown.out == ""
    assert shown.err.startswith("curvature: error: ") and shown.err.count("\n") == 1, "one line"
    with pytest.raises(Exception, match="(?i)" + message):
        main([command, source, "--debug"])


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("training:strings", "in Sequential(list of 2 str): "),
        ("training:whole_numbers", "in Sequential(int64 of shape (6, 4)): "),
        ("training:no_data", ""),
        ("training:bad_loss", ""),
    ],
)
def test_an_error_of_the_model_names_its_call(source: str, call: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", source]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"curvature: error: {call}") and ("error: in " in shown) == bool(call)


def test_warnings_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "training:batch_norm", "-k", "1", "--quiet", "--budget", "0.5"]) in (0, 1)
    assert capsys.readouterr().err.count("warning: not one loss") == 1


def test_batch_statistics_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "training:batch_norm"]) == 1
    shown = capsys.readouterr().err
    assert "normalise by the statistics of the batch" in shown and "--eval sets the model's mode" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eigs", "training:problem", "--resume", "absent/run.pt"],
            "--resume absent/run.pt: there is no folder absent.",
        ),
        (["eigs", "training:problem", "--vectors", "absent/v.pt"], "--vectors absent/v.pt: there is no folder"),
        (["density", "training:problem", "--out", "density.txt"], "--out draws .svg, .png, .pdf, not 'density.txt'"),
        (["report", "training:problem", "--out", "report.txt"], "--out takes .html, .json or .pt, not 'report.txt'"),
        (["quantize", "training:problem", "--out", "few.bin"], "--out takes .pt, not 'few.bin'"),
        (["quantize", "training:problem", "--params", "0.*"], "--layers says which layers"),
        (["eigs", "training:problem", "--device", "nowhere"], "the model cannot go to device 'nowhere'"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["eigs"],
        ["spectrum", "training:problem"],
        ["eigs", "training:problem", "-k", "0"],
        ["trace", "a:b", "--rtol", "x"],
    ],
)
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m curvature" in capsys.readouterr().err


def test_not_converged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eigs", "training:problem", "-k", "5", "--max-products", "15"]) == 1
    shown = capsys.readouterr()
    assert "not converged" in shown.out
    assert shown.err.startswith("curvature: warning: eigsh of Hessian(43x43): ") and shown.err.count("\n") == 1
    assert main(["eigs", "training:problem", "-k", "5", "--max-products", "15", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["complete"] is False


@pytest.mark.parametrize("command", ["", "report", "eigs", "density", "trace", "quantize", "coverage", "compare"])
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "82")  # argparse leaves two free
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "exit status:" in shown and max(map(len, shown.splitlines())) <= 82


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert solvers.__version__ in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_eigenvalues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eigs", "training:slow", "-k", "5", "--which", "BE", "--rtol", "1e-6", "--save-every", "0.001"]
    run, root = tmp_path / "run.pt", Path(curvature.__file__).parents[1]
    command = [sys.executable, "-m", "curvature", *arguments, "--resume", str(run)]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)})
    deadline = time.monotonic() + 240
    while not run.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed too late"
    steps = int(load(run)["state"]["run"]["products"])
    resumed = answer(capsys, *arguments, "--resume", str(run))
    whole = answer(capsys, *arguments)
    assert 10 <= steps < whole["products"] == resumed["products"]
    assert resumed["values"] == whole["values"] and resumed["residuals"] == whole["residuals"]
