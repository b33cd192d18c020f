"""What is on the same output as calls of the module: losses of other kinds count, and penalties nowhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond import NaturalGradient
from tests.precond.layerwise.test_functions_and_penalties import (
    BCE,
    CE,
    COUNTS,
    HUBER,
    MSE,
    POISSON,
    SHARES,
    SOFT,
    TARGET,
    Function,
    X,
    Y,
    curvature_of,
    dense,
)

YES = (SHARES > 0.5).double()
HAND: dict[str, tuple[nn.Module, Function]] = {
    "distribution": (CE, lambda z: -torch.distributions.Categorical(logits=z).log_prob(Y).mean()),
    "normaliser": (CE, lambda z: (z.logsumexp(1) - z.gather(1, Y[:, None])[:, 0]).mean()),
    "logarithm": (CE, lambda z: -z.softmax(1).log()[torch.arange(6), Y].sum() / 6),
    "shifted": (CE, lambda z: ((z - z.amax(1, True)).exp().sum(1).log() + z.amax(1) - z[torch.arange(6), Y]).mean()),
    "logsigmoid": (BCE, lambda z: -(YES * F.logsigmoid(z) + (1 - YES) * F.logsigmoid(-z)).mean()),
    "softplus": (BCE, lambda z: (F.softplus(z) - YES * z).mean()),
    "probabilities": (BCE, lambda z: F.binary_cross_entropy(z.sigmoid(), YES)),
}


@pytest.mark.parametrize("name", HAND)
def test_a_loss_that_is_written_out_beside_the_module_counts(name: str) -> None:
    loss_fn, f = HAND[name]
    called = (lambda z: CE(z, Y)) if loss_fn is CE else (lambda z: BCE(z, YES))
    got = curvature_of(loss_fn, lambda model: [called(z := model(X)) + 0.3 * f(z)])
    torch.testing.assert_close(got, dense(lambda z: called(z) + 0.3 * f(z)), rtol=1e-9, atol=1e-11)


BESIDES: dict[str, Function] = {
    "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "binary entropy": lambda z: (z.sigmoid() * F.logsigmoid(z)).mean(),
    "normaliser": lambda z: z.logsumexp(-1).square().mean(),
    "length": lambda z: z.square().mean(),
    "sum": lambda z: z.sum(),
}


@pytest.mark.parametrize("penalty", BESIDES)
@pytest.mark.parametrize(("loss_fn", "width"), [(CE, 2), (CE, 3), (BCE, 1), (BCE, 3), (MSE, 1), (MSE, 3)])
def test_a_penalty_beside_the_module_counts_nowhere(loss_fn: nn.Module, width: int, penalty: str) -> None:
    """With one logit or two, the gradient of anything might be that of a loss whose terms have weights."""
    targets = torch.arange(6) % 2 if loss_fn is CE else SHARES[:, :width]
    found = []
    for factor in (0.0, 0.3):
        torch.manual_seed(1)
        model = nn.Linear(4, width).double()
        options = {"lr": 0.0, "fisher": "exact", "structure": "layer", "curvature_ema": 0.0, "kl_clip": None}
        optimizer = NaturalGradient(model, loss_fn, **options)
        loss = loss_fn(z := model(X), targets)
        if factor:
            loss = loss + factor * BESIDES[penalty](z)
        loss.backward()
        optimizer.step()
        found.append(optimizer.preconditioners["weight+bias"].estimator.operator().to_dense())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


#: Losses by the module, of which others are on the same output.
CALLED: dict[str, tuple[nn.Module, Function]] = {
    "labels": (CE, lambda z: CE(z, Y)),
    "mixed labels": (CE, lambda z: 0.3 * CE(z, Y) + 0.7 * CE(z, Y.flip(0))),
    "weighted": (EACH := nn.CrossEntropyLoss(reduction="none"), lambda z: (EACH(z, Y) * torch.arange(1, 7)).mean()),
    "some rows": (CE, lambda z: CE(z[:4], Y[:4])),
    "binary": (BCE, lambda z: BCE(z, YES)),
    "squares": (MSE, lambda z: MSE(z, SHARES)),
    "counts": (POISSON, lambda z: POISSON(z, COUNTS)),
    "robust": (HUBER, lambda z: HUBER(z, SHARES)),
}
SQUARES: dict[str, Function] = {
    "mean": lambda z: F.mse_loss(z, TARGET),
    "sum": lambda z: F.mse_loss(z, TARGET, reduction="sum"),
    "of another module": lambda z: nn.MSELoss()(z, TARGET),
    "of examples": lambda z: F.mse_loss(z, TARGET, reduction="none").sum(1).mean(),
    "by hand": lambda z: (TARGET - z).square().mean(),
    "of a number": lambda z: ((z - 1) ** 2).mean(),
    "of some rows": lambda z: F.mse_loss(z[3:], TARGET[3:]),
}
OTHERS: dict[str, Function] = {
    "labels": lambda z: F.cross_entropy(z, Y.roll(1)),
    "soft labels": lambda z: F.cross_entropy(z, SOFT),
    "divergence": lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean"),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, SHARES),
    "counts": lambda z: F.poisson_nll_loss(z, COUNTS),
}
#: Of which neither a form nor a value tells the weight.
UNTOLD: dict[str, Function] = {
    "of columns": lambda z: F.mse_loss(z[:, :2], TARGET[:, :2]),
    "of entries": lambda z: F.mse_loss(z[YES > 0], TARGET[YES > 0]),
    "of weighted entries": lambda z: (F.mse_loss(z, TARGET, reduction="none") * SHARES).mean(),
    "of probabilities": lambda z: F.mse_loss(z.softmax(1), SOFT),
    "at a temperature": lambda z: F.mse_loss(z / 2, TARGET),
    "two": lambda z: F.mse_loss(z, TARGET) + 0.2 * F.mse_loss(z, SOFT),
    "and a penalty": lambda z: F.mse_loss(z, TARGET) + 0.1 * z.square().mean(),
    "norm": lambda z: (z - TARGET).norm(),
    "distance": lambda z: F.pairwise_distance(z, TARGET).mean(),
    "robust": lambda z: F.smooth_l1_loss(z, TARGET),
}


@pytest.mark.parametrize(
    ("name", "capture"), [*((name, "auto") for name in CALLED), ("labels", "shadow"), ("squares", "shadow")]
)
@pytest.mark.parametrize("other", [*SQUARES, *OTHERS])
def test_a_loss_of_another_kind_beside_the_module_counts_with_its_weight(name: str, other: str, capture: str) -> None:
    (loss_fn, called), f = CALLED[name], (SQUARES | OTHERS)[other]
    both = lambda z: called(z) + 0.3 * f(z)  # noqa: E731
    found = lambda: curvature_of(loss_fn, lambda model: [both(model(X))], capture=capture)  # noqa: E731
    if loss_fn is MSE and other in SQUARES and other not in ("by hand", "of a number"):  # a function of its own kind
        with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
            found()
    else:
        torch.testing.assert_close(found(), dense(both), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("other", UNTOLD)
@pytest.mark.parametrize("name", [name for name in CALLED if name != "squares"])
def test_another_loss_beside_the_module_that_nothing_tells_is_left_out_and_told(name: str, other: str) -> None:
    loss_fn, called = CALLED[name]
    with pytest.warns(UserWarning, match="beside the loss on the same output.*counts in no curvature"):
        found = curvature_of(loss_fn, lambda model: [called(z := model(X)) + 0.3 * UNTOLD[other](z)])
    torch.testing.assert_close(found, dense(called), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [*OTHERS, "squares", "of probabilities"])
def test_in_low_precision_a_loss_beside_the_module_counts_or_is_told(
    other: str, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """What is left of the gradient without the module's part may be rounding errors."""
    functions = {"squares": SQUARES["mean"], "of probabilities": UNTOLD["of probabilities"], **OTHERS}
    both = lambda z: CE(z, Y) + 0.3 * functions[other](z)  # noqa: E731
    low = lambda z: CE(z, Y) + 0.3 * functions[other](z.double()).to(dtype)  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double().to(dtype)
    optimizer = NaturalGradient(model, CE, lr=0.0, fisher="exact", structure="layer", curvature_ema=0.0, kl_clip=None)
    low(model(X.to(dtype))).backward()
    optimizer.step()
    found = optimizer.preconditioners["weight+bias"].estimator.operator().to_dense().double()
    off = {
        f: float(torch.linalg.norm(found - dense(f)) / torch.linalg.norm(dense(f))) for f in (both, CALLED["labels"][1])
    }
    told = any("counts in no curvature" in str(warning.message) for warning in recwarn)
    assert off[CALLED["labels"][1] if told else both] < (1e-6 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("loss_fn", "f"),
    [
        (BCE, lambda z: F.binary_cross_entropy_with_logits(z, YES) + F.mse_loss(z, TARGET)),
        (BCE, lambda z: F.binary_cross_entropy_with_logits(z, YES) + (z - TARGET).square().mean()),
        (MSE, lambda z: F.mse_loss(z, TARGET) + F.cross_entropy(z, Y)),
        (MSE, lambda z: F.mse_loss(z, TARGET) + F.binary_cross_entropy_with_logits(z, YES)),
        (CE, lambda z: F.cross_entropy(z, Y) + F.mse_loss(z, TARGET)),
        (CE, lambda z: F.cross_entropy(z, Y) + F.huber_loss(z, TARGET)),
    ],
)
def test_functions_of_two_kinds_on_one_output_are_refused(loss_fn: nn.Module, f: Function) -> None:
    """Their gradients are one there, which tells neither."""
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(loss_fn, lambda model: [f(model(X))])
