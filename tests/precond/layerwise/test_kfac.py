"""Are the steps of KFAC and EKFAC those of the formulas, written out?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KFAC, Loop, Momentum, PreconditionedOptimizer, Refresh, TrustRegion
from tests.curvature.loops import assert_same, batch, mlp, statistics

LR, MOMENTUM, DECAY, DAMPING, EMA = 0.2, 0.8, 0.05, 3e-2, 0.7


def eigh(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix)[1]


class Layer:
    """One linear layer ``[W, b]`` by the book: its factors, basis and spectrum as weighted means over the steps."""

    def __init__(self) -> None:
        self.A: Any = None
        self.B: Any = None
        self.s: Any = None
        self.QA: Any = None
        self.QB: Any = None
        self.w = 0.0

    def observe(self, a: Tensor, gs: list[Tensor]) -> None:
        """Inputs ``(n, i)`` and one ``(n, o)`` per column of the loss's Hessian."""
        n = len(a)
        A, B = a.T @ a / n, sum(g.T @ g for g in gs) / n
        w = EMA * self.w + 1
        self.A = A if self.A is None else (EMA * self.w * self.A + A) / w
        self.B = B if self.B is None else (EMA * self.w * self.B + B) / w
        if self.QA is None:
            self.QA, self.QB = eigh(self.A), eigh(self.B)
        s = sum(((g @ self.QB) ** 2).T @ ((a @ self.QA) ** 2) for g in gs) / n
        self.s = s if self.s is None else (EMA * self.w * self.s + s) / w
        self.w = w

    def turn(self) -> None:
        """Take the new eigenbasis; the spectrum is carried over by the squares of the rotation."""
        QA, QB = eigh(self.A), eigh(self.B)
        self.s = (QB.T @ self.QB) ** 2 @ self.s @ ((QA.T @ self.QA) ** 2).T
        self.QA, self.QB = QA, QB


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # the inverse, and what it inverts


def kfac_inverse(layer: Layer) -> Pair:
    pi = ((layer.A.trace() / len(layer.A)) / (layer.B.trace() / len(layer.B))).sqrt()
    A = layer.A + pi * DAMPING**0.5 * torch.eye(len(layer.A)).double()
    B = layer.B + DAMPING**0.5 / pi * torch.eye(len(layer.B)).double()
    return lambda G: torch.linalg.inv(B) @ G @ torch.linalg.inv(A), lambda V: B @ V @ A


def ekfac_inverse(layer: Layer) -> Pair:
    QA, QB, s = layer.QA, layer.QB, layer.s.clone()
    return (
        lambda G: QB @ ((QB.T @ G @ QA) / (s + DAMPING)) @ QA.T,
        lambda V: QB @ ((QB.T @ V @ QA) * (s + DAMPING)) @ QA.T,
    )


def by_the_book(
    method: str,
    batches: list[tuple[Tensor, Tensor]],
    statistics_period: int,
    inverse_period: int,
    kl_clip: float | None,
    of: str = "move",
) -> list[Tensor]:
    model = mlp()
    first, last = model[0], model[2]
    params: list[Tensor] = list(model.parameters())
    buffers: list[Any] = [None] * 4
    layers, inverses = [Layer(), Layer()], list[Any]([None, None])
    for t, (x, y) in enumerate(batches):
        h = first(x)
        a = h.tanh()
        z = last(a)
        grads = torch.autograd.grad(nn.functional.cross_entropy(z, y), params, retain_graph=True)
        if t % statistics_period == 0:
            p = z.softmax(-1).detach()
            columns = [p[:, c : c + 1].sqrt() * (torch.eye(3).double()[c] - p) for c in range(3)]
            back = [torch.autograd.grad(z, h, v, retain_graph=True)[0] for v in columns]
            one = torch.ones(len(x), 1).double()
            layers[0].observe(torch.cat([x, one], 1), back)
            layers[1].observe(torch.cat([a.detach(), one], 1), columns)
            for i, layer in enumerate(layers):
                if method == "kfac" and t % inverse_period == 0:
                    inverses[i] = kfac_inverse(layer)
                if method == "ekfac":
                    if t % inverse_period == 0 and t > 0:
                        layer.turn()
                    inverses[i] = ekfac_inverse(layer)
        directions = []
        for i, (inverse, _) in enumerate(inverses):
            D = inverse(torch.cat([grads[2 * i], grads[2 * i + 1].unsqueeze(1)], 1))
            directions += [D[:, :-1], D[:, -1]]
        if kl_clip is not None:
            total = LR**2 * sum((d * g).sum() for d, g in zip(directions, grads, strict=True))
            directions = [d * min(1.0, (kl_clip / total) ** 0.5) for d in directions]
        buffers = [d if v is None else MOMENTUM * v + d for v, d in zip(buffers, directions, strict=True)]
        scale = 1.0
        if kl_clip is not None and of == "move":
            length = 0.0
            for i, (_, metric) in enumerate(inverses):
                V = torch.cat([buffers[2 * i], buffers[2 * i + 1].unsqueeze(1)], 1)
                length += LR**2 * float((V * metric(V)).sum())
            scale = min(1.0, (kl_clip / length) ** 0.5)
        with torch.no_grad():
            for p, v in zip(params, buffers, strict=True):
                p.copy_((1 - LR * DECAY) * p - LR * scale * v)
    return params


BATCHES = [batch(16, seed) for seed in range(10)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, batches: Any = BATCHES) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    for p, q in zip(actual, expected, strict=True):
        assert (p - q).abs().max() < rtol * q.abs().max()


@pytest.mark.parametrize(
    ("kl_clip", "of"), [(None, "move"), (1e-3, "move"), (1e-3, "direction")], ids=["free", "bounded", "direction"]
)
@pytest.mark.parametrize(("statistics_period", "inverse_period"), [(1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_ten_steps_are_those_of_the_formulas(
    method: str, statistics_period: int, inverse_period: int, kl_clip: float | None, of: Any
) -> None:
    expected = by_the_book(method, BATCHES, statistics_period, inverse_period, kl_clip, of)
    start = list(mlp().parameters())
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(expected, start, strict=True))
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = {"kfac": KFAC, "ekfac": EKFAC}[method](
        model,
        loss_fn,
        lr=LR,
        damping=DAMPING,
        fisher="exact",
        momentum=MOMENTUM,
        weight_decay=DECAY,
        curvature_ema=EMA,
        kl_clip=None if kl_clip is None else TrustRegion(kl_clip, of=of),
        curvature_update_period=statistics_period,
        inverse_update_period=Refresh(inverse_period, stagger=False),
    )
    train(model, optimizer, loss_fn)
    close(model.parameters(), expected)


def test_nesterov_and_maximize_are_those_of_sgd() -> None:
    """With damping so large that C vanishes, a step is SGD's with lr / damping."""
    model, other, loss_fn = mlp(), mlp(), nn.CrossEntropyLoss()
    lam = 1e16
    optimizer = KFAC(
        model, loss_fn, lr=0.1 * lam, damping=lam, momentum=Momentum(0.9, nesterov=True), maximize=True, kl_clip=None
    )
    train(model, optimizer, loss_fn)
    train(other, torch.optim.SGD(other.parameters(), 0.1, 0.9, nesterov=True, maximize=True), loss_fn)
    close(model.parameters(), other.parameters(), 1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.7, 0.95])
def test_statistics_are_the_written_out_weighted_mean(ema: float) -> None:
    """Newest step: weight one; each older one: a factor ``ema``; the sum of the weights divides. From step one on."""
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    options: dict[str, Any] = {"lr": 0.0, "fisher": "exact", "curvature_update_period": 1}
    single, running = [], KFAC(model, loss_fn, curvature_ema=ema, **options)
    for k, pair in enumerate(BATCHES[:4], 1):
        fresh = KFAC(model, loss_fn, lr=0.0, fisher="exact")
        train(model, fresh, loss_fn, [pair])
        single.append({name: factors(fresh, name) for name in fresh.preconditioners})
        fresh.detach()
        train(model, running, loss_fn, [pair])
        weights = [ema ** (k - 1 - i) for i in range(k)]
        for name in running.preconditioners:
            for side, factor in enumerate(factors(running, name)):
                mean: Any = sum(w * step[name][side] for w, step in zip(weights, single, strict=True)) / sum(weights)
                assert_same({"factor": factor}, {"factor": mean})


def factors(optimizer: PreconditionedOptimizer, name: str) -> list[Tensor]:
    operator: Any = optimizer.preconditioners[name].estimator.operator()
    return [factor.to_dense() for factor in operator.factors]


# Periods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_only_every_third_step_is_recorded(capture: Any) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.01, curvature_update_period=3, loop=Loop(capture=capture))
    passes, changed = [], []
    before: dict[str, Tensor] = {}
    for pair in BATCHES[:7]:
        count: list[int] = []
        handle = model[0].register_forward_hook(lambda *_, count=count: count.append(1))
        loss = loss_fn(model(pair[0]), pair[1])
        recorded = bool(optimizer.tape.passes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.remove()
        now = statistics(optimizer)
        changed.append(not before or any(not torch.equal(now[name], before[name]) for name in now))
        passes.append((recorded, len(count)))
        before = now
    extra = 2 if capture == "shadow" else 1  # a shadow pass repeats the forward pass, a watched one nothing
    assert passes == [(True, extra), (False, 1), (False, 1)] * 2 + [(True, extra)]
    assert changed == [True, False, False] * 2 + [True]


def test_inverses_change_with_their_own_period() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.01, inverse_update_period=Refresh(3, stagger=False))
    seen = []
    for pair in BATCHES[:7]:
        train(model, optimizer, loss_fn, [pair])
        seen.append(optimizer.preconditioners["2.weight+2.bias"].inverse)
    changed = [a is not b for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True] * 2
