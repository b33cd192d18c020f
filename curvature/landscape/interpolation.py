"""The straight way from one model to another, for the whole model and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.landscape.directions import matching
from curvature.landscape.metrics import ByMetric, Metrics, check_metric
from curvature.landscape.objective import Objective
from curvature.losses import ClassDim
from curvature.losses.loss import check_loss
from curvature.model.arguments import a, checked, count, module, one_of
from curvature.model.data import Data, Output
from curvature.model.wrappers import unwrapped
from solvers.outcome.arguments import flag
from solvers.outcome.progress import progress_bar

PathBuffers = Literal["interpolate", "recompute", "keep"]


@dataclass(frozen=True, eq=False)
class Interpolation(ByMetric):
    r"""Numbers along the segment between two models.

    Attributes:
        t: Points ``(T,)`` from 0 (model A) to 1 (model B).
        metrics: ``{name: (T,)}`` for the whole model, float64; NaN and infinities as they came.
        from_a: ``{layer: {name: (T,)}}``: this layer alone goes from A to B, the others are those of A.
        from_b: ``{layer: {name: (T,)}}``: this layer alone goes, the others are those of B.
        metric: Name of the one that :attr:`values` and the barriers show.
    """

    t: Tensor
    metrics: Mapping[str, Tensor]
    from_a: Mapping[str, Mapping[str, Tensor]]
    from_b: Mapping[str, Mapping[str, Tensor]]
    metric: str

    @property
    def barrier(self) -> float:
        r"""Barrier :math:`\max_t L(t) - [(1-t) L(0) + t L(1)]` of the segment; at least 0, for t = 0 counts."""
        return barrier(self.t, self.values)

    def barriers(self, around: Literal["a", "b"] = "a") -> dict[str, float]:
        """The same for each layer, moved alone between the other layers of model A or B."""
        if around not in ("a", "b"):
            raise ValueError(f"around must be 'a' or 'b', got {around!r}.")
        curves = self.from_a if around == "a" else self.from_b
        return {layer: barrier(self.t, found[self.metric]) for layer, found in curves.items()}


def barrier(t: Tensor, values: Tensor) -> float:
    r"""How far a curve rises above the chord between its ends: :math:`\max_t L(t) - [(1-t) L(0) + t L(1)]`.

    For numbers that are better when higher, such as an accuracy, the barrier is that of the negative.

    Args:
        t: Points from 0 to 1.
        values: Numbers there.

    Returns:
        The barrier; infinite or NaN where the curve is.
    """
    above = values - ((1 - t) * values[0] + t * values[-1])
    above[[0, -1]] = above[[0, -1]] * 0  # nothing above the chord at its ends, without rounding
    return float(above.max())  # NaN if there is one


@checked(
    model_a=module,
    model_b=a((nn.Module, Mapping), "a model or its state dict"),
    loss_fn=check_loss,
    points=count(3),
    layerwise=flag,
    metric=check_metric,
    buffers=one_of(PathBuffers),
)
def interpolation(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Any],
    loss_fn: Any,
    data: Data,
    *,
    points: int = 25,
    layerwise: bool = False,
    metric: Metrics = None,
    buffers: PathBuffers = "interpolate",
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    progress: bool | None = None,
) -> Interpolation:
    r"""The loss along the straight segment from model A to model B, and the barrier between them.

    .. math:: L((1 - t)\, \theta_A + t\, \theta_B), \quad 0 \le t \le 1

    Two models whose barrier is about zero are linearly connected: they lie in one basin, can be averaged, and training
    was stable to whatever told them apart. Layer by layer, the same is asked of one layer at a time.

    Costs ``points`` forward passes over the data, and with ``layerwise`` that for each layer twice. At the ends the
    parameters are those of A and B bit for bit. Model A does the evaluations, in its current mode; both models are
    afterwards what they were, exceptions included. A picture is ``curvature.plots.interpolation(result)``.

    Args:
        model_a: Where the segment begins. Wrappers of ``torch.compile`` and DDP are looked through.
        model_b: Where it ends: a model of the same architecture, or its state dict.
        loss_fn: The loss.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        points: Points on the segment, the ends included.
        layerwise: Whether each layer (the parameters that are a module's own) goes alone as well.
        metric: Instead of the loss, a function of model and data that returns a number; or ``{name: function}``, where
            ``None`` stands for the loss.
        buffers: Treatment of running statistics. ``"interpolate"`` takes them along as if they were parameters
            (buffers of whole numbers change over at the middle); ``"recompute"`` takes those of batch norms from the
            data at each point, at the ends too, in one more pass; ``"keep"`` leaves those of A.
        params: Names, globs or tensors that restrict the parameters that go; the others stay those of A.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        The numbers along the segment, for the whole model and for each layer.

    Raises:
        ValueError: If the models are not of one architecture, or an argument is out of range.
        TypeError: If a metric returns no number, or the data can be seen only once.

    References:
        Frankle, Dziugaite, Roy and Carbin (2020), https://arxiv.org/abs/1912.05671; layer by layer: Vlaar and Frankle
        (2022), https://arxiv.org/abs/2106.16004, Adilova, Andriushchenko, Kamp, Fischer and Jaggi (2023),
        https://arxiv.org/abs/2307.06966
    """
    model_a = unwrapped(model_a)
    objective = Objective(
        model_a,
        loss_fn,
        data,
        metric=metric,
        params=params,
        output=output,
        class_dim=class_dim,
        buffers="recompute" if buffers == "recompute" else "keep",
    )
    parameters = objective.parameters
    a = {name: p.detach() for name, p in parameters.items()}
    b = matching(model_a, a, model_b)
    if params is None:
        _refuse_frozen(model_a, model_b)
    if buffers == "interpolate":
        own = {name: x.detach() for name, x in model_a.named_buffers() if name in model_a.state_dict()}
        a, b = a | own, b | matching(model_a, own, model_b)
    layers = _layers(a) if layerwise else {}
    t = torch.tensor([i / (points - 1) for i in range(points)], dtype=torch.float64)
    # what rests, and what goes from A to B
    paths = [(a, list(a))] + [(rest, names) for rest in (a, b) for names in layers.values()]
    curves = []
    with objective.elsewhere() as evaluate, progress_bar(len(paths) * points, "interpolation", progress) as bar:
        for rest, names in paths:
            rows = []
            for s in t.tolist():
                rows.append(evaluate(rest | {name: _between(a[name], b[name], s) for name in names}))
                bar.update()
            columns = torch.stack(rows).unbind(1)
            curves.append(dict(zip(objective.names, columns, strict=True)))
    n = len(layers)
    from_a, from_b = (dict(zip(layers, curves[1 + i * n : 1 + (i + 1) * n], strict=True)) for i in range(2))
    return Interpolation(t, curves[0], from_a, from_b, objective.names[0])


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b``, the ends exactly; of whole numbers the nearer end."""
    if t in (0.0, 1.0) or not a.is_floating_point():
        return a if t < 0.5 else b.to(a.dtype)
    return a * (1 - t) + b.to(a.dtype) * t


def _refuse_frozen(model_a: nn.Module, model_b: nn.Module | Mapping[str, Any]) -> None:
    """Refuse frozen parameters that differ: the segment would not end at B."""
    frozen = {name: p for name, p in model_a.named_parameters() if not p.requires_grad}
    there = matching(model_a, frozen, model_b)
    differ = [name for name, p in frozen.items() if not torch.equal(p.detach(), there[name].to(p.dtype))]
    if differ:
        raise ValueError(
            f"{differ[0]} is frozen (requires_grad is False), but differs between the models ({len(differ)} do): the "
            "segment would not end at model B. Unfreeze it, or say with params= what is to go."
        )


def _layers(names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Parameters and buffers by the module whose own they are."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers
