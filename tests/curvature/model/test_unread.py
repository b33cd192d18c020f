"""Products of which nobody reads the numbers are not taken; all others are, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import curvature
from curvature.model import unread
from curvature.model.pullback import pull_back
from tests.curvature.problems import PROBLEMS, Problem, normal

MATRICES = {"hessian": curvature.hessian, "ggn": curvature.ggn}


def products(make: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    A = make(problem.model, problem.loss_fn, problem.data, class_dim=problem.class_dim, keep_graph=False)
    v = torch.linspace(-1, 1, 2 * A.shape[1], dtype=A.dtype).reshape(2, -1)
    return A @ v[0], A @ v


@pytest.mark.parametrize("name", sorted(PROBLEMS))
@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_the_same_to_the_bit(matrix: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(unread, "LEAST", least)
        found.append(products(MATRICES[matrix], PROBLEMS[name]()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Checkpointed(nn.Module):
    """Its layers are computed again in the backward pass, and have one weight in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(lambda x: self.second(self.first(x).tanh()).sigmoid(), x, use_reentrant=False)
        return x


@pytest.mark.parametrize("matrix", MATRICES)
def test_checkpoints_are_computed_again_to_the_same_numbers(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = Checkpointed().double(), [(normal(5, 4), torch.tensor([0, 1, 2, 3, 0]))]
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(unread, "LEAST", least)
        found.append(products(MATRICES[matrix], Problem(model, nn.CrossEntropyLoss(), data))[0])
    assert torch.equal(*found)


def operations(make: Any, model: nn.Module, x: Tensor) -> int:
    A = make(model, nn.CrossEntropyLoss(), (x, torch.arange(len(x)) % 3), keep_graph=False)
    with FlopCounterMode(display=False) as counter:
        A @ torch.ones(A.shape[1])
    return counter.get_total_flops()


def test_weight_gradients_of_the_first_pass_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a layer and passes: 1 forward, 1 + 1 back, 2 + 2 for the second pass; fewer in the first layer."""
    monkeypatch.setattr(unread, "LEAST", 1)
    n, a, b = 7, 300, 200
    model, x = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 3)), torch.randn(n, a)
    first, second = 2 * n * a * b, 2 * n * b * 3
    # Forward, back to the inner activation, J v, and J^T u.
    assert operations(curvature.ggn, model, x) == first + second + second + (first + 2 * second) + (first + 2 * second)
    saved = operations(curvature.ggn, model, x)
    monkeypatch.setattr(unread, "LEAST", 1 << 60)
    assert operations(curvature.ggn, model, x) == saved + first + second


def test_kernels_of_convolutions_and_tables_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    x, counts = torch.randn(3, 2, 5, 5), []
    for least in (1, 1 << 60):
        monkeypatch.setattr(unread, "LEAST", least)
        counts.append(operations(curvature.hessian, model, x))
    assert counts[0] < counts[1]


class Graph(nn.Module):
    """Sums over the neighbours in a graph, by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("edges", torch.eye(4).roll(1, 0).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.sparse.mm(self.edges, self.inner(x).tanh()))


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_with_sparse_matrices_are_taken_as_ever(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = Problem(Graph().double(), nn.CrossEntropyLoss(), [(normal(4, 3), torch.tensor([0, 1, 1, 0]))])
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(unread, "LEAST", least)
        found.append(products(MATRICES[matrix], problem)[0])
    assert torch.equal(*found)


class ByHand(torch.autograd.Function):
    """Looks at what arrives by NumPy."""

    seen: list[float]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ByHand.seen.append(gradient.detach().numpy().sum().item())
        return gradient * 1


def test_behind_custom_functions_all_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "LEAST", 1)
    ByHand.seen = []
    weight = torch.randn(3, 4, requires_grad=True)
    value = (torch.ones(2, 3) @ ByHand.apply(weight)).square().sum()
    (gradient,) = pull_back([value], [weight], [torch.ones(())], create_graph=True, numbers=False)
    assert gradient is not None
    assert ByHand.seen == [pytest.approx(gradient.detach().sum().item(), rel=1e-5)]


def test_what_is_read_has_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uses of a weight are added up, and a use of its transpose is seen through a view."""
    monkeypatch.setattr(unread, "LEAST", 1)
    weight, x = normal(3, 3).requires_grad_(), normal(2, 3)
    value = (x @ weight @ weight.T).sin().sum()
    (plain,) = torch.autograd.grad(value, [weight], create_graph=True)
    (gradient,) = pull_back([value], [weight], [torch.ones((), dtype=x.dtype)], create_graph=True, numbers=False)
    assert gradient is not None and torch.equal(plain, gradient)
    v = normal(3, 3)
    second = [torch.autograd.grad(g, weight, v, retain_graph=True)[0] for g in (plain, gradient)]
    assert torch.equal(*second)
