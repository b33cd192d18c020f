"""Models whose first input is no batch: a mask, a context, an edge list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from tests.curvature.loops import assert_same, fisher, step, watching
from tests.curvature.problems import classes, normal


class GraphNet(nn.Module):
    """Adds messages along edges ``(2, edges)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.message, self.drop, self.out = nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, edges: Tensor, x: Tensor) -> Tensor:
        heard = torch.zeros_like(x).index_add(0, edges[1], self.message(x[edges[0]]))
        return self.out(self.drop(x + heard))


class Masked(nn.Module):
    """Attends to positions by a mask ``(positions, positions)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.key, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        scores = (x @ self.key(x).mT).masked_fill(~mask, -1e9)
        return self.out((scores.softmax(-1) @ x).mean(1))


class InContext(nn.Module):
    """Has a context ``(rows, features)`` that is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        return self.out(x + self.read(context).tanh().mean(0))


MODELS: dict[str, Any] = {
    "edge list": lambda: (GraphNet(), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), normal(4, 3)),
    "mask of positions": lambda: (Masked(), torch.ones(3, 3, dtype=torch.bool).tril(), normal(6, 3, 3)),
    "square mask": lambda: (Masked(), torch.ones(2, 2, dtype=torch.bool).tril(), normal(4, 2, 3)),
    "context": lambda: (InContext(), normal(2, 3), normal(4, 3)),
    "context of one row": lambda: (InContext(), normal(1, 3), normal(4, 3)),
}


class Swapped(nn.Module):
    """The same with the examples first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return self.inner(first, x)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_targets(name: str) -> None:
    model, first, x = MODELS[name]()
    model.double().eval()
    y = classes(len(x), of=2)
    found = curvature.per_sample_gradients(model, nn.CrossEntropyLoss(), ((first, x), y))
    terms = nn.functional.cross_entropy(model(first, x), y, reduction="none")
    for parameter, gradients in found.items():
        p = model.get_parameter(parameter)
        expected = torch.stack([torch.autograd.grad(t, p, retain_graph=True)[0] for t in terms])
        torch.testing.assert_close(
            gradients, expected / len(x) * gradients.abs().sum() / (expected / len(x)).abs().sum()
        )


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", MODELS)
def test_training_counts_them_as_with_the_examples_first(name: str, structure: Any, kind: Any) -> None:
    """Random numbers included: the pass in which it turns out is run again with those it had."""
    found = []
    for swap in (False, True):
        model, first, x = MODELS[name]()
        y, loss_fn = classes(len(x), of=2), nn.CrossEntropyLoss()
        called: Any = Swapped(model.double()) if swap else model.double()
        optimizer = watching(called, loss_fn, structure, kind)
        inputs = (x, first) if swap else (first, x)
        for number in range(2):
            torch.manual_seed(number)
            found.append(step(optimizer, [lambda: loss_fn(called(*inputs), y)]))  # noqa: B023
    for plain, swapped in zip(found[:2], found[2:], strict=True):
        assert_same(plain, {block.replace("inner.", ""): C for block, C in swapped.items()})


def test_training_sees_what_the_data_set_gives() -> None:
    model, first, x = MODELS["mask of positions"]()
    y, loss_fn = classes(len(x), of=2), nn.CrossEntropyLoss()
    optimizer = watching(model.double(), loss_fn)
    expected = fisher(model, loss_fn, ((first, x), y), kind="exact")
    for _ in range(2):
        assert_same(step(optimizer, [lambda: loss_fn(model(first, x), y)]), expected)


class TimeMajor(nn.Module):
    """Takes (examples, times, features) and gives (times, examples, classes)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh().cumsum(1)).transpose(0, 1)


@pytest.mark.parametrize(
    "quantity",
    [
        lambda *batch: curvature.per_sample_gradients(*batch, class_dim=-1),
        lambda *batch: curvature.fisher(*batch, class_dim=-1, structure="diagonal", kind="empirical"),
    ],
)
def test_outputs_with_the_time_first_are_refused(quantity: Any) -> None:
    model, x, y = TimeMajor().double(), normal(2, 4, 3), classes(4, 2, of=3)
    with pytest.raises(ValueError, match=r"2 examples along their first axis.*\(4, 2, 3\).*with the examples first"):
        quantity(model, nn.CrossEntropyLoss(), (x, y))


class Positions(nn.Module):
    """One table for tokens and, looked up once for all examples, for their places."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        self.table, self.head, self.time = nn.Embedding(5, 3), nn.Linear(3, 2), 0 if time_major else 1

    def forward(self, ids: Tensor) -> Tensor:
        places = self.table(torch.arange(ids.shape[self.time])).unsqueeze(1 - self.time)
        return self.head((self.table(ids) + places).tanh().mean(self.time))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_table_of_places_counts_once_for_each_example_wherever_these_lie(kind: Any) -> None:
    """Not once for each entry of the first axis of the input: the first axis may be time."""
    torch.manual_seed(0)
    ids, y = torch.randint(5, (6, 4)), torch.randint(2, (6,))
    first, last = Positions(False).double(), Positions(True).double()
    last.load_state_dict(first.state_dict())
    loss_fn = nn.CrossEntropyLoss()
    inputs = {first: ids, last: ids.mT.contiguous()}
    one, other = (fisher(model, loss_fn, (x, y), kind=kind) for model, x in inputs.items())
    assert_same(other, one)
    one, other = (
        step(watching(model, loss_fn, "kfac", kind), [lambda m=model, x=x: loss_fn(m(x), y)])
        for model, x in inputs.items()
    )
    assert_same(other, one)
