"""Memory that runs out is said as it is: no slower way is tried, and no other message takes its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.cli.source import UsageError
from curvature.cli.source import load as load_source
from curvature.losses import AutogradLoss
from curvature.structures.kfac import KroneckerFisher
from precond import least_squares
from solvers.outcome.memory import is_out_of_memory

ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError(ON_CPU),
    "numpy": MemoryError("Unable to allocate 8.00 TiB for an array"),
}


class Full:
    """Fails at its first call as torch does where memory runs out, and counts the calls."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            raise self.error


class Watched(torch.autograd.Function):
    """The identity, whose backward pass calls a function."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.call()
        return gradients[0], None


class Model(nn.Module):
    """A layer whose forward or backward pass runs out of memory once it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.backward: Full | None = None
        self.forward_mode: Full | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.forward_mode is not None:
            self.forward_mode()
        h = self.layer(x).tanh()
        if self.backward is not None and h.requires_grad:
            h = Watched.apply(h, self.backward)
        return h * h


X, Y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)


def product_of(operator: Callable[[Model], Any]) -> Callable[[Full], None]:
    """A product with several vectors at once, whose backward pass fails."""

    def run(full: Full) -> None:
        model = Model()
        model.backward = full
        full.calls = 1  # not while the operator is made
        op = operator(model)
        full.calls = 0
        op @ torch.randn(3, op.in_shape[0], dtype=torch.float64)

    return run


def pushed_forward(full: Full) -> None:
    """A Jacobian-vector product by dual numbers, whose forward pass fails."""
    model = Model()
    jacobian = curvature.jacobian(model, X, mode="forward")
    jacobian @ torch.randn(jacobian.in_shape, dtype=torch.float64)  # which checks the first
    model.forward_mode = full
    jacobian @ torch.randn(3, *jacobian.in_shape, dtype=torch.float64)


def loss_of_a_term(full: Full) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        full()
        return (z - y).square().mean()

    curvature.ggn(Model(), AutogradLoss(loss, reduction="mean"), [(X, Y)]).to_dense()


def residuals(full: Full) -> None:
    def fun(x: Tensor) -> Tensor:
        if torch.autograd.forward_ad._current_level >= 0:
            full()
        return x - 1

    least_squares(fun, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(product_of(lambda m: curvature.hessian(m, nn.MSELoss(), (X, Y))), id="hessian"),
        pytest.param(product_of(lambda m: curvature.ggn(m, nn.MSELoss(), (X, Y))), id="ggn"),
        pytest.param(product_of(lambda m: curvature.jacobian(m, X)), id="jacobian"),
        pytest.param(pushed_forward, id="jacobian forward"),
        pytest.param(loss_of_a_term, id="loss"),
        pytest.param(residuals, id="least_squares"),
    ],
)
def test_no_slower_way_is_tried(run: Callable[[Full], None], error: str) -> None:
    full = Full(ERRORS[error])
    with pytest.raises(type(full.error)) as caught:
        run(full)
    assert caught.value is full.error
    assert full.calls == 1


@pytest.mark.parametrize("error", ERRORS)
def test_a_file_is_not_called_damaged(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "sums.pt", {"structure": KroneckerFisher("exact")}
    curvature.ggn(nn.Linear(3, 2).double(), nn.MSELoss(), [(X, Y)], resume=path, **options)
    monkeypatch.setattr(torch, "load", lambda *_, **__: Full(ERRORS[error])())
    with pytest.raises(type(ERRORS[error])) as caught:
        curvature.ggn(nn.Linear(3, 2).double(), nn.MSELoss(), [(X, Y)], resume=path, **options)
    assert caught.value is ERRORS[error]


def test_the_command_line_tells_a_full_memory_from_a_wrong_source(tmp_path: Path) -> None:
    file = tmp_path / "source.py"
    file.write_text("import torch\ndef full(): raise torch.OutOfMemoryError('full')\ndef wrong(): raise RuntimeError\n")
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        load_source(f"{file}:full")
    with pytest.raises(UsageError):
        load_source(f"{file}:wrong")


@pytest.mark.parametrize(
    ("error", "of_memory"),
    [
        *((error, True) for error in ERRORS.values()),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("vmap: It looks like you're calling .item() on a Tensor."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, of_memory: bool) -> None:
    assert is_out_of_memory(error) == of_memory
    wrapped = RuntimeError("another message")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == of_memory
