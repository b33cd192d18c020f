"""A state that is loaded while gradients stand in p.grad: the step refuses them, or they are cleared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KFAC

CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("clear", ["no", "none", "zeros"])
@pytest.mark.parametrize("begun", [0, 2, 3], ids=["first step", "due", "not due"])
def test_statistics_that_a_load_has_dropped_are_not_taken_for_those_of_the_step(
    method: type[KFAC], clear: str, begun: int
) -> None:
    def run(load: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(8, 4, generator=generator).double(), torch.arange(8) % 3
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(4, 3).double()
        optimizer = method(model, CE, lr=0.1, curvature_update_period=2)
        for _ in range(begun):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        if load or clear == "no":
            (CE(model(x[:4]), y[:4]) / 2).backward()
        if load:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if clear != "no":
            optimizer.zero_grad(set_to_none=clear == "none")
        (CE(model(x[4:]), y[4:]) / 2).backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    if clear == "no" and begun != 3:
        with pytest.raises(RuntimeError, match=r"Call zero_grad\(\) after load_state_dict\(\)"):
            run(True)
    else:
        torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)
