"""Does no entry move against its gradient, and by how much do the others move in return?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from precond import PSGD, SOAP, GaLore, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus

METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, PSGD, GaLore)}
SHAPES = ((5, 4), (5, 4), (6,), (90, 3), (2, 2, 3))


def moves(name: str, **options) -> list[list[np.ndarray]]:
    """What each step takes off each parameter, of gradients that do not depend on where the parameters are."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = METHODS[name](params, lr=1.0, **options)
    out = []
    for gradients in all_gradients():
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        out.append([(b - p.detach()).numpy() for p, b in zip(params, before, strict=True)])
    return out


def all_gradients() -> list[list[np.ndarray]]:
    """Of five steps; some rows of the long matrix have none."""
    rng = np.random.default_rng(0)
    steps = [[rng.standard_normal(shape) for shape in SHAPES] for _ in range(5)]
    for gradients in steps:
        gradients[3][rng.permutation(90)[:60]] = 0
    return steps


@pytest.mark.parametrize("name", METHODS)
def test_entries_that_oppose_their_gradient_stay_and_the_others_make_up_for_them(name):
    plain, ours = moves(name, cautious=False), moves(name, cautious=True)
    opposed = 0
    for whole, left, gradients in zip(plain, ours, all_gradients(), strict=True):
        for d, move, g in zip(whole, left, gradients, strict=True):
            wrong = d * g < 0
            opposed += wrong.sum()
            expected = np.where(wrong, 0, d) * d.size / (d.size - wrong.sum())
            np.testing.assert_allclose(move, expected, rtol=1e-9, atol=1e-12)
    assert opposed > 50


def test_matrices_of_a_stack_are_looked_at_one_by_one():
    def moved(shapes, cut) -> list[torch.Tensor]:
        params, generator = [nn.Parameter(torch.zeros(s)) for s in shapes], torch.Generator().manual_seed(1)
        optimizer = Muon(params, lr=1.0, cautious=True, stacked=True)
        for _ in range(3):
            for p, g in zip(params, cut(torch.randn(2, 4, 3, generator=generator)), strict=True):
                p.grad = g
            optimizer.step()
        return [p.detach() for p in params]

    (joint,) = moved([(2, 4, 3)], lambda g: [g])
    apart = moved([(4, 3), (4, 3)], lambda g: g.unbind())
    torch.testing.assert_close(joint, torch.stack(apart), rtol=0, atol=1e-6)


def test_nothing_moves_where_every_entry_opposes():
    p = nn.Parameter(torch.zeros(3, 2))
    optimizer = Muon([p], lr=0.1, momentum=0.95, cautious=True)
    for sign in (1.0, 1.0, -0.1):
        before, p.grad = p.detach().clone(), torch.full((3, 2), sign)
        optimizer.step()
    assert torch.equal(p, before)


def test_momentum_on_top_is_refused_where_it_would_oppose_gradients_again():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"looks at directions, before momentum=0\.9 adds to them"):
        Shampoo([p], cautious=True, momentum=0.9)
    Muon([p], cautious=True, momentum=0.9)  # its momentum is a part of the direction


def test_entries_without_gradient_stay_where_eps_is_zero():
    p = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer, before = SOAP([p], lr=1e-2, eps=0.0), p.detach().clone()
    for _ in range(3):
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        p.grad[0] = 0
        optimizer.step()
    moved = (p.detach() - before).abs()
    assert moved.isfinite().all() and moved[1:].min() > 0 and moved[0].max() == 0
