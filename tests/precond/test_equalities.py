"""Methods that are one and the same where theory says so, over some steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from precond import GaussNewton, KroneckerFisher, NaturalGradient, PreconditionedOptimizer, SMWNaturalGradient
from solvers import Eigh

LR, DAMPING = 0.3, 0.05


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 4, generator=generator, dtype=torch.float64),
            torch.randn(6, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(8)
    ]


def network(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return model


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss_fn = nn.MSELoss()
    for x, y in data():
        if isinstance(optimizer, GaussNewton):
            optimizer.step(lambda x=x, y=y: (model(x) - y) * (2 / y.numel()) ** 0.5)
            continue
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_natural_gradient_its_gram_form_and_gauss_newton_are_one() -> None:
    """For squared errors the exact Fisher of a batch is the Gauss-Newton matrix of its residuals."""
    options: dict[str, Any] = {"lr": LR, "structure": "dense", "damping": DAMPING, "fisher": "exact", "kl_clip": None}
    results = []
    for make in (
        lambda model: NaturalGradient(model, nn.MSELoss(), curvature_ema=0.0, **options),
        lambda model: SMWNaturalGradient(model, nn.MSELoss(), **options),
        lambda model: GaussNewton(model, lr=LR, damping=DAMPING, solver="cholesky", damping_rule=None, scaled=False),
        lambda model: GaussNewton(model, lr=LR, damping=DAMPING, solver="woodbury", damping_rule=None, scaled=False),
    ):
        model = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        results.append(trained(model, make(model)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-10)


def test_kfac_of_a_deep_linear_network_is_exact() -> None:
    """There every layer's block is a Kronecker product, so K-FAC is the natural gradient by layers.

    Of one batch at a time: an average of Kronecker products is none.
    """
    options: dict[str, Any] = {"lr": LR, "damping": DAMPING, "curvature_ema": 0.0, "kl_clip": None}
    results = []
    for make in (
        lambda model: NaturalGradient(model, nn.MSELoss(), structure="layer", fisher="exact", **options),
        lambda model: PreconditionedOptimizer(
            model, nn.MSELoss(), curvature=KroneckerFisher("exact"), solver=Eigh(), **options
        ),
    ):
        model = network(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        results.append(trained(model, make(model)))
    assert (results[0] - before).norm() > 0.1
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
