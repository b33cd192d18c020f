"""What a run computes, seen from a batch: outputs, their Jacobian, losses and their gradients, in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvature.losses import Terms
from curvature.model.pullback import pull_back
from solvers.precision import working_dtype

#: Name -> ``(numbers, size, resolution)``: two sketches agree if they differ by less than the resolution of the size.
Sketches = dict[str, Tensor]
_WAVES = (1.0, 2.0, 3.0)


def sketches(terms: Terms, parameters: Mapping[str, Tensor]) -> Sketches:
    r"""A few numbers by which the function and the loss are recognised.

    They show the outputs z of the batch, :math:`J^\top w` with a fixed vector w, the value of each loss term, and its
    gradient at the outputs. Each is told by its norm, by inner products with fixed vectors, and by how many of its
    numbers are not finite.

    Args:
        terms: The loss on a batch, attached to the graph of the model.
        parameters: Parameters that count.
    """
    z = terms.output
    found = {"outputs": _sketch(z)}
    if z.requires_grad:
        w = _wave(z.numel(), 1.0, z.device).to(z.dtype).view(z.shape)
        inputs = list(parameters.values())
        gradients = pull_back([z], inputs, [w])
        pairs = zip(inputs, gradients, strict=True)
        found["Jacobian"] = _sketch(*(torch.zeros_like(p) if g is None else g for p, g in pairs))
    with torch.no_grad():
        values = torch.where(terms.mask, terms.values(), 0.0)
    found["loss"] = _sketch(values)
    found["gradient of the loss"] = _sketch(terms.gradient().detach())
    rounding = torch.finfo(working_dtype(z)).eps
    # Another machine may round otherwise, and a residual of nearly nothing is as inexact as the output it comes from.
    noise = 100 * rounding * float(found["outputs"][0])
    relative = torch.finfo(z.dtype).eps ** (2 / 3)
    scales = {name: relative * float(s[0]) + (noise if "loss" in name else 0.0) for name, s in found.items()}
    return {name: torch.cat([s, s.new_tensor([scales[name]])]) for name, s in found.items()}


def sketch(vector: Tensor, scale: float) -> Tensor:
    """A vector in a few numbers.

    Args:
        vector: The vector.
        scale: Size of what it was added up from: rounding is a small part of that.
    """
    found = _sketch(vector)
    return torch.cat([found, found.new_tensor([torch.finfo(vector.dtype).eps ** (2 / 3) * scale])])


def different(old: Sketches, new: Sketches) -> list[str]:
    """Names of the sketches that differ by more than rounding."""
    return [name for name in old | new if name not in old or name not in new or not _agree(old[name], new[name])]


def _agree(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return False
    return bool(((old - new)[:-1].abs() <= torch.maximum(old[-1], new[-1])).all())


def _sketch(*parts: Tensor) -> Tensor:
    """Norm, inner products with waves, and how many numbers are not finite, ``(2 + waves,)``, float64, on the CPU."""
    squares, lost, products = 0.0, 0, [0.0] * len(_WAVES)
    for part in parts:
        flat = part.detach().reshape(-1).double()
        finite = flat.isfinite()
        lost += int((~finite).sum())
        flat = torch.where(finite, flat, 0.0)
        squares += float(flat.square().sum())
        for i, wave in enumerate(_WAVES):
            products[i] += float(flat @ _wave(len(flat), wave, flat.device))
    return torch.tensor([squares**0.5, *products, lost], dtype=torch.float64)


def _wave(n: int, frequency: float, device: torch.device) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64, device=device).mul_(frequency).cos_()
