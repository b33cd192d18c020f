"""Influence with a curvature that is known by its products only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from solvers import (
    CG,
    MINRES,
    Dense,
    Function,
    LinearOperator,
    Neumann,
    NotPositiveDefiniteError,
    StructureError,
)
from tests.curvature.problems import F64, normal

LAM = 0.3


def problem() -> tuple[nn.Module, nn.Module, list[Any], Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        data = [(normal(n, 3), torch.randint(2, (n,))) for n in (5, 3)]
        return model, nn.CrossEntropyLoss(), data, (normal(2, 3), torch.tensor([1, 0]))


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss of each example alone, ``(n, P)``."""
    rows = []
    for n in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def expected(C: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, and self-influences, by dense matrices."""
    model, _, data, query = problem()
    train = torch.cat([gradients(model, *batch) for batch in data])
    solved = torch.linalg.solve(C + LAM * torch.eye(len(C), dtype=F64), train.T)
    return gradients(model, *query) @ solved, (train * solved.T).sum(1)


def ggn(model: nn.Module, data: list[Any]) -> Tensor:
    matrix = torch.zeros(26, 26, dtype=F64)
    for x, _ in data:
        for n in range(len(x)):
            z = model(x[n])
            J = torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(z[c], list(model.parameters()), retain_graph=True)]
                    )
                    for c in range(2)
                ]
            )
            p = z.softmax(0).detach()
            matrix += J.T @ (p.diag() - p.outer(p)) @ J / 8
    return matrix


@pytest.mark.parametrize(
    "solver", [None, CG(rtol=1e-10), MINRES(rtol=1e-10), Neumann(rtol=1e-10, max_steps=5000)], ids=str
)
@pytest.mark.parametrize("given", ["operator", "name", "function"])
def test_scores_by_products_are_those_of_the_dense_matrix(solver: Any, given: str) -> None:
    model, loss_fn, data, query = problem()
    dense = ggn(model, data)
    C: Any = curvature.ggn(model, loss_fn, data)
    if given == "function":
        C = Function(lambda v: v @ dense, (26,), symmetric=True, dtype=F64)
    options: dict[str, Any] = {"curvature": "full" if given == "name" else C, "damping": LAM, "solver": solver}
    scores, own = expected(dense)
    if given == "name":  # with sampled labels: compare with the operator of the same call
        C = curvature.fisher(model, loss_fn, data, kind="mc")
        scores, own = expected(C.to_dense())
    torch.testing.assert_close(
        curvature.influence(model, loss_fn, data, query, **options).scores, scores, rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(curvature.self_influence(model, loss_fn, data, **options), own, rtol=1e-6, atol=1e-9)


def test_a_solver_serves_stored_matrices_as_well() -> None:
    model, loss_fn, data, query = problem()
    dense = ggn(model, data)
    for C in (Dense(dense), curvature.ggn(model, loss_fn, data, structure="layer")):
        exact = curvature.influence(model, loss_fn, data, query, curvature=C, damping=LAM).scores
        got = curvature.influence(model, loss_fn, data, query, curvature=C, damping=LAM, solver=CG(rtol=1e-10)).scores
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


def test_an_indefinite_hessian_takes_another_solver() -> None:
    model, loss_fn, data, query = problem()
    H = curvature.hessian(model, loss_fn, data)
    values = torch.linalg.eigvalsh(H.to_dense())
    lam = float(-values[0]) * 0.5
    assert lam > 0
    options: dict[str, Any] = {"curvature": H, "damping": lam}
    with pytest.raises(NotPositiveDefiniteError, match="MINRES"):
        curvature.influence(model, loss_fn, data, query, **options)
    got = curvature.influence(model, loss_fn, data, query, **options, solver=MINRES(rtol=1e-10)).scores
    exact = curvature.influence(
        model, loss_fn, data, query, curvature=Dense(H.to_dense()), damping=lam, solver=MINRES(rtol=1e-10)
    ).scores
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


def test_a_share_of_an_eigenvalue_that_is_not_shown_is_refused() -> None:
    model, loss_fn, data, query = problem()
    with pytest.raises(ValueError, match=r"damping=RelativeTikhonov.* Pass a number.*solvers\.trace"):
        curvature.influence(model, loss_fn, data, query, curvature=curvature.ggn(model, loss_fn, data))


def test_what_a_solver_does_not_serve_is_refused() -> None:
    model, loss_fn, data, query = problem()
    C = Function(lambda v: v, (26,), dtype=F64)
    with pytest.raises(StructureError, match="Say symmetric=True where it is a Function"):
        curvature.influence(model, loss_fn, data, query, curvature=C, damping=LAM)


def test_runs_by_products_are_kept_and_told_apart(tmp_path: Path) -> None:
    model, loss_fn, data, query = problem()

    def run(C: LinearOperator, **more: Any) -> Tensor:
        return curvature.influence(
            model, loss_fn, data, query, curvature=C, damping=LAM, store=tmp_path / "run", **more
        ).scores

    G = curvature.ggn(model, loss_fn, data)
    first = run(G)
    files = len(list((tmp_path / "run").iterdir()))
    assert torch.equal(run(G), first) and len(list((tmp_path / "run").iterdir())) == files
    other = run(0.5 * G)
    assert not torch.allclose(other, first)
    run(G, solver=CG(rtol=1e-3))
    assert len(list((tmp_path / "run").iterdir())) == files + 2
