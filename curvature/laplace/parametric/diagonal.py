"""Posteriors from the diagonal of the curvature, whose predictions stay small."""

from __future__ import annotations

from typing import Any

import torch
from laplace import DiagLaplace
from laplace.lllaplace import DiagLLLaplace
from torch import Tensor

from curvature.laplace.backends.last_layer import Features
from curvature.laplace.parametric.predictions import FromFeatures, InParts
from curvature.matrices.examples import KeptGradients


class DiagonalPosterior(InParts, DiagLaplace):
    """Diagonal posterior of all parameters: ``hessian_structure="diagonal"`` with ``subset_of_weights="all"``.

    The posterior of laplace-torch's ``"diag"``; predictions form the Jacobians of few examples at a time, where
    ``"diag"`` takes those of the whole batch, ``M x C x P`` numbers.

    Args:
        args: As for :class:`laplace.DiagLaplace`.
        backend: :class:`GGNBackend` by default; any.
        kwargs: As for :class:`laplace.DiagLaplace`.
    """

    _key = ("all", "diagonal")

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariances ``(M, C, C)`` of the outputs with Jacobians ``(M, C, P)``."""
        scaled = Js * self.posterior_scale
        return scaled @ scaled.mT

    def _output_variances(self, kept: KeptGradients) -> Tensor:
        """Those of layers follow from their inputs and output gradients: no Jacobian is formed."""
        return kept.weighted_squares(self.posterior_variance).mT


class LastLayerDiagonalPosterior(FromFeatures, DiagLLLaplace):
    """Diagonal posterior of the last layer: ``hessian_structure="diagonal"``, predictions without Jacobians.

    Arguments as for :class:`laplace.DiagLLLaplace`; the backend is :class:`GGNBackend` by default.
    """

    _key = ("last_layer", "diagonal")

    def _of_features(self, features: Features, diagonal: bool) -> Tensor:
        r"""The outputs are independent of each other, with variances :math:`\sum_j \phi_j^2 v_{cj} + v_c`."""
        counted = [p for p in features.parameters if p.requires_grad]
        total: Any = 0.0
        for p, variance in zip(counted, self.posterior_variance.split([p.numel() for p in counted]), strict=True):
            total = total + (features.phi.square() @ variance.reshape(p.shape).mT if p.dim() == 2 else variance)
        variances = total.expand_as(features.output)
        return variances if diagonal else torch.diag_embed(variances)
