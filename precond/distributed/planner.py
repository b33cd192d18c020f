"""What a run on many processes will cost, before there are any: owners, messages and memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from precond.distributed.assignment import shared_out
from precond.distributed.layer_planner import LayerPlan, plan_layers
from precond.distributed.ranks import check_fraction
from precond.distributed.sharded import pieces
from precond.distributed.tables import amounts


class Sharded(Protocol):
    """An optimizer that takes sharded parameters and gives each to an owner, or takes its shards for parameters."""

    param_groups: list[dict[str, Any]]

    def work(self, p: Tensor, group: dict[str, Any]) -> float:
        """Cost of the step of a parameter."""

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> Mapping[str, Any]:
        """Entries of its state."""

    def shard_state(self, p: Tensor) -> Mapping[str, Any]:
        """Those of them that are cut as the parameter is."""

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options of the second half of the step."""


@dataclass(frozen=True)
class ShardPlan:
    """What :func:`plan` has found; lists are by rank within one group of shards, and replicas have the same.

    Attributes:
        world_size: Number of processes.
        shards: Number of processes among which a parameter is cut.
        owners: Parameter -> rank of the process that keeps its matrices and computes its step; none of parameters with
            ``shards="local"``, where each process does so for the rows that it holds.
        sent: Bytes that a rank sends to others in a step: shards of gradients to owners, and of directions from them.
        received: Bytes that it gets.
        state: Bytes of the optimizer's state.
        weights: Bytes of its shards of parameters and gradients.
        whole: Bytes of gradients and directions of the parameters that it owns, which a step holds for a while; of
            directions of the rows that it holds with ``shards="local"``.
        work: Operations of a step, up to a constant; the largest share is what all wait for.
        parameters: Number of parameters.
    """

    world_size: int
    shards: int
    owners: dict[str, int]
    sent: list[int]
    received: list[int]
    state: list[int]
    weights: list[int]
    whole: list[int]
    work: list[float]
    parameters: int = 0

    @property
    def memory(self) -> list[int]:
        """Bytes of parameters, gradients and state, and what a step holds for a while."""
        return [sum(parts) for parts in zip(self.weights, self.state, self.whole, strict=True)]

    @property
    def balance(self) -> float:
        """The largest share of the work over the mean one: 1 where all are done at the same time."""
        return max(self.work) / (sum(self.work) / len(self.work)) if any(self.work) else 1.0

    def seconds(self, *, bandwidth: float, flops: float) -> float:
        """Time that a step of the method adds, where messages and work do not overlap.

        Args:
            bandwidth: Bytes that a rank sends in a second.
            flops: Operations that it does in a second, on matrices of this size; two for a multiplication and addition.
        """
        return max(self.sent) / bandwidth + 2 * max(self.work) / flops

    def __str__(self) -> str:
        head = f"{self.world_size} processes, parameters cut among {self.shards}, {self.parameters} parameters"
        table = amounts(
            {
                "sent in a step": self.sent,
                "received in a step": self.received,
                "sent in a refresh, besides": [0],
                "parameters and gradients": self.weights,
                "state of the optimizer": self.state,
                "held during a step": self.whole,
                "memory together": self.memory,
            }
        )
        owning = len(set(self.owners.values()))
        some = f"{owning} of {self.shards} ranks own parameters"
        if len(self.owners) < self.parameters:
            some = f"{some}, and each works on its own rows" if self.owners else "each rank works on its own rows"
        tail = f"{some}; the largest share of the work is {self.balance:.3g} times the mean one"
        return "\n".join([head, *table, tail])


def plan(
    model: nn.Module,
    *,
    world_size: int,
    optimizer: Any,
    replicas: int = 1,
    memory_fraction: float = 1.0,
) -> ShardPlan | LayerPlan:
    """Owners, bytes per step and memory per rank, before there are processes.

    Of a method that uses gradients alone, on parameters that ``fully_shard`` cuts, or HSDP: a :class:`ShardPlan`. Of
    one that learns from layers, in ``DistributedDataParallel``: a :class:`LayerPlan`.

    Nothing is computed and nothing sent: the model may lie on the ``meta`` device, and no process group is needed. The
    optimizer uses the same functions, so that the counts are those of a run.

    Args:
        model: The model, not sharded yet.
        world_size: Number of processes.
        optimizer: A method, such as ``precond.SOAP`` or ``precond.KFAC``, or ``functools.partial`` of one with options.
            A function makes one that uses gradients alone: ``lambda params: precond.SOAP(params, max_dim=4096)``.
        replicas: Number of copies of the parameters: 1 for ``fully_shard`` on one axis, more for HSDP.
        memory_fraction: Share of the processes that keep each block, of a method that learns from layers.

    Raises:
        ValueError: If the processes cannot be divided so, or an option belongs to the other kind of method.
        TypeError: If the method runs in one process only.

    Example:
        >>> import precond
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024))
        >>> found = plan(model, world_size=2, optimizer=precond.SOAP)
        >>> sorted(found.owners.items())
        [('0.bias', 0), ('0.weight', 0), ('1.bias', 1), ('1.weight', 1)]
        >>> found.sent
        [16787456, 16787456]
    """
    if world_size < 1 or replicas < 1 or world_size % replicas:
        raise ValueError(
            f"world_size is a positive multiple of replicas; got world_size={world_size}, replicas={replicas}."
        )
    method = optimizer.func if isinstance(optimizer, partial) else optimizer
    if getattr(method, "needs", None) == "layers":
        if replicas != 1:
            raise ValueError(
                f"replicas={replicas} are copies of sharded parameters; {method.__name__} runs in "
                "DistributedDataParallel, where memory_fraction= says how many processes keep a block."
            )
        made = optimizer(model, nn.MSELoss(), lr=0.1, memory_fraction=check_fraction(memory_fraction))
        try:
            return plan_layers(made, model, world_size, memory_fraction)
        finally:
            made.detach()
    if memory_fraction != 1:
        raise ValueError(
            f"memory_fraction={memory_fraction} is an option of methods that learn from layers, such as precond.KFAC. "
            "Matrices of gradients lie with one owner in each replica."
        )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    made = optimizer(_on_meta(trained))
    if not getattr(made, "takes_shards", False) or not hasattr(made, "work"):
        raise TypeError(
            f"{type(made).__name__} has no owners of sharded parameters; plan serves methods that use gradients alone "
            "and keep matrices (SOAP, Shampoo, KLShampoo, SPlus, Muon, PSGD, GaLore), and those that learn from layers."
        )
    return _planned(cast(Sharded, made), [name for name, _ in trained], world_size, world_size // replicas)


def _on_meta(trained: Iterable[tuple[str, Tensor]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for _, p in trained]


@dataclass(frozen=True)
class _Kind:
    """What parameters of one shape, dtype and group have in common.

    Attributes:
        work: Cost of a step.
        kept: Bytes of state that lie with the owner.
        spread: Numbers of state for each entry, that are cut as the parameter is.
    """

    work: float
    kept: int
    spread: int


def _kind(optimizer: Sharded, p: Tensor, group: dict[str, Any]) -> _Kind:
    cut = set(optimizer.shard_state(p))
    entries = {n: x for n, x in optimizer.expected_state(p, group).items() if isinstance(x, Tensor)}
    kept = sum(x.numel() * x.itemsize for name, x in entries.items() if name not in cut)
    momentum = "momentum_buffer" not in entries and bool(optimizer.update_options(group)["momentum"])
    return _Kind(optimizer.work(p, group), kept, len(cut) + momentum)


def _planned(optimizer: Sharded, names: list[str], world_size: int, size: int) -> ShardPlan:
    work, order = [0.0] * size, iter(names)
    owner: dict[str, int] = {}
    lists = {name: [0] * size for name in ("sent", "received", "state", "weights", "whole")}
    for group in optimizer.param_groups:
        known: dict[Any, _Kind] = {}

        def kind(p: Tensor, group: dict[str, Any] = group, known: dict[Any, _Kind] = known) -> _Kind:
            key = p.shape, p.dtype
            known[key] = found = known.get(key) or _kind(optimizer, p, group)
            return found

        if group["shards"] == "local":
            for p in group["params"]:
                next(order)
                _add_local(lists, work, p, kind, size)
            continue
        kinds = [kind(p) for p in group["params"]]
        found = shared_out([own.work for own in kinds], work)
        for p, own, rank, name in zip(group["params"], kinds, found, order, strict=False):
            owner[name] = rank
            _add(lists, p, own, rank, size)
    return ShardPlan(world_size, size, owner, work=work, parameters=len(names), **lists)


def _shapes(p: Tensor, size: int) -> list[tuple[int, ...]]:
    """Shapes of the shards of a parameter, by rank."""
    return [(n, *p.shape[1:]) for n in pieces(p.shape[0], size)] if p.ndim else [()] * size


def _add_local(
    lists: dict[str, list[int]], work: list[float], p: Tensor, kind: Callable[[Tensor], _Kind], size: int
) -> None:
    """Count the memory and the work of a parameter whose shards are parameters of their own: no messages."""
    there, back = p.dtype.itemsize, torch.promote_types(p.dtype, torch.float32).itemsize
    for rank, shape in enumerate(_shapes(p, size)):
        own = kind(torch.empty(shape, dtype=p.dtype, device="meta"))
        work[rank] += own.work
        lists["weights"][rank] += 2 * there * prod(shape)
        lists["state"][rank] += own.kept + back * own.spread * prod(shape)
        lists["whole"][rank] += back * prod(shape)


def _add(lists: dict[str, list[int]], p: Tensor, kind: _Kind, owner: int, size: int) -> None:
    """Count the messages and the memory of a parameter."""
    there, back = p.dtype.itemsize, torch.promote_types(p.dtype, torch.float32).itemsize
    shards = [prod(shape) for shape in _shapes(p, size)]
    others = sum(shards) - shards[owner]
    lists["sent"][owner] += back * others
    lists["received"][owner] += there * others
    lists["whole"][owner] += (there + back) * p.numel()
    lists["state"][owner] += kind.kept
    for rank, shard in enumerate(shards):
        lists["weights"][rank] += 2 * there * shard
        lists["state"][rank] += back * kind.spread * shard
        if rank != owner:
            lists["sent"][rank] += there * shard
            lists["received"][rank] += back * shard
