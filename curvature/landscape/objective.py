"""A loss, or any number of a model and its data, at other parameters than the model's own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from curvature.estimation.batch_loss import read_for, refuse_unreduced, terms_of
from curvature.landscape.metrics import Metric, Metrics, by_name
from curvature.losses import ClassDim, Terms
from curvature.matrices.problem import Problem
from curvature.model.data import Data, Output, batch_size, call, inspection, to_device
from curvature.model.parameters import Parameters
from curvature.model.settings import own_buffers
from curvature.model.streams import own_stream, random_state, set_random_state
from solvers.outcome.memory import is_out_of_memory

Buffers = Literal["keep", "recompute"]


class Objective:
    """Numbers of a model and its data that can be asked for at any parameters; the model itself stays as it is.

    While numbers are asked for, the parameters hold other tensors: so whatever reaches them, by name or by reference,
    sees the new values, the model's own memory is never written, and leaving the context gives it back bit for bit,
    exceptions included. Buffers are copies meanwhile, and each evaluation starts from the same random numbers.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss.
        data: One batch or a re-iterable of batches.
        metric: The numbers to compute: the loss (``None``), a function of model and data that returns a number, or a
            mapping of several, in which ``None`` stands for the loss.
        params: Restriction of the parameters that move.
        output: Picks the output tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        buffers: ``"recompute"`` recomputes the running statistics of batch norms from the data before each evaluation.

    Attributes:
        names: Names of the numbers.
        parameters: The parameters that move.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Data,
        *,
        metric: Metrics = None,
        params: Any = None,
        output: Output | None = None,
        class_dim: ClassDim = None,
        buffers: Buffers = "keep",
    ) -> None:
        self.metrics = by_name(metric)
        if buffers not in ("keep", "recompute"):
            raise ValueError(f"buffers must be 'keep' or 'recompute', got {buffers!r}.")
        self.model, self.data, self.buffers = model, data, buffers
        self.problem = Problem(
            model, loss_fn, data, params=params, output=output, class_dim=class_dim, progress=False, opaque=True
        )
        self.parameters: Parameters = self.problem.parameters
        self.names = tuple(self.metrics)
        self._random = random_state(self.parameters.device)
        self._as_called: bool | None = None  # whether the loss function, called on the batch, gives the loss

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[Callable[[Mapping[str, Tensor]], Tensor]]:
        """Inside, a function from values of parameters and buffers, by name, to the numbers ``(M,)``, float64.

        Unnamed ones keep their own values.
        """
        own = {name: p.data for name, p in self.parameters.items()}
        modes = [(module, module.training) for module in self.model.modules()]  # a metric may change them
        device = self.parameters.device

        def evaluate(values: Mapping[str, Tensor]) -> Tensor:
            for name, p in self.parameters.items():
                p.data = values[name] if name in values else own[name]
            for module, training in modes:
                module.training = training
            with own_buffers(self.model):
                for name, b in self.model.named_buffers():
                    if name in values:
                        b.copy_(values[name])
                set_random_state(self._random, device)
                if self.buffers == "recompute":
                    recompute_statistics(self.model, self.problem, device)
                    set_random_state(self._random, device)
                return torch.tensor([self._number(metric) for metric in self.metrics.values()], dtype=torch.float64)

        with torch.no_grad(), inspection(), own_stream(self.model, device):
            try:
                yield evaluate
            finally:
                for name, p in self.parameters.items():
                    p.data = own[name]
                for module, training in modes:
                    module.training = training

    def _number(self, metric: Metric | None) -> float:
        if metric is None:
            return self._loss()
        value = metric(self.model, self.data)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"a metric must return one number, got a tensor of shape {tuple(value.shape)}.")
        return float(value)

    def _loss(self) -> float:
        """The loss of all data; a value that is not finite is returned as it is."""
        problem, device = self.problem, self.parameters.device
        first, problem_loss = self._as_called is None, problem.loss
        total, size, mean = 0.0, 0.0, False
        for x, y in problem.start():
            x, y = to_device(x, device), to_device(y, device)
            result = call(self.model, x)
            if problem_loss is None or self._as_called:
                z = problem.pick(result)
                return float(problem.loss_fn(z, y if problem_loss else read_for(problem.loss_fn, result, x, z, y)))
            terms = terms_of(problem_loss, result, x, y, problem.output, problem.class_dim, check=first)
            refuse_unreduced(terms)
            total += float(torch.where(terms.mask, terms.values(), 0.0).double().sum())
            size, mean = size + float(terms.total), terms.reduction == "mean"
            if first and problem.single and math.isfinite(total):  # a comparison needs finite values
                self._as_called = self._agrees(terms, y)
                if self._as_called:
                    return float(problem.loss_fn(terms.output, y))
        return (total / size if size else math.nan) if mean else total

    def _agrees(self, terms: Terms, y: Any) -> bool:
        """Whether the loss function itself can be called on the one batch, so that no bit differs from the user's."""
        try:
            value = self.problem.loss_fn(terms.output, y)
        except (RuntimeError, ValueError, TypeError) as error:  # classes last, or several outputs
            if is_out_of_memory(error):
                raise
            return False
        expected = torch.where(terms.mask, terms.values(), 0.0).sum()
        if terms.reduction == "mean":
            expected = expected / terms.total
        return bool(torch.isclose(value.double(), expected.double(), rtol=torch.finfo(value.dtype).eps ** 0.5))


def recompute_statistics(model: nn.Module, problem: Problem, device: torch.device) -> None:
    """Recompute the running statistics of normalisations: the mean over the batches, weighted by their examples.

    Only these modules run in train mode meanwhile; all modes are as before afterwards.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]
    before = [(module, module.training, module.momentum) for module in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.train()
        seen = 0
        for x, _ in problem.start() if norms else ():
            x = to_device(x, device)
            number = batch_size(x) or 1
            seen += number
            for module in norms:
                module.momentum = number / seen
            call(model, x)
    finally:
        for module, training, momentum in before:
            module.training, module.momentum = training, momentum
