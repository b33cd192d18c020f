"""The coverage table names every trainable parameter once, and what it says is what is estimated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvature
from precond import KFAC


class Mixed(nn.Module):
    """A layer, a norm, attention, a bare parameter without rule, one with, a frozen one and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.temperature = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.frozen(x * self.scale * torch.exp(self.temperature)).mean(1))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(7, (4, 5), generator=g), torch.randint(3, (4,), generator=g)


def test_every_trainable_parameter_has_one_row() -> None:
    model = Mixed()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for table in (
        curvature.coverage(model, nn.CrossEntropyLoss()),
        curvature.coverage(model, nn.CrossEntropyLoss(), batch()),
    ):
        assert [row.parameter for row in table] == trainable


def test_rows_say_what_is_estimated() -> None:
    model, loss_fn, (x, y) = Mixed(), nn.CrossEntropyLoss(), batch()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(x), y).backward()
    optimizer.step()
    told, done = curvature.coverage(model, loss_fn, (x, y)), optimizer.coverage()
    assert {r.parameter: (r.block, r.structure) for r in told} == {r.parameter: (r.block, r.structure) for r in done}
    assert told["attention.in_proj_weight"].structure == "kronecker"
    assert told["norm.bias"].structure == "unit"
    assert told["scale"].structure == "diagonal" and told["scale"].why == "mul"
    assert told["temperature"].why == "no rule for exp: gradients by autograd"
    assert told["unused.weight"].structure == "unused"
    assert told.covered < 1


def test_sizes_are_those_of_the_stored_factors() -> None:
    table = curvature.coverage(Mixed(), nn.CrossEntropyLoss(), batch())
    assert table["head.weight"].size == 3**2 + 9**2
    assert table["embed.weight"].size == 8**2 + 7
    assert table["norm.weight"].size == 8 * 2 * 2


def test_promises_hold_where_types_tell() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    data = (torch.randn(5, 2, 4, 4), torch.randint(3, (5,)))
    promised, seen = (
        curvature.coverage(model, nn.CrossEntropyLoss()),
        curvature.coverage(model, nn.CrossEntropyLoss(), data),
    )
    for a, b in zip(promised, seen, strict=True):
        assert (a.block, a.structure, a.size) == (b.block, b.structure, b.size)


def test_the_loss_is_described() -> None:
    model = nn.Linear(2, 2)
    assert "exact, mc, empirical" in curvature.coverage(model, nn.MSELoss()).loss
    assert "empirical only" in curvature.coverage(model, lambda z, y: (z - y).abs().mean()).loss


def test_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    curvature.coverage(model, nn.MSELoss(), (torch.randn(6, 3, generator=torch.Generator()), torch.zeros(6, 2)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="no trainable parameter 'nope'; there are weight, bias"):
        curvature.coverage(nn.Linear(2, 2), nn.MSELoss())["nope"]
