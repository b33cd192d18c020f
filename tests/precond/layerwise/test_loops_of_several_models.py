"""Losses of two passes, of several heads, of another model, with gradient penalties: steps against a dense C."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from precond import NaturalGradient, Tikhonov
from tests.curvature.loops import batch

X, Y = batch(6)
OTHER = batch(6, seed=2)[0]
DAMPING = 0.1
CROSS_ENTROPY, SQUARES, LOGITS = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
Run = Callable[[Tensor], Tensor]
with torch.random.fork_rng():
    torch.manual_seed(7)
    CRITIC = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double().requires_grad_(False)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def views(run: Run) -> Tensor:
    """Similarities of two views of every example."""
    return F.normalize(run(X), dim=-1) @ F.normalize(run(OTHER), dim=-1).T


def penalised(run: Run) -> Tensor:
    x = X.clone().requires_grad_()
    z = run(x)
    (slopes,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    return CROSS_ENTROPY(z, Y) + (slopes.norm(dim=1) - 1).square().mean()


def softmax(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) / len(z)


def residuals(z: Tensor) -> Tensor:
    e = z.softmax(-1) - F.one_hot(Y, 3)
    return e.unsqueeze(-1) * e.unsqueeze(-2) / len(z)


def squares(z: Tensor) -> Tensor:
    return 2 / z.numel() * torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)


def logistic(z: Tensor) -> Tensor:
    return (z.sigmoid() * (1 - z.sigmoid())).unsqueeze(-1) / z.numel()


#: Loss module, what is minimised, what the module sees ``(n, c)``, its Hessian for each example, and the Fisher's kind.
LOOPS: dict[
    str, tuple[nn.Module, Callable[[Run], Tensor], Callable[[Run], Tensor], Callable[[Tensor], Tensor], str]
] = {
    "two views": (CROSS_ENTROPY, lambda f: CROSS_ENTROPY(views(f), torch.arange(6)), views, softmax, "exact"),
    "siamese": (
        SQUARES,
        lambda f: SQUARES(f(X) - f(OTHER), X[:, :3]),
        lambda f: f(X) - f(OTHER),
        squares,
        "exact",
    ),
    "actions": (
        SQUARES,
        lambda f: SQUARES(f(X).gather(1, Y[:, None]).squeeze(1), X[:, 0]),
        lambda f: f(X).gather(1, Y[:, None]),
        squares,
        "exact",
    ),
    "generator": (
        LOGITS,
        lambda f: LOGITS(CRITIC(f(X)), torch.ones(6, 1, dtype=X.dtype)),
        lambda f: CRITIC(f(X)),
        logistic,
        "exact",
    ),
    "gradient penalty": (CROSS_ENTROPY, penalised, lambda f: f(X), softmax, "exact"),
    "gradient penalty, empirical": (CROSS_ENTROPY, penalised, lambda f: f(X), residuals, "empirical"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_directions_are_those_of_the_dense_matrix(name: str) -> None:
    loss_fn, loss, seen, hessian, kind = LOOPS[name]
    model = net()
    optimizer = NaturalGradient(
        model, loss_fn, lr=1.0, structure="dense", fisher=kind, damping=Tikhonov(DAMPING), kl_clip=None, momentum=0.0
    )
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    J = jacrev(lambda values: seen(lambda x: functional_call(model, values, (x,))))(parameters)
    for _ in range(2):  # the second time with what was learned of the first
        optimizer.zero_grad()
        loss(model).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        optimizer.precondition()
    rows = torch.cat([J[n].flatten(2) for n in parameters], -1)  # (n, c, P)
    with torch.no_grad():
        C = torch.einsum("ncp,ncd,ndq->pq", rows, hessian(seen(model)), rows)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    expected = torch.linalg.solve(C + DAMPING * torch.eye(len(C), dtype=C.dtype), g)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
