"""Half precision with a ``GradScaler``, by hand, under Accelerate and Lightning; an overflow leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import precond
from precond.integrations import inner_optimizer

LOSS = nn.CrossEntropyLoss()
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) * 7 % 3
#: In float16, gradients of about 1/16 overflow under the first scale and not under the second.
TOO_LARGE, FITS = 2.0**24, 2.0**12
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda m: precond.KFAC(m, LOSS, lr=0.05),
    "EKFAC": lambda m: precond.EKFAC(m, LOSS, lr=0.05, inverse_update_period=2),
    "SOAP": lambda m: precond.SOAP(m.parameters(), lr=0.03),
    "Muon": lambda m: precond.Muon(m.parameters(), lr=0.03),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loader(first: int = 0) -> Any:
    return DataLoader(TensorDataset(X[4 * first :], Y[4 * first :]), batch_size=4)


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=FITS / TOO_LARGE)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(make: Any, scale: float | None, first: int = 0) -> Tensor:
    model = network()
    optimizer, scaling = make(model), None if scale is None else scaler(scale)
    for x, y in loader(first):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = LOSS(model(x), y)
        if scaling is None:
            loss.backward()
            optimizer.step()
        else:
            scaling.scale(loss).backward()
            scaling.step(optimizer)
            scaling.update()
    assert optimizer.steps == 6 - first - (scale == TOO_LARGE)
    return flat(model)


def accelerated(make: Any, scale: float | None, first: int = 0) -> Tensor:
    """Accelerate scales on accelerators alone; here it is handed a scaler for the processor."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler, model = None if scale is None else scaler(scale), network()
    model, optimizer, data = accelerator.prepare(model, make(model), loader(first))
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = LOSS(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
    assert inner_optimizer(optimizer).steps == 6 - first - (scale == TOO_LARGE)
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    return flat(accelerator.unwrap_model(model))


def under_lightning(make: Any, scale: float | None, first: int = 0) -> Tensor:
    lightning = pytest.importorskip("lightning")
    plugins = pytest.importorskip("lightning.pytorch.plugins")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return LOSS(self.net(batch[0]), batch[1])  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return make(self.net)

    if scale is None:
        pytest.skip("Lightning has no float16 without a scaler")
    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_model_summary=False,
        plugins=[Half(plugins, scaler(scale))],
        **quiet,
    )
    trainer.fit(module, loader(first))
    assert inner_optimizer(module.optimizers()).steps == 6 - first - (scale == TOO_LARGE)
    return flat(module.net)


def Half(plugins: Any, scaling: torch.amp.GradScaler) -> Any:
    """Lightning's mixed precision, whose autocast on the processor is bfloat16, in float16."""
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaling)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", torch.float16)
    return plugin


LOOPS = {"plain": plain, "Accelerate": accelerated, "Lightning": under_lightning}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", METHODS)
def test_scaled_gradients_are_the_plain_loop(name: str, loop: str) -> None:
    """A scale is a power of two, and so exact where nothing leaves the range of float16; the rest is float32's."""
    make, start = METHODS[name], flat(network())
    unscaled = plain(make, None)
    found = LOOPS[loop](make, FITS)
    assert (unscaled - start).norm() > 0.05
    torch.testing.assert_close(found, unscaled, rtol=0, atol=1e-6)
    assert torch.equal(found, plain(make, FITS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_overflows_leaves_no_trace(name: str, loop: str) -> None:
    make = METHODS[name]
    assert torch.equal(LOOPS[loop](make, TOO_LARGE), plain(make, FITS, first=1))
