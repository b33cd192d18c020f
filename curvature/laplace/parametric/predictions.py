"""Linearised predictions that stay small: from features, and from Jacobians that are formed in parts."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any

import torch
from laplace.baselaplace import BaseLaplace, ParametricLaplace
from laplace.curvature import CurvatureInterface
from laplace.utils.enums import Likelihood, LinkApprox
from torch import Tensor

from curvature.laplace.backends.batch import BatchBackend
from curvature.laplace.backends.ggn import GGNBackend
from curvature.laplace.backends.jacobians import JacobianBackend
from curvature.laplace.backends.last_layer import Features
from curvature.matrices.examples import KeptGradients

#: Bytes of the Jacobians that are formed at once; a posterior takes a few times as much to multiply them.
MEMORY = 1 << 29


class Predictions(ParametricLaplace):
    """A posterior that knows the covariances of the outputs, and their variances at a lower price.

    Predictions that need variances alone (the probit approximation, ``diagonal_output=True`` in regression)
    compute only those.
    """

    def __init__(self, *args: Any, backend: type[CurvatureInterface] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"backend": GGNBackend if backend is None else backend}))

    @abstractmethod
    def variances(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor] | None:
        """Outputs and their covariances.

        Args:
            x: Inputs.
            diagonal: The variances only.

        Returns:
            ``(M, C)`` and ``(M, C, C)`` or ``(M, C)``; ``None`` where laplace-torch's own method is used.
        """

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        found = None if joint else self.variances(X, diagonal_output)
        return super()._glm_predictive_distribution(X, joint, diagonal_output) if found is None else found

    def _glm_forward_call(
        self,
        x: Any,
        likelihood: str,
        joint: bool = False,
        link_approx: str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
    ) -> Any:
        # Two predictions need variances alone, which spares (M, C, C) numbers.
        probit = likelihood != Likelihood.REGRESSION and link_approx == LinkApprox.PROBIT
        if probit or (likelihood == Likelihood.REGRESSION and diagonal_output and not joint):
            found = self.variances(x, diagonal=True)
            if found is not None:
                f, variances = found
                return torch.softmax(f / torch.sqrt(1 + math.pi / 8 * variances), dim=-1) if probit else found
        return super()._glm_forward_call(x, likelihood, joint, link_approx, n_samples, diagonal_output)


def of_moments(la: Any, mean: Tensor, covariance: Tensor, link_approx: str) -> Tensor:
    """laplace-torch's probabilities of normal outputs.

    Args:
        la: The posterior.
        mean: ``(M, C)``; changed in place.
        covariance: ``(M, C, C)``; changed in place.
        link_approx: laplace-torch's name for the approximation.
    """
    given: Any = copy.copy(la)
    given._glm_predictive_distribution = lambda *args, **kwargs: (mean, covariance)
    probabilities: Any = BaseLaplace._glm_forward_call(given, mean, la.likelihood, link_approx=link_approx)
    return probabilities


class FromFeatures(Predictions):
    """A posterior of the last layer whose predictions follow from the layer's inputs, without Jacobians."""

    def functional_variance_fast(self, X: Any) -> tuple[Tensor, Tensor]:
        """Outputs and their variances, ``(M, C)`` each."""
        found = self.variances(X, diagonal=True)
        if found is None:
            raise NotImplementedError("the outputs do not follow from two-dimensional features alone.")
        return found

    def variances(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor] | None:
        backend: Any = self.backend
        features = backend.features(x, self.enable_backprop) if isinstance(backend, BatchBackend) else None
        if features is None or features.phi.dim() != 2:
            return None
        f, variances = features.output, self._of_features(features, diagonal).to(features.output.dtype)
        return (f, variances) if self.enable_backprop else (f.detach(), variances.detach())

    @abstractmethod
    def _of_features(self, features: Features, diagonal: bool) -> Tensor:
        """Covariances of the outputs ``(M, C, C)``, or their variances ``(M, C)``, from features ``(M, D)``."""


class InParts(Predictions):
    r"""A posterior of all parameters whose predictions form the Jacobians of few examples and outputs at a time.

    The covariances :math:`J_n \Sigma J_n^\top` of the outputs are those of the posterior itself
    (``functional_variance``). All Jacobians follow from the inputs of the layers and the gradients of their outputs,
    which are kept for the batch: one backward pass per output, however many parts there are.
    """

    def variances(self, x: Any, diagonal: bool) -> tuple[Tensor, Tensor] | None:
        backend: Any = self.backend
        if self.enable_backprop or not isinstance(backend, JacobianBackend) or backend.last_layer:
            return None
        if backend.subnetwork_indices is not None:
            return None
        kept, f = backend.kept_jacobians(x)
        found = self._output_variances(kept) if diagonal else self._output_covariances(kept)
        return f, found.detach().to(f.dtype)

    def _output_variances(self, kept: KeptGradients) -> Tensor:
        """``(M, C)``."""
        out = []
        for examples in _parts(kept.examples, MEMORY // _nbytes(kept, kept.signals)):
            rows = []
            for block in _parts(kept.signals, MEMORY // _nbytes(kept, 1)):
                Js = kept.rows(block, examples)
                # Each output separately, as if it were an example with one.
                rows.append(self.functional_variance(Js.flatten(0, 1).unsqueeze(1)).reshape(Js.shape[:2]))
            out.append(torch.cat(rows).mT)
        return torch.cat(out)

    def _output_covariances(self, kept: KeptGradients) -> Tensor:
        """``(M, C, C)``; of an example whose Jacobian is too large, in pairs of blocks of outputs."""
        C, first = kept.signals, next(iter(kept.parameters.values()))
        out = first.new_empty(kept.examples, C, C, dtype=kept.parameters.dtype)
        whole = _nbytes(kept, C) <= MEMORY
        blocks = _parts(C, C if whole else MEMORY // _nbytes(kept, 2))
        for examples in _parts(kept.examples, MEMORY // _nbytes(kept, C)):
            for i, left in enumerate(blocks):
                for right in blocks[i:]:
                    self._fill(out, kept, examples, left, right)
        return out

    def _fill(self, out: Tensor, kept: KeptGradients, examples: slice, left: slice, right: slice) -> None:
        """The covariances between two blocks of outputs."""
        Js = kept.rows(left, examples).transpose(0, 1)
        if left != right:
            Js = torch.cat([Js, kept.rows(right, examples).transpose(0, 1)], dim=1)
        k = left.stop - left.start
        covariance = self.functional_variance(Js).detach().to(out.dtype)
        other = slice(0, k) if left == right else slice(k, None)
        out[examples, left, right] = covariance[:, :k, other]
        out[examples, right, left] = covariance[:, other, :k]


def _nbytes(kept: KeptGradients, outputs: int) -> int:
    """Bytes of the Jacobian of some outputs of one example."""
    return max(1, outputs * kept.parameters.size * kept.parameters.dtype.itemsize)


def _parts(number: int, size: int) -> list[slice]:
    """Consecutive slices of a size, at least one."""
    size = max(1, size)
    return [slice(start, min(number, start + size)) for start in range(0, number, size)]
