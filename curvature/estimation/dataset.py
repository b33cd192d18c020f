"""Structured curvature of a data set: the estimates of training, over batches, without forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from curvature.estimation.accumulation import Accumulation
from curvature.estimation.batch_loss import refuse_beyond_outputs, refuse_unreduced, require_terms, terms_of
from curvature.estimation.checkpoint import Checkpoint, Resume, digest, problem_identity
from curvature.estimation.collector import Collector, StartAgain
from curvature.estimation.finite import words
from curvature.layers.block import Block
from curvature.layers.recorder import Recorder
from curvature.losses import (
    BatchDim,
    ClassDim,
    JoinedTerms,
    Loss,
    NonFiniteCurvatureError,
    Terms,
    WeightedSum,
    loss_over_data,
)
from curvature.losses.signals import Signals
from curvature.model.data import (
    Batch,
    Collated,
    Data,
    Output,
    batches,
    call,
    examples_of,
    is_one_batch,
    shown,
    to_device,
)
from curvature.model.determinism import warn_of_chance
from curvature.model.parameters import Parameters
from curvature.model.pullback import refuse_hidden
from curvature.model.settings import untouched
from curvature.model.shares import Shares, summed
from curvature.model.streams import drew_since, random_state
from curvature.model.trees import tensors_in
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form
from curvature.structures.inverse import InverseEstimator
from solvers import BlockDiagonal


def record(
    model: nn.Module,
    parameters: Parameters,
    x: Any,
    y: Any = None,
    examples: int | None = None,
    batch_dim: BatchDim = None,
) -> tuple[Any, Recorder]:
    """Run the model on ``x``, with targets ``y`` or that many examples, and record the uses of its parameters.

    Where examples lie along another axis of the output, the targets are taken to have them there as well; if not, the
    uses are only found not to keep them apart.
    """
    if batch_dim is not None:
        examples = examples_along(y, batch_dim) or examples
    tracked = {id(p) for p in parameters.values()}
    constants = [*model.buffers(), *(p for p in model.parameters() if id(p) not in tracked)]
    recorder = Recorder(parameters, constants, examples or examples_of(x, y), own_pass=True)
    recorder.mark_inputs((x, x.labels) if isinstance(x, Collated) else x)  # encoder-decoders make inputs of labels
    with torch.enable_grad(), recorder:
        result = call(model, x)
    recorder.returned(result)
    return result, recorder


def examples_along(y: Any, batch_dim: BatchDim) -> int | None:
    """Number of examples by the targets, where they have the axis; axes from the end are those of the output."""
    axes = batch_dim if isinstance(batch_dim, Mapping) else {None: batch_dim}
    for key, axis in axes.items():
        targets = y[key] if isinstance(y, Mapping) and key in y else y
        found = next((t.shape[axis] for t in tensors_in(targets) if axis is not None and 0 < axis < t.dim()), None)
        if found is not None:
            return int(found)
    return None


def over_all_data(
    loss: Loss,
    model: nn.Module,
    start: Callable[[], Iterator[Batch]],
    device: torch.device,
    output: Output | None,
    class_dim: ClassDim,
    shares: Shares,
) -> Loss:
    """A sum of losses with its divisors over all the data, whose ratios may differ from those of single batches.

    Costs a forward pass over the data; other losses stay as they are.
    """
    if not isinstance(loss, WeightedSum) or loss.reduction != "mean":
        return loss
    divisors: dict[Any, Any] = {}
    with shares.together(), torch.no_grad(), untouched(model):
        for x, y in start():
            x, y = to_device(x, device), to_device(y, device)
            terms = terms_of(loss, call(model, x), x, y, output, class_dim)
            assert isinstance(terms, JoinedTerms)
            for key, (_, part) in terms.parts.items():
                divisors[key] = divisors.get(key, 0.0) + part.total
    if shares.several:
        everyone = shares.gather({key: float(divisor) for key, divisor in divisors.items()})
        keys = dict.fromkeys(key for one in everyone for key in one)
        divisors = {key: sum(one.get(key, 0.0) for one in everyone) for key in keys}
    return loss.over(divisors)


def restart_together(shares: Shares, collector: Collector, again: StartAgain | None) -> None:
    """Start again in all processes, where one has to, or takes a parameter by autograd that another takes by a rule.

    Raises:
        StartAgain: With the reasons of all.
    """
    if not shares.several:
        return
    known = set(collector.plan.reasons)
    found = shares.gather((collector.plan.reasons, again is not None))
    reasons = {name: why for one, _ in found for name, why in one.items()}
    if any(begin or set(one) != set(reasons) for one, begin in found):
        raise StartAgain(set(reasons) - known, reasons)


def estimate(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    curvature: Curvature,
    *,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    resume: Resume | None = None,
    progress: bool | None = None,
    fisher: bool | None = False,
    process_group: Any = None,
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
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of the draws for ``kind="mc"``; a fresh one seeded with 0 by default.
        resume: File in which the sums are kept, and from which they go on if it exists; see :func:`curvature.fisher`.
        progress: Show a progress bar; ``None`` shows one only where there are many batches.
        fisher: See :class:`~curvature.matrices.problem.Problem`.
        process_group: Processes whose data together are the data.

    Returns:
        Block-diagonal operator on the flat parameter vector, in the scale of the loss over all data as one batch.
    """
    parameters = Parameters(model, params)
    loss = loss_over_data(loss_fn)
    curvature = curvature.on(model)
    generator = generator or torch.Generator(device=parameters.device).manual_seed(0)
    shares = Shares(process_group)
    if shares.several and resume is not None:
        raise ValueError("resume keeps the sums of one process: leave it out, or process_group.")
    generator = shares.draws(generator) if curvature.kind == "mc" else generator

    def make(block: Block, form: Form) -> CurvatureEstimator:
        estimator = curvature.estimator(block, form)
        if isinstance(estimator, InverseEstimator):
            raise ValueError(f"{curvature!r} learns an inverse in training; over data no such matrix can be estimated.")
        estimator.begin_passes()
        return estimator

    divisors = isinstance(loss, WeightedSum) and (shares.several or not is_one_batch(data))
    start = batches(data, curvature.passes + divisors, empty=shares.several)
    if divisors:
        loss = over_all_data(loss, model, start, parameters.device, output, class_dim, shares)
    file = None
    if resume is not None:
        # As files of version 0.1 have it.
        described = repr(curvature).replace("max_dim=", "max_factor=").replace(", max_ratio=4.0", "")
        what = {"curvature": described, "draws": digest([generator.get_state()])}
        file = Checkpoint.at(resume).of(problem_identity(model, loss_fn, parameters, batch_dim) | what)

    def look(x: Any, y: Any) -> Terms:
        return terms_of(loss, call(model, x), x, y, output, class_dim, batch_dim=batch_dim)

    def sums(reasons: dict[str, str]) -> BlockDiagonal:
        """One run over the data, with some parameters taken by autograd from the first batch on."""
        collector = Collector(parameters, make, joint=curvature.joint, vectorised=True)
        collector.plan.begin_with(reasons)
        run = Accumulation(model, collector, generator, curvature.passes, file, look)
        with torch.inference_mode(False), untouched(model):
            run.resume(reasons)
            for number in range(run.number, curvature.passes):
                drew, count = False, 0
                again: StartAgain | None = None
                with shares.together():
                    try:
                        for x, y in shown(run.batches(start), f"curvature, pass {number + 1}", progress):
                            x, y = to_device(x, parameters.device), to_device(y, parameters.device)
                            before = random_state(parameters.device)
                            result, recorder = record(model, parameters, x, y, batch_dim=batch_dim)
                            drew, count = drew or drew_since(before, parameters.device), count + 1
                            terms = terms_of(loss, result, x, y, output, class_dim, check=True, batch_dim=batch_dim)
                            refuse_unreduced(terms)
                            if not terms.output.requires_grad:
                                raise ValueError(
                                    f"the output of {type(model).__name__} does not depend on any of the parameters "
                                    "through autograd: it was detached, or made under no_grad. Its curvature would be "
                                    "zero."
                                )
                            refuse_hidden(terms.output)
                            terms.value()  # refuses losses that are not finite
                            refuse_beyond_outputs(terms, parameters)
                            if number == 0:
                                run.total = run.total + terms.total
                            if terms.empty:
                                continue
                            if curvature.kind != "empirical" and fisher is not False:
                                terms = terms.fisher(strict=bool(fisher))
                            if curvature.kind != "empirical":
                                terms.refuse_undefined()
                            signals = Signals.of(terms, curvature.kind, curvature.samples, generator, recorder.batch)
                            collector.collect(recorder, terms.output, signals)
                    except StartAgain as raised:
                        if not shares.several:
                            raise
                        again = raised
                restart_together(shares, collector, again)
                if number == 0:
                    if shares.several:
                        run.total = summed(shares, [run.total], parameters.device)[0]
                    require_terms(run.total)
                    warn_of_chance(model, drew=drew, split=count > 1)
                collector.settle(shares)
                collector.only = {name for name, estimator in collector.estimators.items() if estimator.next_pass()}
                run.end_pass()
                if not collector.only:
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
