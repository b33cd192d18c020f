"""Structures of the Gauss-Newton and Fisher matrices as parts of the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from solvers import BlockDiagonal, Dense, Eigh, LowRank, Woodbury
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem, normal

TOLERANCE = 1e-10
KINDS = ["exact", "empirical"]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-300)
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def make(problem: Problem, kind: Any, structure: Any, **options: Any) -> Any:
    return curvature.fisher(
        problem.model,
        problem.loss_fn,
        problem.data,
        kind=kind,
        structure=structure,
        class_dim=problem.class_dim,
        progress=False,
        **options,
    )


def parts(operator: BlockDiagonal) -> list[Tensor]:
    """Flat indices of each block."""
    entries = torch.arange(operator.size)
    return [place.gather(entries) for place in operator.places]


@pytest.fixture(params=sorted(PROBLEMS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


@pytest.fixture
def small() -> Problem:
    return PROBLEMS["mlp_ce"]()


@pytest.mark.parametrize("kind", KINDS)
def test_each_structure_is_its_part_of_the_dense_matrix(problem: Problem, kind: str) -> None:
    expected = reference.curvature(problem, kind)
    assert_close(make(problem, kind, "dense").to_dense(), expected)
    assert_close(make(problem, kind, "low_rank").to_dense(), expected)
    layer = make(problem, kind, "layer")
    for block, index in zip(layer.blocks, parts(layer), strict=True):
        index = index.flatten()
        assert_close(block.to_dense(), expected[index][:, index])
    unit = make(problem, kind, "unit")
    for block, index in zip(unit.blocks, parts(unit), strict=True):
        if isinstance(block, Dense):
            rows = index.reshape(-1, index.shape[-1])
            matrices = block.matrix.reshape(len(rows), rows.shape[1], rows.shape[1])
            # All units of a layer at once: one whose gradients cancel is rounding errors alone.
            assert_close(matrices, torch.stack([expected[row][:, row] for row in rows]))
        else:
            assert_close(block.diagonal(), expected.diagonal()[index])


def test_layer_blocks_hold_weight_and_bias_and_cover_everything(problem: Problem) -> None:
    layer = make(problem, "mc", "layer")
    covered = torch.cat([index.flatten() for index in parts(layer)]).sort().values
    assert torch.equal(covered, torch.arange(layer.size))


def test_layer_blocks_invert_through_the_operator(small: Problem) -> None:
    layer, v = make(small, "exact", "layer"), normal(43)
    expected = torch.linalg.solve(layer.to_dense() + 0.1 * torch.eye(43).double(), v)
    assert_close(layer.inverse(damping=0.1) @ v, expected)
    assert_close(layer.inverse(damping=0.1, solver=Eigh()) @ v, expected)
    assert len(layer.blocks) == 2 and layer.blocks[0].in_shape == (5, 5)


def test_low_rank_inverts_by_woodbury(small: Problem) -> None:
    low, v = make(small, "exact", "low_rank"), normal(43)
    assert isinstance(low, LowRank) and low.rank == 15  # five examples, three outputs
    expected = torch.linalg.solve(low.to_dense() + 0.1 * torch.eye(43).double(), v)
    assert_close(low.inverse(damping=0.1, solver=Woodbury()) @ v, expected)


@pytest.mark.parametrize("structure", ["dense", "low_rank", "layer", "unit", "diagonal", "kfac", "ekfac", "full"])
def test_every_structure_of_ggn_and_of_each_reduction(structure: Any) -> None:
    problem, summed = PROBLEMS["mlp_ce"](), PROBLEMS["mlp_ce_sum"]()
    mean = curvature.ggn(problem.model, problem.loss_fn, problem.data, structure=structure)
    total = curvature.ggn(problem.model, summed.loss_fn, problem.data, structure=structure)
    assert_close(total.to_dense(), 5 * mean.to_dense())
    exact = make(problem, "exact", structure)
    assert torch.equal(mean.to_dense(), exact.to_dense())
    sampled = curvature.ggn(problem.model, problem.loss_fn, problem.data, structure=structure, kind="mc")
    assert sampled.shape == exact.shape and not torch.allclose(sampled.to_dense(), exact.to_dense())


@pytest.mark.parametrize("structure", ["dense", "low_rank", "layer", "unit"])
def test_sampled_structures_are_unbiased(structure: Any, small: Problem) -> None:
    exact = make(small, "exact", structure).to_dense().trace()
    for samples in (1, 4):
        traces = torch.stack(
            [
                make(small, "mc", structure, samples=samples, generator=torch.Generator().manual_seed(seed))
                .to_dense()
                .trace()
                for seed in range(15)
            ]
        )
        assert abs(traces.mean() - exact) < 4 * traces.std() / 15**0.5


@pytest.mark.parametrize("structure", ["layer", "unit"])
def test_estimators_restore_their_state(structure: str, small: Problem) -> None:
    from curvature.structures.layer import DenseEstimator
    from curvature.structures.unit import UnitEstimator

    operator = make(small, "exact", structure)
    matrix = operator.blocks[0].op.matrix if structure == "layer" else operator.blocks[0].matrix
    block = curvature.Block("0", operator.places[0].block.parts)
    made = DenseEstimator(block, 100) if structure == "layer" else UnitEstimator(block)
    assert not made.ready
    with pytest.raises(RuntimeError, match="no statistics yet"):
        made.operator()
    made.load_state_dict({"mean": {"weight": 1.0, "value": matrix}})
    assert torch.equal(made.operator().to_dense(), operator.blocks[0].to_dense())
    state = made.state_dict()
    assert state["mean"]["weight"] == 1.0 and torch.equal(state["mean"]["value"], matrix)


def test_what_does_not_fit_is_refused_with_its_size(small: Problem) -> None:
    with pytest.raises(ValueError, match=r"0\.bias has 25 parameters, .* has 625 entries; max_size=20"):
        make(small, "exact", "layer", max_size=20)
    with pytest.raises(ValueError, match=r"the units of block .*, \(5, 5\), have matrices of 125 entries"):
        make(small, "exact", "unit", max_size=11)
    with pytest.raises(ValueError, match=r"the dense matrix of 43 parameters takes .* GiB; memory= allows"):
        make(small, "exact", "dense", memory=10000)
    with pytest.raises(ValueError, match=r"the root of this 43x43 matrix has more than 9 rows"):
        make(small, "exact", "low_rank", memory=1000)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make(small, "exact", "dense", max_size=3)


def test_gradient_covariance(small: Problem) -> None:
    arguments = (small.model, small.loss_fn, small.data)
    second = reference.empirical_fisher(small)
    rows = per_example(small)
    centered = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    assert_close(rows.T @ rows / len(rows), second)
    for structure in ("full", "dense", "layer", "diagonal"):
        keep = make(small, "exact", structure).to_dense() != 0 if structure in ("layer", "diagonal") else 1
        uncentered = curvature.gradient_covariance(*arguments, structure=structure, centered=False)
        assert_close(uncentered.to_dense(), second * keep)
        result = curvature.gradient_covariance(*arguments, structure=structure)
        assert_close(result.to_dense(), centered * keep)
    with pytest.raises(ValueError, match="centered"):
        curvature.gradient_covariance(*arguments, structure="kfac")


def per_example(problem: Problem) -> Tensor:
    """``(N, P)`` by a loop."""
    rows = []
    loss = nn.CrossEntropyLoss()
    for x, y in problem.data:
        for x_n, y_n in reference.examples(x, y):
            gradient = torch.autograd.grad(loss(problem.model(x_n), y_n), list(problem.model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def test_covariance_of_masked_and_weighted_terms() -> None:
    problem = PROBLEMS["mlp_ce_all_options"]()
    arguments = (problem.model, problem.loss_fn, problem.data)
    model = problem.model
    z, y = reference.dataset_outputs(problem, model)
    rows = []
    total = reference.term_weight(problem, z, y)
    for t in range(len(z)):
        if y[t] == problem.loss_fn.ignore_index:
            continue
        term = reference.summed(problem.loss_fn)(z[t : t + 1], y[t : t + 1])
        gradient = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    g = torch.stack(rows)
    g = g - g.mean(0)
    assert_close(curvature.gradient_covariance(*arguments).to_dense(), total * g.T @ g)
