"""Axes that are to keep a diagonal never see a matrix of their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precond import PSGD, SOAP, KLShampoo, Shampoo, SPlus


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


METHODS = [SOAP, KLShampoo, Shampoo, PSGD, SPlus]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("shape", [(2000, 1), (1, 2000), (1000, 24), (24, 1000)])
def test_axes_far_longer_than_the_others_have_no_matrix_by_default(make: Callable[..., Any], shape: Any) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = make([p])
    with Largest() as largest:
        p.square().sum().backward()
        optimizer.step()
    assert largest.numbers <= 8 * p.numel()


@pytest.mark.parametrize("make", METHODS)
def test_max_ratio_decides_and_none_is_any_ratio(make: Callable[..., Any]) -> None:
    def matrices(shape: tuple[int, int], **options: Any) -> set[int]:
        p = nn.Parameter(torch.ones(shape))
        optimizer = make([p], **options)
        p.square().sum().backward()
        optimizer.step()
        found = [x for name, x in optimizer.state[p].items() if isinstance(x, Tensor) and name[-2] == "."]
        return {len(x) for x in found if x.ndim == 2}

    assert matrices((40, 8)) == {8}
    assert matrices((40, 8), max_ratio=5.0) == {8, 40}
    assert matrices((32, 2)) == {2, 32}  # short axes cost nothing
    assert matrices((300, 2)) == {2}
    assert matrices((300, 2), max_ratio=None) == {2, 300}
    with pytest.raises(ValueError, match="max_ratio"):
        make([nn.Parameter(torch.ones(2, 2))], max_ratio=-1.0)


@pytest.mark.parametrize("make", [SOAP, KLShampoo, Shampoo])
def test_a_state_from_before_max_ratio_goes_on_with_all_its_matrices(make: Callable[..., Any]) -> None:
    def trained(steps: int, start: Any = None) -> tuple[nn.Parameter, Any]:
        p = nn.Parameter(torch.linspace(-1, 1, 120).reshape(60, 2).double())
        optimizer = make([p], **({"max_ratio": None} if start is None else {}))
        if start is not None:
            p.data.copy_(start[0])
            optimizer.load_state_dict(start[1])
        for _ in range(steps):
            optimizer.zero_grad()
            (p.square() * torch.arange(1.0, 121).reshape(60, 2)).sum().backward()
            optimizer.step()
        return p, optimizer

    whole, _ = trained(5)
    part, optimizer = trained(3)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["max_ratio"]
    rest, _ = trained(2, (part.detach(), saved))
    assert torch.equal(rest, whole)
