"""Positions that a model leaves out after a layer count as little as those that never entered it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvature
from precond import KFAC

N, R, D = 5, 6, 3
ONE = torch.tensor([[4], [0], [5], [1], [1]])  # a position of each example
TWO = torch.tensor([[4, 2], [0, 1], [5, 3], [1, 5], [1, 0]])
SAME = torch.tensor([[1, 4]]).expand(N, 2)
ROWS = torch.arange(N)


def mask(places: Tensor) -> Tensor:
    return torch.zeros(N, R, dtype=torch.bool).scatter_(1, places, True)


#: What a model does with ``(N, R, d)`` after a layer, and the positions of which that is the mean.
PICKS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "first": (lambda h: h[:, 0], torch.zeros(N, 1, dtype=torch.long)),
    "last": (lambda h: h[:, -1], torch.full((N, 1), R - 1)),
    "last of each": (lambda h: h[ROWS, ONE[:, 0]], ONE),
    "gather": (lambda h: h.gather(1, ONE[..., None].expand(-1, -1, h.shape[2]))[:, 0], ONE),
    "slice": (lambda h: h[:, 1:5:3].mean(1), SAME),
    "slices of slices": (lambda h: h[:, 1:][:, ::3][:, :2].mean(1), SAME),
    "list": (lambda h: h[:, [1, 4]].mean(1), SAME),
    "index_select": (lambda h: h.index_select(1, SAME[0]).mean(1), SAME),
    "unbind": (lambda h: (h.unbind(1)[1] + h.unbind(1)[4]) / 2, SAME),
    "split": (lambda h: (h.split(2, 1)[0][:, 1] + h.split([3, 3], 1)[1][:, 1]) / 2, SAME),
    "product": (lambda h: (h * mask(TWO)[..., None]).sum(1) / 2, TWO),
    "product with numbers": (lambda h: (mask(SAME)[0, :, None].double() * h).sum(1) / 2, SAME),
    "masked_fill": (lambda h: h.masked_fill(~mask(TWO)[..., None], 0.0).sum(1) / 2, TWO),
    "where": (lambda h: torch.where(mask(TWO)[..., None], h, 0.0).sum(1) / 2, TWO),
    "weights": (lambda h: (mask(TWO).double()[:, None] / 2 @ h)[:, 0], TWO),
    "flip": (lambda h: (h.flip(1)[:, 1] + h.flip(-2, 2)[:, 4].flip(1)) / 2, SAME),
    "flips of flips": (lambda h: h.flip(1)[:, 1:].flip(1)[:, [1, 4]].mean(1), SAME),
    "flipped examples": (lambda h: h.flip(0)[ROWS, ONE[:, 0].flip(0)].flip(0), ONE),
    "roll": (lambda h: h.roll(2, 1)[:, [3, 0]].mean(1), SAME),
    "roll of several": (lambda h: h.roll((-1, 1), (1, -1))[:, ::3].mean(1).roll(-1, 1), SAME),
    "time-major": (lambda h: (h.permute(1, 0, 2)[-2] + h.movedim(1, 0).unbind(0)[1]) / 2, SAME),
    "time-major steps": (lambda h: ((t := h.transpose(0, 1))[1] + t[-2:-1][0]) / 2, SAME),
    "two heads": (lambda h: (h[:, 1] + h[:, 4]) / 2, SAME),
}


class Model(nn.Module):
    """Two layers for each position, then a part of the positions, and a head."""

    def __init__(self, pick: Callable[[Tensor], Tensor], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.pick, self.activation = pick, activation or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pick(self.b(self.activation(self.a(x)))))


def models(*picks: Callable[[Tensor], Tensor], activation: nn.Module | None = None) -> list[Model]:
    found = [Model(pick, activation).double() for pick in picks]
    for model in found[1:]:
        model.load_state_dict(found[0].state_dict())
    return found


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, R, D, generator=generator).double(), torch.tensor([0, 1, 2, 0, 1])


def factors(model: nn.Module, x: Tensor, y: Tensor, sharing: str) -> Tensor:
    return curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="kfac", sharing=sharing).to_dense()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("how", PICKS)
def test_positions_cut_after_a_layer_are_those_cut_before(how: str, sharing: str) -> None:
    pick, places = PICKS[how]
    late, early = models(pick, lambda h: h.mean(1))
    x, y = data()
    few = x.gather(1, places[..., None].expand(-1, -1, D))
    torch.testing.assert_close(late(x), early(few))
    torch.testing.assert_close(factors(late, x, y, sharing), factors(early, few, y, sharing), rtol=1e-10, atol=1e-12)


def test_positions_are_cut_above_a_product_of_something_with_itself() -> None:
    late, early = models(lambda h: (h * h)[:, 1:5:3].mean(1), lambda h: (h * h).mean(1))
    x, y = data()
    few = x.gather(1, SAME[..., None].expand(-1, -1, D))
    torch.testing.assert_close(factors(late, x, y, "expand"), factors(early, few, y, "expand"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("how", ["first", "last of each", "product", "weights"])
def test_in_training_too(how: str, fisher: str) -> None:
    pick, places = PICKS[how]
    x, y = data()
    few = x.gather(1, places[..., None].expand(-1, -1, D))
    found = []
    for model, given in zip(models(pick, lambda h: h.mean(1)), (x, few), strict=True):
        loss_fn = nn.CrossEntropyLoss()
        optimizer = KFAC(model, loss_fn, lr=0.0, fisher=fisher, sharing="expand", curvature_ema=0.0, kl_clip=None)
        loss_fn(model(given), y).backward()
        optimizer.step()
        found.append([p.estimator.operator().to_dense() for p in optimizer.preconditioners.values()])
    for late, early in zip(*found, strict=True):
        torch.testing.assert_close(late, early, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pick", [lambda h: h.mean(1), lambda h: (h[:, :3].sum(1) + h[:, 3:].sum(1)) / R])
def test_units_that_are_off_leave_no_position_out(pick: Callable[[Tensor], Tensor]) -> None:
    model = models(pick, activation=nn.ReLU())[0]
    x, y = data()
    with torch.no_grad():
        model.a.bias.fill_(-1.0)  # no unit is on at most positions
    inputs = torch.cat([x, x.new_ones(N, R, 1)], 2).flatten(0, 1)
    a = inputs.T @ inputs / (N * R)
    block = factors(model, x, y, "expand")[:16, :16]
    scale = block[0, 0] / a[0, 0]
    torch.testing.assert_close(block[:3, :3], scale * a[:3, :3], rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    """The first position looks at all others, by what three layers make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.late, self.head = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ x.mT).softmax(-1)
        return self.head(self.late(x + weights @ self.v(x))[:, 0])


def test_positions_that_are_looked_at_count() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    x, y = data()
    whole = torch.cat([x, x.new_ones(N, R, 1)], 2)
    first = whole[:, 0]
    blocks = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="kfac", sharing="expand").to_dense()
    size = D * D + D
    for k, rows in enumerate((first, whole.flatten(0, 1))):  # q of the first position alone, v of all
        block = blocks[k * size : k * size + D, k * size : k * size + D]
        a = (rows.T @ rows)[:D, :D]
        torch.testing.assert_close(block / block[0, 0], a / a[0, 0], rtol=1e-10, atol=1e-12)
