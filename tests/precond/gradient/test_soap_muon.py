"""Does SOAP-Muon orthogonalise what SOAP preconditions, in bases that follow every gradient?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond import Momentum, Muon, SOAPMuon, param_groups
from precond.gradient.muon import QUINTIC
from tests.precond import references as ref


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("period", [1, 3])
def test_equals_the_reference(period, nesterov):
    options = {"lr": 0.02, "betas": (0.9, 0.8), "eps": 1e-6}
    momentum = 0.8 if nesterov else Momentum(0.8)

    def make(model):
        return SOAPMuon(
            model.parameters(),
            momentum=momentum,
            curvature_ema=0.9,
            polynomial="quintic",
            inverse_update_period=period,
            weight_decay=0.1,
            **options,
        )

    extra = {"momentum": 0.8, "nesterov": nesterov, "ema": 0.9, "period": period, "coefficients": list(QUINTIC)}
    # With one channel no null space has two dimensions, in which the first basis would be arbitrary.
    ref.assert_equals_reference(make, ref.soap_muon, {**options, **extra, "decay": 0.1}, channels=1)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 2, 2)])
def test_a_step_is_orthogonal(shape, generator):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = SOAPMuon([p], lr=1.0, scaling="none")
    for _ in range(4):
        before = p.detach().clone()
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        values = torch.linalg.svdvals((p.detach() - before).reshape(shape[0], -1))
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=0.15)


def test_the_first_step_is_that_of_muon(generator):
    """The first gradient is diagonal in its own bases, so that its second moment makes all of its entries one."""
    gradient = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    moved = []
    for cls in (Muon, SOAPMuon):
        p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        p.grad = gradient.clone()
        cls([p], lr=1.0).step()
        moved.append(p.detach())
    # Five steps of Polar Express end between 0.85 and 1, from other singular values here and there.
    torch.testing.assert_close(*moved, rtol=0, atol=0.15)


def test_groups_and_matrices_without_a_basis_keep_to_adamw(generator):
    shapes = {"long": (50, 2), "kept": (4, 4), "vector": (4,), "number": ()}
    start = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    gradients = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    ours, theirs = ({k: nn.Parameter(x.clone()) for k, x in start.items()} for _ in range(2))
    for params in (ours, theirs):
        for k, p in params.items():
            p.grad = gradients[k].clone()
    groups = [{"params": [ours[k]], "orthogonalize": k != "kept"} for k in shapes]
    SOAPMuon(groups, lr=0.1, weight_decay=0.1, max_dim=1).step()
    torch.optim.AdamW(list(theirs.values()), lr=0.1, weight_decay=0.1, betas=(0.9, 0.95)).step()
    for k in shapes:
        torch.testing.assert_close(ours[k], theirs[k])


def test_roles_are_those_of_muon():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7))
    optimizer = SOAPMuon(param_groups(model, SOAPMuon))
    for group in optimizer.param_groups:
        assert group["orthogonalize"] == (group["name"] == "matrix")


@pytest.mark.parametrize("option", ["scaling", "polynomial"])
def test_refuses_unknown_choices(option):
    with pytest.raises(ValueError, match=f"{option} is one of .*, not 'other'"):
        SOAPMuon([nn.Parameter(torch.ones(2, 2))], **{option: "other"})


@pytest.mark.parametrize(("option", "value"), [("momentum", 1.0), ("curvature_ema", 1.0), ("curvature_ema", -0.1)])
def test_refuses_weights_of_one(option, value):
    with pytest.raises(ValueError, match=option):
        SOAPMuon([nn.Parameter(torch.ones(2, 2))], **{option: value})
