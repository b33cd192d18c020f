"""Curvature along a training run."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import ceil, nan
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

import solvers
from curvature.losses import BatchDim, ClassDim, NonFiniteLossError
from curvature.losses.loss import check_loss
from curvature.matrices.by_name import Matrix, matrix_of
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.matrices.problem import loss_and_gradient
from curvature.model.arguments import a, anything, checked, count, one_of, optional, path, real
from curvature.model.data import Data, Output, inspection
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped, unwrapped_optimizer
from curvature.training.dynamics import largest_of_step
from curvature.training.factor_spectra import factor_spectra
from curvature.training.history import History, Row
from curvature.training.step_rule import rule_of
from solvers.outcome.arguments import all_of, flag, function
from solvers.outcome.solution import silenced

Quantity = Literal["sharpness", "alignment", "trace", "factors"]


class Writer(Protocol):
    """A receiver of numbers, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


def _check_quantities(name: str, value: Any) -> Any:
    if value is None:
        return value
    return all_of(name, [value] if isinstance(value, str) else value, one_of(Quantity))


class Monitor:
    r"""Measures curvature at regular training steps, and leaves the training unchanged.

    Call :meth:`step` once in every step of the loop, after ``optimizer.step()``. A measurement is a row of numbers:

    ======================  ========================================================================================
    ``loss``                loss on ``data``, and ``gradient_norm``, the norm of its gradient
    ``sharpness``           the largest eigenvalue, and ``sharpness_residual``: an eigenvalue lies within it;
                            ``eigenvalue_2``, ... likewise, and ``converged``, 1 if all of them meet ``rtol``
    ``stability``           share of the optimizer's edge of stability, above which its steps diverge on a quadratic:
                            for gradient descent ``lr sharpness / 2``, with momentum m divided by ``1 + m``; for others
                            that of :func:`curvature.dynamics`, which takes as many products again. NaN where their
                            steps are not known, and while averages of squares or momentum build up
    ``alignment``           share of the squared gradient within the space of the ``k`` largest eigenvalues
    ``trace``               its estimate, and ``trace_stderr``; the random vectors are the same ones each time, so
                            changes are seen below that error
    ``B/largest``, ...      for each block B of the optimizer: largest eigenvalue, ``B/trace`` and ``B/condition`` of
                            the curvature it holds, the last of ``C + damping I``; no pass over data
    ``lr``, ``damping``     of the optimizer, and all that its ``metrics()`` says if it has that method, as the
                            optimizers of ``precond`` do
    ``seconds``             time for the row; ``products`` of the matrix stand beside it
    ======================  ========================================================================================

    The search for eigenvalues starts from the vectors found last, and a little noise. Parameters, gradients, buffers,
    modes and random states are afterwards what they were, and optimizers of ``precond`` do not see these passes: the
    run is the same, bit for bit, with the monitor and without.

    >>> model, loss_fn, x = nn.Linear(3, 1), nn.MSELoss(), torch.eye(3)
    >>> monitor = Monitor(model, loss_fn, (x, torch.zeros(3, 1)), every=10, max_fraction=None)
    >>> for step in range(21):
    ...     _ = monitor.step()
    >>> monitor.history["step"], [round(value, 3) for value in monitor.history["sharpness"]]
    ([0, 10, 20], [2.667, 2.667, 2.667])

    Args:
        model: The model that is trained; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches: a fixed part of the training data, say.
        every: Steps between measurements.
        quantities: Some of ``"sharpness"``, ``"alignment"``, ``"trace"``, ``"factors"``; None for all that apply.
        matrix: ``"hessian"`` or ``"ggn"``.
        k: How many of the largest eigenvalues.
        rtol: Residual wanted, relative to the eigenvalue, whose own error is about the square of that.
        max_products: Products that the search for eigenvalues may take; what has not converged then, says so.
        samples: Random vectors for the trace.
        optimizer: The optimizer, in a trainer's wrapper or not. Gives ``lr`` and ``damping`` (of its first group) or
            its ``metrics()``, and the curvature of its blocks if it has ``preconditioners``, ``{name: object}`` whose
            ``estimator.operator()`` is the curvature of a block, as the optimizers of ``precond`` have that learn from
            layers.
        writer: Has ``add_scalar(name, value, step)``; names begin with ``prefix``.
        csv: File to write rows to; if it exists it is gone on with.
        callback: Called with each row, a dict.
        max_fraction: Share of the time of training that measurements may take; where one takes longer they come less
            often, with a warning. None sets no limit.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        eval_mode: Measure the loss of the model in eval mode; otherwise as it is, each time with other dropout masks.
        prefix: Of names for the writer.
        seed: Of the random vectors.

    Raises:
        ValueError: If an argument is out of range.
    """

    @checked(
        loss_fn=check_loss,
        every=count(),
        quantities=_check_quantities,
        matrix=one_of(Matrix),
        samples=count(),
        optimizer=anything,
        writer=anything,
        csv=optional(path),
        callback=optional(function),
        max_fraction=optional(real(low=0.0, open_low=True)),
        eval_mode=flag,
        prefix=a(str, "a string"),
    )
    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Data,
        *,
        every: int = 100,
        quantities: Sequence[Quantity] | None = None,
        matrix: Matrix = "hessian",
        k: int = 1,
        rtol: float = 1e-2,
        max_products: int = 200,
        samples: int = 10,
        optimizer: Any = None,
        writer: Writer | None = None,
        csv: str | os.PathLike[str] | None = None,
        callback: Callable[[Row], Any] | None = None,
        max_fraction: float | None = 0.1,
        params: Any = None,
        output: Output | None = None,
        class_dim: ClassDim = None,
        batch_dim: BatchDim = None,
        eval_mode: bool = True,
        prefix: str = "curvature/",
        seed: int = 0,
    ) -> None:
        self._make, optimizer = matrix_of(matrix), unwrapped_optimizer(optimizer)
        self.quantities = _quantities(quantities, optimizer)
        self.model, self.loss_fn, self.data = unwrapped(model), loss_fn, data
        self.every, self.matrix, self.k, self.rtol, self.samples = every, matrix, k, rtol, samples
        self.max_products, self.max_fraction, self.eval_mode, self.seed = max_products, max_fraction, eval_mode, seed
        self.optimizer, self.writer, self.callback, self.prefix = optimizer, writer, callback, prefix
        self._options = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
        if params is not None:
            Parameters(self.model, params)  # names what is not there
        self._history = History(csv)
        self._steps = 0
        self._last: int | None = None  # step that was measured last
        self._ended, self._cost = 0.0, 0.0  # when that ended, and the seconds it took
        self._vectors: Tensor | None = None
        self._direction: Tensor | None = None  # that in which the optimizer's steps diverge first
        self._warned = False

    @property
    def history(self) -> dict[str, list[float]]:
        """A list for each number, by name; ``pandas.DataFrame(monitor.history)`` makes a table of it."""
        return self._history.table()

    def __call__(self, step: int | None = None) -> Row | None:
        """The same as :meth:`step`."""
        return self.step(step)

    def step(self, step: int | None = None) -> Row | None:
        """Count a training step, and measure if it is time to.

        Args:
            step: Its number; counted from 0 by default.

        Returns:
            The measurement, or None if it was not due.
        """
        step = self._steps if step is None else step
        self._steps = step + 1
        if self._last is not None and (0 <= step - self._last < self.every or not self._affordable(step)):
            return None
        return self.measure(step)

    def measure(self, step: int | None = None) -> Row:
        """Measure now, whether or not it is due.

        Args:
            step: Number of the step, for the row; by default that of the last one counted.

        Returns:
            The row. Where the loss is not finite, ``loss`` is NaN and the row holds no curvature.
        """
        step = max(0, self._steps - 1) if step is None else step
        start = time.monotonic()
        with inspection(), torch.inference_mode(False), _mode(self.model, self.eval_mode):
            row = {"step": step, "seconds": 0.0, **self._of_loss(), **self._of_optimizer()}
        self._ended = time.monotonic()
        self._last, self._cost = step, self._ended - start
        row["seconds"] = self._cost
        self._history.append(row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(f"{self.prefix}{name}", value, step)
        if self.callback is not None:
            self.callback(dict(row))
        return row

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers with which a resumed run measures as this one would have; rows are kept by ``csv``."""
        return {
            "steps": self._steps,
            "last": self._last,
            "vectors": self._vectors,
            "direction": self._direction,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._steps, self._last, self._vectors = state["steps"], state["last"], state["vectors"]
        self._direction = state.get("direction")
        self._ended = time.monotonic()

    def _affordable(self, step: int) -> bool:
        """Whether a measurement as long as the last one would stay within its share of the time since."""
        training = time.monotonic() - self._ended
        if self.max_fraction is None or self._cost <= self.max_fraction * training:
            return True
        if not self._warned:
            self._warned = True
            steps = step - (self._last or 0)
            wanted = ceil(self._cost * max(steps, 1) / max(self.max_fraction * training, 1e-9))
            warnings.warn(
                f"a measurement took {self._cost:.3g} s, and {steps} training steps {training:.3g} s: with "
                f"max_fraction={self.max_fraction:g} the monitor measures about every {wanted} steps in place of "
                f"{self.every}. Give it less data, or a larger share.",
                stacklevel=3,
            )
        return False

    def _of_loss(self) -> Row:
        op = self._make(self.model, self.loss_fn, self.data, progress=False, **self._options)
        try:
            loss, gradient = loss_and_gradient(op.problem, torch.float64)
        except NonFiniteLossError:
            return {"loss": nan}  # the run has diverged; the monitor does not stop it
        row: Row = {"loss": float(loss), "gradient_norm": float(torch.linalg.vector_norm(gradient))}
        products = 0
        if "sharpness" in self.quantities:
            pairs = self._eigenpairs(op)
            products += pairs.products
            for i, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
                name = "sharpness" if i == 1 else f"eigenvalue_{i}"
                row |= {name: value, f"{name}_residual": residual}
            row["converged"] = int(pairs.complete and bool(pairs.converged.all()))
            if self.optimizer is not None:
                row["stability"], more = self._stability(op, row["sharpness"])
                products += more
            if "alignment" in self.quantities and row["gradient_norm"] > 0:
                inside = pairs.vectors.double() @ gradient
                row["alignment"] = float(inside.square().sum() / gradient.square().sum())
        if "trace" in self.quantities:
            few = op.shape[1] <= self.samples
            found = solvers.trace(op, None if few else "hutchinson", samples=self.samples, generator=self._random(op))
            row |= {"trace": float(found.value), "trace_stderr": float(found.stderr)}
            products += found.products
        return row | {"products": products}

    def _eigenpairs(self, op: DatasetOperator) -> solvers.Eigenpairs:
        k = min(self.k, op.shape[1])
        start = torch.randn(op.shape[1], generator=self._random(op), dtype=op.dtype, device=op.device)
        vectors = self._vectors
        if vectors is not None and tuple(vectors.shape) == (k, *op.in_shape):
            # A little noise lets the search reach every eigenvector that grew since; it costs almost nothing.
            start = torch.cat([vectors.to(start), 0.1 * start.unsqueeze(0) / torch.linalg.vector_norm(start)])
        with silenced():  # the row says it
            pairs = solvers.eigsh(
                op,
                k,
                "LA",
                rtol=self.rtol,
                v0=start,
                max_products=max(self.max_products, 2 * k),
                search_copies=k > 1,
                progress=False,
            )
        self._vectors = pairs.vectors
        return pairs

    def _stability(self, op: DatasetOperator, sharpness: float) -> tuple[float, int]:
        """The largest eigenvalue of the optimizer's step over its threshold, and the products it took."""
        try:
            rule = rule_of(self.optimizer, self.model, Parameters(self.model, self._options["params"]))
        except (TypeError, ValueError, AttributeError):
            return nan, 0
        if not rule.settled:
            return nan, 0
        l2 = float(rule.l2[0])
        if rule.plain is not None and bool((rule.l2 == l2).all()):
            return rule.plain * (sharpness + l2) / rule.threshold, 0
        start = self._direction
        if start is None or start.shape != op.in_shape:
            start = torch.randn(op.shape[1], generator=self._random(op), dtype=op.dtype, device=op.device)
        pairs = largest_of_step(
            op, rule, v0=start.to(op.device, op.dtype), rtol=self.rtol, max_products=self.max_products, progress=False
        )
        self._direction = pairs.vectors[0]
        return float(pairs.values[0]) / rule.threshold, pairs.products

    def _random(self, op: DatasetOperator) -> torch.Generator:
        return torch.Generator(op.device).manual_seed(self.seed)

    def _of_optimizer(self) -> Row:
        groups = getattr(self.optimizer, "param_groups", None) or [{}]
        row = {name: float(groups[0][name]) for name in ("lr", "damping") if groups[0].get(name) is not None}
        if callable(metrics := getattr(self.optimizer, "metrics", None)):
            row |= metrics()
        if "factors" in self.quantities:
            row |= factor_spectra(self.optimizer, row.get("damping", 0.0))
        return row


def _quantities(wanted: Sequence[Quantity] | None, optimizer: Any) -> tuple[str, ...]:
    known = get_args(Quantity)
    holds = hasattr(optimizer, "preconditioners")
    if wanted is None:
        return known if holds else tuple(name for name in known if name != "factors")
    chosen = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"quantities are some of {', '.join(known)}; not {unknown[0]!r}.")
    if "factors" in chosen and not holds:
        raise ValueError(
            f"'factors' are those of an optimizer with preconditioners, and {type(optimizer).__name__} has none. Pass "
            "optimizer=, one of precond that learns from layers, or leave 'factors' out."
        )
    if "alignment" in chosen and "sharpness" not in chosen:
        raise ValueError("'alignment' is measured in the eigenvectors of 'sharpness'; name both.")
    return chosen


@contextlib.contextmanager
def _mode(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """Modules in eval mode on request, and afterwards each in its former mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before if eval_mode else ():
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
