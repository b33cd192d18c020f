"""Losses by function count with their weight, and what is no loss of the given kind counts in no curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond import Loop, NaturalGradient

Function = Callable[[Tensor], Tensor]
with torch.random.fork_rng():
    torch.manual_seed(3)
    X, U = torch.randn(6, 4).double(), torch.randn(5, 4).double()
    SOFT, FEW, Y = torch.randn(6, 3).double().softmax(1), torch.randn(5, 3).double().softmax(1), torch.randint(3, (6,))
COUNTS, SHARES = (3 * SOFT).round(), 0.8 * (SOFT > 0.3).double() + 0.1
CE, BCE, POISSON, HUBER = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss(), nn.HuberLoss()


def curvature_of(loss_fn: nn.Module, minimised: Callable[[nn.Module], list[Tensor]], **loop: Any) -> Tensor:
    """Of a linear layer, after a step; each part has a backward pass of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double()
    options = {"lr": 0.0, "fisher": "exact", "structure": "layer", "curvature_ema": 0.0, "kl_clip": None}
    optimizer = NaturalGradient(model, loss_fn, **options, loop=Loop(**loop))
    for part in minimised(model):
        part.backward(retain_graph=True)
    optimizer.step()
    return optimizer.preconditioners["weight+bias"].estimator.operator().to_dense()


def dense(*losses: Function) -> Tensor:
    """The Gauss-Newton matrix of losses on X."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(4, 3).double()
    inputs = torch.cat([X, torch.ones(6, 1).double()], 1)
    J = torch.einsum("ni,co->ncoi", inputs, torch.eye(3).double()).reshape(18, 15)
    z = layer(X).detach()
    hessians = [torch.autograd.functional.hessian(lambda v, f=f: f(v.view(6, 3)), z.flatten()) for f in losses]
    return J.T @ sum(hessians) @ J


LABELS = {
    "function": (CE, lambda z: F.cross_entropy(z, SOFT)),
    "smoothed": (CE, lambda z: F.cross_entropy(z, Y, label_smoothing=0.1)),
    "by hand": (CE, lambda z: -(SOFT * z.log_softmax(1)).sum(1).mean()),
    "hard": (CE, lambda z: F.cross_entropy(z, Y)),
    "binary": (BCE, lambda z: F.binary_cross_entropy_with_logits(z, SHARES)),
    "counts": (POISSON, lambda z: F.poisson_nll_loss(z, COUNTS)),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("weight", [0.1, 7.0, -0.5])
def test_one_loss_by_function_counts_with_its_weight(name: str, weight: float) -> None:
    loss_fn, f = LABELS[name]
    expected = dense(lambda z: abs(weight) * f(z))  # by its size, as that of the module
    for w in (
        lambda z: weight * f(z),
        lambda z: f(z).mul(2 * weight) / 2,
        lambda z: f(z) * torch.tensor(weight, dtype=torch.float64),
    ):
        got = curvature_of(loss_fn, lambda model, w=w: [w(model(X))])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in LABELS if name != "hard"])
@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_micro_batches_by_function_are_one_batch(name: str, capture: str) -> None:
    loss_fn, f = LABELS[name]
    got = curvature_of(loss_fn, lambda model: [f(model(X)) / 4, f(model(X)) * 0.75], capture=capture)
    torch.testing.assert_close(got, dense(f), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_two_backward_passes_through_one_output_by_function(capture: str) -> None:
    def twice(model: nn.Module) -> list[Tensor]:
        z = model(X)
        return [0.2 * F.cross_entropy(z, SOFT), 0.3 * F.cross_entropy(z, SOFT)]

    if capture == "shadow":  # what arrived is one gradient, of which no value is known
        with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
            curvature_of(CE, twice, capture=capture)
    else:
        expected = dense(lambda z: 0.5 * F.cross_entropy(z, SOFT))
        torch.testing.assert_close(curvature_of(CE, twice), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "f",
    [
        lambda z: 64 * F.kl_div((z / 8).log_softmax(1), SOFT, reduction="batchmean"),
        lambda z: 0.1 * F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean"),
        lambda z: (F.cross_entropy(z, SOFT, reduction="none") * torch.arange(6)).mean(),
        lambda z: -0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    ],
    ids=["temperature", "a constant besides", "weights of examples", "entropy"],
)
def test_a_multiple_whose_size_nothing_tells_is_refused(f: Function) -> None:
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(CE, lambda model: [f(model(X))])


PENALTIES: dict[str, Function] = {
    "teacher": lambda z: F.kl_div(z.log_softmax(1), FEW, reduction="batchmean"),
    "entropy": lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    "probabilities": lambda z: F.mse_loss(z.softmax(1), FEW),
    "uniform": lambda z: -z.log_softmax(1).mean(),
    "logits": lambda z: F.mse_loss(z, FEW),
    "energy": lambda z: z.logsumexp(1).mean(),
}
LOSSES: dict[str, tuple[nn.Module, Function, Function]] = {
    "module": (CE, lambda z: CE(z, Y), lambda z: F.cross_entropy(z, Y)),
    "function": (CE, lambda z: F.cross_entropy(z, Y), lambda z: F.cross_entropy(z, Y)),
    "binary": (BCE, lambda z: BCE(z, SHARES), lambda z: F.binary_cross_entropy_with_logits(z, SHARES)),
    "counts": (POISSON, lambda z: POISSON(z, COUNTS), lambda z: F.poisson_nll_loss(z, COUNTS)),
    "huber": (HUBER, lambda z: HUBER(z, SOFT), lambda z: F.huber_loss(z, SOFT)),
}


@pytest.mark.filterwarnings("ignore:.*compares an output with probabilities")
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(
    ("loss", "apart"), [*((loss, False) for loss in LOSSES), *((loss, True) for loss in LOSSES if loss != "function")]
)
def test_a_penalty_on_another_pass_counts_nowhere(loss: str, penalty: str, apart: bool) -> None:
    loss_fn, called, f = LOSSES[loss]

    def parts(model: nn.Module) -> list[Tensor]:
        both = [called(model(X)), 0.3 * PENALTIES[penalty](model(U))]
        return both if apart else [sum(both)]

    torch.testing.assert_close(curvature_of(loss_fn, parts), dense(f), rtol=1e-9, atol=1e-11)


def test_probabilities_beside_a_known_loss_are_told_once() -> None:
    with pytest.warns(UserWarning, match="call the module with the probabilities as labels") as told:
        curvature_of(CE, lambda m: [F.cross_entropy(m(X), Y) + F.cross_entropy(m(U), FEW)])
    assert len(told) == 1
