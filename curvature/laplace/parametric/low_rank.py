"""Posteriors with the largest eigenvalues of the curvature, and its diagonal besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from laplace.lllaplace import LLLaplace
from torch import Tensor
from torch.utils.data import DataLoader

from curvature.laplace.parametric.posterior import LowRankPosterior
from solvers import LowRank, Woodbury


@dataclass(frozen=True)
class LowRankDiagonal:
    r"""``V diag(values) V^T + diag(rest)``.

    Attributes:
        vectors: V, orthonormal columns ``(P, K)``.
        values: Positive, ``(K,)``.
        rest: Not negative, ``(P,)``.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    @classmethod
    def of(cls, vectors: Tensor, values: Tensor, diagonal: Tensor) -> LowRankDiagonal:
        """With the diagonal of the whole matrix; where the eigenvalues alone have more, by rounding, nothing is added.

        Args:
            vectors: ``(P, K)``.
            values: ``(K,)``.
            diagonal: Of the whole matrix, ``(P,)``.
        """
        return cls(vectors, values, (diagonal - vectors.square() @ values).clamp(min=0))


class LowRankDiagPosterior(LowRankPosterior):
    r"""Posterior from the largest eigenvalues of the curvature and its diagonal.

    ``hessian_structure="low_rank_diag"``: the curvature H is represented by

    .. math:: V \operatorname{diag}(s) V^\top + D, \quad
        D = \max\bigl(0, \operatorname{diag}(H) - \operatorname{diag}(V \operatorname{diag}(s) V^\top)\bigr),

    whose diagonal is that of H and whose mixed entries are those of the K largest eigenvalues. Variances are mostly
    much nearer to the exact ones than those of ``"low_rank"``, where all other directions are as the prior has them.
    The evidence of ``"low_rank"`` is never below the exact one for a Gauss-Newton matrix; this one most often is, since
    D counts as independent. Sees the data twice (a sampled Fisher draws the same targets both times) and keeps
    ``P (K + 1)`` numbers.

    With :math:`\Delta` the sum of D, scaled by noise and temperature, and the prior precision, and
    :math:`W = \operatorname{diag}(s)^{1/2} V^\top \Delta^{-1/2}`, everything follows from

    .. math:: P = \Delta^{1/2} (I + W^\top W) \Delta^{1/2}, \qquad
        \log\det P = \log\det\Delta + \log\det(I + W W^\top),

    in ``O(P K^2 + K^3)``; nothing of size P x P is formed. That algebra is in float64, since
    :math:`W W^\top` may be many powers of ten above the unit matrix.

    Args:
        model: The model.
        likelihood: ``"regression"`` or ``"classification"``.
        backend: One of this package; ``backend_kwargs={"low_rank": K}`` says how many eigenvalues.
        kwargs: As for :class:`laplace.LowRankLaplace`.

    References:
        Mishkin et al. (2018), SLANG, https://arxiv.org/abs/1811.04504
    """

    _key = ("all", "low_rank_diag")

    H: Any
    mean: Any

    def _init_H(self) -> None:
        """Where the diagonal is added up; a fitted posterior has a :class:`LowRankDiagonal`."""
        self.H = torch.zeros(self.n_params, device=self._device, dtype=self._dtype)

    def _check_H_init(self) -> None:
        if not isinstance(self.H, LowRankDiagonal):
            raise AttributeError("this posterior is not fitted: it has no eigenvalues yet. Run fit() first.")

    def _curv_closure(self, X: Any, y: Tensor, N: int) -> tuple[Tensor, Tensor]:
        backend: Any = self.backend
        return backend.diag(X, y, N=N)

    def fit(self, train_loader: DataLoader, override: bool = True, progress_bar: bool = False) -> None:
        """Fit to the data, which are seen twice: for the diagonal, then for the eigenvalues.

        Args:
            train_loader: Batches; it must give the same data again.
            override: Must be True: eigenvectors of some data do not add to those of others.
            progress_bar: Show one.

        Raises:
            ValueError: For ``override=False``.
        """
        if not override:
            raise ValueError(
                "a posterior with hessian_structure='low_rank_diag' cannot be extended by more data, which have other "
                "eigenvectors. Fit it to all of them, or use hessian_structure='kfac'."
            )
        backend: Any = self.backend
        drawn = getattr(backend, "sampled", None)
        ParametricLaplace.fit(self, train_loader, progress_bar=progress_bar)  # adds up the diagonal
        if drawn is not None:
            backend.sampled = drawn  # the same draws, else the diagonal would be that of another matrix
        vectors, values, _ = backend.eig_lowrank(train_loader)
        self.note_lowest()
        self.H = LowRankDiagonal.of(vectors, values, self.H)

    @property
    def posterior_precision(self) -> Any:
        r"""``((V, s), d)``, which stands for :math:`V \operatorname{diag}(s) V^\top + \operatorname{diag}(d)`.

        Both s and d have noise and temperature in them, d the prior precision too.
        """
        self._check_H_init()
        H, factor = self.H, self._H_factor
        return (H.vectors, factor * H.values), factor * H.rest + self.prior_precision_diag

    def _whitened(self) -> tuple[LowRank, Tensor]:
        r""":math:`W^\top W` and the root of :math:`\Delta`, in float64."""
        (V, s), d = self.posterior_precision
        root = d.double().sqrt()
        return LowRank(s.double().sqrt().unsqueeze(1) * V.mT.double() / root), root

    def _power(self, low_rank: LowRank, x: Tensor, exponent: float) -> Tensor:
        r""":math:`(I + W^\top W)^p x` for x ``(..., P)``."""
        return Woodbury().power(low_rank.shift(1.0), exponent) @ x

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant, 0-d."""
        self.refuse_negative()
        low_rank, root = self._whitened()
        gram = low_rank.gram_matrix()
        core = torch.logdet(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        return (2 * root.log().sum() + core).to(self._dtype)

    def square_norm(self, value: Tensor) -> Tensor:
        """Squared distance of parameters ``(P,)`` from the mean, in units of the posterior, 0-d."""
        (V, s), d = self.posterior_precision
        delta = value - self.mean
        return (d * delta.square()).sum() + (s * (delta @ V).square()).sum()

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariances of the outputs ``(M, C, C)`` from their Jacobians ``(M, C, P)``."""
        low_rank, root = self._whitened()
        J = Js.double() / root
        return (self._power(low_rank, J, -1) @ J.mT).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Covariance of all outputs of all inputs, ``(M C, M C)``, from Jacobians ``(M, C, P)``."""
        return self.functional_variance(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the parameters, ``(n_samples, P)``."""
        size = (n_samples, len(self.mean))
        noise = torch.randn(size, generator=generator, device=self._device, dtype=self._dtype)
        low_rank, root = self._whitened()
        return self.mean + (self._power(low_rank, noise.double(), -0.5) / root).to(self.mean.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names."""
        return super().state_dict() | {"H": vars(self.H)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.H = LowRankDiagonal(**state_dict["H"])


class LastLayerLowRankDiagPosterior(LLLaplace, LowRankDiagPosterior):
    """The same for the last layer: ``hessian_structure="low_rank_diag"`` with ``subset_of_weights="last_layer"``."""

    _key = ("last_layer", "low_rank_diag")
