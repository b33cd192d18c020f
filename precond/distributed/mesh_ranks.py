"""The processes that share out the parameters of a model, and each other's curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from curvature.model.fully_sharded import FullyShard
from precond.distributed.ranks import Ranks
from precond.distributed.sharded import layout_of, ranks_over


class MeshRanks(Ranks):
    """All processes of a mesh: columns are the places of shards, and rows the replicas, of which HSDP has several.

    Each block is kept by the owner of its parameters, one process of each replica.

    Args:
        parameter: One that lies on the mesh.
    """

    def __init__(self, parameter: Any) -> None:
        self._mesh = parameter.device_mesh
        self._shards = layout_of(parameter).group
        device = parameter.to_local().device
        group = ranks_over(self._mesh, device).group
        super().__init__(group, device, dist.get_world_size(self._shards) ** -1)
        self.column = dist.get_rank(self._shards)
        self.index = dist.get_rank(self.same_blocks)

    @cached_property
    def row(self) -> Any:
        return self._shards

    @cached_property
    def same_blocks(self) -> Any:
        groups = [self._mesh.get_group(dim) for dim in range(self._mesh.ndim)]
        return next((group for group in groups if group is not self._shards), self._shards)


def mesh_ranks(parameters: Mapping[str, Tensor], shards: FullyShard, method: str) -> MeshRanks:
    """The processes that take the steps of a model under ``fully_shard``.

    Raises:
        NotImplementedError: If some parameters are not shared out, or not all in one way.
    """
    aside = [name for name, p in parameters.items() if not shards.has(p)]
    if aside:
        raise NotImplementedError(
            f"{method}: {len(aside)} of {len(parameters)} parameters, the first {aside[0]}, are in no layer under "
            "fully_shard, so that nobody averages their gradients. Call fully_shard on the model itself as well, or "
            "leave them out with params=."
        )
    meshes = {str(p.device_mesh): p for p in parameters.values()}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise NotImplementedError(
            f"{method}: parameters lie on {len(meshes)} meshes, {' and '.join(meshes)}. Call fully_shard with one mesh "
            "for all layers."
        )
    factors = {getattr(group, "gradient_divide_factor", None) for group in shards.groups} - {None}
    ranks = MeshRanks(next(iter(meshes.values())))
    if factors - {float(ranks.size)}:
        raise NotImplementedError(
            f"{method}: set_gradient_divide_factor({factors.pop()}) makes gradients another mean than that over the "
            f"{ranks.size} processes. Leave it out, and weigh the loss."
        )
    return ranks


def refuse_on_shards(method: str, options: Sequence[str], *, keeps_rows: bool = False) -> None:
    """Refuse what is not served where ``fully_shard`` cuts the parameters.

    Args:
        method: The method.
        options: What of it is not served.
        keeps_rows: Whether it keeps the rows of one batch.

    Raises:
        NotImplementedError: Naming the options.
    """
    if keeps_rows:
        raise NotImplementedError(
            f"{method} does not run in several processes: it keeps the rows of its own batch, which do not add up over "
            "processes. Train in one process, or take KFAC, EKFAC or NaturalGradient(structure='layer'), whose "
            "structures are sums."
        )
    if options:
        raise NotImplementedError(
            f"{method}: not served on a model under fully_shard: {', '.join(options)}. Leave them out, or wrap the "
            "model in DistributedDataParallel."
        )
