"""Is the Fisher of a model that of its own distribution, whatever form its likelihood is written in?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.losses import NoCurvatureError, NoLikelihoodError, NonFiniteCurvatureError, SumOfLosses
from precond import EKFAC, KFAC
from tests.curvature.loops import assert_same, fisher, statistics

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, generator=RANDOM).double()
BITS = torch.randint(2, (6, 2), generator=RANDOM).double()
LABELS = torch.randint(3, (6,), generator=RANDOM)
STRUCTURES = ("dense", "layer", "diagonal", "kfac", "ekfac")
close = torch.testing.assert_close


def network(out: int, last: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, out), *([] if last is None else [last])]
    return nn.Sequential(*layers).double()


PAIRS: dict[str, Any] = {
    "sigmoid": (2, nn.Sigmoid(), nn.BCELoss(), nn.BCEWithLogitsLoss(), BITS),
    "sigmoid, sum": (2, nn.Sigmoid(), nn.BCELoss(reduction="sum"), nn.BCEWithLogitsLoss(reduction="sum"), BITS),
    "sigmoid, weighted": (
        2,
        nn.Sigmoid(),
        nn.BCELoss(weight=torch.tensor([0.5, 3.0])),
        nn.BCEWithLogitsLoss(weight=torch.tensor([0.5, 3.0])),
        BITS,
    ),
    "softmax": (3, nn.LogSoftmax(-1), nn.NLLLoss(), nn.CrossEntropyLoss(), LABELS),
    "softmax, weighted": (
        3,
        nn.LogSoftmax(-1),
        nn.NLLLoss(weight=torch.tensor([0.5, 3.0, 1.0]).double(), ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 3.0, 1.0]).double(), ignore_index=2),
        LABELS,
    ),
}


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


PAIRS["rates"] = (2, Exp(), nn.PoissonNLLLoss(log_input=False, eps=0.0), nn.PoissonNLLLoss(), BITS)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", PAIRS)
def test_the_link_in_the_model_or_in_the_loss(name: str, structure: Any) -> None:
    out, last, inside, natural, y = PAIRS[name]
    a, b = (
        curvature.fisher(network(out, link), loss, (X, y), kind="exact", structure=structure).to_dense()
        for link, loss in ((last, inside), (None, natural))
    )
    close(a, b)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid, weighted", "softmax", "rates"])
@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_labels_do_not_enter(name: str, kind: Any) -> None:
    out, last, inside, _, y = PAIRS[name]
    other = (y + 1) % 3 if y.dim() == 1 else 1 - y
    for structure in ("full", "diagonal"):
        a, b = (
            curvature.fisher(network(out, last), inside, (X, t), kind=kind, structure=structure).to_dense()
            for t in (y, other)
        )
        assert torch.equal(a, b)


# Mean and variance from one model ------------------------------------------------------------------------------------


class Normal(nn.Module):
    """A mean and a variance for each of two numbers, or one variance for both."""

    def __init__(self, variances: int = 2) -> None:
        super().__init__()
        self.body = network(2 + variances)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        return z[:, :2], nn.functional.softplus(z[:, 2:]) + 0.1


def normal_fisher(model: Normal, x: Tensor) -> Tensor:
    """The mean over targets, by Gauss-Hermite quadrature, of the outer products of gradients of torch's own loss."""
    params = list(model.parameters())
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    total: Any = 0.0
    for row in x:
        for a, wa in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
            for b, wb in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
                mean, var = model(row.unsqueeze(0))
                y = (mean + torch.tensor([a, b]) * var.expand_as(mean).sqrt()).detach()
                loss = nn.GaussianNLLLoss(reduction="sum")(mean, y, var)
                g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, params)])
                total = total + wa * wb * g.outer(g)
    return torch.as_tensor(total) / (2 * len(x))


@pytest.mark.parametrize("variances", [1, 2])
def test_normal_likelihoods_whose_variance_is_predicted(variances: int) -> None:
    model, loss, y = Normal(variances), nn.GaussianNLLLoss(), torch.randn(6, 2).double()
    expected = normal_fisher(model, X)
    for target in (y, y + 3):
        close(curvature.fisher(model, loss, (X, target), kind="exact").to_dense(), expected)
    close(curvature.fisher(model, loss, (X, y), kind="exact", mode="forward").to_dense(), expected)
    split = [(X[:2], y[:2]), (X[2:], y[2:])]
    close(curvature.fisher(model, loss, split, kind="exact", structure="dense").to_dense(), expected)
    diagonal = curvature.fisher(model, nn.GaussianNLLLoss(full=True), split, kind="exact", structure="diagonal")
    close(diagonal.diagonal(), expected.diagonal())
    drawn = curvature.fisher(model, loss, (X, y), kind="mc", samples=4000, structure="dense").to_dense()
    assert float((drawn - expected).norm() / expected.norm()) < 0.1
    together = SumOfLosses({"a": (2.0, loss), "b": (1.0, loss)})
    targets = {"a": y, "b": y}
    both = curvature.fisher(model, together, (X, targets), kind="exact", output=lambda r: {"a": r, "b": r})
    close(both.to_dense(), 3 * expected)


def test_their_hessian_and_their_gauss_newton_matrix() -> None:
    model, loss, y = Normal(), nn.GaussianNLLLoss(), torch.randn(6, 2).double()
    params = list(model.parameters())
    value = loss(*(lambda m, v: (m, y, v))(*model(X)))
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params, create_graph=True)])
    rows = [torch.autograd.grad(s, params, retain_graph=True) for s in slope]
    H = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    close(curvature.hessian(model, loss, (X, y)).to_dense(), H)
    z = torch.stack(model(X), -1)
    J = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(e, params, retain_graph=True)]) for e in z.reshape(-1)]
    )
    B = torch.autograd.functional.hessian(lambda z: loss(z[..., 0], y, z[..., 1]), z.detach()).reshape(24, 24)
    with pytest.warns(UserWarning, match="GaussianNLLLoss.* is not convex in the model's outputs"):
        G = curvature.ggn(model, loss, (X, y)).to_dense()
    close(G, J.T @ B @ J)
    with pytest.raises(NoCurvatureError, match=r"not convex in mean and variance together.*curvature.fisher"):
        curvature.ggn(model, loss, (X, y), structure="kfac")


# Training ------------------------------------------------------------------------------------------------------------


def kronecker(optimizer_of: Any, model: nn.Module, loss_of: Any) -> list[Tensor]:
    """The directions of one step, whose curvature is exact."""
    optimizer = optimizer_of(model)
    loss_of(model).backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_with_the_link_in_the_model_or_in_the_loss(name: str, method: Any) -> None:
    out, last, inside, natural, y = PAIRS[name]
    # A curvature that is built from other labels would give another step.
    a, b = (
        kronecker(
            lambda m, loss=loss: method(m, loss, lr=0.1, fisher="exact", kl_clip=None),
            network(out, link),
            lambda m, loss=loss: loss(m(X), y),
        )
        for link, loss in ((last, inside), (None, natural))
    )
    close(a, b)


def test_a_step_of_a_normal_likelihood_is_that_of_the_data_set() -> None:
    y, loss_fn = torch.randn(6, 2).double(), nn.GaussianNLLLoss()
    model = Normal()
    optimizer = KFAC(model, loss_fn, lr=0.1, fisher="exact", curvature_ema=0.0)
    mean, var = model(X)
    loss_fn(mean, y, var).backward()
    optimizer.step()
    assert_same(statistics(optimizer), fisher(Normal(), loss_fn, (X, y), kind="exact"))


def test_a_loss_that_is_no_likelihood_trains_by_its_gauss_newton_matrix() -> None:
    model, loss_fn, y = network(2), nn.HuberLoss(), torch.randn(6, 2).double()
    optimizer = KFAC(model, loss_fn, lr=0.1, fisher="exact", curvature_ema=0.0)
    loss_fn(model(X), y).backward()
    optimizer.step()
    G = curvature.ggn(network(2), loss_fn, (X, y), structure="kfac")
    for own, block in zip(statistics(optimizer).values(), G.blocks, strict=True):
        close(own, block.to_dense())
    with pytest.raises(NoLikelihoodError, match=r"curvature\.ggn"):
        curvature.fisher(network(2), loss_fn, (X, y), structure="kfac")


def test_log_probabilities_that_are_none() -> None:
    with pytest.raises(NoLikelihoodError, match=r"no log-probabilities.*End the model with nn.LogSoftmax"):
        curvature.fisher(network(3), nn.NLLLoss(), (X, LABELS), kind="exact", structure="diagonal")


# Where there is no second derivative ---------------------------------------------------------------------------------


def saturated(right: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model one of whose probabilities is exactly 1, and right or wrong."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()).double(), torch.randn(6, 3).double()
    x[0] = 1e3 * model[0].weight.detach()[0].sign()
    y = torch.tensor([1.0 if right else 0.0, 0, 1, 0, 1, 1]).double().unsqueeze(-1)
    assert model(x)[0].item() == 1.0
    return model, (x, y)


@pytest.mark.parametrize("structure", ["full", "dense", "diagonal", "kfac", "layer"])
def test_a_probability_that_is_exactly_wrong(structure: Any) -> None:
    model, data = saturated(right=False)
    with pytest.raises(NonFiniteCurvatureError, match=r"BCELoss.*first at example 0.*nn.BCEWithLogitsLoss"):
        curvature.ggn(model, nn.BCELoss(), data, structure=structure).to_dense()
    if structure in ("full", "dense", "diagonal", "layer"):
        with pytest.raises(NonFiniteCurvatureError, match=r"BCELoss.*first at example 0.*nn.BCEWithLogitsLoss"):
            curvature.hessian(model, nn.BCELoss(), data, structure=structure).to_dense()
    F = curvature.fisher(model, nn.BCELoss(), data, kind="exact", structure=structure).to_dense()
    logits = curvature.fisher(model[0], nn.BCEWithLogitsLoss(), data, kind="exact", structure=structure).to_dense()
    close(F, logits)


def test_a_probability_that_is_exactly_right_is_finite() -> None:
    model, (x, y) = saturated(right=True)
    logits = curvature.hessian(model[0], nn.BCEWithLogitsLoss(), (x, y)).to_dense()
    close(curvature.hessian(model, nn.BCELoss(), (x, y)).to_dense(), logits)
    assert curvature.ggn(model, nn.BCELoss(), (x, y), structure="diagonal").diagonal().isfinite().all()
    for right in (True, False):
        model, (x, y) = saturated(right)
        nn.BCELoss()(model(x), y).backward()
        problem = curvature.report(model, nn.BCELoss(), (x, y), budget=1, progress=False)
        assert problem is not None


class Length(nn.Module):
    """The norm of a vector, which is 0 for one example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 3, bias=False).double(), nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.linalg.vector_norm(self.inner(x), dim=-1, keepdim=True))


class Root(Length):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.inner(x).square().sum(-1, keepdim=True)).sqrt())


@pytest.mark.parametrize("kind", [Length, Root])
def test_a_norm_at_zero_is_named(kind: Any) -> None:
    model, x = kind(), torch.randn(4, 3).double()
    x[1] = 0
    data = (x, torch.tensor([0, 1, 1, 0]))
    words = r"is not finite.*though the loss is.*\(a\) a square root, a norm.*add a small constant"
    for matrix in (
        lambda: curvature.hessian(model, nn.CrossEntropyLoss(), data) @ torch.ones(13).double(),
        lambda: curvature.hessian(model, nn.CrossEntropyLoss(), data).to_dense(),
        lambda: curvature.hessian(model, nn.CrossEntropyLoss(), data, structure="diagonal"),
        lambda: curvature.hessian(model, nn.CrossEntropyLoss(), data, structure="layer"),
    ):
        with pytest.raises(NonFiniteCurvatureError, match=words):
            matrix()
