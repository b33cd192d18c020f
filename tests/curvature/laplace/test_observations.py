"""Are predictions those of the likelihood: probabilities, rates, observations with their noise, on any axes?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

import numpy as np

from curvature.laplace import LinearizedLaplace, PosteriorSampler, PosteriorSamples, Predictive
from curvature.losses import AutogradLoss
from solvers import CG
from tests.curvature.problems import F64, classes, normal


def drawn(model: nn.Module, likelihood: Any, x: Tensor, y: Any, samples: int = 64, **options: Any) -> PosteriorSamples:
    posterior = LinearizedLaplace(model.double(), likelihood, (x, y), prior_precision=2.0, **options)
    return PosteriorSampler(posterior, samples, solver=CG(rtol=1e-9, max_steps=1000))()


def linear(outputs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, outputs).double()


def mirrored(predictive: Predictive, function: Any) -> Tensor:
    """The mean of a function over the draws and their mirror images, draw by draw."""
    total: Any = 0.0
    for deviation in predictive.deviations:
        total = total + function(predictive.mean + deviation) + function(predictive.mean - deviation)
    return total / (2 * len(predictive.deviations))


def gauss_hermite(function: Any, mean: Tensor, variance: Tensor) -> Tensor:
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(60))
    values = function(mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * nodes)
    return (values * weights).sum(-1) / weights.sum()


#: Likelihood, targets, outputs, the mean of an observation given the outputs, and its variance.
ELEMENTWISE = {
    "bernoulli": (nn.BCEWithLogitsLoss(), lambda n, c: (normal(n, c) > 0).double(), torch.sigmoid, None),
    "bernoulli_weighted": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0, dtype=F64)),
        lambda n, c: (normal(n, c) > 0).double(),
        torch.sigmoid,
        None,
    ),
    "poisson": (nn.PoissonNLLLoss(), lambda n, c: torch.poisson(torch.ones(n, c, dtype=F64)), torch.exp, torch.exp),
    "normal": (nn.MSELoss(), lambda n, c: normal(n, c), lambda f: f, lambda f: torch.full_like(f, 0.49)),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_likelihoods_by_quadrature(name: str, outputs: int) -> None:
    """Exactly the mean over the draws; and within its errors the integral over the dense posterior."""
    likelihood, targets, link, spread = ELEMENTWISE[name]
    x, y = normal(20, 3), targets(20, outputs)
    model = linear(outputs)
    options = {"sigma_noise": 0.7} if name == "normal" else {}
    samples = drawn(model, likelihood, x, y, 400, **options)
    predictive = samples.predict(x[:4])
    found = predictive.observation_mean()
    torch.testing.assert_close(found.value, mirrored(predictive, link), rtol=1e-12, atol=1e-12)

    posterior = LinearizedLaplace(model, likelihood, (x, y), prior_precision=2.0, **options)
    covariance = torch.linalg.inv(posterior.precision.to_dense())
    J = torch.autograd.functional.jacobian(
        lambda w, b: nn.functional.linear(x[:4], w, b).flatten(), (model.weight, model.bias)
    )
    rows = torch.cat([J[0].flatten(1), J[1].flatten(1)], dim=1)
    variance = (rows @ covariance * rows).sum(1).view(4, outputs)
    exact = gauss_hermite(link, model(x[:4]).detach(), variance)
    assert ((found.value - exact).abs() <= 5 * found.stderr + 1e-9).all()

    spread = spread or (lambda f: f.sigmoid() * (1 - f.sigmoid()))
    total = gauss_hermite(lambda f: spread(f) + link(f) ** 2, model(x[:4]).detach(), variance) - exact**2
    got = predictive.observation_variance()
    assert ((got.value - total).abs() <= 5 * got.stderr + 2 * found.stderr**2 + 1e-9).all()
    if name.startswith("bernoulli"):
        assert torch.equal(predictive.probabilities().value, found.value)
        assert (found.value - link(model(x[:4])).detach()).abs().max() < 0.2  # not the 1 of a softmax over one logit
    else:
        with pytest.raises(ValueError, match="no class probabilities"):
            predictive.probabilities()


#: Class axis -> (model, inputs, class_dim) with outputs of three axes or four.
SHAPES: dict[str, Any] = {
    "rows": lambda: (nn.Linear(3, 3), normal(6, 3), (6,), None, 1),
    "tokens": lambda: (nn.Linear(3, 3), normal(4, 5, 3), (4, 5), None, 2),
    "tokens as many as classes": lambda: (nn.Linear(3, 3), normal(4, 3, 3), (4, 3), -1, 2),
    "images": lambda: (nn.Conv2d(2, 3, 1), normal(3, 2, 4, 5), (3, 4, 5), None, 1),
    "square images as large as classes": lambda: (nn.Conv2d(2, 3, 1), normal(3, 2, 3, 3), (3, 3, 3), 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_class_probabilities_lie_where_the_classes_do(shape: str) -> None:
    module, x, labels, class_dim, axis = SHAPES[shape]()
    y = classes(*labels, of=3)
    predictive = drawn(module, "classification", x, y, class_dim=class_dim).predict(x)
    found = predictive.probabilities()
    torch.testing.assert_close(found.value, mirrored(predictive, lambda f: f.softmax(axis)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.value.sum(axis), torch.ones(labels, dtype=F64))
    from_end = axis - found.value.dim()
    assert torch.equal(predictive.probabilities(from_end).value, found.value)
    for dim in {-1, -2} - {from_end}:
        with pytest.raises(ValueError, match="is not the class axis of the posterior"):
            predictive.probabilities(dim)
    p = found.value
    torch.testing.assert_close(predictive.observation_variance().value, p * (1 - p), rtol=1e-9, atol=1e-12)


def test_last_layers_and_other_hyperparameters_keep_the_link() -> None:
    x, y = normal(12, 3), (normal(12, 2) > 0).double()
    model = nn.Sequential(linear(4), nn.Tanh(), nn.Linear(4, 2).double())
    posterior = LinearizedLaplace(model, nn.BCEWithLogitsLoss(), (x, y), params=["2.*"])
    predictive = PosteriorSampler(posterior, 32)(prior_precision=3.0).predict(x)
    assert torch.equal(predictive.probabilities().value, predictive.average(torch.sigmoid).value)
    normal_one = LinearizedLaplace(linear(1), "regression", (x, normal(12, 1)), sigma_noise=0.5)
    noises = [PosteriorSampler(normal_one, 32)(sigma_noise=s).predict(x) for s in (0.5, 2.0)]
    for predictive, sigma in zip(noises, (0.5, 2.0), strict=True):
        expected = predictive.variance().value + sigma**2
        torch.testing.assert_close(predictive.observation_variance().value, expected)


def test_links_come_back_from_a_state(tmp_path: Any) -> None:
    x, y = normal(12, 3), (normal(12, 1) > 0).double()
    model = linear(1)
    samples = drawn(model, nn.BCEWithLogitsLoss(), x, y)
    torch.save(samples.state_dict(), tmp_path / "samples.pt")
    state = torch.load(tmp_path / "samples.pt", weights_only=True)
    loaded = PosteriorSamples.from_state_dict(copy.deepcopy(model), state).predict(x)
    assert torch.equal(loaded.probabilities().value, samples.predict(x).probabilities().value)
    del state["observation"]  # as before it was kept
    older = PosteriorSamples.from_state_dict(model, state).predict(x)
    with pytest.raises(ValueError, match=r"did not keep the likelihood.*average\(function\)"):
        older.probabilities()


def test_likelihoods_without_a_link_name_the_way() -> None:
    x, y = normal(12, 3), (normal(12, 1) > 0).double()
    sigmoid, rates = (nn.Sequential(linear(1), last) for last in (nn.Sigmoid(), nn.Softplus()))
    cases: list[tuple[nn.Module, Any, Any, str]] = [
        (sigmoid, nn.BCELoss(), y, "take nn.BCEWithLogitsLoss"),
        (rates, nn.PoissonNLLLoss(log_input=False), y + 1, r"take nn.PoissonNLLLoss\(\)"),
        (linear(1), nn.HuberLoss(), y, r"no link is known for Huber.*average\(function\)"),
        (linear(1), AutogradLoss(lambda z, t: (z - t).square().sum(), reduction="sum"), y, r"average\(function\)"),
    ]
    for model, likelihood, target, words in cases:
        predictive = drawn(model, likelihood, x, target, 4).predict(x)
        for ask in (predictive.probabilities, predictive.observation_mean, predictive.observation_variance):
            with pytest.raises(ValueError, match=words):
                ask()
        assert predictive.average(lambda f: f).value.shape == (12, 1)
    bernoulli = drawn(linear(1), nn.BCEWithLogitsLoss(), x, y, 4).predict(x)
    with pytest.raises(ValueError, match="leave it out"):
        bernoulli.probabilities(-1)


ONE_CLASS: dict[str, Any] = {
    "labels": (normal(8, 1), torch.zeros(8, dtype=torch.long)),
    "probabilities": (normal(8, 1), torch.ones(8, 1, dtype=F64)),
    "image": (normal(8, 1, 2, 3), torch.zeros(8, 2, 3, dtype=torch.long)),
    "tokens": (normal(8, 5, 1), torch.zeros(8, 5, dtype=torch.long)),
}


@pytest.mark.parametrize("kind", ONE_CLASS)
def test_a_choice_among_one_class_is_refused(kind: str) -> None:
    z, y = ONE_CLASS[kind]
    scale = nn.Linear(1, 1).double()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale.weight.view(()) * x

    for likelihood in ("classification", nn.CrossEntropyLoss(label_smoothing=0.1)):
        with pytest.raises(ValueError, match="which has one: the probability of a single class is 1"):
            PosteriorSampler(LinearizedLaplace(Scaled(), likelihood, (z, y)), 4)
        with pytest.raises(ValueError, match="which has one"):
            LinearizedLaplace(Scaled(), likelihood, (z, y)).log_likelihood  # noqa: B018


def test_several_labels_at_once_are_no_single_class() -> None:
    x, y = normal(8, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]] * 4, dtype=F64)
    posterior = LinearizedLaplace(linear(3), "classification", (x, y))
    with pytest.raises(ValueError, match=r"add up to between 0 and 2.*nn.BCEWithLogitsLoss"):
        PosteriorSampler(posterior, 4)
    one = LinearizedLaplace(linear(3), "classification", (x, torch.full((8, 3), 1 / 3, dtype=F64)))
    assert PosteriorSampler(one, 4)().predict(x).probabilities().value.shape == (8, 3)
