"""Structured curvature of a data set: the estimates of training, over batches, without forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.accumulation import Accumulation
from curvature.estimation.checkpoint import Checkpoint, Resume, digest, problem_identity
from curvature.estimation.collector import Collector, StartAgain
from curvature.estimation.finite import words
from curvature.layers.block import Block
from curvature.layers.recorder import Recorder
from curvature.losses import ClassDim, JoinedTerms, Loss, NonFiniteCurvatureError, Terms, WeightedSum, loss_for
from curvature.losses.picked import along
from curvature.losses.signals import Signals
from curvature.model.data import (
    Batch,
    Data,
    Output,
    batches,
    call,
    examples_of,
    is_one_batch,
    resolve_output,
    shown,
    to_device,
    untouched,
)
from curvature.model.parameters import Parameters
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form
from curvature.structures.inverse import InverseEstimator
from solvers import BlockDiagonal


def record(
    model: nn.Module,
    parameters: Parameters,
    x: Any,
    y: Any = None,
    examples: int | None = None,
    batch_dim: int | None = None,
) -> tuple[Any, Recorder]:
    """Run the model on ``x``, with targets ``y`` or that many examples, and record the uses of its parameters.

    Where examples lie along another axis of the output, the targets are taken to have them there as well; if not, the
    uses are only found not to keep them apart.
    """
    if batch_dim and isinstance(y, Tensor) and -y.dim() <= batch_dim < y.dim():
        examples = y.shape[batch_dim]
    tracked = {id(p) for p in parameters.values()}
    constants = [*model.buffers(), *(p for p in model.parameters() if id(p) not in tracked)]
    recorder = Recorder(parameters, constants, examples or examples_of(x, y), own_pass=True)
    recorder.mark_inputs(x)
    with torch.enable_grad(), recorder:
        result = call(model, x)
    recorder.returned(result)
    return result, recorder


def terms_of(
    loss: Loss,
    result: Any,
    y: Any,
    output: Output | None,
    class_dim: ClassDim,
    check: bool = False,
    batch_dim: int | None = None,
) -> Terms:
    """The terms of a loss, from what the model returned: a tensor picked from it, or all that the loss reads."""
    picked = result if output is None else output(result)
    if isinstance(loss, WeightedSum):
        if batch_dim is not None:
            raise TypeError(
                f"batch_dim={batch_dim} names an axis of one output; the outputs of a sum of losses must have the "
                "examples first."
            )
        return loss.terms(picked, y, class_dim=class_dim, check=check)
    if isinstance(class_dim, Mapping):
        raise TypeError(f"class_dim={class_dim!r} is for sums of losses; for {loss!r} pass one axis.")
    z = picked if loss.reads(picked) else resolve_output(result, output)
    terms = loss.terms(z, y, class_dim=class_dim, check=check)
    return terms if batch_dim is None else along(terms, batch_dim)


def over_all_data(
    loss: Loss,
    model: nn.Module,
    start: Callable[[], Iterator[Batch]],
    device: torch.device,
    output: Output | None,
    class_dim: ClassDim,
) -> Loss:
    """A sum of losses with its divisors over all the data, whose ratios may differ from those of single batches.

    Costs a forward pass over the data; other losses stay as they are.
    """
    if not isinstance(loss, WeightedSum) or loss.reduction != "mean":
        return loss
    divisors: dict[Any, Any] = {}
    with torch.no_grad(), untouched(model):
        for x, y in start():
            terms = terms_of(loss, call(model, to_device(x, device)), to_device(y, device), output, class_dim)
            assert isinstance(terms, JoinedTerms)
            for key, (_, part) in terms.parts.items():
                divisors[key] = divisors.get(key, 0.0) + part.total
    return loss.over(divisors)


def estimate(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    curvature: Curvature,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: int | None = None,
    generator: torch.Generator | None = None,
    resume: Resume | None = None,
    progress: bool | None = None,
    fisher: bool | None = False,
) -> BlockDiagonal:
    """Structured curvature of the loss over all the data, at the model's current parameters and mode.

    Args:
        model: Any module.
        loss_fn: The loss module.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        curvature: What to estimate.
        params: Restriction of the parameters, see :class:`~curvature.model.parameters.Parameters`.
        output: Picks the output tensor.
        class_dim: Class axis of the output, where shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first.
        generator: Source of the draws for ``kind="mc"``; a fresh one seeded with 0 by default.
        resume: File in which the sums are kept, and from which they go on if it exists; see :func:`curvature.fisher`.
        progress: Show a progress bar; ``None`` shows one only where there are many batches.
        fisher: See :class:`~curvature.matrices.problem.Problem`.

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
        if isinstance(estimator, InverseEstimator):
            raise ValueError(f"{curvature!r} learns an inverse in training; over data no such matrix can be estimated.")
        estimator.begin_passes()
        return estimator

    divisors = isinstance(loss, WeightedSum) and not is_one_batch(data)
    start = batches(data, curvature.passes + divisors)
    if divisors:
        loss = over_all_data(loss, model, start, parameters.device, output, class_dim)
    file = None
    if resume is not None:
        described = repr(curvature).replace("max_dim=", "max_factor=")  # as files of version 0.1 have it
        what = {"curvature": described, "draws": digest([generator.get_state()])}
        file = Checkpoint.at(resume).of(problem_identity(model, loss_fn, parameters) | what)

    def look(x: Any, y: Any) -> Terms:
        return terms_of(loss, call(model, x), y, output, class_dim)

    def sums(reasons: dict[str, str]) -> BlockDiagonal:
        """One run over the data, with some parameters taken by autograd from the first batch on."""
        collector = Collector(parameters, make, joint=curvature.joint)
        collector.plan.without_rule |= reasons
        run = Accumulation(model, collector, generator, curvature.passes, file, look)
        with torch.inference_mode(False), untouched(model):
            run.resume(reasons)
            for number in range(run.number, curvature.passes):
                for x, y in shown(run.batches(start), f"curvature, pass {number + 1}", progress):
                    x, y = to_device(x, parameters.device), to_device(y, parameters.device)
                    result, recorder = record(model, parameters, x, y, batch_dim=batch_dim)
                    terms = terms_of(loss, result, y, output, class_dim, check=True, batch_dim=batch_dim)
                    if not terms.output.requires_grad:
                        raise ValueError(
                            f"the output of {type(model).__name__} does not depend on any of the parameters through "
                            "autograd: it was detached, or made under no_grad. Its curvature would be zero."
                        )
                    terms.value()  # refuses losses that are not finite
                    if curvature.kind != "empirical" and fisher is not False:
                        terms = terms.fisher(strict=bool(fisher))
                    if curvature.kind != "empirical":
                        terms.refuse_undefined()
                    signals = Signals.of(terms, curvature.kind, curvature.samples, generator, recorder.batch)
                    if number == 0:
                        run.total = run.total + terms.total
                    collector.collect(recorder, terms.output, signals)
                collector.settle()
                again = {name for name, estimator in collector.estimators.items() if estimator.next_pass()}
                collector.only = again
                run.end_pass()
                if not again:
                    break
            run.finish(start)
        if bad := [name for name, estimator in collector.estimators.items() if not bool(estimator.finite())]:
            raise NonFiniteCurvatureError(words("the curvature", bad))
        collector.commit(ema=0.0)
        return collector.operator(scale=1.0 if loss.reduction == "mean" else run.total)

    draws, reasons = generator.get_state(), dict[str, str]()
    while True:
        try:
            return sums(reasons)
        except StartAgain as again:
            if isinstance(data, Iterator):
                raise
            reasons = again.reasons
            generator.set_state(draws)
