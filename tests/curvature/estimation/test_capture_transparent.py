"""Does a training loop compute the very same numbers with capture on and off, and is nothing left behind?"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from precond import EKFAC, KFAC, PreconditionedOptimizer
from tests.curvature.loops import assert_same, batch, fisher, mlp, statistics, step, watching


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(16, 3)), torch.randn(6, 2, 4, 4), torch.randint(0, 3, (6,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 3))
    return model, torch.randn(5, 3, 8), torch.randint(0, 3, (5,))


def loop(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]], options: dict[str, Any] | None, loss_fn: Any
) -> list[Tensor]:
    """Everything a loop can see after three steps that move nothing."""
    torch.manual_seed(0)
    model, x, y = make()
    loss = nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if options is not None:
        optimizer = watching(model, loss, **{"structure": "ekfac", **options})
    seen: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        value = (loss if loss_fn is None else loss_fn)(model(x), y)
        value.backward()
        seen += [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    seen += [t.detach().clone() for t in model.state_dict().values()]
    return [*seen, torch.get_rng_state(), torch.rand(3)]


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(
    ("loss_fn", "capture"),
    [(None, "auto"), (F.cross_entropy, "auto"), (None, "shadow"), (F.cross_entropy, "shadow")],
    ids=["loss tap", "gradient tap", "shadow", "shadow, functional"],
)
@pytest.mark.parametrize("make", [convolutional, transformer])
def test_gradients_buffers_and_random_numbers_are_bit_identical(
    make: Any, loss_fn: Any, capture: str, kind: str
) -> None:
    plain = loop(make, None, loss_fn)
    watched = loop(make, {"capture": capture, "kind": kind}, loss_fn)
    assert len(plain) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def hooks(*modules: nn.Module) -> int:
    """All hooks on the modules and their parameters."""
    count = 0
    for module in (m for root in modules for m in root.modules()):
        count += sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value)
    for p in (p for module in modules for p in module.parameters()):
        count += len(p._backward_hooks or {}) + len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
    return count


# Exceptions ----------------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, which runs no hooks."""


class Fragile(nn.Module):
    """Raises on demand, in its forward pass or in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.error = mlp(), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner[0](x)
        if self.error is not None:
            raise self.error
        return self.inner[1:](h)


def failing_hook(*args: Any) -> None:
    raise ValueError("hook")


@pytest.mark.parametrize("where", ["forward", "interrupt", "hook before", "hook after", "loss", "target"])
@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_an_exception_leaves_nothing_behind(capture: str, where: str) -> None:
    x, y = batch(6)
    model, loss_fn = Fragile(), nn.CrossEntropyLoss()
    early = model.register_forward_hook(failing_hook) if where == "hook before" else None
    optimizer = watching(model, loss_fn, capture=capture)
    late = model.register_forward_hook(failing_hook) if where == "hook after" else None
    before = hooks(model, loss_fn)
    model.error = {"forward": ValueError(), "interrupt": Interrupted()}.get(where)  # type: ignore[assignment]
    with pytest.raises((ValueError, Interrupted, IndexError)):
        loss_fn(model(x[:4]), y[:4] + 7 if where == "target" else y[:3] if where == "loss" else y[:4])
    model.error = None
    for handle in (early, late):
        if handle is not None:
            handle.remove()
            before -= 1
    if where != "interrupt":
        assert not _get_current_function_mode_stack()
    actual = step(optimizer, [lambda: loss_fn(model(x), y)])
    assert not _get_current_function_mode_stack()
    assert hooks(model, loss_fn) <= before + hooks(model.inner)
    assert_same(actual, fisher(model, loss_fn, (x, y), kind="exact"))


def test_an_interrupted_pass_is_given_up_at_the_next_step_or_detach() -> None:
    model = Fragile()
    optimizer = watching(model, nn.CrossEntropyLoss())
    model.error = Interrupted()  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        model(batch(3)[0])
    optimizer.detach()
    assert not _get_current_function_mode_stack()


def test_a_model_that_calls_itself_is_one_pass() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            h = self.layer(x).tanh()
            return self(h, depth - 1) if depth else self.head(h)

    torch.manual_seed(0)
    model, loss_fn, (x, y) = Recursive().double(), nn.CrossEntropyLoss(), batch(5)
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    assert_same(step(watching(model, loss_fn), [lambda: loss_fn(model(x), y)]), expected)
    assert not _get_current_function_mode_stack()


# Leaving -------------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, steps: int = 2) -> None:
    x, y = batch(6)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_detach_removes_every_hook(make: type[PreconditionedOptimizer]) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    assert hooks(model, loss_fn) == 0
    optimizer = make(model, loss_fn, lr=0.01)  # type: ignore[call-arg]
    train(model, optimizer, loss_fn)
    assert hooks(model, loss_fn) > 0
    optimizer.detach()
    assert hooks(model, loss_fn) == 0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)


def test_no_attribute_is_left_on_the_model() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    before = [set(vars(m)) for m in (*model.modules(), loss_fn)]
    train(model, KFAC(model, loss_fn, lr=0.01), loss_fn)
    gc.collect()
    assert [set(vars(m)) for m in (*model.modules(), loss_fn)] == before


def test_a_deleted_optimizer_leaves_inert_hooks_and_frees_its_factors() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.01)
    train(model, optimizer, loss_fn)
    factor = weakref.ref(optimizer.preconditioners["0.weight+0.bias"])
    del optimizer
    gc.collect()
    assert factor() is None
    other = watching(model, loss_fn)
    assert_same(
        step(other, [lambda: loss_fn(model(batch(6)[0]), batch(6)[1])]), fisher(model, loss_fn, batch(6), kind="exact")
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("compiled", [False, True])
def test_copies_and_pickles_of_the_model_leave_the_optimizer_behind(compiled: bool) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    if compiled:
        model.compile(backend="eager")
    optimizer = KFAC(model, loss_fn, lr=0.01)
    train(model, optimizer, loss_fn)
    before = statistics(optimizer)
    optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        loss_fn(other(batch(6)[0]), batch(6)[1]).backward()
        assert optimizer.statistics.batches == 0 and not optimizer.tape.passes
        assert b"precond" not in buffer.getvalue()
    assert_same(statistics(optimizer), before)
    train(model, optimizer, loss_fn)


def test_a_copied_or_pickled_optimizer_goes_on_as_the_original_does() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = EKFAC(model, loss_fn, lr=0.01)
    train(model, optimizer, loss_fn)
    buffer = io.BytesIO()
    torch.save((model, loss_fn, optimizer), buffer)
    buffer.seek(0)
    copies = [copy.deepcopy((model, loss_fn, optimizer)), torch.load(buffer, weights_only=False)]
    train(model, optimizer, loss_fn)
    for other, other_loss, other_optimizer in copies:
        train(other, other_optimizer, other_loss)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_nothing_is_kept_between_steps() -> None:
    """Activations are released when a step ends."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    x, y = batch(6)
    optimizer = KFAC(model, loss_fn, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        z = model(x)
        node = weakref.ref(z)
        loss = loss_fn(z, y)
        loss.backward()
        del z, loss
        optimizer.step()
    gc.collect()
    assert node() is None
    assert not optimizer.tape.passes
