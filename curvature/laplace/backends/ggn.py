"""The backends of the Gauss-Newton matrix and of the empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
from laplace.curvature import EFInterface, GGNInterface
from torch import LongTensor, Tensor, nn

from curvature.laplace.backends.base import CHECKS, Backend, options
from curvature.laplace.backends.batch import Inputs
from curvature.laplace.backends.last_layer import OutputHessians, block_of
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.factors.sums import SumOptions
from curvature.laplace.factors.tensors import Tensors
from curvature.losses.signals import FisherKind
from curvature.model.arguments import checked, count
from curvature.model.shares import Shares
from solvers.outcome.arguments import flag


class GGNBackend(Backend, GGNInterface):
    r"""Generalised Gauss-Newton matrix :math:`\sum_n J_n^\top H_n J_n`, which is the Fisher of both likelihoods.

    H is the unit matrix for regression (unit noise) and :math:`\operatorname{diag}(p) - p p^\top` for classification.
    Exact; with ``stochastic=True`` an unbiased estimate from draws of the model's own distribution, at the cost of one
    backward pass per draw in place of one per output.

    Args:
        model: The model, or laplace-torch's feature extractor around it.
        likelihood: ``"regression"`` or ``"classification"``.
        last_layer: Only the last layer counts.
        subnetwork_indices: Only these entries of the flat parameter vector count.
        dict_key_x: Key of the inputs in mappings, whose first axis counts the examples.
        dict_key_y: Key of the targets in mappings.
        stochastic: Sample.
        num_samples: Draws per batch.
        class_dim: Class axis of outputs with more than two axes, where the shapes leave it open.
        batch_dim: Axis of the outputs and targets that counts the examples, where it is not the first.
        seed: Of the draws; the global random state is not used.
        max_dim: Kronecker factors larger than this are kept as their diagonals.
        max_dense: Other parameters than matrices of layers (norms, bare parameters) get a dense matrix up to this
            size, else its diagonal.
        low_rank: Largest number of eigenvalues of :meth:`eig_lowrank`; all by default.
        process_group: Processes whose loaders together give the data: all of them fit, and end with the posterior of
            all data.
        renamed: ``max_factor``, which is ``max_dim`` now.

    Raises:
        ValueError: If a number is less than one.
    """

    @checked(**CHECKS, stochastic=flag, num_samples=count())
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        *,
        class_dim: int | None = None,
        batch_dim: int | None = None,
        seed: int = 0,
        max_dim: int = SumOptions.max_dim,
        max_dense: int = SumOptions.max_dense,
        low_rank: int | None = None,
        process_group: Any = None,
        **renamed: int,
    ) -> None:
        GGNInterface.__init__(
            self, model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, num_samples
        )
        self.seed, self.class_dim, self.batch_dim = seed, class_dim, batch_dim
        self.shares = Shares(process_group)
        self.configure(max_dim, max_dense, low_rank, renamed)

    def _kind(self) -> FisherKind:
        return "mc" if self.stochastic else "exact"

    def _samples(self) -> int:
        return self.num_samples

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        options(kwargs, "full", {"mc_samples"})
        self.refuse_large()
        form = None if self._partly() else self._closed_form(x, y)
        if form is None:
            return super().full(x, y, **kwargs)
        hessians, names, loss = form
        return loss, (self._scale() * hessians.dense(bias=len(names) > 1)).to(loss.dtype)

    def _partly(self) -> bool:
        """Whether only a part of the last layer counts."""
        layer: Any = self._model
        frozen = self.last_layer and len(self.params) < len(list(layer.parameters()))
        return frozen or self.subnetwork_indices is not None

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        options(kwargs, "diag", {"mc_samples"})
        form = self._closed_form(x, y)
        if form is None:
            return super().diag(x, y, **kwargs)
        hessians, names, loss = form
        diagonals = dict(zip(names, hessians.diagonals(), strict=False))
        parameters = self.trainable()
        diagonal = self._scale() * parameters.flatten({name: diagonals[name] for name in parameters})
        return loss, self.of_subnetwork(diagonal, parameters).to(loss.dtype)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, BlockKron]:
        approximation = options(kwargs, "kron", {"mc_samples", "kfac_approx"}).get("kfac_approx", "expand")
        layer: Any = self._model
        form = None if self._partly() else self._closed_form(x, y)
        if form is None or (approximation != "expand" and form[0].positions > 1):
            return super().kron(x, y, N, **kwargs)
        hessians, names, loss = form
        sums = hessians.sums(self.max_dim, bias=len(names) > 1).scaled(self._scale())
        tensors = Tensors.of(self.trainable(), loss.dtype)
        return loss, BlockKron(tensors, {block_of(layer, *names): sums}, self.count(x, y), N)

    @torch.no_grad()
    def _closed_form(self, x: Inputs, y: Tensor) -> tuple[OutputHessians, list[str], Tensor] | None:
        """Output Hessians of the last layer, the names of its parameters, and the loss of the batch.

        ``None`` where signals must be sent back.
        """
        closed = self.last_layer and not self.stochastic and self.batch_dim is None
        features = self.features(x) if closed else None
        if features is None:
            return None
        terms = self.terms_of(features.output, y)
        hessians = OutputHessians.of(features, self.lossfunc, terms)
        names = {id(p): name for name, p in self.model.named_parameters()}
        return (
            None
            if hessians is None
            else (hessians, [names[id(p)] for p in features.parameters], self.scaled_loss(terms))
        )


class EFBackend(Backend, EFInterface):
    r"""Empirical Fisher :math:`\sum_t g_t g_t^\top` over the terms of the loss, with the targets of the data.

    One backward pass per position, whatever the number of outputs. It does not estimate the Gauss-Newton matrix: where
    the model fits its data the gradients vanish, and so does this curvature.

    For **regression** laplace-torch's convention is kept by default: g is the gradient of ``MSELoss(reduction="sum")``
    and the sum of products is halved once, which is twice the empirical Fisher of a Gaussian with unit noise.

    Args:
        model: The model, or laplace-torch's feature extractor around it.
        likelihood: ``"regression"`` or ``"classification"``.
        last_layer: Only the last layer counts.
        subnetwork_indices: Only these entries of the flat parameter vector count.
        dict_key_x: Key of the inputs in mappings.
        dict_key_y: Key of the targets in mappings.
        class_dim: As for :class:`GGNBackend`.
        batch_dim: As for :class:`GGNBackend`.
        unit_noise: For regression: the empirical Fisher of unit noise itself, half of the default.
        max_dim: As for :class:`GGNBackend`.
        max_dense: As for :class:`GGNBackend`.
        low_rank: As for :class:`GGNBackend`.
        process_group: As for :class:`GGNBackend`.
        renamed: As for :class:`GGNBackend`.

    References:
        Kunstner, Balles and Hennig (2019), https://arxiv.org/abs/1905.12558
    """

    @checked(**CHECKS, unit_noise=flag)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        class_dim: int | None = None,
        batch_dim: int | None = None,
        unit_noise: bool = False,
        max_dim: int = SumOptions.max_dim,
        max_dense: int = SumOptions.max_dense,
        low_rank: int | None = None,
        process_group: Any = None,
        **renamed: int,
    ) -> None:
        EFInterface.__init__(self, model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self.unit_noise, self.class_dim, self.batch_dim = unit_noise, class_dim, batch_dim
        self.shares = Shares(process_group)
        self.configure(max_dim, max_dense, low_rank, renamed)

    def _kind(self) -> FisherKind:
        return "empirical"

    def _scale(self) -> float:
        return self.factor**2 if self.unit_noise else self.factor
