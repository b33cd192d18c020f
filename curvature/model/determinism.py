"""Whether a model and its data give the same numbers twice, and if not, why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvature.model.arguments import checked
from curvature.model.data import Data, Output, batches, call, resolve_output, to_device
from curvature.model.order import checksum
from curvature.model.settings import settings
from curvature.model.trees import tensors_in


class NondeterministicError(RuntimeError):
    """A model or its data give other numbers each time; the message names the cause."""


class NotOneLossWarning(UserWarning):
    """What is computed belongs to one draw of random numbers, or to one way of splitting the data."""


@checked()
def check_deterministic(model: nn.Module, data: Data, *, output: Output | None = None) -> None:
    """Refuse a model or data that do not define one loss.

    Two passes over the data are compared as they come, and the first batch is run twice, with other random numbers.
    Operators of this library hold torch's random numbers fixed over their passes, so dropout or a shuffling loader
    does not spoil them; their results then belong to one draw.

    Args:
        model: Any module; evaluated in its current mode, and left as it is.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        output: Picks the output tensor; by default all that the model returns is compared.

    Raises:
        NondeterministicError: If anything differs; the message names all that was found: active dropout, batch norm in
            train mode, data that differ (augmentation) or come in another order (a shuffling loader).
        TypeError: If the data can be seen only once.
    """
    start = batches(data, passes=2)
    device = next(iter(model.parameters())).device
    found = []
    passes = []
    for seed in range(2):
        with settings(model, seeded(seed, device), device):
            passes.append([checksum(batch) for batch in start()])
    if not _same(sorted(passes[0]), sorted(passes[1])):
        if _same([math.fsum(passes[0])], [math.fsum(passes[1])]):
            found.append("the loader shuffles: its batches hold other examples in each pass (shuffle=False)")
        else:
            found.append("the data differ between two passes (random augmentation, or a sampler that leaves some out)")
    elif not _same(*passes):
        found.append("the loader shuffles: the batches come in another order in each pass (shuffle=False)")
    with settings(model, seeded(0, device), device):  # a shuffling loader draws, too
        x, _ = next(start())
    outputs = []
    for seed in range(2):
        with settings(model, seeded(seed, device), device), torch.no_grad():
            outputs.append(_outputs(call(model, to_device(x, device)), output))
    drew = not all(map(torch.equal, *outputs))
    found += chance_in(model, drew=drew, split=True)
    if found:
        raise NondeterministicError(_listed(found))


def warn_of_chance(model: nn.Module, *, drew: bool, split: bool) -> None:
    """Warn if what is computed belongs to one draw of random numbers, or to one way of splitting the data.

    Every function of a loss over data calls this after its first pass, so that all of them say the same.

    Args:
        model: In the mode in which it ran.
        drew: Whether it drew random numbers.
        split: Whether the data came in several batches.

    Warns:
        NotOneLossWarning: If anything was found.
    """
    if found := chance_in(model, drew=drew, split=split):
        warnings.warn(
            f"{_listed(found)}. What is computed belongs to one draw and one split of the data. "
            "curvature.check_deterministic(model, data) looks for more.",
            NotOneLossWarning,
            stacklevel=3,
        )


def chance_in(model: nn.Module, *, drew: bool, split: bool) -> list[str]:
    """What makes the loss depend on chance, or on how the data are split; see :func:`warn_of_chance`."""
    found = []
    if drew:
        names = ", ".join(dropout_modules(model))
        drawn = "the model draws random numbers itself: two runs on one batch differ, and no dropout module is active"
        found.append(f"dropout is active in {names} (model.eval(), or p=0)" if names else drawn)
    names = ", ".join(batch_statistics_modules(model)) if split else ""
    if names:
        found.append(
            f"{names} normalise by the statistics of the batch, so the loss depends on how the data are split "
            "(model.eval())"
        )
    return found


def _outputs(result: Any, output: Output | None) -> list[Tensor]:
    """What the loss sees: one tensor, or all that there are, of which a sum of losses picks its own."""
    try:
        return [resolve_output(result, output)]
    except TypeError:
        if output is not None or not (found := tensors_in(result)):
            raise
        return found


def _listed(found: list[str]) -> str:
    return "not one loss: " + "; ".join(f"({'abcd'[i]}) {why}" for i, why in enumerate(found))


def dropout_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that draw masks in the current mode."""
    for name, module in model.named_modules():
        share = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            share = module.dropout
        if module.training and (share > 0 or isinstance(module, nn.RReLU)):
            yield name or type(module).__name__


def batch_statistics_modules(model: nn.Module) -> Iterator[str]:
    """Names of the batch norms that use the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            yield name or type(module).__name__


def seeded(seed: int, device: torch.device) -> list[Tensor]:
    """Random states as those of :func:`curvature.model.streams.random_state`, from a seed."""
    devices = [torch.device("cpu")] + ([device] if device.type == "cuda" else [])
    return [torch.Generator(device=d).manual_seed(seed).get_state() for d in devices]


def _same(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(left, right, strict=True)
    )
