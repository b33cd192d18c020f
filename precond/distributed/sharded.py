r"""Parameters whose rows are shared out over processes: ``fully_shard``, HSDP, tensor parallelism along one axis.

A step of curvature needs whole matrices. Each parameter has an owner among the processes that share it: all send it
their shards of the gradient (one ``all_to_all``), it computes the direction, and sends each the shard of the result
(another one). With P numbers on W processes each sends and gets about ``2 P (1 - 1 / W) / W`` numbers in a step, and
the matrices of a parameter are kept and decomposed once. Nothing is approximated.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.model.messages import answered
from precond.distributed.assignment import shared_out
from precond.distributed.ranks import OtherRankFailed, gathered

Entries = dict[str, Any]


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


def owners(groups: Iterable[Sequence[Tensor]], work: Callable[[Tensor], float]) -> dict[Tensor, int]:
    """The process that keeps each sharded parameter, by its rank in the parameter's own group.

    A function of shapes and options, so that all processes agree without a word; see
    :func:`~precond.distributed.assignment.shared_out`.

    Args:
        groups: Parameters, by group of the optimizer.
        work: Parameter -> work of a step.
    """
    loads: dict[Any, list[float]] = {}
    out: dict[Tensor, int] = {}
    for params in groups:
        cut: dict[Any, list[Tensor]] = {}
        for p in params:
            if is_sharded(p) and (group := layout_of(p).group) is not None:
                cut.setdefault(group, []).append(p)
        for group, some in cut.items():
            load = loads.setdefault(group, [0.0] * dist.get_world_size(group))
            out |= zip(some, shared_out([work(p) for p in some], load), strict=True)
    return out


def pieces(n: int, size: int) -> list[int]:
    """Lengths into which an axis is cut for so many processes, as ``torch.chunk`` does, and zero for those left over.

    >>> pieces(5, 4)
    [2, 2, 1, 0]
    """
    most = -(-n // size)
    return [max(0, min(most, n - rank * most)) for rank in range(size)]


class Exchange:
    """The two messages of a step between the shards of parameters and their owners.

    Args:
        owner: Parameter -> rank of its owner, as :func:`owners` has it; the same in all processes.
    """

    def __init__(self, owner: Mapping[Tensor, int]) -> None:
        self.owner = owner

    def mine(self, p: Tensor) -> bool:
        """Whether this process keeps a parameter: as its owner, or because it is not cut at all."""
        return p not in self.owner or self.owner[p] == dist.get_rank(layout_of(p).group)

    def through(
        self, gradients: Mapping[Tensor, Tensor], compute: Callable[[dict[Tensor, Tensor]], Mapping[Tensor, Tensor]]
    ) -> dict[Tensor, Tensor]:
        """Directions of all parameters, each computed by its owner from the whole gradient.

        Args:
            gradients: Parameter -> gradient, laid out like it; the same parameters in all processes.
            compute: Parameter -> whole gradient, of those kept here, to directions.

        Raises:
            OtherRankFailed: If it raised in another process; what it raised here is raised as it is.
        """
        laid = {p: _laid_as(p, g) if is_sharded(g) else g for p, g in gradients.items()}
        cut = [p for p in laid if p in self.owner]
        whole = {p: local(g) for p, g in laid.items() if p not in self.owner}
        whole |= self.gathered({p: local(laid[p]) for p in cut})
        order = [p for p in laid if p in whole]
        found: Mapping[Tensor, Tensor] = {}
        error: BaseException | None = None
        try:
            found = compute({p: whole[p] for p in order})
        except Exception as raised:
            error = raised
        self._agree(cut, error)
        parts = self.spread({p: (found.get(p), tuple(p.shape), _wide(laid[p])) for p in cut})
        out = {}
        for p, g in laid.items():
            part = parts[p] if p in parts else found[p]
            out[p] = like(part, g) if is_sharded(g) else part
        return out

    def gathered(self, shards: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Whole tensors of the shape of the parameters kept here, from everybody's shards."""
        out: dict[Tensor, Tensor] = {}
        for (group, dtype, device), params in self._alike({p: shard.dtype for p, shard in shards.items()}).items():
            me, size = dist.get_rank(group), dist.get_world_size(group)
            layouts = {p: layout_of(p) for p in params}
            sent = [shards[p].reshape(-1) for rank in range(size) for p in params if self.owner[p] == rank]
            counts = [sum(prod(layouts[p].piece(me)) for p in params if self.owner[p] == r) for r in range(size)]
            mine = [p for p in params if self.owner[p] == me]
            sizes = [sum(prod(layouts[p].piece(rank)) for p in mine) for rank in range(size)]
            got = _all_to_all(sent, counts, sizes, group, dtype, device)
            parts: dict[Tensor, list[Tensor]] = {p: [] for p in mine}
            for rank, received in enumerate(got.split(sizes)):
                shapes = [layouts[p].piece(rank) for p in mine]
                for p, shape, part in zip(mine, shapes, received.split([prod(s) for s in shapes]), strict=True):
                    parts[p].append(part.reshape(shape))
            out |= {p: torch.cat(found, layouts[p].axis) for p, found in parts.items()}
        return out

    def spread(self, wholes: Mapping[Any, tuple[Tensor | None, tuple[int, ...], torch.dtype]]) -> dict[Any, Tensor]:
        """The shards of whole tensors that lie with the owners: of directions, or of what is kept of a parameter.

        Args:
            wholes: Parameter, or ``(parameter, name)`` -> the tensor where this process is the owner, its shape and
                dtype. Tensors of a parameter's own shape are cut as it is, others along their first axis.
        """
        out: dict[Any, Tensor] = {}
        for (group, dtype, device), keys in self._alike({key: x[2] for key, x in wholes.items()}).items():
            me, size = dist.get_rank(group), dist.get_world_size(group)
            layouts = {key: self._layout(key, wholes[key][1]) for key in keys}
            theirs = {key: self.owner[_parameter(key)] for key in keys}
            cuts = {key: layouts[key].cut(_given(wholes[key][0], dtype)) for key in keys if theirs[key] == me}
            sent = [cut[rank].reshape(-1) for rank in range(size) for cut in cuts.values()]
            counts = [sum(cut[rank].numel() for cut in cuts.values()) for rank in range(size)]
            by_rank = [[key for key in keys if theirs[key] == rank] for rank in range(size)]
            sizes = [sum(prod(layouts[key].piece(me)) for key in own) for own in by_rank]
            got = _all_to_all(sent, counts, sizes, group, dtype, device)
            order = [key for own in by_rank for key in own]
            shapes = [layouts[key].piece(me) for key in order]
            parts = got.split([prod(shape) for shape in shapes])
            out |= {key: part.reshape(shape) for key, part, shape in zip(order, parts, shapes, strict=True)}
        return out

    @staticmethod
    def _layout(key: Any, shape: tuple[int, ...]) -> ShardLayout:
        own = layout_of(_parameter(key))
        return own if own.shape == shape and not isinstance(key, tuple) else ShardLayout(own.group, 0, shape)

    @staticmethod
    def _alike(dtypes: Mapping[Any, torch.dtype]) -> dict[Any, list[Any]]:
        """Tensors that travel in one message."""
        out: dict[Any, list[Any]] = {}
        for key, dtype in dtypes.items():
            p = _parameter(key)
            out.setdefault((layout_of(p).group, dtype, local(p).device), []).append(key)
        return out

    @staticmethod
    def _agree(params: Sequence[Tensor], error: BaseException | None) -> None:
        bad = dict.fromkeys(layout_of(p).group for p in params)
        failed = False
        for group in bad:
            device = next(local(p).device for p in params if layout_of(p).group is group)
            flag = torch.tensor(int(error is not None), device=device)
            failed = bool(_reduced(flag, dist.ReduceOp.MAX, group)) or failed
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed(
                "another process could not compute its part of the step, so that none takes it; its own error says why."
            )

    # State

    def saved(self, states: Mapping[Tensor, Entries]) -> dict[Tensor, Entries]:
        """States with what the owners keep laid out over all processes; every process calls it.

        Numbers, and tensors of no axis, are the owner's in all of them.
        """
        known = {p: states[p] for p in self.owner if p in states}  # in one order everywhere
        numbers = {p: i for i, p in enumerate(self.owner)}
        described: dict[Tensor, Entries] = {}
        for group in dict.fromkeys(layout_of(p).group for p in self.owner):
            params = [p for p in known if layout_of(p).group is group]
            mine = {numbers[p]: _described(known[p]) for p in params if self.mine(p)}
            everyone: list[Any] = [None] * dist.get_world_size(group)
            with answered(group):
                dist.all_gather_object(everyone, mine, group=group)
            found = {number: entries for one in everyone for number, entries in one.items()}
            described |= {p: found.get(numbers[p], {}) for p in params}
        tensors = {
            (p, name): (known[p].get(name) if self.mine(p) else None, what.shape, what.dtype)
            for p, entries in described.items()
            for name, what in entries.items()
            if isinstance(what, _Kept)
        }
        parts = self.spread(tensors)
        out = dict(states)
        for p, entries in described.items():
            laid = {name: x for name, x in known[p].items() if is_sharded(x)}
            for name, what in entries.items():
                laid[name] = like(parts[p, name], p, 0, what.shape) if isinstance(what, _Kept) else what
            out[p] = laid
        return out

    def kept(self, p: Tensor, entries: Entries, whole: Collection[str]) -> Entries:
        """What of a saved state this process keeps; every process calls it.

        Args:
            p: The parameter.
            entries: Tensors laid out over the processes, or whole ones.
            whole: Names of tensors that the owner keeps; others are cut as the parameter is.
        """
        out: Entries = {}
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.ndim:
                if name not in whole:
                    out |= cut_as(p, {name: value})
                    continue
                value = _full(value)
            if self.mine(p) or name in ("step", "length", "lookahead", "radius"):
                out[name] = value
        return out


def whole_of(parts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Whole tensors of the shapes of parameters, in all processes, from the parts; one message for all.

    Args:
        parts: Parameter -> the part of this process; of one that is not cut all of it.
    """
    out = {p: part for p, part in parts.items() if not is_sharded(p)}
    cut = {p: part for p, part in parts.items() if is_sharded(p)}
    for (group, _, _), params in Exchange._alike({p: part.dtype for p, part in cut.items()}).items():
        layouts = [layout_of(p) for p in params]
        counts = [[prod(layout.shards()[rank]) for layout in layouts] for rank in range(dist.get_world_size(group))]
        rows = gathered(group, torch.cat([cut[p].reshape(-1) for p in params]), [sum(own) for own in counts])
        pieces_of = [row.split(own) for row, own in zip(rows, counts, strict=True)]
        for i, (p, layout) in enumerate(zip(params, layouts, strict=True)):
            shards = [own[i].view(shape) for own, shape in zip(pieces_of, layout.shards(), strict=True)]
            out[p] = torch.cat(shards, layout.axis)
    return {p: out[p] for p in parts}


def cut_as(p: Tensor, entries: Entries) -> Entries:
    """Tensors of a saved state, laid out as a parameter is; every process calls it."""
    layout = layout_of(p)
    out: Entries = {}
    for name, value in entries.items():
        if isinstance(value, Tensor) and value.ndim:
            same = is_sharded(value) and layout_of(value) == layout
            out[name] = value if same else like(_own_part(_full(value), layout), p)
    return out


@dataclass(frozen=True)
class _Kept:
    """A tensor that an owner keeps."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(entries: Entries) -> Entries:
    tensors = {name: x for name, x in entries.items() if isinstance(x, Tensor) and x.ndim and not is_sharded(x)}
    return {
        name: _Kept(tuple(x.shape), x.dtype) if name in tensors else x
        for name, x in entries.items()
        if not is_sharded(x)
    }


def _full(x: Any) -> Tensor:
    if not is_sharded(x):
        whole: Tensor = x
        return whole
    with answered(None):
        whole = x.full_tensor()
    return whole


def _laid_as(p: Any, g: Any) -> Tensor:
    """A gradient that is cut as its parameter is; one that is already is returned as it is."""
    with answered(layout_of(p).group):
        laid: Tensor = g.redistribute(placements=p.placements)
    return laid


def _reduced(values: Tensor, operation: Any, group: Any) -> Tensor:
    """Reduced over a group, in place."""
    with answered(group):
        dist.all_reduce(values, operation, group=group)
    return values


def _own_part(whole: Tensor, layout: ShardLayout) -> Tensor:
    return layout.cut(whole)[dist.get_rank(layout.group)].clone() if layout.group is not None else whole


def _parameter(key: Any) -> Tensor:
    found: Tensor = key[0] if isinstance(key, tuple) else key
    return found


def _given(whole: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert whole is not None
    return whole.to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_to_all(
    sent: Sequence[Tensor], counts: list[int], sizes: list[int], group: Any, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What all processes send to this one, in the order of their ranks."""
    packed = torch.cat([x.detach().to(dtype) for x in sent]) if sent else torch.empty(0, dtype=dtype, device=device)
    got = torch.empty(sum(sizes), dtype=dtype, device=device)
    with answered(group):
        dist.all_to_all_single(got, packed, sizes, counts, group=group)
    return got


# Numbers on which all processes agree


def summed(values: Tensor, tensors: Iterable[Tensor], operation: Any = None) -> Tensor:
    """Numbers of every process, reduced over all that share some tensors; in place.

    Args:
        values: The numbers; of parts of tensors, so that replicas hold equal ones.
        tensors: The tensors.
        operation: ``dist.ReduceOp``; the sum by default.
    """
    for group in dict.fromkeys(layout_of(x).group for x in tensors if is_sharded(x)):
        if group is not None:
            _reduced(values, operation or dist.ReduceOp.SUM, group)
    return values


def agreed(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether a condition holds in all processes that share some tensors, replicas included."""
    meshes = {x.device_mesh: local(x).device for x in tensors if is_sharded(x)}  # type: ignore[attr-defined]
    groups = {mesh.get_group(dim): device for mesh, device in meshes.items() for dim in range(mesh.ndim)}
    for group, device in groups.items():
        flag = bool(_reduced(torch.tensor(int(flag), device=device), dist.ReduceOp.MIN, group))
    return flag
