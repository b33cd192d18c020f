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

from curvature import coverage, fisher, hessian
from curvature.estimation.tape import Tape
from curvature.model.settings import own_buffers
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


@pytest.mark.filterwarnings("ignore:not one loss")
@pytest.mark.parametrize("door", ["fisher", "hessian", "coverage", "repeat"])
def test_a_graph_of_the_users_stands_across_passes_of_ours(door: str) -> None:
    """Batch norm keeps its statistics in the graph: between a loss and its backward pass nobody may write to them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3)).double()
    twin, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()
    data = [(normal(n, 4), classes(n, of=3)) for n in (3, 5)]
    doors: dict[str, Any] = {
        "fisher": lambda: fisher(model, loss_fn, data[1], kind="mc", structure="kfac"),
        "hessian": lambda: hessian(model, loss_fn, data[1]) @ normal(35 + 8),
        "coverage": lambda: coverage(model, loss_fn, data=data[1]),
        "repeat": lambda: again(tape, model),
    }
    tape = Tape(model, loss_fn, lambda: dict(model.named_parameters()))
    tape.repeats = door == "repeat"
    state = torch.get_rng_state()
    loss = loss_fn(model(data[0][0]), data[0][1])
    kept = [(b, b._version) for b in model.buffers()]
    doors[door]()
    assert [(id(b), b._version) for b in model.buffers()] == [(id(b), version) for b, version in kept]
    loss.backward()
    torch.set_rng_state(state)
    loss_fn(twin(data[0][0]), data[0][1]).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def again(tape: Tape, model: nn.Module) -> None:
    """The same pass once more gives the same numbers, and other values in the places of parameters give theirs."""
    (origin,) = tape.passes
    with torch.no_grad(), tape.repeat(origin, record=False) as plain:
        assert torch.equal(plain.output, origin.output)
        assert not plain.output.requires_grad
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith("3.")}
    with tape.repeat(origin, values=zeros, twice=True) as changed:
        assert not changed.output.any()
        assert {site.operation for site in changed.recorder.sites}


class Positions(nn.Module):
    """A buffer that grows, one made when it is needed, two that share memory, one written by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ready = nn.Linear(4, 3).double(), False
        self.grow(2)
        self.register_buffer("both", normal(2).fill_(1))
        self.register_buffer("first", self.both[:1])
        self.register_buffer("count", torch.zeros(1))
        self.numbers = {"count": self.count}

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("table", torch.arange(1.0, length + 1).double()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        if not self.ready:
            self.register_buffer("shift", x.mean((0, 1)))
            self.ready = True
        self.both += 1
        self.numbers["count"] += 1
        self.count += 1
        self.kept = (x - self.shift) * self.table[: x.shape[1]] * self.first
        return self.linear(self.kept).mean(1)


def test_buffers_agree_with_what_the_model_remembers_of_them() -> None:
    torch.manual_seed(0)
    model, loss_fn, x, y = Positions(), nn.CrossEntropyLoss(), normal(4, 5, 4), classes(4, of=3)
    before, attributes = fingerprint(model), dict(vars(model))
    found = fisher(model, loss_fn, (x, y), kind="exact", structure="full").to_dense()
    same(before, fingerprint(model))
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is value for name, value in attributes.items())
    model(x)  # longer than the table was, and for the first time
    assert model.first == 2
    linear = fisher(model.linear, loss_fn, (model.kept.mean(1), y), kind="exact", structure="full").to_dense()
    torch.testing.assert_close(found, linear)


def test_a_large_buffer_that_is_written_by_two_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, x, y = Positions(), nn.CrossEntropyLoss(), normal(4, 5, 4), classes(4, of=3)
    monkeypatch.setattr("curvature.model.settings._SECOND", 0)
    with pytest.raises(RuntimeError, match="buffer 'count' of a Positions was written by its name and by another name"):
        fisher(model, loss_fn, (x, y), kind="exact", structure="kfac")


def test_buffers_are_the_models_own_if_memory_ends_while_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = everything()
    before, clone, left = [id(b) for b in model.buffers()], Tensor.clone, iter(range(2))

    def until(tensor: Tensor, **options: Any) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return clone(tensor, **options)

    monkeypatch.setattr(Tensor, "clone", until)
    with pytest.raises(torch.OutOfMemoryError), own_buffers(model):
        pass
    assert [id(b) for b in model.buffers()] == before
