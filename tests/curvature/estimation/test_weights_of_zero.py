"""Terms of weight zero are no terms: masking by hand, picking rows and ignoring targets are one loss.

Padding holds large numbers, which show in the inputs of the first layer where they count.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvature
from tests.curvature.loops import assert_same, mlp, statistics, watching

CE, EACH = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")
Minimised = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with padding, targets, and which positions count."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 4).double(), torch.randint(3, (3, 5))
    counts = torch.arange(5) < torch.tensor([[5], [2], [1]])
    return x * torch.where(counts, 1, 10).unsqueeze(-1), y, counts


def picked(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return CE(model(x).flatten(0, 1)[counts.flatten()], y[counts])


def by_hand(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return (EACH(model(x).flatten(0, 1), y.flatten()) * counts.flatten()).sum() / counts.sum()


def classes_second(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return (EACH(model(x).transpose(1, 2), y) * counts).sum() / counts.sum()


def accumulated(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """The first example, then the others."""
    (by_hand(model, x[:1], y[:1], counts[:1]) * 5 / 8).backward()
    return by_hand(model, x[1:], y[1:], counts[1:]) * 3 / 8


def a_mean_of_weight_zero(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return picked(model, x, y, counts) + 0.0 * CE(model(30 * x).flatten(0, 1), y.flatten())


def weights_of_examples(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """One value for each example: of rows that count, and of others."""
    rows = torch.cat([x[counts], x[~counts]])
    weights = torch.cat([torch.ones(8), torch.zeros(7)]).double() / 8
    return (EACH(model(rows), torch.cat([y[counts], y[~counts]])) * weights).sum()


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("minimised", "kind"),
    [
        (by_hand, "exact"),
        (by_hand, "empirical"),
        (classes_second, "exact"),
        (accumulated, "exact"),
        (a_mean_of_weight_zero, "exact"),
        (a_mean_of_weight_zero, "empirical"),
        (weights_of_examples, "exact"),
    ],
)
def test_masking_by_hand_is_picking_rows(minimised: Minimised, kind: str, structure: str) -> None:
    found = []
    for loss, loss_fn in ((picked, CE), (minimised, CE if minimised is a_mean_of_weight_zero else EACH)):
        model = mlp()
        optimizer = watching(model, loss_fn, structure, kind, curvature_ema=0.0)
        loss(model, *batch()).backward()
        optimizer.step()
        found.append(statistics(optimizer))
        optimizer.detach()
    assert_same(found[1], found[0], rtol=1e-10)


def one_term_each(weight: bool) -> Minimised:
    """Only the first position of each example counts: by its weight, or because it is picked."""

    def minimised(model: nn.Module, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        z = model(x)
        if not weight:
            return CE(z[:, 0], y[:, 0])
        return (EACH(z.flatten(0, 1), y.flatten()).view(3, 5) * torch.eye(5)[0]).sum() / 3

    return minimised


def test_one_term_that_counts_is_a_model_that_aggregates() -> None:
    """By which KFAC chooses how the positions of a layer are treated."""
    found = []
    for weight in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Shifted(), nn.Linear(5, 3)).double()
        optimizer = watching(model, EACH if weight else CE, "kfac", "exact", curvature_ema=0.0)
        one_term_each(weight)(model, *batch()).backward()
        optimizer.step()
        found.append(statistics(optimizer))
        optimizer.detach()
    assert_same(found[1], found[0], rtol=1e-10)


class Shifted(nn.Module):
    """Each position sees those behind it."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("of", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_a_class_of_weight_zero_is_ignored(of: type[nn.Module], reduction: str) -> None:
    """On data, where padding has that class."""
    weighted = of(weight=torch.tensor([0.0, 1, 2]).double(), reduction=reduction)
    x, y, counts = batch()
    y = torch.where(counts, y.clamp(min=1), 0)
    last = nn.LogSoftmax(-1) if isinstance(weighted, nn.NLLLoss) else nn.Identity()
    model = nn.Sequential(*mlp(), last)
    ignoring = of(weight=weighted.weight, ignore_index=0, reduction=reduction)
    found, expected = (
        curvature.fisher(model, L, (x, y), kind="exact", structure="kfac").to_dense() for L in (weighted, ignoring)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_weights_of_binary_targets() -> None:
    x, _, counts = batch()
    x = x.flatten(0, 1)
    y = (x[:, :1] > 0).double()
    weights = counts.reshape(15, 1).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    weighted = nn.BCEWithLogitsLoss(weight=weights, reduction="sum")
    kept = weights[:, 0] > 0
    found = curvature.ggn(model, weighted, (x, y), structure="kfac").to_dense()
    expected = curvature.ggn(
        model, nn.BCEWithLogitsLoss(reduction="sum"), (x[kept], y[kept]), structure="kfac"
    ).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_a_loss_of_weight_zero_in_a_sum() -> None:
    x, y, _ = batch()
    both = curvature.losses.SumOfLosses({0: (1.0, CE), 1: (0.0, nn.CrossEntropyLoss())})
    targets = y.flatten().masked_fill(torch.arange(15) > 4, -100)
    found = curvature.ggn(
        mlp(), both, (x.flatten(0, 1), (targets, y.flatten())), structure="kfac", output=lambda z: (z, z)
    )
    expected = curvature.ggn(mlp(), CE, (x.flatten(0, 1), targets), structure="kfac")
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-14)
