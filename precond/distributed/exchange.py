r"""Between the parts of parameters, which all processes have, and their owners, who have them whole.

A step of curvature needs whole matrices. Each parameter has an owner among the processes that share it: all send it
their shards of the gradient (one ``all_to_all`` for each bucket of parameters), it computes the direction, and sends
each the shard of the result (another one), while other buckets are on their way. With P numbers on W processes each
sends and gets about ``2 P (1 - 1 / W) / W`` numbers in a step, and the matrices of a parameter are kept and decomposed
once. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvature.model.messages import answered
from precond.distributed.assignment import shared_out
from precond.distributed.ranks import gathering_of
from precond.distributed.shard_messages import Gather, Spread, parameter_of
from precond.distributed.sharded import ShardLayout, is_sharded, layout_of, like, local, members_of, ranks_of, together

Entries = dict[str, Any]

#: Bytes of the gradients of a bucket, from which on the next one begins.
BUCKET = 2**25
#: Numbers in a state that are those of a whole parameter, the same in all processes.
COMMON = frozenset({"step", "length", "lookahead", "radius"})


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
                cut.setdefault(members_of(group), []).append(p)
        for members, some in cut.items():
            load = loads.setdefault(members, [0.0] * len(members))
            out |= zip(some, shared_out([work(p) for p in some], load), strict=True)
    return out


class Exchange:
    """The messages of a step between the shards of parameters and their owners.

    Args:
        owner: Parameter -> rank of its owner, as :func:`owners` has it; the same in all processes.
    """

    def __init__(self, owner: Mapping[Tensor, int]) -> None:
        self.owner = owner

    def mine(self, p: Tensor) -> bool:
        """Whether this process keeps a parameter: as its owner, or because it is not cut at all."""
        return p not in self.owner or self.owner[p] == dist.get_rank(layout_of(p).group)

    def through(
        self,
        gradients: Mapping[Tensor, Tensor],
        compute: Callable[[dict[Tensor, Tensor]], Mapping[Tensor, Tensor]],
        kind: Callable[[Tensor], Hashable],
    ) -> dict[Tensor, Tensor]:
        """Directions of all parameters, each computed by its owner from the whole gradient.

        All buckets of gradients set out at once. An owner waits for one of them when it needs it, and its directions
        set out when it has computed them.

        Args:
            gradients: Parameter -> gradient, laid out like it; the same parameters in all processes.
            compute: Parameter -> whole gradient, of those of a bucket that are kept here, to directions.
            kind: Parameters of one kind are computed by one call.

        Raises:
            OtherRankFailed: If it raised in another process; what it raised here is raised as it is.
        """
        laid = {p: _laid_as(p, g) if is_sharded(g) else g for p, g in gradients.items()}
        cut = [p for p in laid if p in self.owner]
        here = {p: local(g) for p, g in laid.items() if p not in self.owner}
        if not cut:
            return {p: like(d, laid[p]) if is_sharded(laid[p]) else d for p, d in compute(here).items()}
        buckets: list[tuple[list[Gather], list[Spread]]] = []

        def prepare() -> None:
            for params in _buckets(cut, laid, kind):
                back = {p: (tuple(p.shape), _wide(laid[p])) for p in params}
                buckets.append((self._gathers({p: local(laid[p]) for p in params}), self._spreads(back)))

        together(cut, prepare)
        for gathers, _ in buckets:
            for gather in gathers:
                gather.message.begin()
        error: BaseException | None = None
        found: dict[Tensor, Tensor] = {}
        for gathers, spreads in buckets:
            for gather in gathers:
                gather.message.wait()
            try:
                if error is None:
                    whole, here = here, {}
                    for gather in gathers:
                        whole |= gather.wholes()
                    directions = compute({p: whole[p] for p in laid if p in whole})
                    for spread in spreads:
                        spread.fill(directions)
                    found |= {p: d for p, d in directions.items() if p not in self.owner}
            except BaseException as raised:  # the others wait for its directions, and are told then
                error = raised
            for spread in spreads:
                spread.message.begin()
        together(cut, lambda: _raise(error))
        for _, spreads in buckets:
            for spread in spreads:
                spread.message.wait()
                found |= spread.parts()
        return {p: like(found[p], g) if is_sharded(g) else found[p] for p, g in laid.items()}

    def gathered(self, shards: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Whole tensors of the shape of the parameters kept here, from everybody's shards."""
        if not shards:
            return {}
        gathers: list[Gather] = []
        together(shards, lambda: gathers.extend(self._gathers(shards)))
        out: dict[Tensor, Tensor] = {}
        for gather in gathers:
            gather.message.begin()
        for gather in gathers:
            gather.message.wait()
            out |= gather.wholes()
        return out

    def spread(self, wholes: Mapping[Any, tuple[Tensor | None, tuple[int, ...], torch.dtype]]) -> dict[Any, Tensor]:
        """The shards of whole tensors that lie with the owners: of directions, or of what is kept of a parameter.

        Args:
            wholes: Parameter, or ``(parameter, name)`` -> the tensor where this process is the owner, its shape and
                dtype. Tensors of a parameter's own shape are cut as it is, others along their first axis.
        """
        if not wholes:
            return {}
        spreads: list[Spread] = []
        given = {key: whole for key, (whole, _, _) in wholes.items() if whole is not None}

        def prepare() -> None:
            spreads.extend(self._spreads({key: what[1:] for key, what in wholes.items()}))
            for spread in spreads:
                spread.fill(given)

        together(map(parameter_of, wholes), prepare)
        out: dict[Any, Tensor] = {}
        for spread in spreads:
            spread.message.begin()
        for spread in spreads:
            spread.message.wait()
            out |= spread.parts()
        return out

    def _gathers(self, shards: Mapping[Tensor, Tensor]) -> list[Gather]:
        alike = self._alike({p: shard.dtype for p, shard in shards.items()})
        return [
            Gather.of(self.owner, {p: shards[p] for p in params}, group, dtype) for (group, dtype, _), params in alike
        ]

    def _spreads(self, wholes: Mapping[Any, tuple[tuple[int, ...], torch.dtype]]) -> list[Spread]:
        alike = self._alike({key: dtype for key, (_, dtype) in wholes.items()})
        return [
            Spread.of(self.owner, {key: self._layout(key, wholes[key][0]) for key in keys}, *place)
            for place, keys in alike
        ]

    @staticmethod
    def _layout(key: Any, shape: tuple[int, ...]) -> ShardLayout:
        own = layout_of(parameter_of(key))
        return own if own.shape == shape and not isinstance(key, tuple) else ShardLayout(own.group, 0, shape)

    @staticmethod
    def _alike(dtypes: Mapping[Any, torch.dtype]) -> list[tuple[tuple[Any, torch.dtype, torch.device], list[Any]]]:
        """Tensors that travel in one message: its group, dtype and device, and their keys."""
        out: dict[Any, tuple[tuple[Any, torch.dtype, torch.device], list[Any]]] = {}
        for key, dtype in dtypes.items():
            p = parameter_of(key)
            group, device = layout_of(p).group, local(p).device
            out.setdefault((members_of(group), dtype, device), ((group, dtype, device), []))[1].append(key)
        return list(out.values())

    # State

    def saved(self, states: Mapping[Tensor, Entries]) -> dict[Tensor, Entries]:
        """States with what the owners keep laid out over all processes; every process calls it.

        Numbers, and tensors of no axis, are the owner's in all of them.
        """
        known = {p: states[p] for p in self.owner if p in states}  # in one order everywhere
        numbers = {p: i for i, p in enumerate(self.owner)}
        described: dict[Tensor, Entries] = {}
        for ranks in ranks_of(self.owner):
            params = [p for p in known if ranks in ranks_of([p])]

            def own(params: list[Tensor] = params) -> dict[int, Entries]:
                return {numbers[p]: _described(known[p]) for p in params if self.mine(p)}

            found = {number: entries for one in ranks.objects(own) for number, entries in one.items()}
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
                # In memory of its own, without which torch cannot copy a DTensor.
                laid[name] = like(parts[p, name].clone(), p, 0, what.shape) if isinstance(what, _Kept) else what
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
            if self.mine(p) or name in COMMON:
                out[name] = value
        return out


def whole_of(parts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Whole tensors of the shapes of parameters, in all processes, from the parts; one message for all.

    Args:
        parts: Parameter -> the part of this process; of one that is not cut all of it.
    """
    out = {p: part for p, part in parts.items() if not is_sharded(p)}
    cut = {p: part for p, part in parts.items() if is_sharded(p)}
    for (group, _, _), params in Exchange._alike({p: part.dtype for p, part in cut.items()}):
        layouts = [layout_of(p) for p in params]
        counts = [[prod(layout.shards()[rank]) for layout in layouts] for rank in range(dist.get_world_size(group))]
        sizes, messages = [sum(own) for own in counts], list[Callable[[], list[Tensor]]]()

        def prepare(
            group: Any = group, params: list[Tensor] = params, sizes: list[int] = sizes, messages: Any = messages
        ) -> None:
            messages.append(gathering_of(group, torch.cat([cut[p].reshape(-1) for p in params]), sizes))

        together(params, prepare)
        rows = messages[0]()
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
    if g.placements != p.placements:
        together([p])
    with answered(layout_of(p).group):
        laid: Tensor = g.redistribute(placements=p.placements)
    return laid


def _buckets(
    params: Sequence[Tensor], gradients: Mapping[Tensor, Tensor], kind: Callable[[Tensor], Hashable]
) -> list[list[Tensor]]:
    """Parameters that travel together: those of one kind, and of the next until there are enough bytes."""
    kinds: dict[Hashable, list[Tensor]] = {}
    for p in params:
        kinds.setdefault(kind(p), []).append(p)
    out: list[list[Tensor]] = []
    filled = BUCKET
    for some in kinds.values():
        if filled >= BUCKET:
            out.append([])
            filled = 0
        out[-1] += some
        filled += sum(p.numel() * gradients[p].itemsize for p in some)
    return out


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _own_part(whole: Tensor, layout: ShardLayout) -> Tensor:
    return layout.cut(whole)[dist.get_rank(layout.group)].clone() if layout.group is not None else whole


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
