"""Parameters whose rows are shared out over processes: ``fully_shard``, HSDP, tensor parallelism along one axis."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.model.messages import answered
from precond.distributed.ranks import Ranks


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a ``DTensor``, told without loading that part of torch."""
    return type(x) is not Tensor and type(x) is not nn.Parameter and hasattr(x, "device_mesh")


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether one of them is a ``DTensor``; where that part of torch is not loaded there is none, without a look."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))


def local(x: Any) -> Any:
    """The part of a tensor that lies in this process."""
    return x.to_local() if is_sharded(x) else x


@dataclass(frozen=True)
class ShardLayout:
    """How a tensor lies over the processes of a group.

    Attributes:
        group: The processes that share it; ``None`` where each has all of it.
        axis: Which axis is cut, into pieces as ``torch.chunk`` makes them.
        shape: Of the whole tensor.
    """

    group: Any
    axis: int
    shape: tuple[int, ...]

    def piece(self, rank: int) -> tuple[int, ...]:
        """Shape of the shard of a process."""
        n = pieces(self.shape[self.axis], dist.get_world_size(self.group))[rank]
        return (*self.shape[: self.axis], n, *self.shape[self.axis + 1 :])

    def shards(self) -> list[tuple[int, ...]]:
        """Shapes of all shards, by rank."""
        return [self.piece(rank) for rank in range(dist.get_world_size(self.group))]

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The shards of a whole tensor, by rank."""
        return list(whole.split([shape[self.axis] for shape in self.shards()], self.axis))


def layout_of(x: Any) -> ShardLayout:
    """How a ``DTensor`` is cut.

    Raises:
        NotImplementedError: If it is cut along two axes of the mesh, or not into rows as ``torch.chunk`` does.
    """
    cut = [(dim, placement) for dim, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not cut:
        return ShardLayout(None, 0, tuple(x.shape))
    dim, placement = cut[0]
    if len(cut) == 1 and type(placement).__name__ == "Shard":
        found = ShardLayout(x.device_mesh.get_group(dim), placement.dim, tuple(x.shape))
        if found.piece(x.device_mesh.get_local_rank(dim)) == tuple(x.to_local().shape):
            return found
    raise NotImplementedError(
        f"a parameter of shape {tuple(x.shape)} lies on a mesh of shape {tuple(x.device_mesh.shape)} as "
        f"{tuple(x.placements)}. Served are parameters that are cut along one axis of the mesh, Shard(k), and "
        "replicated along the others: fully_shard on a mesh of one axis, HSDP (replicate x shard), or tensor "
        "parallelism alone."
    )


def like(part: Tensor, whole: Any, axis: int | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """A ``DTensor`` over the processes of another, from the part that lies in this one.

    Args:
        part: The part.
        whole: The other one.
        axis: The axis that is cut; by default that of ``whole``.
        shape: Of all parts together; by default that of ``whole``.
    """
    shape = tuple(whole.shape if shape is None else shape)
    placements = [p if axis is None or p.is_replicate() else type(p)(axis) for p in whole.placements]
    stride = tuple(prod(shape[k + 1 :]) for k in range(len(shape)))
    dtensor: Any = type(whole.data)
    made: Tensor = dtensor.from_local(
        part.contiguous(), whole.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def refuse(p: Tensor, method: str, served: bool) -> None:
    """Refuse a parameter that lies over processes in a way that is not served; called when it is given.

    Raises:
        NotImplementedError: Naming the way, and what to do.
    """
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise NotImplementedError(
            f"{method} does not take parameters of FullyShardedDataParallel, which cuts them without regard to rows. "
            "Use torch.distributed.fsdp.fully_shard (FSDP2) in its place."
        )
    if not is_sharded(p):
        return
    if not served:
        raise NotImplementedError(
            f"{method} does not take parameters that are shared out over processes in this way (DTensors, as "
            "fully_shard and tensor parallelism make them; of these KFAC and other methods that learn from layers take "
            "fully_shard). Wrap the model in DistributedDataParallel, or take a method that uses gradients alone, such "
            "as SOAP, Shampoo or Muon."
        )
    layout_of(p)


def refuse_several_meshes(params: Iterable[Tensor], method: str) -> None:
    """Refuse parameters that are not shared by the same processes, who decide together about each step.

    Raises:
        NotImplementedError: Naming the processes.
    """
    found = dict.fromkeys(tuple(sorted(p.device_mesh.mesh.flatten().tolist())) for p in params if is_sharded(p))  # type: ignore[attr-defined]
    if len(found) > 1:
        ranks = " and ".join(", ".join(map(str, members)) for members in found)
        raise NotImplementedError(
            f"{method}: sharded parameters lie on meshes of different ranks, {ranks}, and all ranks decide together "
            "about each step. Give those on each mesh an optimizer of their own."
        )


def refuse_left_behind(params: Iterable[Tensor], method: str) -> None:
    """Refuse parameters that are no longer the model's, because it was sharded after they were given.

    Raises:
        RuntimeError: If some without a gradient are in no module, while others are sharded.
    """
    absent = {id(p): p for p in params if p.grad is None and p.requires_grad and not is_sharded(p)}
    if not absent or not (dist.is_available() and dist.is_initialized()):
        return
    sharded = False
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module):
            for p in vars(module).get("_parameters", {}).values():
                absent.pop(id(p), None)
                sharded = sharded or is_sharded(p)
    if absent and sharded:
        raise RuntimeError(
            f"{method} was made before the model was sharded: {len(absent)} of its parameters, the first of shape "
            f"{tuple(next(iter(absent.values())).shape)}, were replaced by DTensors and are in no module any more, so "
            "that it would train nothing. Call fully_shard first, and make the optimizer of the new parameters."
        )


def members_of(group: Any) -> tuple[int, ...]:
    """The ranks of a group, which tell it from others: a mesh that is made twice has two groups of the same ones."""
    return tuple(dist.get_process_group_ranks(group))


def pieces(n: int, size: int) -> list[int]:
    """Lengths into which an axis is cut for so many processes, as ``torch.chunk`` does, and zero for those left over.

    >>> pieces(5, 4)
    [2, 2, 1, 0]
    """
    most = -(-n // size)
    return [max(0, min(most, n - rank * most)) for rank in range(size)]


# Processes

_known: tuple[Any, dict[Any, Ranks]] = (None, {})  # the whole run; its processes by members and device


def ranks_over(mesh: Any, device: torch.device) -> Ranks:
    """All processes of a mesh, who decide together about what lies on it."""
    global _known
    if _known[0] is not dist.group.WORLD:
        _known = dist.group.WORLD, {}
    members = tuple(sorted(mesh.mesh.flatten().tolist()))
    if (members, device) not in _known[1]:
        if len(members) == dist.get_world_size():
            group: Any = dist.group.WORLD
        elif mesh.ndim == 1:
            group = mesh.get_group()
        else:
            group = dist.new_group(list(members), use_local_synchronization=True)
        _known[1][members, device] = Ranks(group, device)
    return _known[1][members, device]


def ranks_of(tensors: Iterable[Any]) -> list[Ranks]:
    """The processes that share some tensors, replicas included; one entry, unless their meshes have other members."""
    meshes = {x.device_mesh: x for x in tensors if is_sharded(x)}
    return list(dict.fromkeys(ranks_over(mesh, local(x).device) for mesh, x in meshes.items()))


def together(tensors: Iterable[Any], work: Callable[[], object] = lambda: None) -> None:
    """Do a part of a step that may raise: if it raises in one of the processes that share some tensors, then in all.

    Every message about shards comes after one of these, in which an error since the last one is told as well: see
    :meth:`~precond.distributed.ranks.Ranks.tell`.

    Raises:
        OtherRankFailed: If it raised in another process; what it raised in this one is raised as it is.
    """
    error: BaseException | None = None
    try:
        work()
    except BaseException as raised:
        error = raised
    for ranks in ranks_of(tensors):
        try:
            ranks.decide(error)
        except BaseException as raised:
            error = raised
    if error is not None:
        raise error


def tell(tensors: Iterable[Any], error: BaseException, handled: BaseException | None = None) -> None:
    """Let the processes that share some tensors, and wait for a decision, know of an error of this one.

    Args:
        tensors: The tensors.
        error: The error.
        handled: As for :meth:`~precond.distributed.ranks.Ranks.tell`.
    """
    with suppress(NotImplementedError):  # of how they are shared, which all of them raise
        for ranks in ranks_of(tensors):
            ranks.tell(error, handled)


# Numbers on which all processes agree


def summed(parts: Sequence[Tensor], tensors: Sequence[Any]) -> list[Tensor]:
    """:func:`added_up`, after a decision whether all processes are there for it."""
    if any(is_sharded(x) and layout_of(x).group is not None for x in tensors):
        together(x for x in tensors if is_sharded(x))
    return added_up(parts, tensors)


def added_up(parts: Sequence[Tensor], tensors: Sequence[Any]) -> list[Tensor]:
    """Numbers that are made of each process's part of a tensor, added up over those that share that tensor.

    One message for each group of processes, whichever of several groups with the same members it is.

    Args:
        parts: Numbers of each tensor, of any shape; of parts of it, so that replicas hold equal ones.
        tensors: The tensors.
    """
    out = list(parts)
    places: dict[Any, tuple[Any, list[int]]] = {}
    for i, (part, x) in enumerate(zip(out, tensors, strict=True)):
        group = layout_of(x).group if is_sharded(x) else None
        if group is not None:
            key = members_of(group), part.dtype, part.device
            places.setdefault(key, (group, []))[1].append(i)
    for group, some in places.values():
        total = torch.cat([out[i].reshape(-1) for i in some])
        with answered(group):
            dist.all_reduce(total, group=group)
        for i, part in zip(some, total.split([out[i].numel() for i in some]), strict=True):
            out[i] = part.view_as(out[i])
    return out


def agreed(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether a condition holds in all processes that share some tensors, replicas included."""
    for ranks in ranks_of(tensors):
        flag = all(row[0] for row in ranks.numbers([float(flag)]))
    return flag
