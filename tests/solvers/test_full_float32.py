"""Are products of float32 numbers float32 products inside, whatever the process asked for, and is that put back?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import solvers
from solvers.precision import full_float32, reduced

BACKENDS: Any = torch.backends


def precisions() -> tuple[str, str]:
    return BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision


def by_backend(backend: str, precision: str) -> Callable[[], None]:
    return lambda: setattr(getattr(BACKENDS, backend).matmul, "fp32_precision", precision)


#: Ways to ask torch for less than float32, and what its backends then have.
ASKED: dict[str, tuple[Callable[[], None], tuple[str, str]]] = {
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), ("tf32", "bf16")),
    "high": (lambda: torch.set_float32_matmul_precision("high"), ("tf32", "tf32")),
    "cuda": (by_backend("cuda", "tf32"), ("tf32", "ieee")),
    "mkldnn": (by_backend("mkldnn", "bf16"), ("ieee", "bf16")),
}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("way", ASKED)
def test_inside_products_are_full(way: str) -> None:
    ask, given = ASKED[way]
    assert not reduced()
    ask()
    assert reduced() and precisions() == given
    with full_float32, full_float32:
        assert precisions() == ("ieee", "ieee") and not reduced()
    assert precisions() == given and reduced()
    with pytest.raises(ZeroDivisionError), full_float32:
        raise ZeroDivisionError
    assert precisions() == given


def test_nothing_is_touched_where_nothing_was_asked_for() -> None:
    before = precisions()
    with full_float32:
        assert precisions() == before
    assert precisions() == before and torch.get_float32_matmul_precision() == "highest"


def test_the_setting_comes_back_when_the_last_thread_has_left() -> None:
    torch.set_float32_matmul_precision("medium")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_float32:
            inside.set()
            leave.wait(60)

    with full_float32:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
    assert precisions() == ("ieee", "ieee")
    leave.set()
    thread.join()
    assert precisions() == ("tf32", "bf16") and torch.get_float32_matmul_precision() == "medium"


class Noted(solvers.Cholesky):
    """Notes the precision in which it works."""

    seen: tuple[str, str] | None = None

    def power(self, op: Any, exponent: float, previous: Any = None) -> Any:
        type(self).seen = precisions()
        return super().power(op, exponent, previous)


def test_powers_are_computed_in_full() -> None:
    torch.set_float32_matmul_precision("medium")
    solvers.power(solvers.Dense(2 * torch.eye(3)), -1, Noted())
    assert Noted.seen == ("ieee", "ieee") and precisions() == ("tf32", "bf16")


def test_autocast_is_off_inside_and_back_afterwards() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_float32:
            assert (x @ x).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16), full_float32:
                assert (x @ x).dtype == torch.float32
        with pytest.raises(ZeroDivisionError), full_float32:
            raise ZeroDivisionError
        assert (x @ x).dtype == torch.bfloat16


def test_a_function_runs_in_the_region_where_its_operator_was_made() -> None:
    seen: list[torch.dtype] = []

    def product(x: torch.Tensor) -> torch.Tensor:
        seen.append((x @ torch.eye(3)).dtype)
        return 2 * x

    outside = solvers.Function(product, (3,), rmatvec=product)
    with torch.autocast("cpu", torch.bfloat16):
        inside = solvers.Function(product, (3,), rmatvec=product)
        for op in (outside, outside.adjoint()):
            op @ torch.ones(3)
    for op in (inside, inside.adjoint()):
        op @ torch.ones(3)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
