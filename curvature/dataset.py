"""Structured curvature of a data set: the estimates of training, over batches, without forgetting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvature.block import Block
from curvature.collector import Collector
from curvature.data import Data, Output, batches, call, resolve_output, shown, to_device, untouched
from curvature.estimator import Curvature, CurvatureEstimator, Form
from curvature.losses import loss_for
from curvature.parameters import Parameters
from curvature.recorder import Recorder, batch_size
from curvature.signals import Signals
from solvers import BlockDiagonal


def record(model: nn.Module, parameters: Parameters, x: Any) -> tuple[Any, Recorder]:
    """Run the model on ``x`` and record the uses of its parameters."""
    constants = [b for b in model.buffers()] + [p for p in model.parameters() if not p.requires_grad]
    recorder = Recorder(parameters, constants, batch_size(x), own_pass=True)
    recorder.mark_inputs(x)
    with torch.enable_grad(), recorder:
        result = call(model, x)
    return result, recorder


def estimate(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    curvature: Curvature,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> BlockDiagonal:
    """Structured curvature of the loss over all the data, at the model's current parameters and mode.

    Args:
        model: Any module.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        curvature: What to estimate.
        params: Restriction of the parameters, see :class:`~curvature.parameters.Parameters`.
        output: Picks the output tensor.
        class_dim: Class axis of the output, where shapes leave it open.
        generator: Source of the draws for ``kind="mc"``; a fresh one seeded with 0 by default.
        progress: Show a progress bar; ``None`` shows one only where there are many batches.

    Returns:
        Block-diagonal operator on the flat parameter vector, in the scale of the loss over all data as one batch.
    """
    parameters = Parameters(model, params)
    loss = loss_for(loss_fn)
    if loss.reduction == "none":
        raise ValueError("the loss has reduction='none', so it is no scalar. Use 'mean' or 'sum'.")
    curvature = curvature.on(model)
    generator = generator or torch.Generator(device=parameters.device).manual_seed(0)

    def make(block: Block, form: Form) -> CurvatureEstimator:
        estimator = curvature.estimator(block, form)
        estimator.begin_passes()
        return estimator

    collector = Collector(parameters, make, joint=curvature.joint)
    start = batches(data, curvature.passes)
    total: Tensor | float = 0.0
    with torch.inference_mode(False), untouched(model):
        for number in range(curvature.passes):
            for x, y in shown(start(), f"curvature, pass {number + 1}", progress):
                x, y = to_device(x, parameters.device), to_device(y, parameters.device)
                result, recorder = record(model, parameters, x)
                z = resolve_output(result, output)
                if not z.requires_grad:
                    raise ValueError(
                        f"the output of {type(model).__name__} does not depend on any of the parameters through "
                        "autograd: it was detached, or made under no_grad. Its curvature would be zero."
                    )
                terms = loss.terms(z, y, class_dim=class_dim, check=True)
                terms.value()  # refuses losses that are not finite
                signals = Signals(terms, curvature.kind, curvature.samples, generator, recorder.batch)
                if number == 0:
                    total = total + terms.total
                collector.collect(recorder, z, signals)
            collector.settle()
            again = {name for name, estimator in collector.estimators.items() if estimator.next_pass()}
            if not again:
                break
            collector.only = again
    collector.commit(ema=0.0)
    return collector.operator(scale=1.0 if loss.reduction == "mean" else total)
