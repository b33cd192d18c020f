"""Does an installed wheel work? Run by the Python of an environment without a checkout; prints what it found.

One step of each method, a report, a posterior's curvature, both command lines, and types that are seen from outside.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path


def train() -> int:
    """One step of each method; returns how many."""
    import torch
    from torch import nn

    from precond import methods

    x, y, loss_fn = torch.randn(16, 5), torch.randint(3, (16,)), nn.CrossEntropyLoss()
    for method in methods():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        before = [p.detach().clone() for p in model.parameters()]
        if method.needs == "layers":
            optimizer = method.cls(model, loss_fn, lr=0.05)
        elif method.name in ("CurveBall", "HessianFree"):
            optimizer = method.cls(model.parameters(), loss_fn)
        else:
            options = {"mode": "absolute", "damping": 1.0} if method.name == "Newton" else {}
            optimizer = method.cls(model.parameters(), **options)
        if method.needs == "closure":
            residuals = method.name == "GaussNewton"
            target = nn.functional.one_hot(y, 3).float()
            optimizer.step(lambda: (model(x) - target).flatten() if residuals else loss_fn(model(x), y))  # noqa: B023
        else:
            loss_fn(model(x), y).backward()
            optimizer.step()
        moved = [float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(torch.isfinite(p).all() for p in model.parameters()) and max(moved) > 0, method.name
        optimizer.load_state_dict(optimizer.state_dict())
    return len(methods())


def inspect(folder: Path) -> None:
    """A report as text and page, and every structure of a Gauss-Newton matrix."""
    import torch
    from torch import nn

    import curvature

    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    data = [(torch.randn(16, 5), torch.randint(3, (16,)))]
    report = curvature.report(model, loss_fn, data, budget=10, progress=False)
    assert "parameters 57" in str(report)
    report.save(str(folder / "report.html"))
    assert (folder / "report.html").stat().st_size > 10_000
    dense = curvature.ggn(model, loss_fn, data).to_dense()
    for structure in ("dense", "layer", "diagonal", "kfac", "ekfac"):
        found = curvature.ggn(model, loss_fn, data, structure=structure)
        assert found.shape == dense.shape
    assert torch.allclose(curvature.ggn(model, loss_fn, data, structure="dense").to_dense(), dense, atol=1e-5)


def command_lines(folder: Path) -> None:
    """``python -m precond`` and ``python -m curvature``."""
    (folder / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def problem():\n    torch.manual_seed(0)\n    model = nn.Sequential(nn.Linear(5, 3))\n"
        "    return model, nn.CrossEntropyLoss(), [(torch.randn(16, 5), torch.randint(3, (16,)))]\n"
    )
    for arguments in (
        ["precond", "--version"],
        ["precond", "methods"],
        ["curvature", "coverage", "mine:problem"],
        ["curvature", "eigs", "mine:problem", "-k", "2"],
    ):
        ended = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True)
        assert ended.returncode == 0 and ended.stdout, f"{arguments}: {ended.stderr[-2000:]}"


def main() -> None:
    folder = Path(sys.argv[1])
    import curvature
    import precond
    import solvers

    for package in (solvers, curvature, precond):
        assert "site-packages" in str(package.__file__), f"{package.__file__} is not what was installed"
        assert (Path(str(package.__file__)).parent / "py.typed").exists()
    steps = train()
    inspect(folder)
    command_lines(folder)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "tqdm")}
    python = ".".join(map(str, sys.version_info[:3]))
    print("ok", python, *(f"{name} {version}" for name, version in versions.items()), f"{steps} methods")


if __name__ == "__main__":
    warnings.simplefilter("error")
    # Not ours: torch's own imports warn in some of its versions.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
    main()
