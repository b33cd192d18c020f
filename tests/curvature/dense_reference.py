"""Curvature matrices from their definitions: one backward pass per number, no structure, nothing of our code.

Letters: ``t`` loss term (one example, one position), ``c`` output of a term, ``P`` all trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.curvature.problems import Problem


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def run(model: nn.Module, x: Any) -> Tensor:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def as_terms(problem: Problem, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(t, c)`` and targets ``(t,)`` or ``(t, c)``."""
    if problem.class_dim is not None:
        z = z.movedim(problem.class_dim, -1)
        y = y.movedim(problem.class_dim, -1) if y.is_floating_point() else y
    if z.dim() == 1:
        return z.unsqueeze(-1), y.unsqueeze(-1)
    z = z.reshape(-1, z.shape[-1])
    return z, y.reshape(-1, z.shape[-1]) if y.is_floating_point() else y.reshape(-1)


def summed(loss_fn: Any) -> Any:
    out = copy.deepcopy(loss_fn)
    out.reduction = "sum"
    return out


def dataset_outputs(problem: Problem, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All outputs and targets as if the data were one batch."""
    pairs = [as_terms(problem, run(model, x), y) for x, y in problem.data]
    return torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs])


def term_weight(problem: Problem, z: Tensor, y: Tensor) -> Tensor:
    """``w`` of ``L = w * sum_t l_t``."""
    return (problem.loss_fn(z, y) / summed(problem.loss_fn)(z, y)).detach()


def jacobian(z: Tensor, tensors: list[Any]) -> Tensor:
    """``(t, c, P)``, one backward pass per output."""
    rows = []
    for value in z.flatten():
        grads = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        row = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, tensors, strict=True)]
        rows.append(torch.cat([g.flatten() for g in row]))
    return torch.stack(rows).reshape(*z.shape, -1)


def ggn(problem: Problem) -> Tensor:
    """``J^T (d2 L / dz2) J`` with the Hessian of the loss itself, over all terms at once."""
    model = copy.deepcopy(problem.model)
    z, y = dataset_outputs(problem, model)
    J = jacobian(z, list(trainable(model).values())).flatten(0, 1)
    H = torch.func.hessian(lambda z: problem.loss_fn(z, y))(z.detach()).reshape(len(J), len(J))
    return J.T @ H @ J


def empirical_fisher(problem: Problem) -> Tensor:
    """``w sum_t g_t g_t^T``."""
    model = copy.deepcopy(problem.model)
    z, y = dataset_outputs(problem, model)
    J = jacobian(z, list(trainable(model).values()))
    leaf = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(summed(problem.loss_fn)(leaf, y), leaf)
    g = torch.einsum("tcp,tc->tp", J, slope)
    return term_weight(problem, z, y) * g.T @ g


def curvature(problem: Problem, kind: str) -> Tensor:
    return ggn(problem) if kind == "exact" else empirical_fisher(problem)


def flat_indices(model: nn.Module) -> dict[str, Tensor]:
    """Where the entries of each parameter lie in the flat vector, parameter-shaped."""
    out, start = {}, 0
    for name, p in trainable(model).items():
        out[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return out


def signals(problem: Problem, z: Tensor, y: Tensor, kind: str) -> Iterator[Tensor]:
    """What is sent back from the outputs ``z (t, c)`` of one example, one term at a time, in the scale of the sum."""
    loss = summed(problem.loss_fn)
    for t in range(len(z)):
        one, target = z[t : t + 1].detach(), y[t : t + 1]
        if kind == "exact":
            H = torch.func.hessian(lambda v, target=target: loss(v, target))(one).reshape(z.shape[1], z.shape[1])
            values, vectors = torch.linalg.eigh(H)
            columns = (vectors * values.clamp(min=0).sqrt()).T
        else:
            one.requires_grad_()
            columns = torch.autograd.grad(loss(one, target), one)[0]
        for column in columns:
            v = torch.zeros_like(z)
            v[t] = column
            yield v


class Call:
    """One call of a layer on one example: its output, and the input every output position sees."""

    def __init__(self, module: nn.Module, input: Tensor, output: Tensor) -> None:
        self.module, self.input, self.output = module, input.detach(), output
        self.weight: Tensor = module.weight  # type: ignore[assignment]
        self.groups = getattr(module, "groups", 1)

    def channels_last(self, x: Tensor) -> Tensor:
        """``(group, position, channel)`` of a tensor shaped as the output."""
        conv = isinstance(self.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]) if conv else x.reshape(-1, x.shape[-1])
        return rows.unflatten(-1, (self.groups, -1)).movedim(1, 0)

    def inputs(self) -> Tensor:
        """``a (group, position, d_in)``: by definition the derivative of ``y_c`` in row ``c`` of the weight."""
        y = self.channels_last(self.module.forward(self.input))
        per_group = y.shape[-1]
        a = []
        for group in range(self.groups):
            for s in range(y.shape[1]):
                (dw,) = torch.autograd.grad(y[group, s, 0], self.weight, retain_graph=True)
                a.append(dw[group * per_group].flatten())
        return torch.stack(a).reshape(self.groups, y.shape[1], -1)


def kfac(
    problem: Problem, kind: str, sharing: str = "expand", joint: bool = True, whole: bool = False, picks: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer: (B (group, o, o), A (group, i, i))}`` for every Linear and convolution, example by example.

    With ``whole`` the examples of a batch go through the model together (batch norm in train mode), and their rows are
    positions of each other.

    A position counts if its own loss term does, or if another one that does depends on it; where the model ``picks``
    some before its head, and has no units that are exactly off, only the latter. Several calls of a layer
    are further positions under ``expand``; under ``reduce`` each call is reduced by itself. ``auto`` is ``reduce`` for
    Linears and convolutions without overlap where an example has one loss term, and ``expand`` elsewhere.
    """
    model = copy.deepcopy(problem.model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0.0] for name in layers}  # B, A, number of rows in A
    z, y = dataset_outputs(problem, model)
    w = term_weight(problem, z, y)
    calls: dict[str, list[Call]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            calls[name].append(Call(module, inputs[0], output))
            return output.clone()  # whatever is done in place afterwards leaves ours alone

        module.register_forward_hook(hook)

    for name, module in layers.items():
        watch(name, module)
    for x, target in problem.data:
        for x_n, y_n in [(x, target)] if whole else examples(x, target):
            calls.clear()
            calls.update({name: [] for name in layers})
            z, y = as_terms(problem, run(model, x_n), y_n)
            sent = list(signals(problem, z, y, kind))
            counts = torch.stack([v.abs().sum(-1) > 0 for v in sent]).any(0)  # terms that are not ignored
            for name in layers:
                for call in calls[name]:
                    gs = [torch.autograd.grad(z, call.output, v, retain_graph=True, allow_unused=True)[0] for v in sent]
                    if all(g is None for g in gs):
                        continue
                    g = torch.stack([call.channels_last(torch.zeros_like(call.output) if g is None else g) for g in gs])
                    a = call.inputs()
                    if joint and call.module.bias is not None:
                        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
                    size = g.abs().amax(-1).amax(1).amax(0)  # (s,)
                    keep = size > 1e-14 * size.max()  # zero up to rounding, as behind the softmax of a single position
                    keep = keep | (counts if len(counts) == len(keep) else counts.any() and not picks)
                    a = a[:, keep]
                    m = call.module
                    dense = isinstance(m, nn.Linear) or (m.stride == m.kernel_size and set(m.dilation) == {1})
                    if sharing == "reduce" or (sharing == "auto" and dense and len(counts) == 1):
                        g, a = g.sum(2, keepdim=True), a.mean(1, keepdim=True)
                    sums[name][0] = sums[name][0] + torch.einsum("kgso,kgsp->gop", g, g)
                    sums[name][1] = sums[name][1] + torch.einsum("gsi,gsj->gij", a, a)
                    sums[name][2] += a.shape[1]
    return {name: (w * B, A / rows) for name, (B, A, rows) in sums.items() if rows}


def examples(x: Any, y: Tensor) -> Iterator[tuple[Any, Tensor]]:
    for n in range(len(y)):
        if isinstance(x, Mapping):
            yield {key: value[n : n + 1] for key, value in x.items()}, y[n : n + 1]
        elif isinstance(x, tuple):
            yield tuple(value[n : n + 1] for value in x), y[n : n + 1]
        else:
            yield x[n : n + 1], y[n : n + 1]


def kfac_block(model: nn.Module, name: str, B: Tensor, A: Tensor, joint: bool = True) -> tuple[Tensor, Tensor]:
    """``(indices, dense)``: a layer's Kronecker product (one per group) and where it lies in the flat vector."""
    where = flat_indices(model)
    weight = where[f"{name}.weight"]
    index = weight.reshape(len(B), -1, weight[0].numel())
    if joint and f"{name}.bias" in where:
        index = torch.cat([index, where[f"{name}.bias"].reshape(len(B), -1, 1)], -1)
    return index.flatten(), torch.block_diag(*(torch.kron(b, a) for b, a in zip(B, A, strict=True)))


def nearest_kronecker(dense: Tensor, m: int, n: int) -> Tensor:
    """The nearest ``(m x m) (x) (n x n)``: leading singular pair of the rearranged matrix (Van Loan)."""
    rearranged = dense.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
    U, S, Vh = torch.linalg.svd(rearranged)
    return torch.kron(S[0] * U[:, 0].reshape(m, m), Vh[0].reshape(n, n))
