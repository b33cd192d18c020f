"""Are products right, or refused in words, where the model is made of more than layers?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding_bag, grid_sample, one_hot, scaled_dot_product_attention
from torch.nn.utils import parametrizations, parametrize

import curvature
import precond
from curvature.losses import AutogradLoss
from curvature.model.pullback import NoSecondDerivativeError

Y = torch.tensor([0, 1, 1, 0])
LOSS = nn.CrossEntropyLoss()


class Model(nn.Module):
    """A function of some inputs and of parts: parameters, modules and buffers."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *x: Any) -> Tensor:
        return self.function(self, *x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def flat(tensors: Any, like: list[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, like, strict=True)]
    )


def references(model: nn.Module, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian, Gauss-Newton matrix and Jacobian, number by number; by a model of operations that can be."""
    params = list(model.parameters())
    z = model(*x)

    def rows(values: list[Tensor]) -> Tensor:
        live = [v for v in values if v.requires_grad]
        grads = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True) for v in live]
        return torch.stack([flat(g, params) for g in grads])

    J = rows(list(z.reshape(-1)))
    slopes = torch.autograd.grad(LOSS(z, Y), params, create_graph=True)
    H = rows([entry for slope in slopes for entry in slope.reshape(-1)])
    p = z.detach().softmax(-1)
    G = sum(j.T @ (q.diag() - q.outer(q)) @ j for j, q in zip(J.reshape(4, 2, -1), p, strict=True)) / 4
    return H, torch.as_tensor(G), J


def check(model: nn.Module, x: Any, reference: nn.Module | None = None) -> None:
    """Every product and matrix of a model against those of one with the same parameters."""
    given = x if isinstance(x, tuple) else (x,)
    H, G, J = references(reference or model, given)
    data, seed = (x, Y), torch.Generator().manual_seed(1)
    v, u = torch.randn(len(H), generator=seed).double(), torch.randn(4, 2, generator=seed).double()
    close = torch.testing.assert_close
    close(curvature.hessian(model, LOSS, data) @ v, H @ v)
    close(curvature.hessian(model, LOSS, data).to_dense(), H)
    close(curvature.hessian(model, LOSS, data, structure="diagonal").to_dense(), H.diagonal().diag())
    close(curvature.ggn(model, LOSS, data) @ v, G @ v)
    close(curvature.ggn(model, LOSS, data).to_dense(), G)
    close(curvature.ggn(model, LOSS, data, structure="dense").to_dense(), G)
    close(curvature.ggn(model, LOSS, data, structure="diagonal").to_dense().diagonal(), G.diagonal())
    close((curvature.jacobian(model, x) @ v).reshape(-1), J @ v)
    close(curvature.jacobian(model, x).adjoint() @ u, J.T @ u.reshape(-1))


# Bags of embeddings --------------------------------------------------------------------------------------------------

INDEX, STARTS = torch.tensor([0, 3, 3, 1, 4, 2, 0]), torch.tensor([0, 2, 2, 6])


def bags(table: Tensor, members: list[Tensor], mode: str, weights: list[Tensor] | None = None) -> Tensor:
    """Bag by bag, by one-hot vectors."""
    rows = []
    for k, bag in enumerate(members):
        vectors = one_hot(bag, len(table)).double() @ table
        if weights is not None:
            vectors = vectors * weights[k].unsqueeze(-1)
        if len(bag) == 0:
            rows.append(torch.zeros(table.shape[1], dtype=torch.float64))
        else:
            rows.append({"sum": vectors.sum(0), "mean": vectors.mean(0), "max": vectors.amax(0)}[mode])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode: str) -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(5, 3, mode=mode).double(), nn.Linear(3, 2).double()
    model = Model(lambda m, i, o: m.head(m.bag(i, o).tanh()), bag=bag, head=head)
    members = [INDEX[0:2], INDEX[2:2], INDEX[2:6], INDEX[6:]]
    plain = Model(lambda m, i, o: m.head(bags(m.bag.weight, members, mode).tanh()), bag=bag, head=head)
    check(model, (INDEX, STARTS), plain)


def test_bags_of_equal_size_with_padding_and_with_the_last_offset() -> None:
    torch.manual_seed(0)
    head, table = nn.Linear(3, 2).double(), weight(5, 3)
    padded = nn.EmbeddingBag(5, 3, padding_idx=1).double()
    padded.weight = table
    x = torch.tensor([[1, 2], [0, 0], [1, 1], [3, 4]])
    model = Model(lambda m, i: m.head(m.bag(i).tanh()), bag=padded, head=head)
    members = [row[row != 1] for row in x]
    check(model, x, Model(lambda m, i: m.head(bags(m.table, members, "mean").tanh()), table=table, head=head))

    last = Model(
        lambda m, i, o: m.head(embedding_bag(i, m.table, o, mode="sum", include_last_offset=True).tanh()),
        table=table,
        head=head,
    )
    members = [INDEX[0:2], INDEX[2:2], INDEX[2:6], INDEX[6:]]
    plain = Model(lambda m, i, o: m.head(bags(m.table, members, "sum").tanh()), table=table, head=head)
    check(last, (INDEX, torch.tensor([0, 2, 2, 6, 7])), plain)


def test_learned_weights_of_the_members_of_a_bag() -> None:
    torch.manual_seed(0)
    parts = {"table": weight(5, 3), "share": weight(5), "head": nn.Linear(3, 2).double()}
    x = torch.tensor([[1, 2], [0, 0], [1, 1], [3, 4]])
    model = Model(
        lambda m, i: m.head(embedding_bag(i, m.table, mode="sum", per_sample_weights=m.share[i]).tanh()), **parts
    )
    check(model, x, Model(lambda m, i: m.head(bags(m.table, list(i), "sum", list(m.share[i])).tanh()), **parts))


# Complex numbers -----------------------------------------------------------------------------------------------------


def spectral(m: Any, x: Tensor) -> Tensor:
    seen = torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.filter), s=(4, 4))
    return m.head(m.scale * seen.mean((1, 2)).unsqueeze(-1).tanh())


def flat_filter(m: Any, x: Tensor) -> Tensor:
    return m.head(m.scale * torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.filter.view(3, 2)), n=4).tanh())


def amplitudes(m: Any, x: Tensor) -> Tensor:
    return m.head((torch.complex(x @ m.real, x @ m.imaginary) * m.phase).abs().square())


@pytest.mark.parametrize("mode", ["auto", "forward"])
def test_parameters_seen_as_complex(mode: Any) -> None:
    torch.manual_seed(0)
    model = Model(spectral, scale=weight(1), filter=weight(4, 3, 2), head=nn.Linear(1, 2).double())
    x = torch.randn(4, 4, 4).double()
    check(model, x)
    other = Model(flat_filter, scale=weight(1), filter=weight(6), head=nn.Linear(4, 2).double())
    check(other, x[0])
    dense = curvature.ggn(model, LOSS, (x, Y), structure="dense")
    v = torch.randn(dense.shape[1]).double()
    torch.testing.assert_close(curvature.ggn(model, LOSS, (x, Y), mode=mode) @ v, dense @ v)


def test_complex_numbers_inside() -> None:
    torch.manual_seed(0)
    phase = torch.randn(3, dtype=torch.complex128)
    model = Model(amplitudes, real=weight(3, 3), imaginary=weight(3, 3), phase=phase, head=nn.Linear(3, 2).double())
    check(model, torch.randn(4, 3).double())


@pytest.mark.parametrize("function", [curvature.hessian, curvature.ggn, curvature.fisher, curvature.coverage])
def test_what_has_no_place_in_a_real_vector(function: Any) -> None:
    model = Model(lambda m, x: (x.to(m.w.dtype) @ m.w).abs(), w=nn.Parameter(torch.ones(3, 2, dtype=torch.complex128)))
    with pytest.raises(TypeError, match=r"w is complex .*view_as_real"):
        function(model, LOSS, (torch.randn(4, 3).double(), Y))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet: .* Run the model once"):
        function(nn.Sequential(nn.LazyLinear(2)), LOSS, (torch.randn(4, 3), Y))


def squared(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).abs().square().mean()


def stepped(optimizer: Any, model: nn.Module, loss_fn: nn.Module, data: Any) -> None:
    loss_fn(model(data[0]), data[1]).backward()
    optimizer.step()


def solved(optimizer: Any, model: nn.Module, loss_fn: nn.Module, data: Any) -> None:
    optimizer.step(lambda: loss_fn(model(data[0]), data[1]))


DOORS_OF_OUTPUTS: dict[str, Callable[..., Any]] = {
    "hessian": curvature.hessian,
    "ggn": curvature.ggn,
    "kfac": partial(curvature.fisher, structure="kfac", kind="empirical"),
    "per_sample_gradients": curvature.per_sample_gradients,
    "report": partial(curvature.report, sections=["trace"]),
    "jacobian": lambda model, loss_fn, data: curvature.jacobian(model, data[0]),
    "KFAC": lambda model, loss_fn, data: stepped(precond.KFAC(model, loss_fn, lr=0.1), model, loss_fn, data),
    "HessianFree": lambda model, loss_fn, data: solved(precond.HessianFree(model, loss_fn), model, loss_fn, data),
}


@pytest.mark.parametrize("door", DOORS_OF_OUTPUTS)
def test_complex_outputs_are_refused_and_their_parts_served(door: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2, dtype=torch.complex128)
    loss_fn = AutogradLoss(squared, reduction="mean")
    model = Model(lambda m, x: torch.complex(*m.net(x).chunk(2, -1)), net=net)
    with pytest.raises(TypeError, match=r"the model's output is complex \(torch.complex128\).*torch.view_as_real"):
        found = DOORS_OF_OUTPUTS[door](model, loss_fn, (x, y))
        _ = found @ torch.zeros(16).double()
    if door == "hessian":
        alone = curvature.hessian(model, squared, (x, y)).to_dense()  # needs no output
        parts = Model(lambda m, x: torch.view_as_real(torch.complex(*m.net(x).chunk(2, -1))), net=net)
        joined = AutogradLoss(
            lambda z, y: squared(torch.view_as_complex(z), torch.view_as_complex(y)), reduction="mean"
        )
        torch.testing.assert_close(curvature.hessian(parts, joined, (x, torch.view_as_real(y))).to_dense(), alone)


# Sparse tensors ------------------------------------------------------------------------------------------------------

RING = torch.eye(4).double() + torch.eye(4).double().roll(1, 0)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_buffers(layout: str) -> None:
    torch.manual_seed(0)
    parts = {"inner": nn.Linear(3, 3).double(), "head": nn.Linear(3, 2).double()}
    model = Model(lambda m, x: m.head(m.ring @ m.inner(x).tanh()), ring=getattr(RING, layout)(), **parts)
    plain = Model(lambda m, x: m.head(m.ring @ m.inner(x).tanh()), ring=RING, **parts)
    check(model, torch.randn(4, 3).double(), plain)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_learned_entries_of_a_sparse_matrix_have_no_second_derivative_in_torch() -> None:
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    parts = {"edges": edges, "strength": weight(4), "inner": nn.Linear(3, 3).double(), "head": nn.Linear(3, 2).double()}

    def sparse(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.sparse.mm(torch.sparse_coo_tensor(m.edges, m.strength, (4, 4)), m.inner(x).tanh()))

    def dense(m: Any, x: Tensor) -> Tensor:
        return m.head(one_hot(m.edges[0], 4).double().T @ (m.strength.unsqueeze(-1) * m.inner(x).tanh()[m.edges[1]]))

    x = torch.randn(4, 3).double()
    _, G, _ = references(Model(dense, **parts), (x,))
    model = Model(sparse, **parts)
    for operator in (curvature.hessian(model, LOSS, (x, Y)), curvature.ggn(model, LOSS, (x, Y))):
        with pytest.raises(NoSecondDerivativeError, match="product with a sparse tensor whose entries depend on param"):
            operator @ torch.ones(len(G)).double()
    torch.testing.assert_close(curvature.ggn(model, LOSS, (x, Y), structure="dense").to_dense(), G)


# Fused kernels -------------------------------------------------------------------------------------------------------


def attention(m: Any, x: Tensor) -> Tensor:
    return m.head(m.attention(x, x, x, need_weights=m.plain)[0].mean(1))


def fused_by_force(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.project(x).chunk(3, -1)
    with sdpa_kernel(SDPBackend.MATH if m.plain else SDPBackend.FLASH_ATTENTION):
        return m.head(scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).mean((1, 2)))


@pytest.mark.parametrize("function", [attention, fused_by_force])
def test_fused_attention(function: Any) -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(4, 2).double(), torch.randn(4, 3, 4).double()
    inner = nn.MultiheadAttention(4, 2, batch_first=True) if function is attention else nn.Linear(4, 12)
    parts = {"attention" if function is attention else "project": inner.double(), "head": head}
    model, plain = Model(function, **parts), Model(function, **parts)
    model.plain, plain.plain = False, True
    check(model, x, plain)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrence(kind: Any) -> None:
    torch.manual_seed(0)
    parts = {"inner": kind(3, 2, batch_first=True).double(), "head": nn.Linear(2, 2).double()}
    check(Model(lambda m, x: m.head(m.inner(x)[0][:, -1]), **parts), torch.randn(4, 3, 3).double())


# Parametrizations, views, in-place operations ------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def written_out(m: Any, x: Tensor) -> Tensor:
    g, v = m.inner.parametrizations.weight.original0, m.inner.parametrizations.weight.original1
    return m.head((x @ (g * v / v.square().sum(1, keepdim=True).sqrt()).T + m.inner.bias).tanh())


def test_parametrizations() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3).double()
    function: Any = lambda m, x: m.head(m.inner(x).tanh())  # noqa: E731
    inner, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    parametrizations.weight_norm(inner)
    check(Model(function, inner=inner, head=head), x, Model(written_out, inner=inner, head=head))
    spectral_norm = parametrizations.spectral_norm(nn.Linear(3, 3).double())
    check(Model(function, inner=spectral_norm, head=head).eval(), x)
    symmetric = nn.Linear(3, 3).double()
    parametrize.register_parametrization(symmetric, "weight", Symmetric())
    check(Model(function, inner=symmetric, head=head), x)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.inner(x).tanh_().clone()
    h[:, 0] = x[:, 1]
    h[:, 1] *= 2
    return m.head(h.t().contiguous().view(3, 4).t().tanh())


def test_views_and_operations_in_place() -> None:
    torch.manual_seed(0)
    check(Model(in_place, inner=nn.Linear(3, 3).double(), head=nn.Linear(3, 2).double()), torch.randn(4, 3).double())


# Functions with a backward of their own ------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnce(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeInNumpy(Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * np.square(x.detach().numpy()) * g.detach().numpy())


def test_functions_with_a_backward_of_their_own() -> None:
    torch.manual_seed(0)
    parts = {"inner": nn.Linear(3, 3).double(), "head": nn.Linear(3, 2).double()}
    x = torch.randn(4, 3).double()
    plain = Model(lambda m, x: m.head(m.inner(x) ** 3), **parts)
    check(Model(lambda m, x: m.head(Cube.apply(m.inner(x))), **parts), x, plain)
    G = references(plain, (x,))[1]
    for function, words in ((CubeOnce, "differentiated only once"), (CubeInNumpy, "leaves autograd")):
        model = Model(lambda m, x, function=function: m.head(function.apply(m.inner(x))), **parts)
        for operator in (curvature.hessian(model, LOSS, (x, Y)), curvature.ggn(model, LOSS, (x, Y))):
            with pytest.raises(NoSecondDerivativeError, match=words):
                operator @ torch.ones(20).double()
        torch.testing.assert_close(curvature.ggn(model, LOSS, (x, Y), structure="dense").to_dense(), G)


def test_a_kernel_without_a_second_derivative_is_named() -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.head(torch.cdist(m.inner(x), m.centers)),
        inner=nn.Linear(3, 3).double(),
        centers=weight(3, 3),
        head=nn.Linear(3, 2).double(),
    )
    data = (torch.randn(4, 3).double(), Y)
    with pytest.raises(NoSecondDerivativeError, match=r"only once \(_cdist_backward\)"):
        curvature.hessian(model, LOSS, data) @ torch.ones(29).double()
    curvature.ggn(model, LOSS, data, structure="dense")  # needs first derivatives only
    warp = Model(
        lambda m, x: m.head(grid_sample(x, m.grid.tanh().expand(4, -1, -1, -1), align_corners=False).flatten(1)),
        grid=weight(1, 2, 2, 2),
        head=nn.Linear(4, 2).double(),
    )
    check(warp, torch.randn(4, 1, 3, 3).double())


# Compiled models -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compiled(model: nn.Sequential, how: str) -> Iterator[nn.Module]:
    """The model compiled in one of three ways, with a backend that makes graphs with a backward of their own."""
    try:
        if how == "wrapped":
            yield torch.compile(model, backend="aot_eager")  # type: ignore[misc]
        else:
            (model if how == "in place" else model[0]).compile(backend="aot_eager")
            yield model
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_models(how: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3).double()
    H, G, J = references(plain, (x,))
    data = [(x[:1], Y[:1]), (x[1:], Y[1:])]
    v = torch.randn(len(H)).double()
    with compiled(plain, how) as model:
        before = model(x)
        torch.testing.assert_close(curvature.hessian(model, LOSS, data) @ v, H @ v)
        torch.testing.assert_close(curvature.ggn(model, LOSS, data) @ v, G @ v)
        torch.testing.assert_close((curvature.jacobian(model, x) @ v).reshape(-1), J @ v)
        torch.testing.assert_close(curvature.ggn(model, LOSS, data, structure="diagonal").diagonal(), G.diagonal())
        assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_model() -> None:
    """Its buffers can be set one by one only."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(4, 3).double()
    traced = torch.jit.trace(plain, x)
    before = [b.clone() for b in traced.buffers()]
    H, G, _ = references(plain, (x,))
    v = torch.randn(len(H)).double()
    torch.testing.assert_close(curvature.hessian(traced, LOSS, (x, Y)) @ v, H @ v)
    torch.testing.assert_close(curvature.ggn(traced, LOSS, (x, Y)) @ v, G @ v)
    assert all(map(torch.equal, traced.buffers(), before))


# Restrictions --------------------------------------------------------------------------------------------------------


def test_a_module_as_the_restriction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = (torch.randn(4, 3).double(), Y)
    for function in (curvature.hessian, curvature.ggn):
        by_module = function(model, LOSS, data, params=model[2]).to_dense()
        torch.testing.assert_close(by_module, function(model, LOSS, data, params="2.*").to_dense())
        both = function(model, LOSS, data, params=[model[0], "2.bias"]).to_dense()
        assert len(both) == 14
    with pytest.raises(ValueError, match="params= names a Linear, which has no trainable parameter of the model"):
        curvature.ggn(model, LOSS, data, params=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="names, globs, parameters or modules, not 1"):
        curvature.ggn(model, LOSS, data, params=[1])
