"""Kronecker factors of the Gauss-Newton matrix, in the form of ``posteriors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.factors.tensors import Tensors
from curvature.laplace.posteriors import functional as F


def build(
    forward: F.Forward,
    outer_log_likelihood: F.OuterLogLikelihood,
    init_prec_diag: Mapping[str, float] | float = 0.0,
    sharing: Literal["expand", "reduce"] = "expand",
) -> F.Transform:
    """``init`` and ``update`` of a Kronecker-factored approximation.

    A weight of a layer has two factors, other parameters a dense matrix or a diagonal: :class:`BlockKron`.

    Args:
        forward: ``forward(params, batch)`` gives the output, one row for each example, and auxiliary information. It
            has to use the tensors of ``params`` themselves, as ``torch.func.functional_call`` does.
        outer_log_likelihood: ``outer_log_likelihood(output, batch)``, a scalar, the sum over the examples.
        init_prec_diag: Precision to start from: a number, or one for each parameter, by name.
        sharing: How positions that share weights are treated, see :class:`curvature.KroneckerFisher`.
    """
    return F.Transform(
        partial(init, init_prec_diag=init_prec_diag),
        partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood, sharing=sharing),
    )


@dataclass
class KFACLaplaceState:
    """A Gaussian whose precision is Kronecker factors and, for each parameter tensor, a number on the diagonal.

    Attributes:
        params: Its mean.
        factors: The curvature of the data, as sums, so that states of several batches add up.
        prec_diag: The numbers on the diagonal, ``(number of parameters,)``, in sorted order of the names.
        step: Number of batches, 0-d.
    """

    params: F.Params
    factors: BlockKron
    prec_diag: Tensor
    step: Tensor = field(default_factory=lambda: torch.tensor(0))

    def precision(self) -> BlockKronDecomposed:
        """The precision by its eigenvectors: products with any power, log-determinant, diagonal, dense matrix.

        Its vectors have the parameters in sorted order of their names.
        """
        return BlockKronDecomposed(self.factors.tensors, self.factors.decompose().pieces, deltas=self.prec_diag)


def init(params: F.Params, init_prec_diag: Mapping[str, float] | float = 0.0) -> KFACLaplaceState:
    """The state before any data."""
    F.check_params(params)
    names = sorted(params)
    first = params[names[0]]
    tensors = Tensors.of({name: params[name] for name in names}, first.dtype)
    numbers = [init_prec_diag[name] if isinstance(init_prec_diag, Mapping) else init_prec_diag for name in names]
    deltas = torch.tensor([float(n) for n in numbers], dtype=first.dtype, device=first.device)
    return KFACLaplaceState(params, BlockKron(tensors, {}, examples=0, size=1), deltas)


def update(
    state: KFACLaplaceState,
    batch: Any,
    forward: F.Forward,
    outer_log_likelihood: F.OuterLogLikelihood,
    sharing: Literal["expand", "reduce"] = "expand",
    inplace: bool = False,
) -> tuple[KFACLaplaceState, Any]:
    """Add the factors of a batch; as :func:`diag_ggn.update`. ``inplace`` changes the state, not its tensors."""
    backend = F.FunctionalBackend(state.params, forward, outer_log_likelihood)
    _, new = backend.kron(batch, batch, N=backend.count(batch), kfac_approx=sharing)
    factors = state.factors + new if state.factors.sums else new
    return F.advance(state, inplace, factors=factors), backend.aux


class Factored(Protocol):
    """A state whose precision is known by its eigenvectors."""

    params: F.Params

    def precision(self) -> BlockKronDecomposed:
        """The precision."""


def sample(state: Factored, sample_shape: tuple[int, ...] = (), generator: torch.Generator | None = None) -> F.Params:
    """Draws ``{name: (*sample_shape, *shape)}``; from the global random state without a generator.

    Raises:
        ValueError: If the precision is singular.
    """
    precision = state.precision()
    if not bool(torch.isfinite(precision.logdet())):
        raise ValueError("the precision is not positive definite, so there is no Gaussian. Pass init_prec_diag > 0.")
    return F.around(state.params, sample_shape, generator, lambda noise: precision.bmm(noise, exponent=-0.5))
