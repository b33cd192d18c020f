"""Keys that the mask of an attention hides from every query count as little as if they had not been there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import curvature
from precond import KFAC
from tests.curvature.loops import assert_same, fisher, statistics

N, S, L, D, PAD = 4, 3, 2, 6, 2
Look = Callable[..., Tensor]


def low(mask: Tensor) -> Tensor:
    """A mask as numbers to add."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


def by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return by_kernel(q, k, v, mask)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.einsum("nhqd,nhkd->nhqk", q, k).masked_fill(~mask, -1e9).softmax(-1)
    return torch.einsum("nhqk,nhkd->nhqd", weights, v)


def to_one(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~mask, -1e30)
    return to_one((scores - scores.amax(-1, keepdim=True)).exp()) @ v


#: What an attention does with queries, keys, values ``(n, h, *, d)`` and a mask ``(n, 1, 1, s)``, True where one looks.
LOOKS: dict[str, Look] = {
    "kernel": by_kernel,
    "kernel, numbers": lambda q, k, v, mask: by_kernel(q, k, v, low(mask)),
    "formula": by_formula,
    "masked_fill": lambda q, k, v, mask: (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v,
    "where": lambda q, k, v, mask: torch.where(mask, q @ k.mT, -1e30).softmax(-1) @ v,
    "where, turned": lambda q, k, v, mask: torch.where(~mask, -1e30, q @ k.mT).softmax(-1) @ v,
    "sum, dropout": lambda q, k, v, mask: F.dropout((q @ k.mT + low(mask)).softmax(-1), 1e-12) @ v,
    "scaled": lambda q, k, v, mask: ((q @ k.mT).masked_fill(~mask, float("-inf")) / 2).softmax(-1) @ v,
    "learned sum": lambda q, k, v, mask: ((q @ k.mT).masked_fill(~mask, -1e30) + q.sum(-1, True)).softmax(-1) @ v,
    "einsum": by_einsum,
    "masked after": lambda q, k, v, mask: to_one((q @ k.mT).softmax(-1) * mask) @ v,
    "filled after": lambda q, k, v, mask: to_one((q @ k.mT).softmax(-1).masked_fill(~mask, 0)) @ v,
    "masked after, normalized": lambda q, k, v, mask: F.normalize((q @ k.mT).softmax(-1) * mask, p=1, dim=-1) @ v,
    "masked twice": lambda q, k, v, mask: to_one(((q @ k.mT) * mask).softmax(-1) * mask) @ v,
    "exponentials": lambda q, k, v, mask: to_one((q @ k.mT).exp() * mask) @ v,
    "written out": written_out,
}


class Reader(nn.Module):
    """Looks at a source from each position of a text."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.q, self.k, self.v, self.look = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, D), look

    def forward(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        h = self.second(self.first(source).tanh()).tanh()
        heads = [t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (self.q(text), self.k(h), self.v(h))]
        return self.last(self.look(*heads, mask[:, None, None]).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """The same by PyTorch's module."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.first, self.last, self.q, self.weights = nn.Linear(4, D), nn.Linear(D, 3), nn.Linear(4, D), weights
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        h = self.first(source).tanh()
        return self.last(self.attention(self.q(text), h, h, key_padding_mask=~mask, need_weights=self.weights)[0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda look=look: Reader(look) for name, look in LOOKS.items()},  # type: ignore[misc]
    "module": lambda: Multihead(False),
    "module, weights": lambda: Multihead(True),
}


def padded_and_not() -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """The same sources with and without two positions of padding; targets of all positions of the texts."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(N, S + PAD, 4, generator=generator).double()
    text = torch.randn(N, L, 4, generator=generator).double()
    y = torch.randint(3, (N, L), generator=generator)
    mask = (torch.arange(S + PAD) < S).expand(N, -1)
    return [(source, text, mask), (source[:, :S], text, mask[:, :S])], y


@pytest.mark.parametrize("name", MODELS)
def test_hidden_keys_are_no_positions(name: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = MODELS[name]().double(), nn.CrossEntropyLoss()
    found = []
    inputs, y = padded_and_not()
    for x in inputs:
        optimizer = KFAC(model, loss_fn, lr=0.0, fisher="exact", sharing="expand", curvature_ema=0.0, kl_clip=None)
        loss_fn(model(*x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.detach()
        found.append(statistics(optimizer))
    assert_same(found[0], found[1])


def test_on_data_too() -> None:
    torch.manual_seed(0)
    model = Reader(by_kernel).double()
    inputs, y = padded_and_not()
    found = [fisher(model, nn.CrossEntropyLoss(), (x, y), kind="exact", sharing="expand") for x in inputs]
    assert_same(found[0], found[1])


def test_keys_whose_weights_vanish_by_their_values_count() -> None:
    """Scores so far apart that some weights are exactly zero: a step later they may not be."""
    torch.manual_seed(0)
    model = Reader(lambda q, k, v, mask: (1e6 * q @ k.mT).softmax(-1) @ v).double()
    inputs, y = padded_and_not()
    operator: Any = curvature.fisher(model, nn.CrossEntropyLoss(), (inputs[0], y), structure="kfac", sharing="expand")
    block = next(b for p, b in zip(operator.places, operator.blocks, strict=True) if p.block.name.startswith("first."))
    rows = inputs[0][0].flatten(0, 1)
    A = block.factors[1].to_dense()[:-1, :-1]
    torch.testing.assert_close(A, rows.T @ rows / len(rows))


def test_keys_count_where_a_mask_after_the_softmax_leaves_their_scores_in_its_sum() -> None:
    """Only the values of what is hidden count as if they had not been there."""
    torch.manual_seed(0)
    model, loss_fn = Reader(lambda q, k, v, mask: ((q @ k.mT).softmax(-1) * mask) @ v).double(), nn.CrossEntropyLoss()
    (inputs, _), y = padded_and_not()
    operator: Any = curvature.fisher(model, loss_fn, (inputs, y), structure="kfac", sharing="expand")
    blocks = {p.block.name[0]: b for p, b in zip(operator.places, operator.blocks, strict=True)}
    h = model.second(model.first(inputs[0]).tanh()).tanh()
    for name, rows in (("k", h.flatten(0, 1)), ("v", h[:, :S].flatten(0, 1))):
        A = blocks[name].factors[1].to_dense()[:-1, :-1]
        torch.testing.assert_close(A, (rows.T @ rows / len(rows)).detach())


@pytest.mark.parametrize("name", LOOKS)
def test_a_checkpoint_is_computed_again_for_the_users_pass_alone(name: str) -> None:
    """What it has saved can be asked for once."""
    torch.manual_seed(0)
    model, loss_fn = Reader(LOOKS[name]).double(), nn.CrossEntropyLoss()
    (inputs, _), y = padded_and_not()
    loss_fn(model(*inputs).flatten(0, 1), y.flatten()).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer = KFAC(model, loss_fn, lr=0.0, fisher="exact", sharing="expand")
    plain = model.look
    model.look = lambda *given: checkpoint(plain, *given, use_reentrant=False)
    optimizer.zero_grad()
    loss_fn(model(*inputs).flatten(0, 1), y.flatten()).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True) if p.grad is not None)
    optimizer.step()
