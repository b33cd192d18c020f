"""Outputs whose examples lie along another axis than the first: named by the caller, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import precond
from curvature import KroneckerFisher
from precond import Loop
from tests.curvature.loops import fisher

LOSS = nn.CrossEntropyLoss()


class TimeMajorOutput(nn.Module):
    """Takes sequences ``(N, T, d)`` or, ``first=False``, ``(T, N, d)``; returns ``(T, N, C)``, the times joined."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.first, self.inp, self.out = first, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.first else x
        return self.out(self.inp(x).tanh().cumsum(0))


def made(T: int, N: int, first: bool) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(T + 10 * N)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TimeMajorOutput(first).double()
    x = torch.randn(*((N, T) if first else (T, N)), 3, dtype=torch.float64, generator=g)
    return model, x, torch.randint(3, (T, N), generator=g)


def of_examples(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the summed terms of each example, ``(N, P)``, by a loop."""
    rows = []
    for n in range(y.shape[1]):
        loss = nn.functional.cross_entropy(model(x)[:, n], y[:, n], reduction="sum")
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


SIZES = [(4, 2, True), (2, 4, True), (3, 3, True), (4, 2, False), (2, 5, False), (3, 3, False)]


@pytest.mark.parametrize(("T", "N", "first"), SIZES)
def test_gradients_of_examples_along_the_second_axis(T: int, N: int, first: bool) -> None:
    model, x, y = made(T, N, first)
    expected = of_examples(model, x, y)
    options: dict[str, Any] = {"class_dim": -1, "batch_dim": 1}
    got = curvature.per_sample_gradients(model, LOSS, (x, y), **options)
    torch.testing.assert_close(torch.cat([g.flatten(1) for g in got.values()], 1), expected, rtol=1e-10, atol=1e-13)
    norms = curvature.per_sample_norms(model, LOSS, (x, y), **options)
    torch.testing.assert_close(sum(norms.values()), expected.square().sum(1), rtol=1e-10, atol=1e-13)
    moments = curvature.gradient_second_moment(model, LOSS, (x, y), **options)
    flat = torch.cat([m.flatten() for m in moments.values()])
    torch.testing.assert_close(flat, expected.square().mean(0), rtol=1e-10, atol=1e-13)
    variances = curvature.gradient_variance(model, LOSS, (x, y), **options)
    flat = torch.cat([v.flatten() for v in variances.values()])
    torch.testing.assert_close(flat, expected.var(0, correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["layer", "kfac", "diagonal", "ekfac"])
@pytest.mark.parametrize(("T", "N", "first"), SIZES)
def test_the_fisher_is_that_of_outputs_with_the_examples_first(structure: Any, T: int, N: int, first: bool) -> None:
    model, x, y = made(T, N, first)

    class ExamplesFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TimeMajorOutput().double()
            self.inner.load_state_dict(model.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).transpose(0, 1)

    options: dict[str, Any] = {"class_dim": -1, "structure": structure, "kind": "exact"}
    expected = fisher(ExamplesFirst(), LOSS, (x if first else x.transpose(0, 1), y.T), **options)
    got = fisher(model, LOSS, (x, y), batch_dim=1, **options)
    for name, block in got.items():
        true = expected["+".join(f"inner.{part}" for part in name.split("+"))]
        torch.testing.assert_close(block, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("T", "N", "first"), SIZES)
def test_training_counts_examples_along_the_second_axis(T: int, N: int, first: bool, flat: bool) -> None:
    model, x, y = made(T, N, first)
    optimizer = precond.NaturalGradient(
        model, LOSS, lr=0.0, fisher="empirical", structure="dense", loop=Loop(batch_dim=1)
    )
    z = model(x)
    (LOSS(z.flatten(0, 1), y.flatten()) if flat else LOSS(z.permute(1, 2, 0), y.T)).backward()
    optimizer.step()
    optimizer.detach()
    rows = of_examples(model, x, y)
    (preconditioner,) = optimizer.preconditioners.values()
    got = preconditioner.estimator.operator().to_dense()
    torch.testing.assert_close(got, rows.mT @ rows / (N * T), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("T", "N", "first"), [s for s in SIZES if s[2]])
def test_examples_that_are_seen_to_lie_elsewhere_are_refused(T: int, N: int, first: bool) -> None:
    model, x, y = made(T, N, first)
    with pytest.raises(ValueError, match="batch_dim"):
        curvature.per_sample_gradients(model, LOSS, (x, y), class_dim=-1)
    with pytest.raises(ValueError, match="batch_dim"):
        fisher(model, LOSS, (x, y), class_dim=-1, structure=KroneckerFisher("exact", sharing="reduce"), kind="exact")
    optimizer = precond.NaturalGradient(model, LOSS, lr=0.0, fisher="empirical", structure="layer")
    with pytest.raises(ValueError, match=r"Loop\(batch_dim=1\)"):
        LOSS(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.detach()


def test_an_axis_that_is_none() -> None:
    model, x, y = made(4, 2, True)
    with pytest.raises(ValueError, match="batch_dim=3 is no axis"):
        curvature.per_sample_gradients(model, LOSS, (x, y), class_dim=-1, batch_dim=3)
    with pytest.raises(ValueError, match="batch_dim=2 is the class axis"):
        curvature.per_sample_gradients(model, LOSS, (x, y), class_dim=-1, batch_dim=2)
    with pytest.raises(ValueError, match="batch_dim"):
        precond.SOAP(model.parameters(), lr=0.1, loop=Loop(batch_dim=1))
