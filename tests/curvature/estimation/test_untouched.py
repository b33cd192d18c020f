"""Is the model afterwards what it was before, also when something went wrong?"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from curvature import fisher
from tests.curvature.problems import PROBLEMS, Problem, classes, normal


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a computation could leave changed."""
    state: dict[str, Any] = {f"value of {n}": t.detach().clone() for n, t in model.named_parameters()}
    state |= {f"buffer {n}": t.detach().clone() for n, t in model.named_buffers()}
    state |= {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state |= {f"flags of {n}": (p.requires_grad, id(p), p._backward_hooks) for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        state[f"module {name}"] = (
            module.training,
            sorted(vars(module)),
            [len(h) for h in hooks],
            "forward" in vars(module),
        )
    state["random numbers"] = torch.random.get_rng_state()
    state["modes"] = (torch.overrides._get_current_function_mode(), torch.is_grad_enabled())
    return state


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        equal = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert equal, f"changed: {key}"


class Everything(nn.Module):
    """Batch norm and spectral norm in train mode, dropout, a frozen part, attention; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(3)
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.attention, self.dropout = nn.MultiheadAttention(4, 2, batch_first=True), nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.inner.bias.requires_grad_(False)
        self.fail_at = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.spectral(self.norm(self.inner(x))))
        self.attention(x, x, x)
        if self.fail_at == len(x):
            raise KeyError("in the forward pass")
        return self.head(x.mean(1))


def everything() -> tuple[Everything, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Everything().double()
    data = [(normal(n, 3, 4), classes(n, of=3)) for n in (3, 2)]
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    return model, data


@pytest.mark.filterwarnings("ignore:not one loss")
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_nothing_changes(structure: Any, kind: Any) -> None:
    model, data = everything()
    before = fingerprint(model)
    with torch.no_grad():
        fisher(model, nn.CrossEntropyLoss(), data, kind=kind, structure=structure)
        assert not torch.is_grad_enabled()
    same(before, fingerprint(model))


@pytest.mark.parametrize("where", ["forward", "loss", "target"])
def test_nothing_changes_when_something_fails(where: str) -> None:
    model, data = everything()
    loss: Any = nn.CrossEntropyLoss()
    error: type[Exception]
    if where == "forward":
        model.fail_at = 2  # in the second batch
        error, message = KeyError, "in the forward pass"
    elif where == "loss":
        loss, error, message = nn.CTCLoss(), Exception, "No derivatives are known"
    else:
        data[1] = (data[1][0], torch.tensor([0, 7]))
        error, message = ValueError, r"must lie in \[0, 3\)"
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        fisher(model, loss, data, kind="exact", structure="ekfac")
    same(before, fingerprint(model))


def test_results_hold_on_to_no_activation_and_to_no_model() -> None:
    """An operator owns its numbers: the model may change or go without changing it."""
    problem = PROBLEMS["mlp_ce"]()
    model = copy.deepcopy(problem.model)
    operator = fisher(model, problem.loss_fn, problem.data, kind="exact", structure="kfac")
    matrix = operator.to_dense().clone()
    assert not matrix.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(operator.to_dense(), matrix)
    parts = [weakref.ref(part) for part in (model, *model.parameters())]
    del model, p
    gc.collect()
    assert [part for part in parts if part() is not None] == []


@pytest.mark.filterwarnings("ignore:not one loss")
def test_twice_gives_the_same() -> None:
    for name in ("residual_train", "unknown_uses", "language_model"):
        problem: Problem = PROBLEMS[name]()
        one, two = (
            fisher(
                problem.model,
                problem.loss_fn,
                problem.data,
                kind="exact",
                class_dim=problem.class_dim,
                structure="kfac",
            ).to_dense()
            for _ in range(2)
        )
        assert torch.equal(one, two)
