"""Gradients of single examples: how long they are, and how noisy their mean is."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from curvature.losses.signals import Signals
from curvature.matrices.examples import Examples
from curvature.matrices.jacobian import Linearization
from curvature.matrices.problem import Evaluation, refuse_sums
from curvature.model.order import drawn_order
from curvature.reports.results import NoiseResult, Number
from curvature.reports.sections.study import Study

_LARGEST = 5


def passes(study: Study) -> float:
    """Cost in gradients: the norms by layer, and a product with the Jacobian."""
    return 4.0


def noise(study: Study) -> NoiseResult:
    r"""Norms of the examples' gradients, and the simple noise scale :math:`\operatorname{tr}\Sigma / |G|^2`.

    All of it follows from each example's squared norm and its inner product with the mean gradient; no gradient of a
    single example is kept. Errors are those of leaving out one example after the other (jackknife).

    Raises:
        ValueError: If there are fewer than three examples.

    References:
        McCandlish, Kaplan and Amodei (2018), section 2.2, https://arxiv.org/abs/1812.06162; Efron and Stein (1981).
    """
    problem, mean = study.problem, study.gradient
    assert mean is not None
    if problem.loss is None:
        raise ValueError(
            "the loss is only known as a function of the whole batch, so its examples cannot be told apart."
        )
    refuse_sums(problem)
    norms: list[Tensor] = []
    products: list[Tensor] = []

    def add(evaluation: Evaluation) -> None:
        terms, parameters, examples = evaluation.through_output(), problem.parameters, Examples.of(evaluation)
        if evaluation.empty:
            products.append(mean.new_zeros(examples.number))
            norms.append(mean.new_zeros(examples.number))
            return
        signal = terms.gradient()
        line = Linearization(
            problem.model,
            evaluation.x,
            evaluation.output,
            problem.pick,
            parameters,
            parameters,
            "auto",
            evaluation.random,
        )
        along = line.push(mean.unsqueeze(0).to(parameters.dtype)).squeeze(0)
        count = Signals.of(terms, "empirical", batch=examples.batch).examples
        products.append(terms.rows(signal.double() * along).reshape(count, -1).sum(1))
        by_parameter = examples.norms([signal])
        norms.append(torch.stack([squares[0].double() for squares in by_parameter.values()]).sum(0))

    divisor = problem.visit(add, "gradients of single examples", recorded=True, every=True)
    study.budget.count(passes(study))
    square, inner = (torch.cat([mean.new_zeros(0), *own]) for own in (norms, products))
    if study.shares.several:  # by rank, so that examples are numbered through
        both = study.shares.joined(torch.stack([square, inner], 1), square.device)
        assert both is not None
        square, inner = both.unbind(1)
    n = len(square)
    if n < 3:
        raise ValueError(f"the noise of the gradient needs three examples at least; there are {n}.")
    factor = n / float(divisor)  # the mean of the scaled gradients is the gradient of the loss
    found = summarise(square * factor**2, inner * factor, mean.square().sum())
    # Numbers of examples mean something in one order only.
    drawn = study.shares.gather(drawn_order(study.given[2]) is not None)
    return replace(found, largest=()) if any(drawn) else found


def summarise(square: Tensor, inner: Tensor, mean: Tensor) -> NoiseResult:
    """The section from each example's squared norm, its inner product with the mean, and the mean's squared norm."""
    n = len(square)
    lengths = square.sqrt()
    top = lengths.topk(min(_LARGEST, n))
    total = square.sum()
    # without one example, the mean has the squared norm |n m - g|^2 / (n - 1)^2
    rest = (n**2 * mean - 2 * n * inner + square) / (n - 1) ** 2
    trace, signal = _unbiased(total, mean, n)
    trace_without, signal_without = _unbiased(total - square, rest, n - 1)
    scale = None
    signal_error = _jackknife(signal_without)
    # Beside a gradient that may as well be zero the ratio has no meaning, nor has its error.
    if float(signal) > 2 * signal_error:
        scale = Number(float(trace / signal), _jackknife(trace_without / signal_without), n)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64, device=square.device)
    return NoiseResult(
        n,
        tuple(torch.quantile(_thinned(lengths), grid).tolist()),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        Number(float(trace), _jackknife(trace_without), n),
        Number(float(signal), signal_error, n),
        scale,
    )


def _unbiased(total: Tensor, mean: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Trace of the covariance and squared norm of the expected gradient, from sums over n examples."""
    trace = (total - n * mean) / (n - 1)
    return trace, mean - trace / n


def _jackknife(without: Tensor) -> float:
    n = len(without)
    return sqrt((n - 1) / n * float((without - without.mean()).square().sum()))


def _thinned(lengths: Tensor) -> Tensor:
    """Sorted norms, no more than ``torch.quantile`` takes."""
    ordered = lengths.sort().values
    step = -(-len(ordered) // 1_000_000)
    return ordered if step == 1 else torch.cat([ordered[:-1:step], ordered[-1:]])
