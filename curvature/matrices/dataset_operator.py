"""Products with a matrix over a data set: passes over the batches, blocks of vectors, and kept graphs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypedDict

import torch
from torch import Tensor

from curvature.estimation.finite import refuse_nonfinite
from curvature.losses import BatchDim, ClassDim
from curvature.matrices.flat_sum import FlatSum
from curvature.matrices.problem import Evaluation, Problem
from curvature.model.data import Output
from curvature.model.parameters import Parameters
from curvature.model.settings import settings
from curvature.model.streams import outside_of_inference
from solvers import LinearOperator, StructureError
from solvers.outcome.finite import is_finite
from solvers.precision import Autocast, working_dtype

#: Memory in bytes that a block of vectors may take at once, beyond the vectors themselves and their products.
MEMORY = 1 << 28
# A pass that saves less than this is bound by the overhead of its calls: there, vectors share one vectorised pass. In
# larger ones a loop over the vectors is as fast or faster (batched convolutions above all).
SMALL = {"cpu": 1 << 21, "cuda": 1 << 26}

#: Product of one batch with a vector, or with a block of them if True: a tensor per parameter in, and out.
Product = Callable[[Sequence[Tensor], bool], list[Tensor]]


class MatrixArguments(TypedDict, total=False):
    """Keywords that every matrix of a loss over data takes, for editors and type checkers."""

    params: Any
    output: Output | None
    class_dim: ClassDim
    batch_dim: BatchDim
    progress: bool | None
    keep_graph: bool | None
    memory: int
    process_group: Any


class DatasetOperator(LinearOperator):
    """A matrix between flat parameter vectors: a sum over batches, known by its products.

    A block of vectors costs one pass over the data. Small models take the block in one vectorised pass, in chunks that
    stay within a memory budget; for larger ones a loop over the vectors is as fast.

    Args:
        problem: The loss over the data.
        keep_graph: Keep the graphs of all batches between products: a product then costs no forward pass, and the
            memory of the batches' activations stays taken as long as the operator lives. ``None`` keeps the graph
            if the data are one batch.
        memory: Bytes that intermediate results of a block of vectors may take.

    Attributes:
        rows: Parameters of the result.
        columns: Parameters of the vectors it acts on.
    """

    #: Name of the matrix, for people and for files of resumable runs.
    title: ClassVar[str]

    def __init__(self, problem: Problem, *, keep_graph: bool | None = None, memory: int = MEMORY) -> None:
        self.problem, self.rows, self.columns = problem, problem.parameters, problem.parameters
        self.keep_graph = problem.single if keep_graph is None else keep_graph
        self.memory = memory
        self._autocast = Autocast()  # of the passes: the matrix is that of the model where it was made
        self._kept: list[tuple[Product, int]] | None = None
        self._total: Tensor | float = 1.0

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.columns.size,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.rows.size,)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.problem.parameters)

    @property
    def device(self) -> torch.device:
        return self.problem.parameters.device

    @property
    def symmetric(self) -> bool:
        return list(self.rows) == list(self.columns)

    @property
    def block_size(self) -> int | None:
        """One where vectors share no work: with kept graphs, in a large model that takes them one by one."""
        return 1 if self.keep_graph and self._large(0) else None

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else self._narrowed(self.columns, self.rows)

    def block(self, rows: Any, columns: Any = None) -> Self:
        """The block of some parameters, at the cost of those parameters only.

        Args:
            rows: Names, globs or tensors of the parameters of the result.
            columns: The same for the vectors; ``rows`` if left out.

        Returns:
            Operator from the flat vector of ``columns`` to that of ``rows``.
        """
        inner = Parameters(self.problem.model, rows)
        outer = inner if columns is None else Parameters(self.problem.model, columns)
        for chosen, known in ((inner, self.rows), (outer, self.columns)):
            if missing := [name for name in chosen if name not in known]:
                raise ValueError(f"{missing} are no parameters of {self!r}, which has {list(known)}.")
        return self._narrowed(inner, outer)

    def _narrowed(self, rows: Parameters, columns: Parameters) -> Self:
        other = copy.copy(self)
        other.rows, other.columns, other._kept = rows, columns, None
        return other

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        if dtype in (None, self.dtype) and (device is None or torch.device(device) == self.device):
            return self
        raise StructureError(
            f"{self!r} runs where and as the model is. Convert the model and make the operator anew, or to_dense() the "
            "operator."
        )

    @abstractmethod
    def record(self, evaluation: Evaluation) -> Product:
        """The product of one batch, in the scale of the sum over terms.

        Returns:
            Function from tensors ``(*shape)`` of the columns, or ``(k, *shape)``, to such tensors of the rows.
        """

    def begin(self) -> None:
        """Called before each pass."""

    @outside_of_inference()
    def apply(self, x: Tensor) -> Tensor:
        vectors = (x.clone() if x.is_inference() else x.detach()).reshape(-1, self.columns.size)
        self.problem.shares.same(vectors, "a vector")
        result = FlatSum(self.rows, len(vectors), self.dtype, self.device)
        split = self.columns.unflatten(vectors)
        pieces = [split[name].to(p.dtype) for name, p in self.columns.items()]
        single, only = len(vectors) == 1, self.problem.single

        def add(product: Product, nbytes: int) -> None:
            step = 1 if single else self.chunk(nbytes)
            for start in range(0, len(vectors), step):
                part = slice(start, start + step) if step > 1 else start
                if only:
                    result.put(part, product([t[part] for t in pieces], step > 1), self._total)
                else:
                    result.add(part, product([t[part] for t in pieces], step > 1))
            result.next_batch()

        self.each(add, vectorized=not single)
        if result.empty:  # no batch of this process counts
            result.out.zero_()
        self.problem.shares.sum(result.out)
        if not only:
            result.divide(self._total)
        if not result.is_finite() and is_finite(vectors):
            refuse_nonfinite(result.out, f"a product with the {self.title}", self.rows, self.again)
        return result.out.reshape(*x.shape[:-1], self.rows.size)

    def again(self) -> None:
        """A pass over the data and a product, to see which operation makes numbers that are not finite."""
        ones = [torch.ones_like(p.detach()) for p in self.columns.values()]
        fresh = copy.copy(self)
        fresh.keep_graph, fresh._kept = False, None

        def use(product: Product, nbytes: int) -> None:
            product(ones, False)

        fresh.each(use, vectorized=False)

    def each(self, use: Callable[[Product, int], None], vectorized: bool = True) -> None:
        """Call ``use(product, bytes of one vector)`` for every batch; afterwards the divisor is known."""
        with self._autocast():
            self._each(use, vectorized)

    def _each(self, use: Callable[[Product, int], None], vectorized: bool) -> None:
        if self._kept is not None:
            self.problem.check_unchanged()
            with settings(self.problem.model, self.problem.random, self.device):
                for product, nbytes in self._kept:
                    use(product, nbytes)
            return
        kept: list[tuple[Product, int]] = []

        def visit(evaluation: Evaluation) -> None:
            product = self.record(evaluation)
            if self.problem.single:  # all the data, so that products can be divided at once
                self._total = evaluation.divisor
            use(product, evaluation.nbytes)
            if self.keep_graph:
                kept.append((product, evaluation.nbytes))

        self.begin()
        self._total = self.problem.visit(visit, self.title, count=vectorized or self.keep_graph)
        if self.keep_graph:
            self._kept = kept

    def chunk(self, nbytes: int) -> int:
        """Number of vectors that go at once through a pass that saves ``nbytes``."""
        if nbytes == 0 or self._large(nbytes):
            return 1
        # A second derivative takes a few times the memory of the forward pass.
        return max(1, self.memory // (4 * (nbytes + 4 * self.columns.size)))

    def _large(self, nbytes: int) -> bool:
        return nbytes + 4 * self.columns.size > SMALL.get(self.device.type, SMALL["cuda"])

    def __repr__(self) -> str:
        return f"{self.title}({self.shape[0]}x{self.shape[1]})"
