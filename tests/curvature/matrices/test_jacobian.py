"""Jacobians both ways against one backward pass per output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, normal


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-300)
    assert error <= 1e-10, f"relative error {error:.2e}"


def dense_jacobian(model: nn.Module, x: Any) -> Tensor:
    """``(outputs, P)``."""
    model = copy.deepcopy(model)
    z = reference.run(model, x)
    return reference.jacobian(z.reshape(len(z), -1), list(reference.trainable(model).values())).flatten(0, 1)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_products_both_ways_and_the_matrix(name: str) -> None:
    problem = PROBLEMS[name]()
    x, _ = problem.data[0]
    expected = dense_jacobian(problem.model, x)
    J = curvature.jacobian(problem.model, x)
    v, u = normal(2, J.shape[1]), normal(2, *J.out_shape)
    assert_close((J @ v).flatten(1), v @ expected.T)
    assert_close(J.adjoint() @ u, u.flatten(1) @ expected)
    assert_close(J @ v[0], (J @ v)[0])
    assert_close(J.to_dense(), expected)
    assert_close(J.adjoint().to_dense(), expected.T)
    assert J.mode == "reverse"


def test_forward_mode_and_subsets() -> None:
    problem = PROBLEMS["cnn"]()
    x, _ = problem.data[0]
    J = curvature.jacobian(problem.model, x, mode="forward")
    expected = dense_jacobian(problem.model, x)
    v = normal(3, J.shape[1])
    assert_close((J @ v).flatten(1), v @ expected.T)
    names = list(reference.flat_indices(problem.model))
    index = reference.flat_indices(problem.model)[names[-1]].flatten()
    assert_close(curvature.jacobian(problem.model, x, params=names[-1]).to_dense(), expected[:, index])


def test_changed_parameters_and_unknown_modes_are_refused() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, _ = problem.data[0]
    J = curvature.jacobian(problem.model, x)
    with torch.no_grad():
        problem.model.get_parameter("0.bias").add_(1)
    with pytest.raises(RuntimeError, match=r"0\.bias was changed after this operator was made"):
        J @ normal(J.shape[1])
    with pytest.raises(RuntimeError, match=r"0\.bias was changed after this operator was made"):
        J.to_dense()
    with pytest.raises(ValueError, match="mode is one of"):
        curvature.jacobian(problem.model, x, mode="backward")  # type: ignore[arg-type]
