"""Does an optimizer print what it does, in lines that a terminal holds?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond import KFAC, SOAP, methods, param_groups


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = [nn.ModuleDict({"attention": nn.Linear(4, 12), "perceptron": nn.Linear(4, 4)}) for _ in range(layers)]
        self.a_name_that_is_rather_long_as_wrappers_make_them = nn.ModuleList(layer)


def test_what_groups_share_stands_once_and_what_differs_in_a_table() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    rate = torch.tensor(0.5)
    groups = param_groups(model, weight_decay=0.25, options={"head": {"lr": 0.125}})
    lines = str(SOAP(groups, lr=rate)).splitlines()
    assert lines[0] == "SOAP: step 0, 3 parameters, 35 numbers"
    table = [line.split() for line in lines if line.split()[0] in ("group", "embedding", "head", "bias")]
    assert table == [
        ["group", "lr", "weight_decay", "numbers", "parameters"],
        ["embedding", "0.5", "0", "20", "0.weight"],
        ["head", "0.125", "0.25", "12", "1.weight"],
        ["bias", "0.5", "0", "3", "1.bias"],
    ]
    shared = " ".join(lines[1:]).partition("group")[0]
    assert "betas=(0.95, 0.95)" in shared and "weight_decay" not in shared and "param_names" not in shared


def test_one_group_has_no_table_and_the_step_moves_on() -> None:
    model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(torch.ones(4, 3)), torch.zeros(4, 2)).backward()
    optimizer.step()
    first, *rest = repr(optimizer).splitlines()
    assert first == "KFAC: step 1, 2 parameters, 8 numbers"
    assert "lr=0.1, momentum=0.9" in rest[0] and not any("group" in line for line in rest)


def test_a_value_that_follows_the_steps_says_so() -> None:
    """KFAC's periods are 1 at its first step, and will be 5 and 10."""
    model = nn.Linear(3, 2)
    text = " ".join(repr(KFAC(model, nn.MSELoss(), damping=lambda step: 0.5)).split())
    assert "inverse_update_period=1 now, by Doubling(period=10)" in text
    assert "curvature_update_period=1 now, by Doubling(period=5)" in text
    assert "damping=0.5 now, by a function of the step" in text and "curvature_ema=0.95," in text
    text = " ".join(repr(KFAC(model, nn.MSELoss(), curvature_update_period=3, inverse_update_period=5)).split())
    assert "curvature_update_period=3," in text and "inverse_update_period=5" in text and "now" not in text


@pytest.mark.parametrize("name", [m.name for m in methods() if m.needs == "grad"])
def test_lines_are_short_for_every_method_of_a_deep_model(name: str) -> None:
    cls = next(m.cls for m in methods() if m.name == name)
    text = str(cls(param_groups(Deep(30)), lr=0.1))  # type: ignore[call-arg]
    assert all(len(line) <= 100 for line in text.splitlines()) and len(text.splitlines()) < 20
    assert "0-29.attention.weight" in text.replace("\n", "").replace(" ", "")
