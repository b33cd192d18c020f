"""Is SENG the sketched least-squares step of the paper, and exact where nothing is left out?"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import SENG, Loop, SMWNaturalGradient
from tests.precond import layer_references as ref

DAMPING, LR, SKETCH, SEED = 0.3, 0.1, 4, 5
LOSS = nn.CrossEntropyLoss()


def omega(block: str, draw: int, rows: int, columns: int) -> Tensor:
    """The sketch of a draw as a matrix on ``vec([W, b])``: some rows times some columns, in expectation 1."""
    digest = hashlib.sha256(f"{SEED},{block},{draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    sides = []
    for d in (rows, columns):
        picked = torch.randperm(d, generator=generator)[:SKETCH] if d > SKETCH else torch.arange(d)
        sides.append(torch.eye(d).double()[picked] * (d / len(picked)) ** 0.5)
    return torch.kron(*sides)


def by_the_book(data: list[ref.Batch], period: int) -> Any:
    net = ref.mlp(6, 9, 3)
    where = ref.spans(net)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def direction(step: int, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        d = torch.zeros_like(g)
        for layer in ("0", "2"):
            w, b = where[f"{layer}.weight"], where[f"{layer}.bias"]
            weights = torch.arange(w.start, w.stop).reshape(b.stop - b.start, -1)
            order = torch.cat([weights, torch.arange(b.start, b.stop)[:, None]], 1)  # [W, b]
            name, index = f"{layer}.weight+{layer}.bias", order.reshape(-1)
            if step % period == 0:
                U = ref.rows(net, x, y, "empirical")[:, index].T / len(x) ** 0.5  # a column per example
                kept[name] = (U, omega(name, step // period + 1, *order.shape))
            U, sketch = kept[name]
            # min_b |Omega (U b - g)|^2 + lam |b|^2 as one stacked least-squares problem
            n = U.shape[1]
            matrix = torch.cat([sketch @ U, DAMPING**0.5 * torch.eye(n).double()])
            target = torch.cat([sketch @ g[index], torch.zeros(n).double()])
            solution = torch.linalg.lstsq(matrix, target.unsqueeze(1)).solution[:, 0]
            d[index] = (g[index] - U @ solution) / DAMPING
        return d

    return ref.walk(net, data, LOSS, direction, LR)


@pytest.mark.parametrize("period", [1, 3])
def test_twenty_steps_are_those_of_the_sketched_problem(period: int) -> None:
    net, data = ref.mlp(6, 9, 3), ref.batches(20)
    optimizer = SENG(
        net,
        LOSS,
        lr=LR,
        damping=DAMPING,
        kl_clip=None,
        sketch=SKETCH,
        loop=Loop(seed=SEED),
        momentum=0.0,
        curvature_update_period=period,
    )
    ref.assert_follows(net, optimizer, by_the_book(data, period), data, LOSS)


def test_without_a_sketch_it_is_the_exact_method() -> None:
    results = []
    for cls, options in ((SENG, {}), (SMWNaturalGradient, {"structure": "layer", "momentum": 0.9})):
        net, data = ref.net(), ref.batches(10)
        make: Any = cls
        optimizer = make(net, LOSS, lr=LR, damping=DAMPING, kl_clip=None, curvature_update_period=2, **options)
        ref.train(net, optimizer, data, LOSS)
        results.append(ref.flat(net.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_the_sketch_is_unbiased() -> None:
    """Its Gram matrix tends to that of the gradients themselves, over many draws."""
    net, data = ref.mlp(6, 9, 3), ref.batches(1)
    optimizer = SENG(net, LOSS, lr=0.0, damping=1e-6, sketch=SKETCH, curvature_update_period=1)
    ref.train(net, optimizer, data, LOSS)
    estimator: Any = optimizer.preconditioners["0.weight+0.bias"].estimator
    U = estimator.root
    total = torch.zeros(12, 12, dtype=torch.float64)
    for _ in range(3000):
        estimator.draws += 1
        restriction = estimator._restriction(U)
        S = (U @ restriction.adjoint()).to_dense()
        total += S @ S.T / 3000
    exact = U.to_dense() @ U.to_dense().T
    assert (total - exact).norm() < 0.05 * exact.norm()


def test_the_adjoint_of_a_sketched_inverse() -> None:
    net, data = ref.mlp(6, 9, 3), ref.batches(1)
    optimizer = SENG(net, LOSS, lr=0.0, sketch=SKETCH, curvature_update_period=1)
    ref.train(net, optimizer, data, LOSS)
    inverse = optimizer.preconditioners["0.weight+0.bias"].inverse
    assert inverse is not None
    torch.testing.assert_close(inverse.adjoint().to_dense(), inverse.to_dense().T)


def test_huge_damping_leaves_the_gradient_divided_by_it() -> None:
    net, plain, data = ref.net(), ref.net(), ref.batches(3)
    ref.train(net, SENG(net, LOSS, lr=1e11, damping=1e12, sketch=2, momentum=0.0, kl_clip=None), data, LOSS)
    ref.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, LOSS)
    torch.testing.assert_close(ref.flat(net.parameters()), ref.flat(plain.parameters()), rtol=1e-9, atol=1e-10)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"damping must be positive: the matrix that SENG inverts is singular. Got 0.0"
    ):
        SENG(ref.net(), LOSS, lr=0.1, damping=0.0)
    with pytest.raises(ValueError, match=r"sketch is at least 1, not 0"):
        SENG(ref.net(), LOSS, lr=0.1, sketch=0)
