"""Is a loss over batches one function of the parameters, with one gradient?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvature.matrices.by_name import MATRICES, matrix_of
from curvature.matrices.problem import Problem, gradient, gradient_of, loss_and_gradient, one_batch
from tests.curvature.problems import PROBLEMS

PROBLEM = PROBLEMS["mlp_ce"]()
MODEL, LOSS, DATA = PROBLEM.model, PROBLEM.loss_fn, PROBLEM.data


def test_loss_and_gradient_are_those_of_all_data_as_one_batch() -> None:
    x, y = (torch.cat(column) for column in zip(*DATA, strict=True))
    expected = LOSS(MODEL(x), y)
    rows = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(MODEL.parameters()))])
    problem = Problem(MODEL, LOSS, DATA)
    value, found = loss_and_gradient(problem)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, rows)
    assert torch.equal(gradient(problem), found)


def test_sums_are_taken_in_the_dtype_that_is_asked_for() -> None:
    model = nn.Linear(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]
    problem = Problem(model, nn.MSELoss(), data)
    assert gradient(problem).dtype == torch.float32
    value, found = loss_and_gradient(problem, torch.float64)
    assert value.dtype == found.dtype == torch.float64
    torch.testing.assert_close(found.float(), gradient(problem))


def test_gradient_of_a_number_or_along_a_signal() -> None:
    p = {"used": torch.randn(3, dtype=torch.float64, requires_grad=True), "idle": torch.ones(2, requires_grad=True)}
    value = p["used"] ** 2
    found = gradient_of(value.sum(), p, create_graph=True)
    assert torch.equal(found["used"], 2 * p["used"])
    assert torch.equal(found["idle"], torch.zeros(2))
    signal = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    assert torch.equal(gradient_of(value, p, signal, create_graph=True)["used"], 2 * p["used"] * signal)
    with pytest.raises(ValueError, match="does not depend on the model's parameters"):
        gradient_of(torch.ones(()), p)


def test_one_batch_is_one() -> None:
    assert one_batch(MODEL, LOSS, DATA[0]).single
    with pytest.raises(TypeError, match=r"expected one batch \(x, y\), got list"):
        one_batch(MODEL, LOSS, DATA)  # type: ignore[arg-type]


def test_matrices_by_name() -> None:
    wrong: Any = "fisher"
    for name in MATRICES:
        assert matrix_of(name)(MODEL, LOSS, DATA).title == {"hessian": "Hessian", "ggn": "GaussNewton"}[name]
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'ggn', got 'fisher'"):
        matrix_of(wrong)
