"""What steps dispatch: operations by name, and those that wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precond import GaussNewton
from precond.step.methods import Method

#: Operations that give the host a number of the device.
WAITS = ("aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default", "aten.equal.default")


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside; what only looks at metadata counts as well."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(self.found[name] for name in WAITS)


def network(depth: int, width: int = 5) -> nn.Sequential:
    """Layers of one shape."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, width)]
    for _ in range(depth):
        layers += [nn.Tanh(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Linear(width, 2)).double()


def step(optimizer: Any, model: nn.Module, seed: int) -> Operations:
    """One step of any method, on a batch of its own; the operations of ``step()`` alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

    def closure() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    optimizer.zero_grad()
    if isinstance(optimizer, GaussNewton):
        residuals = lambda: (2 / y.numel()) ** 0.5 * (model(x) - y)  # noqa: E731
        with Operations() as operations:
            optimizer.step(residuals)
    elif optimizer.needs == "closure":
        with Operations() as operations:
            optimizer.step(closure)
    else:
        (optimizer.loss_fn(model(x), y) if optimizer.needs == "layers" else closure()).backward()
        with Operations() as operations:
            optimizer.step()
    return operations


def made(method: Method, model: nn.Module, **options: Any) -> Any:
    given = (model, nn.MSELoss()) if method.needs == "layers" else (model.parameters(),)
    return method.cls(*given, **({"lr": 1e-3} if method.needs != "closure" else {}), **options)
