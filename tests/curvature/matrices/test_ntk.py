"""The neural tangent kernel against products of dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch

import curvature
from tests.curvature.matrices.test_jacobian import assert_close, dense_jacobian
from tests.curvature.problems import PROBLEMS

NAMES = ["mlp_ce", "mlp_mse_one_number", "cnn", "residual_train", "bare_parameters", "linear_on_sequences"]
NAMES += ["unknown_uses", "module_used_twice", "language_model", "frozen_parts", "two_inputs", "embeddings"]


@pytest.mark.parametrize("name", NAMES)
def test_kernel_in_every_mode_on_one_and_two_sets(name: str) -> None:
    problem = PROBLEMS[name]()
    x, x2 = (batch[0] for batch in problem.data[:2])
    shapes = [curvature.jacobian(problem.model, inputs).out_shape for inputs in (x, x2)]
    out = shapes[0][1:]
    assert shapes[1][1:] == out or name == "language_model"
    x2 = x2 if shapes[1][1:] == out else x
    dense = [dense_jacobian(problem.model, inputs) for inputs in (x, x2)]
    J, J2 = (rows.reshape(-1, math.prod(out), rows.shape[1]) for rows in dense)
    for right, inputs in ((J, None), (J2, x2)):
        expected = torch.einsum("ncp,mdp->nmcd", J, right)
        n, m = expected.shape[:2]
        assert_close(curvature.ntk(problem.model, x, inputs), expected.reshape(n, m, *out, *out))
        per_class = expected.diagonal(dim1=2, dim2=3)
        assert_close(curvature.ntk(problem.model, x, inputs, mode="class"), per_class.reshape(n, m, *out))
        assert_close(curvature.ntk(problem.model, x, inputs, mode="trace"), per_class.sum(-1))


def test_refusals() -> None:
    problem = PROBLEMS["mlp_ce"]()
    with pytest.raises(ValueError, match="mode is one of"):
        curvature.ntk(problem.model, problem.data[0][0], mode="diagonal")  # type: ignore[arg-type]
