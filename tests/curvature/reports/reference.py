"""What a report should say, naively: dense matrices row by row, examples one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.reports import Number
from tests.curvature import dense_reference as reference
from tests.curvature.dense_reference import run, trainable
from tests.curvature.problems import Problem


@dataclass(frozen=True)
class Truth:
    """Everything that follows from the two matrices and the gradients of the examples."""

    loss: float
    gradient: Tensor
    examples: Tensor
    matrices: dict[str, Tensor]
    layers: dict[str, Tensor]

    def top(self, matrix: str) -> Tensor:
        return torch.linalg.eigvalsh(self.matrices[matrix]).flip(0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def truth(problem: Problem) -> Truth:
    """For losses that are means over examples with one term each."""
    model, loss_fn = problem.model, problem.loss_fn
    parameters = trainable(model)
    tensors = list(parameters.values())
    with sdpa_kernel(SDPBackend.MATH):
        # One backward pass for each row: forward mode, as torch.func.hessian has it, is not symmetric on encoders.
        z, y = reference.dataset_outputs(problem, model)
        loss = loss_fn(z, y)
        gradient = flat(torch.autograd.grad(loss, tensors, create_graph=True))
        hessian = torch.stack(
            [flat(torch.autograd.grad(g, tensors, retain_graph=True, materialize_grads=True)) for g in gradient]
        )
        ggn = reference.ggn(problem)
        rows = []
        for x, y in problem.data:
            for n in range(len(y)):
                value = loss_fn(run(model, x[n : n + 1]), y[n : n + 1])
                rows.append(flat(torch.autograd.grad(value, tensors)))
    examples = torch.stack(rows)
    layers: dict[str, list[int]] = {}
    start = 0
    for name, p in parameters.items():
        size = p.numel()
        layers.setdefault(name.rpartition(".")[0] or type(model).__name__, []).extend(range(start, start + size))
        start += size
    index = {name: torch.tensor(entries) for name, entries in layers.items()}
    return Truth(float(loss.detach()), examples.mean(0), examples, {"hessian": hessian, "ggn": ggn}, index)


def within(x: Number, value: float | Tensor, errors: float = 2.0) -> bool:
    """Whether a number is within so many standard errors of the truth, or of its rounding."""
    return abs(x.value - float(value)) <= errors * x.error + 1e-9 * (1 + abs(float(value)))


def near(x: Number, value: float | Tensor) -> bool:
    """Whether a number claims to be exact, and is."""
    return x.exact and within(x, value)
