"""Rows of zeros in a gradient or an input (words that do not occur) are no harm, and change nothing for the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KFAC, PSGD, SINGD, SOAP, TNT, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus
from solvers.outcome.remedies import FLOAT64

GRADIENT: dict[str, Callable[[Any], Any]] = {
    "SOAP": lambda p: SOAP(p, lr=1e-2, inverse_update_period=2, max_ratio=None),
    "Shampoo": lambda p: Shampoo(p, lr=1e-2, inverse_update_period=2, max_ratio=None),
    "corrected Shampoo": lambda p: Shampoo(
        p, lr=1e-2, inverse_update_period=2, max_ratio=None, eigenvalue_correction=True, grafting=None
    ),
    "KL-Shampoo": lambda p: KLShampoo(p, lr=1e-2, inverse_update_period=2, max_ratio=None),
    "SPlus": lambda p: SPlus(p, lr=0.5, inverse_update_period=2),
    "PSGD": lambda p: PSGD(p, lr=1e-2),
    "Muon": lambda p: Muon(p, lr=1e-2),
    "SOAPMuon": lambda p: SOAPMuon(p, lr=1e-2, max_ratio=None),
    "SOAP, rows": lambda p: SOAP(p, lr=1e-2, inverse_update_period=2, max_ratio=None, row_normalization=0.9),
}
LAYERWISE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "KFAC": lambda model, loss: KFAC(model, loss, lr=0.1),
    "EKFAC": lambda model, loss: EKFAC(model, loss, lr=0.1),
    "TNT": lambda model, loss: TNT(model, loss, lr=0.1),
    "SINGD": lambda model, loss: SINGD(model, loss, lr=0.1),
}


def words(vocabulary: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    """An embedding of which few rows occur."""

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randint(vocabulary, (5, 6))
        return x, (x % 8).flatten()

    return nn.Sequential(nn.Embedding(vocabulary, 32), nn.Flatten(0, 1), nn.Tanh(), nn.Linear(32, 8)), batch


def bag(features: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    """A bag of words: most inputs are zero."""

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.zeros(16, features).scatter_(1, torch.randint(features, (16, 5)), 1.0)
        return x, x[:, : features // 2].sum(1).long() % 4

    return nn.Sequential(nn.Linear(features, 24), nn.ReLU(), nn.Linear(24, 4)), batch


@pytest.mark.parametrize("kind", [words, bag])
@pytest.mark.parametrize("name", [*GRADIENT, *LAYERWISE])
def test_trains_where_most_rows_are_zero(name: str, kind: Callable[..., Any]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model, batch = kind(300)
        loss_fn = nn.CrossEntropyLoss()
        make = GRADIENT.get(name)
        optimizer = make(model.parameters()) if make else LAYERWISE[name](model, loss_fn)
        x, y = batch()
        losses = []
        for step in range(8):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step == 3:
                x, y = batch()  # others occur
                losses.clear()
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        assert losses[-1] < losses[0]
        assert optimizer.metrics()["skipped"] == 0


@pytest.mark.parametrize("name", ["SOAP", "Shampoo", "corrected Shampoo"])
def test_words_that_never_occur_change_nothing_for_those_that_do(name: str) -> None:
    torch.manual_seed(0)
    used = torch.tensor([3, 4, 9, 20, 21, 33])
    large = nn.Embedding(40, 5, dtype=torch.float64)
    small = nn.Embedding(6, 5, dtype=torch.float64)
    with torch.no_grad():
        small.weight.copy_(large.weight[used])
    optimizers = [GRADIENT[name]([module.weight]) for module in (large, small)]
    before = large.weight.detach().clone()
    for step in range(7):
        places = torch.randint(6, (10,), generator=torch.Generator().manual_seed(step))
        places[:6] = torch.arange(6)  # each occurs in each batch: a row that does not yet would be rotated later
        target = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for module, optimizer, ids in ((large, optimizers[0], used[places]), (small, optimizers[1], places)):
            optimizer.zero_grad()
            (module(ids) - target).square().sum().backward()
            optimizer.step()
        # SOAP divides rounding errors of directions without gradient by their own size plus 1e-8.
        torch.testing.assert_close(large.weight[used], small.weight, rtol=0, atol=1e-7)
    unused = torch.ones(40, dtype=torch.bool)
    unused[used] = False
    assert float((large.weight.detach() - before)[unused].abs().max()) < 1e-7


def test_a_decomposition_that_needed_float64_is_told(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    routine, left = torch.linalg.eigh, [1]

    def eigh(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32 and left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("did not converge")
        return routine(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for make in (lambda: EKFAC(model, loss_fn, lr=0.1), lambda: SOAP(model.parameters())):
        optimizer: Any = make()
        left[0] = 1
        loss_fn(model(torch.randn(9, 4)), torch.randint(3, (9,))).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert optimizer.metrics()[FLOAT64] == 1 and optimizer.metrics()["steps"] == 1
