"""A loss of another pass, or of another kind, counts with its weight, or a warning tells that it does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.estimation.test_loops_people_write import batch, diagonals
from tests.curvature.loops import mlp, silently, watching

X, Y = batch(6)
U, T = batch(5, seed=3)[0], torch.linspace(-1, 1, 15).sin().reshape(5, 3).double()
CE = nn.CrossEntropyLoss()
Loss = Callable[[Tensor], Tensor]

SQUARES: dict[str, Loss] = {
    "a product": lambda z: ((z - T) * (z - T)).mean(),
    "a product of two targets": lambda z: ((z - T) * (z - T.flip(0))).sum(1).mean(),
    "a difference by itself": lambda z: 0.3 * ((d := z - T) * d).mean(),
    "a dot product": lambda z: 0.3 * torch.dot((d := (z - T).flatten()), d),
}
TOLD: dict[str, Loss] = {
    "a multiple of a product": lambda z: 0.3 * ((z - T) * (z - T)).mean(),
    "a norm": lambda z: (z - T).norm() ** 2,
    "a temperature": lambda z: 4 * F.kl_div((z / 2).log_softmax(1), (T / 2).softmax(1), reduction="batchmean"),
    "labels at a temperature": lambda z: F.cross_entropy(0.5 * z, T.softmax(1)),
    "an entropy": lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
}
LIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": F.mse_loss,
    "a product": lambda a, b: ((a - b) * (a - b)).mean(),
    "a divergence": lambda a, b: F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean"),
}


def minimised(parts: Callable[[nn.Module], list[Tensor]]) -> dict[str, Tensor]:
    model = mlp()
    optimizer = watching(model, CE, "diagonal", curvature_ema=0.0)
    reduce(torch.add, parts(model)).backward()
    optimizer.step()
    return diagonals(optimizer, model)


def dense(f: Loss, x: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Gauss-Newton matrix of a loss, by one backward pass for each number of the output."""
    model = mlp()
    named = dict(model.named_parameters())
    z = model(x)
    H = torch.autograd.functional.hessian(f, z.detach()).reshape(z.numel(), z.numel())
    rows = [torch.autograd.grad(one, list(named.values()), retain_graph=True) for one in z.flatten()]
    J = {name: torch.stack([row[k].flatten() for row in rows]) for k, name in enumerate(named)}
    return {name: (J[name] * (H @ J[name])).sum(0).reshape(p.shape) for name, p in named.items()}


def assert_is(found: dict[str, Tensor], *expected: dict[str, Tensor]) -> None:
    for name, block in found.items():
        torch.testing.assert_close(block, sum(one[name] for one in expected), rtol=1e-9, atol=1e-12)


MAIN = dense(lambda z: F.cross_entropy(z, Y), X)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", SQUARES)
def test_a_squared_error_of_another_pass_counts_however_it_is_written(how: str, first: bool) -> None:
    def parts(model: nn.Module) -> list[Tensor]:
        other = SQUARES[how](model(U)) if first else None
        return [CE(model(X), Y), SQUARES[how](model(U)) if other is None else other]

    assert_is(minimised(parts), MAIN, dense(SQUARES[how], U))


@pytest.mark.parametrize("how", TOLD)
def test_what_counts_in_no_curvature_is_told(how: str) -> None:
    with pytest.warns(UserWarning, match="counts in no curvature"):
        found = minimised(lambda model: [CE(model(X), Y), TOLD[how](model(U))])
    assert_is(found, MAIN)


@pytest.mark.parametrize("how", LIVE)
def test_targets_that_learn_are_told(how: str) -> None:
    with pytest.warns(UserWarning, match="targets that learn"):
        found = minimised(lambda model: [CE(model(X), Y), LIVE[how](model(U), model(U.flip(0)))])
    assert_is(found, MAIN)


@pytest.mark.parametrize("how", ["a temperature", "labels at a temperature"])
def test_a_student_at_a_temperature_beside_its_labels_is_told(how: str) -> None:
    y = Y[:5]
    with pytest.warns(UserWarning, match="at a temperature"):
        found = minimised(lambda model: [CE(z := model(U), y), TOLD[how](z)])
    assert_is(found, dense(lambda z: F.cross_entropy(z, y), U))


MSE = nn.MSELoss()
LEARNING: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {
    "a second pass": (MSE, lambda m: MSE(m(U), m(U.flip(0)))),
    "the same pass": (MSE, lambda m: MSE(z := m(U), z.flip(0))),
    "a bootstrapped value": (MSE, lambda m: MSE(m(U)[:, 0], T[:, 0] + 0.9 * m(U.flip(0))[:, 0])),
    "labels": (CE, lambda m: CE(m(U), m(U.flip(0)).softmax(1))),
    "by keyword": (MSE, lambda m: MSE(m(U), target=m(U.flip(0)))),
}


@pytest.mark.parametrize("how", LEARNING)
def test_targets_of_the_module_that_learn_are_refused(how: str) -> None:
    loss_fn, loop = LEARNING[how]
    watching(model := mlp(), loss_fn, "diagonal")
    with pytest.raises(ValueError, match="targets of the loss depend on parameters"):
        loop(model).backward()


def test_targets_of_a_function_of_the_same_kind_that_learn_are_refused() -> None:
    watching(model := mlp(), MSE, "diagonal")
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        (MSE(model(U), T) + F.mse_loss(model(U), model(U.flip(0)))).backward()


def test_targets_of_another_model_that_learns_are_fixed() -> None:
    model, teacher = mlp(), mlp(seed=2)
    optimizer = watching(model, MSE, "diagonal", curvature_ema=0.0)
    MSE(model(U), teacher(U)).backward()
    optimizer.step()
    assert_is(diagonals(optimizer, model), dense(lambda z: F.mse_loss(z, teacher(U).detach()), U))


@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_gradients_that_are_asked_for_in_parts_are_of_one_loss(capture: str) -> None:
    model = mlp()
    optimizer = watching(model, CE, "diagonal", curvature_ema=0.0, capture=capture)
    loss = CE(model(X), Y)
    loss.backward(inputs=list(model[2].parameters()), retain_graph=True)
    loss.backward(inputs=list(model[0].parameters()))
    optimizer.step()
    assert_is(diagonals(optimizer, model), MAIN)


def test_it_is_told_once() -> None:
    model = mlp()
    optimizer = watching(model, CE, "diagonal", curvature_ema=0.0)
    for step in range(2):
        optimizer.zero_grad()
        (CE(model(X), Y) + TOLD["a norm"](model(U))).backward()
        silently(optimizer.step) if step == 0 else optimizer.step()
