"""Is the matrix of residuals at points that of its definition, in every structure?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from curvature import residual_ggn
from curvature.residuals.layer_rows import layer_rows
from precond import PointwiseResidual, laplacian
from solvers import Tikhonov, eigsh, power

F64 = torch.float64


def network(middle=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), middle or nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1)).double()


def equation(u, x):
    return laplacian(u, x) + u(x) * x[0]


def boundary(u, x):
    return u(x) - x[1]


def problem(model, count=5):
    points = torch.rand(count, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    return [PointwiseResidual(model, equation, points, 0.7), PointwiseResidual(model, boundary, points[:3], 2.0)]


def by_definition(model, names=None):
    """J^T J of both kinds, point by point, derivatives by reverse mode alone."""
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    total = 0.0
    for residual in problem(model):
        for x in residual.points:

            def at(values, x=x, residual=residual):
                def u(point):
                    return functional_call(model, values, (point[None],))[0]

                if residual.function is boundary:
                    return residual.weight * (u(x) - x[1])
                return residual.weight * (jacrev(jacrev(u))(x).diagonal(dim1=-2, dim2=-1).sum(-1) + u(x) * x[0])

            rows = jacrev(at)(values)
            J = torch.cat([rows[n].reshape(1, -1) for n in values], 1)
            total = total + J.mT @ J
    return total


@pytest.mark.parametrize("middle", [None, nn.LayerNorm(4)], ids=["linear layers", "a norm"])
def test_the_matrix_its_diagonal_and_its_products(middle):
    model = network(middle)
    if middle is not None:
        model[4] = nn.Linear(4, 1).double()
    expected = by_definition(model)
    full, dense = residual_ggn(problem(model)), residual_ggn(problem(model), structure="dense")
    torch.testing.assert_close(dense.to_dense(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(full.to_dense(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        residual_ggn(problem(model), structure="diagonal").to_dense().diagonal(),
        expected.diagonal(),
        rtol=1e-10,
        atol=0,
    )
    top = eigsh(full, k=2).values
    torch.testing.assert_close(top.sort().values, torch.linalg.eigvalsh(expected)[-2:], rtol=1e-7, atol=0)


def test_kfac_of_one_point_is_the_blocks_of_the_matrix():
    """There one product of Kronecker factors is the block, which pins every scale."""
    model = network()
    one = PointwiseResidual(model, boundary, torch.rand(1, 2, dtype=F64), 3.0)
    exact = residual_ggn(one, structure="dense").to_dense()
    found = residual_ggn(one, structure="kfac").to_dense()
    ends = [12, 27, 31]  # of the layers in the flat vector
    for start, end in zip([0, *ends], ends, strict=False):
        torch.testing.assert_close(found[start:end, start:end], exact[start:end, start:end], rtol=1e-11, atol=1e-13)
        assert not found[start:end, end:].any() and not found[end:, start:end].any()


def test_kfac_of_several_kinds_keeps_the_diagonal_in_the_common_basis():
    model = network()
    parts = problem(model)
    C = residual_ggn(parts, structure="kfac")
    rows = [r for part in parts for r in layer_rows(part, list(model.parameters()))[1]]
    for block, weight in zip(C.blocks, (model[0].weight, model[2].weight, model[4].weight), strict=True):
        factors = [r.factors() for r in rows if r.weight is weight]
        assert len(factors) == 3  # the Laplacian, the value beside it, and the boundary
        QA = torch.linalg.eigh(sum(B.trace() * A for A, B in factors))[1]
        QB = torch.linalg.eigh(sum(A.trace() * B for A, B in factors))[1]
        Q = torch.kron(QB, QA)
        diagonal = (Q.mT @ sum(torch.kron(B, A) for A, B in factors) @ Q).diagonal()
        dense = block.to_dense().reshape(len(Q), len(Q))
        torch.testing.assert_close(dense, Q @ torch.diag(diagonal) @ Q.mT, rtol=1e-9, atol=1e-11)
    g = torch.randn(31, dtype=F64)
    solved = power(Tikhonov(0.1)(C), -1) @ g
    torch.testing.assert_close(solved, torch.linalg.solve(C.to_dense() + 0.1 * torch.eye(31, dtype=F64), g))


def test_some_parameters():
    model = network()
    names = {"2.weight", "2.bias", "4.bias"}
    expected = by_definition(model, names)
    for structure in ("full", "dense"):
        found = residual_ggn(problem(model), structure=structure, params=["2.*", "4.bias"])
        torch.testing.assert_close(found.to_dense(), expected, rtol=1e-10, atol=1e-12)
    model[0].requires_grad_(False)
    frozen = residual_ggn(problem(model), structure="kfac")
    assert frozen.shape == (19, 19) and len(frozen.blocks) == 2


def test_parameters_without_influence_are_zero():
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=F64)))
    for structure in ("full", "dense", "diagonal", "kfac"):
        C = residual_ggn(problem(model), structure=structure).to_dense()
        assert C.shape == (33, 33)
        where = C.diagonal() == 0
        assert where[:2].all() and not where[2:].any()  # first in the flat vector, as named_parameters has it


def test_what_it_cannot_have_is_refused():
    model = network()
    with pytest.raises(TypeError, match="residuals at points"):
        residual_ggn([torch.zeros(3)])
    with pytest.raises(ValueError, match="structure is one of full, dense, diagonal, kfac; got 'ekfac'"):
        residual_ggn(problem(model), structure="ekfac")
    with pytest.raises(ValueError, match="all of them of one model"):
        residual_ggn([*problem(model), *problem(network())])
    with pytest.raises(ValueError, match="all of them of one model"):
        residual_ggn([])
    with pytest.raises(ValueError, match="all in linear layers"):
        residual_ggn(problem(model), structure="kfac", params=["2.bias"])
