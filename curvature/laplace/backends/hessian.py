"""The Hessian as a backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from curvature.laplace.backends.base import CHECKS, SMALLEST, largest, options
from curvature.laplace.backends.batch import BatchPass, Inputs
from curvature.laplace.backends.jacobians import JacobianBackend
from curvature.laplace.factors.kron import BlockKron
from curvature.matrices.hessian import Hessian, hessian
from curvature.model.arguments import checked, count
from curvature.model.shares import Shares
from solvers import eigsh


class HessianBackend(JacobianBackend):
    """The Hessian of the loss itself, which may have negative eigenvalues away from a minimum.

    :meth:`full` and :meth:`diag` cost P second backward passes per batch; :meth:`eig_lowrank` a Lanczos iteration. The
    Hessian has no Kronecker factors.

    Args:
        model: The model, or laplace-torch's feature extractor around it.
        likelihood: ``"regression"`` or ``"classification"``.
        last_layer: Only the last layer counts.
        subnetwork_indices: Only these entries of the flat parameter vector count.
        dict_key_x: Key of the inputs in mappings.
        dict_key_y: Key of the targets in mappings.
        class_dim: As for :class:`GGNBackend`.
        batch_dim: As for :class:`GGNBackend`.
        low_rank: Number of eigenvalues that :meth:`eig_lowrank` looks for.
        process_group: As for :class:`GGNBackend`.

    Attributes:
        lowest: Lowest eigenvalue and its eigenvector, of the last :meth:`eig_lowrank`; ``None`` if it is not negative.
    """

    lowest: tuple[Tensor, Tensor] | None = None

    @checked(**{**CHECKS, "low_rank": count()})
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
        low_rank: int = 10,
        process_group: Any = None,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self.low_rank, self.class_dim, self.batch_dim = low_rank, class_dim, batch_dim
        self.shares = Shares(process_group)

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        options(kwargs, "full", set())
        loss, H, empty = self._hessian(x, y)
        columns, size = self.columns_of(H.rows), H.rows.size
        matrix = loss.new_zeros(size, size) if empty else self.factor * H.to_dense()
        return loss, (matrix if columns is None else matrix[columns][:, columns]).to(loss.dtype)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal of the Hessian, ``(P,)``."""
        options(kwargs, "diag", set())
        loss, H, empty = self._hessian(x, y)
        diagonal = loss.new_zeros(H.rows.size) if empty else self.factor * H.exact_diagonal()
        return loss, self.of_subnetwork(diagonal, H.rows).to(loss.dtype)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, BlockKron]:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "the Hessian of a network has no Kronecker factors. Use GGNBackend, or hessian_structure='full', 'diag' or "
            "'low_rank'."
        )

    def _hessian(self, x: Inputs, y: Tensor) -> tuple[Tensor, Hessian, bool]:
        """Loss and Hessian of a batch, and whether no target counts in it."""
        with self.run_on(x, y) as run:
            loss, class_dim, empty = self.scaled_loss(run.loss), self._class_dim(run), run.loss.empty
        return loss, self._operator(((x,), y), class_dim), empty

    def _class_dim(self, run: BatchPass) -> int | None:
        """The class axis of a batch's loss, where there is more than one to choose from."""
        return run.loss.layout.class_axes[0] if run.output.dim() > 2 else None

    def _operator(self, data: Any, class_dim: int | None, process_group: Any = None) -> Hessian:
        tensors = list(self.trainable().values())
        with self.leaving_all():
            return hessian(
                self.model,
                self.lossfunc,
                data,
                params=tensors,
                class_dim=class_dim,
                batch_dim=self.batch_dim,
                process_group=process_group,
            )

    def eig_lowrank(self, data_loader: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The largest eigenvalues of the Hessian of all the data, by Lanczos iterations.

        Args:
            data_loader: Batches; all of them are kept while the iteration runs.

        Returns:
            Eigenvectors ``(P, K)``, their eigenvalues ``(K,)`` (above 1e-6, at most ``low_rank`` of them, descending),
            and the loss.
        """
        losses, data, class_dim = [], [], None
        for x, y in map(self.on_device, data_loader):
            with self.run_on(x, y) as run:
                losses.append(self.scaled_loss(run.loss))
                class_dim = self._class_dim(run)
            data.append(((x,), y))
        if not losses:
            raise ValueError("data_loader has no batches.")
        loss = torch.stack(losses).sum()
        self.shares.sum(loss)
        H = self._operator(data, class_dim, self.shares.group)
        with self.leaving_all():
            pairs = eigsh(H, min(self.low_rank, H.shape[0]), which="LA")
            bottom = eigsh(H, 1, which="SA")
        value, vector = self.factor * bottom.values[0], bottom.vectors[0]
        # As far as the iteration tells it from zero.
        self.lowest = (value, vector) if value < -SMALLEST - self.factor * bottom.residuals[0] else None
        values = self.factor * pairs.values
        keep = values > SMALLEST
        return largest(values[keep], pairs.vectors[keep].mT, loss, self.low_rank)
