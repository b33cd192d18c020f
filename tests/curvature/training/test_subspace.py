"""Leading eigenspaces against dense eigendecompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.training.subspace import Subspace, overlap, subspace
from tests.curvature.landscape.test_surface import assert_untouched, snapshot
from tests.curvature.matrices.test_hessian import dense_hessian
from tests.curvature.problems import PROBLEMS

F64 = torch.float64


def projector(vectors: Tensor) -> Tensor:
    return vectors.T @ torch.linalg.inv(vectors @ vectors.T) @ vectors


@pytest.mark.parametrize(("k", "m"), [(3, 3), (2, 4), (4, 2), (1, 6), (6, 6)])
def test_overlap_is_the_product_of_projectors(k: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 6, dtype=F64, generator=generator) for n in (k, m))
    expected = torch.linalg.matrix_norm(projector(u) @ projector(v)).square() / min(k, m)
    found = overlap(u, v)
    assert found.value == pytest.approx(expected.item(), rel=1e-12)
    assert found.angles.cos().square().mean().item() == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 0.3, 1.2, torch.pi / 2])
def test_angles_are_right_at_both_ends(angle: float) -> None:
    e = torch.eye(4, dtype=F64)
    turned = torch.tensor(angle, dtype=F64).cos() * e[1] + torch.tensor(angle, dtype=F64).sin() * e[2]
    found = overlap(e[:2], torch.stack([e[0], turned]))
    assert found.angles.tolist() == pytest.approx([0.0, angle], rel=1e-8, abs=1e-16)
    assert found.value == pytest.approx((1 + torch.tensor(angle, dtype=F64).cos().item() ** 2) / 2)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(2, 3), torch.eye(3), "linearly dependent"),
        (torch.zeros(1, 3), torch.eye(3), "linearly dependent"),
        (torch.eye(3), torch.eye(4), "are .k, P. and .m, P."),
        (torch.ones(3), torch.eye(3), "are .k, P. and .m, P."),
    ],
)
def test_vectors_that_span_nothing_are_refused(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlap(first, second)


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "cnn"])
def test_it_is_the_space_of_the_dense_hessian(name: str) -> None:
    problem = PROBLEMS[name]()
    values, vectors = torch.linalg.eigh(dense_hessian(problem))
    k = 3
    top = vectors[:, -k:].T
    space = subspace(
        problem.model, problem.loss_fn, problem.data, k=k, rtol=1e-9, class_dim=problem.class_dim, progress=False
    )
    (record,) = space.history
    torch.testing.assert_close(record.values, values[-k:].flip(0))
    assert space.vectors is not None and record.converged
    torch.testing.assert_close(projector(space.vectors), projector(top), atol=1e-6, rtol=0)
    sine = torch.linalg.matrix_norm(projector(space.vectors) - projector(top), 2)
    assert sine <= record.error + 1e-12 and record.error < 1e-5
    z, y = torch.cat([problem.model(x) for x, _ in problem.data]), torch.cat([y for _, y in problem.data])
    grads = torch.autograd.grad(problem.loss_fn(z, y), [p for p in problem.model.parameters() if p.requires_grad])
    g = torch.cat([grad.flatten() for grad in grads])
    assert record.gradient_norm == pytest.approx(g.norm().item())
    assert record.share == pytest.approx(((top @ g).norm() / g.norm()).item() ** 2, rel=1e-6)
    torch.testing.assert_close(record.shares, (top.flip(0) @ g).square() / g.square().sum(), atol=1e-6, rtol=1e-6)
    assert record.previous is None and record.first.value == pytest.approx(1)


def quadratic() -> tuple[Any, nn.Module, tuple[Tensor, Tensor]]:
    """Hessian ``diag(8, 2, 1/2)`` times 2/3, whatever the parameters."""
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.ones(1, 3, dtype=F64)
    return (
        model,
        nn.MSELoss(),
        (torch.diag(torch.tensor([8.0, 2.0, 0.5], dtype=F64).sqrt()), torch.zeros(3, 1).double()),
    )


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_quadratic_keeps_its_space_and_the_gradient_is_known(matrix: Any) -> None:
    model, loss_fn, data = quadratic()
    space = Subspace(model, loss_fn, data, k=2, matrix=matrix, rtol=1e-12)
    record = space.update(step=10)
    torch.testing.assert_close(record.values, torch.tensor([16 / 3, 4 / 3], dtype=F64))
    # gradient (16/3, 4/3, 1/3) at (1, 1, 1)
    torch.testing.assert_close(record.shares, torch.tensor([256.0, 16.0], dtype=F64) / 273)
    model.weight.data = torch.tensor([[0.0, 0.0, 3.0]], dtype=F64)
    record = space.update(step=20)
    assert record.share == pytest.approx(0, abs=1e-12)
    assert record.previous is not None and record.previous.value == pytest.approx(1)
    assert [r.step for r in space.history] == [10, 20]


def test_a_turn_is_measured_against_the_last_and_the_first_space() -> None:
    model, loss_fn, (x, y) = quadratic()
    data = [(x, y)]
    space = Subspace(model, loss_fn, data, k=1, rtol=1e-10)
    space.update()
    for angle in (0.2, 0.5):
        c, s = torch.tensor(angle, dtype=F64).cos(), torch.tensor(angle, dtype=F64).sin()
        rotation = torch.eye(3, dtype=F64)
        rotation[:2, :2] = torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
        data[0] = (x @ rotation, y)
        record = space.update()
        assert record.first.angles.item() == pytest.approx(angle, abs=1e-6)
    assert record.previous is not None and record.previous.angles.item() == pytest.approx(0.3, abs=1e-6)


def test_a_warm_start_takes_fewer_products() -> None:
    problem = PROBLEMS["cnn"]()
    space = Subspace(problem.model, problem.loss_fn, problem.data, k=1, class_dim=problem.class_dim)
    cold, warm = space.update(), space.update()
    assert warm.products < cold.products
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)


def test_what_cannot_be_told_apart_has_the_error_one() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    space = subspace(model, nn.MSELoss(), (torch.eye(3, dtype=F64), torch.zeros(3, 1, dtype=F64)), k=1)
    assert space.history[0].error == 1.0  # three equal eigenvalues
    whole = subspace(model, nn.MSELoss(), (torch.eye(3, dtype=F64), torch.zeros(3, 1, dtype=F64)), k=3)
    assert whole.history[0].error == 0.0 and whole.history[0].share == pytest.approx(1)


def test_too_few_products_say_so() -> None:
    problem = PROBLEMS["cnn"]()
    space = subspace(
        problem.model, problem.loss_fn, problem.data, k=2, class_dim=problem.class_dim, rtol=1e-12, max_products=6
    )
    assert not space.history[0].converged


def test_a_gradient_of_zero_has_no_share() -> None:
    model, loss_fn, data = quadratic()
    model.weight.data.zero_()
    assert subspace(model, loss_fn, data, k=2).history[0].share == 0


def test_training_does_not_notice() -> None:
    problem = PROBLEMS["cnn"]()
    before = snapshot(problem.model)
    subspace(problem.model, problem.loss_fn, problem.data, k=2, class_dim=problem.class_dim).update()
    assert_untouched(before, problem.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"k": 4}, "k=4 is more than the 3"),
        ({"matrix": "fisher"}, "is one of hessian, ggn"),
    ],
)
def test_nonsense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subspace(*quadratic(), **options)
