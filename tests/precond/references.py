"""Naive float64 updates, written from the papers' equations with numpy, one parameter at a time.

Each takes the first value of a parameter and its gradients, and gives the values after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Trajectory = list[Array]


class SmallModel(nn.Module):
    """Parameters of every order: a convolution, matrices, vectors, a number."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.conv = nn.Conv2d(channels, 3, 2)
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7 + (p.ndim == 0)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.conv(x[:, : self.conv.in_channels])).mean((-2, -1))
        return self.scale * self.out(torch.tanh(self.hidden(features)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A new batch at every step, so that gradients have full rank and do not vanish."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(12, 4, generator=generator, dtype=torch.float64) + x.mean((1, 2, 3))[:, None]


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(step)
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def run(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 20, channels: int = 2) -> tuple[dict, dict]:
    """Train; gives the values of each parameter (before the first step and after each), and its gradients."""
    model = SmallModel(channels)
    optimizer = make(model)
    values = {name: [p.detach().numpy().copy()] for name, p in model.named_parameters()}
    gradients: dict[str, list[Array]] = {name: [] for name in values}
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for name, p in model.named_parameters():
            gradients[name].append(p.grad.numpy().copy())
        optimizer.step()
        for name, p in model.named_parameters():
            values[name].append(p.detach().numpy().copy())
    return values, gradients


def assert_equals_reference(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    reference: Callable[..., Iterator[Array]],
    options: dict[str, Any],
    steps: int = 20,
    tolerance: float = 1e-10,
    channels: int = 2,
    only: tuple[str, ...] | None = None,
) -> None:
    values, gradients = run(make, steps, channels)
    for name in only or values:
        observed = values[name]
        expected = list(reference(observed[0], gradients[name], **options))
        assert len(expected) == steps
        for step, (ours, theirs) in enumerate(zip(observed[1:], expected, strict=True), 1):
            error = np.abs(ours - theirs).max()
            assert error <= tolerance, f"{name} is {error:.1e} off after step {step}"
        assert np.abs(observed[-1] - observed[0]).max() > 1e-4, f"{name} did not move"


# Linear algebra from the definitions


def unfold(x: Array, axis: int) -> Array:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def along(x: Array, matrix: Array, axis: int) -> Array:
    return np.moveaxis(np.einsum("ij,j...->i...", matrix, np.moveaxis(x, axis, 0)), 0, axis)


def symmetric_power(matrix: Array, exponent: float, floor: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.maximum(values, floor) ** exponent) @ vectors.T


def tiles(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    yield from product(*[[slice(i, i + size) for i in range(0, n, size)] for n in shape])


# Methods


def adam(theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, decay: float = 0.0) -> Iterator:
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        theta = (1 - lr * decay) * theta - lr * step
        yield theta


def soap(
    theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, period: int, decay: float = 0.0
) -> Iterator:
    if theta.ndim < 2:
        yield from adam(theta, gradients, lr, betas, eps, decay)
        return
    axes = range(theta.ndim)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    factors = [np.zeros((n, n)) for n in theta.shape]
    for t, g in enumerate(gradients, 1):
        if t == 1:
            factors = [(1 - betas[1]) * unfold(g, k) @ unfold(g, k).T for k in axes]
            bases = [np.linalg.eigh(f)[1] for f in factors]

        def rotated(x, bases=bases):
            for k in axes:
                x = along(x, bases[k].T, k)
            return x

        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * rotated(g) ** 2
        step = rotated(m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        for k in axes:
            step = along(step, bases[k], k)
        theta = (1 - lr * decay) * theta - lr * step
        yield theta
        if t > 1:
            factors = [betas[1] * f + (1 - betas[1]) * unfold(g, k) @ unfold(g, k).T for k, f in enumerate(factors)]
            if t % period == 0:
                for k in axes:
                    order = np.argsort(-np.diag(bases[k].T @ factors[k] @ bases[k]))
                    # The square root of the rounding errors keeps null directions apart from rounding errors.
                    shift = 1e-6 * np.linalg.norm(factors[k])
                    sorted_basis = bases[k][:, order]
                    bases[k] = np.linalg.qr(factors[k] @ sorted_basis + shift * sorted_basis)[0]
                    v = np.take(v, order, axis=k)


def shampoo(
    theta: Array,
    gradients: list[Array],
    lr: float,
    betas: tuple,
    ema: float,
    floor: float,
    eps: float,
    grafting: str | None,
    period: int,
    block: int,
    start: int = 1,
    exponent: float | None = None,
) -> Iterator:
    shape = theta.shape or (1,)
    m, squares = np.zeros(shape), np.zeros(shape)
    regions = list(tiles(shape, block))
    factors = {(b, k): 0.0 for b in range(len(regions)) for k in range(len(shape))}
    roots: dict = {}
    for t, g in enumerate(gradients, 1):
        g = g.reshape(shape)
        m = betas[0] * m + (1 - betas[0]) * g
        hat = m / (1 - betas[0] ** t)
        squares = squares + g**2 if grafting == "adagrad" else betas[1] * squares + (1 - betas[1]) * g**2
        graft = {
            None: hat,
            "sgd": hat,
            "adagrad": hat / (np.sqrt(squares) + eps),
            "rmsprop": hat / (np.sqrt(squares) + eps),
            "adam": hat / (np.sqrt(squares / (1 - betas[1] ** t)) + eps),
        }[grafting]
        step = np.zeros(shape)
        for b, region in enumerate(regions):
            for k in range(len(shape)):
                outer = unfold(g[region], k) @ unfold(g[region], k).T
                factors[b, k] = factors[b, k] + outer if ema == 1 else ema * factors[b, k] + (1 - ema) * outer
                if t in (1, start) or t % period == 0:
                    weight = 1 if ema == 1 else 1 - ema**t
                    power = exponent or -1 / (2 * len(shape))
                    roots[b, k] = symmetric_power(factors[b, k] / weight, power, floor)
            d = hat[region]
            for k in range(len(shape)):
                d = along(d, roots[b, k], k)
            if grafting:
                d = d * np.linalg.norm(graft[region]) / np.linalg.norm(d)
            step[region] = graft[region] if t < start else d
        theta = theta - lr * step.reshape(theta.shape)
        yield theta


def corrected_shampoo(
    theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, period: int
) -> Iterator:
    shape = theta.shape or (1,)
    axes = range(len(shape))
    m, v = np.zeros(shape), np.zeros(shape)
    factors = [np.zeros((n, n)) for n in shape]
    bases = [np.eye(n) for n in shape]
    for t, g in enumerate(gradients, 1):
        g = g.reshape(shape)
        m = betas[0] * m + (1 - betas[0]) * g
        factors = [betas[1] * f + (1 - betas[1]) * unfold(g, k) @ unfold(g, k).T for k, f in enumerate(factors)]
        if t == 1 or t % period == 0:
            for k in axes:
                new = np.linalg.eigh(factors[k])[1]
                v = along(v, (new.T @ bases[k]) ** 2, k)
                bases[k] = new
        rotated_g, step = g, m / (1 - betas[0] ** t)
        for k in axes:
            rotated_g, step = along(rotated_g, bases[k].T, k), along(step, bases[k].T, k)
        v = betas[1] * v + (1 - betas[1]) * rotated_g**2
        step = step / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        for k in axes:
            step = along(step, bases[k], k)
        theta = theta - lr * step.reshape(theta.shape)
        yield theta


def muon(
    theta: Array,
    gradients: list[Array],
    lr: float,
    momentum: float,
    nesterov: bool,
    scale: Callable[[int, int], float],
    coefficients: list[tuple],
    betas: tuple,
    eps: float,
    decay: float = 0.0,
) -> Iterator:
    if theta.ndim < 2:
        yield from adam(theta, gradients, lr, betas, eps, decay)
        return
    buffer = np.zeros_like(theta)
    for g in gradients:
        buffer = momentum * buffer + (1 - momentum) * g
        x = ((1 - momentum) * g + momentum * buffer if nesterov else buffer).reshape(len(theta), -1)
        rows, columns = x.shape
        # A matrix polynomial p(X X^T) X acts on the singular values alone.
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        s = s / np.linalg.norm(s)
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
        theta = (1 - lr * decay) * theta - lr * scale(rows, columns) * (u @ np.diag(s) @ vh).reshape(theta.shape)
        yield theta


def soap_muon(
    theta: Array,
    gradients: list[Array],
    lr: float,
    momentum: float,
    nesterov: bool,
    ema: float,
    betas: tuple,
    eps: float,
    period: int,
    coefficients: list[tuple],
    decay: float = 0.0,
) -> Iterator:
    if theta.ndim < 2:
        yield from adam(theta, gradients, lr, betas, eps, decay)
        return
    m = v = 0.0
    left = right = 0.0
    for t, g in enumerate(gradients, 1):
        matrix = g.reshape(len(theta), -1)
        if t == 1:
            left, right = (1 - ema) * matrix @ matrix.T, (1 - ema) * matrix.T @ matrix
            ql, qr = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        m = momentum * m + (1 - momentum) * matrix
        n = (1 - momentum) * matrix + momentum * m if nesterov else m
        v = ema * v + (1 - ema) * (ql.T @ matrix @ qr) ** 2
        whitened = (ql.T @ n @ qr) / (np.sqrt(v / (1 - ema**t)) + eps)
        # A matrix polynomial p(X X^T) X acts on the singular values alone.
        u, s, vh = np.linalg.svd(ql @ whitened @ qr.T, full_matrices=False)
        s = s / np.linalg.norm(s)
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
        step = 0.2 * max(matrix.shape) ** 0.5 * u @ np.diag(s) @ vh
        theta = (1 - lr * decay) * theta - lr * step.reshape(theta.shape)
        yield theta
        if t > 1:
            left = ema * left + (1 - ema) * matrix @ matrix.T
            right = ema * right + (1 - ema) * matrix.T @ matrix
            if t % period == 0:
                ql, rows = improved(left, ql)
                qr, columns = improved(right, qr)
                v = v[rows][:, columns]


def improved(factor: Array, basis: Array) -> tuple[Array, Array]:
    """One step of orthogonal iteration with columns by falling eigenvalue, and that order."""
    order = np.argsort(-np.diag(basis.T @ factor @ basis))
    shift = 1e-6 * np.linalg.norm(factor)
    return np.linalg.qr(factor @ basis[:, order] + shift * basis[:, order])[0], order


def kl_shampoo(
    theta: Array, gradients: list[Array], lr: float, betas: tuple, eps: float, period: int, warm: bool
) -> Iterator:
    if theta.ndim < 2:
        yield from adam(theta, gradients, lr, betas, eps)
        return
    axes = range(theta.ndim)
    m = np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        if t == 1:
            scale = np.mean(g**2) ** (1 / theta.ndim)
            factors = [scale * np.eye(n) for n in theta.shape]
            values = [scale * np.ones(n) for n in theta.shape]
            bases = [np.eye(n) for n in theta.shape]
        old = min(betas[1], t / (t + 1)) if warm else betas[1]
        floored = [np.maximum(s, eps * s.mean()) for s in values]
        new_factors, new_values = [], []
        for k in axes:
            whitened = g
            for j in axes:
                if j != k:
                    whitened = along(whitened, bases[j] @ np.diag(floored[j] ** -0.5) @ bases[j].T, j)
            change = unfold(whitened, k) @ unfold(whitened, k).T * theta.shape[k] / theta.size
            new_factors.append(old * factors[k] + (1 - old) * change)
            new_values.append(old * values[k] + (1 - old) * np.diag(bases[k].T @ change @ bases[k]))
        factors, values = new_factors, new_values
        if t == 1 or t % period == 0:
            for k in axes:
                order = np.argsort(-np.diag(bases[k].T @ factors[k] @ bases[k]))
                shift = 1e-6 * np.linalg.norm(factors[k])
                image = factors[k] @ bases[k] + shift * bases[k]
                new = np.empty_like(image)
                new[:, order] = np.linalg.qr(image[:, order])[0]
                bases[k] = new
        step = m / (1 - betas[0] ** t)
        for k in axes:
            s = np.maximum(values[k], eps * values[k].mean())
            step = along(step, bases[k] @ np.diag(s**-0.5) @ bases[k].T, k)
        theta = theta - lr * step
        yield theta


def splus(theta: Array, gradients: list[Array], lr: float, betas: tuple, vector_scale: float, period: int) -> Iterator:
    m = np.zeros_like(theta)
    left = right = 0.0
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        if theta.ndim < 2:
            theta = theta - lr * vector_scale * np.sign(m)
            yield theta
            continue
        matrix = g.reshape(len(theta), -1)
        left = betas[1] * left + (1 - betas[1]) * matrix @ matrix.T
        right = betas[1] * right + (1 - betas[1]) * matrix.T @ matrix
        if t == 1 or t % period == 0:
            ql, qr = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        rotated = ql.T @ m.reshape(matrix.shape) @ qr
        signs = np.where(np.abs(rotated) > 64 * np.finfo(float).eps * np.abs(rotated).max(), np.sign(rotated), 0)
        theta = theta - lr * 2 / sum(matrix.shape) * (ql @ signs @ qr.T).reshape(theta.shape)
        yield theta


# Methods with a closure: one step at a time, from dense derivatives


def flat_loss(model: nn.Module, step: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the flat parameter vector, and that vector."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    x, y = batch(step)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        values = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return (torch.func.functional_call(model, values, (x,)) - y).square().mean()

    return loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_steps_equal(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    expected: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    steps: int = 20,
    tolerance: float = 1e-10,
) -> None:
    """Compare each step with ``expected(step, theta, gradient, Hessian)``, the flat parameters after it."""
    model = SmallModel()
    optimizer = make(model)
    for step in range(1, steps + 1):
        loss, theta = flat_loss(model, step)
        after = expected(step, theta, torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta))
        optimizer.step(lambda step=step: loss_of(model, step))
        ours = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        error = (ours - after).abs().max().item()
        assert error <= tolerance, f"{error:.1e} off after step {step}"
        assert (ours - theta).abs().max() > 1e-6, f"step {step} moved nothing"


class KroneckerDescent:
    """PSGD's factors for one parameter: full matrices, or diagonals for vectors; criterion E[h'Ph + v'P^-1 v]."""

    def __init__(self, shape: tuple[int, ...], rate: float, damping: float, eps: float) -> None:
        self.shape = shape
        self.rate, self.damping, self.eps = rate, damping, eps
        self.roots = [np.eye(n) for n in shape]
        self.bounds = [0.0 for _ in shape]
        self.updates = 0

    def precondition(self, x: Array) -> Array:
        for k, q in enumerate(self.roots):
            x = along(x, q.T @ q, k)
        return x

    def update(self, h: Array, v: Array | None) -> None:
        diagonal = len(self.shape) == 1
        noise = self.damping + self.eps * np.sqrt(np.mean(h**2))
        if self.updates == 0:
            scale = (np.mean(h**4) ** (1 / 4) + noise) ** (-1 / 2) * (1 if v is None else np.mean(v**4) ** (1 / 8))
            self.roots = [q * scale ** (1 / len(self.shape)) for q in self.roots]
        self.updates += 1
        metrics = [q.T @ q for q in self.roots]
        image = self.precondition(h)
        for k, q in enumerate(self.roots):
            others = np.prod([np.sum(m**2) for j, m in enumerate(metrics) if j != k])
            c = unfold(image, k) @ unfold(image, k).T + noise**2 * others * metrics[k] @ metrics[k]
            t = h.size / len(q) * np.eye(len(q)) if v is None else unfold(v, k) @ unfold(v, k).T
            if diagonal:
                c, t = np.diag(np.diag(c)), np.diag(np.diag(t))
            size = self.norm(c) + np.max(t) if v is None else self.norm(c + t)
            self.bounds[k] = max(size, 0.9 * self.bounds[k] + 0.1 * size)
            q = q - self.rate / self.bounds[k] * (c - t) @ q
            self.roots[k] = q if diagonal else self.turn(q)

    @staticmethod
    def norm(matrix: Array) -> float:
        x = matrix[:, np.argmax(np.diag(matrix))]
        for _ in range(2):
            x = matrix @ x / np.linalg.norm(x)
        return float(np.linalg.norm(x))

    @staticmethod
    def turn(q: Array) -> Array:
        r = q.T - q
        r = r / (np.linalg.norm(r) / np.sqrt(2) or 1.0)
        slope, bend = np.trace(r @ q), np.trace(r @ r @ q)
        a = min(-slope / bend, 1 / 8) if bend < 0 else 1 / 8
        return q + a * r @ q + a**2 / 2 * r @ r @ q


def psgd(
    theta: Array, gradients: list[Array], lr: float, beta: float, rate: float, damping: float, eps: float, bound: float
) -> Iterator:
    shape = theta.shape or (1,)
    factors = KroneckerDescent(shape, rate, damping, eps)
    m = np.zeros(shape)
    for t, g in enumerate(gradients, 1):
        g = g.reshape(shape)
        m = beta * m + (1 - beta) * g
        if t == 1 or t % 2 == 0:
            factors.update(g, None)
        step = factors.precondition(m / (1 - beta**t))
        step = step * min(1, bound / np.sqrt(np.mean(step**2)))
        theta = theta - lr * step.reshape(theta.shape)
        yield theta


def gauss_newton_matrix(model: nn.Module, step: int) -> Tensor:
    """``2 / (N C) J^T J`` of the mean square error on the flat parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    x, y = batch(step)

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, values, (x,)).reshape(-1)

    jacobian = torch.func.jacrev(outputs)(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return 2 / y.numel() * jacobian.mT @ jacobian
