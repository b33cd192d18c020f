"""Do vectors and numbers follow options of their own, and matrices those of the group, in every method?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from precond import MFAC, PSGD, SOAP, AdaHessian, GaLore, KLShampoo, Muon, Shampoo, SOAPMuon, Sophia, SPlus, Vectors
from tests.precond import references as ref

METHODS = {cls.__name__: cls for cls in (SOAP, Muon, Shampoo, KLShampoo, SPlus, SOAPMuon, GaLore, AdaHessian, Sophia)}
CLOSURE = ("AdaHessian", "Sophia")


def run(name: str, params=None, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = ref.SmallModel()
    optimizer = METHODS[name](model.parameters() if params is None else params(model), lr=0.01, **options)
    for step in range(6):
        optimizer.zero_grad()
        if name in CLOSURE:
            optimizer.step(lambda step=step: ref.loss_of(model, step))
            continue
        ref.loss_of(model, step).backward()
        optimizer.step()
    return {key: p.detach().clone() for key, p in model.named_parameters()}


def apart(model: nn.Module, **own):
    """A group for each parameter, in their order, on which draws depend."""
    return [{"params": [p], **(own if p.ndim < 2 else {})} for p in model.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_they_move_as_in_a_group_of_their_own(name):
    betas = (0.8, 0.97)
    ours = run(name, vectors=Vectors(betas, lr=3.0))
    theirs = run(name, lambda model: apart(model, betas=betas, lr=0.03))
    plain = run(name)
    for key, p in ours.items():
        torch.testing.assert_close(p, theirs[key], rtol=0, atol=1e-13)
    assert not any(torch.equal(p, plain[key]) for key, p in ours.items() if p.ndim < 2)


def test_the_rate_may_follow_the_steps_and_a_group_may_differ():
    ours = run("SOAP", vectors=Vectors(lr=lambda step: 1.0 + step))
    assert not torch.equal(ours["scale"], run("SOAP")["scale"])
    none = run("SOAP", lambda model: [{**g, "vectors": None} for g in apart(model)], vectors=Vectors(lr=9.0))
    plain = run("SOAP", apart)
    assert all(torch.equal(p, plain[key]) for key, p in none.items())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: SOAP(p, vectors=(0.9, 0.99)), TypeError, r"vectors is a Vectors\(betas, lr\)"),
        (lambda p: Vectors((0.9, 1.0)), ValueError, "betas of Vectors are weights of old values"),
        (lambda p: Vectors("high"), TypeError, "betas of Vectors are numbers"),
        (lambda p: Vectors(lr=math.nan), ValueError, "lr of Vectors"),
        (lambda p: PSGD(p, vectors=Vectors((0.9, 0.99))), ValueError, r"PSGD has betas=\(0.9,\)"),
        (lambda p: GaLore(p, inner=torch.optim.SGD, vectors=Vectors((0.9, 0.99))), ValueError, "GaLore has no betas"),
        (lambda p: MFAC(p, vectors=Vectors()), TypeError, "MFAC has no option 'vectors'"),
        (lambda p: SOAP(p, vectors=Vectors(lr=lambda step: -1.0)), ValueError, "vector_lr"),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make([nn.Parameter(torch.ones(3))])
