"""Whether the batches of a data set come in the same order every time, so that results per example can be named."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from curvature.model.data import is_one_batch
from curvature.model.trees import tensors_in

#: Batches that are compared where only the data themselves show their order: a shuffled stream differs in its first.
LOOK = 8


def refuse_another_order(data: Any, what: str) -> None:
    """Refuse data whose examples come in another order in each pass, where a result belongs to each of them.

    Args:
        data: One batch, or batches.
        what: The results, for the message.

    Raises:
        ValueError: If the order is drawn.
    """
    if why := drawn_order(data):
        raise ValueError(
            f"{what} belong to the examples by their place in the data, and {why}, so that nobody could say whose they "
            "are. Pass the data in one order: a DataLoader with shuffle=False and no random sampler, or a list of "
            "batches."
        )


def drawn_order(data: Any) -> str | None:
    """Why the order of the examples is another one in each pass; ``None`` where it is always the same.

    The samplers of PyTorch tell. Those of one's own are asked twice for their indices, other streams for their first
    batches, with other random numbers; torch's, numpy's and Python's random states stay as they are.
    """
    if is_one_batch(data) or isinstance(data, (list, tuple, Iterator)):
        return None  # an iterator has one pass, whose order is the caller's
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return _compared(data, _checksums)
    samplers = _chain(data.batch_sampler if data.batch_sampler is not None else data.sampler)
    for sampler in samplers:
        drawn = isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
        if drawn or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            return f"their order is drawn by the loader's {type(sampler).__name__} (shuffle=True)"
    if all(type(sampler) in (BatchSampler, SequentialSampler) for sampler in samplers):
        return None
    return _compared(samplers[0], lambda sampler: [_flat(entry) for entry in sampler], [data, *samplers])


def checksum(batch: Any) -> float:
    """A number that tells batches apart and adds up over examples, whatever the split."""
    return math.fsum(float(t.detach().double().sin().nan_to_num(0.5).sum()) for t in tensors_in(batch))


def fingerprint(batch: Any) -> float:
    """A checksum that sees which input belongs to which target, where examples lie along the first axis."""
    tensors = [t.detach().double() for t in tensors_in(batch)]
    n = len(tensors[-1]) if tensors and tensors[-1].dim() else 0
    along = [t for t in tensors if t.dim() and len(t) == n]
    if n == 0 or len(along) < 2:
        return checksum(batch)
    rows = sum((i + 1) * t.reshape(n, -1).sin().nan_to_num(0.5).sum(1).cpu() for i, t in enumerate(along))
    others = [t for t in tensors if not (t.dim() and len(t) == n)]
    return float(torch.as_tensor(rows).sin().sum()) + checksum(others)


def _chain(sampler: Any) -> list[Any]:
    """A sampler and those inside it."""
    found: list[Any] = []
    while isinstance(sampler, Iterable) and not any(sampler is known for known in found):
        found.append(sampler)
        inner = getattr(sampler, "sampler", None)
        sampler = getattr(sampler, "batch_sampler", None) if inner is None else inner
    return found


def _compared(source: Any, read: Any, owners: Iterable[Any] = ()) -> str | None:
    """Whether two looks with other random numbers differ."""
    looks = []
    for seed in range(2):
        with _reseeded(seed, [source, *owners]):
            looks.append(read(source))
    return "they come in another order, or with other values, in each pass" if looks[0] != looks[1] else None


def _checksums(data: Iterable[Any]) -> list[tuple[str, ...]]:
    """Every example of the first batches, as far as first axes count them."""
    return [tuple(_rows(batch)) for batch in islice(data, LOOK)]


def _rows(batch: Any) -> Iterator[str]:
    for tensor in tensors_in(batch):
        rows = tensor.detach().double().sin().reshape(len(tensor) if tensor.dim() else 1, -1)
        yield from (value.hex() for value in rows.sum(1).tolist())  # NaN is equal to itself as text


def _flat(entry: Any) -> Any:
    return tuple(entry) if isinstance(entry, (list, tuple)) else entry


@contextlib.contextmanager
def _reseeded(seed: int, owners: Iterable[Any]) -> Iterator[None]:
    """Other random numbers inside; all generators, those of the samplers included, are as before afterwards."""
    own = [g for owner in owners for g in _attributes(owner) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in own]
    plain, arrays = random.getstate(), np.random.get_state()  # the user's sampler may draw from it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for g in own:
            g.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
            for g, state in zip(own, states, strict=True):
                g.set_state(state)


def _attributes(owner: Any) -> Iterable[Any]:
    """The attributes of an object that has a dictionary of them."""
    return list(vars(owner).values()) if hasattr(owner, "__dict__") else []
