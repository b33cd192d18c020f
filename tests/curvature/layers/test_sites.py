"""Does watching a pass leave it as it is, and see what it should?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from curvature import fisher
from curvature.layers.recorder import Recorder
from curvature.model.parameters import Parameters
from tests.curvature import dense_reference as dense
from tests.curvature.problems import PROBLEMS, Fn, LanguageModel, Problem, classes, mlp, normal


def record(model: nn.Module, x: Any, batch: int | None = None) -> tuple[Tensor, Recorder]:
    recorder = Recorder(Parameters(model), model.buffers(), batch)
    recorder.mark_inputs(x)
    with recorder:
        return dense.run(model, x), recorder


def seen(model: nn.Module, x: Any) -> tuple[dict[str, str], set[str]]:
    """``{parameters: operation}`` and the parameters of unknown uses."""
    _, recorder = record(model, x, len(x))
    return {"+".join(ref.label for ref in site.refs): site.operation for site in recorder.sites}, set(recorder.unknown)


@pytest.mark.parametrize("name", PROBLEMS)
def test_recording_changes_no_bit(name: str) -> None:
    problem = PROBLEMS[name]()
    x, _ = problem.data[0]
    torch.manual_seed(0)
    plain = dense.run(copy.deepcopy(problem.model), x)
    torch.manual_seed(0)
    recorded, recorder = record(problem.model, x)
    assert torch.equal(plain, recorded)
    assert recorder.sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_keeps_its_bits_and_its_random_numbers(dtype: torch.dtype, need_weights: bool) -> None:
    """The copy of the attention function that is watched inside shares its code: dropout draws the same numbers too."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True).to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    torch.manual_seed(1)
    plain = model(x, x, x, need_weights=need_weights)
    torch.manual_seed(1)
    recorder = Recorder(Parameters(model), batch=3)
    with recorder:
        recorded = model(x, x, x, need_weights=need_weights)
    assert torch.equal(plain[0], recorded[0])
    assert not need_weights or torch.equal(plain[1], recorded[1])
    assert [site.operation for site in recorder.sites] == ["linear", "linear"] and not recorder.unknown


def test_functions_are_seen_however_they_are_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            calls: list[Callable[[Tensor], Tensor]] = [
                lambda x: F.linear(x, self.a, self.b),
                lambda x: F.linear(input=x, bias=self.b, weight=self.a),
                lambda x: x @ self.a.T,
                lambda x: x.matmul(self.a),
                lambda x: torch.mm(x, self.a.t()),
                lambda x: self.b + x,
                lambda x: x - self.b,
                lambda x: self.b - x,
                lambda x: self.b * x,
                lambda x: torch.add(x, self.b),
                lambda x: x.add(self.b).add_(self.b),
                lambda x: x * self.b.view(1, 3),
            ]
            for call in calls:
                x = call(x)
            return x

    x = torch.randn(4, 3)
    _, recorder = record(Model(), x, 4)
    operations = [site.operation for site in recorder.sites]
    assert operations == ["linear"] * 2 + ["matmul"] * 3 + ["add", "sub", "sub", "mul", "add", "add", "add", "mul"]
    assert not recorder.unknown


@pytest.mark.parametrize(
    "use",
    [
        lambda x, p: x + p.exp(),
        lambda x, p: torch.add(x, p, alpha=2.0),
        lambda x, p: 1 - p + x,
        lambda x, p: x / p,
        lambda x, p: torch.where(x > 0, p, x),
        lambda x, p: torch.cat([x, p[None]]),
        lambda x, p: x + p * p,
        lambda x, p: x * p[::2].repeat_interleave(2),
        lambda x, p: torch.einsum("ni,i->ni", x, p),
    ],
)
def test_unknown_uses_are_named_and_estimated_exactly(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.rand(4) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return use(x, self.p)[: len(x), :3]

    torch.manual_seed(0)
    model = Model().double()
    x = normal(3, 4)
    assert seen(model, x) == ({}, {"p"})
    problem = Problem(model, nn.CrossEntropyLoss(), [(x, classes(3, of=3))])
    got = fisher(model, problem.loss_fn, problem.data, kind="exact", structure="kfac")
    torch.testing.assert_close(got.diagonal(), dense.ggn(problem).diagonal(), rtol=1e-10, atol=1e-14)


def test_uses_without_gradient_are_not_seen() -> None:
    model = PROBLEMS["detached_uses"]().model
    assert seen(model, normal(3, 4)) == (
        {"layer.weight+layer.bias": "linear", "scale": "mul", "head.weight+head.bias": "linear"},
        set(),
    )
    with torch.no_grad():
        assert seen(model, normal(3, 4)) == ({}, set())


def test_looking_at_a_parameter_is_no_use() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight
            assert w.shape[0] == w.size(0) and w.dim() == 2 and w.is_contiguous() and w.numel() == len(w) ** 2
            assert w.device == x.device and w.dtype == x.dtype and w.T.shape == (3, 3) and float(w.detach()[0, 0]) < 9
            return self.layer(x)

    assert seen(Model(), torch.randn(2, 3)) == ({"layer.weight+layer.bias": "linear"}, set())


def test_an_input_changed_in_place_after_its_use_is_refused() -> None:
    """A pass through activations only never asks autograd for the input of the last layer; the statistics need it."""
    model = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    _, recorder = record(model, x, 2)
    site = recorder.sites[0]
    site.check_saved()
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"input of linear \(weight, bias\) was modified in place.*out-of-place"):
        site.use("joint", torch.ones(1, 2, 3), None, {})


def test_a_new_tensor_at_the_address_of_an_old_one_is_another_tensor() -> None:
    """Identities are recycled as soon as a tensor is gone: what is known about the old one must not be believed."""
    model = Fn(lambda x: x)
    recorder = Recorder({}, batch=4)
    x = torch.ones(4, 2)
    recorder.mark_inputs(x)
    with recorder:
        for _ in range(200):
            constant = torch.zeros(4, 2)
            assert not recorder.layout(constant).batched
            del constant
            dependent = model(x) * 2
            assert recorder.layout(dependent).batched
            del dependent


def test_tables_do_not_depend_on_the_example() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    _, recorder = record(model, torch.tensor([[1, 2, 3, 4]] * 4), 4)  # as many examples as positions
    batched = {site.refs[0].name + ":" + site.operation: site.layout.batched for site in recorder.sites}
    assert batched["tokens.weight:embedding"] and not batched["positions.weight:embedding"]


def test_an_exception_ends_the_recording() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("inside")

    recorder = Recorder({}, batch=2)
    with pytest.raises(KeyError, match="inside"), recorder:
        nn.MultiheadAttention(4, 2)(*[torch.ones(2, 2, 4)] * 2, fail(torch.ones(1)))
    before = len(recorder.sites)
    F.linear(torch.ones(1, 2), torch.ones(2, 2, requires_grad=True))
    assert len(recorder.sites) == before
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(Exception, match="embedding dim"), Recorder(Parameters(attention), batch=2):
        attention(*[torch.ones(2, 2, 3)] * 3)
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_checkpointed_layers_are_seen(structure: Any) -> None:
    class Model(nn.Module):
        def __init__(self, save: bool) -> None:
            super().__init__()
            self.save, self.inner = save, mlp()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint.checkpoint(self.inner, x, use_reentrant=False) if self.save else self.inner(x)

    x, y = normal(3, 4), classes(3, of=3)
    results = []
    for save in (False, True):
        torch.manual_seed(0)
        model = Model(save).double()
        results.append(fisher(model, nn.CrossEntropyLoss(), (x, y), kind="exact", structure=structure).to_dense())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_models_run_under_autocast(kind: Any) -> None:
    """Activations in bfloat16 have 8 bits: sums of a few dozen products of them agree to some per cent."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Encoder8(), nn.LayerNorm(8), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    class Encoder8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    model = Cast()
    torch.manual_seed(1)
    data = (torch.randn(16, 3, 4), classes(16, of=3))
    got = fisher(model, nn.CrossEntropyLoss(), data, kind=kind, structure="kfac")
    plain = fisher(model.inner, nn.CrossEntropyLoss(), data, kind=kind, structure="kfac")
    assert got.dtype == torch.float32
    assert torch.dist(got.to_dense(), plain.to_dense()) < (0.05 if kind != "mc" else 0.5) * plain.to_dense().norm()


@pytest.mark.parametrize("affine", [False, True])
def test_torch_batch_norm_called_by_itself_is_left_to_autograd(affine: bool) -> None:
    """Its arguments have another order than those of ``F.batch_norm``."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            w, b = (self.weight, self.bias) if affine else (None, None)
            y = torch.batch_norm(x, w, b, self.mean, self.var, False, 0.1, 1e-5, False)
            return y if affine else y * self.weight + self.bias

    operations, unknown = seen(Plain(), torch.randn(4, 3))
    assert unknown == ({"weight", "bias"} if affine else set())
    assert operations == ({} if affine else {"weight": "mul", "bias": "add"})
