"""Matrices, data, losses and command lines that nobody would think of: right, or refused in words, nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvature
import solvers
from curvature.cli import main

F64 = torch.float64
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)

# Matrices and solvers

KINDS = ("definite", "semidefinite", "indefinite", "asymmetric", "zero", "nan", "complex", "rectangular", "integer")
SOLVERS = {
    "Cholesky": lambda: solvers.Cholesky(),
    "Eigh": lambda: solvers.Eigh(),
    "CG": lambda: solvers.CG(rtol=1e-10, max_steps=200, progress=False, on_failure="raise"),
    "MINRES": lambda: solvers.MINRES(rtol=1e-10, max_steps=200, progress=False, on_failure="raise"),
    "LSMR": lambda: solvers.LSMR(rtol=1e-10, max_steps=400, progress=False, on_failure="raise"),
}


def matrix(kind: str, n: int, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=F64)
    made = {
        "definite": A @ A.T + torch.eye(n, dtype=F64),
        "semidefinite": A[:, : n // 2] @ A[:, : n // 2].T,
        "indefinite": A + A.T,
        "asymmetric": A,
        "zero": 0 * A,
        "nan": A @ A.T + torch.nan,
        "complex": (A @ A.T).to(torch.complex128),
        "rectangular": A[: max(n - 1, 0)],
        "integer": (A @ A.T).round().to(torch.int64),
    }[kind]
    return made * scale if made.is_floating_point() else made


@quick
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(sorted(SOLVERS)),
    n=st.integers(0, 7),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]),
    seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_a_solve_is_right_or_refused(kind: str, name: str, n: int, scale: float, seed: int, strided: bool) -> None:
    A = matrix(kind, n, scale, seed)
    if strided:  # a view with steps of two
        wide = A.new_zeros((2 * A.shape[0], 2 * A.shape[1]))
        wide[::2, ::2] = A
        A = wide[::2, ::2]
    b = torch.randn(
        n if kind != "rectangular" else A.shape[0], generator=torch.Generator().manual_seed(seed), dtype=F64
    )
    try:
        x = solvers.solve(solvers.Dense(A), b, SOLVERS[name]())
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 20
        return
    assert A.numel() == 0 or kind not in ("nan", "complex", "integer")
    residual = A.mT @ (A @ x - b) if name == "LSMR" else A @ x - b
    size = torch.linalg.vector_norm(A.mT @ b if name == "LSMR" else b)
    assert torch.linalg.vector_norm(residual) <= 1e-6 * size * max(
        1.0, float(torch.linalg.cond(A)) * 1e-9 if n else 1.0
    )


# Data: how they are split, laid out and typed does not change a matrix

LOSSES: dict[str, Any] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=F64)),
    "smooth": nn.CrossEntropyLoss(label_smoothing=0.2),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
}


@quick
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    loss=st.sampled_from(sorted(LOSSES)),
    layout=st.sampled_from(["plain", "sliced", "transposed", "expanded"]),
    seed=st.integers(0, 99),
    door=st.sampled_from(["hessian", "ggn", "layer", "diagonal", "empirical"]),
)
def test_splits_and_layouts_change_no_matrix(sizes: list[int], loss: str, layout: str, seed: int, door: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    x, y = torch.randn(total, 2, generator=generator, dtype=F64), torch.randint(3, (total,), generator=generator)
    if layout == "expanded" and total:
        x = x[:1].expand(total, 2)
    whole = x.contiguous()
    if layout == "sliced":
        x = torch.stack([x, x], 1)[:, 0]
    elif layout == "transposed":
        x = x.T.contiguous().T
    model = nn.Linear(2, 3, dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    loss_fn = LOSSES[loss]
    doors: dict[str, Any] = {
        "hessian": lambda d: curvature.hessian(model, loss_fn, d).to_dense(),
        "ggn": lambda d: curvature.ggn(model, loss_fn, d).to_dense(),
        "layer": lambda d: curvature.ggn(model, loss_fn, d, structure="layer").to_dense(),
        "diagonal": lambda d: curvature.ggn(model, loss_fn, d, structure="diagonal").to_dense(),
        "empirical": lambda d: curvature.fisher(model, loss_fn, d, kind="empirical", structure="layer").to_dense(),
    }
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))

    def outcome(data: Any) -> Tensor | str:
        try:
            found: Tensor = doors[door](data)
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 20
            return type(error).__name__
        return found

    expected, found = outcome((whole, y)), outcome(batches)
    if isinstance(expected, str) or isinstance(found, str):
        # One batch of no example, or of ignored ones, has no matrix either way; a batch that a kernel cannot take may.
        assert isinstance(expected, str) == isinstance(found, str) or 0 in sizes
        return
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# The command line

SOURCE = """
import torch
from torch import nn

def problem():
    torch.manual_seed(0)
    data = (torch.randn(8, 2), torch.randint(2, (8,)))
    return nn.Linear(2, 2), nn.CrossEntropyLoss(), data
"""
COMMANDS = ["eigs", "trace", "density", "report", "coverage", "quantize", "problem.py:problem", "problem.py:no"]
TAKING = ["-k", "--rtol", "--bits", "--matrix", "--samples", "--budget", "--params", "--dtype", "--seed", "--layers"]
ALONE = ["--json", "--quiet", "--eval", "--dry-run", "--no-check", "--out", "--device", "--group"]
VALUES = ["0", "-1", "1", "3", "1e-3", "nan", "inf", "ggn", "float64", "weight", "é", "", "x.pt", "cuda:99"]
WORDS = st.one_of(*(st.sampled_from(words) for words in (COMMANDS, TAKING, ALONE, VALUES)))


@settings(quick, max_examples=60)
@given(words=st.lists(WORDS, min_size=1, max_size=5), with_source=st.booleans())
def test_a_command_line_answers_in_words(words: list[str], with_source: bool) -> None:
    import contextlib
    import io
    import os
    import tempfile

    before = os.getcwd()
    out, err = io.StringIO(), io.StringIO()
    argv = [*words[:1], "problem.py:problem", *words[1:]] if with_source else words
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with open("problem.py", "w", encoding="utf-8") as file:
                file.write(SOURCE)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    status: Any = main(argv)
                except SystemExit as stop:
                    status = stop.code
        finally:
            os.chdir(before)
    assert status in (0, 1, 2), argv
    assert "Traceback" not in err.getvalue(), argv
    if status == 0 and "--json" in argv and "-h" not in argv:
        json.loads(out.getvalue())
    if status:
        assert err.getvalue().strip() or out.getvalue().strip(), argv


def test_the_strategies_see_what_is_wrong() -> None:
    """The bound of the first test is one that a wrong solution misses."""
    A = matrix("definite", 4, 1.0, 0)
    b = torch.ones(4, dtype=F64)
    wrong = torch.linalg.solve(A, b) * (1 + 1e-4)
    with pytest.raises(AssertionError):
        assert torch.linalg.vector_norm(A @ wrong - b) <= 1e-6 * torch.linalg.vector_norm(b)
