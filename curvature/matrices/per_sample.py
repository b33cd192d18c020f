"""Gradients of single examples: themselves, their norms and their moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.collector import Collector
from curvature.layers.block import Block, BlockPlace
from curvature.layers.recorder import Recorder
from curvature.layers.samples import OneHot, Outer, Samples
from curvature.losses import Terms, WeightedSum, loss_for
from curvature.losses.signals import Signals
from curvature.matrices.problem import Evaluation, Problem
from curvature.model.data import Batch, Data, Output, is_one_batch
from curvature.model.parameters import Parameters
from curvature.structures.estimator import CurvatureEstimator, Form
from solvers import LinearOperator
from solvers.precision import widen


class KeptSamples(CurvatureEstimator):
    """Keeps the samples of a block instead of estimating anything from them."""

    structure = "samples"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.samples: list[Samples] = []

    def update(self, samples: Samples) -> None:
        self.samples.append(samples)

    def count(self, weight: Tensor | float) -> None:
        """Nothing is averaged."""

    def commit(self, ema: float) -> None:
        """Nothing is averaged."""

    def discard(self) -> None:
        self.samples = []

    def finite(self) -> Tensor:
        return torch.tensor(True)

    @property
    def ready(self) -> bool:
        return bool(self.samples)

    def operator(self) -> LinearOperator:
        raise NotImplementedError("samples are no operator.")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


class Examples:
    r"""A recorded pass in which signals can be followed back to the gradient of each example.

    The gradient of example n under a signal v is :math:`J^\top v` with all entries of v but those of n set to zero,
    whether or not the examples interact inside the model.

    Args:
        parameters: The tracked parameters.
        recorder: Their uses.
        output: The model's output, with its graph.
        terms: Which entries of the output belong to which example.
        batch: Number of examples, where the loss took each of their positions for one.
    """

    def __init__(
        self, parameters: Parameters, recorder: Recorder, output: Tensor, terms: Terms, batch: int | None
    ) -> None:
        self.parameters, self.recorder, self.output, self.terms, self.batch = parameters, recorder, output, terms, batch

    @classmethod
    def of(cls, evaluation: Evaluation) -> Examples:
        """The examples of a recorded evaluation."""
        recorder, terms = evaluation.recorder, evaluation.terms
        assert recorder is not None and terms is not None
        return cls(evaluation.problem.parameters, recorder, evaluation.output, terms, recorder.batch)

    @classmethod
    def along(cls, output: Tensor, parameters: Parameters, recorder: Recorder) -> Examples:
        """Each entry along the first axis of an output is an example."""
        if output.dim() == 0:
            raise ValueError("the output is a single number: it needs a first axis that counts examples.")
        rows = output.detach()
        terms = loss_for(nn.MSELoss()).terms(output, rows)  # says which entries belong together, nothing else
        return cls(parameters, recorder, output, terms, None)

    @property
    def number(self) -> int:
        """Number of examples."""
        return Signals.of(self.terms, "empirical", batch=self.batch).examples

    def unit_signals(self) -> list[Tensor]:
        """One for each output of an example, in row-major order: one there, zero elsewhere."""
        signals = []
        for k in range(self.output[0].numel()):
            signal = torch.zeros_like(self.output.detach(), memory_format=torch.contiguous_format)
            signal.reshape(len(signal), -1)[:, k] = 1
            signals.append(signal)
        return signals

    def samples(self, signals: Sequence[Tensor], vectorised: bool = False) -> list[tuple[Block, list[Samples]]]:
        """What each block's gradients are made of; in each, the rows are signals, and examples within a signal.

        Args:
            signals: Output-shaped.
            vectorised: Samples may hold several signals, which come back together; else each holds one.
        """
        kept: list[KeptSamples] = []

        def make(block: Block, form: Form) -> KeptSamples:
            kept.append(KeptSamples(block))
            return kept[-1]

        collector = Collector(self.parameters, make, joint=False, vectorised=vectorised)
        given = Signals.of(self.terms, "empirical", batch=self.batch, given=tuple(signals))
        collector.collect(self.recorder, self.output, given)
        return [(entry.block, entry.samples) for entry in kept]

    def gradients(self, signals: Sequence[Tensor]) -> Tensor:
        """Per-sample gradients ``(len(signals), n, P)``, in the parameters' dtype."""
        return self.kept(signals).rows(slice(0, len(signals)), slice(0, self.number))

    def by_parameter(self, signals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per-sample gradients ``{name: (len(signals), n, *shape)}``."""
        return self.kept(signals).by_parameter(slice(0, len(signals)), slice(0, self.number))

    def kept(self, signals: Sequence[Tensor]) -> KeptGradients:
        """The factors of all per-sample gradients, from which any of them can be formed."""
        blocks = self.samples(signals, vectorised=True)
        return KeptGradients(self.parameters, blocks, len(signals), self.number)

    def norms(self, signals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Squared norms of the gradients with respect to each parameter, ``{name: (len(signals), n)}``."""
        out = {
            name: torch.zeros(len(signals), self.number, dtype=widen(p.new_empty(0)).dtype, device=p.device)
            for name, p in self.parameters.items()
        }
        for block, samples in self.samples(signals):
            norms = self._by_signal(torch.cat([squared_norms(entry) for entry in samples]), len(signals))
            out[block.parts[0].name] += norms
        return out

    def _by_signal(self, rows: Tensor, signals: int) -> Tensor:
        if len(rows) != signals * self.number:
            raise RuntimeError(
                f"{len(rows)} gradients came back for {signals} signals on {self.number} examples: part of the model "
                "returns no gradient for some signals. Leave its parameters out with params=."
            )
        return rows.reshape(signals, self.number, *rows.shape[1:])


@dataclass(frozen=True)
class KeptGradients:
    """Per-sample gradients by their factors: inputs of layers, and gradients of their outputs.

    Attributes:
        parameters: The tracked parameters.
        blocks: What the gradients of each block are made of; rows are signals, and examples within a signal.
        signals: Number of signals.
        examples: Number of examples.
    """

    parameters: Parameters
    blocks: list[tuple[Block, list[Samples]]]
    signals: int
    examples: int

    def rows(self, signals: slice, examples: slice) -> Tensor:
        """Gradients ``(k, m, P)`` of some examples under some signals, in the parameters' dtype."""
        p, lead = self.parameters, (signals.stop - signals.start, examples.stop - examples.start)
        out = torch.zeros(*lead, p.size, dtype=p.dtype, device=p.device)
        for block, samples in self.blocks:
            (part,) = block.parts
            start = p.starts[part.name]
            formed = self._formed(samples, signals, examples).to(p.dtype).reshape(*lead, *block.shape)
            part.write(formed, out[..., start : start + p[part.name].numel()])
        return out

    def by_parameter(self, signals: slice, examples: slice) -> dict[str, Tensor]:
        """The same for each parameter, ``{name: (k, m, *shape)}``."""
        lead = (signals.stop - signals.start, examples.stop - examples.start)
        out: dict[str, Tensor] = {}
        for block, samples in self.blocks:
            (part,) = block.parts
            p = self.parameters[part.name]
            rows = self._formed(samples, signals, examples).reshape(*lead, *block.shape)
            if part.numel == p.numel() and part.permutation == tuple(range(len(part.split))):
                out[part.name] = rows.reshape(*lead, *p.shape)  # no copy: these are the largest tensors around
            else:
                if part.name not in out:
                    out[part.name] = rows.new_zeros(*lead, *p.shape)
                part.write(rows, out[part.name].view(*lead, p.numel()))
        return {n: out[n] if n in out else p.new_zeros(*lead, *p.shape) for n, p in self.parameters.items()}

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Sums of the squared entries of every gradient times weights ``(P,)``, ``(signals, examples)``."""
        p = self.parameters
        sizes = {name: parameter.numel() for name, parameter in p.items()}
        total = weights.new_zeros(self.signals, self.examples)
        for block, samples in self.blocks:
            some = BlockPlace.of(block, p.starts, sizes).gather(weights)
            squares = torch.cat([entry.weighted_squares(some) for entry in samples])
            self._check_rows(len(squares))
            total += squares.reshape(total.shape).to(total.dtype)
        return total

    def _check_rows(self, rows: int) -> None:
        if rows != self.signals * self.examples:
            raise RuntimeError(
                f"{rows} gradients came back for {self.signals} signals on {self.examples} examples: part of the model "
                "returns no gradient for some signals. Leave its parameters out with params=."
            )

    def _formed(self, samples: list[Samples], signals: slice, examples: slice) -> Tensor:
        """The rows of one block, ``(k * m, *block shape)``."""
        found, position = [], 0
        for entry in samples:
            uses = entry.aligned()
            k, n = uses[0].signals, uses[0].examples
            if n == self.examples:  # a signal for all examples
                first = position // n
                chosen = slice(max(0, signals.start - first), max(0, min(k, signals.stop - first)))
                uses, part = tuple(use.only(chosen) for use in uses), examples
            else:  # a signal for each example
                row = torch.arange(position, position + k)
                signal, example = row // self.examples, row % self.examples
                inside = (signals.start <= signal) & (signal < signals.stop)
                inside &= (examples.start <= example) & (example < examples.stop)
                uses, part = tuple(use.only(inside.nonzero().flatten()) for use in uses), slice(0, n)
            position += k * n
            if uses[0].signals:
                found.append(_summed([use.gradient(part.start, part.stop) for use in uses]).flatten(0, 1))
        self._check_rows(position)
        return found[0] if len(found) == 1 else torch.cat(found)


def _summed(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def squared_norms(samples: Samples) -> Tensor:
    r"""Squared norms of the per-sample gradients, ``(k * n,)``.

    For one use of a layer with S positions,
    :math:`\|\sum_s g_s a_s^\top\|^2 = \sum_{s,t} \langle g_s, g_t \rangle \langle a_s, a_t \rangle`, which needs no
    gradient: ``S^2 (o + i)`` operations and ``S^2`` numbers per example. Where the gradient is smaller, it is formed.
    """
    uses = samples.aligned()
    if len(uses) == 1 and isinstance(use := uses[0], Outer):
        i, o, S = use.a.size if isinstance(use.a, OneHot) else use.a.shape[-1], use.g.shape[-1], use.positions
        if S * (i + o) < i * o or isinstance(use.a, OneHot):
            g = widen(use.g)
            total = (inner(g, g) * input_products(use).unsqueeze(-4)).sum((-2, -1))  # (*, k, n)
            return total.reshape(-1, *total.shape[-2:]).sum(0).flatten()
    return torch.cat([widen(chunk).flatten(1).square().sum(1) for chunk in samples.gradients()])


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of positions, ``(..., s, d), (..., t, d)`` to ``(..., s, t)``."""
    return left @ right.mT


def input_products(use: Outer) -> Tensor:
    """Inner products of the inputs at the positions of each example, ``(*, n, s, s)``."""
    if isinstance(use.a, OneHot):
        keep = torch.ones_like(use.a.index) if use.a.keep is None else use.a.keep
        same = use.a.index.unsqueeze(-1) == use.a.index.unsqueeze(-2)
        return same * (keep.unsqueeze(-1) * keep.unsqueeze(-2)).to(widen(use.g).dtype)
    a = widen(use.a)
    return inner(a, a) + float(use.ones)


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
) -> dict[str, Tensor]:
    r"""Gradient of the loss of each example: of the sum of its terms, without the 1/N of a mean loss.

    .. math:: g_n = \nabla_\theta \sum_{t \in n} l_t, \qquad \nabla_\theta L = \frac{1}{\text{total}} \sum_n g_n,

    where the total of a mean loss is the number of its terms (for ``MSELoss`` of its entries, with class weights their
    sum). Layers that are recognised cost one backward pass through the activations and one product per layer; other
    uses of parameters one backward pass per example. In train mode a batch norm makes examples interact: then
    :math:`g_n` is the gradient of the terms of n in the presence of the others.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        batch: One batch ``(x, y)``.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.

    Returns:
        ``{name: (N, *shape)}``, N times the memory of a gradient; :func:`per_sample_norms`,
        :func:`gradient_second_moment` and :func:`gradient_variance` do without.

    Raises:
        TypeError: If there is more than one batch.
    """
    found: list[dict[str, Tensor]] = []
    problem = one_batch(model, loss_fn, batch, params=params, output=output, class_dim=class_dim)
    _visit(problem, lambda examples: found.append(examples.by_parameter([examples.terms.gradient()])))
    return {name: rows[0] for name, rows in found[0].items()}


def per_sample_norms(
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
) -> dict[str, Tensor]:
    """Squared Euclidean norms of :func:`per_sample_gradients`, without forming the gradients where that is cheaper.

    For a layer that sees each example once, the norm is the product of the norms of its input and of its output's
    gradient.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        batch: One batch ``(x, y)``.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.

    Returns:
        ``{name: (N,)}``; their sum over the names is the squared norm of the whole gradient.

    References:
        Goodfellow (2015), "Efficient per-example gradient computations", https://arxiv.org/abs/1510.01799
    """
    found: list[dict[str, Tensor]] = []
    problem = one_batch(model, loss_fn, batch, params=params, output=output, class_dim=class_dim)
    _visit(problem, lambda examples: found.append(examples.norms([examples.terms.gradient()])))
    return {name: norms[0] for name, norms in found[0].items()}


def gradient_second_moment(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    r"""Mean over all examples of the squares of :func:`per_sample_gradients`, :math:`\frac{1}{N} \sum_n g_n^2`.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        progress: Show a progress bar.

    Returns:
        ``{name: shape}``.
    """
    problem = Problem(model, loss_fn, data, params=params, output=output, class_dim=class_dim, progress=progress)
    squares, _ = _moments(problem, mean=False)
    return problem.parameters.unflatten(squares)


def gradient_variance(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    r"""Variance over all examples of :func:`per_sample_gradients`, :math:`\frac{1}{N} \sum_n (g_n - \bar g)^2`.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        progress: Show a progress bar.

    Returns:
        ``{name: shape}``. Computed as the second moment minus the square of the mean, so entries far below the squared
        mean carry its rounding error.
    """
    problem = Problem(model, loss_fn, data, params=params, output=output, class_dim=class_dim, progress=progress)
    squares, mean = _moments(problem, mean=True)
    return problem.parameters.unflatten((squares - mean.square()).clamp(min=0))


def _moments(problem: Problem, mean: bool) -> tuple[Tensor, Tensor]:
    """Means over the examples of the squared gradients and, if asked for, of the gradients; ``(P,)`` each."""
    p = problem.parameters
    sizes = {name: p[name].numel() for name in p}
    squares = torch.zeros(p.size, dtype=widen(torch.empty(0, dtype=p.dtype)).dtype, device=p.device)
    total, count = torch.zeros_like(squares), 0

    def add(examples: Examples) -> None:
        nonlocal count
        signal = examples.terms.gradient()
        count += examples.number
        for block, samples in examples.samples([signal]):
            place, part = BlockPlace.of(block, p.starts, sizes), torch.zeros_like(squares)
            for entry in samples:
                place.scatter(widen(entry.square_sum()), part)
                squares.add_(part)
        if mean:
            gradient = torch.autograd.grad(examples.output, list(p.values()), signal, allow_unused=True)
            pairs = zip(p.items(), gradient, strict=True)
            total.add_(p.flatten({name: torch.zeros_like(q) if g is None else g for (name, q), g in pairs}))

    _visit(problem, add)
    return squares / count, total / count


def _visit(problem: Problem, use: Callable[[Examples], Any]) -> Tensor | float:
    refuse_sums(problem)
    return problem.visit(lambda evaluation: use(Examples.of(evaluation)), "per-sample gradients", recorded=True)


def refuse_sums(problem: Problem) -> None:
    """Refuse sums of losses where the gradients of different terms are added up.

    Raises:
        TypeError: If the loss is one.
    """
    if isinstance(problem.loss, WeightedSum):
        raise TypeError(
            "gradients of single examples and their covariance are those of one loss. Take the losses of the sum "
            f"({', '.join(map(repr, problem.loss.loss_fn.losses))}) one by one, with output= to pick what each sees."
        )


def one_batch(model: nn.Module, loss_fn: Any, batch: Batch, **options: Any) -> Problem:
    """The problem of a single batch.

    Raises:
        TypeError: If there is more than one.
    """
    if not is_one_batch(batch):
        raise TypeError(
            f"expected one batch (x, y), got {type(batch).__name__}: what belongs to single examples is returned for "
            "one batch at a time. Loop over the batches."
        )
    return Problem(model, loss_fn, batch, **options)
