"""Under Lightning: every method equals the plain loop, bit for bit; what cannot is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from precond import KFAC, PSGD, LevenbergMarquardt, QuadraticModel, SecondOrderOptimizer, methods
from precond.closure.optimizer import ClosureOptimizer
from precond.integrations import inner_optimizer

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

LOSS = nn.CrossEntropyLoss()
X = torch.linspace(-1, 1, 96).reshape(24, 4).sin().double()
Y = torch.arange(24) * 7 % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loader() -> Any:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Module(lightning.LightningModule):
    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net, self.make = network(), make
        self.steps: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return LOSS(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.net)

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(inner_optimizer(self.optimizers()).metrics()["steps"])


def fitted(make: Any, folder: Path | None = None, epochs: int = 2, resume: str | None = None, **options: Any) -> Module:
    module = Module(make)
    fit(module, folder, epochs, resume, **options)
    return module


def fit(module: Module, folder: Path | None = None, epochs: int = 2, resume: str | None = None, **options: Any) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, **quiet, **options)
    trainer.fit(module, loader(), ckpt_path=resume)
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")


def plain(make: Any, clip: float = 0.0, parts: int = 1) -> Tensor:
    model = network()
    optimizer = make(model)
    own = isinstance(optimizer, ClosureOptimizer) and optimizer.closure_needed()
    for _ in range(2):
        optimizer.zero_grad()
        for number, (x, y) in enumerate(loader(), 1):
            if own:
                optimizer.step(lambda x=x, y=y: LOSS(model(x), y))
                continue
            (LOSS(model(x), y) / parts).backward()
            if number % parts == 0 or number == 3:  # the last batch of an epoch ends a step
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return flat(model)


def made(cls: Any, name: str, model: nn.Module) -> SecondOrderOptimizer:
    if cls.needs == "layers" or name in ("HessianFree", "CurveBall"):
        return cls(model, LOSS, lr=0.05)
    options = {"damping": 1.0, "damping_rule": LevenbergMarquardt()} if name == "Newton" else {}
    return cls(model.parameters(), lr=0.05, **options)


METHODS: dict[str, Callable[[nn.Module], SecondOrderOptimizer]] = {
    m.name: lambda model, m=m: made(m.cls, m.name, model) for m in methods() if m.name != "GaussNewton"
}
METHODS |= {
    "PSGD, by Hessian": lambda m: PSGD(m.parameters(), lr=0.05, criterion="hessian"),
    "KFAC, rule": lambda m: KFAC(m, LOSS, lr=0.05, damping_rule=LevenbergMarquardt(period=1)),
    "KFAC, rejects": lambda m: KFAC(m, LOSS, lr=0.05, damping_rule=LevenbergMarquardt(reject_steps=True)),
    "KFAC, model": lambda m: KFAC(m, LOSS, lr=1.0, step_size=QuadraticModel()),
}
#: Those that differentiate the loss themselves.
SECOND = ("AdaHessian", "CurveBall", "HessianFree", "Newton", "PSGD, by Hessian", "Sophia")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name: str) -> None:
    module = fitted(METHODS[name])
    assert torch.equal(flat(module.net), plain(METHODS[name]))
    assert module.steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["KFAC", "SOAP", "KFAC, rule", "KFAC, model"])
def test_clipping_and_accumulation(name: str) -> None:
    assert torch.equal(flat(fitted(METHODS[name], gradient_clip_val=0.05).net), plain(METHODS[name], clip=0.05))
    assert torch.equal(flat(fitted(METHODS[name], accumulate_grad_batches=2).net), plain(METHODS[name], parts=2))


class Manual(Module):
    """Its loop by itself, with a closure or without."""

    def __init__(self, make: Callable[[nn.Module], Any], closure: bool) -> None:
        super().__init__(make)
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            self.manual_backward(loss := super(Manual, self).training_step(batch, index))
            return loss

        if self.closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("name", ["KFAC, rule", "PSGD", "SOAP", "HessianFree"])
def test_manual_optimization(name: str, closure: bool) -> None:
    module = Manual(METHODS[name], closure)
    if name == "HessianFree" and not closure:
        with pytest.raises(TypeError, match=r"call step\(closure=\.\.\.\) of its optimizer with yours"):
            fit(module)
    else:
        fit(module)
        assert torch.equal(flat(module.net), plain(METHODS[name]))


def test_clipping_by_value_in_a_method_that_runs_the_closure_again() -> None:
    options = {"gradient_clip_val": 1e3, "gradient_clip_algorithm": "value"}
    assert torch.equal(flat(fitted(METHODS["HessianFree"], **options).net), plain(METHODS["HessianFree"]))


@pytest.mark.parametrize("name", SECOND)
def test_methods_that_differentiate_the_loss_refuse_accumulation(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"adds its gradients to those of other backward passes.*accumulate_grad_batches=1"
    ):
        fitted(METHODS[name], accumulate_grad_batches=2)


def test_residuals_are_refused() -> None:
    with pytest.raises(TypeError, match=r"the closure of GaussNewton must return residuals"):
        fitted(lambda model: made(next(m.cls for m in methods() if m.name == "GaussNewton"), "GaussNewton", model))


@pytest.mark.parametrize("name", ["KFAC", "SOAP", "Sophia", "HessianFree"])
def test_a_run_that_ends_and_is_resumed(name: str, tmp_path: Path) -> None:
    whole = fitted(METHODS[name], epochs=3)
    fitted(METHODS[name], tmp_path, epochs=1)
    resumed = fitted(METHODS[name], epochs=3, resume=str(tmp_path / "last.ckpt"))
    assert torch.equal(flat(resumed.net), flat(whole.net))
