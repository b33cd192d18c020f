"""Does capture work under compilation, checkpoints, wrappers and mixed precision?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precond import KFAC
from tests.curvature.loops import assert_same, batch, fisher, mlp, silently, statistics, step, watching

# Dynamo looks at the gradients of whatever crosses a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*lru_cache")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def compiled_before(model: nn.Module, backend: str) -> tuple[Any, Any]:
    return torch.compile(model, backend=backend), None


def compiled_after(model: nn.Module, backend: str) -> tuple[Any, Any]:
    return model, lambda m: torch.compile(m, backend=backend)


def compiled_in_place(model: nn.Module, backend: str) -> tuple[Any, Any]:
    model.compile(backend=backend)
    return model, None


def compiled_in_place_after(model: nn.Module, backend: str) -> tuple[Any, Any]:
    def compile_now(m: nn.Module) -> nn.Module:
        m.compile(backend=backend)
        return m

    return model, compile_now


def compiled_in_part(model: Any, backend: str) -> tuple[Any, Any]:
    model[2] = torch.compile(model[2], backend=backend)
    return model, None


def compiled_by_its_forward(model: Any, backend: str) -> tuple[Any, Any]:
    model[2].forward = torch.compile(model[2].forward, backend=backend)
    return model, None


@pytest.mark.parametrize(
    ("how", "backend", "functional"),
    [
        (compiled_before, "eager", True),
        (compiled_before, "aot_eager", False),
        (compiled_after, "eager", False),
        (compiled_after, "aot_eager", True),
        (compiled_in_place, "eager", True),
        (compiled_in_place, "aot_eager", False),
        (compiled_in_place_after, "eager", False),
        (compiled_in_part, "eager", False),
        (compiled_by_its_forward, "eager", False),
        (compiled_by_its_forward, "aot_eager", True),
    ],
)
def test_compiled_models(how: Callable[..., Any], backend: str, functional: bool) -> None:
    model, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch(6)
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    given, later = how(model, backend)
    optimizer = watching(given, loss_fn)
    called = given if later is None else later(given)
    call = F.cross_entropy if functional else loss_fn
    for _ in range(2):
        actual = step(optimizer, [lambda: call(called(x), y)])
        # A compiled submodule carries its wrapper in its parameters' names.
        assert_same({name.replace("_orig_mod.", ""): block for name, block in actual.items()}, expected)
    compiled = [
        m for m in torch._dynamo.utils.get_compilation_metrics() if "/curvature/layers/" in (m.co_filename or "")
    ]
    # What records the uses of parameters is not compiled, but for the door to it.
    assert {m.co_name for m in compiled} <= {"__torch_function__"}


def test_models_that_ran_compiled_before_the_optimizer_was_made() -> None:
    model, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch(6)
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    compiled: Any = torch.compile(model, backend="eager")
    loss_fn(compiled(x), y).backward()
    optimizer = watching(compiled, loss_fn)
    assert_same(step(optimizer, [lambda: loss_fn(compiled(x), y)]), expected)


class Checkpointed(nn.Module):
    """The middle runs under a checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(checkpoint(self.middle, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("functional", [False, True], ids=["loss module", "functional loss"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, functional: bool) -> None:
    model, loss_fn, (x, y) = Checkpointed(reentrant).double(), nn.CrossEntropyLoss(), batch(6)
    open_model = Checkpointed(False).double()
    open_model.load_state_dict(model.state_dict())
    expected = fisher(open_model, loss_fn, (x, y), kind="exact")
    call = F.cross_entropy if functional else loss_fn
    optimizer = watching(model, loss_fn, curvature_ema=0.0)
    for _ in range(2):
        losses = [lambda: call(model(x[:2]), y[:2]) / 3, lambda: call(model(x[2:]), y[2:]) * 2 / 3]
        assert_same(step(optimizer, losses), expected)
    assert optimizer.statistics.shadows == reentrant
    for p in model.parameters():
        assert p.grad is not None and p.grad.abs().max() > 0


def test_a_loss_on_the_parameters_does_not_send_the_model_to_the_shadow() -> None:
    """A parameter that is used outside the forward pass is reported once, and the others go on as they were."""
    model, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch(6)
    model.register_parameter("penalty", nn.Parameter(torch.ones(2).double()))
    expected = fisher(model, loss_fn, (x, y), kind="exact", params=["0.*", "2.*"])
    optimizer = watching(model, loss_fn, curvature_ema=0.0)
    with pytest.warns(UserWarning, match="penalty has a gradient but no curvature"):
        actual = step(optimizer, [lambda: loss_fn(model(x), y) + model.penalty.square().sum()])
    assert_same(actual, expected)
    assert not optimizer.statistics.shadows
    assert_same(step(optimizer, [lambda: loss_fn(model(x), y) + model.penalty.square().sum()]), expected)


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29517")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inner", [False, True], ids=["wrapper given", "module given"])
def test_distributed_data_parallel_of_one(inner: bool) -> None:
    module, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch(6)
    expected = fisher(module, loss_fn, (x, y), kind="exact")
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = watching(module if inner else model, loss_fn)
    assert_same(step(optimizer, [lambda: loss_fn(model(x), y)]), expected)


@pytest.mark.parametrize("functional", [False, True], ids=["loss module", "functional loss"])
@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_autocast_collects_in_float32(capture: str, functional: bool) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    optimizer = watching(model, loss_fn, capture=capture)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (F.cross_entropy if functional else loss_fn)(model(x), y)

    actual = step(optimizer, [loss])
    assert {block.dtype for block in actual.values()} == {torch.float32}
    assert_same(actual, expected, rtol=0.05)  # activations of 8 bits


def test_half_precision_models_collect_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(64, 8).bfloat16(), torch.randint(0, 3, (64,))
    optimizer = KFAC(model, loss_fn, lr=0.01)
    step(optimizer, [lambda: loss_fn(model(x), y)])
    assert {block.dtype for block in statistics(optimizer).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("functional", [False, True], ids=["loss module", "functional loss"])
def test_gradient_scaling_and_its_overflows(functional: bool) -> None:
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = (t.float() if t.is_floating_point() else t for t in batch(32))
    call = F.cross_entropy if functional else loss_fn
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    optimizer = watching(model, loss_fn, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]

    def scaled_step(bad: bool = False) -> None:
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            loss = call(model(x[rows]), y[rows]) / 4
            scaler.scale(loss).backward()
        if bad:
            model[0].weight.grad[0, 0] = float("inf")
        silently(lambda: scaler.step(optimizer))
        scaler.update()

    scaled_step(bad=True)
    assert optimizer.steps == 0 and not statistics_are_there(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 512.0
    scaled_step()
    assert_same(statistics(optimizer), expected, rtol=1e-4)
    # The step is that of a loop without a scaler.
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for p, q in zip(plain.parameters(), before, strict=True):
        p.data.copy_(q)
    other = watching(plain, loss_fn, lr=0.1)
    loss_fn(plain(x), y).backward()
    other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def statistics_are_there(optimizer: Any) -> bool:
    return any(p.estimator.ready for p in optimizer.preconditioners.values())


def test_a_scaler_that_unscales_first_changes_nothing() -> None:
    """Clipping needs unscale_; the factors do not notice."""
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = (t.float() if t.is_floating_point() else t for t in batch(32))
    optimizer, scaler = watching(model, loss_fn), torch.amp.GradScaler("cpu", init_scale=64.0)
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    scaler.scale(loss_fn(model(x), y)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    assert_same(statistics(optimizer), expected, rtol=1e-4)


def test_a_repeated_pass_casts_as_the_first_did() -> None:
    """A frozen trunk in half precision under autocast; the step itself is outside."""
    found = []
    for capture in ("auto", "shadow"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5).bfloat16().requires_grad_(False), nn.Tanh(), nn.Linear(5, 3))
        loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(8, 4), torch.randint(3, (8,))
        optimizer = watching(model, loss_fn, "diagonal", "exact", capture=capture)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        (block,) = optimizer.preconditioners.values()
        found.append(block.estimator.operator().to_dense())
    assert bool(found[0].any()) and torch.equal(*found)
