"""Targets that name classes: where the class axis is, which terms count, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.losses.errors import AmbiguousClassAxisError
from curvature.losses.terms import Layout, noise


def class_layout(output: Tensor, target: Tensor, class_dim: int | None, as_called: bool) -> Layout:
    """Find the class axis of an output from the shape of its target.

    Targets are class indices (the output's shape without the class axis) or class probabilities (the output's shape).
    PyTorch puts classes on axis 1, language models on the last axis. A call of the loss module itself (``as_called``)
    means PyTorch's axis; otherwise both are tried.

    Raises:
        AmbiguousClassAxisError: If both axes fit.
        ValueError: If no axis fits.
    """
    shape, rank = output.shape, output.ndim
    if output.numel() == 0 or rank == 0:
        raise ValueError(f"The output has shape {tuple(shape)}: there is no example in it. Skip empty batches.")
    if rank == 1 and class_dim in (None, 0, -1):
        axes = [0]  # a single example
    elif class_dim is not None:
        axes = list(Layout.along(shape, class_dim).class_axes)
    else:
        axes = [1] if as_called else sorted({1, rank - 1})
    if target.is_floating_point():
        fits = axes if target.shape == shape else []
    else:
        fits = [axis for axis in axes if target.shape == shape[:axis] + shape[axis + 1 :]]
    if not fits:
        kind = "class probabilities (floating point)" if target.is_floating_point() else "class indices"
        expected = [shape] if target.is_floating_point() else [shape[:axis] + shape[axis + 1 :] for axis in axes]
        raise ValueError(
            f"Target of shape {tuple(target.shape)} and dtype {target.dtype} does not fit an output of shape "
            f"{tuple(shape)} with classes on axis {' or '.join(map(str, axes))}: {kind} must have shape "
            f"{' or '.join(str(tuple(e)) for e in expected)}. Reshape the target, or say which axis holds the classes "
            "with class_dim=."
        )
    if len(fits) > 1:
        raise AmbiguousClassAxisError(
            f"Output of shape {tuple(shape)} and target of shape {tuple(target.shape)} fit with the classes on axis "
            f"{fits[0]} (PyTorch's convention) and on axis {fits[1]} (the last). Pass class_dim={fits[0]} or "
            f"class_dim={fits[1]}."
        )
    return Layout(shape, (fits[0],))


def refuse_one_class(loss: object, layout: Layout) -> None:
    """Refuse a choice among one class: its probability is one and its loss zero, whatever the model says.

    Raises:
        ValueError: If the class axis has one entry.
    """
    if layout.shape[2] == 1:
        raise ValueError(
            f"{loss!r} chooses among the entries of axis {layout.class_axes[0]} of an output of shape "
            f"{tuple(layout.output_shape)}, which has one: the probability of a single class is 1 and its curvature 0, "
            "whatever the model says. A yes or no in one logit is nn.BCEWithLogitsLoss() with targets 0. and 1. of the "
            "output's shape; for cross-entropy give the model one output per class, two for yes and no."
        )


@dataclass(frozen=True)
class Labels:
    """Class indices of all terms.

    Args:
        index: ``(N, R)`` class of each term; 0 where the term does not count.
        weight: ``(N, R)`` class weight of that class; 0 where the term does not count.
        mask: ``(N, R)`` which terms count.
    """

    index: Tensor
    weight: Tensor
    mask: Tensor


def read_labels(
    target: Tensor, layout: Layout, mask: Tensor, class_weight: Tensor, ignore_index: int, check: bool
) -> Labels:
    """Class indices with ``ignore_index`` and class weights ``(C,)`` taken into account."""
    index = target.reshape(mask.shape).long()
    mask = mask & (index != ignore_index)
    index = index.masked_fill(~mask, 0)
    if check and ((index < 0) | (index >= layout.shape[2])).any():
        raise ValueError(
            f"Class indices must lie in [0, {layout.shape[2]}) for an output of shape {tuple(layout.output_shape)} "
            f"(ignore_index={ignore_index} excepted), got values from {int(index.min())} to {int(index.max())}."
        )
    # gather, not indexing: it refuses negative indices, where indexing would wrap around
    weight = class_weight.gather(0, index.flatten()).reshape(mask.shape)
    return Labels(index, weight.masked_fill(~mask, 0), mask)


def drawn_classes(p: Tensor, generator: torch.Generator) -> Tensor:
    """A class per row, drawn with probabilities ``p (N, R, C)``; ``(N, R, 1)``."""
    # Inverse distribution function: one random number per term; unlike torch.multinomial it works without waiting for
    # the device and accepts rows outside the mask (p = 0). In float64, since a sum close to one would leave float32 no
    # digits for the many rare classes of a vocabulary.
    cdf = p.cumsum(-1, dtype=torch.float64)
    uniform = noise((*p.shape[:-1], 1), cdf, generator).uniform_(generator=generator).to(cdf.device)
    return torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True).clamp(max=p.shape[-1] - 1)


def class_weights(weight: Tensor | None, classes: int, like: Tensor, check: bool) -> Tensor:
    """The loss's ``weight`` option as ``(C,)``, ones if absent."""
    if weight is None:
        return torch.ones(classes, dtype=like.dtype, device=like.device)
    if weight.shape != (classes,):
        raise ValueError(f"The loss has weights of shape {tuple(weight.shape)} for {classes} classes.")
    if check and not (weight >= 0).all():
        raise ValueError(f"Class weights must not be negative, got a smallest weight of {weight.min().item()}.")
    return weight.detach().to(like)
