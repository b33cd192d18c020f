"""What is each matrix under every loss of torch: right against its definition, or refused in words?

The references: the Hessian by autograd, the Gauss-Newton matrix from the Hessian of torch's own loss in the outputs,
the Fisher as the mean over all outcomes that the model may give (by enumeration or quadrature) of the outer products of
the gradients of torch's own loss there, the empirical Fisher term by term.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from curvature.losses import NoCurvatureError, NoLikelihoodError, UnknownLossError
from curvature.model.pullback import NoSecondDerivativeError

N, C = 4, 3
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=RANDOM).double()
NUMBERS = torch.randn(N, C, generator=RANDOM).double()
BITS = torch.randint(2, (N, C), generator=RANDOM).double()
LABELS = torch.tensor([0, 2, 1, 1])
WEIGHT = torch.tensor([0.5, 2.0, 1.0]).double()
COUNTS = torch.tensor([0.0, 1, 4])
close = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-10)

#: Outcomes of one term: function from the outputs ``(C,)`` of a term to pairs of a probability and a target.
Outcomes = Callable[[Tensor], list[tuple[Tensor, Tensor]]]


def entries(values: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Outcomes:
    """Outcomes of independent entries: all combinations of those of each."""

    def outcomes(z: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = [(torch.ones(()).double(), torch.zeros(0).double())]
        for entry in z:
            p, y = values(entry)
            found = [(q * pi, torch.cat([t, yi.reshape(1)])) for q, t in found for pi, yi in zip(p, y, strict=True)]
        return found

    return outcomes


def bernoulli(p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([1 - p, p]), torch.tensor([0.0, 1.0]).double()


def normal(mean: Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)  # exact for polynomials of degree 13
    return torch.tensor(weights / math.sqrt(2 * math.pi)), mean + torch.tensor(nodes) * torch.as_tensor(variance) ** 0.5


def poisson(rate: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(25.0).double()
    return (y * rate.log() - rate - (y + 1).lgamma()).exp(), y


def laplace(z: Tensor) -> tuple[Tensor, Tensor]:
    """The slope is one of two numbers, with equal probabilities, wherever on its side the outcome is."""
    return torch.full((2,), 0.5).double(), torch.stack([z - 1, z + 1])


def classes(probabilities: Callable[[Tensor], Tensor]) -> Outcomes:
    return lambda z: [(p, torch.tensor(c)) for c, p in enumerate(probabilities(z))]


@dataclass(frozen=True)
class Case:
    """A loss, on a model whose outputs suit it.

    Attributes:
        module: The loss.
        y: Targets.
        last: End of the model.
        outcomes: Of a term, where the loss is a likelihood.
        ggn: Part of the message where the Gauss-Newton matrix is refused.
        fisher: Part of the message where the Fisher is refused.
        multiplicity: Weight of a term as a number of examples, by its target.
        function: The functional form.
        options: Of both.
    """

    module: type[nn.Module]
    y: Tensor
    last: nn.Module = field(default_factory=nn.Identity)
    outcomes: Outcomes | None = None
    ggn: str | None = None
    fisher: str = "not known as a negative log-likelihood.*curvature.ggn"
    hessian: str | None = None
    multiplicity: Callable[[Tensor], Tensor] = lambda y: torch.ones(())
    function: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    width: int = C

    @property
    def loss(self) -> nn.Module:
        return self.module(**self.options)


def by_class(y: Tensor) -> Tensor:
    return WEIGHT[y]


SOFT = torch.tensor([[0.2, 0.3, 0.5]]).double().expand(N, C)
SIGNS, ENDS = 2 * BITS - 1, nn.LogSoftmax(-1)
CASES: dict[str, Case] = {
    "mse": Case(nn.MSELoss, NUMBERS, outcomes=entries(lambda z: normal(z, 0.5)), function=F.mse_loss),
    "mse, sum": Case(
        nn.MSELoss,
        NUMBERS,
        outcomes=entries(lambda z: normal(z, 0.5)),
        options={"reduction": "sum"},
        function=F.mse_loss,
    ),
    "l1": Case(nn.L1Loss, NUMBERS, outcomes=entries(laplace), ggn="linear in the model's output", function=F.l1_loss),
    "huber": Case(nn.HuberLoss, NUMBERS, function=F.huber_loss, options={"delta": 0.7}),
    "smooth l1": Case(nn.SmoothL1Loss, NUMBERS, function=F.smooth_l1_loss, options={"beta": 0.7}),
    "cross-entropy": Case(
        nn.CrossEntropyLoss, LABELS, outcomes=classes(lambda z: z.softmax(0)), function=F.cross_entropy
    ),
    "cross-entropy, weighted": Case(
        nn.CrossEntropyLoss,
        LABELS,
        outcomes=classes(lambda z: z.softmax(0)),
        function=F.cross_entropy,
        options={"weight": WEIGHT},
        multiplicity=by_class,
    ),
    "nll": Case(
        nn.NLLLoss, LABELS, ENDS, classes(lambda z: z.exp()), "linear in the model's output", function=F.nll_loss
    ),
    "nll, weighted sum": Case(
        nn.NLLLoss,
        LABELS,
        ENDS,
        classes(lambda z: z.exp()),
        "linear in the model's output",
        function=F.nll_loss,
        options={"weight": WEIGHT, "reduction": "sum"},
        multiplicity=by_class,
    ),
    "kl": Case(
        nn.KLDivLoss,
        SOFT,
        ENDS,
        ggn="linear in the model's output",
        fisher="KLDivLoss.*nn.CrossEntropyLoss on logits with class probabilities",
        function=F.kl_div,
        options={"reduction": "batchmean"},
    ),
    "bce": Case(nn.BCELoss, BITS, nn.Sigmoid(), entries(bernoulli), function=F.binary_cross_entropy),
    "bce, sum": Case(
        nn.BCELoss,
        BITS,
        nn.Sigmoid(),
        entries(bernoulli),
        function=F.binary_cross_entropy,
        options={"reduction": "sum"},
    ),
    "bce on logits": Case(
        nn.BCEWithLogitsLoss,
        BITS,
        outcomes=entries(lambda z: bernoulli(z.sigmoid())),
        function=F.binary_cross_entropy_with_logits,
    ),
    "poisson": Case(
        nn.PoissonNLLLoss, BITS, nn.Tanh(), entries(lambda z: poisson(z.exp())), function=F.poisson_nll_loss, width=2
    ),
    "poisson of rates": Case(
        nn.PoissonNLLLoss,
        BITS,
        nn.Sigmoid(),
        entries(lambda z: poisson(z + 0.01)),
        function=F.poisson_nll_loss,
        options={"log_input": False, "eps": 0.01, "full": True},
        width=2,
    ),
    "hinge embedding": Case(nn.HingeEmbeddingLoss, SIGNS, function=F.hinge_embedding_loss),
    "soft margin": Case(nn.SoftMarginLoss, SIGNS, function=F.soft_margin_loss),
    "multi-label soft margin": Case(nn.MultiLabelSoftMarginLoss, BITS, function=F.multilabel_soft_margin_loss),
    "multi margin": Case(
        nn.MultiMarginLoss, LABELS, ggn="only once", hessian="only once", function=F.multi_margin_loss
    ),
    "multi-label margin": Case(
        nn.MultiLabelMarginLoss,
        torch.tensor([[0, 2, -1]]).expand(N, C),
        ggn="only once",
        hessian="only once",
        function=F.multilabel_margin_loss,
    ),
}
SEVERAL = {
    nn.CosineEmbeddingLoss: F.cosine_embedding_loss,
    nn.MarginRankingLoss: F.margin_ranking_loss,
    nn.TripletMarginLoss: F.triplet_margin_loss,
    nn.TripletMarginWithDistanceLoss: F.triplet_margin_with_distance_loss,
    nn.CTCLoss: F.ctc_loss,
}
#: Known by autograd alone, whose terms are the losses of single examples.
UNKNOWN = (
    nn.HingeEmbeddingLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss,
    nn.MultiLabelMarginLoss,
)


def setting(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, case.width), case.last).double()
    y = case.y[:, : case.width] if case.y.dim() > 1 else case.y
    return model, y


def gradient(value: Tensor, params: list[nn.Parameter], graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params)).double()
    found = torch.autograd.grad(value, params, create_graph=graph, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, params, strict=True)]
    )


def divisor(case: Case, y: Tensor) -> Tensor:
    """What a mean loss divides the sum of its terms by."""
    loss = case.loss
    if getattr(loss, "reduction", "mean") == "sum":
        return torch.ones(()).double()
    if y.dim() == 1:
        return torch.stack([case.multiplicity(t) for t in y]).sum().double()
    per_example = case.module in UNKNOWN or case.options.get("reduction") == "batchmean"
    return torch.tensor(float(N if per_example else N * case.width)).double()


def summed(case: Case, z: Tensor, y: Tensor) -> Tensor:
    """Torch's own loss of one term, summed over its outputs; as it is where only autograd knows it."""
    loss = case.loss if case.module in UNKNOWN else case.module(**{**case.options, "reduction": "sum"})
    value: Tensor = loss(z.unsqueeze(0), y.unsqueeze(0))
    return value


def references(case: Case) -> dict[str, Tensor]:
    model, y = setting(case)
    params = list(model.parameters())
    found: dict[str, Tensor] = {}
    if case.hessian is None:
        slope = gradient(case.loss(model(X), y), params, graph=True)
        found["hessian"] = torch.stack([gradient(s, params) for s in slope])
    J = torch.stack([torch.stack([gradient(e, params) for e in row]) for row in model(X)])  # (N, C, P)
    z, total = model(X).detach(), divisor(case, y)
    if case.ggn is None:
        B = torch.autograd.functional.hessian(lambda z: case.loss(z, y), z)
        found["ggn"] = torch.einsum("ncp,ncmd,mdq->pq", J, B, J)
    fisher = torch.zeros(J.shape[-1], J.shape[-1]).double()
    empirical = torch.zeros_like(fisher)
    for j, row, target in zip(J, z, y, strict=True):
        leaf = row.clone().requires_grad_()
        g = torch.autograd.grad(summed(case, leaf, target), leaf)[0] @ j
        empirical += g.outer(g)
        for p, outcome in case.outcomes(row) if case.outcomes is not None else []:
            weight = case.multiplicity(outcome)
            g = torch.autograd.grad(summed(case, leaf, outcome.to(target.dtype)), leaf)[0] @ j / weight
            fisher += case.multiplicity(target) * p * g.outer(g)
    found["empirical"] = empirical / total
    if case.outcomes is not None:
        found["fisher"] = fisher / total
    return found


def losses(case: Case) -> list[Any]:
    return [case.loss, functools.partial(case.function, **case.options)]


@pytest.mark.parametrize("name", CASES)
def test_hessian(name: str) -> None:
    case = CASES[name]
    model, y = setting(case)
    for loss in losses(case):
        if case.hessian is None:
            close(curvature.hessian(model, loss, (X, y)).to_dense(), references(case)["hessian"])
        else:
            with pytest.raises((NoCurvatureError, NoSecondDerivativeError), match=case.hessian):
                curvature.hessian(model, loss, (X, y)).to_dense()


@pytest.mark.parametrize("name", CASES)
def test_ggn(name: str) -> None:
    case = CASES[name]
    model, y = setting(case)
    if case.ggn is None:
        close(curvature.ggn(model, case.loss, (X, y)).to_dense(), references(case)["ggn"])
    else:
        with pytest.raises(NoCurvatureError, match=case.ggn):
            curvature.ggn(model, case.loss, (X, y)).to_dense()


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher(name: str) -> None:
    case = CASES[name]
    model, y = setting(case)
    close(curvature.fisher(model, case.loss, (X, y), kind="empirical").to_dense(), references(case)["empirical"])


@pytest.mark.parametrize("name", CASES)
def test_fisher(name: str) -> None:
    case = CASES[name]
    model, y = setting(case)
    if case.outcomes is None:
        for kind in ("exact", "mc"):
            with pytest.raises(NoLikelihoodError, match=case.fisher):
                curvature.fisher(model, case.loss, (X, y), kind=kind).to_dense()
            with pytest.raises((NoLikelihoodError, UnknownLossError)):  # unknown where it takes more than a target
                curvature.fisher(model, case.loss, (X, y), kind=kind, structure="kfac")
        return
    expected = references(case)["fisher"]
    for loss in losses(case):
        close(curvature.fisher(model, loss, (X, y), kind="exact").to_dense(), expected)
    for structure in ("dense", "low_rank"):
        close(curvature.fisher(model, case.loss, (X, y), kind="exact", structure=structure).to_dense(), expected)
    diagonal = curvature.fisher(model, case.loss, (X, y), kind="exact", structure="diagonal").diagonal()
    close(diagonal, expected.diagonal())
    blocks = curvature.fisher(model, case.loss, [(X[:1], y[:1]), (X[1:], y[1:])], kind="exact", structure="layer")
    close(blocks.to_dense()[:12, :12], expected[:12, :12])
    drawn = curvature.fisher(model, case.loss, (X, y), kind="mc", samples=400, structure="dense").to_dense()
    off = float((drawn - expected).norm() / expected.norm())
    assert off < 0.15, off  # 400 draws of each term: about 1 / 20, more for rare outcomes


@pytest.mark.parametrize("loss", SEVERAL, ids=lambda loss: loss.__name__)
def test_losses_of_several_tensors_say_how_they_are_passed(loss: type[nn.Module]) -> None:
    model = nn.Linear(3, 3).double()
    for given in (loss(), SEVERAL[loss]):
        for function in (curvature.hessian, curvature.ggn, curvature.fisher):
            for structure in ("full", "diagonal"):
                with pytest.raises(
                    UnknownLossError, match=r"takes .*, where an output .* lambda output, target: loss_fn"
                ):
                    function(model, given, (X, NUMBERS), structure=structure)


class Twins(nn.Module):
    """A model of three inputs that returns the outputs of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(part).tanh() for part in x.unbind(1))


def test_a_loss_of_several_tensors_as_a_function_of_all_that_the_model_returns() -> None:
    model, x = Twins(), torch.randn(N, 3, 3, generator=RANDOM).double()
    loss = lambda output, target: F.triplet_margin_loss(*output)  # noqa: E731
    params = list(model.parameters())
    slope = gradient(loss(model(x), None), params, graph=True)
    expected = torch.stack([gradient(s, params) for s in slope])
    close(curvature.hessian(model, loss, (x, LABELS), output=lambda result: result).to_dense(), expected)


def test_every_loss_of_torch_is_here() -> None:
    here = {case.module for case in CASES.values()} | set(SEVERAL) | {nn.GaussianNLLLoss}
    names = set(torch.nn.modules.loss.__all__) - {"NLLLoss2d", "LinearCrossEntropyLoss"}
    assert {kind.__name__ for kind in here} == names
