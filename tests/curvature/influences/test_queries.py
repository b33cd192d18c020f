"""Many queries: at low rank, with the error that is stated, and in groups that fit into memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import solvers
from curvature.influences import products
from solvers import BlockDiagonal, Dense
from tests.curvature.influences.test_influence import flat_gradients, some_matrix
from tests.curvature.matrices.test_per_sample import LEADING, assert_close
from tests.curvature.problems import PROBLEMS, Problem, normal

SINGLE = [name for name in LEADING if not isinstance(PROBLEMS[name]().loss_fn, curvature.losses.SumOfLosses)]


def estimated(problem: Problem, **options: Any) -> BlockDiagonal:
    C = curvature.ggn(
        problem.model, problem.loss_fn, problem.data, class_dim=problem.class_dim, progress=False, **options
    )
    assert isinstance(C, BlockDiagonal)
    return C


def nearest(matrices: Tensor, rank: int) -> Tensor:
    """Of rank at most that, unless the factors would hold more numbers than the matrix."""
    if matrices.dim() < 3 or rank * sum(matrices.shape[-2:]) >= matrices.shape[-2] * matrices.shape[-1]:
        return matrices
    U, s, Vh = torch.linalg.svd(matrices)
    return U[..., :rank] @ torch.diag_embed(s[..., :rank]) @ Vh[..., :rank, :]


@pytest.mark.parametrize(
    ("name", "cheaper"),
    [(name, True) for name in SINGLE] + [("cnn", False), ("mlp_ce", False), ("language_model", False)],
)
def test_scores_at_low_rank(name: str, cheaper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gradients are formed, or only what positions give."""
    monkeypatch.setattr(products, "_positions_are_cheaper", lambda samples, rows: cheaper)
    problem = PROBLEMS[name]()
    C, gradients = estimated(problem, structure="ekfac"), flat_gradients(problem)
    expected, bound = (torch.zeros(len(gradients), len(gradients), dtype=torch.float64) for _ in range(2))
    dropped: dict[str, Tensor] = {}
    everything = torch.zeros(len(gradients), dtype=torch.float64)
    for block, place in zip(C.blocks, C.places, strict=True):
        dense, g = block.to_dense(), place.gather(gradients)
        damped = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
        rows = torch.linalg.solve(damped, g.flatten(1).T).T.reshape(g.shape)
        short = nearest(rows, 1)
        lost = (rows - short).flatten(1).norm(dim=1)
        dropped[place.name] = lost  # type: ignore[attr-defined]
        expected += short.flatten(1) @ g.flatten(1).T
        bound += lost.unsqueeze(1) * g.flatten(1).norm(dim=1)
        everything += rows.flatten(1).square().sum(1)
    options: Any = {"curvature": C, "damping": 0.1, "class_dim": problem.class_dim, "progress": False}
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    found = curvature.influence(*arguments, query_rank=1, by_position=cheaper, **options)
    assert_close(found.scores, expected)
    for block_name, lost in dropped.items():
        assert torch.allclose(found.dropped[block_name], lost, rtol=1e-9, atol=1e-12)
    assert_close(found.truncation.square() * everything, sum(lost.square() for lost in dropped.values()))  # type: ignore[arg-type]
    full = curvature.influence(*arguments, **options)
    assert ((full.scores - found.scores).abs() <= bound + 1e-12).all()
    whole = curvature.influence(*arguments, query_rank=1000, **options)
    assert_close(whole.scores, full.scores)
    assert not whole.truncation.any()


def test_a_truncated_query_of_full_rank_is_whole() -> None:
    """A layer that sees one position has gradients of rank one; a diagonal curvature of ones leaves them that."""
    problem = PROBLEMS["mlp_ce"]()
    C = estimated(problem, structure="ekfac")
    ones = C.map(lambda block: solvers.Diagonal(torch.ones(block.in_shape, dtype=torch.float64)))
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    found = curvature.influence(*arguments, curvature=ones, damping=0.0, query_rank=1)
    gradients = flat_gradients(problem)
    assert_close(found.scores, gradients @ gradients.T)
    assert found.truncation.max() < 1e-12


@pytest.mark.parametrize("structure", ["ekfac", "diagonal"])
def test_biases_of_their_own(structure: str) -> None:
    """The blocks of the pass over the examples are those of the curvature."""
    problem = PROBLEMS["mlp_ce"]()
    options = {"bias": "separate"} if structure == "ekfac" else {}
    C = estimated(problem, structure=structure, **options)
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    found = curvature.influence(*arguments, curvature=C, damping=0.1, query_rank=1000)
    assert set(found.by_block) == {place.name for place in C.places}  # type: ignore[attr-defined]
    gradients = flat_gradients(problem)
    damped = C.to_dense() + 0.1 * torch.eye(C.size, dtype=torch.float64)
    assert_close(found.scores, gradients @ torch.linalg.solve(damped, gradients.T))


def test_blocks_that_the_curvature_does_not_have() -> None:
    problem = PROBLEMS["mlp_ce"]()
    gradients = flat_gradients(problem)
    size = gradients.shape[1]
    C = BlockDiagonal((Dense(some_matrix(size)),), (solvers.Segment(0, (size,)),), size)
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    found = curvature.influence(*arguments, curvature=C, damping=0.1, query_rank=1)
    damped = some_matrix(size) + 0.1 * torch.eye(size, dtype=torch.float64)
    assert_close(found.scores, gradients @ torch.linalg.solve(damped, gradients.T))


@pytest.mark.parametrize("queries", [1, 2, 3, 100])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("name", ["mlp_ce", "language_model"])
def test_groups_that_fit_into_memory(name: str, rank: int | None, queries: int) -> None:
    problem = PROBLEMS[name]()
    C = estimated(problem, structure="ekfac")
    options: Any = {"curvature": C, "class_dim": problem.class_dim, "progress": False, "query_rank": rank}
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    whole = curvature.influence(*arguments, by_position=True, **options)
    stored = sum(nearest_size(tuple(block.in_shape), rank) for block in C.blocks)  # numbers of a query
    visits: list[int] = []
    visit = curvature.matrices.problem.Problem.visit

    def counted(self: Any, use: Any, title: str, **more: Any) -> Any:
        visits.append(title.startswith("influence"))
        return visit(self, use, title, **more)

    curvature.matrices.problem.Problem.visit = counted  # type: ignore[method-assign]
    try:
        found = curvature.influence(*arguments, by_position=True, memory=8 * queries * stored, **options)
    finally:
        curvature.matrices.problem.Problem.visit = visit  # type: ignore[method-assign]
    assert sum(visits) == number_of_groups([len(y) for _, y in problem.data], queries)
    for mine, theirs in ((found.by_block, whole.by_block), (found.by_position, whole.by_position)):
        assert list(mine) == list(theirs)
        for key in mine:
            assert_close(mine[key], theirs[key])
    assert_close(found.scores, whole.scores)
    for key in found.dropped:
        assert torch.allclose(found.dropped[key], whole.dropped[key], rtol=1e-9, atol=1e-12)


def number_of_groups(sizes: list[int], most: int) -> int:
    groups, room = 1, most
    for size in sizes:
        while size:
            part = min(size, most)
            if part > room:
                groups, room = groups + 1, most
            room, size = room - part, size - part
    return groups


def nearest_size(shape: tuple[int, ...], rank: int | None) -> int:
    size = torch.Size(shape).numel()
    if rank is None or len(shape) < 2:
        return size
    return min(size, size // (shape[-1] * shape[-2]) * rank * (shape[-1] + shape[-2]))


def test_what_does_not_fit_is_refused() -> None:
    problem = PROBLEMS["mlp_ce"]()
    C = estimated(problem, structure="ekfac")
    arguments = (problem.model, problem.loss_fn, problem.data, problem.data)
    with pytest.raises(ValueError, match=rf"one query takes {8 * C.size} bytes, memory= allows {8 * C.size - 1}"):
        curvature.influence(*arguments, curvature=C, memory=8 * C.size - 1)
    with pytest.raises(ValueError, match="query_rank is at least 1"):
        curvature.influence(*arguments, curvature=C, query_rank=0)
    with pytest.raises(ValueError, match="has no blocks"):
        curvature.influence(*arguments, curvature=Dense(some_matrix(C.size)), damping=0.1, query_rank=1)
    flattened = PROBLEMS["language_model"]()
    x, y = flattened.data[0]
    C = estimated(flattened, structure="ekfac")

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = flattened.model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).flatten(0, 1)

    given: Any = {"curvature": C, "memory": 8 * C.size}
    with pytest.raises(ValueError, match="cannot be split"):
        curvature.influence(Flat(), flattened.loss_fn, (x, y.flatten()), (x, y.flatten()), **given)


def test_examples_in_another_order_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x, y = normal(8, 3), torch.randint(3, (8,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    class Restless:
        """Another order each time, after some passes."""

        def __init__(self, calm: int) -> None:
            self.calm = calm

        def __iter__(self) -> Any:
            self.calm -= 1
            return iter(batches if self.calm >= 0 else batches[::-1])

    C = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="ekfac")
    given = {"curvature": C, "memory": 8 * 12}  # a pass for each query
    for calm in (0, 10):
        curvature.influence(model, nn.CrossEntropyLoss(), Restless(calm), (x[:2], y[:2]), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in another order"):  # two looks come first
        curvature.influence(model, nn.CrossEntropyLoss(), Restless(1), (x[:2], y[:2]), **given)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="came in another order"):
        curvature.influence(model, nn.CrossEntropyLoss(), Restless(3), (x[:2], y[:2]), **given)  # type: ignore[arg-type]
