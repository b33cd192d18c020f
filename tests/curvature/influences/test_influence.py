"""Influence against the definition, and against training again without the example."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

import curvature
import solvers
from solvers import Dense, Tikhonov
from tests.curvature.matrices.test_per_sample import LEADING, assert_close, example_gradients
from tests.curvature.problems import PROBLEMS, Problem, normal


def flat_gradients(problem: Problem) -> Tensor:
    """Per-sample gradients of all batches by autograd, ``(N, P)``."""
    rows = [example_gradients(problem, x, y) for x, y in problem.data]
    return torch.cat([torch.cat([g.reshape(len(g), -1) for g in row.values()], dim=1) for row in rows])


def some_matrix(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator)
    return root @ root.T / size


@pytest.mark.parametrize("name", LEADING)
def test_scores_are_the_definition(name: str) -> None:
    problem = PROBLEMS[name]()
    if isinstance(problem.loss_fn, curvature.losses.SumOfLosses):
        pytest.skip("the gradients of single examples are those of one loss")
    gradients = flat_gradients(problem)
    matrix = some_matrix(gradients.shape[1])
    expected = gradients @ torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), gradients.T)
    options: Any = {"curvature": Dense(matrix), "damping": 0.1, "class_dim": problem.class_dim, "progress": False}
    found = curvature.influence(problem.model, problem.loss_fn, problem.data, problem.data, by_position=True, **options)
    assert_close(found.scores, expected)
    assert_close(torch.stack(list(found.by_block.values())).sum(0), expected)
    for block, split in found.by_position.items():
        assert_close(split.sum(-1), found.by_block[block])
    plain = curvature.influence(problem.model, problem.loss_fn, problem.data, problem.data, **options)
    assert_close(plain.scores, expected)
    own = curvature.self_influence(problem.model, problem.loss_fn, problem.data, **options)
    assert_close(own, expected.diagonal())


def test_positions_are_those_of_the_training_example() -> None:
    """What each token contributes, from the definition: the gradient of a linear layer is a sum over positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)).double()
    x, y = torch.randint(6, (5, 7)), torch.randint(3, (5, 7))
    y[0, 4:] = -100
    loss_fn = nn.CrossEntropyLoss()
    query = (x[:2], y[:2])
    size = sum(p.numel() for p in model.parameters())
    found = curvature.influence(
        model, loss_fn, (x, y), query, curvature=Dense(some_matrix(size)), damping=0.1, class_dim=-1, by_position=True
    )
    problem = Problem(model, loss_fn, [query], class_dim=-1)
    rows = torch.linalg.solve(
        some_matrix(size) + 0.1 * torch.eye(size, dtype=torch.float64), flat_gradients(problem).T
    ).T
    weight, bias = rows[:, 24:36].view(2, 3, 4), rows[:, 36:]
    a = model[0](x).detach()
    logits = model[1](a).detach().requires_grad_()
    nn.CrossEntropyLoss(reduction="sum")(logits.movedim(-1, 1), y).backward()
    assert logits.grad is not None
    expected = torch.einsum("nso,qoi,nsi->qns", logits.grad, weight, a) + torch.einsum("nso,qo->qns", logits.grad, bias)
    assert_close(found.by_position["1.weight+1.bias"], expected)
    assert not found.by_position["1.weight+1.bias"][:, 0, 4:].any(), "masked tokens take no part"


def fit(x: Tensor, y: Tensor, ridge: float, start: nn.Module | None = None) -> nn.Linear:
    """Ridge-regularised logistic regression of the summed loss, by Newton's method to rounding."""
    model = copy.deepcopy(start) if start is not None else nn.Linear(x.shape[1], 3).double()
    names = list(dict(model.named_parameters()))
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        values = {n: v.view(s) for n, v, s in zip(names, flat.split(sizes), shapes, strict=True)}
        z = functional_call(model, values, (x,))
        return nn.functional.cross_entropy(z, y, reduction="sum") + ridge / 2 * flat.square().sum()

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for _ in range(8):
        flat = flat - torch.linalg.solve(hessian(loss)(flat), torch.func.grad(loss)(flat))
    with torch.no_grad():
        for p, v in zip(model.parameters(), flat.split(sizes), strict=True):
            p.copy_(v.view_as(p))
    assert isinstance(model, nn.Linear)
    return model


def test_scores_predict_training_again_without_the_example() -> None:
    torch.manual_seed(0)
    x, y = normal(400, 4), torch.randint(3, (400,))
    ridge, loss_fn = 1.0, nn.CrossEntropyLoss(reduction="sum")
    model = fit(x, y, ridge)
    query = (normal(1, 4), torch.tensor([1]))
    H = curvature.hessian(model, loss_fn, (x, y)).to_dense()
    found = curvature.influence(model, loss_fn, (x, y), query, curvature=Dense(H), damping=Tikhonov(ridge))
    assert found.total == 1.0
    before = loss_fn(model(query[0]), query[1])
    actual = []
    for n in range(12):
        keep = torch.arange(400) != n
        without = fit(x[keep], y[keep], ridge, start=model)
        actual.append(loss_fn(without(query[0]), query[1]) - before)
    predicted = found.scores[0, :12] / found.total
    # First order in 1/400 of the data: what remains is second order, some percent of the largest change.
    error = (predicted - torch.stack(actual)).abs().max() / torch.stack(actual).abs().max()
    assert error < 0.05
    assert torch.corrcoef(torch.stack([predicted, torch.stack(actual)]))[0, 1] > 0.999


def test_the_default_is_ekfac_with_a_tenth_of_the_mean_eigenvalue() -> None:
    problem = PROBLEMS["cnn"]()
    arguments = (problem.model, problem.loss_fn, problem.data)
    C = curvature.ggn(*arguments, structure="ekfac", kind="mc", progress=False)
    assert isinstance(C, solvers.BlockDiagonal)
    dense = C.to_dense()
    for block, place in zip(C.blocks, C.places, strict=True):
        index = place.gather(torch.arange(len(dense))).flatten()
        dense[index, index] += 0.1 * torch.linalg.eigvalsh(block.to_dense()).mean()
    gradients = flat_gradients(problem)
    expected = gradients @ torch.linalg.solve(dense, gradients.T)
    assert_close(curvature.influence(*arguments, problem.data, progress=False).scores, expected)
    stored = solvers.from_state(solvers.state(C))
    assert_close(curvature.influence(*arguments, problem.data, curvature=stored, progress=False).scores, expected)


def test_a_batch_that_does_not_use_a_layer_gets_zero_there() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) if x.shape[1] == 2 else self.large(x)

    torch.manual_seed(0)
    model = Branch().double()
    train = [(normal(2, n), torch.randint(2, (2,))) for n in (2, 3, 2)]
    found = curvature.influence(
        model, nn.CrossEntropyLoss(), train, train, curvature=Dense(torch.eye(14, dtype=torch.float64)), damping=0.0
    )
    assert found.scores.shape == (6, 6)
    assert not found.by_block["small.weight+small.bias"][:, 2:4].any()
    assert found.by_block["small.weight+small.bias"][0, 0] > 0


def test_what_makes_no_sense_is_refused() -> None:
    problem = PROBLEMS["mlp_ce"]()
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    with pytest.raises(ValueError, match="parameters that count"):
        curvature.influence(*arguments, curvature=Dense(some_matrix(3)), damping=0.1)
    with pytest.raises(solvers.SingularMatrixError):
        curvature.influence(*arguments, curvature=Dense(torch.zeros(2, 2, dtype=torch.float64)), damping=0.0)
