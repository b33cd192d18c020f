"""Under skorch: equal to the plain loop, with the class that it makes and the closure that it passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import (
    KFAC,
    PSGD,
    SOAP,
    AdaHessian,
    CurveBall,
    GaussNewton,
    HessianFree,
    LevenbergMarquardt,
    Newton,
    QuadraticModel,
    Sophia,
)
from precond.integrations import with_model

skorch = pytest.importorskip("skorch")
pytestmark = pytest.mark.filterwarnings("ignore")

LOSS = nn.CrossEntropyLoss()
X = torch.linspace(-1, 1, 96).reshape(24, 4).sin().double()
Y = torch.arange(24) * 7 % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC": (KFAC, {}),
    "KFAC, rule": (KFAC, {"damping_rule": LevenbergMarquardt(period=1)}),
    "KFAC, model": (KFAC, {"step_size": QuadraticModel()}),
    "SOAP": (SOAP, {}),
    "PSGD": (PSGD, {}),
    "PSGD, by Hessian": (PSGD, {"criterion": "hessian"}),
    "Sophia": (Sophia, {"curvature_update_period": 2}),
    "AdaHessian": (AdaHessian, {}),
    "HessianFree": (HessianFree, {}),
    "CurveBall": (CurveBall, {}),
    "Newton": (Newton, {"damping": 1.0, "damping_rule": LevenbergMarquardt()}),
}


def net(name: str, model: nn.Module, epochs: int = 2) -> Any:
    cls, options = METHODS[name]
    given = {f"optimizer__{key}": value for key, value in options.items()}
    return skorch.NeuralNet(
        model,
        criterion=LOSS,
        optimizer=with_model(cls, model, LOSS),
        lr=0.05,
        max_epochs=epochs,
        batch_size=8,
        train_split=None,
        verbose=0,
        **given,
    )


def plain(name: str) -> Tensor:
    model = network()
    cls, options = METHODS[name]
    optimizer = with_model(cls, model, LOSS)(model.parameters(), lr=0.05, **options)
    for _ in range(2):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            if optimizer.needs == "closure" or options:

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    optimizer.zero_grad()
                    loss = LOSS(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
                continue
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    return flat(model)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_loop(name: str) -> None:
    model = network()
    fitted = net(name, model).fit(X, Y)
    assert fitted.module_ is model and type(fitted.optimizer_) is METHODS[name][0]
    assert torch.equal(flat(model), plain(name))
    assert fitted.optimizer_.metrics()["steps"] == 6


@pytest.mark.parametrize("name", ["KFAC", "SOAP"])
def test_parameters_are_saved_and_loaded(name: str, tmp_path: Any) -> None:
    files = {"f_params": tmp_path / "model.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net(name, network(), epochs=1).fit(X, Y).save_params(**files)
    model = network()
    resumed = net(name, model, epochs=1).initialize()
    resumed.load_params(**files)
    resumed.partial_fit(X, Y)
    assert torch.equal(flat(model), plain(name))


def test_a_loss_in_the_place_of_residuals_is_refused() -> None:
    options = {"optimizer": GaussNewton, "lr": 1.0, "max_epochs": 1, "train_split": None, "verbose": 0}
    with pytest.raises(TypeError, match=r"GaussNewton called backward\(\) on what it returned, which is a loss"):
        skorch.NeuralNet(network(), criterion=LOSS, **options).fit(X, Y)


def test_a_copy_of_the_model_is_refused() -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone

    with pytest.raises(ValueError, match="which is no trainable parameter of the model"):
        clone(net("KFAC", network())).fit(X, Y)
