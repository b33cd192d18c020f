"""Which damping does a method take, and does its strength reach the step?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.structures.singd import SINGDFisher
from precond import EKFAC, KBFGS, SENG, SINGD, PreconditionedOptimizer, SMWNaturalGradient
from precond.step.adapt import LevenbergMarquardt
from solvers import Cholesky, FactoredTikhonov, RelativeTikhonov, Tikhonov


def run(cls: Any, damping: Any, steps: int = 4, **options: Any) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(32, 4).double(), torch.randint(3, (32,))
    optimizer = cls(model, loss_fn, lr=0.05, damping=damping, kl_clip=None, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("cls", [SINGD, SENG, KBFGS, SMWNaturalGradient])
def test_a_method_that_needs_an_absolute_damping_refuses_a_fraction_at_construction(cls: Any) -> None:
    message = rf"{cls.__name__} needs a damping in units of C, such as Tikhonov\(1e-3\), not RelativeTikhonov"
    with pytest.raises(ValueError, match=message):
        cls(nn.Linear(2, 2), nn.MSELoss(), lr=0.1, damping=RelativeTikhonov(0.1))


def test_a_learned_inverse_refuses_a_fraction_wherever_it_comes_from() -> None:
    def optimizer(model: nn.Module, loss_fn: nn.Module, **options: Any) -> PreconditionedOptimizer:
        return PreconditionedOptimizer(model, loss_fn, curvature=SINGDFisher(), solver=Cholesky(), **options)

    with pytest.raises(ValueError, match=r"block 0\.weight\+0\.bias learns its inverse .* not RelativeTikhonov"):
        run(optimizer, RelativeTikhonov(0.1))


@pytest.mark.parametrize("cls", [SINGD, SMWNaturalGradient])
def test_an_object_damps_as_its_number_does(cls: Any) -> None:
    assert torch.equal(run(cls, Tikhonov(0.3)), run(cls, 0.3))
    assert not torch.equal(run(cls, 0.3), run(cls, 3.0))


def test_spring_takes_any_absolute_damping() -> None:
    assert torch.equal(
        run(SMWNaturalGradient, FactoredTikhonov(0.3), spring=0.9), run(SMWNaturalGradient, 0.3, spring=0.9)
    )


def test_fractions_damp_where_c_is_kept() -> None:
    assert float((run(EKFAC, RelativeTikhonov(0.1)) - run(EKFAC, RelativeTikhonov(10.0))).norm()) > 1e-3


def test_the_groups_hold_the_strength_whatever_the_form_and_a_rule_adapts_it() -> None:
    model = nn.Linear(2, 2).double()
    optimizer = EKFAC(model, nn.MSELoss(), lr=0.0, damping=RelativeTikhonov(0.2), damping_rule=LevenbergMarquardt())
    assert [group["damping"] for group in optimizer.param_groups] == [0.2]
    assert optimizer.mean_eigenvalue() == 1.0  # in the units of a fraction
