"""Every structure and solver gives on an accelerator what it gives on the host."""

from __future__ import annotations

import pytest
import torch

import solvers
from solvers import (
    CG,
    LSMR,
    MINRES,
    BlockDiagonal,
    Cholesky,
    CoupledNewton,
    Dense,
    Diagonal,
    Eigh,
    FactoredTikhonov,
    Kronecker,
    LinearOperator,
    LowRank,
    Neumann,
    NewtonSchulz,
    Nystrom,
    Segment,
    Solver,
    Subspace,
)
from tests.solvers.problems import normal, positive

KRON = Kronecker(positive(4), positive(3))
BLOCKS = BlockDiagonal([KRON, Diagonal(normal(2, 2).square())], [Segment(4, (4, 3)), Segment(0, (2, 2))], 16)
CASES: list[tuple[LinearOperator, Solver | None, float]] = [
    (KRON.shift(0.3), None, -1),
    (KRON.shift(torch.tensor(0.3, dtype=torch.float64)), Eigh(), -0.5),
    (FactoredTikhonov(0.3)(BLOCKS), Cholesky(), -1),
    (FactoredTikhonov(torch.tensor(0.3, dtype=torch.float64))(BLOCKS), Cholesky(explicit=False), -1),
    (BLOCKS.shift(0.3), Eigh("clamped"), -1),
    (Dense(positive(4, 3)), Subspace(), -0.25),
    (Dense(positive(4, 3)), NewtonSchulz(), -0.5),
    (Dense(positive(4, 3)), CoupledNewton(), -0.25),
    (LowRank(normal(3, 2, 4)).shift(0.3), None, -1),
    (LowRank(normal(3, 2, 4)).shift(0.3), None, 0.5),
    (KRON.shift(0.3), CG(rtol=1e-12), -1),
    (KRON.shift(0.3), MINRES(rtol=1e-12), -1),
    (KRON.shift(0.3), LSMR(rtol=1e-12), -1),
    (KRON.shift(0.3), Neumann(rtol=1e-12, max_steps=1000), -1),
    (KRON.shift(0.3), Nystrom(12, rtol=1e-8), -1),
]


def assert_same(device: torch.device, op: LinearOperator, solver: Solver | None, exponent: float) -> None:
    moved = op.to(device=device)
    assert moved.device.type == device.type
    x = normal(2, *op.in_shape)
    there = solvers.power(moved, exponent, solver)
    assert there.device.type == device.type
    torch.testing.assert_close(
        (there @ x.to(device)).cpu(), solvers.power(op, exponent, solver) @ x, rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close((moved @ x.to(device)).cpu(), op @ x)


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(CASES)))
def test_accelerator_agrees_with_the_host(case: int) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    assert_same(device, *CASES[case])


@pytest.mark.gpu
def test_errors_are_found_on_the_accelerator() -> None:
    device = torch.accelerator.current_accelerator()
    bad = Dense(-positive(3).to(device))
    with pytest.raises(solvers.NotPositiveDefiniteError, match="smallest eigenvalue"):
        bad.inverse()
    with pytest.raises(solvers.NonFiniteError):
        Dense(torch.full((3, 3), torch.nan, device=device)).inverse(solver=Eigh())
