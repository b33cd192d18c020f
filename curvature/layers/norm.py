"""Normalisation layers: a scale and a shift of a normalised input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import Block
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import ElementwiseSite, Observer, Ref, RowLayout


class ScaleShiftSite(ElementwiseSite):
    r"""One use of :math:`y_{ns} = \gamma \odot \hat x_{ns} + \beta`.

    Args:
        input: Input of the normalisation.
        normalise: Recomputes :math:`\hat x` from it, without scale and shift.
        channel: Axis of the scaled channels (1 for batch norms), or ``None`` where the last ``features`` axes are
            scaled (layer norms).
        features: Number of trailing scaled axes.
    """

    def __init__(
        self,
        input: Tensor,
        normalise: Callable[[Tensor], Tensor],
        weight: Ref | None,
        bias: Ref | None,
        layout: RowLayout,
        operation: str,
        channel: int | None = None,
        features: int = 1,
    ) -> None:
        super().__init__(weight, bias, layout, operation)
        self.normalise, self.channel, self.features = normalise, channel, features
        self.input = self.save(input)

    def blocks(self, joint: bool) -> list[tuple[str, Block]]:
        refs = [("weight", self.weight), ("bias", self.bias)]
        present = [(piece, ref) for piece, ref in refs if ref is not None]
        parts = {piece: ref.part((ref.numel, 1), split=(ref.numel,)) for piece, ref in present}
        if joint and len(present) == 2:
            name = "+".join(ref.label for _, ref in present)
            return [("joint", Block(name, (parts["weight"], parts["bias"])))]
        return [(piece, Block(ref.label, (parts[piece],))) for piece, ref in present]

    def _rows(self, x: Tensor, batch: int) -> Tensor:
        """``(*batch, *shape)`` to ``(*batch, *rows, d)``: the scaled entries last."""
        if self.channel is not None:
            x = x.movedim(batch + self.channel, -1)
        else:
            x = x.flatten(-self.features)
        return x

    def per_sample(self, piece: str, gradient: Tensor) -> Tensor:
        return self._summed(piece, gradient, lambda x, batch: self.layout.rows(x, x.dim() - 1 - batch))

    def per_row(self, piece: str, gradient: Tensor) -> Tensor:
        return self._summed(piece, gradient, lambda x, batch: x.flatten(batch, -2).unsqueeze(-2))

    def _summed(self, piece: str, gradient: Tensor, layout: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Gradients summed over the positions s of rows that ``layout`` arranges, ``(*, n, s, d)``."""
        g = layout(self._rows(gradient, 1), 1)  # (k, n, s, d)
        columns = []
        if piece in ("joint", "weight"):
            # Under autocast the input is in half precision, but normalised in single.
            x = self.normalise(self.input.to(torch.promote_types(self.input.dtype, g.dtype))).to(g.dtype)
            columns.append((g * layout(self._rows(x, 0), 0)).sum(-2))
        if piece in ("joint", "bias"):
            columns.append(g.sum(-2))
        return torch.stack(columns, dim=-1)


def _use(
    recorder: Observer, call: Mapping[str, Any], operation: str, normalise: Callable[[Tensor], Tensor], **axes: int
) -> ScaleShiftSite | None:
    weight, bias = recorder.resolve(call.get("weight")), recorder.resolve(call.get("bias"))
    if weight is None and bias is None:
        return None
    return ScaleShiftSite(call["input"], normalise, weight, bias, recorder.layout(call["input"]), operation, **axes)


def _statistics(call: Mapping[str, Any], of_input: bool) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance, or None for those of the input."""
    mean, var = call.get("running_mean"), call.get("running_var")
    if of_input or mean is None or var is None:
        return None, None
    return mean.detach().clone(), var.detach().clone()


@rule_for(F.layer_norm, torch.layer_norm, modules={nn.LayerNorm: "unit"})
def layer_norm(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScaleShiftSite | None:
    """``F.layer_norm`` over any number of trailing axes."""
    call = bind(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    shape, eps = list(call["normalized_shape"]), call.get("eps", 1e-5)
    return _use(recorder, call, "layer_norm", lambda x: F.layer_norm(x, shape, eps=eps), features=len(shape))


@rule_for(F.rms_norm, torch.rms_norm, modules={nn.RMSNorm: "diagonal"})
def rms_norm(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScaleShiftSite | None:
    """``F.rms_norm``: a scale, no shift."""
    call = bind(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    shape, eps = list(call["normalized_shape"]), call.get("eps")
    return _use(recorder, call, "rms_norm", lambda x: F.rms_norm(x, shape, eps=eps), features=len(shape))


@rule_for(
    F.batch_norm,
    torch.batch_norm,
    modules={nn.BatchNorm1d: "unit", nn.BatchNorm2d: "unit", nn.BatchNorm3d: "unit", nn.SyncBatchNorm: "unit"},
)
def batch_norm(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScaleShiftSite | None:
    """``F.batch_norm``; in train mode examples interact through the batch statistics, as in the model itself."""
    call = bind(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), args, kwargs)
    eps, (mean, var) = call.get("eps", 1e-5), _statistics(call, of_input=call.get("training", False))

    def normalise(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, training=mean is None, momentum=0.0, eps=eps)

    return _use(recorder, call, "batch_norm", normalise, channel=1)


@rule_for(F.group_norm, torch.group_norm, modules={nn.GroupNorm: "unit"})
def group_norm(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScaleShiftSite | None:
    """``F.group_norm``."""
    call = bind(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    groups, eps = call["num_groups"], call.get("eps", 1e-5)
    return _use(recorder, call, "group_norm", lambda x: F.group_norm(x, groups, eps=eps), channel=1)


@rule_for(
    F.instance_norm,
    modules={nn.InstanceNorm1d: "unit", nn.InstanceNorm2d: "unit", nn.InstanceNorm3d: "unit"},
)
def instance_norm(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScaleShiftSite | None:
    """``F.instance_norm``, with the statistics of the input or running ones."""
    call = bind(
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"), args, kwargs
    )
    eps, (mean, var) = call.get("eps", 1e-5), _statistics(call, of_input=call.get("use_input_stats", True))

    def normalise(x: Tensor) -> Tensor:
        return F.instance_norm(x, mean, var, use_input_stats=mean is None, momentum=0.0, eps=eps)

    return _use(recorder, call, "instance_norm", normalise, channel=1)
