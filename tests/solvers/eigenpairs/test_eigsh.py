"""Eigenpairs and singular triplets: right, with residuals that tell the truth, in few products, and resumable."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import solvers
from solvers import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigenpairs,
    Kronecker,
    LinearOperator,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotPositiveDefiniteError,
    NotSymmetricError,
    Segment,
)
from solvers.eigenpairs.result import Which
from solvers.eigenpairs.storage import Storage
from tests.solvers.counting import Counting, known_by_products
from tests.solvers.problems import normal, positive, symmetric, with_spectrum

ENDS: tuple[Which, ...] = ("LA", "SA", "LM", "BE")


def laplacian(*shape: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Finite differences on a grid with zero boundary, and all of its eigenvalues, descending.

    On each axis they are ``2 - 2 cos(pi j / (m + 1))``; on the grid their sums.
    """

    def product(x: Tensor) -> Tensor:
        grid = x.reshape(-1, *shape)
        result = 2 * len(shape) * grid
        for axis, m in enumerate(shape, 1):
            result.narrow(axis, 1, m - 1).sub_(grid.narrow(axis, 0, m - 1))
            result.narrow(axis, 0, m - 1).sub_(grid.narrow(axis, 1, m - 1))
        return result.reshape(x.shape)

    sums = torch.zeros(1, dtype=torch.float64)
    for m in shape:
        axis_values = 2 - 2 * torch.cos(math.pi * torch.arange(1, m + 1, dtype=torch.float64) / (m + 1))
        sums = (sums.unsqueeze(1) + axis_values).flatten()
    return product, sums.sort(descending=True).values


def selected(matrix: Tensor, k: int, which: Which) -> np.ndarray:
    """The wanted eigenvalues, from all of them."""
    values = np.linalg.eigvalsh(matrix.numpy())
    match which:
        case "LA":
            return values[::-1][:k]
        case "SA":
            return values[:k]
        case "LM":
            return values[np.argsort(-np.abs(values), kind="stable")][:k]
    return np.concatenate([values[: k // 2], values[len(values) - (k + 1) // 2 :]])


def assert_true(pairs: Eigenpairs, matrix: Tensor, which: Which, rtol: float = 1e-8) -> None:
    """Against all eigenvalues, and the residuals against the definition."""
    k, scale = len(pairs.values), float(torch.linalg.matrix_norm(matrix, 2)) or 1.0
    vectors = pairs.vectors.reshape(k, -1)
    expected = torch.from_numpy(selected(matrix, k, which).copy())
    torch.testing.assert_close(pairs.values / scale, expected / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    residuals = ((vectors @ matrix - pairs.values.unsqueeze(1) * vectors) ** 2).sum(1).sqrt()
    torch.testing.assert_close(pairs.residuals / scale, residuals / scale, rtol=1e-3, atol=1e-14)
    assert pairs.converged.all()
    assert (residuals <= (rtol * expected.abs()).clamp(min=1e-14 * scale)).all()


# Right answers


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_indefinite(which: Which, k: int) -> None:
    matrix = symmetric(150)
    assert_true(solvers.eigsh(known_by_products(matrix), k, which), matrix, which)


@pytest.mark.parametrize("which", ENDS)
def test_repeated_eigenvalues_are_all_found(which: Which) -> None:
    rest = np.linspace(-1, 1, 180).tolist()
    matrix = with_spectrum([3.0] * 4 + [2.5] * 3 + [2.0] * 2 + [-3.5] * 3 + [-2.7] * 4 + rest)
    assert_true(solvers.eigsh(known_by_products(matrix), 8, which), matrix, which)


@pytest.mark.parametrize(
    "values", [[1.0] * 60, [0.0] * 60, [1.0] * 12 + [0.0] * 88, [2.0, 1.0] + [0.0] * 80, [-1.0] * 30 + [2.0] * 30]
)
@pytest.mark.parametrize("which", ENDS)
def test_few_distinct_eigenvalues(values: list[float], which: Which) -> None:
    matrix = with_spectrum(values)
    assert_true(solvers.eigsh(known_by_products(matrix), 10, which), matrix, which)


def test_degenerate_grid() -> None:
    # A cube has its eigenvalues up to six times; SciPy at rtol=1e-8 misses some of them.
    product, values = laplacian(12, 12, 12)
    counting = Counting(product, 12**3)
    pairs = solvers.eigsh(counting.op, 12)
    torch.testing.assert_close(pairs.values, values[:12], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("which", ENDS)
def test_all_eigenvalues_of_a_small_one(n: int, which: Which) -> None:
    matrix = symmetric(n)
    pairs = solvers.eigsh(known_by_products(matrix), n, which)
    assert_true(pairs, matrix, which)
    assert pairs.products <= 2 * n


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    matrix = symmetric(100)
    pairs = solvers.eigsh(known_by_products((matrix * scale).to(dtype)), 5, "LM")
    assert pairs.values.dtype == pairs.vectors.dtype == dtype and pairs.converged.all()
    expected = torch.from_numpy(selected(matrix, 5, "LM").copy())
    # float32: products round by 6e-8 sqrt(100), relative to the norm
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(pairs.values.double() / scale, expected, rtol=tolerance, atol=0)


def test_badly_scaled_spectrum() -> None:
    values = [1e30, 1e25, 1.0, *np.logspace(-30, -10, 60).tolist()]  # eps times the norm is 2e14
    pairs = solvers.eigsh(Diagonal(torch.tensor(values, dtype=torch.float64)), 2)
    torch.testing.assert_close(pairs.values, torch.tensor(values[:2], dtype=torch.float64), rtol=1e-9, atol=0)


def operators() -> list[LinearOperator]:
    blocks = [Dense(positive(6)), Diagonal(normal(4))]
    return [
        Dense(positive(3, 4)),
        Kronecker(positive(4), positive(5)),
        Kronecker(positive(4), positive(5)).shift(0.3),
        Kronecker(positive(3), positive(5)) + 2.0 * Kronecker(positive(3, seed=1), positive(5, seed=2)),
        BlockDiagonal(blocks, [Segment(4, (6,)), Segment(0, (4,))], 10),
        Diagonal(normal(3, 2, 2)),
    ]


@pytest.mark.parametrize("op", operators(), ids=repr)
def test_vectors_have_the_shape_of_the_operator(op: LinearOperator) -> None:
    pairs = solvers.eigsh(op, 3)
    assert tuple(pairs.vectors.shape) == (3, *op.in_shape)
    assert_true(pairs, op.to_dense(), "LA")
    shape = (3, *(1,) * len(op.in_shape))
    torch.testing.assert_close(op @ pairs.vectors, pairs.values.reshape(shape) * pairs.vectors, rtol=0, atol=1e-6)


# Few products


@pytest.mark.parametrize("shape", [(100, 200), (20000,)])
def test_no_more_products_than_scipy(shape: tuple[int, ...]) -> None:
    n = 20000
    if len(shape) == 2:
        product, values = laplacian(*shape)
    else:
        values = torch.exp(-torch.arange(n, dtype=torch.float64) / 50)
        diagonal = values.flip(0)

        def product(x: Tensor) -> Tensor:
            return x * diagonal

    counting = Counting(product, n)
    pairs = solvers.eigsh(counting.op, 10)
    assert pairs.products == counting.vectors
    torch.testing.assert_close(pairs.values, values[:10], rtol=1e-8, atol=0)
    vectors = pairs.vectors
    residuals = torch.linalg.vector_norm(product(vectors) - pairs.values.unsqueeze(1) * vectors, dim=1)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-3, atol=1e-14)
    assert pairs.converged.all() and (residuals <= 1e-8 * values[0]).all()
    scipys = Counting(product, n)
    start = normal(n).numpy()
    found = scipy.sparse.linalg.eigsh(scipys.op.to_scipy(), 10, which="LA", v0=start)[0]
    np.testing.assert_allclose(np.sort(found)[::-1], values[:10].numpy(), rtol=1e-8)
    assert counting.vectors <= scipys.vectors


def test_preconditioner_takes_a_fraction_of_the_products() -> None:
    n = 2000
    diagonal = torch.logspace(0, 5, n, dtype=torch.float64)

    def product(x: Tensor) -> Tensor:
        return diagonal * x + 0.2 * (x.roll(1, -1) + x.roll(-1, -1))

    expected = np.linalg.eigvalsh(product(torch.eye(n, dtype=torch.float64)).numpy())[:5]
    plain, helped = Counting(product, n), Counting(product, n)
    pairs = solvers.eigsh(helped.op, 5, "SA", preconditioner=Diagonal(1 / diagonal))
    assert pairs.products == helped.vectors and pairs.converged.all()
    np.testing.assert_allclose(pairs.values.numpy(), expected, rtol=1e-8)
    with pytest.warns(NotConvergedWarning):
        solvers.eigsh(plain.op, 5, "SA", max_products=8 * helped.vectors)
    assert helped.vectors < 300


def test_kronecker_preconditioner() -> None:
    # A sum of Kronecker products with the inverse of its larger term, as K-FAC is for a Gauss-Newton matrix.
    main = Kronecker(with_spectrum(np.logspace(-3, 0, 20).tolist()), with_spectrum(np.logspace(-3, 1, 30).tolist()))
    op = (main + 0.05 * Kronecker(positive(20), Diagonal(normal(30).square() * 1e-3))).shift(1e-5)
    pairs = solvers.eigsh(op, 4, "SA", preconditioner=main.shift(1e-4).inverse())
    expected = np.linalg.eigvalsh(op.to_dense().numpy())[:4]
    np.testing.assert_allclose(pairs.values.numpy(), expected, rtol=1e-7)
    assert pairs.converged.all() and pairs.products < 500


def test_lobpcg_without_preconditioner_and_with_copies() -> None:
    matrix = with_spectrum([1.0] * 3 + [2.0] * 2 + np.linspace(3, 10, 95).tolist())
    assert_true(solvers.eigsh(known_by_products(matrix), 5, "SA", method="lobpcg"), matrix, "SA")
    small = positive(3)
    assert_true(solvers.eigsh(known_by_products(small), 2, "SA", method="lobpcg"), small, "SA")


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_warm_start(method: str) -> None:
    matrix = with_spectrum([*np.linspace(0, 1, 300).tolist(), *np.linspace(1.1, 1.5, 5).tolist()])
    nearby = matrix + 1e-6 * symmetric(305)
    which: Which = "SA"
    cold = solvers.eigsh(known_by_products(-nearby), 5, which, method=method)  # type: ignore[arg-type]
    before = solvers.eigsh(known_by_products(-matrix), 5, which, method=method)  # type: ignore[arg-type]
    warm = solvers.eigsh(known_by_products(-nearby), 5, which, method=method, v0=before.vectors)  # type: ignore[arg-type]
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-11, atol=0)
    assert warm.products < cold.products


def test_search_for_copies_can_be_left_out() -> None:
    matrix = with_spectrum([1.5**-i for i in range(100)])
    with_search, without = Counting(lambda x: x @ matrix, 100), Counting(lambda x: x @ matrix, 100)
    solvers.eigsh(with_search.op, 5)
    assert_true(solvers.eigsh(without.op, 5, search_copies=False), matrix, "LA")
    assert without.vectors < with_search.vectors


# Stopping and going on


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_resumed_run_is_the_uninterrupted_one(method: str) -> None:
    matrix = with_spectrum(np.linspace(1, 30, 200).tolist())
    op = known_by_products(matrix)
    whole = solvers.eigsh(op, 4, "SA", method=method)  # type: ignore[arg-type]
    state, products = None, 20
    while True:
        try:
            part = solvers.eigsh(op, 4, "SA", method=method, state=state, max_products=products, on_failure="raise")  # type: ignore[arg-type]
            break
        except NotConvergedError:
            with pytest.warns(NotConvergedWarning, match=r"Go on with eigsh\(op, state=pairs.state\)"):
                stopped = solvers.eigsh(op, 4, "SA", method=method, state=state, max_products=products)  # type: ignore[arg-type]
            assert stopped.products <= products + 8  # a step of LOBPCG is one block
            assert not stopped.complete
            file = io.BytesIO()
            torch.save(stopped.state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            assert all(isinstance(value, Tensor) for value in state.values())
            products += 37
    assert products > 60, "it was never interrupted"
    assert torch.equal(part.values, whole.values)
    assert torch.equal(part.vectors, whole.vectors)
    assert part.products == whole.products


def test_checkpoints() -> None:
    matrix = with_spectrum(np.linspace(1, 30, 200).tolist())
    states: list[dict[str, Tensor]] = []
    whole = solvers.eigsh(known_by_products(matrix), 4, checkpoint=states.append)
    assert len(states) > 5
    again = solvers.eigsh(known_by_products(matrix), 4, state=states[3])
    assert torch.equal(again.vectors, whole.vectors)


@pytest.mark.parametrize("basis_size", [6, 40, 200])
def test_a_finished_run_goes_on_to_a_smaller_tolerance(basis_size: int) -> None:
    matrix = with_spectrum(np.linspace(1, 30, 200).tolist())
    loose = solvers.eigsh(known_by_products(matrix), 4, rtol=1e-2, basis_size=basis_size)
    same = solvers.eigsh(known_by_products(matrix), 4, rtol=1e-2, state=loose.state)
    assert torch.equal(same.vectors, loose.vectors) and same.products == loose.products and same.complete
    tight = solvers.eigsh(known_by_products(matrix), 4, rtol=1e-10, state=loose.state)
    assert_true(tight, matrix, "LA", rtol=1e-10)


# Vectors in files


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors_in_files_are_those_in_memory(which: Which, dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = with_spectrum(np.linspace(-20, 30, 200).tolist()).to(dtype)
    op, options = known_by_products(matrix), {"basis_size": 20, "rtol": 1e-4}
    in_memory = solvers.eigsh(op, 4, which, **options)  # type: ignore[arg-type]
    in_files = solvers.eigsh(op, 4, which, storage=tmp_path, **options)  # type: ignore[arg-type]
    assert in_memory.products > 60, "there were restarts"
    for name in ("values", "vectors", "residuals", "converged", "products"):
        assert bool(torch.as_tensor(getattr(in_memory, name) == getattr(in_files, name)).all()), name
    assert str(tmp_path) in str(in_files.vectors.untyped_storage().filename)
    assert not any(tmp_path.iterdir()), "files have no name"
    again = solvers.eigsh(op, 4, which, storage=tmp_path, state=in_files.state, **options)  # type: ignore[arg-type]
    assert torch.equal(again.vectors, in_memory.vectors)


def test_checkpoints_of_vectors_in_files(tmp_path: Path) -> None:
    matrix = with_spectrum(np.linspace(1, 30, 200).tolist())
    states: list[dict[str, Tensor]] = []

    def keep(state: dict[str, Tensor]) -> None:
        states.append({name: value.clone() for name, value in state.items()})

    whole = solvers.eigsh(known_by_products(matrix), 4, storage=tmp_path, checkpoint=keep)
    again = solvers.eigsh(known_by_products(matrix), 4, state=states[3])
    assert torch.equal(again.vectors, whole.vectors)


def test_storage_that_cannot_be_used(tmp_path: Path) -> None:
    op = known_by_products(positive(40))
    with pytest.raises(NotADirectoryError, match="is no folder"):
        solvers.eigsh(op, 3, storage=tmp_path / "absent")
    with pytest.raises(ValueError, match="storage= serves Lanczos"):
        solvers.eigsh(op, 3, "SA", method="lobpcg", storage=tmp_path)
    huge = solvers.Function(lambda x: x, (1 << 50,), symmetric=True)
    with pytest.raises(OSError, match=r"has no room for 5 vectors, 2.1e\+07 GiB"):
        Storage(huge.shape[0], torch.float32, huge.device, tmp_path).rows(5)
    assert not any(tmp_path.iterdir())


def test_foreign_states_are_refused() -> None:
    op = known_by_products(positive(40))
    state = solvers.eigsh(op, 3).state
    with pytest.raises(ValueError, match="The state is that of k=3, which='LA', method='lanczos'"):
        solvers.eigsh(op, 4, state=state)
    with pytest.raises(ValueError, match="operator of size 40, not of"):
        solvers.eigsh(known_by_products(positive(41)), 3, state=state)
    with pytest.raises(ValueError, match="leave generator out"):
        solvers.eigsh(op, 3, state=state, generator=torch.Generator())


def test_unconverged_pairs_say_so() -> None:
    matrix = with_spectrum(np.linspace(1, 30, 300).tolist())
    with pytest.warns(NotConvergedWarning, match=r"eigsh of Function\(300x300\): \d+ of 5 pairs have not converged"):
        pairs = solvers.eigsh(known_by_products(matrix), 5, max_products=40)
    assert pairs.products <= 40 and not pairs.converged.all()
    residuals = torch.linalg.vector_norm(pairs.vectors @ matrix - pairs.values.unsqueeze(1) * pairs.vectors, dim=1)
    torch.testing.assert_close(pairs.residuals, residuals)


def test_tolerances_are_honoured() -> None:
    matrix = with_spectrum(np.linspace(1, 30, 300).tolist())
    loose, tight = (solvers.eigsh(known_by_products(matrix), 3, rtol=rtol) for rtol in (1e-3, 1e-10))
    assert (loose.residuals <= 1e-3 * loose.values).all() and (tight.residuals <= 1e-10 * tight.values).all()
    assert loose.products < tight.products
    assert (solvers.eigsh(known_by_products(matrix), 3, rtol=0.0, atol=0.1).residuals <= 0.1).all()
    exact = solvers.eigsh(known_by_products(matrix), 3, rtol=0.0)
    assert exact.converged.all() and (exact.residuals < 1e-12).all(), "rounding is the least that can be asked for"


def test_own_random_numbers() -> None:
    op = known_by_products(positive(60))
    before = torch.get_rng_state()
    first, second = solvers.eigsh(op, 3), solvers.eigsh(op, 3)
    other = solvers.eigsh(op, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.vectors, second.vectors) and not torch.equal(first.vectors, other.vectors)


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_non_finite_is_refused_by_name(bad: float, method: str) -> None:
    matrix = positive(60)
    matrix[3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the products of Function\(60x60\)"):
        solvers.eigsh(known_by_products(matrix), 3, "SA", method=method)  # type: ignore[arg-type]


def test_wrong_operators() -> None:
    with pytest.raises(NotSymmetricError, match=r"eigsh needs a symmetric operator.*symmetric=True"):
        solvers.eigsh(known_by_products(positive(30), symmetric=False))
    with pytest.raises(ValueError, match="needs a square operator"):
        solvers.eigsh(known_by_products(normal(3, 4), symmetric=False))
    with pytest.raises(ValueError, match="has 5 eigenvalues; k=10"):
        solvers.eigsh(known_by_products(positive(5)))
    with pytest.raises(ValueError, match="has 0 eigenvalues"):
        solvers.eigsh(known_by_products(torch.zeros(0, 0, dtype=torch.float64)), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": "SM"}, "which is one of LA, SA, LM, BE.*op.inverse"),
        ({"method": "arnoldi"}, "method is 'lanczos' or 'lobpcg'"),
        ({"preconditioner": Diagonal(torch.ones(30).double())}, "LOBPCG finds the smallest"),
        ({"which": "SA", "preconditioner": Diagonal(torch.ones(3).double())}, "preconditioner acts on"),
        ({"method": "lanczos", "preconditioner": Diagonal(torch.ones(30).double())}, "no use for a preconditioner"),
        ({"max_products": 5}, "max_products=5 cannot give 10 pairs"),
        ({"basis_size": 10}, "basis_size=10 leaves no room"),
        ({"v0": torch.zeros(30)}, "v0 needs a finite vector that is not zero"),
        ({"v0": torch.ones(31)}, "v0 for Function"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.eigsh(known_by_products(positive(30)), 10, **arguments)


def test_indefinite_preconditioner_is_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="preconditioner is not positive definite"):
        solvers.eigsh(known_by_products(positive(50)), 3, "SA", preconditioner=Diagonal(-torch.ones(50).double()))


# Singular values


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (30, 30), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_singular_triplets(shape: tuple[int, int], scale: float) -> None:
    matrix = normal(*shape)
    k = min(4, *shape)
    triplets = solvers.svds(known_by_products(matrix * scale, symmetric=False), k)
    expected = torch.from_numpy(np.linalg.svd(matrix.numpy())[1][:k].copy())
    torch.testing.assert_close(triplets.values / scale, expected, rtol=1e-12, atol=0)
    forward = torch.linalg.vector_norm(triplets.right @ matrix.mT - expected.unsqueeze(1) * triplets.left, dim=1)
    backward = torch.linalg.vector_norm(triplets.left @ matrix - expected.unsqueeze(1) * triplets.right, dim=1)
    torch.testing.assert_close(triplets.residuals / scale, torch.hypot(forward, backward), rtol=1e-3, atol=1e-12)
    assert triplets.converged.all()
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(triplets.left @ triplets.left.mT, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(triplets.right @ triplets.right.mT, eye, rtol=0, atol=1e-8)


def test_singular_triplets_of_tensors() -> None:
    op = Kronecker(normal(4, 3), normal(2, 5))
    triplets = solvers.svds(op, 2)
    assert tuple(triplets.left.shape) == (2, 4, 2) and tuple(triplets.right.shape) == (2, 3, 5)
    expected = torch.from_numpy(np.linalg.svd(op.to_dense().numpy())[1][:2].copy())
    torch.testing.assert_close(triplets.values, expected, rtol=1e-12, atol=0)


def test_singular_values_out_of_reach_say_so() -> None:
    values = np.array([1.0, 1e-3, 1e-12])
    u, v = np.linalg.qr(normal(20, 3).numpy())[0], np.linalg.qr(normal(20, 3, seed=1).numpy())[0]
    op = known_by_products(torch.from_numpy((u * values) @ v.T), symmetric=False)
    with pytest.warns(NotConvergedWarning, match=r"svds of Function\(20x20\): 1 of 3 triplets.*sqrt\(eps\)"):
        triplets = solvers.svds(op, 3, rtol=1e-9, atol=1e-18)
    assert triplets.converged.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="has 20 singular values; k=21"):
        solvers.svds(op, 21)
