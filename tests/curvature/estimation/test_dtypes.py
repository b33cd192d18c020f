"""In which precision are the numbers, and how far is it from float64?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import fisher
from solvers import Dense, Diagonal, Eigen, Kronecker, LinearOperator
from tests.curvature.estimates import estimate
from tests.curvature.problems import PROBLEMS, Problem

MIXED = ["mlp_ce_all_options", "cnn", "residual_eval", "language_model", "encoder_pre_norm", "bare_parameters"]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: cast(value, dtype) for key, value in tree.items()}
    return type(tree)(cast(value, dtype) for value in tree)


def converted(problem: Problem, dtype: torch.dtype) -> Problem:
    """Model, loss and data rounded to ``dtype``."""
    loss = copy.deepcopy(problem.loss_fn).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return Problem(copy.deepcopy(problem.model).to(dtype), loss, cast(problem.data, dtype), problem.class_dim)


def tensors(operator: LinearOperator) -> Iterator[Tensor]:
    match operator:
        case Dense():
            yield operator.matrix
        case Diagonal():
            yield operator.values
        case Kronecker():
            for factor in operator.factors:
                yield from tensors(factor)
        case Eigen():
            yield operator.values
            yield from tensors(operator.basis)
        case _:
            raise TypeError(operator)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", MIXED)
def test_single_precision_agrees(name: str, structure: str, kind: str) -> None:
    """Sums of at most a few thousand products with unit roundoff 6e-8, through a few layers: 1e-4 leaves a factor 10.

    Diagonals are compared: an EKFAC is not continuous where eigenvalues of a factor meet, but its diagonal in a fixed
    basis is close there too, since the basis it has is an eigenbasis of a matrix within rounding.
    """
    problem = PROBLEMS[name]()
    exact = estimate(problem, structure, kind)
    single = estimate(converted(problem, torch.float32), structure, kind)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert all(t.dtype == torch.float32 for block in single.blocks for t in tensors(block))
    a, b = (op.diagonal().double() for op in (exact, single))
    if structure == "ekfac":
        a, b = a.sum(), b.sum()
    assert torch.dist(a, b) <= 1e-4 * a.norm()


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", MIXED)
def test_half_precision_models_have_statistics_in_single_precision(name: str, structure: str, kind: str) -> None:
    """The model computes with 8 bits (4e-3) through some ten operations, so squares agree to some per cent.

    Compared with the same rounded weights and data in float64, so that only the arithmetic differs.
    """
    half = converted(PROBLEMS[name](), torch.bfloat16)
    operator = estimate(half, structure, kind)
    assert operator.dtype == torch.float32
    assert all(t.dtype == torch.float32 for block in operator.blocks for t in tensors(block))
    if kind != "mc":
        trace = estimate(converted(half, torch.float64), structure, kind).trace()
        assert abs(operator.trace() - trace) <= 0.1 * trace


def test_sums_are_not_taken_in_half_precision() -> None:
    """1200 equal examples: a bfloat16 sum stops growing where a term is below half its last bit, after 256 of them.

    In float32 each of the 1200 additions is off by 6e-8 at most.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    x, y = torch.ones(1200, 3).bfloat16(), torch.zeros(1200, 2).bfloat16()
    many = fisher(model, nn.MSELoss(), (x, y), kind="exact", structure="kfac").to_dense()
    one = fisher(model, nn.MSELoss(), (x[:1], y[:1]), kind="exact", structure="kfac").to_dense()
    torch.testing.assert_close(many, one, rtol=1e-4, atol=0)


def test_one_double_parameter_makes_a_double_operator() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.append(Cast(torch.float64))
    model.append(nn.Linear(2, 2).double())
    data = (torch.ones(2, 3), torch.zeros(2, 2).double())
    operator = fisher(model, nn.MSELoss(), data, kind="exact", structure="kfac")
    assert operator.dtype == torch.float64


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
