"""The space of the largest eigenvalues along training: how much of the gradient it holds, and how fast it turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.matrices.by_name import Matrix, matrix_of
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.matrices.problem import gradient
from curvature.model.arguments import checked, one_of
from curvature.model.data import Data, Output
from curvature.model.parameters import Parameters
from solvers import Eigenpairs, eigsh
from solvers.outcome.arguments import real_tensor
from solvers.outcome.solution import silenced


@dataclass(frozen=True, eq=False)
class Overlap:
    r"""How near two subspaces are.

    Attributes:
        value: :math:`\|P_1 P_2\|_F^2 / k`, the mean squared cosine of the angles: 1 if one holds the other, about
            ``max(k, m) / P`` for unrelated ones of dimensions k and m.
        angles: Principal angles in radians, ascending, ``(min(k, m),)``, float64.
    """

    value: float
    angles: Tensor


@checked(first=real_tensor, second=real_tensor)
def overlap(first: Tensor, second: Tensor) -> Overlap:
    """Overlap of the spans of two sets of vectors.

    Args:
        first: ``(k, P)``, linearly independent.
        second: ``(m, P)``; the overlap is relative to the smaller one.

    Raises:
        ValueError: If the vectors are not of one length, or dependent.

    References:
        Björck and Golub (1973), https://doi.org/10.1090/S0025-5718-1973-0348991-3
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"first and second are (k, P) and (m, P), got {tuple(first.shape)} and {tuple(second.shape)}.")
    small, large = sorted((_orthonormal(first), _orthonormal(second)), key=len)
    cosines = small @ large.mT
    cosine = torch.linalg.svdvals(cosines).clamp(max=1)  # descending
    sine = torch.linalg.svdvals(small - cosines @ large).flip(0).clamp(max=1)
    # each where it is well conditioned
    angles = torch.where(cosine.square() > 0.5, sine.asin(), cosine.acos())
    return Overlap(float(cosines.square().sum() / len(small)), angles)


def _orthonormal(vectors: Tensor) -> Tensor:
    q, r = torch.linalg.qr(vectors.detach().double().mT)
    lengths = torch.linalg.vector_norm(vectors.double(), dim=1)
    if len(vectors) > vectors.shape[1] or not (r.diagonal().abs() > 1e-10 * lengths).all():
        raise ValueError(
            f"the {len(vectors)} vectors are linearly dependent or not finite: they span fewer dimensions."
        )
    return q.mT


@dataclass(frozen=True, eq=False)
class SubspaceRecord:
    r"""One measurement.

    Attributes:
        step: Number of the step, as the caller counts.
        values: The k largest eigenvalues ``(k,)``.
        residuals: Of the pairs ``(k,)``: an eigenvalue lies within.
        gradient_norm: Norm of the gradient.
        shares: Share of the squared norm of the gradient along each eigenvector ``(k,)``.
        previous: Overlap with the space of the measurement before; ``None`` for the first.
        first: Overlap with the space of the first measurement.
        error: Bound on the sine of the largest angle between this space and the true one, residual over gap (Davis and
            Kahan); 1 where the (k+1)-th eigenvalue is too near to tell the spaces apart.
        converged: Whether all pairs met their tolerance.
        products: Products with the matrix.
    """

    step: int
    values: Tensor
    residuals: Tensor
    gradient_norm: float
    shares: Tensor
    previous: Overlap | None
    first: Overlap
    error: float
    converged: bool
    products: int

    @property
    def share(self) -> float:
        """Share of the squared norm of the gradient in the space; 0 for a gradient of zero."""
        return float(self.shares.sum())


class Subspace:
    """The space of the k largest eigenvalues of a model's Hessian or GGN, followed while the model is trained.

    Each :meth:`update` searches for it at the present parameters, starting from the vectors found before. The model and
    its random state are left as they are, so training continues unchanged.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        k: Dimension of the space.
        matrix: ``"hessian"`` or ``"ggn"``.
        rtol: Residual wanted, relative to the eigenvalue.
        max_products: Products that one update may take; what has not converged then says so.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of the random vectors; a fresh one seeded with 0 by default.
        progress: True shows a progress bar, False never, None after a second.

    Attributes:
        history: The measurements so far.
        vectors: Orthonormal eigenvectors of the last one ``(k, P)``.

    Raises:
        ValueError: If k or the matrix is out of range.
    """

    @checked(loss_fn=check_loss, matrix=one_of(Matrix))
    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Data,
        k: int = 10,
        *,
        matrix: Matrix = "hessian",
        rtol: float = 1e-3,
        max_products: int = 1000,
        params: Any = None,
        output: Output | None = None,
        class_dim: ClassDim = None,
        batch_dim: BatchDim = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        if params is not None:
            Parameters(model, params)  # names what is not there
        self._make = matrix_of(matrix)
        self.model, self.loss_fn, self.data, self.k, self.matrix = model, loss_fn, data, k, matrix
        self.rtol, self.max_products, self.progress = rtol, max_products, progress
        self.generator = generator or torch.Generator().manual_seed(0)
        self.history: list[SubspaceRecord] = []
        self.vectors: Tensor | None = None
        self._first: Tensor | None = None
        self._start: Tensor | None = None  # start of the next search
        self._options = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}

    def update(self, step: int | None = None) -> SubspaceRecord:
        """Measure now.

        Args:
            step: Number of the step; by default the number of measurements before.

        Raises:
            ValueError: If there are fewer than k parameters.
        """
        op = self._make(self.model, self.loss_fn, self.data, progress=False, **self._options)
        g = gradient(op.problem).double()
        if self.k > len(g):
            raise ValueError(f"k={self.k} is more than the {len(g)} parameters.")
        pairs = self._eigenpairs(op)
        vectors = pairs.vectors[: self.k]
        norm = torch.linalg.vector_norm(g)
        along = vectors.double() @ (g / norm if norm > 0 else g)
        self._first = vectors if self._first is None else self._first
        record = SubspaceRecord(
            step=len(self.history) if step is None else step,
            values=pairs.values[: self.k],
            residuals=pairs.residuals[: self.k],
            gradient_norm=float(norm),
            shares=along.square(),
            previous=None if self.vectors is None else overlap(self.vectors, vectors),
            first=overlap(self._first, vectors),
            error=_error(pairs, self.k),
            converged=pairs.complete and bool(pairs.converged[: self.k].all()),
            products=pairs.products,
        )
        self.vectors = vectors
        self.history.append(record)
        return record

    def _eigenpairs(self, op: DatasetOperator) -> Eigenpairs:
        """One pair more than asked for, where there is one: its eigenvalue tells how well the space is determined."""
        n = op.shape[1]
        noise = torch.randn(1, n, generator=self.generator, dtype=torch.float64, device=self.generator.device)
        start = (noise / torch.linalg.vector_norm(noise)).to(op.device, op.dtype)
        if self._start is not None:
            # A little noise, so that the search can reach directions that have grown since.
            start = torch.cat([self._start.to(start), 0.1 * start])
        with silenced():  # the record says it
            pairs = eigsh(
                op,
                min(self.k + 1, n),
                rtol=self.rtol,
                v0=start,
                max_products=max(self.max_products, 2 * self.k + 2),
                progress=self.progress,
            )
        self._start = pairs.vectors
        return pairs


def _error(pairs: Eigenpairs, k: int) -> float:
    if len(pairs.values) == k:
        return 0.0  # the whole space
    residual = float(torch.linalg.vector_norm(pairs.residuals[:k].double()))
    gap = float(pairs.values[k - 1] - pairs.values[k] - pairs.residuals[k])
    rounding = 40 * torch.finfo(pairs.values.dtype).eps * float(pairs.values.abs().max())
    return min(1.0, max(residual, rounding) / gap) if gap > rounding else 1.0


def subspace(model: nn.Module, loss_fn: Any, data: Data, k: int = 10, **options: Any) -> Subspace:
    r"""The space of the k largest eigenvalues now; ``update()`` follows it through training.

    Early in training the gradient falls into a space of about as many dimensions as there are classes, in which the
    loss is steep, and which turns slowly. Progress happens in the rest.

    >>> model, loss_fn, x = nn.Linear(3, 1), nn.MSELoss(), torch.eye(3)
    >>> space = subspace(model, loss_fn, (x, torch.zeros(3, 1)), k=1)
    >>> model.weight.data *= 0.5  # a training step
    >>> record = space.update()
    >>> round(record.previous.value, 3)  # a quadratic keeps its Hessian
    1.0

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        k: Dimension of the space.
        options: See :class:`Subspace`.

    Returns:
        A :class:`Subspace` with its first measurement.

    References:
        Gur-Ari, Roberts and Dyer (2018), https://arxiv.org/abs/1812.04754
    """
    space = Subspace(model, loss_fn, data, k, **options)
    space.update()
    return space
