"""Do the user's hooks run as often, and on the same numbers, as without us; and does none of them edit curvature?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

import curvature
from precond import EKFAC, KFAC, HessianFree, Shampoo
from tests.curvature.loops import assert_same, statistics, watching

Seen = list[tuple[str, Tensor]]


class Hooked(nn.Module):
    """A model whose own code hangs hooks on what it computes."""

    def __init__(self, hang: Callable[[Tensor], Any] = lambda h: None) -> None:
        super().__init__()
        self.first, self.last, self.hang = nn.Linear(4, 5), nn.Linear(5, 3), hang

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.hang(h)
        return self.last(h)


def noting(seen: Seen, kind: str, factor: float = 1.0) -> Callable[..., Any]:
    """A hook that notes what it is called with, and multiplies it where it is a gradient."""

    def hook(*args: Any) -> Any:
        given = [t for a in args for t in (a if isinstance(a, (tuple, list)) else [a]) if isinstance(t, Tensor)]
        seen.extend((kind, t.detach().clone()) for t in given)
        if factor == 1.0 or not isinstance(args[-1], (Tensor, tuple)):
            return None
        first = args[1] if len(args) == 3 else args[-1]
        return tuple(None if t is None else factor * t for t in first) if isinstance(first, tuple) else factor * first

    return hook


def hang_parameter(model: Hooked, seen: Seen, factor: float) -> None:
    for name, p in model.named_parameters():
        p.register_hook(noting(seen, name, factor))


def hang_accumulated(model: Hooked, seen: Seen, factor: float) -> None:
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))


def hang_activation(model: Hooked, seen: Seen, factor: float) -> None:
    model.hang = lambda h: h.register_hook(noting(seen, "activation", factor)) if h.requires_grad else None


def hang_node(model: Hooked, seen: Seen, factor: float) -> None:
    def hang(h: Tensor) -> None:
        if h.grad_fn is not None:
            h.grad_fn.register_hook(noting(seen, "node", factor))
            h.grad_fn.register_prehook(noting(seen, "before a node", factor))

    model.hang = hang


def hang_module(model: Hooked, seen: Seen, factor: float) -> None:
    for name, module in model.named_modules():
        module.register_full_backward_hook(noting(seen, f"{name} backward", factor))
        module.register_full_backward_pre_hook(noting(seen, f"{name} backward before", factor))


def hang_forward(model: Hooked, seen: Seen, factor: float) -> None:
    for name, module in model.named_modules():
        module.register_forward_hook(noting(seen, f"{name} forward"))
        module.register_forward_pre_hook(noting(seen, f"{name} forward before"))


def hang_several(model: Hooked, seen: Seen, factor: float) -> None:
    register_multi_grad_hook(tuple(model.parameters()), noting(seen, "all"))
    register_multi_grad_hook(tuple(model.parameters()), noting(seen, "any"), mode="any")
    model.hang = lambda h: register_multi_grad_hook((h,), noting(seen, "several")) if h.requires_grad else None


def hang_output(model: Hooked, seen: Seen, factor: float) -> None:
    model.register_forward_hook(
        lambda module, args, z: z.register_hook(noting(seen, "output", factor)) and None if z.requires_grad else None
    )


HANGING = {
    function.__name__[5:]: function
    for function in (
        hang_parameter,
        hang_accumulated,
        hang_activation,
        hang_node,
        hang_module,
        hang_forward,
        hang_several,
        hang_output,
    )
}


def problem() -> tuple[Hooked, Tensor, Tensor]:
    torch.manual_seed(0)
    return Hooked().double(), torch.randn(6, 4).double().requires_grad_(), torch.randint(0, 3, (6,))


def run(make: Callable[[nn.Module, nn.Module], Any], kind: str, factor: float, after: bool, seen: Seen) -> list[Tensor]:
    """Three steps of a loop with hooks; what it can see, hooks on tensors outside of the model among it."""
    model, x, y = problem()
    loss_fn = nn.CrossEntropyLoss()
    if not after:
        HANGING[kind](model, seen, factor)
    optimizer = make(model, loss_fn)
    if after:
        HANGING[kind](model, seen, factor)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        z = model(x)
        z.register_hook(noting(seen, "z"))
        z.retain_grad()
        loss = loss_fn(z, y)
        loss.register_hook(noting(seen, "loss"))
        loss.backward()
        values += [loss.detach(), z.grad, *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return values


def sgd(model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "kfac exact": lambda model, loss_fn: watching(model, loss_fn, "kfac", "exact"),
    "kfac mc": lambda model, loss_fn: watching(model, loss_fn, "kfac", "mc"),
    "ekfac empirical": lambda model, loss_fn: watching(model, loss_fn, "ekfac", "empirical"),
    "diagonal, output": lambda model, loss_fn: watching(model, loss_fn, "diagonal", "exact", capture="gradient"),
}


@pytest.mark.parametrize("kind", HANGING)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_run_as_without_us(name: str, kind: str) -> None:
    for after, factor in ((False, 1.0), (True, 0.5)):
        seen: Seen = []
        expected_seen: Seen = []
        values = run(OPTIMIZERS[name], kind, factor, after, seen)
        expected = run(sgd, kind, factor, after, expected_seen)
        assert len(expected_seen) >= 6
        assert Counter(k for k, _ in seen) == Counter(k for k, _ in expected_seen)
        assert [k for k, _ in seen] == [k for k, _ in expected_seen]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, expected_seen, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("kind", HANGING)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_do_not_edit_the_curvature_of_a_training_step(name: str, kind: str) -> None:
    found, structures = [], {}
    for factor in (None, 0.5):
        model, x, y = problem()
        loss_fn = nn.CrossEntropyLoss()
        if factor is not None:
            HANGING[kind](model, [], factor)
        optimizer = OPTIMIZERS[name](model, loss_fn)
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        structures[factor] = {row.structure for row in optimizer.coverage()}
        found.append(statistics(optimizer))
    assert structures[0.5] == structures[None]
    assert_same(found[1], found[0])


def retained(make: Callable[[nn.Module, nn.Module], Any]) -> list[Tensor]:
    model, x, y = problem()
    kept: list[Tensor] = []
    model.hang = lambda h: (h.retain_grad(), kept.append(h)) if h.requires_grad else None
    loss_fn = nn.CrossEntropyLoss()
    optimizer = make(model, loss_fn)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return [h.grad for h in kept]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_the_model_retains_are_those_of_the_loop(name: str) -> None:
    pairs = zip(retained(OPTIMIZERS[name]), retained(sgd), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


DOORS: dict[str, Callable[[nn.Module, nn.Module, Any], Tensor]] = {
    "hessian": lambda m, l, d: curvature.hessian(m, l, d).to_dense(),
    "ggn": lambda m, l, d: curvature.ggn(m, l, d).to_dense(),
    "ggn, dense": lambda m, l, d: curvature.ggn(m, l, d, structure="dense").to_dense(),
    "ggn, kfac": lambda m, l, d: curvature.ggn(m, l, d, structure="kfac").to_dense(),
    "exact": lambda m, l, d: curvature.fisher(m, l, d, kind="exact", structure="layer").to_dense(),
    "mc": lambda m, l, d: curvature.fisher(
        m, l, d, kind="mc", structure="kfac", generator=torch.Generator().manual_seed(1)
    ).to_dense(),
    "empirical": lambda m, l, d: curvature.fisher(m, l, d, kind="empirical").to_dense(),
    "ekfac": lambda m, l, d: curvature.fisher(m, l, d, kind="empirical", structure="ekfac").to_dense(),
    "per sample": lambda m, l, d: torch.cat(
        [g.flatten(1) for g in curvature.per_sample_gradients(m, l, d).values()], dim=1
    ),
    "jacobian": lambda m, l, d: curvature.jacobian(m, d[0]).to_dense(),
    "ntk": lambda m, l, d: torch.as_tensor(curvature.ntk(m, d[0]).to_dense()),
}


@pytest.mark.parametrize("kind", [kind for kind in HANGING if kind != "forward"])
@pytest.mark.parametrize("door", DOORS)
def test_hooks_on_the_backward_pass_are_not_run_on_data_sets(door: str, kind: str) -> None:
    model, x, y = problem()
    loss_fn = nn.CrossEntropyLoss()
    expected = DOORS[door](model, loss_fn, (x, y))
    seen: Seen = []
    HANGING[kind](model, seen, 0.5)
    torch.testing.assert_close(DOORS[door](model, loss_fn, (x, y)), expected, rtol=1e-12, atol=1e-12)
    assert not seen
    model.zero_grad()
    loss_fn(model(x), y).backward()
    assert seen  # and they are where they were


@pytest.mark.parametrize("make", [KFAC, EKFAC, Shampoo, HessianFree])
def test_an_error_in_a_hook_leaves_all_hooks_in_place(make: Any) -> None:
    model, x, y = problem()
    loss_fn, seen = nn.CrossEntropyLoss(), []
    hang_parameter(model, seen, 1.0)
    hang_module(model, seen, 1.0)
    optimizer = make(model.parameters(), lr=0.1) if make is Shampoo else make(model, loss_fn, lr=0.1)

    def fails(gradient: Tensor) -> None:
        raise ValueError("hook")

    handle = model.last.weight.register_hook(fails)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        if make is not HessianFree:
            loss.backward()
        return loss

    with pytest.raises(ValueError, match="hook"):
        optimizer.step(closure)
    handle.remove()
    before = len(seen)
    optimizer.step(closure)
    assert len(seen) > before
    assert all(len(p._backward_hooks) == 1 for p in model.parameters())
    assert all(len(m._backward_hooks) == 1 for m in model.modules())
