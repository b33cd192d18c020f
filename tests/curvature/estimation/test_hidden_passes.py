"""Passes that hide layers behind a reentrant checkpoint, beside passes in the open, in steps and within a step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import curvature
import precond
from curvature.model.inner_backward import InnerBackwardError
from precond import PreconditionedOptimizer
from tests.curvature.loops import assert_same, batch, silently, statistics, watching

LOSS = nn.CrossEntropyLoss()


class Checkpointed(nn.Module):
    """Hides its first or its second layer while told to; dropout draws from the user's random stream."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.hides, self.on, self.drop = hides, False, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            layer = getattr(self, name)
            if self.on and self.hides == name:
                x = x if x.requires_grad else x.clone().requires_grad_()
                x = checkpoint(lambda z, layer=layer: self.drop(layer(z).tanh()), x, use_reentrant=True)
            else:
                x = self.drop(layer(x).tanh())
        return self.last(x)


#: For every step, whether each of its batches is hidden.
PLANS = [
    [[True], [True], [True]],
    [[False], [True], [False], [True]],
    [[False, False], [False, True], [True, False]],
    [[False], [False, True, False]],
    [[False, True]],
]


def run(hides: str, plan: list[list[bool]], kind: str, together: bool) -> list[dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Checkpointed(hides).double()
        optimizer = watching(model, LOSS, "kfac", kind, curvature_ema=0.0)
        found = []
        for step in plan:
            optimizer.zero_grad()
            losses = []
            for number, hidden in enumerate(step):
                model.on = hidden
                x, y = batch(6, seed=number + 1)
                losses.append(LOSS(model(x), y) / len(step))
                if not together:
                    losses.pop().backward()
            if together:
                torch.stack(losses).sum().backward()
            silently(optimizer.step)
            found.append(statistics(optimizer))
        return found


@pytest.mark.parametrize("together", [False, True], ids=["a backward pass each", "one backward pass"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("hides", ["first", "second"])
def test_hidden_passes_count_like_those_in_the_open(
    hides: str, plan: list[list[bool]], kind: str, together: bool
) -> None:
    for got, expected in zip(run(hides, plan, kind, together), run("nothing", plan, kind, together), strict=True):
        assert_same(got, expected)


class Inside(torch.autograd.Function):
    """Runs a layer and its backward pass inside, as checkpoints of other libraries do: nobody sees the layer."""

    @staticmethod
    def forward(ctx, x, layer):  # type: ignore[no-untyped-def]
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), gradient)
        return x.grad, None


class TwoLayers(nn.Module):
    """Two layers, of which the first may be hidden, and a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.aside = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, inside: bool) -> Tensor:
        x = Inside.apply(x.clone().requires_grad_(), self.first) if inside else self.first(x)
        return self.last(x.tanh())


def blocks(plan: list[list[bool]], kind: str, sliced: bool, penalty: bool = False) -> list[dict[str, Tensor]]:
    """Statistics after each step, whose batches hide a layer or, with ``penalty``, have one on the other parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoLayers().double()
    optimizer = watching(model, LOSS, "kfac", kind, curvature_ema=0.0)
    found = []
    for step in plan:
        optimizer.zero_grad()
        for number, special in enumerate(step):
            x, y = batch(6, seed=number + 1)
            z = model(x, special and not penalty)
            loss = LOSS(z[:5], y[:5]) if sliced else LOSS(z, y)
            more = model.aside.square().sum() if special and penalty else 0.0
            ((loss + more) / len(step)).backward()
        silently(optimizer.step)
        found.append(statistics(optimizer))
    return found


@pytest.mark.parametrize("sliced", [False, True], ids=["all of the output", "some rows"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("penalty", [False, True], ids=["hidden", "penalty"])
def test_a_parameter_that_nobody_sees_takes_nothing_from_the_others(penalty: bool, kind: str, sliced: bool) -> None:
    """Of no micro-batch of a step, the first included, are the statistics of the other parameters lost."""
    open_plan = [[False], [False] * 3, [False] * 2]
    expected = blocks(open_plan, kind, sliced)
    for plan in ([[False], [True] * 3, [False] * 2], [[False], [False, True, False], [True, False]]):
        for got, true in zip(blocks(plan, kind, sliced, penalty), expected, strict=True):
            seen = true.keys() if penalty else {"last.weight+last.bias"}
            assert_same({name: got[name] for name in seen}, {name: true[name] for name in seen})


class Between(nn.Module):
    """Its middle layer is inside a custom function, or in the open, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.inside, self.twice = True, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = self.middle(x) if self.twice else x
        x = Inside.apply(x, self.middle) if self.inside else self.middle(x)
        return self.last(x.tanh())


def between(kind: str, inside: bool, **options: Any) -> tuple[Between, PreconditionedOptimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Between().double()
    model.inside = inside
    return model, watching(model, LOSS, "kfac", kind, curvature_ema=0.0, **options)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_inner_backward_passes_leave_the_users_gradients(kind: str) -> None:
    """A custom function adds to .grad whenever its backward runs; in passes of the library that is taken back."""
    found = {}
    for inside in (True, False):
        model, optimizer = between(kind, inside)
        for number in range(2):
            optimizer.zero_grad()
            x, y = batch(6, seed=number + 1)
            LOSS(model(x), y).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            silently(optimizer.step)
            assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())  # type: ignore[arg-type]
        found[inside] = gradients, statistics(optimizer)
    assert_same(found[True][0], found[False][0])
    (_, hidden), (_, seen) = found[True], found[False]
    assert hidden.keys() == seen.keys() - {"middle.weight+middle.bias"}
    assert_same(hidden, {name: seen[name] for name in hidden})


def test_inner_backward_passes_do_not_hide_a_part_of_a_block() -> None:
    model, optimizer = between("exact", True)
    model.twice = True
    x, y = batch(6, seed=1)
    LOSS(model(x), y).backward()
    with pytest.raises(InnerBackwardError, match=r"hides the parameters .* one of shape \(5,\)"):
        silently(optimizer.step)


DOORS: dict[str, Callable[..., Any]] = {
    "full": lambda m, x, y: curvature.hessian(m, LOSS, (x, y)).to_dense(),
    "layer": lambda m, x, y: curvature.ggn(m, LOSS, (x, y), structure="layer"),
    "per-sample": lambda m, x, y: curvature.per_sample_gradients(m, LOSS, (x, y)),
    "jacobian": lambda m, x, y: curvature.jacobian(m, x),
    "closure": lambda m, x, y: precond.Newton(m.parameters(), lr=1.0).step(lambda: LOSS(m(x), y)),
}


@pytest.mark.parametrize(
    ("door", "front"), [*((door, False) for door in DOORS), *((door, True) for door in DOORS if door != "closure")]
)
def test_inner_backward_passes_are_refused_where_no_loop_runs(door: str, front: bool) -> None:
    model = between("exact", True)[0]
    if front:
        model.first.requires_grad_(False)
    kept = torch.ones_like(model.middle.weight)
    model.middle.weight.grad = kept
    x, y = batch(6, seed=1)
    if front:
        run = lambda x: Inside.apply(model.first(x).tanh().requires_grad_(), model.middle)  # noqa: E731
        model.forward = lambda x: model.last(run(x).tanh())  # type: ignore[method-assign]
    with pytest.raises(InnerBackwardError, match="runs a backward pass of its own"):
        DOORS[door](model, x, y)
    assert model.middle.weight.grad is kept
    assert torch.equal(kept, torch.ones(5, 5).double())
    assert all(p.grad is None for p in model.parameters() if p is not model.middle.weight)


@pytest.mark.parametrize("door", ["layer", "per-sample", "jacobian"])
def test_backward_passes_of_another_thread_keep_their_gradients(door: str) -> None:
    """The user's, which writes to ``.grad`` of the same model while one of ours runs."""
    model, right = between("exact", False)[0], between("exact", False)[0]
    x, y = batch(6, seed=1)
    LOSS(right(x), y).backward()
    waiting: list[Callable[[], None]] = []

    def meanwhile(saved: Tensor) -> Tensor:
        if waiting:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(waiting.pop()).result()
        return saved

    def forward(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, meanwhile):
            return Between.forward(model, x)

    model.forward = forward  # type: ignore[method-assign]
    matrix = curvature.jacobian(model, x) if door == "jacobian" else None
    waiting.append(lambda: LOSS(model(x), y).backward())
    if matrix is None:
        DOORS[door](model, x, y)
    else:
        matrix.adjoint() @ torch.ones(6, 3).double()
    assert not waiting
    for p, expected in zip(model.parameters(), right.parameters(), strict=True):
        assert torch.equal(p.grad, expected.grad)  # type: ignore[arg-type]


class Selective(nn.Module):
    """A checkpoint of which the products are kept: torch allows for one backward pass through it, the user's."""

    def __init__(self, context_fn: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.drop, self.options = nn.Dropout(0.5), {} if context_fn is None else {"context_fn": context_fn}

    def forward(self, x: Tensor) -> Tensor:
        run = lambda z: self.drop(self.middle(z).tanh())  # noqa: E731
        return self.last(checkpoint(run, self.first(x).tanh(), use_reentrant=False, **self.options))


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_selective_checkpoints_count_like_others(kind: str) -> None:
    found = []
    for context_fn in (partial(create_selective_checkpoint_contexts, _keeps_products), None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Selective(context_fn).double()
            optimizer = watching(model, LOSS, "kfac", kind, curvature_ema=0.0)
            for number in range(2):
                optimizer.zero_grad()
                x, y = batch(6, seed=number + 1)
                LOSS(model(x), y).backward()
                silently(optimizer.step)
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            optimizer.detach()
            model.eval()
            data = {s: curvature.ggn(model, LOSS, (x, y), structure=s).to_dense() for s in ("full", "layer")}  # type: ignore[arg-type]
            found.append(statistics(optimizer) | gradients | data)
    assert_same(*found)


@pytest.mark.parametrize("capture", ["auto", "loss", "shadow", "gradient"])
def test_selective_checkpoints_count_beside_passes_without_them(capture: str) -> None:
    """In any order within a step, and however passes are captured."""
    context_fn = partial(create_selective_checkpoint_contexts, _keeps_products)
    found: list[list[dict[str, Tensor]]] = []
    for on in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Selective(None).double()
            optimizer = watching(model, LOSS, "kfac", "exact", curvature_ema=0.0, capture=capture)
            found.append([])
            for plan in ([False, True], [True, False]):
                optimizer.zero_grad()
                for number, selects in enumerate(plan):
                    model.options = {"context_fn": context_fn} if on and selects else {}
                    x, y = batch(6, seed=number + 1)
                    (LOSS(model(x), y) / 2).backward()
                silently(optimizer.step)
                found[-1].append(statistics(optimizer))
    for got, expected in zip(*found, strict=True):
        assert_same(got, expected)
