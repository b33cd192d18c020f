"""Posteriors with Kronecker factors for every parameter, and with corrected eigenvalues (EKFAC)."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from laplace import KronLaplace, LowRankLaplace
from laplace.baselaplace import ParametricLaplace
from laplace.curvature import CurvatureInterface
from laplace.lllaplace import KronLLLaplace
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from curvature.laplace.backends.base import Backend
from curvature.laplace.backends.ggn import GGNBackend
from curvature.laplace.backends.last_layer import Features
from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.parametric.adopted import in_front_of
from curvature.laplace.parametric.definite import IndefinitePosteriorError
from curvature.laplace.parametric.outputs import note_outputs
from curvature.laplace.parametric.predictions import FromFeatures, InParts
from solvers import Kronecker


@in_front_of(KronLaplace)
def state_dict(la: Any, plain: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """With the sums beside laplace-torch's factors, which alone do not say how many examples they are of."""
    state = plain()
    return state | {"sums": la.H_facs.state_dict()} if _is_kron(la) and isinstance(la.H_facs, BlockKron) else state


@in_front_of(KronLaplace)
def load_state_dict(la: Any, plain: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """To the sums, where they are there: the posterior then is that of before, and takes more data."""
    if not _is_kron(la) or "sums" not in state_dict:
        plain(state_dict)
        return
    ParametricLaplace.load_state_dict(la, state_dict)
    la.H_facs = BlockKron.from_state(state_dict["sums"])
    la.H = la.H_facs.decompose(damping=la.damping)


def _is_kron(la: Any) -> bool:
    """Whether a posterior keeps factors in the form of laplace-torch; those of this package keep their own."""
    kron: bool = la._key[1] == "kron"
    return kron


class KFACLaplace(InParts, KronLaplace):
    """Kronecker-factored posterior of all parameters: ``hessian_structure="kfac"`` with ``subset_of_weights="all"``.

    As ``"kron"`` with a backend of this package, with two differences. Nothing is allocated before the data are seen,
    so models with parameters of any shape are served (scalars, Conv3d, large embeddings). All sums
    are saved, so a loaded posterior equals the saved one and can be fitted to more data.

    Args:
        args: As for :class:`laplace.KronLaplace`.
        backend: :class:`GGNBackend` (the default) or :class:`EFBackend`.
        kwargs: As for :class:`laplace.KronLaplace`.

    Raises:
        ValueError: For a backend of another package.
    """

    _key = ("all", "kfac")

    H: Any
    H_facs: Any

    def __init__(self, *args: Any, backend: type[Backend] | None = None, **kwargs: Any) -> None:
        backend = GGNBackend if backend is None else backend
        if not (isinstance(backend, type) and issubclass(backend, Backend)):
            raise ValueError(
                f"hessian_structure={self._key[1]!r} needs the factors of GGNBackend or EFBackend from "
                f"curvature.laplace, got backend={backend!r}. Other backends serve hessian_structure='kron'."
            )
        super().__init__(*args, backend=backend, **kwargs)

    def _init_H(self) -> None:
        self.H = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names; the factors as sums."""
        return super().state_dict() | {"H": self.H_facs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._load_all_but_the_curvature(state_dict)
        self.H_facs = BlockKron.from_state(state_dict["H"])
        self.H = self.H_facs.decompose(damping=self.damping)

    def _load_all_but_the_curvature(self, state_dict: dict[str, Any]) -> None:
        ParametricLaplace.load_state_dict(self, state_dict)


class EKFACLaplace(KFACLaplace):
    r"""EKFAC posterior of all parameters: ``hessian_structure="ekfac"`` with ``subset_of_weights="all"``.

    The eigenvectors are those of the Kronecker factors; the eigenvalues are the diagonal of the curvature itself in
    their basis, which no other eigenvalues (the products of ``"kfac"`` among them) bring nearer to the curvature in
    Frobenius norm. Sees the data twice and keeps P numbers more.

    References:
        George et al. (2018), https://arxiv.org/abs/1806.03884
    """

    _key = ("all", "ekfac")

    def fit(self, train_loader: DataLoader, override: bool = True, progress_bar: bool = False) -> None:
        """Fit to the data, which are seen twice: for the factors, then for the eigenvalues.

        Args:
            train_loader: Batches; it must give the same data again.
            override: Must be True: eigenvalues in one basis do not add to those in another.
            progress_bar: Show one.

        Raises:
            ValueError: For ``override=False``, or with damping.
        """
        if not override:
            raise ValueError(
                "an EKFAC posterior cannot be extended by more data, since they have another eigenbasis. Fit it to all "
                "of them, or use hessian_structure='kfac'."
            )
        if self.damping:
            raise ValueError("damping=True adds to Kronecker factors; EKFAC has one eigenvalue per parameter.")
        super().fit(train_loader, progress_bar=progress_bar)
        backend: Any = self.backend
        spectra: dict[tuple[str, int], Tensor] = {}
        with backend.shares.together():
            for data in train_loader:
                x, y = (data, data[self.dict_key_y]) if isinstance(data, MutableMapping) else data
                x = x.to(self._device) if isinstance(x, Tensor) else x
                new = backend.eigenvalues(x, y.to(self._device), self.H, **self._asdl_fisher_kwargs)
                for key, values in new.items():
                    spectra[key] = spectra[key] + values if key in spectra else values
        self.H = self.H.corrected(backend.shares.add_up(spectra, self._device))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names; factors and eigenvalues."""
        saved = super().state_dict()
        return saved | {"H": saved["H"] | {"eigen": self.H.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._load_all_but_the_curvature(state_dict)
        self.H_facs = BlockKron.from_state(state_dict["H"])
        self.H = BlockKronDecomposed.from_state(self.H_facs.tensors, state_dict["H"]["eigen"])


class LastLayerKFACLaplace(FromFeatures, KronLLLaplace, KFACLaplace):
    """Kronecker-factored posterior of the last layer: ``hessian_structure="kfac"``, predictions without Jacobians.

    The covariance of the outputs follows from the features, and predictions that need its diagonal alone (the
    probit approximation, ``diagonal_output=True`` in regression) compute only that. Arguments and errors are those of
    :class:`laplace.KronLLLaplace` and :class:`KFACLaplace`.
    """

    _key = ("last_layer", "kfac")

    def _init_H(self) -> None:
        KFACLaplace._init_H(self)

    def _of_features(self, features: Features, diagonal: bool) -> Tensor:
        r"""From the posterior of the weight in its eigenbasis, :math:`U, V` with eigenvalues :math:`s`.

        .. math:: U \operatorname{diag}_c\bigl(\textstyle\sum_j (V^\top \phi)_j^2 / s_{cj}\bigr) U^\top,

        plus the covariance of the bias.
        """
        precision: Any = self.posterior_precision
        total: Any = 0.0
        for piece in precision.pieces:
            basis, variance = piece.basis, 1 / precision.spectrum(piece)
            if isinstance(basis, Kronecker):
                outputs, inputs = basis.factors
                turned = inputs.adjoint() @ features.phi.to(basis.dtype)
                scales = turned.square() @ variance.mT  # (M, C)
            else:
                outputs, scales = basis, variance.expand(len(features.phi), -1)
            Q = outputs.to_dense()
            total = total + (scales @ Q.square().mT if diagonal else (Q * scales.unsqueeze(1)) @ Q.mT)
        return total


class LastLayerEKFACLaplace(LastLayerKFACLaplace, EKFACLaplace):
    """EKFAC posterior of the last layer: ``hessian_structure="ekfac"``, predictions without Jacobians."""

    _key = ("last_layer", "ekfac")


class LowRankPosterior(InParts, LowRankLaplace):
    """Posterior from the largest eigenvalues of the curvature: ``hessian_structure="low_rank"``.

    laplace-torch's ``"lowrank"`` with any backend of this package, without the package that it asks for, and with
    frozen parameters left out.

    Args:
        model: The model.
        likelihood: ``"regression"`` or ``"classification"``.
        backend: One of this package; ``backend_kwargs={"low_rank": k}`` says how many eigenvalues.
        kwargs: As for :class:`laplace.LowRankLaplace`.
    """

    _key = ("all", "low_rank")

    #: Eigenvalue and eigenvector of the curvature that are left out although the first is negative.
    lowest_value: Tensor | None = None
    lowest_vector: Tensor | None = None

    def __init__(
        self, model: nn.Module, likelihood: str, backend: type[CurvatureInterface] | None = None, **kwargs: Any
    ) -> None:
        # LowRankLaplace.__init__ only looks for a package that is not needed here.
        ParametricLaplace.__init__(self, model, likelihood, backend=backend or GGNBackend, **kwargs)

    def fit(self, train_loader: DataLoader, override: bool = True, progress_bar: bool = False) -> None:
        """Fit to the data; more data cannot be added later."""
        super().fit(train_loader, override, progress_bar)
        note_outputs(self)
        self.note_lowest()
        self.mean = parameters_to_vector(self.params).detach()

    def note_lowest(self) -> None:
        """Keep the lowest eigenvalue of the curvature, where the backend found one below zero."""
        lowest: tuple[Tensor, Tensor] | None = getattr(self.backend, "lowest", None)
        self.lowest_value, self.lowest_vector = (None, None) if lowest is None else lowest

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant, 0-d.

        Raises:
            IndefinitePosteriorError: If the curvature plus the prior is negative along an eigenvector that is left out.
        """
        self.refuse_negative()
        return super().log_det_posterior_precision

    def refuse_negative(self) -> None:
        """Raise if the curvature that is left out is more negative than the prior is positive."""
        if self.lowest_value is None or self.lowest_vector is None:
            return
        with torch.no_grad():
            left_out = self._H_factor * self.lowest_value + self.lowest_vector.square() @ self.prior_precision_diag
        if not bool(left_out > 0):
            raise IndefinitePosteriorError(
                f"the curvature plus the prior is not positive definite ({float(left_out):.3g} along an eigenvector "
                f"with the eigenvalue {float(self.lowest_value):.3g}, which a posterior from the largest ones leaves "
                "out), so there is no Gaussian around these parameters, and no evidence. Train on to a minimum, take "
                "backend=GGNBackend, or a larger prior_precision."
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names."""
        if self.lowest_value is None:
            return super().state_dict()
        return super().state_dict() | {"lowest_value": self.lowest_value, "lowest_vector": self.lowest_vector}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.lowest_value, self.lowest_vector = (state_dict.get(f"lowest_{name}") for name in ("value", "vector"))
