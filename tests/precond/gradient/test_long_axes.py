"""Axes that are to keep a diagonal never see a matrix of their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precond import PSGD, SOAP, KLShampoo, SPlus
from precond.gradient.matrices import worth_a_matrix


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("shape", [(2000, 16), (2000,), (2000, 1), (1, 2000), (3000, 3), (16, 2000)])
@pytest.mark.parametrize("name", ["PSGD", "PSGD on the Hessian", "SPlus", "SOAP", "KLShampoo"])
def test_no_matrix_of_a_long_axis_is_made(name: str, shape: tuple[int, ...]) -> None:
    makes: dict[str, Callable[[Any], Any]] = {
        "PSGD": lambda p: PSGD(p, max_dim=256),
        "PSGD on the Hessian": lambda p: PSGD(p, max_dim=256, criterion="hessian"),
        "SPlus": lambda p: SPlus(p, max_dim=256),
        "SOAP": lambda p: SOAP(p, max_dim=256),
        "KLShampoo": lambda p: KLShampoo(p, max_dim=256),
    }
    p = nn.Parameter(torch.ones(shape))
    optimizer = makes[name]([p])
    with Largest() as largest:
        for _ in range(2):
            optimizer.zero_grad()
            if name == "PSGD on the Hessian":
                optimizer.step(lambda: p.square().square().sum())
            else:
                p.square().sum().backward()
                optimizer.step()
    assert largest.numbers <= 8 * p.numel()
    assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize("make", [PSGD, SPlus])
def test_long_thin_tables_have_no_matrix_by_default(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(2000, 1))
    optimizer = make([p])
    with Largest() as largest:
        p.square().sum().backward()
        optimizer.step()
    assert largest.numbers <= 8 * p.numel()
    assert worth_a_matrix(2000, 2000 * 16, 8192) and not worth_a_matrix(2000, 2000, 8192)
