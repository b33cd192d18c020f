"""Gradients of single examples: themselves, their norms and their moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvature.layers.block import BlockPlace
from curvature.losses.loss import check_loss
from curvature.matrices.examples import Examples
from curvature.matrices.problem import Problem, gradient_of, one_batch, refuse_sums
from curvature.model.arguments import checked
from curvature.model.data import Batch, Data, Output
from solvers.precision import widen


@checked(loss_fn=check_loss)
def per_sample_gradients(
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    batch_dim: int | None = None,
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
        batch_dim: Axis of the output that counts the examples, where it is not the first.

    Returns:
        ``{name: (N, *shape)}``, N times the memory of a gradient; :func:`per_sample_norms`,
        :func:`gradient_second_moment` and :func:`gradient_variance` do without.

    Raises:
        TypeError: If there is more than one batch.
    """
    found: list[dict[str, Tensor]] = []
    problem = one_batch(model, loss_fn, batch, params=params, output=output, class_dim=class_dim, batch_dim=batch_dim)
    _visit(problem, lambda examples: found.append(examples.by_parameter([examples.terms.gradient()])))
    return {name: rows[0] for name, rows in found[0].items()}


@checked(loss_fn=check_loss)
def per_sample_norms(
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    batch_dim: int | None = None,
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
        batch_dim: Axis of the output that counts the examples, where it is not the first.

    Returns:
        ``{name: (N,)}``; their sum over the names is the squared norm of the whole gradient.

    References:
        Goodfellow (2015), "Efficient per-example gradient computations", https://arxiv.org/abs/1510.01799
    """
    found: list[dict[str, Tensor]] = []
    problem = one_batch(model, loss_fn, batch, params=params, output=output, class_dim=class_dim, batch_dim=batch_dim)
    _visit(problem, lambda examples: found.append(examples.norms([examples.terms.gradient()])))
    return {name: norms[0] for name, norms in found[0].items()}


@checked(loss_fn=check_loss)
def gradient_second_moment(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    batch_dim: int | None = None,
    progress: bool | None = None,
    process_group: Any = None,
) -> dict[str, Tensor]:
    r"""Mean over all examples of the squares of :func:`per_sample_gradients`, :math:`\frac{1}{N} \sum_n g_n^2`.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first.
        progress: Show a progress bar.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`.

    Returns:
        ``{name: shape}``.
    """
    options = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
    problem = Problem(model, loss_fn, data, progress=progress, process_group=process_group, **options)
    squares, _ = _moments(problem, mean=False)
    return problem.parameters.unflatten(squares)


@checked(loss_fn=check_loss)
def gradient_variance(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    batch_dim: int | None = None,
    progress: bool | None = None,
    process_group: Any = None,
) -> dict[str, Tensor]:
    r"""Variance over all examples of :func:`per_sample_gradients`, :math:`\frac{1}{N} \sum_n (g_n - \bar g)^2`.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first.
        progress: Show a progress bar.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`.

    Returns:
        ``{name: shape}``. Computed as the second moment minus the square of the mean, so entries far below the squared
        mean carry its rounding error.
    """
    options = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
    problem = Problem(model, loss_fn, data, progress=progress, process_group=process_group, **options)
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
        count += examples.number
        if examples.empty:
            return
        signal = examples.terms.gradient()
        for block, samples in examples.samples([signal]):
            place, part = BlockPlace.of(block, p.starts, sizes), torch.zeros_like(squares)
            for entry in samples:
                place.scatter(widen(entry.square_sum()), part)
                squares.add_(part)
        if mean:
            total.add_(p.flatten(gradient_of(examples.output, p, signal)))

    _visit(problem, add)
    problem.shares.sum(squares, total)
    count = sum(problem.shares.gather(count))
    return squares / count, total / count


def _visit(problem: Problem, use: Callable[[Examples], Any]) -> Tensor | float:
    refuse_sums(problem)
    return problem.visit(
        lambda evaluation: use(Examples.of(evaluation)), "per-sample gradients", recorded=True, every=True
    )
