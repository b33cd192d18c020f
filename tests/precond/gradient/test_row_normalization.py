"""Are the rows of a direction divided by their running root mean square, at the same norm, in every method?"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from precond import PSGD, SOAP, GaLore, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus
from tests.precond import references as ref

METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, PSGD)}
SHAPES = [(3, 4), (4, 3), (3, 4), (3, 2, 2), (4,), ()]


def run(name: str, shapes=SHAPES, steps: int = 6, **options) -> tuple[list[list[Tensor]], torch.optim.Optimizer]:
    """Moves of each step, under gradients that do not depend on the parameters."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = METHODS[name](params, lr=1.0, **options)
    out = []
    for step in range(steps):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        out.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    return out, optimizer


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_definition(name):
    """Row by row in plain floats, from the moves of the method without it."""
    plain, ours = run(name)[0], run(name, row_normalization=0.7)[0]
    for i, shape in enumerate(SHAPES):
        means = [0.0] * (shape[0] if len(shape) > 1 else 0)
        for before, after in zip(plain, ours, strict=True):
            d = before[i].clone()
            if len(shape) > 1:
                rows = d.reshape(shape[0], -1)
                for r, row in enumerate(rows):
                    means[r] = 0.7 * means[r] + 0.3 * sum(float(x) ** 2 for x in row) / len(row)
                scaled = torch.stack([row / math.sqrt(m) for row, m in zip(rows, means, strict=True)])
                d = (scaled * rows.norm() / scaled.norm()).reshape(shape)
            torch.testing.assert_close(after[i], d, rtol=0, atol=1e-11)


def test_matrices_of_a_stack_are_normalised_one_by_one():
    def move(shapes, gradient, **options):
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
        optimizer = Muon(params, lr=1.0, row_normalization=0.7, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = gradient(step, i)
            optimizer.step()
        return [p.detach() for p in params]

    def one(step, i):
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(2 * step + i), dtype=torch.float64)

    (joint,) = move([(2, 3, 4)], lambda step, i: torch.stack([one(step, 0), one(step, 1)]), stacked=True)
    alone = move([(3, 4), (3, 4)], one)
    torch.testing.assert_close(joint, torch.stack(alone), rtol=0, atol=1e-14)


def test_a_resumed_run_goes_on_bit_for_bit_and_zero_rows_stay_zero():
    model = ref.SmallModel()
    make = lambda m: SOAP(m.parameters(), lr=0.01, row_normalization=0.9)  # noqa: E731
    optimizer = make(model)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            ref.loss_of(model, step).backward()
            model.hidden.weight.grad[0] = 0
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    row = model.hidden.weight[0].detach().clone()
    train(model, optimizer, range(4))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    again = make(other)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    first, second = train(model, optimizer, range(4, 8)), train(other, again, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(model.hidden.weight[0], row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_what_is_refused(value):
    with pytest.raises(ValueError, match="row_normalization"):
        Muon([nn.Parameter(torch.ones(2, 2))], row_normalization=value)
    with pytest.raises(TypeError, match="GaLore has no option 'row_normalization'"):
        GaLore([nn.Parameter(torch.ones(2, 2))], row_normalization=0.9)
