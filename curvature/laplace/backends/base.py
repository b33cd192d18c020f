"""Curvature of a batch in the structures of laplace-torch, from the signals that a backend sends back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.collector import Collector
from curvature.laplace.backends.batch import BatchPass, Inputs
from curvature.laplace.backends.jacobians import JacobianBackend
from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.factors.sums import SumOptions, read
from curvature.laplace.factors.tensors import Tensors
from curvature.layers.block import Block, BlockPlace
from curvature.losses import Terms
from curvature.losses.signals import FisherKind, Signals
from curvature.matrices.low_rank import STORED, chunks
from curvature.model.arguments import Check, a, count, one_of, optional
from curvature.structures.diagonal import DiagonalEstimator
from curvature.structures.ekfac import EigenbasisEstimator
from curvature.structures.estimator import CurvatureEstimator, Form
from solvers import Kronecker
from solvers.operators.decompositions import singular_value_decomposition
from solvers.operators.diagonal import identity
from solvers.outcome.arguments import flag, whole
from solvers.precision import widen
from solvers.triangles import gram

#: Bytes of the rows of a dense matrix that are formed at once.
ROWS = 1 << 26
#: Eigenvalues up to this are left out of low-rank posteriors, as laplace-torch does.
SMALLEST = 1e-6


class Backend(JacobianBackend):
    """Base of the backends whose curvature is a sum of outer products of gradients.

    Attributes:
        seed: Draws of the k-th batch that is sampled start from ``seed + k``; over W processes from ``seed + W k + r``.
        max_dim: Kronecker factors larger than this are kept as their diagonals.
        max_dense: Other parameters than matrices of layers get a dense matrix up to this size, else their diagonal.
        low_rank: Largest number of eigenvalues of :meth:`eig_lowrank`; ``None`` for all.
        sampled: How many batches were sampled so far.
    """

    seed: int = 0
    max_dim: int = SumOptions.max_dim
    max_dense: int = SumOptions.max_dense
    low_rank: int | None = None
    sampled: int = 0

    def configure(self, max_dim: int, max_dense: int, low_rank: int | None, renamed: dict[str, int]) -> None:
        """Validate and keep the options of the structures.

        Args:
            max_dim: See :class:`GGNBackend`.
            max_dense: See :class:`GGNBackend`.
            low_rank: See :class:`GGNBackend`.
            renamed: Options by the names of before.

        Raises:
            TypeError: For an unknown option, or one that is given by both names.
            ValueError: If a number is less than one.
        """
        max_dim = _renamed(type(self).__name__, max_dim, renamed)
        whole("max_dim", max_dim)
        self.max_dim, self.max_dense, self.low_rank = max_dim, max_dense, low_rank

    def _kind(self) -> FisherKind:
        """Kind of the signals that are sent back from the outputs."""
        raise NotImplementedError

    def _samples(self) -> int:
        """Draws per batch."""
        return 1

    def _scale(self) -> float:
        """Factor of the curvature of ``lossfunc``."""
        return self.factor

    def _signals(self, terms: Terms, batch: int | None, samples: int | None) -> Signals:
        generator = None
        if self._kind() == "mc":
            generator = torch.Generator(terms.output.device).manual_seed(
                self.seed + self.sampled * self.shares.size + self.shares.rank
            )
            self.sampled += 1
        return Signals.of(terms, self._kind(), samples or self._samples(), generator, batch)

    def _collect(self, run: BatchPass, make: Any, joint: bool, samples: int | None) -> Collector:
        """Feed estimators with the signals of a batch, sent back through the model."""
        collector = Collector(run.parameters, make, joint=joint, vectorised=True)
        collector.collect(run.recorder, run.output, self._signals(run.loss, run.recorder.batch, samples))
        return collector

    def _rows(self, run: BatchPass, samples: int | None = None) -> Iterator[Tensor]:
        """Rows ``(m, P)`` whose outer products sum to the curvature of ``lossfunc``."""
        examples = run.examples()
        signals = self._signals(run.loss, examples.batch, samples)
        per_signal = examples.number * run.parameters.size * run.parameters.dtype.itemsize
        for some in chunks(iter(signals), max(1, ROWS // per_signal)):
            yield self.of_subnetwork(examples.gradients(some).flatten(0, 1), run.parameters)

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense matrix of a batch.

        Args:
            x: Inputs, a tensor or a mapping.
            y: Targets.
            kwargs: ``mc_samples``, draws for a sampled Fisher; ``N`` is not needed.

        Returns:
            The summed loss times ``factor``, 0-d, and ``(P, P)``, in the model's dtype.

        Raises:
            ValueError: If the matrix is larger than the memory of the device.
        """
        samples = options(kwargs, "full", {"mc_samples"}).get("mc_samples")
        self.refuse_large()
        with self.run_on(x, y) as run:
            total: Tensor | None = None
            for rows in self._rows(run, samples):
                product = gram(widen(rows))
                total = product if total is None else total.add_(product)
            assert total is not None
            return self.scaled_loss(run.loss), (self._scale() * total).to(run.output.dtype)

    def refuse_large(self) -> None:
        """Refuse dense matrices beyond the memory of the device."""
        P = sum(p.numel() for p in self.params) if self.subnetwork_indices is None else len(self.subnetwork_indices)
        nbytes, device = P * P * self.params[0].element_size(), self.params[0].device
        room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else installed()
        if nbytes > room:
            raise ValueError(
                f"the dense matrix of {P} parameters takes {nbytes / 2**30:.3g} GiB, and this {device.type} has "
                f"{room / 2**30:.3g} GiB. Use hessian_structure='kfac' or 'ekfac', or 'diagonal'."
            )

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal of :meth:`full`, ``(P,)``, without forming gradients of single examples where a layer allows.

        Costs one backward pass per output (GGN) or one in all (empirical, sampled), and the memory of one.
        """
        samples = options(kwargs, "diag", {"mc_samples"}).get("mc_samples")
        with self.run_on(x, y) as run:
            collector = self._collect(run, lambda block, form: DiagonalEstimator(block), False, samples)
            sizes = {name: p.numel() for name, p in run.parameters.items()}
            total = widen(run.output.new_zeros(run.parameters.size))
            for estimator in collector.estimators.values():
                assert isinstance(estimator, DiagonalEstimator)
                place = BlockPlace.of(estimator.block, run.parameters.starts, sizes)
                place.scatter(estimator.mean.step_sum()[0].to(total.dtype), total)
            diagonal = self.of_subnetwork(self._scale() * total, run.parameters)
            return self.scaled_loss(run.loss), diagonal.to(run.output.dtype)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, BlockKron]:
        """Kronecker-factored curvature of a batch: a block for every trainable tensor, see :class:`BlockKron`.

        Args:
            x: Inputs.
            y: Targets.
            N: Size of the data set.
            kwargs: ``mc_samples`` (draws for a sampled Fisher) and ``kfac_approx`` (``"expand"`` or ``"reduce"``, how
                positions that share weights are treated).

        Returns:
            The summed loss times ``factor``, and the curvature.
        """
        chosen = options(kwargs, "kron", {"mc_samples", "kfac_approx"})
        if self.subnetwork_indices is not None:
            raise ValueError("a subnetwork has no Kronecker factors; use hessian_structure='full' or 'diag'.")
        with self.run_on(x, y) as run:
            sums = SumOptions(chosen.get("kfac_approx", "expand"), self.max_dim, self.max_dense)
            collector = self._collect(run, sums.estimator, True, chosen.get("mc_samples"))
            found = {e.block: read(e).scaled(self._scale()) for e in collector.estimators.values()}
            tensors = Tensors.of(run.parameters, run.output.dtype)
            return self.scaled_loss(run.loss), BlockKron(tensors, found, self.count(x, y), N)

    def eigenvalues(
        self, x: Inputs, y: Tensor, decomposed: BlockKronDecomposed, **kwargs: Any
    ) -> dict[tuple[str, int], Tensor]:
        """Diagonal of a batch's curvature in the eigenbasis of Kronecker factors: what EKFAC corrects.

        Args:
            x: Inputs.
            y: Targets.
            decomposed: Factors by their eigenvectors.
            kwargs: As for :meth:`kron`.

        Returns:
            For the parts of layers ``y = W a``, by name and start of the part.
        """
        samples = options(kwargs, "eigenvalues", {"mc_samples", "kfac_approx"}).get("mc_samples")
        bases = {(p.part.name, p.part.start): p.basis for p in decomposed.pieces}

        def make(block: Block, form: Form) -> CurvatureEstimator:
            if form != "outer":
                return _Ignored(block)
            basis = bases[block.parts[0].name, block.parts[0].start]
            if not isinstance(basis, Kronecker):  # a bias
                basis = Kronecker(basis, identity((*block.shape[:-2], 1), basis.dtype, basis.device))
            return _InBasis(block, basis)

        with self.run_on(x, y) as run:
            estimators = self._collect(run, make, False, samples).estimators.values()
            return {
                (e.block.parts[0].name, e.block.parts[0].start): self._scale() * e.spectrum.step_sum()[0]
                for e in estimators
                if isinstance(e, _InBasis)
            }

    def eig_lowrank(self, data_loader: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The curvature of all the data by its largest eigenvalues.

        Args:
            data_loader: Batches.

        Returns:
            Eigenvectors ``(P, K)``, their eigenvalues ``(K,)`` (above 1e-6, at most ``low_rank`` of them, descending),
            and the loss.

        Raises:
            ValueError: If the rows that span the curvature do not fit into 4 GiB.
        """
        found: list[Tensor] = []
        loss: Tensor | None = None
        for x, y in map(self.on_device, data_loader):
            with self.run_on(x, y) as run:
                for rows in self._rows(run):
                    found.append(widen(rows))
                    if sum(part.nbytes for part in found) > STORED:
                        raise ValueError(
                            f"the gradients that span the curvature ({sum(map(len, found))} and more, of "
                            f"{found[0].shape[1]} entries) take more than 4 GiB. Take fewer data, stochastic=True, or "
                            "hessian_structure='kron'."
                        )
                one = self.scaled_loss(run.loss)
                loss = one if loss is None else loss + one
        if loss is None:
            raise ValueError("data_loader has no batches.")
        rows = torch.cat(found)
        if self.shares.several:
            if sum(self.shares.gather(rows.nbytes)) > STORED:
                raise ValueError(
                    f"the gradients that span the curvature take more than 4 GiB over {self.shares.size} processes. "
                    "Take fewer data, stochastic=True, or hessian_structure='kron'."
                )
            joined = self.shares.joined(rows, rows.device)
            assert joined is not None
            rows = joined
            self.shares.sum(loss)
        _, s, V = singular_value_decomposition(rows)
        values = self._scale() * s.square()
        keep = values > SMALLEST
        return largest(values[keep], V.mT[:, keep], loss, self.low_rank)


def _renamed(backend: str, max_dim: int, renamed: dict[str, int]) -> int:
    """The cap on the size of factors, which was called ``max_factor`` before."""
    if unknown := sorted(set(renamed) - {"max_factor"}):
        raise TypeError(f"{backend} has no option {', '.join(unknown)}.")
    if not renamed:
        return max_dim
    old = renamed["max_factor"]
    if max_dim != SumOptions.max_dim:
        raise TypeError(f"{backend}: max_factor={old} and max_dim={max_dim} say it twice; write max_dim={max_dim}.")
    warnings.warn(f"{backend}: max_factor={old} is max_dim={old} now.", DeprecationWarning, stacklevel=4)
    return old


class _InBasis(EigenbasisEstimator):
    """The diagonal in a basis that is known."""

    def __init__(self, block: Block, basis: Kronecker) -> None:
        super().__init__(block)
        self.basis = basis

    def update(self, samples: Any) -> None:
        self.project(samples)


class _Ignored(EigenbasisEstimator):
    """A block whose curvature is exact as it is."""

    def update(self, samples: Any) -> None:
        """Nothing."""


def _check_indices(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex or value.ndim != 1:
        raise TypeError(f"{name} is a vector of whole numbers, as a LongTensor, not {value!r}.")
    return value


#: Checks of what all backends take, as laplace-torch passes it on.
CHECKS: dict[str, Check] = {
    "likelihood": one_of(("classification", "regression", "reward_modeling")),
    "last_layer": flag,
    "subnetwork_indices": optional(_check_indices),
    "dict_key_x": a(str, "a key of the batches"),
    "dict_key_y": a(str, "a key of the batches"),
    "max_dim": count(),
    "max_dense": count(),
    "low_rank": optional(count()),
}


def installed() -> int:
    """Bytes of main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def options(kwargs: dict[str, Any], method: str, known: set[str]) -> dict[str, Any]:
    """Keywords of a call.

    Raises:
        TypeError: If there are unknown ones; ``N`` is always allowed.
        ValueError: If a value makes no sense.
    """
    if unknown := set(kwargs) - known - {"N"}:
        raise TypeError(f"{method}() does not know {sorted(unknown)}; it takes {sorted(known)}.")
    if kwargs.get("kfac_approx", "expand") not in ("expand", "reduce"):
        raise ValueError(f"kfac_approx must be 'expand' or 'reduce', got {kwargs['kfac_approx']!r}.")
    if kwargs.get("mc_samples", 1) < 1:
        raise ValueError(f"mc_samples must be at least 1, got {kwargs['mc_samples']}.")
    return kwargs


def largest(values: Tensor, vectors: Tensor, loss: Tensor, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``count`` of descending eigenvalues as laplace-torch takes them: vectors, values, loss."""
    return vectors[:, :count].to(loss.dtype), values[:count].to(loss.dtype), loss
