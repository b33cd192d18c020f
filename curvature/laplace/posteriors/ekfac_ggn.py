"""Kronecker eigenvectors with exact eigenvalues, in the form of ``posteriors``: a second pass over the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.posteriors import functional as F
from curvature.laplace.posteriors.kfac_ggn import KFACLaplaceState, sample

__all__ = ["EKFACLaplaceState", "build", "init", "sample", "update"]


def build(forward: F.Forward, outer_log_likelihood: F.OuterLogLikelihood, kfac: KFACLaplaceState) -> F.Transform:
    """``init`` and ``update`` of an approximation with the eigenvectors of another one and corrected eigenvalues.

    Args:
        forward: As for :func:`kfac_ggn.build`.
        outer_log_likelihood: As for :func:`kfac_ggn.build`.
        kfac: State of :mod:`~curvature.laplace.posteriors.kfac_ggn` after a pass over the same data; its numbers on
            the diagonal are taken over.

    References:
        George et al. (2018), https://arxiv.org/abs/1806.03884
    """
    return F.Transform(
        partial(init, kfac=kfac), partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood)
    )


@dataclass
class EKFACLaplaceState:
    """A Gaussian whose precision has Kronecker eigenvectors.

    Attributes:
        params: Its mean.
        basis: Eigenvectors, and eigenvalues where Kronecker factors have none to correct.
        prec_diag: As in :class:`KFACLaplaceState`.
        spectra: Sums of eigenvalues, by parameter and start of the part.
        step: Number of batches of this pass, 0-d.
    """

    params: F.Params
    basis: BlockKronDecomposed
    prec_diag: Tensor
    spectra: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    step: Tensor = field(default_factory=lambda: torch.tensor(0))

    def precision(self) -> BlockKronDecomposed:
        """As :meth:`KFACLaplaceState.precision`; before the first batch it is the same."""
        pieces = self.basis.corrected(self.spectra).pieces
        return BlockKronDecomposed(self.basis.tensors, pieces, deltas=self.prec_diag)


def init(params: F.Params, kfac: KFACLaplaceState) -> EKFACLaplaceState:
    """The state before the second pass.

    Raises:
        ValueError: If the Kronecker factors have seen no data, or belong to other parameters.
    """
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    if not kfac.factors.sums or shapes != dict(kfac.factors.tensors.shapes):
        raise ValueError(
            "kfac must be a state of kfac_ggn for the same parameters, after a pass over the data: its eigenvectors "
            "are the ones that are taken."
        )
    return EKFACLaplaceState(params, kfac.factors.decompose(), kfac.prec_diag)


def update(
    state: EKFACLaplaceState,
    batch: Any,
    forward: F.Forward,
    outer_log_likelihood: F.OuterLogLikelihood,
    inplace: bool = False,
) -> tuple[EKFACLaplaceState, Any]:
    """Add the eigenvalues of a batch; as :func:`kfac_ggn.update`."""
    backend = F.FunctionalBackend(state.params, forward, outer_log_likelihood)
    new = backend.eigenvalues(batch, batch, state.basis)
    spectra = {key: state.spectra[key] + values if key in state.spectra else values for key, values in new.items()}
    return F.advance(state, inplace, spectra=state.spectra | spectra), backend.aux
