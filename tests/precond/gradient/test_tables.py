"""Do matrices of far more rows than columns get a rate of their own, and Adam's step where the method has one?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from precond import PSGD, SOAP, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus, Tables

ADAM = {cls.__name__: cls for cls in (SOAP, KLShampoo, Muon, SOAPMuon)}
OTHERS = {cls.__name__: cls for cls in (PSGD, Shampoo, SPlus)}
TABLE, MATRIX = (90, 3), (24, 3)


def trained(make, *, steps: int = 4, **options) -> list[Tensor]:
    """A table and a matrix after some steps of gradients that do not depend on them."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in (TABLE, MATRIX)]
    optimizer = make(params, lr=0.01, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", ADAM)
def test_a_table_takes_the_step_of_adam_at_its_own_rate(name):
    betas = (0.8, 0.97)
    table, matrix = trained(ADAM[name], betas=betas, tables=Tables(lr=3.0))
    adam = trained(lambda params, lr: torch.optim.Adam(params, lr=3 * lr, betas=betas, eps=1e-8))[0]
    torch.testing.assert_close(table, adam, rtol=0, atol=1e-13)
    none, plain = trained(ADAM[name], betas=betas, tables=None)
    assert torch.equal(matrix, plain) and not torch.equal(table, none)
    inf = trained(ADAM[name], betas=betas, tables=Tables(lr=3.0, ratio=math.inf))
    assert torch.equal(inf[0], none)


@pytest.mark.parametrize("name", OTHERS)
def test_a_table_moves_further_in_methods_without_adam(name):
    table, matrix = trained(OTHERS[name], tables=Tables(lr=lambda step: 3.0))
    none, plain = trained(OTHERS[name], tables=None)
    torch.testing.assert_close(table, 3 * none, rtol=1e-12, atol=1e-15)  # signs of both kinds cancel
    assert torch.equal(matrix, plain)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"tables": 3.0}, TypeError, r"tables is a Tables\(lr, ratio\)"),
        ({"tables": Tables(lr=lambda step: -1.0)}, ValueError, "table_lr"),
    ],
)
def test_what_is_no_treatment_of_tables_is_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        trained(SOAP, **wrong)


def test_a_state_from_before_tables_goes_on_without_them():
    p = nn.Parameter(torch.ones(TABLE))
    old = SOAP([p], tables=None)
    p.square().sum().backward()
    old.step()
    saved = old.state_dict()
    for name in ("table_lr", "table_ratio"):
        del saved["param_groups"][0][name]
    new = SOAP([p], tables=Tables())
    new.load_state_dict(saved)
    new.step()
    assert new.param_groups[0]["table_lr"] == 1 and "factor.1" in new.state[p]
