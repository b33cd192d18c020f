"""Are the functional approximations what posteriors' conventions and the definitions say?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

pytest.importorskip("laplace")

from curvature.laplace import GGNBackend
from curvature.laplace.posteriors import Transform, dense_ggn, diag_ggn, ekfac_ggn, kfac_ggn
from tests.curvature.laplace.problems import toy
from tests.curvature.problems import F64, normal

MODULES = {"diag": diag_ggn, "dense": dense_ggn, "kfac": kfac_ggn}


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def forward_of(model: nn.Module) -> Any:
    def forward(params: Any, batch: Any) -> tuple[Tensor, Any]:
        output = functional_call(model, params, batch[0])
        return output, output.mean()

    return forward


def categorical(z: Tensor, batch: Any) -> Tensor:
    return -nn.functional.cross_entropy(z, batch[1], reduction="sum")


def normal_density(z: Tensor, batch: Any) -> Tensor:
    """Of mean and log-scale, both of them outputs: no loss that anything knows; its Hessian depends on the target."""
    # Squares keep the Hessian positive: the variances have a floor above the residuals.
    return -((z[:, 0] - batch[1].sum(-1)) ** 2 / 2 + nn.functional.softplus(z[:, 1]) + z[:, 2].cosh()).sum()


def problem(likelihood: str = "categorical") -> tuple[nn.Module, dict[str, Tensor], Any, Any, Any]:
    """A model, its parameters, the two functions, and a batch."""
    model, x, y = toy("classification" if likelihood == "categorical" else "regression")
    params = {name: p.detach() for name, p in model.named_parameters()}
    log_likelihood = categorical if likelihood == "categorical" else normal_density
    return model, params, forward_of(model), log_likelihood, (x, y)


def definition(params: dict[str, Tensor], forward: Any, log_likelihood: Any, batch: Any) -> Tensor:
    """``J^T H J`` with the Hessian in all outputs of all examples at once; parameters in sorted order."""
    names = sorted(params)
    z = forward(params, batch)[0]
    J = jacrev(lambda p: forward(p, batch)[0])(params)
    J = torch.cat([J[name].reshape(z.numel(), -1) for name in names], dim=1)
    H = hessian(lambda z: -log_likelihood(z, batch))(z).reshape(z.numel(), z.numel())
    return (J.T @ H @ J).detach()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_dense_and_diagonal_by_definition(likelihood: str) -> None:
    """Sums over the batches, of unequal sizes, on top of the precision to start from."""
    _, params, forward, log_likelihood, (x, y) = problem(likelihood)
    G = definition(params, forward, log_likelihood, (x, y))
    dense, diag = dense_ggn.build(forward, log_likelihood, 0.5), diag_ggn.build(forward, log_likelihood, 0.5)
    states: list[Any] = [dense.init(params), diag.init(params)]
    for batch in ((x[:5], y[:5]), (x[5:], y[5:])):
        states = [t.update(s, batch)[0] for t, s in zip((dense, diag), states, strict=True)]
    close(states[0].prec, G + 0.5 * torch.eye(len(G), dtype=F64))
    close(flat(states[1].prec_diag), G.diagonal() + 0.5)
    assert list(states[1].prec_diag) == list(params) and states[0].step == states[1].step == 2
    assert isinstance(dense, Transform)


def test_precisions_to_start_from() -> None:
    _, params, forward, log_likelihood, batch = problem()
    G = definition(params, forward, log_likelihood, batch)
    start = normal(len(G), len(G))
    state, _ = dense_ggn.update(dense_ggn.init(params, start), batch, forward, log_likelihood)
    close(state.prec, G + start)
    tree = {name: torch.rand_like(p) for name, p in params.items()}
    diag, _ = diag_ggn.update(diag_ggn.init(params, tree), batch, forward, log_likelihood)
    close(flat(diag.prec_diag), G.diagonal() + flat(tree))
    numbers = {name: 0.1 * i for i, name in enumerate(params)}
    kfac = kfac_ggn.init(params, numbers)
    expected = torch.cat([torch.full((params[n].numel(),), numbers[n], dtype=F64) for n in sorted(params)])
    close(kfac.precision().to_matrix(), torch.diag(expected))


def test_kfac_has_the_factors_of_the_backend() -> None:
    """Which are held to their definition in other tests; here in sorted order, over batches of unequal sizes."""
    model, params, forward, log_likelihood, (x, y) = problem()
    transform = kfac_ggn.build(forward, log_likelihood, 0.7)
    state = transform.init(params)
    for batch in ((x[:5], y[:5]), (x[5:], y[5:])):
        state, _ = transform.update(state, batch)
    block = GGNBackend(model, "classification").kron(x, y, N=len(x))[1].to_matrix()
    sizes = {name: p.numel() for name, p in params.items()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    order = torch.cat([torch.arange(starts[name], starts[name] + sizes[name]) for name in sorted(params)])
    close(state.precision().to_matrix(), block[order][:, order] + 0.7 * torch.eye(len(block), dtype=F64))
    assert state.step == 2


def test_kfac_of_a_linear_model_is_the_matrix_of_its_weight() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3, bias=False).double(), normal(9, 4), normal(9, 3)
    params, forward = {"weight": model.weight.detach()}, forward_of(model)

    def log_likelihood(z: Tensor, batch: Any) -> Tensor:
        return -((z - batch[1]) ** 2).sum() / 2

    state, _ = kfac_ggn.update(kfac_ggn.init(params), (x, y), forward, log_likelihood)
    close(state.factors.to_matrix(), torch.kron(torch.eye(3, dtype=F64), x.T @ x))


def test_ekfac_has_the_diagonal_of_the_matrix_in_the_eigenvectors_of_kfac() -> None:
    _, params, forward, log_likelihood, (x, y) = problem("normal")
    G = definition(params, forward, log_likelihood, (x, y))
    kfac, _ = kfac_ggn.update(kfac_ggn.init(params, 0.3), (x, y), forward, log_likelihood)
    transform = ekfac_ggn.build(forward, log_likelihood, kfac)
    state = transform.init(params)
    close(state.precision().to_matrix(), kfac.precision().to_matrix())  # so far
    for batch in ((x[:5], y[:5]), (x[5:], y[5:])):
        state, _ = transform.update(state, batch)
    got, start = state.precision().to_matrix(), 0
    for name in sorted(params):
        piece = next(p for p in state.basis.pieces if p.part.name == name)
        Q = piece.basis.to_dense()
        block = slice(start, start + params[name].numel())
        start = block.stop
        expected = Q @ torch.diag((Q.T @ G[block, block] @ Q).diagonal() + 0.3) @ Q.T
        close(got[block, block], expected, 1e-9)
    assert state.step == 2 and len(state.spectra) == 4


@pytest.mark.parametrize("kind", MODULES)
def test_samples(kind: str) -> None:
    """Shapes, the mean, and the covariance: the map from the noise to the samples times its transpose."""
    _, params, forward, log_likelihood, batch = problem()
    module: Any = MODULES[kind]
    transform = module.build(forward, log_likelihood, 0.8)
    state, _ = transform.update(transform.init(params), batch)
    for shape in ((), (3,), (2, 3), torch.Size([4])):
        draws = module.sample(state, shape, torch.Generator().manual_seed(0))
        assert {name: d.shape for name, d in draws.items()} == {n: (*shape, *p.shape) for n, p in params.items()}
    P = len(flat(params))
    matrix = {
        "diag": lambda: torch.diag(flat(state.prec_diag)),
        "dense": lambda: state.prec,
        "kfac": lambda: state.precision().to_matrix(),
    }[kind]()
    count = P + 5
    noise = torch.randn(count, P, dtype=F64, generator=torch.Generator().manual_seed(1))
    draws = module.sample(state, (count,), torch.Generator().manual_seed(1))
    moved = torch.cat([draws[name].flatten(1) for name in sorted(params)], dim=1) - flat(params)
    root = torch.linalg.lstsq(noise, moved).solution  # moved = noise @ root
    close(noise @ root, moved, 1e-8)
    close(root.T @ root, torch.linalg.inv(matrix), 1e-8)


@pytest.mark.parametrize("kind", MODULES)
def test_updates_in_place_and_not(kind: str) -> None:
    _, params, forward, log_likelihood, batch = problem()
    module: Any = MODULES[kind]
    transform = module.build(forward, log_likelihood)
    first = transform.init(params)
    second, aux = transform.update(first, batch)
    assert first.step == 0 and second.step == 1 and second is not first
    close(aux, forward(params, batch)[0].mean())
    same, _ = transform.update(first, batch, inplace=True)
    assert same is first and first.step == 1
    for name, value in vars(second).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(same, name), value)
    assert second.params is params


def test_nothing_is_left_on_the_model() -> None:
    model, params, forward, log_likelihood, batch = problem()
    before = dict(vars(model))
    state = torch.get_rng_state()
    for module in MODULES.values():
        module.update(module.init(params), batch, forward, log_likelihood)  # type: ignore[attr-defined]
    assert dict(vars(model)) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and not p.requires_grad for p in params.values())
    assert all(not m._forward_hooks for m in model.modules())


def test_batches_may_be_mappings_and_parameters_a_part() -> None:
    model, params, _, _, (x, y) = problem()
    part = {name: p for name, p in params.items() if name.startswith("0")}

    def forward(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return functional_call(model, params, batch["scale"] * batch["x"]), torch.tensor([])

    def log_likelihood(z: Tensor, batch: Any) -> Tensor:
        return batch["weight"] * categorical(z, (None, batch["more"]["y"]))

    batch = {"x": x, "more": {"y": y}, "scale": torch.tensor(1.5, dtype=F64), "weight": 2.0}
    G = definition(part, forward, log_likelihood, batch)
    close(dense_ggn.update(dense_ggn.init(part), batch, forward, log_likelihood)[0].prec, G)
    close(flat(diag_ggn.update(diag_ggn.init(part), batch, forward, log_likelihood)[0].prec_diag), G.diagonal())


def test_refusals() -> None:
    _, params, forward, log_likelihood, (x, y) = problem()
    state = diag_ggn.init(params)

    def mean(z: Tensor, batch: Any) -> Tensor:
        return log_likelihood(z, batch) / len(z)

    with pytest.raises(ValueError, match="is not the 'sum' of its terms"):
        diag_ggn.update(state, (x, y), forward, mean)
    with pytest.raises(TypeError, match="must return a scalar tensor"):
        diag_ggn.update(state, (x, y), forward, lambda z, batch: -z.square())
    with pytest.raises(TypeError, match=r"forward\(params, batch\) must return the output"):
        diag_ggn.update(state, (x, y), lambda p, b: forward(p, b)[0], log_likelihood)
    with pytest.raises(ValueError, match="no tensor with a leading dimension"):
        diag_ggn.update(state, (1.0, torch.tensor(1.0)), forward, log_likelihood)
    for wrong in ([params["0.weight"]], {"a": torch.tensor([1])}, {0: x}):
        with pytest.raises(TypeError, match="dict of floating-point tensors"):
            kfac_ggn.init(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_prec must be"):
        dense_ggn.init(params, torch.eye(3))
    with pytest.raises(ValueError, match="after a pass over the data"):
        ekfac_ggn.init(params, kfac_ggn.init(params))
    for module in MODULES.values():
        with pytest.raises(ValueError, match="no Gaussian"):
            module.sample(module.init(params))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["diag", "dense"])
def test_the_package_itself_gives_the_same(kind: str) -> None:
    """Where it is installed: the same functions, the same numbers, in the same fields."""
    posteriors = pytest.importorskip("posteriors")
    _, params, forward, log_likelihood, (x, y) = problem()
    mine: Any = MODULES[kind]
    theirs = getattr(posteriors.laplace, f"{kind}_ggn")
    states = []
    for module in (mine, theirs):
        transform = module.build(forward, log_likelihood)
        state = transform.init(params)
        for batch in ((x[:5], y[:5]), (x[5:], y[5:])):
            state, aux = transform.update(state, batch)
        states.append(state)
        close(aux, forward(params, batch)[0].mean())
    assert states[0].step == states[1].step
    if kind == "dense":
        close(states[0].prec, states[1].prec)
    else:
        assert list(states[0].prec_diag) == list(states[1].prec_diag)
        close(flat(states[0].prec_diag), flat(states[1].prec_diag))
