"""Gauss-Newton and Fisher matrices, matrix-free, against dense ones made from all Jacobians."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.losses import AutogradLoss, NoCurvatureError
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem, normal

TOLERANCE = 1e-10


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-300)
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def options(problem: Problem) -> dict[str, Any]:
    return {"class_dim": problem.class_dim, "progress": False}


@pytest.fixture(params=sorted(PROBLEMS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


@pytest.fixture
def small() -> Problem:
    return PROBLEMS["mlp_ce"]()


def test_products_are_those_of_the_dense_ggn(problem: Problem) -> None:
    expected = reference.ggn(problem)
    G = curvature.ggn(problem.model, problem.loss_fn, problem.data, **options(problem))
    V = normal(2, len(expected))
    assert_close(G @ V, V @ expected)
    assert_close(G @ V[0], expected @ V[0])
    assert G.mode == "reverse" and G.symmetric


def test_products_are_those_of_the_dense_empirical_fisher(problem: Problem) -> None:
    expected = reference.empirical_fisher(problem)
    E = curvature.fisher(
        problem.model, problem.loss_fn, problem.data, kind="empirical", structure="full", **options(problem)
    )
    V = normal(2, len(expected))
    assert_close(E @ V, V @ expected)


# A custom kernel without jvp; gradients that stop at detach() or at padding_idx, where tangents do not.
NO_FORWARD_MODE = {"hidden_uses": "jvp", "detached_uses": "other numbers"}
NO_FORWARD_MODE |= {name: "other numbers" for name in ("embeddings", "language_model")}


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_forward_mode_gives_the_same_products(name: str) -> None:
    problem = PROBLEMS[name]()
    arguments = (problem.model, problem.loss_fn, problem.data)
    G = curvature.ggn(*arguments, **options(problem))
    forward = curvature.ggn(*arguments, mode="forward", **options(problem))
    V = normal(2, G.shape[1])
    if name in NO_FORWARD_MODE:
        with pytest.raises(RuntimeError, match=NO_FORWARD_MODE[name]):
            forward @ V
        return
    assert_close(forward @ V, G @ V)
    assert forward.mode == "forward"


def test_exact_fisher_is_the_ggn(small: Problem) -> None:
    arguments = (small.model, small.loss_fn, small.data)
    F = curvature.fisher(*arguments, kind="exact", structure="full")
    assert torch.equal(F.to_dense(), curvature.ggn(*arguments).to_dense())


def test_ggn_is_the_hessian_of_a_piecewise_linear_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()
    data = [(normal(4, 3), normal(4, 3))]
    G, H = (make(model, nn.MSELoss(), data) for make in (curvature.ggn, curvature.hessian))
    assert_close(G.to_dense(), H.to_dense())


def sampled(problem: Problem, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    arguments = (problem.model, problem.loss_fn, problem.data)
    return curvature.fisher(
        *arguments, kind="mc", structure="full", samples=samples, generator=generator, **options(problem)
    ).to_dense()


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "mlp_mse", "mlp_bce", "language_model"])
def test_sampled_fisher_is_unbiased_and_not_scaled_by_the_draws(name: str) -> None:
    problem = PROBLEMS[name]()
    trace = reference.ggn(problem).trace()
    for samples in (1, 4):
        traces = torch.stack([sampled(problem, samples, seed).trace() for seed in range(25)])
        assert abs(traces.mean() - trace) < 4 * traces.std() / 5


def test_sampled_fisher_is_one_matrix_and_the_next_another(small: Problem) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = (small.model, small.loss_fn, small.data)
    first, second = (curvature.fisher(*arguments, kind="mc", structure="full", generator=generator) for _ in range(2))
    v = normal(first.shape[1])
    assert torch.equal(first @ v, first @ v)
    assert not torch.allclose(first @ v, second @ v)
    default = curvature.fisher(*arguments, kind="mc", structure="full")
    assert torch.equal(default @ v, curvature.fisher(*arguments, kind="mc", structure="full") @ v)
    matrix = first.to_dense()
    assert_close(matrix, matrix.T)
    # A Fisher of five examples with one draw each.
    assert torch.linalg.matrix_rank(matrix, hermitian=True) <= 5


def test_sampled_diagonal_uses_the_same_draws(small: Problem) -> None:
    arguments = (small.model, small.loss_fn, small.data)
    full = curvature.fisher(*arguments, kind="mc", structure="full").to_dense()
    assert_close(curvature.fisher(*arguments, kind="mc", structure="diagonal").diagonal(), full.diagonal())
    assert_close(curvature.fisher(*arguments, kind="mc", structure="dense").to_dense(), full)


def test_blocks_by_name(small: Problem) -> None:
    expected, where = reference.ggn(small), reference.flat_indices(small.model)
    rows, columns = where["0.weight"].flatten(), where["2.bias"]
    G = curvature.ggn(small.model, small.loss_fn, small.data)
    assert_close(G.block("0.weight", "2.bias").to_dense(), expected[rows][:, columns])
    assert_close(G.block("0.weight", "2.bias").adjoint().to_dense(), expected[columns][:, rows])


def test_kept_graph_runs_the_model_once(small: Problem) -> None:
    calls = []
    small.model.register_forward_hook(lambda *_: calls.append(1))
    v = normal(43)
    G = curvature.ggn(small.model, small.loss_fn, small.data[0])
    assert torch.equal(G @ v, G @ v) and len(calls) == 1
    streamed = curvature.ggn(small.model, small.loss_fn, small.data[0], keep_graph=False)
    assert torch.equal(streamed @ v, G @ v) and len(calls) == 2


@pytest.mark.parametrize("make", [curvature.ggn, curvature.hessian])
@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 30])
def test_a_batch_alone_has_the_products_of_a_list_of_it(make: Any, memory: int, small: Problem) -> None:
    alone = make(small.model, small.loss_fn, small.data[0], memory=memory, **options(small))
    listed = make(small.model, small.loss_fn, small.data[:1], memory=memory, **options(small))
    V = normal(7, alone.shape[1])
    assert torch.equal(alone @ V, listed @ V) and torch.equal(alone @ V[0], listed @ V[0])


class Once(torch.autograd.Function):
    """A kernel that can be differentiated once, backwards and forwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0]


class OnceLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_forward_mode_serves_models_without_second_derivative(small: Problem) -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    model = nn.Sequential(small.model, OnceLayer())
    plain = Problem(nn.Sequential(small.model, Exp()), small.loss_fn, small.data)
    G = curvature.ggn(model, small.loss_fn, small.data)
    modes = [G.mode]
    assert_close(G.to_dense(), reference.ggn(plain))
    modes.append(G.mode)
    assert modes == ["auto", "forward"]
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        curvature.ggn(model, small.loss_fn, small.data, mode="reverse") @ normal(G.shape[1])


def test_forward_mode_refuses_parameters_it_does_not_reach() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.kept = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (x @ self.kept[0].T).tanh()

    torch.manual_seed(0)
    problem = Problem(Elsewhere().double(), nn.MSELoss(), [(normal(3, 3), normal(3, 2))])
    with pytest.raises(RuntimeError, match="forward mode gives other numbers"):
        curvature.ggn(problem.model, problem.loss_fn, problem.data, mode="forward").to_dense()
    assert_close(curvature.ggn(problem.model, problem.loss_fn, problem.data).to_dense(), problem_ggn(problem))


def problem_ggn(problem: Problem) -> Tensor:
    z, y = reference.dataset_outputs(problem, problem.model)
    J = reference.jacobian(z, list(problem.model.parameters())).flatten(0, 1)
    return 2 / y.numel() * J.T @ J


@pytest.mark.filterwarnings("ignore:not one loss")
def test_dropout_masks_are_those_of_the_recorded_pass_in_both_modes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(normal(3, 4), torch.tensor([0, 1, 2])), (normal(2, 4), torch.tensor([0, 1]))]
    reverse, forward = (curvature.ggn(model, nn.CrossEntropyLoss(), data, mode=mode) for mode in ("reverse", "forward"))
    v = normal(reverse.shape[1])
    state = torch.get_rng_state()
    product = forward @ v
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(product, forward @ v)
    # The operators were made one after the other, at one state of the generator.
    assert_close(product, reverse @ v)


def test_gauss_newton_of_an_indefinite_loss_has_products_but_no_root(small: Problem) -> None:
    class Cosine(nn.Module):
        reduction = "sum"

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (z.sum(-1) - y).cos().sum()

    problem = small.with_loss(Cosine())
    with pytest.warns(UserWarning, match=r"not convex in the model's outputs.*kind 'empirical'"):
        G = curvature.ggn(small.model, Cosine(), small.data).to_dense()
    assert_close(G, reference.ggn(problem))
    with pytest.raises(NoCurvatureError, match="indefinite"):
        curvature.ggn(small.model, AutogradLoss(Cosine()), small.data, structure="diagonal")


def test_split_of_the_data_does_not_matter() -> None:
    problem = PROBLEMS["mlp_ce_all_options"]()
    merged: Any = tuple(torch.cat(parts) for parts in zip(*problem.data, strict=True))
    pieces = [tuple(t.split([1, 4, 2])[i] for t in merged) for i in range(3)]
    for kind in ("exact", "empirical"):
        whole, parts = (
            curvature.fisher(problem.model, problem.loss_fn, data, kind=kind, structure="full").to_dense()
            for data in (merged, pieces)
        )
        assert_close(parts, whole)


def test_tied_head_and_mapping_inputs_leave_nothing_behind() -> None:
    problem = PROBLEMS["language_model"]()
    before = copy.deepcopy(problem.model.state_dict())
    G = curvature.ggn(problem.model, problem.loss_fn, problem.data, **options(problem))
    G @ normal(G.shape[1])
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in problem.model.modules())


def test_refusals(small: Problem) -> None:
    arguments = (small.model, small.loss_fn, small.data)
    with pytest.raises(ValueError, match="is no Gauss-Newton matrix"):
        curvature.ggn(*arguments, kind="empirical")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="mode is one of"):
        curvature.ggn(*arguments, mode="backward")
    with pytest.raises(ValueError, match="kind is one of"):
        curvature.fisher(*arguments, kind="monte carlo", structure="full")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="structure must be one of"):
        curvature.fisher(*arguments, structure="kron")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="one-shot iterator"):
        curvature.ggn(small.model, small.loss_fn, iter(small.data))
    with pytest.raises(ValueError, match="no batches"):
        curvature.ggn(small.model, small.loss_fn, []) @ normal(43)
    G = curvature.ggn(*arguments)
    with pytest.raises(TypeError, match=r"is torch\.float64 and the tensor is torch\.float32"):
        G @ torch.ones(43)
    with pytest.raises(ValueError, match="acts on tensors of shape"):
        G @ normal(42)
