"""A folder in which influences are kept while they are computed, and the curvature for other queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.checkpoint import LATER, Checkpoint, Resume, digest, save
from curvature.model.data import Batch
from curvature.model.trees import tensors_in
from solvers import LinearOperator, StructureError, state
from solvers.tree import pieces


class InfluenceStore:
    """Files of one folder, which is made if its parent exists.

    Args:
        place: The folder, or a checkpoint of its path that says how often to save.

    Attributes:
        factors: Sums over the training data, from which the curvature is made.
        curvature: The curvature itself, as :func:`solvers.from_state` reads it.
    """

    def __init__(self, place: Resume) -> None:
        given = Checkpoint.at(place)
        self.folder, self.seconds = given.path, given.seconds
        self.folder.mkdir(exist_ok=True)
        self.factors = Checkpoint(self.folder / "factors.pt", self.seconds)
        self.curvature = self.folder / "curvature.pt"

    def keep(self, curvature: LinearOperator) -> None:
        """Write the curvature that was made from the sums, unless it is there."""
        made = self.factors.path.stat().st_mtime_ns
        if not self.curvature.exists() or self.curvature.stat().st_mtime_ns < made:
            save(self.curvature, state(curvature))

    def results(self, name: str, identity: Mapping[str, Any]) -> Checkpoint:
        """The file of results that depend on all this, one for each such identity."""
        known = digest([], repr(sorted(item for item in identity.items() if item[0] not in LATER)))
        return Checkpoint(self.folder / f"{name}-{known}.pt", self.seconds).of(identity)


def operator_digest(op: LinearOperator) -> str:
    """Hash of an operator: of its state, or where it has none, of its product with one fixed vector."""
    try:
        saved = state(op)
    except StructureError:
        vector = torch.randn(op.in_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return digest([op @ vector.to(op.device, op.dtype)], repr(op))
    described: list[str] = []
    tensors: list[Tensor] = []
    for path, piece in pieces(saved):
        described += [key for key in path[-1:] if isinstance(key, str)]
        if isinstance(piece, Tensor):
            tensors.append(piece)
        elif not isinstance(piece, (dict, list)):
            described.append(repr(piece))
    return digest(tensors, repr(described))


def batches_digest(batches: list[Batch]) -> str:
    """Hash of the tensors of some batches."""
    return digest(tensor for batch in batches for tensor in tensors_in(batch))
