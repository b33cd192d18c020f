"""Curvature that spans the whole model, from the per-sample gradients of all blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart, BlockPlace
from curvature.layers.samples import Samples
from curvature.model.parameters import Parameters
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form, MeansEstimator
from curvature.structures.gram import all_finite, formed, gram_of, join, no_average, root, scaled, silent
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, LinearOperator, LowRank, storable
from solvers.operators.bases import Derived


@storable
@dataclass(frozen=True, eq=False, repr=False)
class JointRows(Derived):
    """Per-sample gradients of several blocks as the rows of one map on the flat vector.

    Args:
        roots: One per block, from the block's shape to ``(m,)``.
        places: Where the blocks are in the flat vector.
        size: P.
        transposed: False maps ``(P,)`` to ``(m,)``, True back.
    """

    roots: tuple[LinearOperator, ...]
    places: tuple[BlockPlace, ...]
    size: int
    transposed: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.roots[0].out_shape if self.transposed else (self.size,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.adjoint().in_shape

    @property
    def source(self) -> LinearOperator:
        return self.roots[0]

    def adjoint(self) -> JointRows:
        return replace(self, transposed=not self.transposed)

    def apply(self, x: Tensor) -> Tensor:
        if self.transposed:
            out = x.new_zeros(*x.shape[:-1], self.size)
            for r, place in zip(self.roots, self.places, strict=True):
                place.scatter(r.adjoint().apply(x), out)
            return out
        total = x.new_zeros(*x.shape[:-1], *self.out_shape)
        for r, place in zip(self.roots, self.places, strict=True):
            total = total + r.apply(place.gather(x))
        return total

    def gram(self) -> Tensor:
        """``(m, m)``, the sum over blocks."""
        return torch.stack([gram_of(r) for r in self.roots]).sum(0)

    def formed(self) -> Tensor:
        """``(m, P)``."""
        out = torch.zeros(*self.out_shape, self.size, dtype=self.dtype, device=self.device)
        for r, place in zip(self.roots, self.places, strict=True):
            place.scatter(formed(r), out)
        return out


def whole_block(parameters: Mapping[str, Tensor]) -> Block:
    """All parameters as one vector."""
    parts = (BlockPart(name, 0, (p.numel(),), (0,), (p.numel(),)) for name, p in parameters.items())
    return Block("all parameters", tuple(parts))


@dataclass
class BatchRoots:
    """Roots of the blocks that one batch reached."""

    roots: dict[Block, list[LinearOperator]] = field(default_factory=dict)


class WholeEstimator(CurvatureEstimator):
    """Base of estimates for all parameters together; the blocks hand over their samples.

    Args:
        block: :func:`whole_block`.
        parameters: The tracked parameters.
    """

    def __init__(self, block: Block, parameters: Parameters) -> None:
        super().__init__(block)
        self.parameters = parameters
        self._batches: list[BatchRoots] = []
        self._weight: Tensor | float = 0.0

    @abstractmethod
    def learn(self, rows: JointRows, weight: Tensor, ema: float) -> None:
        """Fold the gradients of a step into the estimate; rows are in the scale of a sum over examples."""

    def next_batch(self) -> None:
        """Begin another batch."""
        self._batches.append(BatchRoots())

    @property
    def batches(self) -> int:
        """Batches of the step so far."""
        return len(self._batches)

    def lose(self, blocks: Set[str], since: int = 0) -> None:
        """Forget the samples of some blocks, from a batch on: they count as zeros."""
        for batch in self._batches[since:]:
            batch.roots = {block: roots for block, roots in batch.roots.items() if block.name not in blocks}

    def join(self, since: int) -> None:
        """The batches from one on bring further blocks of as many before: their rows belong together."""
        first = 2 * since - len(self._batches)
        earlier, later = self._batches[max(first, 0) : since], self._batches[since:]
        if first >= 0 and all(a.roots.keys().isdisjoint(b.roots) for a, b in zip(earlier, later, strict=True)):
            for a, b in zip(earlier, later, strict=True):
                a.roots |= b.roots
            del self._batches[since:]

    def receive(self, block: Block, samples: Samples) -> None:
        """Take the samples of a block."""
        batch = self._batches[-1]
        batch.roots.setdefault(block, []).append(root(samples))

    def update(self, samples: Samples) -> None:
        self.receive(self.block, samples)

    def count(self, weight: Tensor | float) -> None:
        self._weight = self._weight + weight

    def commit(self, ema: float) -> None:
        batches = [batch for batch in self._batches if batch.roots]
        if batches:
            self.learn(self._joined(batches), torch.as_tensor(self._weight), ema)
        self.discard()

    def _joined(self, batches: list[BatchRoots]) -> JointRows:
        """Rows of all blocks in one order: batch by batch, signal by signal, example by example."""
        counts = []
        for batch in batches:
            number = {block: sum(r.shape[0] for r in roots) for block, roots in batch.roots.items()}
            most = max(number.values())
            if short := [block.name for block, n in number.items() if n != most]:
                raise ValueError(
                    f"{', '.join(short[:3])} do not tell the {most} examples of a batch apart (no rule for their use, "
                    "or no batch axis), so their sampled gradients cannot be joined with those of the other layers. "
                    "Use fisher='empirical' or 'exact', or structure='layer'."
                )
            counts.append(most)
        blocks = dict.fromkeys(block for batch in batches for block in batch.roots)
        roots = []
        for block in blocks:
            example = next(batch.roots[block][0] for batch in batches if block in batch.roots)
            parts: list[LinearOperator] = []
            for batch, m in zip(batches, counts, strict=True):
                parts += batch.roots.get(block, [silent(example, m)])
            roots.append(join(parts))
        dtype = roots[0].dtype
        for r in roots:
            dtype = torch.promote_types(dtype, r.dtype)
        sizes = {name: p.numel() for name, p in self.parameters.items()}
        places = tuple(BlockPlace.of(block, self.parameters.starts, sizes) for block in blocks)
        return JointRows(tuple(r.to(dtype) for r in roots), places, self.parameters.size)

    def discard(self) -> None:
        self._batches, self._weight = [], 0.0

    def finite(self) -> Tensor:
        return all_finite([r for batch in self._batches for roots in batch.roots.values() for r in roots])


class WholeDense(WholeEstimator, MeansEstimator):
    r"""The dense matrix of all parameters, :math:`\frac{1}{total} \sum_n g_n g_n^\top`, averaged over steps."""

    structure: ClassVar[str] = "dense, whole model"
    sums_late: ClassVar[bool] = True
    names = ("mean",)
    mean: WeightedMean

    def matrix_axes(self, name: str) -> int | None:
        return 2

    def prepare(self, ema: float) -> bool:
        WholeEstimator.commit(self, ema)
        return True

    def commit(self, ema: float) -> None:
        self.prepare(ema)
        self.mean.commit(ema)

    def learn(self, rows: JointRows, weight: Tensor, ema: float) -> None:
        U = rows.formed()
        self.mean.add(U.mT @ U, weight)

    @property
    def stored(self) -> int:
        return self.block.numel**2

    def of_means(self, means: Mapping[str, Tensor]) -> LinearOperator:
        return Dense(means["mean"], is_gram=True)


class WholeGram(WholeEstimator):
    r"""The matrix of one step as :math:`U^\top U`, by the Gram matrix of all per-sample gradients."""

    structure: ClassVar[str] = "low rank, whole model"

    def __init__(self, block: Block, parameters: Parameters) -> None:
        super().__init__(block, parameters)
        self.rows: JointRows | None = None

    def learn(self, rows: JointRows, weight: Tensor, ema: float) -> None:
        no_average(ema, "a Gram matrix")
        self.rows = replace(rows, roots=tuple(scaled(r, weight.rsqrt()) for r in rows.roots))

    @property
    def ready(self) -> bool:
        return self.rows is not None

    def operator(self) -> LinearOperator:
        if self.rows is None:
            raise self.no_statistics()
        return LowRank(self.rows, self.rows.gram())

    def state_dict(self) -> dict[str, Any]:
        """Empty: the next step replaces all of it, and the inverse keeps the part that is applied until then."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discard()
        self.rows = None


class Share(CurvatureEstimator):
    """A block's part of an estimate for all parameters, to which it hands everything."""

    def __init__(self, block: Block, whole: WholeEstimator) -> None:
        super().__init__(block)
        self.whole = whole

    @property
    def structure(self) -> str:  # type: ignore[override]
        """That of the whole."""
        return self.whole.structure

    def update(self, samples: Samples) -> None:
        self.whole.receive(self.block, samples)

    def count(self, weight: Tensor | float) -> None:
        """Does nothing: the whole counts."""

    def commit(self, ema: float) -> None:
        """Does nothing: the whole is committed once."""

    def discard(self) -> None:
        self.whole.discard()

    def finite(self) -> Tensor:
        return self.whole.finite()

    @property
    def ready(self) -> bool:
        return self.whole.ready

    def operator(self) -> LinearOperator:
        raise RuntimeError(f"block {self.block.name} has no matrix of its own: it is part of one for all parameters.")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class WholeFisher(Curvature):
    """Fisher or GGN of all parameters together: one matrix over all layers, in training.

    For data sets see ``curvature.fisher(structure="dense")`` and ``"low_rank"``.

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Draws per batch for ``"mc"``.
        gram: Keep the per-sample gradients of one step and their Gram matrix in place of the dense average.
        max_size: Largest number of parameters for a dense matrix.
    """

    gram: bool = False
    max_size: int = 8192

    def whole(self, parameters: Parameters) -> WholeEstimator:
        """A fresh estimate for all parameters.

        Raises:
            ValueError: If there are more than ``max_size``, for a dense matrix.
        """
        block = whole_block(parameters)
        if self.gram:
            return WholeGram(block, parameters)
        if block.numel > self.max_size:
            raise ValueError(
                f"the dense matrix of all {block.numel} parameters has {block.numel**2:.3g} entries; "
                f"max_size={self.max_size} allows {self.max_size**2:.3g}. Raise max_size, or use structure='layer', or "
                "SMWNaturalGradient, whose cost grows with the examples of a batch instead."
            )
        return WholeDense(block, parameters)

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        raise TypeError(
            "WholeFisher spans all blocks and serves NaturalGradient(structure='dense') and SMWNaturalGradient; for "
            "one block at a time use LayerFisher or GramFisher."
        )
