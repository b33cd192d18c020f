"""Are inputs that several layers read multiplied once, and never those of other numbers in their place?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvature.layers.input_moments import InputMoments
from precond import EKFAC, KFAC


class Heads(nn.Module):
    """Three layers on one input, one of them without a bias, and one on another."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 3), nn.Linear(24, 3), nn.Linear(24, 3, bias=False)
        self.out, self.apart = nn.Linear(3, 2), apart

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (m(x.clone() if self.apart else x) for m in (self.q, self.k, self.v))
        result: Tensor = self.out(torch.tanh(a * b + c))
        return result


def one_step(apart: bool, method: Any, fisher: str, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """The state after two passes and a step, and the operations of the passes."""
    torch.manual_seed(0)
    model, loss_fn = Heads(apart).to(dtype), nn.CrossEntropyLoss()
    optimizer = method(model, loss_fn, lr=0.1, fisher=fisher)
    x, y = torch.randn(2, 40, 24, dtype=dtype), torch.randint(2, (2, 40))
    with FlopCounterMode(display=False) as counter:
        for each in zip(x, y, strict=True):
            (loss_fn(model(each[0]), each[1]) / 2).backward()
    optimizer.step()
    return optimizer.state_dict(), counter.get_total_flops()


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [t for value in values for t in tensors(value)]


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize(("fisher", "dtype"), [("mc", torch.float64), ("empirical", torch.bfloat16)])
def test_layers_on_one_input_have_its_moment_to_the_bit(method: Any, fisher: str, dtype: torch.dtype) -> None:
    together, fewer = one_step(False, method, fisher, dtype)
    apart, flops = one_step(True, method, fisher, dtype)
    assert flops - fewer == 2 * 2 * 40 * 24 * 24  # in two passes; v has a moment of its own, without the one
    assert all(torch.equal(a, b) for a, b in zip(tensors(together), tensors(apart), strict=True))


def product(x: Tensor) -> tuple[Tensor, float]:
    return x.mT @ x, float(len(x))


def test_what_changed_or_lies_elsewhere_is_multiplied_again() -> None:
    moments, x = InputMoments(), torch.randn(5, 4)
    first, _ = moments.of(x, None, "plain", lambda: product(x))
    again, count = moments.of(x.view(5, 4), None, "plain", lambda: pytest.fail("is known"))
    assert torch.equal(again, first) and count == 5
    again.add_(1)  # the one who asked may
    assert not torch.equal(moments.of(x, None, "plain", lambda: pytest.fail("is known"))[0], again)
    asked: list[str] = []

    def of(name: str, inputs: Tensor, valid: Tensor | None = None, how: str = "plain") -> None:
        moments.of(inputs, valid, how, lambda: (asked.append(name), product(inputs))[1])

    of("part", x[1:])
    of("other layout", x.view(4, 5))
    of("other weights", x, torch.ones(5))
    of("other way", x, how="reduced")
    first.add_(1)
    of("the moment was written to", x)
    x[0, 0] = 7
    of("the input was written to", x)
    for _ in range(3):  # one after the other in the same memory
        of("freed", torch.randn(5, 4))
    assert len(asked) == 9
