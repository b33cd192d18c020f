"""Does a run depend on the order of the sums in its gradients, as on several processes, only up to rounding?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precond.gradient.matrices import eigenbasis
from tests.precond.distributed.checks import Batch, Conv, images, tokens
from tests.precond.distributed.sharded_runs import METHODS, batch, rich


class Transformer(nn.Module):
    """Without biases: that of the keys has no gradient, whose rounding errors Adam would follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(self.embed(x)), self.embed.weight).flatten(0, 1)


def regression(out: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(out, y[:, : out.shape[1]])


def language(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y.flatten().clamp(min=0))


Problem = tuple[Callable[[], nn.Module], Callable[[], list[Batch]], Callable[[Tensor, Tensor], Tensor]]

#: Gradients of low rank, of which some are so in every step: those of logits add up to zero.
PROBLEMS: dict[str, Problem] = {
    "mlp": (rich, lambda: [batch(step) for step in range(5)], regression),
    "cnn": (Conv, lambda: images(5), F.cross_entropy),
    "transformer": (Transformer, lambda: tokens(5), language),
}


def trained(method: str, problem: str, parts: int) -> list[Tensor]:
    """Five steps, on gradients that are averaged over parts of the batch."""
    build, data, loss_fn = PROBLEMS[problem]
    model = build()
    optimizer = METHODS[method](model.parameters())
    for x, y in data():
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_fn(model(a), b) / parts).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


#: Methods with a decomposition of Gram matrices; others are tried on one problem.
WITH_BASES = [name for name in METHODS if name.startswith(("S", "KL"))]


@pytest.mark.parametrize(
    ("method", "problem"),
    [(name, problem) for name in METHODS for problem in PROBLEMS if name in WITH_BASES or problem == "transformer"],
)
def test_runs_differ_by_rounding_errors(method: str, problem: str) -> None:
    whole, halves = (trained(method, problem, parts) for parts in (1, 2))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, halves, strict=True)) < 1e-10


def test_the_basis_of_a_null_space_is_one_whatever_is_given() -> None:
    """In stacks of different ranks, and with rows that are not used, whose unit vectors are in it."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    x[1, :, 2:], x[2, 3] = 0, 0
    one, other = (y @ y.mT for y in (x, x @ turn))
    first, second = eigenbasis(one), eigenbasis(other)
    for k, null in enumerate([4, 6, 4]):
        assert (first[k].mT @ first[k] - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-14
        assert (one[k] @ first[k, :, :null]).abs().max() < 1e-13
        torch.testing.assert_close(first[k, :, :null], second[k, :, :null], rtol=0, atol=1e-12)
        torch.testing.assert_close(first[k], eigenbasis(one[k : k + 1])[0], rtol=0, atol=1e-12)
    assert torch.equal(first[2, :, 0], torch.eye(8, dtype=torch.float64)[3])
    assert torch.equal(eigenbasis(torch.zeros(1, 3, 3))[0], torch.eye(3))


@pytest.mark.parametrize("n", [3, 5, 9])
def test_null_spaces_of_small_matrices_do_not_depend_on_others_of_the_stack(n: int) -> None:
    """torch draws other numbers where fewer than sixteen are asked for, and in the last sixteen."""
    torch.manual_seed(0)
    low, high = torch.randn(n, 1, dtype=torch.float64), torch.randn(n, n - 1, dtype=torch.float64)
    stack = torch.stack([low @ low.mT, high @ high.mT])
    alone = torch.cat([eigenbasis(gram[None]) for gram in stack])
    torch.testing.assert_close(eigenbasis(stack), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "places"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_columns_of_a_raw_table_keep_their_own_directions(dtype: torch.dtype, places: float) -> None:
    """Each set of columns is resolved in its own scale, beside others and a full rank; columns of zeros are null."""
    torch.manual_seed(0)
    scales = torch.tensor([[1, 1, 1e-3, 1e-3, 1e-5, 0], [1, 1e-5, 0, 1e-5, 0, 0], [1] * 6], dtype=torch.float64)
    tables = (torch.randn(3, 200, 6) * scales.unsqueeze(1)).to(dtype)
    gram, other = (x.mT @ x for x in (tables, tables.flip(1)))
    basis = eigenbasis(gram)
    assert (basis.mT @ basis - torch.eye(6)).abs().max() < 100 * torch.finfo(dtype).eps
    inner = basis.double().mT @ gram.double() @ basis.double()
    for one, null in zip(inner, (1, 3, 0), strict=True):
        scale = one.diagonal()[null:].sqrt()
        assert (one[null:, null:] / torch.outer(scale, scale) - torch.eye(len(scale))).abs().max() < places
        assert not one[:null].any()
    torch.testing.assert_close(basis.abs(), eigenbasis(other).abs(), rtol=0, atol=places)


@pytest.mark.parametrize(("dtype", "places", "decades"), [(torch.float64, 1e-8, 5), (torch.float32, 0.05, 4)])
def test_a_stack_gives_each_matrix_the_basis_that_it_has_alone(dtype: torch.dtype, places: float, decades: int) -> None:
    """One with scales that are resolved in turn, beside those of a low rank, of rows that are not used, and of both.

    Gram matrices of columns five decades apart have entries 1e-10 apart, of which float32 keeps no digit on some
    processors.
    """
    torch.manual_seed(0)
    for _ in range(40):
        tables = torch.randn(4, 32, 16, dtype=dtype)
        tables[:2] *= 10.0 ** -torch.randint(0, decades + 1, (2, 1, 16))
        tables[2:, 8:] = 0
        tables[1::2, :, :5] = 0
        stack = tables.mT @ tables
        bases = eigenbasis(stack)
        alone = torch.cat([eigenbasis(gram[None]) for gram in stack])
        assert (bases.mT @ bases - torch.eye(16)).abs().max() < 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(bases.abs(), alone.abs(), rtol=0, atol=places)
