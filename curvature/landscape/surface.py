"""The loss, or any other number, on a line or a plane through the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.landscape.directions import check_directions, span_of
from curvature.landscape.metrics import ByMetric, Metrics, check_metric
from curvature.landscape.objective import Buffers, Objective
from curvature.losses import ClassDim
from curvature.losses.loss import check_loss
from curvature.model.arguments import checked, count, one_of
from curvature.model.data import Data, Output
from curvature.model.wrappers import unwrapped
from solvers.outcome.arguments import all_of, flag, number
from solvers.outcome.progress import progress_bar


@dataclass(frozen=True, eq=False)
class Surface(ByMetric):
    """Numbers on a grid of points ``theta + alpha u + beta v``.

    Attributes:
        alphas: Coordinates along the first direction ``(A,)``, ascending.
        betas: Along the second ``(B,)``; ``None`` for a line.
        metrics: ``{name: (A, B) or (A,)}``, float64; NaN and infinities as they came.
        metric: Name of the one that :attr:`values` shows.
        directions: u and v as rows ``(2, P)`` or ``(1, P)``.
        labels: Names of the directions, with the unit of their coordinates.
        marks: ``{name: (alpha, beta)}`` of the model and of given checkpoints.
    """

    alphas: Tensor
    betas: Tensor | None
    metrics: Mapping[str, Tensor]
    metric: str
    directions: Tensor
    labels: tuple[str, ...]
    marks: Mapping[str, tuple[float, float]]

    @property
    def finite(self) -> Tensor:
        """Where the numbers are finite; boolean, shaped as :attr:`values`."""
        return torch.isfinite(self.values)


def _check_span(name: str, value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2:
        low, high = (number(f"each of {name}", end) for end in value)
        if not low < high:
            raise ValueError(f"{name} is a positive number or an ascending pair, got {value!r}.")
        return value
    return number(name, value, low=0.0, open_low=True, optional=True, unit="Or an ascending pair.")


def _check_coordinates(name: str, value: Any) -> Any:
    if value is None:
        return value
    if not isinstance(value, (Tensor, Sequence)) or isinstance(value, str):
        raise TypeError(f"{name} must be a vector of finite, ascending coordinates, got {value!r}.")
    if not isinstance(value, Tensor):
        all_of(name, value, number)
    values = torch.as_tensor(value, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 1 or not torch.isfinite(values).all() or (values.diff() <= 0).any():
        raise ValueError(f"{name} must be a vector of finite, ascending coordinates, got {value!r}.")
    return value


@checked(
    loss_fn=check_loss,
    directions=check_directions,
    metric=check_metric,
    span=_check_span,
    points=count(2),
    alphas=_check_coordinates,
    betas=_check_coordinates,
    biases=flag,
    buffers=one_of(Buffers),
)
def surface(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    directions: Any = ("random", "random"),
    metric: Metrics = None,
    span: float | tuple[float, float] | None = None,
    points: int = 25,
    alphas: Tensor | None = None,
    betas: Tensor | None = None,
    biases: bool = False,
    buffers: Buffers = "keep",
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Surface:
    r"""The loss on a line or a plane through the parameters.

    .. math:: L(\theta + \alpha u + \beta v)

    Costs one pass over the data, forward only, for each of the ``points`` (squared, on a plane). The model is evaluated
    in its current mode, with the same random numbers at each point; its parameters, buffers and the random state are
    afterwards bit for bit what they were, exceptions included. A picture is ``curvature.plots.surface(result)``.

    A plane is a thin slice of a space of many dimensions: what looks convex along two random directions may be a saddle
    along the eigenvectors, which is why both are offered.

    Args:
        model: Any module. Wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        directions: One for a line, two for a plane; each one of

            * ``"random"``: normal, each filter as long as that of the weights (Li et al.); 1 moves by 100 per cent;
            * ``"gradient"`` or ``"eigenvector"`` (of the Hessian; the second time, the next one): unit vectors;
            * a vector ``(P,)`` in the order of the flat parameter vector;
            * a model or a state dict: the way there, which ends at 1. Two of them give the plane through three
              points, the second axis orthogonal to the first, so that distances are true.

            ``Eigenpairs`` stand for their first two vectors.
        metric: Instead of the loss, a function of model and data that returns a number; or ``{name: function}``, where
            ``None`` stands for the loss.
        span: From ``-span`` to ``span``, or ``(from, to)``, along both directions. By default 1, or with checkpoints
            what holds them and half as much around.
        points: Points along each direction; an odd number has the model among them.
        alphas: The coordinates along the first direction themselves, in place of ``span`` and ``points``.
        betas: Along the second.
        biases: Whether biases and the scales and shifts of norms move along random directions; by default they stay.
        buffers: ``"keep"`` leaves the running statistics of batch norms as they are, which in eval mode belong to the
            model in the middle; ``"recompute"`` takes them from the data at each point, in one more pass.
        params: Names, globs or tensors that restrict the parameters that move.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        generator: Source of random directions; a fresh one seeded with 0 by default.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        The grid and the numbers on it. Points where a number is NaN or infinite keep it.

    Raises:
        ValueError: If directions are parallel, zero, or do not fit the model, or the grid has no two points.
        TypeError: If a direction is unknown, a metric returns no number, or the data can be seen only once.

    References:
        Li, Xu, Taylor, Studer and Goldstein (2018), https://arxiv.org/abs/1712.09913; Goodfellow, Vinyals and Saxe
        (2015), https://arxiv.org/abs/1412.6544
    """
    model = unwrapped(model)
    objective = Objective(
        model, loss_fn, data, metric=metric, params=params, output=output, class_dim=class_dim, buffers=buffers
    )
    parameters = objective.parameters
    generator = generator or torch.Generator().manual_seed(0)
    found = span_of(objective.problem, directions, generator, biases=biases)
    vectors = torch.stack([direction.vector for direction in found])
    ends = [direction.end for direction in found if direction.end is not None]
    marks = {"model": (0.0, 0.0)} | {f"checkpoint {i}": end for i, end in enumerate(ends, 1)}
    first = _coordinates(alphas, span, points, [mark[0] for mark in marks.values()])
    second = None
    if len(found) == 2:
        second = _coordinates(betas, span, points, [mark[1] for mark in marks.values()])
    elif betas is not None:
        raise ValueError("betas are coordinates along a second direction, but there is only one. Leave betas out.")
    grid = [(a, b) for a in first.tolist() for b in ([0.0] if second is None else second.tolist())]
    start = {name: p.detach() for name, p in parameters.items()}
    along = [parameters.unflatten(vector) for vector in vectors]
    rows = []
    with objective.elsewhere() as evaluate, progress_bar(len(grid), "surface", progress) as bar:
        for point in grid:
            moved = start
            for coordinate, direction in zip(point, along, strict=False):
                moved = {name: p.add(direction[name].to(p.dtype), alpha=coordinate) for name, p in moved.items()}
            rows.append(evaluate(moved))
            bar.update()
    shape = (len(first),) if second is None else (len(first), len(second))
    columns = torch.stack(rows).unbind(1)
    metrics = {name: column.reshape(shape) for name, column in zip(objective.names, columns, strict=True)}
    labels = tuple(direction.label for direction in found)
    return Surface(first, second, metrics, objective.names[0], vectors, labels, marks)


def _coordinates(
    given: Tensor | None, span: float | tuple[float, float] | None, points: int, marks: list[float]
) -> Tensor:
    if given is not None:
        return torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    if span is None:
        low, high = min(marks), max(marks)
        low, high = (-1.0, 1.0) if low == high else (low - (high - low) / 2, high + (high - low) / 2)
    else:
        low, high = span if isinstance(span, tuple) else (-span, span)
    # exactly zero in the middle of a symmetric range, and exactly its ends
    return torch.tensor(
        [(low * (points - 1 - i) + high * i) / (points - 1) for i in range(points)], dtype=torch.float64
    )
