"""Results per example are refused where the examples come in another order each time, whatever draws it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import curvature
from curvature.model.order import drawn_order
from tests.curvature.problems import normal

N = 20


def examples() -> Dataset[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TensorDataset(normal(N, 2), torch.arange(N) % 3)


class Own(Sampler[int]):
    """A sampler of one's own, from a source of random numbers of one's own."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())

    def __len__(self) -> int:
        return N


class Stream(IterableDataset[Any]):
    def __init__(self, shuffle: bool) -> None:
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N).tolist() if self.shuffle else range(N)
        return (examples()[i] for i in order)


class Batches:
    """No loader at all."""

    def __init__(self, shuffle: bool) -> None:
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[Any]:
        order = random.sample(range(N), N) if self.shuffle else list(range(N))
        x, y = examples().tensors  # type: ignore[attr-defined]
        return ((x[order[i : i + 4]], y[order[i : i + 4]]) for i in range(0, N, 4))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def own(draw: Callable[[], list[int]]) -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=4, sampler=Own(draw))


class WithGenerator(Own):
    def __init__(self) -> None:
        self.generator = generator()
        super().__init__(lambda: torch.randperm(N, generator=self.generator).tolist())


SHUFFLED: dict[str, Callable[[], Any]] = {
    "shuffle=True": lambda: DataLoader(examples(), batch_size=4, shuffle=True),
    "a generator": lambda: DataLoader(examples(), batch_size=4, shuffle=True, generator=generator()),
    "one by one": lambda: DataLoader(examples(), shuffle=True),
    "RandomSampler": lambda: DataLoader(examples(), batch_size=4, sampler=RandomSampler(examples())),  # type: ignore[arg-type]
    "weighted": lambda: DataLoader(examples(), batch_size=4, sampler=WeightedRandomSampler([1.0] * N, N)),
    "subset": lambda: DataLoader(examples(), batch_size=4, sampler=SubsetRandomSampler(range(N))),
    "distributed": lambda: DataLoader(
        examples(), batch_size=4, sampler=DistributedSampler(examples(), num_replicas=2, rank=0)
    ),
    "batch_sampler": lambda: DataLoader(
        examples(),
        batch_sampler=BatchSampler(RandomSampler(examples()), 4, False),  # type: ignore[arg-type]
    ),
    "own, torch": lambda: own(lambda: torch.randperm(N).tolist()),
    "own, numpy": lambda: own(lambda: np.random.permutation(N).tolist()),  # type: ignore[arg-type, return-value]
    "own, random": lambda: own(lambda: random.sample(range(N), N)),
    "own, generator": lambda: DataLoader(examples(), batch_size=4, sampler=WithGenerator()),
    "own batches": lambda: DataLoader(examples(), batch_sampler=Own(lambda: torch.randperm(N).view(-1, 4).tolist())),
    "stream": lambda: DataLoader(Stream(shuffle=True), batch_size=4),
    "no loader": lambda: Batches(shuffle=True),
}
IN_ORDER: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(examples(), batch_size=4),
    "list": lambda: list(Batches(shuffle=False)),
    "one batch": lambda: next(iter(Batches(shuffle=False))),
    "own": lambda: own(lambda: list(range(N))[::-1]),
    "distributed": lambda: DataLoader(
        examples(), batch_size=4, sampler=DistributedSampler(examples(), num_replicas=2, rank=0, shuffle=False)
    ),
    "batch_sampler": lambda: DataLoader(
        examples(),
        batch_sampler=BatchSampler(SequentialSampler(examples()), 4, False),  # type: ignore[arg-type]
    ),
    "stream": lambda: DataLoader(Stream(shuffle=False), batch_size=4),
    "no loader": lambda: Batches(shuffle=False),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 3).double()


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("name", SHUFFLED)
def test_influences_are_refused_in_a_drawn_order(name: str) -> None:
    loss_fn, data = nn.CrossEntropyLoss(), SHUFFLED[name]()
    query = normal(2, 2), torch.tensor([0, 1])
    before = states()
    with pytest.raises(ValueError, match=r"influences belong to the examples by their place .* shuffle=False"):
        curvature.influence(model(), loss_fn, data, query)
    with pytest.raises(ValueError, match="shuffle=False"):
        curvature.influence(model(), loss_fn, query, data)
    with pytest.raises(ValueError, match="shuffle=False"):
        curvature.self_influence(model(), loss_fn, data)
    torch.manual_seed(0)
    assert states()[1:] == before[1:]


@pytest.mark.parametrize("name", IN_ORDER)
def test_data_in_order_pass(name: str) -> None:
    data = IN_ORDER[name]()
    before = states()
    assert drawn_order(data) is None
    assert states() == before
    scores = curvature.self_influence(model(), nn.CrossEntropyLoss(), data)
    listed = [(x, y) for x, y in ([data] if name == "one batch" else data)]
    assert torch.equal(scores, curvature.self_influence(model(), nn.CrossEntropyLoss(), listed))


def test_generators_of_samplers_are_left_as_they_were() -> None:
    sampler = WithGenerator()
    before = sampler.generator.get_state()
    assert drawn_order(DataLoader(examples(), batch_size=4, sampler=sampler)) is not None
    assert torch.equal(sampler.generator.get_state(), before)


@pytest.mark.parametrize("name", ["shuffle=True", "weighted", "own, numpy", "stream"])
def test_a_report_names_no_examples_of_shuffled_data(name: str) -> None:
    def report(data: Any) -> curvature.Report:
        return curvature.report(model(), nn.CrossEntropyLoss(), data, sections=["noise"])

    found, listed = report(SHUFFLED[name]()), report(IN_ORDER["loader"]())
    assert found.noise is not None and found.noise.largest == ()
    assert "Single examples are not named" in found.to_html() and "Examples with the longest" not in found.to_html()
    assert listed.noise is not None and len(listed.noise.largest) == 5
    if name in ("shuffle=True", "own, numpy"):  # the same examples, whose mean and spread are the same
        assert found.noise.percentiles == pytest.approx(listed.noise.percentiles)


def test_missing_values_are_equal_to_themselves() -> None:
    class Missing(Batches):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in super().__iter__():
                yield x.masked_fill(x > 1, float("nan")), y

    assert drawn_order(Missing(shuffle=False)) is None
    assert drawn_order(Missing(shuffle=True)) is not None
