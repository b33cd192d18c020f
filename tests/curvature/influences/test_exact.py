"""Influence against derivatives of the trained parameters, and against the whole Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

import curvature
from solvers import Dense, Tikhonov

RIDGE = 0.5


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def outputs(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    sizes = {name: p.shape for name, p in model.named_parameters()}
    pieces = theta.split([shape.numel() for shape in sizes.values()])
    values = {name: piece.view(shape) for (name, shape), piece in zip(sizes.items(), pieces, strict=True)}
    return functional_call(model, values, (x,))


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """By damped steps that only go down, then Newton's method to rounding."""
    theta = start
    for shift in [*(10.0 ** -(k / 4) for k in range(25)), *([0.0] * 4)]:
        H = hessian(loss)(theta)
        floor = (-torch.linalg.eigvalsh(H)[0]).clamp(min=0) if shift else 0.0
        step = torch.linalg.solve(H + (shift + 1.1 * floor) * torch.eye(len(H), dtype=H.dtype), grad(loss)(theta))
        while shift and loss(theta - step) > loss(theta):
            step = step / 2
        theta = theta - step
    assert grad(loss)(theta).norm() < 1e-9 and torch.linalg.eigvalsh(hessian(loss)(theta))[0] > 0, "no minimum"
    return theta


def problem(hidden: int | None) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Logistic regression, which is convex, or a perceptron with one hidden layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3)] if hidden is None else [nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)]
    x = torch.randn(40, 4, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, (x[:, :3] + 0.7 * torch.randn(40, 3)).argmax(1)


@pytest.mark.parametrize("hidden", [None, 3])
def test_scores_are_derivatives_of_training_again(hidden: int | None) -> None:
    """The weight of an example up and down a little: central differences of what training to the minimum gives."""
    model, x, y = problem(hidden)
    queries = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])

    def trained(weights: Tensor, start: Tensor) -> Tensor:
        def loss(theta: Tensor) -> Tensor:
            terms = F.cross_entropy(outputs(model, theta, x), y, reduction="none")
            return weights @ terms + RIDGE / 2 * theta.square().sum()

        return minimum(loss, start)

    def asked(theta: Tensor) -> Tensor:
        return F.cross_entropy(outputs(model, theta, queries[0]), queries[1], reduction="none")

    ones, epsilon = torch.ones(40, dtype=torch.float64), 1e-3
    theta = trained(ones, flat(model))
    nn.utils.vector_to_parameters(theta, model.parameters())
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    H = Dense(curvature.hessian(model, loss_fn, (x, y)).to_dense())
    found = curvature.influence(model, loss_fn, (x, y), queries, curvature=H, damping=Tikhonov(RIDGE))
    for n in range(0, 40, 8):
        e = torch.zeros_like(ones)
        e[n] = epsilon
        derivative = (asked(trained(ones + e, theta)) - asked(trained(ones - e, theta))) / (2 * epsilon)
        # Central differences leave a term of third order, 1e-6 of the whole.
        assert torch.allclose(found.scores[:, n], -derivative, rtol=1e-5, atol=1e-7)
    own = curvature.self_influence(model, loss_fn, (x, y), curvature=H, damping=Tikhonov(RIDGE))
    gradients = jacrev(lambda t: F.cross_entropy(outputs(model, t, x), y, reduction="none"))(theta)
    inverse = torch.linalg.inv(H.matrix + RIDGE * torch.eye(len(theta), dtype=theta.dtype))
    assert torch.allclose(own, ((gradients @ inverse) * gradients).sum(1), rtol=1e-9)


def test_scores_with_the_whole_gauss_newton_matrix() -> None:
    model, x, y = problem(3)
    queries = x[:5] + 0.1, y[:5]
    theta = flat(model)
    J = jacrev(lambda t: outputs(model, t, x))(theta)
    p = outputs(model, theta, x).softmax(-1)
    G = torch.einsum("ncp,ncd,ndq->pq", J, torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1), J) / 40
    g, asked = (
        jacrev(lambda t, a=a, b=b: F.cross_entropy(outputs(model, t, a), b, reduction="none"))(theta)
        for a, b in ((x, y), queries)
    )
    expected = asked @ torch.linalg.solve(G + 0.01 * torch.eye(len(G), dtype=G.dtype), g.T)
    C = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="dense")
    found = curvature.influence(model, nn.CrossEntropyLoss(), (x, y), queries, curvature=C, damping=0.01)
    assert torch.allclose(found.scores, expected, rtol=1e-9, atol=1e-12)
    assert found.total == 40


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, the mean over the rows."""
    ranks = torch.stack([left, right]).argsort(-1).argsort(-1).double()
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in ranks.unbind(1)]).mean())


def digits_mlp() -> tuple[nn.Sequential, Any, Any]:
    """16-12-12-10 on digits of 4 x 4 pixels, trained by Adam on 400 of them; and 50 others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16).unsqueeze(1)
    x, y = F.avg_pool2d(images, 2).flatten(1), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:400]), y[:400]).backward()
        optimizer.step()
    return model, (x[:400], y[:400]), (x[400:450], y[400:450])


@pytest.mark.parametrize(
    ("times", "at_least"),
    [
        (1.0, {"layer": 0.7, "ekfac": 0.55, "diagonal": 0.25, "identity": 0.2}),
        (10.0, {"layer": 0.93, "ekfac": 0.9, "diagonal": 0.7, "identity": 0.65}),
    ],
)
def test_ekfac_ranks_examples_as_the_whole_matrix_does(times: float, at_least: dict[str, float]) -> None:
    """The closer, the more is damped, and never closer than the blocks that it approximates.

    Bounds a little below what docs/guides/influence.md states.
    """
    model, train, queries = digits_mlp()
    loss_fn = nn.CrossEntropyLoss()
    whole = curvature.ggn(model, loss_fn, train, structure="dense")
    damping = times * float(whole.trace()) / whole.shape[1]
    expected = curvature.influence(model, loss_fn, train, queries, curvature=whole, damping=damping).scores
    found = {}
    for structure in at_least:
        given: dict[str, Any] = {"curvature": Dense(torch.eye(whole.shape[0], dtype=torch.float64)), "damping": 0.0}
        if structure != "identity":
            C = curvature.ggn(model, loss_fn, train, structure=structure)  # type: ignore[call-overload]
            given = {"curvature": C, "damping": damping}
        found[structure] = rank_correlation(
            curvature.influence(model, loss_fn, train, queries, **given).scores, expected
        )
    assert all(found[structure] >= bound for structure, bound in at_least.items()), found
    assert list(found.values()) == sorted(found.values(), reverse=True), found
