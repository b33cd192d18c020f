"""The inverse applied to the rows of a gradient is the inverse applied to the gradient, or is not used at all."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precond import EKFAC, KFAC
from precond.layerwise.blocks import rows as by_rows
from solvers import CholeskyInverse

Edit = Callable[[nn.Module], object]


@pytest.fixture(autouse=True)
def _rows_of_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are used where they save anything at all."""
    monkeypatch.setattr(by_rows, "WORTH", 0)


def setup(period: int = 1, method: Any = KFAC) -> tuple[nn.Module, nn.Module, KFAC]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 36, bias=False), nn.Tanh(), nn.Linear(36, 5))
    model, loss_fn = model.double(), nn.CrossEntropyLoss()
    options = {"curvature_update_period": period, "inverse_update_period": period}
    return model, loss_fn, method(model, loss_fn, lr=0.02, damping=1e-2, **options)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 40, generator=g, dtype=torch.float64), torch.randint(5, (6,), generator=g)


def train(model: nn.Module, loss_fn: nn.Module, optimizer: KFAC, steps: int, edit: Edit | None = None) -> torch.Tensor:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if edit is not None:
            edit(model)
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def counts(optimizer: KFAC) -> list[int]:
    return [tap.count for tap in optimizer.taps.taps.values()]


def scale(factor: float) -> Edit:
    return lambda model: [p.grad.mul_(factor) for p in model.parameters()]


@pytest.mark.parametrize(("period", "method"), [(1, KFAC), (4, KFAC), (30, KFAC), (30, EKFAC)])
def test_rows_give_what_the_gradient_gives(period: int, method: Any) -> None:
    """EKFAC turns them into its eigenbasis; a new one has rounding errors for directions where factors have zeros."""
    few, by_gradient = setup(period, method), setup(period, method)
    a = train(*few, steps=9)
    b = train(*by_gradient, steps=9, edit=scale(1.0))  # a new version, so the rows no longer vouch for it
    assert max(counts(few[2])) == 6 and max(counts(by_gradient[2])) == 0
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_short_periods_keep_the_triangular_factor() -> None:
    model, loss_fn, optimizer = setup(1)
    train(model, loss_fn, optimizer, 3)
    inverse = optimizer.preconditioners["0.weight+0.bias"].inverse
    assert all(isinstance(factor, CholeskyInverse) for factor in inverse.factors)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
        lambda model: [p.grad.data.clamp_(-0.01, 0.01) for p in model.parameters()],  # no new version
        lambda model: [setattr(p, "grad", p.grad * 0.5) for p in model.parameters()],
    ],
    ids=["clip_grad_norm_", "data.clamp_", "replaced"],
)
def test_edited_gradients_are_honoured(edit: Edit) -> None:
    """The same edit on gradients that are known to be edited gives the same run."""
    plain, marked = setup(), setup()

    def edit_and_mark(model: nn.Module) -> None:
        edit(model)
        scale(1.0)(model)

    a, b = train(*plain, steps=6, edit=edit), train(*marked, steps=6, edit=edit_and_mark)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_smallest_change_of_a_gradient_is_seen() -> None:
    """One entry, by a millionth, in a way that leaves no version: the rows of that layer are not used, others are."""
    model, loss_fn, optimizer = setup()
    train(model, loss_fn, optimizer, 2)
    train(model, loss_fn, optimizer, 1, edit=lambda m: m[2].weight.grad.data[3, 5].mul_(1 + 1e-6))
    assert counts(optimizer) == [6, 0, 0]
    train(model, loss_fn, optimizer, 1)
    assert counts(optimizer) == [6, 6, 0]


def test_gradients_that_a_hook_edits_are_honoured() -> None:
    """A hook on a parameter clips its largest entry a little before autograd writes the gradient."""
    plain, marked = setup(), setup()
    for run in (plain, marked):
        train(*run, steps=2)
        run[0][0].weight.register_hook(lambda g: g.clamp(max=float(g.max()) * 0.999))
    a, b = train(*plain, steps=2), train(*marked, steps=2, edit=scale(1.0))
    assert counts(plain[2]) == [0, 6, 0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_accumulated_gradients_are_not_taken_for_rows() -> None:
    model, loss_fn, optimizer = setup()
    train(model, loss_fn, optimizer, 2)
    x, y = data()
    optimizer.zero_grad()
    for half in (slice(0, 3), slice(3, 6)):
        (loss_fn(model(x[half]), y[half]) / 2).backward()
    optimizer.step()
    assert counts(optimizer) == [0, 0, 0]


def test_two_backward_passes_through_one_graph_are_not_taken_for_rows() -> None:
    model, loss_fn, optimizer = setup()
    train(model, loss_fn, optimizer, 2)
    x, y = data()
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert counts(optimizer) == [0, 0, 0]


@pytest.mark.parametrize("period", [1, 3, 30])
def test_resume_is_exact(period: int) -> None:
    model, loss_fn, optimizer = setup(period)
    train(model, loss_fn, optimizer, 7)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = setup(period)
    again[0].load_state_dict(saved["model"])
    again[2].load_state_dict(saved["optimizer"])
    assert torch.equal(train(model, loss_fn, optimizer, 5), train(*again, steps=5))


def test_small_layers_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, loss_fn, optimizer = setup()
    train(model, loss_fn, optimizer, 2)
    assert not optimizer.taps.taps and not by_rows.cheaper(16, 128, 128) and by_rows.cheaper(16, 256, 256)


@pytest.mark.parametrize("period", [1, 10])
def test_detach_removes_the_taps_for_good(period: int) -> None:
    model, loss_fn, optimizer = setup(period)
    train(model, loss_fn, optimizer, 2)
    assert any(module._forward_hooks for module in model.modules())
    optimizer.detach()
    before = {name: p.inverse for name, p in optimizer.preconditioners.items()}
    for _ in range(2):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in [*model.modules(), loss_fn])
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        weights = model[0].weight.detach().clone()
        train(model, loss_fn, optimizer, 12 // period)
        assert not torch.equal(weights, model[0].weight)
    assert all(p.inverse is before[name] for name, p in optimizer.preconditioners.items())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        hooked = [m for m in [*again.model.modules(), again.loss_fn] if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked and "_compiled_call_impl" not in vars(again.model)
        train(again.model, again.loss_fn, again, 2)
        assert not any(p._post_accumulate_grad_hooks for p in again.model.parameters())


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_rows_of_autocast_are_those_of_its_gradients(make: Any) -> None:
    moved = {}
    for rows in (True, False):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 80)), nn.CrossEntropyLoss()
        optimizer = make(model, loss_fn, lr=0.05, kl_clip=None)
        x, y = torch.randn(8, 64), torch.randint(80, (8,))
        before = model[0].weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(x), y)
            loss.backward()
            for p in () if rows else model.parameters():
                p.grad = p.grad.clone()  # no longer what autograd wrote, so taken as it is
            optimizer.step()
        moved[rows] = model[0].weight.detach() - before
    assert moved[False].norm() > 0
    # Rows of bfloat16: 2^-8 of each, and sums of eight.
    torch.testing.assert_close(moved[True], moved[False], rtol=0, atol=0.02 * float(moved[False].abs().max()))
