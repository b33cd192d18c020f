"""C of a training step is the curvature of the loss whose gradient stands in ``p.grad``, whatever the loop did.

Every loop runs on every model; what it asks for is written down as ``(x, y, weights of the terms)`` and summed up by
one backward pass for each number of the output.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from precond import PreconditionedOptimizer
from tests.curvature.loops import assert_same, statistics, watching
from tests.curvature.problems import classes, normal

MEAN = nn.CrossEntropyLoss()
EACH = nn.CrossEntropyLoss(reduction="none")

#: What counts: inputs, targets, and the weight of every term.
Counts = list[tuple[Tensor, Tensor, Tensor]]
Loop = Callable[[nn.Module, nn.Module, PreconditionedOptimizer], Counts]


class Gated(nn.Module):
    """A branch that is closed at first: a gate that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.branch, self.gate = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.gate * self.branch(x).tanh()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x + self.inner(x).tanh()))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "in place": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "residual": Residual,
    "gated": Gated,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)),
}


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return normal(n, 4), classes(n, of=3)


def mean(x: Tensor, y: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return x, y, torch.full((len(x),), weight / len(x), dtype=torch.float64)


# Loops; each ends where step() is to be called ----------------------------------------------------------------------


def plain(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    loss_fn(model(x), y).backward()
    return [mean(x, y)]


def unequal_micro_batches(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(8)
    for part in (slice(0, 1), slice(1, 4), slice(4, 8)):
        (loss_fn(model(x[part]), y[part]) * len(x[part]) / 8).backward()
    return [mean(x, y)]


def mixed_targets(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Mixup."""
    x, y = batch(6)
    other = y.flip(0)
    z = model(x)
    (0.3 * loss_fn(z, y) + 0.7 * loss_fn(z, other)).backward()
    return [mean(x, y, 0.3), mean(x, other, 0.7)]


def dropped_batch(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """A guard against spikes: no backward pass."""
    x, y = batch(5, seed=1)
    loss_fn(model(1e3 * x), y)
    return plain(model, loss_fn, optimizer)


def not_finite_batch(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(5, seed=1)
    loss = loss_fn(model(x * float("nan")), y)
    assert not loss.isfinite()
    return plain(model, loss_fn, optimizer)


def logged_only(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """A further loss that is computed on the same pass, for a log."""
    x, y = batch(6)
    z = model(x)
    loss_fn(z, y).backward()
    loss_fn(2 * z.detach(), y)
    loss_fn(2 * z, y)
    return [mean(x, y)]


def cleared_gradients(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """A batch whose gradients are thrown away."""
    x, y = batch(5, seed=1)
    loss_fn(model(x), y).backward()
    optimizer.zero_grad()
    return plain(model, loss_fn, optimizer)


def gradients_set_to_zero(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(5, seed=1)
    loss_fn(model(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    return plain(model, loss_fn, optimizer)


def retried(where: str) -> Loop:
    """The batch again, after memory ran out in its backward pass."""

    def loop(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
        x, y = batch(6)
        target = list(model.parameters())[0 if where == "at the end" else -1]
        handle = target.register_hook(fail)
        with contextlib.suppress(torch.OutOfMemoryError):
            loss_fn(model(x), y).backward()
        handle.remove()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        return [mean(x, y)]

    return loop


def fail(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("simulated")


def interrupted_forward(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """As in a notebook."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = list(model.modules())[-1].register_forward_pre_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        model(batch(5, seed=1)[0])
    handle.remove()
    return plain(model, loss_fn, optimizer)


def penalty_on_the_input(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """torch.autograd.grad through the pass, for a number that is only looked at."""
    x, y = batch(6)
    x.requires_grad_()
    loss = loss_fn(model(x), y)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    return [mean(x.detach(), y)]


def slope_penalty(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Differentiated twice; like all penalties it is in the gradient, and no loss of which C would be the curvature."""
    x, y = batch(6)
    loss = loss_fn(model(x.requires_grad_()), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 0.5 * slope.square().sum()).backward()
    return [mean(x.detach(), y)]


def output_penalty(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Something else on the same output, which is compared with nothing."""
    x, y = batch(6)
    z = model(x)
    (loss_fn(z[:4], y[:4]) + 0.5 * z.square().mean()).backward()
    return [mean(x[:4], y[:4])]


def adversarial_examples(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(model(x), y), x)
    x = (x + 0.1 * slope.sign()).detach()
    loss_fn(model(x), y).backward()
    return [mean(x, y)]


def weights_of_examples(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 3.0]).double()
    (EACH(model(x), y) * weights).mean().backward()
    return [(x, y, weights / 6)]


def hardest_examples(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    losses = EACH(model(x), y)
    hardest = losses.detach().topk(3).indices
    losses[hardest].mean().backward()
    return [mean(x[hardest], y[hardest])]


def picked_outputs(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Only some rows of the output have a label."""
    x, y = batch(6)
    labelled = torch.tensor([True, False, True, True, False, True])
    loss_fn(model(x)[labelled], y[labelled]).backward()
    return [mean(x[labelled], y[labelled])]


def sliced_outputs(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    loss_fn(model(x)[:-2], y[:-2]).backward()
    return [mean(x[:-2], y[:-2])]


def two_passes_in_the_other_order(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    (x, y), (u, v) = batch(4), batch(3, seed=1)
    z, w = model(x), model(u)
    second = loss_fn(w, v)
    (loss_fn(z, y) + 0.25 * second).backward()
    return [mean(x, y), mean(u, v, 0.25)]


def two_backward_passes(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()
    return [mean(x, y, 1.5)]


def power_of_the_loss(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Flooding and the like: the weight of the loss is a derivative."""
    x, y = batch(6)
    loss = loss_fn(model(x), y)
    loss.square().backward()
    return [mean(x, y, 2 * float(loss.detach()))]


def evaluated_in_between(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    x, y = batch(6)
    loss = loss_fn(model(x), y)
    model.eval()
    with torch.no_grad():
        loss_fn(model(batch(5, seed=1)[0]), batch(5, seed=1)[1])
    model.train()
    loss.backward()
    return [mean(x, y)]


def vectorised_derivatives(model: nn.Module, loss_fn: nn.Module, optimizer: PreconditionedOptimizer) -> Counts:
    """Jacobians and gradients of single examples for the log, before the backward pass and from its own graph."""
    x, y = batch(6)
    named = dict(model.named_parameters())
    jacrev(lambda p: loss_fn(functional_call(model, p, (x,)), y))(named)
    single = grad(lambda p, a, b: loss_fn(functional_call(model, p, (a.unsqueeze(0),)), b.unsqueeze(0)))
    vmap(single, in_dims=(None, 0, 0), randomness="different")(named, x, y)
    z = model(x)
    loss = loss_fn(z, y)
    options = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
    torch.autograd.grad(z, list(named.values()), torch.ones(2, *z.shape, dtype=z.dtype), **options)
    torch.autograd.grad(loss, list(named.values()), torch.ones(2, dtype=z.dtype), **options)
    loss.backward()
    return [mean(x, y)]


MEANS: dict[str, Loop] = {
    "plain": plain,
    "unequal micro-batches": unequal_micro_batches,
    "mixed targets": mixed_targets,
    "a dropped batch": dropped_batch,
    "a batch that is not finite": not_finite_batch,
    "a loss for the log": logged_only,
    "cleared gradients": cleared_gradients,
    "gradients set to zero": gradients_set_to_zero,
    "retried, out of memory at the end": retried("at the end"),
    "retried, out of memory at the start": retried("at the start"),
    "interrupted forward": interrupted_forward,
    "a slope in the input": penalty_on_the_input,
    "a slope as a penalty": slope_penalty,
    "a penalty on the output": output_penalty,
    "adversarial examples": adversarial_examples,
    "picked outputs": picked_outputs,
    "sliced outputs": sliced_outputs,
    "two passes in the other order": two_passes_in_the_other_order,
    "two backward passes": two_backward_passes,
    "a power of the loss": power_of_the_loss,
    "evaluated in between": evaluated_in_between,
    "vectorised derivatives": vectorised_derivatives,
}
SINGLE: dict[str, Loop] = {"weights of examples": weights_of_examples, "hardest examples": hardest_examples}
LOOPS = {**MEANS, **SINGLE}


def reference(model: nn.Module, counts: Counts, kind: str) -> dict[str, Tensor]:
    """Diagonal of ``sum_t w_t J_t^T H_t J_t`` or of ``sum_t w_t g_t g_t^T``, by parameter."""
    named = dict(model.named_parameters())
    out = {name: torch.zeros_like(p) for name, p in named.items()}
    for x, y, weights in counts:
        for row, target, weight in zip(x, y, weights, strict=True):
            z = model(row.unsqueeze(0))[0]
            p = z.softmax(0).detach()
            directions = (p - F.one_hot(target, 3)).unsqueeze(0)
            if kind == "exact":
                directions = p.sqrt().unsqueeze(1) * (torch.eye(3, dtype=p.dtype) - p)  # columns of a root of H
            for v in directions:
                slopes = torch.autograd.grad(z, list(named.values()), v, retain_graph=True, allow_unused=True)
                for name, g in zip(named, slopes, strict=True):
                    if g is not None:
                        out[name] += weight * g.square()
    return out


def diagonals(optimizer: PreconditionedOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """The diagonals of the blocks, by parameter."""
    named, out = dict(model.named_parameters()), {}
    for block, C in statistics(optimizer).items():
        names = block.split("+")
        weight = named[names[0]]
        if len(names) == 2:
            rows = C.diagonal().reshape(len(named[names[1]]), -1)
            out[names[0]], out[names[1]] = rows[:, :-1].reshape(weight.shape), rows[:, -1]
        else:
            out[names[0]] = C.diagonal().reshape(weight.shape)
    return out


#: Every loop with every model for one kind, every loop with every second model for the other, which takes longer.
CASES = [("empirical", loop, name) for loop in LOOPS for name in MODELS]
CASES += [("exact", loop, name) for i, loop in enumerate(LOOPS) for j, name in enumerate(MODELS) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("kind", "loop", "name"), CASES)
def test_c_is_the_curvature_of_what_was_minimised(loop: str, name: str, kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    loss_fn = EACH if loop in SINGLE else MEAN
    optimizer = watching(model, loss_fn, "diagonal", kind, curvature_ema=0.0)
    for _ in range(2):  # the second time nothing is new
        optimizer.zero_grad()
        counts = LOOPS[loop](model, loss_fn, optimizer)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        expected = reference(model, counts, kind)
        found = diagonals(optimizer, model)
        for parameter, block in expected.items():
            torch.testing.assert_close(found[parameter], block, rtol=1e-9, atol=1e-13)
        for n, p in model.named_parameters():
            assert p.grad is None or torch.equal(p.grad, gradients[n])
    optimizer.detach()


class Own(nn.Module):
    """Computes its own loss, and returns a detached copy of the output for the log; or some activations as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        h = self.inner(x).tanh()
        z = self.last(h)
        return (z, h) if y is None else {"loss": F.cross_entropy(z, y), "logits": z.detach()}


OUTPUTS: dict[str, Any] = {"detached logits": None, "activations": lambda result: result[0]}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("returns", OUTPUTS)
def test_what_else_a_model_returns_takes_no_part(returns: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Own().double()
    optimizer = watching(model, MEAN, "diagonal", kind, curvature_ema=0.0, output=OUTPUTS[returns])
    x, y = batch(6)
    if returns == "detached logits":
        model(x, y)["loss"].backward()
    else:
        z, h = model(x)
        (MEAN(z, y) + h.square().mean()).backward()
    optimizer.step()
    optimizer.detach()
    found = diagonals(optimizer, model)
    for parameter, block in reference(nn.Sequential(model.inner, nn.Tanh(), model.last), [mean(x, y)], kind).items():
        name = parameter.replace("0.", "inner.").replace("2.", "last.")
        torch.testing.assert_close(found[name], block, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loop", MEANS)
def test_the_users_own_run_is_bit_identical(loop: str) -> None:
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = watching(model, MEAN, "kfac", "mc")
        if not watched:
            optimizer.detach()
        MEANS[loop](model, MEAN, optimizer)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None] + [torch.get_rng_state()])
        optimizer.detach()
    for plain_value, watched_value in zip(*found, strict=True):
        assert torch.equal(plain_value, watched_value)


def test_threads_with_a_model_each_are_independent() -> None:
    expected, found, failures = {}, {}, []

    def train(seed: int, out: dict[int, Any]) -> None:
        try:
            model = MODELS["mlp"]().double()
            with torch.no_grad():
                for k, p in enumerate(model.parameters()):
                    p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).sin().reshape(p.shape) / (k + seed))
            loss_fn = nn.CrossEntropyLoss()
            optimizer = watching(model, loss_fn)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(20):
                optimizer.zero_grad()
                x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
                loss_fn(model(x), torch.randint(3, (6,), generator=generator)).backward()
                optimizer.step()
            out[seed] = statistics(optimizer)
        except Exception as error:  # a thread's own would be lost
            failures.append(error)

    for seed in (1, 2):
        train(seed, expected)
    threads = [threading.Thread(target=train, args=(seed, found)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for seed in (1, 2):
        assert_same(found[seed], expected[seed])


class Meeting(nn.Module):
    """Its forward pass waits in the middle for that of another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.barrier = nn.Linear(4, 5), nn.Linear(5, 3), threading.Barrier(2, timeout=20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if threading.current_thread() is not threading.main_thread():
            self.barrier.wait()
        return self.last(x)


def in_threads(*functions: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def halves(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def in_two_threads(together: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Meeting().double()
    optimizer = watching(model, MEAN)
    losses: list[Tensor] = []
    parts = [lambda x=x, y=y: losses.append(MEAN(model(x), y) / 2) for x, y in halves(*batch(6))]
    if together:
        in_threads(*parts)
    else:
        for part in parts:
            part()
    torch.stack(losses).sum().backward()
    optimizer.step()
    return statistics(optimizer)


def test_forward_passes_of_one_model_in_two_threads_all_count() -> None:
    assert_same(in_two_threads(True), in_two_threads(False))


def meeting_backward(other: Callable[[nn.Module, PreconditionedOptimizer], Any] | None) -> PreconditionedOptimizer:
    """A loop in whose backward pass another thread does something, which is to be refused."""
    torch.manual_seed(0)
    model = MODELS["mlp"]().double()
    optimizer = watching(model, MEAN)
    z, refused = model(batch(6)[0]), []

    def run() -> None:
        assert other is not None
        try:
            other(model, optimizer)
        except RuntimeError as error:
            refused.append(str(error))

    if other is not None:
        z.register_hook(lambda gradient: in_threads(run))
    MEAN(z, batch(6)[1]).backward()
    assert other is None or "runs in another thread" in refused[0]
    return optimizer


def test_backward_passes_of_one_model_that_meet_in_two_threads_are_refused() -> None:
    """The second one, and a step during one; the first counts as if nothing had happened."""

    def step(model: nn.Module, optimizer: PreconditionedOptimizer) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    meeting_backward(step)
    met = meeting_backward(lambda model, optimizer: MEAN(model(batch(3)[0]), batch(3)[1]).backward())
    alone = meeting_backward(None)
    for optimizer in (met, alone):
        optimizer.step()
    assert_same(statistics(met), statistics(alone))


@pytest.mark.parametrize("graph", [False, True])
def test_another_thread_may_predict_during_a_backward_pass(graph: bool) -> None:
    """As one that evaluates does; and train another model."""

    def elsewhere(model: nn.Module) -> None:
        with torch.set_grad_enabled(graph):
            model(batch(3)[0])
        other = MODELS["mlp"]().double()
        mine = watching(other, MEAN)
        MEAN(other(batch(3)[0]), batch(3)[1]).backward()
        mine.step()
        ended.append(True)

    found, ended = [], []
    for meets in (True, False):
        torch.manual_seed(0)
        model = MODELS["mlp"]().double()
        optimizer = watching(model, MEAN)
        z = model(batch(6)[0])
        if meets:
            run = partial(elsewhere, model)
            z.register_hook(lambda gradient, run=run: in_threads(run))
        MEAN(z, batch(6)[1]).backward()
        optimizer.step()
        found.append(statistics(optimizer))
    assert ended
    assert_same(*found)


@pytest.mark.parametrize("unscale", [False, True])
def test_the_scale_of_a_scaler_is_no_weight(unscale: bool) -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = MODELS["mlp"]().double()
        optimizer = watching(model, MEAN, "diagonal")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = batch(6)
        scaler.scale(MEAN(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found.append(statistics(optimizer))
    assert_same(*found)


def test_signs_and_reductions_that_have_no_common_scale_are_refused() -> None:
    model = MODELS["mlp"]().double()
    optimizer = watching(model, MEAN)
    x, y = batch(6)
    (MEAN(model(x), y) - 0.5 * MEAN(model(x), y.flip(0))).backward()
    with pytest.raises(ValueError, match="positive and negative multiples of the loss"):
        optimizer.step()
