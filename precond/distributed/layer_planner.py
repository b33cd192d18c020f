"""What a layer-based method will cost on many processes: blocks, owners, messages and memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvature.estimation.coverage import Promise, promised
from curvature.layers.samples import OneHot, Outer, PerSample, Samples
from curvature.structures.diagonal import DiagonalEstimator
from curvature.structures.ekfac import EigenbasisEstimator
from curvature.structures.estimator import Curvature, CurvatureEstimator
from curvature.structures.whole import WholeFisher
from precond.distributed.agreement import Sums
from precond.distributed.assignment import assigned, cost
from precond.distributed.ranks import copies, gathering
from precond.distributed.tables import amounts
from precond.distributed.triangles import packed_size


class Layerwise(Protocol):
    """An optimizer that learns from the layers of a model."""

    curvature: Curvature

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters that have blocks."""
        ...

    def detach(self) -> None:
        """Leave the model alone."""
        ...


@dataclass(frozen=True)
class LayerPlan:
    """What :func:`precond.plan` has found for a method that learns from layers; lists are by rank.

    Parameters and gradients are whole in every process, which ``DistributedDataParallel`` averages.

    Attributes:
        world_size: Number of processes W.
        copies: Number k of processes that keep each block: ``memory_fraction`` times W.
        owners: Block -> column of the processes that keep it: the ranks r with ``r % (W / k)`` equal to it.
        updating: Bytes that a rank sends where statistics are updated: sums to those who keep them.
        stepping: Bytes that it sends in every step: directions, to who does not keep the block.
        refreshing: Bytes that it sends in a refresh, besides: eigenbases (EKFAC), which all need.
        messages: Messages in a step, in an update and in a refresh, decisions of a few numbers included.
        factors: Bytes of the averages that a rank keeps.
        inverses: Bytes of their inverses, as many as of the averages; beside eigenbases, of the eigenvalues.
        bases: Bytes of eigenbases (EKFAC), which lie everywhere.
        weights: Bytes of parameters and gradients.
        work: Operations of a refresh of all of its blocks, up to a constant.
        applying: Multiplications of a step: directions of its blocks.
    """

    world_size: int
    copies: int
    owners: dict[str, int]
    updating: list[int]
    stepping: list[int]
    refreshing: list[int]
    messages: dict[str, int]
    factors: list[int]
    inverses: list[int]
    bases: list[int]
    weights: list[int]
    work: list[int]
    applying: list[int]

    @property
    def memory(self) -> list[int]:
        """Bytes of parameters, gradients, averages, inverses and bases."""
        return [sum(parts) for parts in zip(self.weights, self.factors, self.inverses, self.bases, strict=True)]

    @property
    def balance(self) -> float:
        """The largest share of the work of a refresh over the mean one: 1 where all are done at the same time."""
        return max(self.work) / (sum(self.work) / len(self.work)) if any(self.work) else 1.0

    def seconds(
        self,
        *,
        bandwidth: float,
        flops: float,
        latency: float = 0.0,
        curvature_update_period: int = 1,
        inverse_update_period: int = 10,
    ) -> float:
        """Time that a step of the method adds on average, beside the sums over the batch that are its statistics.

        Messages and work do not overlap here.

        Args:
            bandwidth: Bytes that a rank sends in a second.
            flops: Operations that it does in a second, on matrices of this size; two for a multiplication and addition.
            latency: Seconds that a message takes, however short.
            curvature_update_period: Steps between updates of the statistics.
            inverse_update_period: Steps between refreshes.
        """
        periods = {"step": 1, "update": curvature_update_period, "refresh": inverse_update_period}
        sent = {"step": max(self.stepping), "update": max(self.updating), "refresh": max(self.refreshing)}
        waiting = sum((sent[n] / bandwidth + self.messages[n] * latency) / period for n, period in periods.items())
        return waiting + 2 * (max(self.applying) + max(self.work) / inverse_update_period) / flops

    def __str__(self) -> str:
        head = (
            f"{self.world_size} processes, each block kept by {self.copies} "
            f"(memory_fraction={self.copies}/{self.world_size}), {len(self.owners)} blocks"
        )
        table = amounts(
            {
                "sent in a step": self.stepping,
                "sent in an update, besides": self.updating,
                "sent in a refresh, besides": self.refreshing,
                "parameters and gradients": self.weights,
                "averages": self.factors,
                "inverses": self.inverses,
                "eigenbases": self.bases,
                "memory together": self.memory,
            }
        )
        columns = self.world_size // self.copies
        keeping = len(set(self.owners.values())) * self.copies
        tail = (
            f"{keeping} of {self.world_size} ranks keep blocks, in {columns} columns; the largest share of the work of "
            f"a refresh is {self.balance:.3g} times the mean one"
        )
        return "\n".join([head, *table, tail])


@dataclass(frozen=True)
class _Planned:
    """A block as a run would have it.

    Attributes:
        sums: Its sums.
        bases: Shapes of the eigenbases that all processes need.
        shape: Of its directions.
        wide: Dtype of its sums.
        narrow: Dtype of its directions.
    """

    sums: Sums
    bases: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    wide: torch.dtype
    narrow: torch.dtype

    @property
    def cost(self) -> int:
        """Operations of a refresh, as the processes share them out."""
        return cost({path: (shape, symmetric) for path, (shape, _, symmetric) in self.sums.items()})

    @property
    def sent(self) -> int:
        """Numbers that its sums are sent as: triangles, and a weight for each."""
        sums = self.sums.values()
        return sum(1 + (packed_size(shape) if symmetric else prod(shape)) for shape, _, symmetric in sums)

    @property
    def kept(self) -> int:
        """Bytes of its averages."""
        return self.wide.itemsize * sum(prod(shape) for shape, _, _ in self.sums.values())

    @property
    def inverse(self) -> int:
        """Bytes of its inverse, beside the eigenbases."""
        return self.kept if not self.bases else self.wide.itemsize * prod(self.shape)

    @property
    def basis(self) -> int:
        """Numbers in its eigenbases."""
        return sum(prod(shape) for shape in self.bases)

    @property
    def applied(self) -> int:
        """Multiplications of its direction: a matrix on each side that it has one for, and back from an eigenbasis."""
        sides = [shape[-1] for shape, _, symmetric in self.sums.values() if symmetric]
        return prod(self.shape) * (sum(sides) if sides else 1) * (2 if self.bases else 1)


def plan_layers(optimizer: Layerwise, model: nn.Module, world_size: int, fraction: float) -> LayerPlan:
    """Count messages and memory of an optimizer whose model may lie on the ``meta`` device."""
    if isinstance(optimizer.curvature, WholeFisher):
        raise TypeError(
            f"{type(optimizer).__name__} keeps one matrix of the whole model, which is not shared out. plan serves "
            "methods with a block for each layer, such as KFAC, EKFAC, TNT and SINGD."
        )
    kept = copies(fraction, world_size)
    columns = world_size // kept
    blocks = dict(_blocks(optimizer, model))
    owners = assigned({name: block.cost for name, block in blocks.items()}, columns, {}, {})
    own: list[list[_Planned]] = [[] for _ in range(columns)]
    for name, block in blocks.items():
        own[owners[name]].append(block)
    wide = sorted({block.wide for block in blocks.values()}, key=str)
    narrow = sorted({block.narrow for block in blocks.values()}, key=str)
    updating = [0] * world_size
    for dtype in wide:
        sizes = [sum(block.sent for block in some if block.wide == dtype) for some in own]
        for rank in range(world_size):
            updating[rank] += dtype.itemsize * _scattered(sizes, kept, rank % columns, rank // columns)
    stepping, directions = _spread(own, {dtype: partial(_direction, dtype) for dtype in narrow})
    refreshing, bases_sent = _spread(own, {dtype: partial(_basis, dtype) for dtype in wide})
    several = columns > 1
    messages = {
        "step": 2 + several + directions,  # are gradients fit? directions; are results?
        # What is hidden, the weights, which sums there are (2), are they ready, are averages fit, which sums follow.
        "update": 7 + len(wide) * (several + 2 * (kept > 1)),
        # Who succeeded (2); the length of the momentum in the new metric (2); eigenbases, when they are ready.
        "refresh": 2 + 2 * several + bases_sent + (bases_sent > 0),
    }

    def by_rank(values: list[int]) -> list[int]:
        return [values[rank % columns] for rank in range(world_size)]

    bases = sum(block.wide.itemsize * block.basis for block in blocks.values())
    weights = 2 * sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    return LayerPlan(
        world_size,
        kept,
        owners,
        updating,
        by_rank(stepping),
        by_rank(refreshing),
        messages,
        by_rank([sum(block.kept for block in some) for some in own]),
        by_rank([sum(block.inverse for block in some) for some in own]),
        [bases] * world_size,
        [weights] * world_size,
        by_rank([sum(block.cost for block in some) for some in own]),
        by_rank([sum(block.applied for block in some) for some in own]),
    )


def _direction(dtype: torch.dtype, block: _Planned) -> int:
    return prod(block.shape) if block.narrow == dtype else 0


def _basis(dtype: torch.dtype, block: _Planned) -> int:
    return block.basis if block.wide == dtype else 0


def _spread(
    own: list[list[_Planned]], counts: Mapping[torch.dtype, Callable[[_Planned], int]]
) -> tuple[list[int], int]:
    """Bytes that leave each column where tensors of all blocks are spread, and the number of messages."""
    sent, messages = [0] * len(own), 0
    for dtype, count in counts.items():
        numbers, more = gathering([sum(map(count, blocks)) for blocks in own])
        sent = [before + dtype.itemsize * n for before, n in zip(sent, numbers, strict=True)]
        messages += more
    return sent, messages


def _scattered(sizes: list[int], kept: int, column: int, index: int) -> int:
    """Numbers that leave a rank where a sum of these columns is scattered in its row, then added up between rows."""
    sent = sum(sizes) - sizes[column]
    if kept > 1:
        each, more = divmod(sizes[column], kept)  # the first pieces are longer by one, as tensor_split cuts them
        sent += sizes[column] - each - (index < more) + (kept - 1) * (each + (more > 0))
    return sent


def _blocks(optimizer: Layerwise, model: nn.Module) -> Iterator[tuple[str, _Planned]]:
    """The blocks of the layers, whose sums are those of one example that nobody computes."""
    known: dict[Any, tuple[Sums, tuple[tuple[int, ...], ...]]] = {}
    for promise, parameters in promised(model, optimizer.parameters, optimizer.curvature.joint):
        narrow = reduce(torch.promote_types, (p.dtype for p in parameters.values()))
        estimator = optimizer.curvature.estimator(promise.block, promise.form)
        # Structures given by layer may differ in options that their classes do not show.
        key = promise.block.shape, narrow, promise.form, promise.one_hot, type(estimator), estimator.stored
        if key not in known:
            known[key] = _seen(estimator, promise, narrow)
        sums, bases = known[key]
        wide = torch.promote_types(narrow, torch.float32)
        yield promise.block.name, _Planned(sums, bases, tuple(promise.block.shape), wide, narrow)


def _seen(
    estimator: CurvatureEstimator, promise: Promise, dtype: torch.dtype
) -> tuple[Sums, tuple[tuple[int, ...], ...]]:
    """Shapes of the sums of a block, and of its eigenbases."""
    if isinstance(estimator, EigenbasisEstimator):
        found, _ = _seen(estimator.factors, promise, dtype)
        factors = [shape for shape, _, _ in found.values()]
        wide = torch.promote_types(dtype, torch.float32)
        return {**found, "spectrum": (tuple(promise.block.shape), wide, False)}, tuple(factors)
    # A diagonal is the same of one-hot rows and of others; the first are counted by their values.
    estimator.update(_sample(promise, dtype, promise.one_hot and not isinstance(estimator, DiagonalEstimator)))
    sums: Sums = {}
    for path, mean in estimator.step_means().items():
        total, _ = mean.step_sum()
        sums[path] = tuple(total.shape), total.dtype, total.dim() == mean.matrix_axes
    return sums, ()


def _sample(promise: Promise, dtype: torch.dtype, one_hot: bool) -> Samples:
    """What one example brings to a block, on the ``meta`` device."""
    shape = tuple(promise.block.shape)
    if promise.form == "per_sample":
        return Samples((PerSample(torch.empty(1, 1, *shape, dtype=dtype, device="meta")),), 1.0)
    *stack, d_out, d_in = shape
    ones = len(promise.block.parts) > 1
    g = torch.empty(*stack, 1, 1, 1, d_out, dtype=dtype, device="meta")
    a: Tensor | OneHot = torch.empty(*stack, 1, 1, d_in - ones, dtype=dtype, device="meta")
    if one_hot:
        a = OneHot(torch.zeros(1, 1, dtype=torch.long, device="meta"), d_in)
    return Samples((Outer(a, g, ones=ones),), 1.0)
