"""Losses by function count with their weight, and what is no loss of the given kind counts in no curvature."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
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
HARD: Function = lambda z: F.cross_entropy(z, Y)  # noqa: E731
TARGET = 2 * SOFT.roll(1, 0) - U[0, 0]
COUNTS, SHARES = (3 * SOFT).round(), 0.8 * (SOFT > 0.3).double() + 0.1
CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
POISSON, HUBER = nn.PoissonNLLLoss(), nn.HuberLoss()

BINARY: Function = lambda z: F.binary_cross_entropy_with_logits(z, SHARES)  # noqa: E731
COUNTED: Function = lambda z: F.poisson_nll_loss(z, COUNTS)  # noqa: E731


def curvature_of(loss_fn: nn.Module, minimised: Callable[[nn.Module], list[Tensor]], **loop: Any) -> Tensor:
    """Of a linear layer, after a step; each part has a backward pass of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double()
    options = {"lr": 0.0, "fisher": "exact", "structure": "layer", "curvature_ema": 0.0, "kl_clip": None}
    optimizer = NaturalGradient(model, loss_fn, **options, loop=Loop(**loop))
    parts = minimised(model)
    for part in parts:
        part.backward(retain_graph=len(parts) > 1)
    optimizer.step()
    return optimizer.preconditioners["weight+bias"].estimator.operator().to_dense()


def dense(*losses: Function, x: Tensor = X) -> Tensor:
    """The Gauss-Newton matrix of losses on some examples."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(4, 3).double()
    inputs = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    J = torch.einsum("ni,co->ncoi", inputs, torch.eye(3).double()).reshape(-1, 15)
    z = layer(x).detach()
    hessians = [torch.autograd.functional.hessian(lambda v, f=f: f(v.view(-1, 3)), z.flatten()) for f in losses]
    return J.T @ sum(hessians) @ J


LABELS = {
    "function": (CE, lambda z: F.cross_entropy(z, SOFT)),
    "smoothed": (CE, lambda z: F.cross_entropy(z, Y, label_smoothing=0.1)),
    "by hand": (CE, lambda z: -(SOFT * z.log_softmax(1)).sum(1).mean()),
    "hard": (CE, lambda z: F.cross_entropy(z, Y)),
    "divergence": (CE, lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean")),
    "its logarithm": (CE, lambda z: F.kl_div(z.log_softmax(1), SOFT.log(), log_target=True, reduction="sum") / 6),
    "normaliser": (CE, lambda z: (z.logsumexp(1) - (z * SOFT).sum(1)).sum() / 5),
    "binary": (BCE, lambda z: F.binary_cross_entropy_with_logits(z, SHARES)),
    "softplus": (BCE, lambda z: (F.softplus(z) - SHARES * z).sum() / 5),
    "logsigmoid": (BCE, lambda z: -(SHARES * F.logsigmoid(z) + (1 - SHARES) * F.logsigmoid(-z)).mean()),
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


@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_a_sum_that_is_added_to_itself_counts_twice(capture: str) -> None:
    def twice(z: Tensor) -> Tensor:
        one = torch.stack([F.mse_loss(z, SHARES)]).sum()
        return one + one

    found = curvature_of(nn.MSELoss(), lambda model: [twice(model(X))], capture=capture)
    torch.testing.assert_close(found, dense(lambda z: 2 * F.mse_loss(z, SHARES)), rtol=1e-9, atol=1e-11)


MIXED: dict[str, Function] = {
    "two labels": lambda z: 0.3 * F.cross_entropy(z, Y) + 0.7 * F.cross_entropy(z, Y.flip(0)),
    "three labels": lambda z: (
        (F.cross_entropy(z, Y) + F.cross_entropy(z, Y.flip(0)) + F.cross_entropy(z, Y.roll(1))) / 3
    ),
    "one label in parts": lambda z: 0.3 * F.cross_entropy(z, Y) + 0.7 * F.cross_entropy(z, Y),
}
SECOND: dict[str, Function] = {
    "squares": lambda z: F.mse_loss(z, TARGET[:5]),
    "soft labels": lambda z: F.cross_entropy(z, FEW),
    "divergence": lambda z: F.kl_div(z.log_softmax(1), FEW, reduction="batchmean"),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, FEW),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", MIXED)
def test_mixed_labels_by_function_leave_the_rest_of_the_sum_to_another_pass(first: str, second: str) -> None:
    """Each loss has told its part once, however many functions it consists of."""
    one, other = MIXED[first], SECOND[second]
    found = curvature_of(CE, lambda model: [one(model(X)) + 0.3 * other(model(U))])
    expected = dense(one) + dense(lambda z: 0.3 * other(z), x=U)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("given", [F.mse_loss, nn.MSELoss()], ids=["function", "module"])
def test_a_function_that_the_optimizer_is_given_stands_for_its_module(given: Any, weight: float) -> None:
    for called in (F.mse_loss, MSE):
        f = lambda z, called=called: weight * called(z, TARGET)  # noqa: E731
        found = curvature_of(given, lambda model, f=f: [f(model(X))])
        torch.testing.assert_close(found, dense(f), rtol=1e-9, atol=1e-11)


def with_its_size(loss: Tensor) -> Tensor:
    return loss + loss.abs()


ROOTS: dict[str, tuple[Callable[[Tensor], None], float]] = {
    "twice": (lambda loss: torch.autograd.backward([loss, loss]), 2),
    "and its view": (lambda loss: torch.autograd.backward([loss, loss.view(())]), 2),
    "with shares": (
        lambda loss: torch.autograd.backward([loss, loss], [loss.new_tensor(0.25), loss.new_tensor(0.5)]),
        0.75,
    ),
    "with a factor": (lambda loss: loss.backward(loss.new_tensor(3.0)), 3),
    "and a multiple": (lambda loss: (loss + 2 * loss).backward(), 3),
    "and a copy": (lambda loss: (loss + loss.clone()).backward(), 2),
    "stacked": (lambda loss: torch.stack([loss, 1.0 * loss]).sum().backward(), 2),
}


@pytest.mark.parametrize("roots", ROOTS)
@pytest.mark.parametrize("name", ["function", "hard", "divergence", "binary", "counts", "squares"])
def test_a_backward_pass_on_several_multiples_of_a_loss_counts_all_of_them(name: str, roots: str) -> None:
    (loss_fn, f), (backward, weight) = (
        (LABELS | {"squares": (MSE, lambda z: F.mse_loss(z, SHARES))})[name],
        ROOTS[roots],
    )

    def minimised(model: nn.Module) -> list[Tensor]:
        backward(f(model(X)))
        return []

    expected = dense(lambda z: weight * f(z))
    torch.testing.assert_close(curvature_of(loss_fn, minimised), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["function", "binary", "counts", "squares"])
@pytest.mark.parametrize(
    "outer", [torch.sqrt, torch.log, torch.exp, torch.square, with_its_size], ids=lambda f: f.__name__
)
def test_a_function_of_a_loss_whose_slope_nothing_tells_is_refused(
    name: str, outer: Callable[[Tensor], Tensor]
) -> None:
    loss_fn, f = (LABELS | {"squares": (MSE, lambda z: F.mse_loss(z, SHARES))})[name]
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(loss_fn, lambda model: [outer(f(model(X)))])


def test_a_pass_that_is_called_twice_on_a_sum_with_something_else_is_refused() -> None:
    def twice(model: nn.Module) -> list[Tensor]:
        one = F.mse_loss(z := model(X), SHARES) + z.abs().mean()
        torch.autograd.backward([one, one])
        return []

    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(MSE, twice)


def test_a_sum_with_something_else_that_is_added_to_itself_is_refused() -> None:
    def twice(model: nn.Module) -> list[Tensor]:
        z = model(X)
        one = F.mse_loss(z, SHARES) + z.abs().mean()
        return [one + one]

    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(nn.MSELoss(), twice)


@pytest.mark.parametrize(
    "f",
    [
        lambda z: 64 * F.kl_div((z / 8).log_softmax(1), SOFT, reduction="batchmean"),
        lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean") + 0.1 * F.cross_entropy(z, SOFT.flip(1)),
        lambda z: (F.cross_entropy(z, SOFT, reduction="none") * torch.arange(6)).mean(),
        lambda z: -0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    ],
    ids=["temperature", "two labels, and the entropy of one", "weights of examples", "entropy"],
)
def test_a_multiple_whose_size_nothing_tells_is_refused(f: Function) -> None:
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(CE, lambda model: [f(model(X))])


PENALTIES: dict[str, Function] = {
    "temperature": lambda z: 4 * F.kl_div((z / 2).log_softmax(1), FEW, reduction="batchmean"),
    "entropy": lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    "probabilities": lambda z: F.mse_loss(z.softmax(1), FEW),
    "a column": lambda z: F.mse_loss(z[:, 0], FEW[:, 0]),
    "a multiple": lambda z: F.mse_loss(z / 2, FEW),
    "targets that learn": lambda z: F.mse_loss(z, z.flip(0)),
    "energy": lambda z: z.logsumexp(1).mean(),
}
LOSSES: dict[str, tuple[nn.Module, Function, Function]] = {
    "module": (CE, lambda z: CE(z, Y), lambda z: F.cross_entropy(z, Y)),
    "function": (CE, lambda z: F.cross_entropy(z, Y), lambda z: F.cross_entropy(z, Y)),
    "binary": (BCE, lambda z: BCE(z, SHARES), lambda z: F.binary_cross_entropy_with_logits(z, SHARES)),
    "counts": (POISSON, lambda z: POISSON(z, COUNTS), lambda z: F.poisson_nll_loss(z, COUNTS)),
    "huber": (HUBER, lambda z: HUBER(z, SOFT), lambda z: F.huber_loss(z, SOFT)),
}


@pytest.mark.filterwarnings("ignore:.*compares an output with fixed targets")
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


BESIDE: dict[str, tuple[nn.Module, Function, Function, Function]] = {
    "probabilities": (CE, lambda z: CE(z, Y), HARD, lambda z: F.cross_entropy(z, FEW)),
    "beside a function": (CE, HARD, HARD, lambda z: F.cross_entropy(z, FEW)),
    "smoothed": (CE, HARD, HARD, lambda z: F.cross_entropy(z, Y[:5], label_smoothing=0.1)),
    "divergence": (CE, lambda z: CE(z, Y), HARD, lambda z: F.kl_div(z.log_softmax(1), FEW, reduction="batchmean")),
    "uniform": (CE, lambda z: CE(z, Y), HARD, lambda z: -z.log_softmax(1).mean()),
    "by hand": (CE, lambda z: CE(z, Y), HARD, lambda z: -(FEW * z.log_softmax(1)).sum() / 5),
    "binary": (BCE, lambda z: BCE(z, SHARES), BINARY, lambda z: F.binary_cross_entropy_with_logits(z, FEW)),
    "counts": (POISSON, lambda z: POISSON(z, COUNTS), COUNTED, lambda z: F.poisson_nll_loss(z, FEW)),
}


def in_order(order: str, called: Function, beside: Function, model: nn.Module) -> list[Tensor]:
    """Two passes and a loss of each, in some order; a dot is the end of a backward pass."""
    z: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    for what in order:
        if what in "XU":
            z[what] = model(X if what == "X" else U)
        elif what == ".":
            reduce(torch.add, parts).backward(retain_graph=True)
            parts = []
        else:
            parts.append(0.5 * called(z["X"]) if what == "x" else 0.3 * beside(z["U"]))
    return [reduce(torch.add, parts)]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("order", ["XxUu", "UuXx", "XUxu", "XUux", "Xx.Uu", "XUu.x", "Uu.Xx"])
def test_labels_beside_a_known_loss_count_with_their_weight_in_any_order(name: str, order: str) -> None:
    loss_fn, called, f, beside = BESIDE[name]
    got = curvature_of(loss_fn, lambda model: in_order(order, called, beside, model))
    expected = dense(lambda z: 0.5 * f(z)) + dense(lambda z: 0.3 * beside(z), x=U)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["function", "by hand", "divergence"])
def test_labels_beside_a_known_loss_of_the_same_output_count(name: str) -> None:
    f = LABELS[name][1]
    got = curvature_of(CE, lambda model: [0.9 * CE(z := model(X), Y) + 0.1 * f(z)])
    torch.testing.assert_close(got, dense(lambda z: 0.9 * HARD(z) + 0.1 * f(z)), rtol=1e-9, atol=1e-11)


def test_a_function_with_other_options_than_the_module_is_refused() -> None:
    positive = torch.tensor([1.0, 2.0, 3.0]).double()
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(BCE, lambda m: [F.binary_cross_entropy_with_logits(m(X), SHARES, pos_weight=positive)])


@pytest.mark.parametrize("divisor", [6, torch.tensor(5.0).double()])
def test_sums_of_squares_by_function_count_as_they_are_divided(divisor: Any) -> None:
    f = lambda z: F.mse_loss(z, SOFT, reduction="sum") / divisor  # noqa: E731
    torch.testing.assert_close(curvature_of(nn.MSELoss(), lambda m: [f(m(X))]), dense(f), rtol=1e-9, atol=1e-11)


def test_a_divergence_that_rounding_hides_is_left_out_and_told_once() -> None:
    """Adversarial directions begin with next to none."""

    def minimised(model: nn.Module) -> list[Tensor]:
        near = model(X + 1e-7).detach().softmax(1)
        return [CE(model(X), Y) + F.kl_div(model(X).log_softmax(1), near, reduction="batchmean")]

    with pytest.warns(UserWarning, match="rounding hides its weight") as told:
        got = curvature_of(CE, minimised)
    assert len(told) == 1
    torch.testing.assert_close(got, dense(HARD), rtol=1e-9, atol=1e-11)


def test_a_loss_of_alignments_is_no_cross_entropy() -> None:
    def aligned(model: nn.Module) -> list[Tensor]:
        logs = model(X)[:, None].log_softmax(-1)
        return [F.ctc_loss(logs, torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2]))]

    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(CE, aligned)


def test_two_labels_of_unknown_weight_beside_a_known_loss_are_refused() -> None:
    soft = lambda z, t: F.cross_entropy(z, t)  # noqa: E731
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(CE, lambda m: [CE(m(X), Y) + 0.3 * soft(m(U), FEW) + 0.2 * soft(m(X), SOFT)])


KNOWN: dict[str, Function] = {
    "labels": lambda z: F.cross_entropy(z, FEW),
    "their sum": lambda z: F.cross_entropy(z, FEW, reduction="sum") / 7,
    "hard": lambda z: F.cross_entropy(z, FEW.argmax(1)),
    "divergence": lambda z: F.kl_div(z.log_softmax(1), FEW, reduction="sum") / 2 / 3,
    "square": lambda z: F.mse_loss(z, FEW),
    "square of rows": lambda z: F.mse_loss(z[:3], FEW[:3], reduction="none").sum(1).mean(),
    "by hand": lambda z: ((z - FEW) ** 2).mean(),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, FEW),
    "counts": lambda z: F.poisson_nll_loss(z, FEW),
}
MAIN: dict[str, tuple[nn.Module, Function]] = {
    "module": LOSSES["module"][:2],
    "function": LOSSES["function"][:2],
    "binary": LOSSES["binary"][:2],
    "squares": (MSE, lambda z: MSE(z, SOFT)),
    "huber": LOSSES["huber"][:2],
}


@pytest.mark.parametrize("form", KNOWN)
@pytest.mark.parametrize("loss", MAIN)
def test_a_known_form_on_another_pass_counts_with_its_weight_in_any_order(loss: str, form: str) -> None:
    loss_fn, f = MAIN[loss]
    g = KNOWN[form]
    expected = dense(lambda z: f(z) / 2) + dense(lambda z: 0.3 * g(z), x=U)
    for order in ("XxUu", "UuXx", "XUux", "Xx.Uu", "Uu.Xx"):
        if loss != "huber" or order != "Uu.Xx":  # by when nothing was seen of the loss
            got = curvature_of(loss_fn, lambda model, order=order: in_order(order, f, g, model))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if loss != "function":  # whose value is told when it is repeated
        got = curvature_of(loss_fn, lambda model: [f(model(X)) / 2 + 0.3 * g(model(U))], capture="shadow")
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "g",
    [
        lambda m: F.mse_loss(m(U), FEW) + 2 * F.mse_loss(m(U), FEW.flip(1)),
        lambda m: (F.mse_loss(m(U), FEW, reduction="none") * torch.arange(5).unsqueeze(1)).mean(),
        lambda m: F.mse_loss((z := m(U))[z[:, 0] > 0], FEW[z[:, 0] > 0]),
        lambda m: F.binary_cross_entropy_with_logits(m(U), FEW, pos_weight=SOFT[0]),
        lambda m: 1 + F.mse_loss(m(U), FEW),
    ],
    ids=["two", "weights of examples", "rows by a mask", "weights of classes", "a constant"],
)
def test_a_known_form_of_a_weight_that_nothing_tells_is_told_once(g: Callable[[nn.Module], Tensor]) -> None:
    with pytest.warns(UserWarning, match="or nothing tells it") as told:
        got = curvature_of(CE, lambda m: [CE(m(X), Y) + 0.3 * g(m)])
    assert len(told) == 1
    torch.testing.assert_close(got, dense(HARD), rtol=1e-9, atol=1e-11)


def test_a_sum_by_function_beside_a_mean_by_the_module_keeps_its_weight() -> None:
    got = curvature_of(CE, lambda m: [CE(m(X), Y) + F.cross_entropy(m(U), Y[:5], reduction="sum")])
    expected = dense(HARD) + dense(lambda z: F.cross_entropy(z, Y[:5], reduction="sum"), x=U)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
def test_the_weight_of_a_small_squared_error_beside_a_known_loss_in_low_precision(rounded: torch.dtype) -> None:
    traces = []
    for weight in (0.0, 0.3):
        with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled=rounded == torch.bfloat16):
            torch.manual_seed(1)
            model = nn.Linear(4, 3)
            options: dict[str, Any] = {"fisher": "exact", "structure": "layer", "curvature_ema": 0.0, "kl_clip": None}
            optimizer = NaturalGradient(model, CE, lr=0.0, **options)
            near = 0.1 if rounded == torch.float32 else 0.5
            target = model(U.float()).detach() + near * FEW.float()
            (CE(model(X.float()), Y) + weight * F.mse_loss(model(U.float()), target)).backward()
        optimizer.step()
        traces.append(float(optimizer.preconditioners["weight+bias"].estimator.operator().to_dense().trace()))
    right = float(dense(lambda z: 0.3 * F.mse_loss(z, FEW), x=U).trace())
    assert traces[1] - traces[0] == pytest.approx(right, rel=0.01 if rounded == torch.float32 else 0.02)


#: Rows of an output ``(2, 5, 3)``, whose axes are counted from the front or from behind.
ROWS: dict[str, Function] = {
    "one, from the front": lambda z: z.select(1, 1),
    "one, from behind": lambda z: z.select(-2, 1),
    "several, from behind": lambda z: z.narrow(-2, 1, 3),
}
COLUMNS: dict[str, Function] = {
    "one, from the front": lambda z: z.select(2, 1),
    "one, from behind": lambda z: z.select(-1, 1),
    "several, from behind": lambda z: z.narrow(-1, 0, 2),
    "several, with an ellipsis": lambda z: z[..., :2],
}
ENTRIES = {"squares": (MSE, F.mse_loss), "binary": (BCE, F.binary_cross_entropy_with_logits)}


def of_part(name: str, cut: Function) -> Function:
    """The loss by function of a part of an output ``(2, 5, 3)``, whose rows may be given one after the other."""

    def f(z: Tensor) -> Tensor:
        part = cut(z.reshape(2, 5, 3))
        return ENTRIES[name][1](part, torch.linspace(0.1, 0.9, part.numel()).to(part).view_as(part))

    return f


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_function_of_some_rows_has_the_curvature_of_these(name: str, rows: str) -> None:
    f, x = of_part(name, ROWS[rows]), torch.cat([X, U])[:10]
    found = curvature_of(ENTRIES[name][0], lambda model: [f(model(x.view(2, 5, 4)))])
    torch.testing.assert_close(found, dense(f, x=x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_function_of_some_columns_is_refused(name: str, columns: str) -> None:
    f, x = of_part(name, COLUMNS[columns]), torch.cat([X, U])[:10]
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        curvature_of(ENTRIES[name][0], lambda model: [f(model(x.view(2, 5, 4)))])


@pytest.mark.parametrize(("loss_fn", "f"), [(CE, lambda z: CE(z, Y)), (CE, HARD), (MSE, lambda z: F.mse_loss(z, SOFT))])
def test_a_penalty_with_exponents_that_are_a_tensor_counts_nowhere(loss_fn: nn.Module, f: Function) -> None:
    exponents = torch.linspace(1.0, 2.0, 4).double()
    found = curvature_of(loss_fn, lambda m: [f(m(X)) + m.weight.abs().pow(exponents).mean()])
    torch.testing.assert_close(found, dense(f), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("retain", [False, True])
def test_a_square_whose_exponent_is_a_tensor_counts_while_that_is_there(retain: bool) -> None:
    def square(z: Tensor) -> Tensor:
        return ((z - SOFT) ** torch.tensor(2.0)).mean()

    def minimised(model: nn.Module) -> list[Tensor]:
        square(model(X)).backward(retain_graph=retain)
        return []

    if retain:
        torch.testing.assert_close(curvature_of(MSE, minimised), dense(square), rtol=1e-9, atol=1e-11)
    else:
        with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
            curvature_of(MSE, minimised)


def doubling(name: str, several: bool) -> Callable[[Tensor], Tensor]:
    """A custom function of this name that doubles its first argument, and gets another one that it does not use."""

    def forward(ctx: Any, z: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return 2 * z

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        return (2 * g, *[torch.zeros_like(g)] * ctx.others)

    kind = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    return (lambda z: kind.apply(z, z * z)) if several else kind.apply


@pytest.mark.parametrize(
    "name", ["Twice", "Select", "SelectiveScan", "SplitHeads", "SubNoise", "PowerNorm", "ViewTwice"]
)
@pytest.mark.parametrize("several", [False, True])
def test_custom_functions_are_told_by_what_they_are_and_not_by_their_names(name: str, several: bool) -> None:
    g = doubling(name, several)
    found = curvature_of(CE, lambda model: [CE(g(model(X)), Y)])
    torch.testing.assert_close(found, dense(lambda z: CE(2 * z, Y)), rtol=1e-9, atol=1e-11)
    for loss_fn, f in (
        (CE, lambda z: F.cross_entropy(g(z), Y)),
        (BCE, lambda z: F.binary_cross_entropy_with_logits(g(z), SHARES)),
        (MSE, lambda z: F.mse_loss(g(z), SOFT)),
        (MSE, lambda z: ((g(z) - SOFT) ** 2).mean()),
        (MSE, lambda z: g((z - SOFT) ** 2).mean()),
    ):
        with pytest.raises(TypeError, match="the optimizer's that is no call of the module"):
            curvature_of(loss_fn, lambda model, f=f: [f(model(X))])
