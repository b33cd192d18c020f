"""Base of ``ggn``, ``fisher`` and ``gradient_covariance``: the loss over data, and its matrix in a structure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from curvature.estimation.checkpoint import Checkpoint, Resume
from curvature.estimation.dataset import estimate
from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.losses.signals import FisherKind
from curvature.matrices.dataset_operator import MatrixArguments
from curvature.matrices.full import GaussNewtonOperator
from curvature.matrices.jacobian import Mode
from curvature.matrices.low_rank import dense, low_rank
from curvature.matrices.problem import Problem
from curvature.model.arguments import Check, a, count, one_of, optional, real
from curvature.model.data import Data, Output
from curvature.structures.by_name import BLOCKS, curvature_of
from curvature.structures.estimator import Curvature
from curvature.structures.kfac import Sharing
from curvature.structures.mixed import Rules
from solvers import LinearOperator

StructureName = Literal["full", "dense", "low_rank", "layer", "unit", "diagonal", "kfac", "ekfac", "tnt", "foof"]
Structure = StructureName | Curvature | Rules
#: Structures of the whole matrix -> their makers, from the problem, the kind, and the structure's options.
WHOLE: dict[str, Callable[..., LinearOperator]] = {
    "full": GaussNewtonOperator,
    "dense": dense,
    "low_rank": low_rank,
}


#: Checks of what ``ggn``, ``fisher`` and ``gradient_covariance`` take beside the names that all functions share.
CHECKS: dict[str, Check] = {
    "loss_fn": check_loss,
    "structure": a((str, Curvature, Mapping), "the name of a structure, a Curvature or a mapping"),
    "kind": optional(one_of(FisherKind)),
    "samples": optional(count()),
    "resume": optional(a((str, os.PathLike, Checkpoint), "a path or a Checkpoint")),
    "mode": one_of(Mode),
    "max_size": count(),
    "max_dim": count(),
    "max_ratio": optional(real(low=0, open_low=True)),
}


class Arguments(MatrixArguments, total=False):
    """Keywords of ``ggn`` and ``fisher`` beside the structure; from ``mode`` on, options of structures."""

    kind: FisherKind | None
    samples: int | None
    generator: torch.Generator | None
    resume: Resume | None
    mode: Mode
    max_size: int
    sharing: Sharing
    bias: Literal["joint", "separate"]
    max_dim: int
    max_ratio: float | None


@dataclass(frozen=True, eq=False)
class Request:
    """A loss over data as the user passed it; see :func:`curvature.fisher` for the arguments."""

    model: nn.Module
    loss_fn: Any
    data: Data
    params: Any = None
    output: Output | None = None
    class_dim: ClassDim = None
    progress: bool | None = None
    batch_dim: BatchDim = None
    process_group: Any = None

    def problem(self, fisher: bool | None = False) -> Problem:
        """The loss as a function of the parameters, for data that can be seen again; see :class:`Problem`."""
        return Problem(**vars(self), fisher=fisher)

    def matrix(
        self,
        structure: Structure,
        kind: FisherKind,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        resume: Resume | None = None,
        options: Mapping[str, Any] | None = None,
        fisher: bool | None = False,
    ) -> LinearOperator:
        """The matrix in a structure; arguments as for :func:`curvature.fisher`, ``fisher`` as for :class:`Problem`."""
        options = options or {}
        if isinstance(structure, str) and structure in WHOLE:
            if resume is not None:
                raise ValueError(
                    f"structure={structure!r} keeps no sums over the batches, so there is nothing to resume. Leave "
                    "resume out; eigenvalues of a long run are kept by curvature.resumable_eigsh."
                )
            samples = 1 if samples is None else samples
            problem = self.problem(False if kind == "empirical" else fisher)
            return WHOLE[structure](problem, kind, samples=samples, generator=generator, **options)
        if isinstance(structure, str) and structure not in BLOCKS:
            names = sorted([*BLOCKS, *WHOLE])
            raise ValueError(f"structure must be one of {names}, a Curvature or a mapping, got {structure!r}.")
        curvature = curvature_of(structure, kind, samples, **options)
        return estimate(**vars(self), curvature=curvature, generator=generator, resume=resume, fisher=fisher)
