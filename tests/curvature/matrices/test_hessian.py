"""The Hessian against one backward pass per entry of the gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature
import solvers
from curvature.losses import AutogradLoss, UnknownLossError
from curvature.model.pullback import Pullback
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem, normal

TOLERANCE = 1e-10


def dense_hessian(problem: Problem) -> Tensor:
    """Row by row, of the loss on all outputs together."""
    model = copy.deepcopy(problem.model)
    tensors = list(reference.trainable(model).values())
    plain = mock.patch.object(torch, "_weight_norm", lambda v, g, dim: v * (g / v.norm(dim=1, keepdim=True)))
    with sdpa_kernel(SDPBackend.MATH), plain:  # neither fused kernel has a (right) second derivative
        z, y = reference.dataset_outputs(problem, model)
        gradient = torch.autograd.grad(problem.loss_fn(z, y), tensors, create_graph=True, allow_unused=True)
    rows = []
    for p, g in zip(tensors, gradient, strict=True):
        for entry in torch.zeros_like(p).flatten() if g is None else g.flatten():
            if not entry.requires_grad:
                rows.append(torch.zeros(sum(p.numel() for p in tensors)).double())
                continue
            row = torch.autograd.grad(entry, tensors, retain_graph=True, allow_unused=True)
            pieces = [torch.zeros_like(p) if r is None else r for r, p in zip(row, tensors, strict=True)]
            rows.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(rows)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-300)
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def options(problem: Problem) -> dict[str, Any]:
    return {"class_dim": problem.class_dim, "progress": False}


@pytest.fixture(params=sorted(PROBLEMS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def test_products_are_those_of_the_dense_hessian(problem: Problem) -> None:
    expected = dense_hessian(problem)
    H = curvature.hessian(problem.model, problem.loss_fn, problem.data, **options(problem))
    V = normal(2, len(expected))
    assert_close(H @ V, V @ expected.T)
    assert_close(H @ V[0], expected @ V[0])
    u, v = V
    assert torch.dot(u, H @ v) == pytest.approx(torch.dot(v, H @ u).item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "cnn", "language_model"])
def test_structures_are_parts_of_the_dense_hessian(name: str) -> None:
    problem = PROBLEMS[name]()
    expected = dense_hessian(problem)
    arguments = (problem.model, problem.loss_fn, problem.data)
    assert_close(curvature.hessian(*arguments, **options(problem)).to_dense(), expected)
    assert_close(curvature.hessian(*arguments, structure="dense", **options(problem)).to_dense(), expected)
    assert_close(curvature.hessian(*arguments, structure="diagonal", **options(problem)).diagonal(), expected.diag())
    layers = curvature.hessian(*arguments, structure="layer", **options(problem)).to_dense()
    module_of = []
    for parameter, index in reference.flat_indices(problem.model).items():
        module_of += [parameter.rpartition(".")[0]] * index.numel()
    same = torch.tensor([[a == b for b in module_of] for a in module_of])
    assert_close(layers, torch.where(same, expected, 0.0))


@pytest.fixture
def small() -> Problem:
    return PROBLEMS["mlp_ce"]()


def test_kept_graph_gives_the_same_numbers(small: Problem) -> None:
    v = normal(3, dense_hessian(small).shape[0])
    streamed = curvature.hessian(small.model, small.loss_fn, small.data) @ v
    kept = curvature.hessian(small.model, small.loss_fn, small.data, keep_graph=True)
    assert torch.equal(kept @ v, streamed)
    assert torch.equal(kept @ v, streamed)


def test_one_batch_runs_the_model_once(small: Problem) -> None:
    calls = []
    small.model.register_forward_hook(lambda *_: calls.append(1))
    H = curvature.hessian(small.model, small.loss_fn, small.data[0])
    v = normal(H.shape[1])
    assert torch.equal(H @ v, H @ v)
    assert len(calls) == 1
    H = curvature.hessian(small.model, small.loss_fn, small.data[0], keep_graph=False)
    H @ v, H @ v
    assert len(calls) == 3


@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 30])
def test_chunks_do_not_change_the_product(small: Problem, memory: int) -> None:
    expected = dense_hessian(small)
    H = curvature.hessian(small.model, small.loss_fn, small.data, memory=memory)
    assert_close(H.to_dense(), expected)


def test_operator_is_linear_and_takes_any_batch(small: Problem) -> None:
    H = curvature.hessian(small.model, small.loss_fn, small.data)
    u, v = normal(2, H.shape[1])
    assert_close(H @ (2 * u - v), 2 * (H @ u) - H @ v)
    assert (H @ normal(2, 3, H.shape[1])).shape == (2, 3, H.shape[1])
    assert (H @ normal(0, H.shape[1])).shape == (0, H.shape[1])
    assert H.adjoint() is H and H.symmetric


def test_scipy_sees_the_same_matrix(small: Problem) -> None:
    v = normal(47 - 4, 2)
    H = curvature.hessian(small.model, small.loss_fn, small.data)
    assert_close(torch.as_tensor(H.to_scipy() @ v.numpy()), dense_hessian(small) @ v)


def test_blocks_by_name(small: Problem) -> None:
    expected, where = dense_hessian(small), reference.flat_indices(small.model)
    H = curvature.hessian(small.model, small.loss_fn, small.data)
    rows, columns = where["0.weight"].flatten(), torch.cat([where["2.weight"].flatten(), where["2.bias"]])
    block = H.block("0.weight", "2.*")
    assert_close(block.to_dense(), expected[rows][:, columns])
    assert_close(block.adjoint().to_dense(), expected[columns][:, rows])
    assert_close(H.block("2.*").to_dense(), expected[columns][:, columns])
    restricted = curvature.hessian(small.model, small.loss_fn, small.data, params=["2.*"])
    assert_close(restricted.to_dense(), expected[columns][:, columns])
    with pytest.raises(ValueError, match=r"\['0.weight', '0.bias'\] are no parameters of Hessian\(18x18\)"):
        restricted.block("0.*")
    with pytest.raises(ValueError, match="off the diagonal"):
        block.exact_diagonal()


def test_an_estimate_never_takes_a_product_for_each_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    H = curvature.hessian(model, nn.CrossEntropyLoss(), (normal(16, 20), torch.randint(3, (16,))))
    estimate = solvers.trace(H, samples=30)
    assert 0 < estimate.products <= 30 < H.shape[0], "an exact trace would cost a product for each parameter"
    with pytest.raises(solvers.StructureError, match="no exact diagonal"):
        H.diagonal()


def test_split_of_the_data_does_not_matter() -> None:
    problem = PROBLEMS["mlp_ce_all_options"]()
    merged = tuple(torch.cat(parts) for parts in zip(*problem.data, strict=True))
    pieces = [tuple(t.split([1, 4, 2])[i] for t in merged) for i in range(3)]
    dense = [curvature.hessian(problem.model, problem.loss_fn, data).to_dense() for data in (merged, pieces)]
    assert_close(dense[0], dense[1])
    assert_close(dense[0], dense_hessian(problem))


def test_opaque_loss_of_one_batch(small: Problem) -> None:
    x, y = small.data[0]

    def contrastive(z: Tensor, y: Tensor) -> Tensor:
        return (z @ z.T).logsumexp(-1).mean() + F.cross_entropy(z, y)

    H = curvature.hessian(small.model, contrastive, (x, y)).to_dense()
    one = Problem(small.model, contrastive, [(x, y)])
    assert_close(H, dense_hessian(one))
    with pytest.raises(UnknownLossError, match="No derivatives are known"):
        curvature.hessian(small.model, contrastive, small.data)


def test_unknown_loss_that_says_how_it_reduces(small: Problem) -> None:
    class Focal(nn.Module):
        reduction = "mean"

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            log_p = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
            return (-((1 - log_p.exp()) ** 2) * log_p).mean()

    class Coupled(Focal):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return super().forward(z - z.mean(0), y)

    H = curvature.hessian(small.model, Focal(), small.data)
    assert_close(H.to_dense(), dense_hessian(small.with_loss(Focal())))
    given = AutogradLoss(Focal(), reduction="mean")
    assert_close(curvature.hessian(small.model, given, small.data).to_dense(), H.to_dense())
    with pytest.raises(ValueError, match="is not the 'mean' of its terms"):
        curvature.hessian(small.model, Coupled(), small.data) @ normal(H.shape[1])


def test_several_outputs_reach_an_opaque_loss() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"class": self.a(x), "number": self.b(x)}

    def loss(out: dict[str, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(out["class"], y[0]) + 0.3 * F.mse_loss(out["number"], y[1])

    torch.manual_seed(0)
    model, x, y = Heads().double(), normal(3, 2), (torch.tensor([0, 1, 1]), normal(3, 1))
    H = curvature.hessian(model, loss, (x, y), output=lambda out: out).to_dense()
    a = curvature.hessian(model, nn.CrossEntropyLoss(), (x, y[0]), output=lambda out: out["class"]).to_dense()
    b = curvature.hessian(model, nn.MSELoss(), (x, y[1]), output=lambda out: out["number"]).to_dense()
    assert_close(H, a + 0.3 * b)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish])
def test_activations_whose_derivative_looks_at_grad_mode(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).double()
    problem = Problem(model, nn.MSELoss(), [(normal(3, 3), normal(3, 2))])
    with torch.no_grad():
        H = curvature.hessian(model, problem.loss_fn, problem.data).to_dense()
    assert_close(H, dense_hessian(problem))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)


def test_fused_attention_is_left_out_without_a_switch_of_the_process() -> None:
    torch.manual_seed(0)
    model = Attention()  # float32: the fused kernel takes part
    data = (torch.randn(2, 5, 4), torch.tensor([0, 1]))
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()))
    )
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled())
    H = curvature.hessian(model, nn.CrossEntropyLoss(), data)
    product = H @ torch.ones(H.shape[1])
    assert seen == [before] == [(True, True)], "another thread may be at work"
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()) == before
    model.double()
    exact = dense_hessian(Problem(model, nn.CrossEntropyLoss(), [(data[0].double(), data[1])])).sum(1)
    torch.testing.assert_close(product.double(), exact, rtol=1e-4, atol=1e-5)


def test_encoder_layer_in_eval_mode() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).double()
    layer.self_attn.in_proj_weight.requires_grad_(False)
    problem = Problem(model, nn.CrossEntropyLoss(), [(normal(3, 3, 4), torch.tensor([0, 1, 1]))])
    assert_close(curvature.hessian(model, problem.loss_fn, problem.data).to_dense(), dense_hessian(problem))


def test_model_and_settings_stay_as_they_were_after_an_exception() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    linear = nn.Linear(2, 2)
    model = nn.Sequential(linear, nn.BatchNorm1d(2), nn.Dropout(0.5), Fails()).double()
    linear.weight.grad = torch.ones_like(linear.weight)
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    attributes = set(vars(model[1]))
    H = curvature.hessian(model, nn.MSELoss(), (normal(3, 2), normal(3, 2)))
    v, state = normal(H.shape[1]), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        H @ v
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert {name: id(b) for name, b in model.named_buffers()} == {name: i for name, (i, _) in buffers.items()}
    assert all(torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())
    assert set(vars(model[1])) == attributes
    assert torch.equal(linear.weight.grad, torch.ones_like(linear.weight)) and linear.bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:not one loss")
def test_products_leave_random_state_and_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).double()
    before = copy.deepcopy(model.state_dict())
    data = [(normal(3, 2), normal(3, 2)), (normal(2, 2), normal(2, 2))]
    for keep_graph in (False, True):
        H = curvature.hessian(model, nn.MSELoss(), data, keep_graph=keep_graph)
        v, state = normal(H.shape[1]), torch.get_rng_state()
        first = H @ v
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert torch.equal(H @ v, first)  # the masks of the first product, wherever the user's stream is by now
    assert all(torch.equal(b, before[name]) for name, b in model.state_dict().items())


def test_changed_parameters_are_refused(small: Problem) -> None:
    for data in (small.data, small.data[0]):
        H = curvature.hessian(small.model, small.loss_fn, data)
        v = normal(H.shape[1])
        H @ v
        with torch.no_grad():
            small.model.get_parameter("0.weight").mul_(0.9)
        with pytest.raises(RuntimeError, match=r"0\.weight was changed after this operator was made"):
            H @ v


def test_parameters_outside_the_restriction_count_as_changed(small: Problem) -> None:
    small.model.get_parameter("2.bias").requires_grad_(False)
    H = curvature.hessian(small.model, small.loss_fn, small.data, params="0.*")
    with torch.no_grad():
        small.model.get_parameter("2.bias").add_(1)
    with pytest.raises(RuntimeError, match=r"2\.bias was changed after this operator was made"):
        H @ normal(H.shape[1])


def test_blocks_of_vectors_stay_within_the_memory(small: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = Pullback.__call__

    def counted(self: Pullback, cotangents: Any, block: bool = True) -> Any:
        sizes.append(len(cotangents[0]) if block else 1)
        return plain(self, cotangents, block)

    monkeypatch.setattr(Pullback, "__call__", counted)
    for memory, most in ((1, 1), (1 << 14, 4), (1 << 30, 40)):
        sizes.clear()
        curvature.hessian(small.model, small.loss_fn, small.data[0], memory=memory) @ normal(40, 43)
        assert sum(sizes) == 40 and max(sizes) <= most
    large = nn.Sequential(small.model, nn.Linear(3, 200000), nn.Linear(200000, 3)).double()
    sizes.clear()
    curvature.hessian(large, small.loss_fn, small.data[0], params="0.0.bias") @ normal(3, 5)
    assert max(sizes) == 1  # a loop is as fast, and holds one copy of what is in between


def test_long_passes_show_progress(small: Problem, capsys: pytest.CaptureFixture[str]) -> None:
    v = normal(43)
    curvature.hessian(small.model, small.loss_fn, small.data) @ v
    assert capsys.readouterr().err == ""
    curvature.hessian(small.model, small.loss_fn, small.data, progress=True) @ v
    assert "Hessian" in capsys.readouterr().err


def test_data_that_differ_between_passes_are_refused(small: Problem) -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Any]:
            for x, y in small.data:
                yield x + next(noise), y

    noise = iter(range(100))
    H = curvature.hessian(small.model, small.loss_fn, Augmented())
    v = normal(H.shape[1])
    H @ v
    with pytest.raises(RuntimeError, match="this pass over the data gave a loss of"):
        H @ v


def test_one_shot_iterators_are_refused(small: Problem) -> None:
    with pytest.raises(TypeError, match="one-shot iterator"):
        curvature.hessian(small.model, small.loss_fn, iter(small.data))
    with pytest.raises(TypeError, match="one-shot iterator"):
        curvature.hessian(small.model, small.loss_fn, (batch for batch in small.data))


def test_shuffling_loader_is_one_matrix() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2, shuffle=True)
    H = curvature.hessian(problem.model, problem.loss_fn, loader)
    assert_close(H.to_dense(), dense_hessian(problem))
    v = normal(H.shape[1])
    assert torch.equal(H @ v, H @ v)


def test_bfloat16_model_is_answered_in_float32() -> None:
    problem = PROBLEMS["mlp_ce"]()
    expected = dense_hessian(problem)
    data = [(x.bfloat16(), y) for x, y in problem.data]
    H = curvature.hessian(problem.model.bfloat16(), problem.loss_fn, data)
    assert H.dtype == torch.float32
    product = H @ torch.ones(H.shape[1])
    # bfloat16 has 8 bits; a few operations deep, sums over about ten entries.
    torch.testing.assert_close(product.double(), expected.sum(1), rtol=0.1, atol=0.02)


def test_refusals(small: Problem) -> None:
    x, y = small.data[0]
    with pytest.raises(ValueError, match="structure is one of"):
        curvature.hessian(small.model, small.loss_fn, (x, y), structure="kfac")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="reduction='none'"):
        curvature.hessian(small.model, nn.CrossEntropyLoss(reduction="none"), (x, y)).to_dense()

    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small.model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    with pytest.raises(ValueError, match="the loss does not depend on the model's parameters"):
        curvature.hessian(NoGrad(), small.loss_fn, (x, y)).to_dense()
    embedding = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(ValueError, match="0 is an embedding with sparse=True"):
        curvature.hessian(embedding, small.loss_fn, (torch.tensor([1, 2]), torch.tensor([1, 2])))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * x.exp()

    class OnceLayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    model = nn.Sequential(small.model, OnceLayer())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        curvature.hessian(model, small.loss_fn, (x, y)).to_dense()


def test_operators_say_how_many_vectors_share_a_product(small: Problem) -> None:
    large = nn.Linear(1000, 1000)
    data = (normal(2, 1000).float(), normal(2, 1000).float())
    assert curvature.hessian(large, nn.MSELoss(), data).block_size == 1
    assert curvature.hessian(large, nn.MSELoss(), [data]).block_size is None  # a pass over the data is shared
    assert curvature.hessian(small.model, small.loss_fn, small.data[0]).block_size is None  # one vectorised pass


def test_parameters_of_several_dtypes_over_several_batches() -> None:
    torch.manual_seed(0)

    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + self.bias.float()

    first = Wide(3, 4)
    first.bias.data = first.bias.data.double()
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 3)]
    H = curvature.hessian(model, nn.MSELoss(), data)
    whole = curvature.hessian(model, nn.MSELoss(), tuple(torch.cat(part) for part in zip(*data, strict=True)))
    v = torch.randn(5, H.shape[1], dtype=H.dtype)
    torch.testing.assert_close(H @ v, whole @ v, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.stack([H @ row for row in v]), H @ v, rtol=1e-4, atol=1e-6)
    assert H.dtype == torch.float64 and (H @ v[:0]).shape == (0, H.shape[1])
