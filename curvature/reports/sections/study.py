"""Shared by the sections of a report: the loss, its matrices, the layers, and the account of the budget."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.checkpoint import digest, problem_identity
from curvature.estimation.probe import Sketches, sketch, sketches
from curvature.losses import BatchDim, ClassDim
from curvature.losses.signals import Signals
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.matrices.ggn import ggn
from curvature.matrices.hessian import hessian
from curvature.matrices.problem import Evaluation, Problem, gradient_of
from curvature.model.data import Data, Output
from curvature.model.order import fingerprint
from curvature.model.trees import tensors_in
from curvature.reports.results import EigenvaluesResult, LossResult, Matrix, TraceResult
from curvature.reports.sections.budget import Budget, Need
from curvature.reports.sections.store import Store
from curvature.structures.estimator import Curvature
from solvers import Function, LinearOperator
from solvers.operators.decompositions import eigendecomposition

MATRICES: dict[Matrix, Callable[..., DatasetOperator]] = {"hessian": hessian, "ggn": ggn}

# A matrix of up to this many rows is formed, which makes every result exact.
SMALL = 2000
#: A larger matrix is never formed, even on request: it would take more than 3 GiB.
LARGE = 20_000
#: Vectors that are multiplied at once.
BLOCK = 8
_QUICK = 0.1  # seconds; products that take longer are timed once
_SMALL_SHARE = 0.02  # of what is left of a budget: so much may be spent on timing
_PROBE = 200  # size of the matrix on which a diagonalisation is timed


class Study:
    """One loss of one model on one data set.

    Attributes:
        problem: The loss over the data.
        layers: Segment of the flat vector of each module that owns parameters.
        budget: The budget.
        structures: Structures to compare with the GGN, by their labels.
        gradient: Gradient of the loss over all data ``(P,)``, float64, once it is known.
        loss: The loss over all data, once it is known.
        columns: Backward passes per batch that an exact structure takes.
        pass_cost: Cost of a gradient, in units of the budget.
        rates: Cost of a product with each matrix, in units of the budget.
        block_rates: Cost of one in a block of products.
        to_form: Which matrices are formed.
        dense: The matrices that were formed, float64.
        spectrum: Their eigenvalues, ascending, and eigenvectors, in columns.
        read: How the data are read: ``params``, ``output``, ``class_dim`` and ``batch_dim``.
        shares: The processes whose data together are the data.
        has_data: Whether this process has some of them.
        vectors: Approximate eigenvectors ``(k, P)`` of the largest eigenvalues, by matrix.
        start: Vectors to start the search for eigenvectors from, by matrix.
        eigenvalues: Those found so far, by matrix.
        traces: Those found so far, by matrix.
        examples: Number of examples; None where the loss does not tell them apart.
        fingerprint: A number that adds up over the examples, by which data are recognised.
        seen: What is computed on the data, by which a stored report is recognised.
        order: Digest of the data in their order, where results are stored.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Data,
        *,
        budget: Budget,
        store: Store,
        k: int,
        damping: float,
        rtol: float,
        seed: int,
        structures: Sequence[str | Curvature],
        exact: bool | None,
        params: Any = None,
        output: Output | None = None,
        class_dim: ClassDim = None,
        batch_dim: BatchDim = None,
        process_group: Any = None,
    ) -> None:
        self.given = (model, loss_fn, data)
        self.read = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
        self.options = {**self.read, "progress": False, "process_group": process_group}
        self.problem = Problem(*self.given, **self.options, opaque=True)
        self.shares, self.has_data = self.problem.shares, True
        self.budget, self.store = budget, store
        self.k, self.damping, self.rtol, self.seed = min(k, self.size), damping, rtol, seed
        self.structures = {label(structure): structure for structure in structures}
        self.exact = exact
        self.layers = layers_of(self.problem)
        self.gradient: Tensor | None = None
        self.loss: LossResult | None = None
        self.columns, self.pass_cost = 1, 0.0
        self.rates: dict[Matrix, float] = {}
        self.block_rates: dict[Matrix, float] = {}
        self.to_form: list[Matrix] = []
        self.dense: dict[Matrix, Tensor] = {}
        self.spectrum: dict[Matrix, tuple[Tensor, Tensor]] = {}
        self.vectors: dict[Matrix, Tensor] = {}
        self.start: dict[Matrix, Tensor] = {}
        self.eigenvalues: dict[Matrix, EigenvaluesResult] = {}
        self.traces: dict[Matrix, TraceResult] = {}
        self._operators: dict[Matrix, DatasetOperator] = {}
        self._looked_again: set[Matrix] = set()
        self.examples: int | None = None
        self.fingerprint = 0.0
        self.seen: dict[str, Sketches] = {}
        self.order = ""

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return self.problem.parameters.size

    def by_weight(self, matrix: Matrix) -> list[str]:
        """Layers, those with the largest trace first, or the largest ones where it is not known."""
        if matrix in self.traces:
            found = self.traces[matrix].layers
            return sorted(self.layers, key=lambda name: -found[name].value)
        return sorted(self.layers, key=lambda name: self.layers[name].start - self.layers[name].stop)

    def generator(self, *names: str) -> torch.Generator:
        """A separate source of random numbers for each purpose, so that sections do not change each other."""
        seed = zlib.crc32("/".join((str(self.seed), *names)).encode())
        return torch.Generator(self.problem.parameters.device).manual_seed(seed)

    def operator(self, matrix: Matrix) -> DatasetOperator:
        """The matrix itself, whose products are not counted."""
        if matrix not in self._operators:
            self._operators[matrix] = MATRICES[matrix](*self.given, **self.options)
        return self._operators[matrix]

    def counted(self, op: LinearOperator) -> Function:
        """The same operator; its products are counted."""

        def product(x: Tensor) -> Tensor:
            y = op @ x
            self.budget.count(x.numel() // op.shape[1])
            return y

        return Function(product, op.in_shape, symmetric=True, dtype=op.dtype, device=op.device)

    def measure(self, matrix: Matrix) -> None:
        """Measure the cost of a product, alone and in a block.

        The first one may record graphs that are kept, so it is not timed; where products are slow, blocks of vectors
        take as long as the vectors one by one.
        """
        op = self.counted(self.operator(matrix))
        self._cost(op, 1)
        self.rates[matrix] = self.block_rates[matrix] = self._cost(op, 1)
        affordable = 2 * BLOCK * self.rates[matrix] <= _SMALL_SHARE * self.budget.left
        if self.budget.unit == "seconds" and self.rates[matrix] < _QUICK and affordable:
            self.rates[matrix] = min(self.rates[matrix], self._cost(op, 1))
            self._cost(op, BLOCK)
            self.block_rates[matrix] = self._cost(op, BLOCK) / BLOCK

    def measure_again(self, matrix: Matrix, dear: bool) -> None:
        """Time a product once more: a machine can be busier, or less so, than it was in the beginning.

        Args:
            matrix: The matrix.
            dear: Whether its section would be cut otherwise. Then a product is timed whatever it costs, since an
                interruption may have been timed in its place, but once only.
        """
        budget, before = self.budget, self.rates[matrix]
        if budget.unit == "products" or not budget.limited or matrix in self.dense:
            return
        cheap = before <= _SMALL_SHARE * budget.left
        if cheap or (dear and matrix not in self._looked_again and before <= budget.left / 2):
            if not cheap:
                self._looked_again.add(matrix)
            op = self.counted(self.operator(matrix))
            now = self._cost(op, 1)
            if cheap and now > 2 * before and now <= _SMALL_SHARE * budget.left:
                now = min(now, self._cost(op, 1))
            self._rescale(matrix, now)

    def learn(self, matrix: Matrix, spent: float, products: float) -> None:
        """Take note of what products cost in a section, where that is less than they seemed to cost."""
        if self.budget.unit == "seconds" and products > 0 and 0 < spent < products * self.block_rates[matrix]:
            self._rescale(matrix, self.rates[matrix] * spent / (products * self.block_rates[matrix]))

    def _rescale(self, matrix: Matrix, rate: float) -> None:
        self.block_rates[matrix] *= rate / self.rates[matrix]
        self.rates[matrix] = rate

    def _cost(self, op: LinearOperator, count: int) -> float:
        before = self.budget.spent
        op @ torch.ones(count, self.size, dtype=op.dtype, device=op.device)
        _wait(op.device)
        return max(self.budget.spent - before, 1e-9)

    def need(self, matrix: Matrix | None, least: float, wanted: float, block: bool = False) -> Need:
        """Products with a matrix, alone or in blocks, or gradients, in units of the budget."""
        rate = self.pass_cost if matrix is None else (self.block_rates if block else self.rates)[matrix]
        return Need(least * rate, wanted * rate)

    def choose_form(self) -> None:
        """Settle which matrices are formed: small ones, as far as the budget goes, or as the user says.

        Raises:
            ValueError: If the user asks for matrices that are too large.
        """
        if self.exact and self.size > LARGE:
            raise ValueError(
                f"exact=True would form matrices of {8 * self.size**2 / 2**30:,.0f} GiB for {self.size:,} parameters. "
                f"Leave exact out, or restrict params= to {LARGE:,}."
            )
        for matrix in self.rates:
            cost = self.form_need(matrix).wanted
            small = self.size <= SMALL and cost <= self.budget.left / 3
            if small if self.exact is None else self.exact:
                self.to_form.append(matrix)

    def form_need(self, matrix: Matrix) -> Need:
        """Cost of forming and diagonalising a matrix; the latter is measured on a smaller one."""
        products = self.size * self.block_rates[matrix]
        if self.budget.unit == "seconds" and self.size <= SMALL:
            n = min(self.size, _PROBE)
            before = self.budget.spent
            torch.linalg.eigh(torch.eye(n, dtype=torch.float64, device=self.problem.parameters.device))
            products += (self.budget.spent - before) * (self.size / n) ** 3
        return Need(products, products)

    def form(self, matrix: Matrix, allotted: float) -> None:
        """Form a matrix, and diagonalise it."""
        dense = self.operator(matrix).to_dense().double()
        self.budget.count(self.size)
        self.dense[matrix] = (dense + dense.mT) / 2
        self.spectrum[matrix] = eigendecomposition(self.dense[matrix])

    def start_from(self, vectors: Mapping[Matrix, Tensor]) -> None:
        """Take eigenvectors of an earlier report as a start.

        Raises:
            ValueError: If they are those of another number of parameters.
        """
        for matrix, rows in vectors.items():
            if rows.shape[1] != self.size:
                raise ValueError(
                    f"warm_start is a report on {rows.shape[1]:,} parameters; here there are {self.size:,}."
                )
            rows = rows.to(self.problem.parameters.device)
            # Lanczos starts from the sum; a little noise lets it see new directions.
            noise = torch.randn(rows[:1].shape, generator=self.generator("start", matrix), device=rows.device)
            self.start[matrix] = torch.cat([rows, 0.1 / self.size**0.5 * noise.to(rows)])

    def first_pass(self) -> None:
        """The loss and its gradient over the data, and the cost of a pass.

        Raises:
            ValueError: If the loss is not finite.
        """
        problem, parameters = self.problem, self.problem.parameters
        before = self.budget.spent
        total = torch.zeros(parameters.size, dtype=torch.float64, device=parameters.device)
        value, batches, size, examples = torch.zeros_like(total[0]), 0, 0.0, 0

        def add(evaluation: Evaluation) -> None:
            nonlocal batches, size, examples
            loss = evaluation.loss()
            if self.store.kept:
                self.order = digest(tensors_in((evaluation.x, evaluation.y)), self.order)
                if not batches and evaluation.terms is not None:
                    self.seen["first batch"] = sketches(evaluation.terms, parameters)
            flat = parameters.flatten(gradient_of(loss, parameters))
            total.add_(flat)
            size += float(torch.linalg.vector_norm(flat))
            value.add_(loss.detach())
            batches += 1
            self.fingerprint += fingerprint((evaluation.x, evaluation.y))
            if evaluation.terms is not None:
                signals = Signals.of(evaluation.terms, "exact")
                self.columns = max(self.columns, len(signals))
                examples += signals.examples

        divisor = problem.visit(add, "loss and gradient")
        self.has_data = batches > 0
        if self.shares.several:
            self.shares.sum(value, total)
            found = self.shares.gather((batches, size, examples, self.fingerprint, self.columns))
            batches, size, examples, self.fingerprint = (sum(parts) for parts in list(zip(*found, strict=True))[:4])
            self.columns = max(one[-1] for one in found)
        self.budget.count(1)
        self.pass_cost = max(self.budget.spent - before, 1e-9)
        self.gradient = total / divisor
        self.examples = None if problem.loss is None else examples
        loss, norm = float(value / divisor), float(self.gradient.norm())
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            raise ValueError(
                f"the loss is {loss} and its gradient has the norm {norm}: curvature needs finite numbers. Look for "
                "NaN or infinity in the data and in the parameters."
            )
        self.loss = LossResult(loss, norm, batches)
        self.seen["all data"] = {"gradient": sketch(total.to(parameters.dtype), size)}

    def identity(self) -> dict[str, Any]:
        """Names and values by which stored results are recognised as those of this study."""
        assert self.loss is not None
        model, loss_fn, _ = self.given
        return {
            **problem_identity(model, loss_fn, self.problem.parameters, self.problem.batch_dim),
            "value of the loss": f"{self.loss.value:.5g}",  # another machine may round otherwise
            "k": self.k,
            "damping": self.damping,
            "rtol": self.rtol,
            "seed": self.seed,
            "structures": ", ".join(self.structures),
            "form": self.exact,
        }


def layers_of(problem: Problem) -> dict[str, slice]:
    """Segments of the flat vector: the parameters that each module owns, named after it."""
    parameters = problem.parameters
    out: dict[str, slice] = {}
    for name, names in groupby(parameters, key=lambda parameter: parameter.rpartition(".")[0]):
        own = list(names)
        start, last = parameters.starts[own[0]], own[-1]
        label = name or type(problem.model).__name__
        if label in out:  # a module whose parameters are registered before and after those of its children
            label = own[0]
        out[label] = slice(start, parameters.starts[last] + parameters[last].numel())
    return out


def label(structure: str | Curvature) -> str:
    """A structure's name, or a curvature with the options that are not the default."""
    if isinstance(structure, str):
        return structure
    fields = [(field, getattr(structure, field.name)) for field in dataclasses.fields(structure)]
    shown = (f"{field.name}={value!r}" for field, value in fields if value != field.default)
    return f"{type(structure).__name__}({', '.join(shown)})"


def names_of(study: Study, layer: slice) -> list[str]:
    """Parameters of a layer."""
    starts = study.problem.parameters.starts
    return [name for name, start in starts.items() if layer.start <= start < layer.stop]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
