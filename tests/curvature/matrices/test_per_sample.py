"""Gradients, norms and moments of single examples against loops over the terms of each example."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem, normal
from tests.peak_memory import peak_of_tensors


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # Biases in front of a norm have no gradient but rounding, hence a scale that does not vanish.
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-4)
    assert error <= 1e-10, f"relative error {error:.2e}"


def example_gradients(problem: Problem, x: Any, y: Tensor) -> dict[str, Tensor]:
    """``{name: (N, *shape)}``: the terms of each example, all examples present, one backward pass each."""
    model = copy.deepcopy(problem.model)
    z, targets = reference.as_terms(problem, reference.run(model, x), y)
    loss = reference.summed(problem.loss_fn)
    tensors = reference.trainable(model)
    examples = len(z) // positions(problem, x, z)
    rows: list[list[Tensor]] = []
    for n in range(examples):
        mine = slice(n * len(z) // examples, (n + 1) * len(z) // examples)
        gradient = torch.autograd.grad(
            loss(z[mine], targets[mine]), list(tensors.values()), retain_graph=True, allow_unused=True
        )
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(gradient, tensors.values(), strict=True)])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(tensors)}


def positions(problem: Problem, x: Any, z: Tensor) -> int:
    first = x
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, dict) else first))
    return len(z) // len(first) if len(z) % len(first) == 0 else 1


# Time-major models count examples along the second axis, and a model that picks positions has as many as it picks.
LEADING = sorted(
    set(PROBLEMS)
    - {"encoder_time_major", "encoder_time_major_square", "attention_without_batch", "positions_picked_by_a_mask"}
)


@pytest.mark.parametrize("name", LEADING)
def test_gradients_norms_and_moments(name: str) -> None:
    problem = PROBLEMS[name]()
    expected = [example_gradients(problem, x, y) for x, y in problem.data]
    options: Any = {"class_dim": problem.class_dim}
    for (x, y), one in zip(problem.data, expected, strict=True):
        actual = curvature.per_sample_gradients(problem.model, problem.loss_fn, (x, y), **options)
        norms = curvature.per_sample_norms(problem.model, problem.loss_fn, (x, y), **options)
        assert list(actual) == list(one) == list(norms)
        for key, value in one.items():
            assert_close(actual[key], value)
            assert_close(norms[key], value.reshape(len(value), -1).square().sum(1))
    arguments = (problem.model, problem.loss_fn, problem.data)
    second = curvature.gradient_second_moment(*arguments, **options, progress=False)
    variance = curvature.gradient_variance(*arguments, **options, progress=False)
    for key in second:
        rows = torch.cat([one[key] for one in expected])
        assert_close(second[key], rows.square().mean(0))
        scale = rows.square().mean()
        assert torch.allclose(
            variance[key], rows.var(0, correction=0), rtol=1e-10, atol=1e-12 * max(scale.item(), 1e-8)
        )


def test_they_add_up_to_the_gradient_of_the_loss() -> None:
    problem = PROBLEMS["mlp_mse"]()
    x, y = problem.data[0]
    rows = curvature.per_sample_gradients(problem.model, problem.loss_fn, (x, y))
    gradient = torch.autograd.grad(problem.loss_fn(problem.model(x), y), list(problem.model.parameters()))
    for g, row in zip(gradient, rows.values(), strict=True):
        assert_close(row.sum(0) / y.numel(), g)  # MSELoss divides by the number of entries


def test_long_sequences_use_the_gradient_and_short_ones_the_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()
    for length in (2, 30):
        data = (normal(3, length, 12), normal(3, length, 12))
        problem = Problem(model, nn.MSELoss(), [data])
        norms = curvature.per_sample_norms(model, nn.MSELoss(), data)
        for key, value in example_gradients(problem, *data).items():
            assert_close(norms[key], value.reshape(len(value), -1).square().sum(1))


def test_norms_take_less_memory_than_a_gradient() -> None:
    layers = [784, 100, 50, 25, 10]
    model = nn.Sequential(*[m for a, b in itertools.pairwise(layers) for m in (nn.Linear(a, b), nn.ReLU())][:-1])
    x, y, loss_fn = torch.randn(16, 784), torch.randint(10, (16,)), nn.CrossEntropyLoss()
    size = sum(p.nbytes for p in model.parameters())
    peaks = [peak_of_tensors(lambda: curvature.per_sample_norms(model, loss_fn, (x, y))) for _ in range(2)]
    # The gradients of all examples would take 16 times the size. The first look compares the gradients of the blocks
    # with autograd's: both, their sizes, and the bounds of what rounds.
    assert peaks[0] <= 6 * size, f"{peaks[0]} bytes at the first look, where a gradient takes {size}"
    assert peaks[1] <= size, f"{peaks[1]} bytes, where a gradient takes {size}"


def test_refusals() -> None:
    problem = PROBLEMS["mlp_ce"]()
    with pytest.raises(TypeError, match=r"expected one batch \(x, y\)"):
        curvature.per_sample_gradients(problem.model, problem.loss_fn, problem.data)  # type: ignore[arg-type]
    before = copy.deepcopy(problem.model.state_dict())
    x, y = problem.data[0]
    curvature.per_sample_gradients(problem.model, problem.loss_fn, (x, y))
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
