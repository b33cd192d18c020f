"""Block-diagonal operators cover the flat vector, once; places say where."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import solvers
from solvers import BlockDiagonal, Dense, Diagonal, Kronecker, Segment, SolverError, StructureError
from tests.solvers.problems import normal, positive


@dataclass(frozen=True)
class WeightAndBias:
    """A weight and its bias as one ``(out, in + 1)`` tensor, as curvature estimates have it."""

    weight: int
    bias: int
    shape: tuple[int, int]

    def gather(self, x: Tensor) -> Tensor:
        out, inner = self.shape
        weight = x[..., self.weight : self.weight + out * inner].unflatten(-1, self.shape)
        return torch.cat([weight, x[..., self.bias : self.bias + out].unsqueeze(-1)], -1)

    def scatter(self, y: Tensor, out: Tensor) -> None:
        rows, inner = self.shape
        out[..., self.weight : self.weight + rows * inner] = y[..., :-1].flatten(-2)
        out[..., self.bias : self.bias + rows] = y[..., -1]


def joint() -> BlockDiagonal:
    blocks = [Kronecker(positive(2), positive(4)), Diagonal(normal(3).square())]
    return BlockDiagonal(blocks, [WeightAndBias(0, 9, (2, 3)), Segment(6, (3,))], 11)


def test_a_place_may_be_any_selection_of_entries() -> None:
    op = joint()
    x = normal(5, 11)
    torch.testing.assert_close(op @ x, x @ op.to_dense().mT)
    torch.testing.assert_close(op.diagonal(), op.to_dense().diagonal())
    inverse = op.inverse(0.1)
    torch.testing.assert_close(inverse @ (op @ x + 0.1 * x), x)


def test_a_place_is_stored_once_it_is_known() -> None:
    with pytest.raises(StructureError, match=r"WeightAndBias.* cannot be stored"):
        solvers.state(joint())


def test_storable_classes_are_known_by_name() -> None:
    @solvers.storable
    @dataclass(frozen=True)
    class Everywhere:
        shape: tuple[int, ...]

        def gather(self, x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:-1], *self.shape)

        def scatter(self, y: Tensor, out: Tensor) -> None:
            out.copy_(y.reshape(out.shape))

    op = BlockDiagonal([Dense(positive(3))], [Everywhere((3,))], 3)
    again = solvers.from_state(solvers.state(op))
    assert isinstance(again, BlockDiagonal) and again.places == op.places
    with pytest.raises(ValueError, match=r"name Dense is taken"):
        solvers.storable(type("Dense", (), {}))
    with pytest.raises(StructureError, match=r"No stored class 'Unheard'"):
        solvers.from_state({"class": "Unheard"})


def test_a_renamed_class_keeps_the_name_it_is_stored_under() -> None:
    @solvers.storable(name="Formerly")
    @dataclass(frozen=True)
    class Now:
        size: int

        @property
        def shape(self) -> tuple[int, ...]:
            return (self.size,)

        def gather(self, x: Tensor) -> Tensor:
            return x

        def scatter(self, y: Tensor, out: Tensor) -> None:
            out.copy_(y)

    op = BlockDiagonal([Dense(positive(3))], [Now(3)], 3)
    stored = solvers.state(op)
    assert stored["places"] == [{"class": "Formerly", "size": 3}]
    again = solvers.from_state(stored)
    assert isinstance(again, BlockDiagonal) and again.places == op.places


def test_sums_and_products_go_by_block() -> None:
    op = joint()
    assert (
        isinstance(op + op, BlockDiagonal) and isinstance(op @ op, BlockDiagonal) and isinstance(2 * op, BlockDiagonal)
    )


@dataclass(frozen=True)
class Named(Segment):
    name: str = "layer1.weight"


def test_errors_name_the_block() -> None:
    bad = torch.full((2, 2), torch.nan, dtype=torch.float64)
    for matrix, says in ((bad, "holds NaN"), (-positive(2), "is not positive definite")):
        blocks = [Dense(positive(3)), Dense(matrix)]
        op = BlockDiagonal(blocks, [Segment(0, (3,)), Segment(3, (2,))], 5)
        with pytest.raises(SolverError, match=rf"^block 1: .*Dense\(2x2\).* {says}"):
            op.inverse(solver=solvers.Cholesky())
        op = BlockDiagonal(blocks, [Segment(0, (3,)), Named(3, (2,))], 5)
        with pytest.raises(SolverError, match=rf"^layer1.weight: .*Dense\(2x2\).* {says}"):
            op.inverse(solver=solvers.Cholesky())
    with pytest.raises(SolverError, match=r"^layer1.weight: Dense\(2x2\) holds NaN"):
        solvers.diagonalize(BlockDiagonal([Dense(bad)], [Named(0, (2,))], 2))
    with pytest.raises(StructureError, match=r"^block 1: Cholesky cannot invert Kronecker"):
        kron = Kronecker(positive(2), positive(2)).shift(1.0)
        BlockDiagonal([Dense(positive(3)), kron], [Segment(0, (3,)), Segment(3, (2, 2))], 7).inverse(
            solver=solvers.Cholesky()
        )


def test_nested_blocks_are_named_once_each() -> None:
    inner = BlockDiagonal([Dense(-positive(2))], [Segment(0, (2,))], 2)
    op = BlockDiagonal([inner], [Named(0, (2,))], 2)
    for solver in (solvers.Cholesky(), solvers.Fallback(solvers.Cholesky())):
        with pytest.raises(SolverError) as error:
            op.inverse(solver=solver)
        assert str(error.value).startswith("layer1.weight: block 0: ")
        assert not str(error.value).startswith("layer1.weight: block 0: layer1.weight")


def test_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cover 3 entries of a vector of 4. Every entry needs a block"):
        BlockDiagonal([Dense(positive(3))], [Segment(0, (3,))], 4)
    with pytest.raises(ValueError, match=r"as many places"):
        BlockDiagonal([Dense(positive(3))], [], 3)
    with pytest.raises(ValueError, match=r"Block 0, .* is not square"):
        BlockDiagonal([Dense(normal(3, 2))], [Segment(0, (3,))], 3)
    with pytest.raises(ValueError, match=r"one dtype"):
        BlockDiagonal([Dense(positive(1)), Dense(positive(1).float())], [Segment(0, (1,)), Segment(1, (1,))], 2)


def test_operators_are_immutable() -> None:
    with pytest.raises(AttributeError):
        joint().size = 3  # type: ignore[misc]
