"""Are learning rate, momentum and damping those of the quadratic model of the batch, in dense algebra?"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvature.estimation.tape import Tape
from curvature.losses import SumOfLosses
from curvature.model.moment import Moment
from precond import EKFAC, KBFGS, KFAC, LevenbergMarquardt, QuadraticModel, TrustRegion, WeightDecay
from precond.layerwise.replay import ClosureReplay, LoopReplay
from precond.layerwise.step_size import minimiser
from solvers import FactoredTikhonov, RelativeTikhonov

SLOW = LevenbergMarquardt(decrease=0.8, increase=1.25)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 3).double()


def data(seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g).double(), torch.randn(n, 3, generator=g).double()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Gradient and Gauss-Newton matrix of the mean squared error at the parameters, and the loss as a function."""
    model = copy.deepcopy(model)  # without the hooks
    names, sizes = list(dict(model.named_parameters())), [p.shape for p in model.parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in sizes])
        named = {n: part.reshape(s) for n, part, s in zip(names, parts, sizes, strict=True)}
        return functional_call(model, named, (x,)).reshape(-1)

    def loss(theta: Tensor) -> Tensor:
        return (outputs(theta) - y.reshape(-1)).square().mean()

    theta = flat(model.parameters())
    J = torch.func.jacrev(outputs)(theta)
    return torch.func.grad(loss)(theta), 2 / len(J) * J.T @ J, loss


def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, closure: bool = False) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = optimizer.loss_fn(model(x), y)
        loss.backward()
        return loss

    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": WeightDecay(0.3, "l2")}])
@pytest.mark.parametrize("make", [network, linear])
def test_the_move_minimises_the_damped_model_over_two_directions(make: Any, decay: Any, closure: bool) -> None:
    model, lam, eta = make(), 0.05, 0.3 if decay else 0.0
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, damping=lam, step_size=QuadraticModel(), **decay)
    previous, used = None, []
    for k in range(5):
        x, y = data(k)
        g, C, _ = dense(model, x, y)
        before = flat(model.parameters())
        g = g + eta * before
        twin = copy.deepcopy((model, optimizer))  # the same statistics: what P g is
        twin[0].zero_grad()
        twin[1].loss_fn(twin[0](x), y).backward()
        twin[1].precondition()
        d = flat(p.grad for p in twin[0].parameters()) if not decay else None
        step(model, optimizer, x, y, closure)
        move = flat(model.parameters()) - before
        if d is not None:
            V = torch.stack([-d] if previous is None else [-d, previous], 1)
            M = C + (lam + eta) * torch.eye(len(g)).double()
            c = -torch.linalg.solve(V.T @ M @ V, V.T @ g)
            torch.testing.assert_close(optimizer.coefficients, c, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(move, V @ c, rtol=1e-7, atol=1e-10)
        # At the minimum over the span the slope of the model along the move, and along the last one, is zero.
        slope = g + (C + (lam + eta) * torch.eye(len(g)).double()) @ move
        assert abs(slope @ move) < 1e-10 * g.norm() * move.norm()
        if previous is not None:
            assert abs(slope @ previous) < 1e-10 * g.norm() * previous.norm()
        used.append(len(optimizer.coefficients))
        previous = move
    assert used == [1, 2, 2, 2, 2]


def test_the_damping_of_the_factors_is_the_one_that_promises_most() -> None:
    model, lam = network(), 0.05
    quadratic = QuadraticModel(factor_period=3)
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, damping=lam, step_size=quadratic, inverse_update_period=2)
    ways = set()
    for k in range(13):
        x, y = data(k)
        before, now = flat(model.parameters()), optimizer.param_groups[0]["factor_damping"]
        tried = {}
        if k and k % 3 == 0:
            ratio = 0.95**3
            for strength in (now, now * ratio, now / ratio):
                theirs, twin = copy.deepcopy((model, optimizer))
                for group in twin.param_groups:
                    group["factor_damping"] = strength
                if strength != now:
                    for preconditioner in twin.preconditioners.values():
                        preconditioner.inverse = None  # renewed at this step
                twin.step_size = QuadraticModel(factor_period=None)
                twin = copy.deepcopy(twin)  # takes up the new option
                theirs = twin.model
                step(theirs, twin, x, y)
                move = flat(theirs.parameters()) - before
                g, C, _ = dense(model, x, y)
                tried[strength] = float(g @ move + 0.5 * move @ (C + lam * torch.eye(len(g)).double()) @ move)
        step(model, optimizer, x, y)
        chosen = optimizer.param_groups[0]["factor_damping"]
        if tried:
            assert chosen == min(tried, key=tried.__getitem__)
            assert len(set(tried.values())) == 3
            ways.add(chosen / now)
        else:
            assert chosen == now
    assert ways != {1.0}
    assert optimizer.param_groups[0]["damping"] == lam


@pytest.mark.parametrize("options", [{"factor_period": None}, {"factor_period": 1}])
def test_the_factors_have_a_damping_of_their_own_where_it_is_factored(options: Any) -> None:
    quadratic = QuadraticModel(**options)
    for cls in (KFAC, EKFAC):
        model = network()
        optimizer: Any = cls(model, nn.MSELoss(), lr=1.0, damping=0.1, step_size=quadratic)
        for k in range(4):
            step(model, optimizer, *data(k))
        apart = optimizer.param_groups[0]["factor_damping"]
        assert (apart is not None) == (cls is KFAC and options["factor_period"] is not None)
        assert apart is None or apart != 0.1


@pytest.mark.parametrize(("cls", "atol"), [(EKFAC, 1e-9), (KFAC, 1e-6)])  # factored damping adds sqrt(1e-13)
def test_one_linear_layer_with_the_exact_fisher_is_solved_in_one_step(cls: Any, atol: float) -> None:
    model, (x, y) = linear(), data(0, 20)
    optimizer = cls(model, nn.MSELoss(), lr=1.0, fisher="exact", damping=1e-13, step_size=QuadraticModel())
    step(model, optimizer, x, y)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), y).solution
    torch.testing.assert_close(model.weight.detach(), solution[:4].T, rtol=0, atol=atol)
    torch.testing.assert_close(model.bias.detach(), solution[4], rtol=0, atol=atol)
    torch.testing.assert_close(optimizer.coefficients, torch.ones(1).double(), rtol=0, atol=atol)


class Halves(nn.Module):
    """A network whose output comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Any:
        return self.net(x).tensor_split(2, 1)


def trained(model: nn.Module, loss_fn: nn.Module, factor: float, parts: bool, closure: bool) -> Tensor:
    optimizer = KFAC(model, loss_fn, lr=1.0, fisher="exact", step_size=QuadraticModel(), damping_rule=SLOW)
    for seed in range(3):
        x, y = data(seed)
        targets = y.tensor_split(2, 1) if parts else y

        def loss(x: Tensor = x, targets: Any = targets) -> Tensor:
            optimizer.zero_grad()
            value: Tensor = factor * loss_fn(model(x), targets)
            value.backward()
            return value

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return flat(model.parameters())


@pytest.mark.parametrize("closure", [False, True])
def test_a_sum_of_losses_on_two_outputs_is_the_loss_on_both(closure: bool) -> None:
    """The mean over three numbers is two thirds of that over two, and a third of the last."""
    model, loss_fn = Halves(), SumOfLosses({0: (0.2 / 3, nn.MSELoss()), 1: (0.1 / 3, nn.MSELoss())})
    whole = trained(network(), nn.MSELoss(), 0.1, False, closure)
    torch.testing.assert_close(trained(model, loss_fn, 1.0, True, closure), whole, rtol=1e-8, atol=1e-10)
    x, y = data(3)
    optimizer = KFAC(model, loss_fn, lr=1.0, step_size=QuadraticModel(fraction=0.5))
    loss_fn(model(x), y.tensor_split(2, 1)).backward()
    with pytest.raises(ValueError, match=r"the loss is a sum of losses\. Pass fraction=1"):
        optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("forward_mode", [True, False])
def test_the_matrix_may_be_that_of_every_third_example(reduction: str, forward_mode: bool) -> None:
    model, lam = network(), 0.05
    loss_fn = nn.MSELoss(reduction=reduction)
    optimizer: Any = KFAC(model, loss_fn, lr=1.0, damping=lam, step_size=QuadraticModel(fraction=1 / 3))
    optimizer._step_model.replay.forward_mode = forward_mode
    previous = None
    for k in range(3):
        x, y = data(k, 11)
        scale = y.numel() if reduction == "sum" else 1.0
        g, _, _ = dense(model, x, y)
        _, C, _ = dense(model, x[::3], y[::3])
        shifted = scale * C + lam * torch.eye(len(g))
        before = flat(model.parameters())
        step(model, optimizer, x, y)
        m = flat(model.parameters()) - before
        if previous is not None:  # no move in the span of direction and previous move lowers the model further
            V = torch.stack([m - optimizer.coefficients[1] * previous, previous])
            slopes = V @ (scale * g + shifted @ m)
            # The two vectors are nearly parallel, which costs some digits.
            assert slopes.abs().max() < 1e-8 * (V @ (scale * g)).abs().max()
        previous = m


def test_operations_without_forward_derivatives_are_differentiated_twice() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    class Cubed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(x)

    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    moved = []
    for cubes in (Cubed(), Power()):
        model = nn.Sequential(network(), cubes)
        optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, damping=0.1, step_size=QuadraticModel())
        for k in range(3):
            step(model, optimizer, *data(k))
        assert optimizer._step_model.replay.forward_mode is isinstance(cubes, Power)
        moved.append(flat(model.parameters()))
    assert torch.allclose(*moved, rtol=1e-12, atol=1e-14)


ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Softplus, nn.Tanh]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("rule", [None, SLOW, LevenbergMarquardt(period=3)], ids=["fixed", "every", "third"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_step_raises_the_loss_of_its_batch(activation: Any, rule: Any, closure: bool) -> None:
    """Where the quadratic model promises too much the step is halved, and so are the next ones."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 3)]
    model, loss_fn = nn.Sequential(*layers).double(), nn.CrossEntropyLoss()
    x = torch.randn(60, 8).double().exp()
    y = torch.arange(60) % 3
    quadratic = QuadraticModel(fraction=1.0 if closure else 0.5)
    optimizer: Any = KFAC(model, loss_fn, lr=1.0, damping=1e-4, step_size=quadratic, damping_rule=rule)
    before, last = flat(model.parameters()), loss_fn(model(x), y).item()
    start = last
    for _ in range(12):
        step(model, optimizer, x, y, closure)
        now, loss = flat(model.parameters()), loss_fn(model(x), y).item()
        assert loss <= last
        kept = flat(optimizer.state[p]["move"] for p in model.parameters())
        torch.testing.assert_close(kept, now - before, rtol=1e-6, atol=1e-12)
        before, last = now, loss
    assert last < 0.8 * start  # at most 0.36 over seeds


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_overshoots_is_halved_until_it_does_not(closure: bool) -> None:
    """The Gauss-Newton step of tanh(w)^2 from w = 2 is sinh(4) / 2 = 13.6, to -11.6: further out. A quarter is not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    weight = next(model.parameters())
    weight.data.fill_(2.0)
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, fisher="exact", damping=1e-12, step_size=QuadraticModel())
    step(model, optimizer, torch.ones(3, 1).double(), torch.zeros(3, 1).double(), closure)
    assert weight.item() == pytest.approx(2 - math.sinh(4) / 8, rel=1e-9)
    assert optimizer.param_groups[0]["region"] == pytest.approx(2 * math.tanh(2) ** 2 / 16, rel=1e-9)  # m^T C m


def test_a_shortened_step_bounds_the_next_ones_until_the_model_holds() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, fisher="exact", step_size=QuadraticModel(momentum=False))
    optimizer.param_groups[0]["region"] = region = 1e-3
    for k in range(4):
        x, y = data(k % 2)
        _, C, _ = dense(model, x, y)
        before = flat(model.parameters())
        step(model, optimizer, x, y)
        m = flat(model.parameters()) - before
        assert m @ C @ m == pytest.approx(region, rel=1e-9)
        assert optimizer.param_groups[0]["region"] == 4 * region  # so short that the model is right
        region *= 4
    assert optimizer.metrics()["bound"] == 1 and optimizer.metrics()["kl"] == pytest.approx(region / 8)


def test_a_bound_that_is_given_holds_for_the_model_too() -> None:
    for given in ({"kl_clip": 1e-3}, {"step_size": QuadraticModel(max_kl=1e-3)}, {"kl_clip": TrustRegion(1e-3, lr=1)}):
        options: dict[str, Any] = {"step_size": QuadraticModel(), **given}
        model, (x, y) = network(), data(0)
        optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, fisher="exact", **options)
        _, C, _ = dense(model, x, y)
        before = flat(model.parameters())
        step(model, optimizer, x, y)
        m = flat(model.parameters()) - before
        assert m @ C @ m == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("options", [{"step_size": QuadraticModel()}, {}])
def test_kbfgs_is_judged_as_the_others(options: Any) -> None:
    model, (x, y) = network(), data(0)
    rule = LevenbergMarquardt(decrease=0.5, upper=-2.0, lower=-3.0, next_batch=False)  # every step lowers the damping
    optimizer: Any = KBFGS(model, nn.MSELoss(), lr=0.1, damping=0.5, damping_rule=rule, **options)
    for k in range(3):
        step(model, optimizer, x, y)
        assert optimizer.param_groups[0]["damping"] == 0.5 ** (k + 2)
    away = KBFGS(network(), nn.MSELoss(), lr=1e4, kl_clip=None, damping_rule=replace(SLOW, reject_steps=True))
    before = flat(away.model.parameters())
    step(away.model, away, x, y)
    assert torch.equal(flat(away.model.parameters()), before)
    learned = [p.estimator for p in away.preconditioners.values()]
    assert all(e.s.value is None for e in learned), "it learned from a step that was taken back"


def test_without_momentum_and_with_lr_the_move_is_a_multiple() -> None:
    moves = []
    for lr in (1.0, 0.25):
        model = network()
        before = flat(model.parameters())
        optimizer: Any = KFAC(model, nn.MSELoss(), lr=lr, step_size=QuadraticModel(momentum=False), fisher="exact")
        step(model, optimizer, *data(0))
        moves.append(flat(model.parameters()) - before)
        step(model, optimizer, *data(1))
        assert len(optimizer.coefficients) == 1
    torch.testing.assert_close(0.25 * moves[0], moves[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_the_trust_region_bounds_the_predicted_divergence(bound: float) -> None:
    model, free = network(), network()
    x, y = data(0)
    _, C, _ = dense(model, x, y)
    moves = []
    for net, max_kl in ((model, bound), (free, None)):
        before = flat(net.parameters())
        step(net, KFAC(net, nn.MSELoss(), lr=1.0, fisher="exact", step_size=QuadraticModel(max_kl=max_kl)), x, y)
        moves.append(flat(net.parameters()) - before)
    m, free_move = moves
    length = free_move @ C @ free_move
    torch.testing.assert_close(m, free_move * min(1.0, float(bound / length) ** 0.5), rtol=1e-9, atol=0)
    assert (m @ C @ m <= bound * (1 + 1e-9)) and (length > 1e-3)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_damping_follows_the_reduction_ratio(every: int, sized: bool, closure: bool) -> None:
    """Whatever moved the parameters: momentum and a fixed learning rate, or the model itself."""
    model, lam = network(), 0.1
    alone = False if sized else None
    rule = LevenbergMarquardt(decrease=0.8, increase=1.25, lower=0.9, upper=1.05, period=every, next_batch=alone)
    options: Any = {"lr": 1.0, "step_size": QuadraticModel()} if sized else {"lr": 0.6, "momentum": 0.9}
    optimizer: Any = KFAC(model, nn.MSELoss(), damping=lam, damping_rule=rule, kl_clip=None, **options)
    factors = set()
    for k in range(8):
        x, y = data(k % 3)
        g, C, loss = dense(model, x, y)
        before = flat(model.parameters())
        if sized:  # nearly twice the move promises little
            optimizer.param_groups[0]["lr"] = 1.9 if k % 2 else 1.0
        step(model, optimizer, x, y, closure)
        m = flat(model.parameters()) - before
        ratio = (loss(before + m) - loss(before)) / (g @ m + 0.5 * m @ C @ m)
        promised = g @ m + 0.5 * m @ C @ m < 0
        factor = 1.25 if not promised or ratio < 0.9 else 0.8 if ratio > 1.05 else 1.0
        factor = factor if k % every == 0 else 1.0
        factors.add(factor)
        lam *= factor
        assert optimizer.param_groups[0]["damping"] == pytest.approx(lam, rel=1e-12)
    assert len(factors) > 1, "the damping always moved in one way, so the test says little"


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_is_judged_by_the_next_batch_too(every: int, decay: float, closure: bool) -> None:
    """Its own batch alone raises the damping; the next one raises it up to a bound, or lets it be lowered, or not."""
    model, lam, bound = network(), 0.01, 2.0
    rule = LevenbergMarquardt(decrease=0.5, increase=2.0, period=every, relative_maximum=bound)
    optimizer: Any = KFAC(
        model,
        nn.MSELoss(),
        lr=1.0,
        damping=lam,
        damping_rule=rule,
        step_size=QuadraticModel(),
        weight_decay=WeightDecay(decay, "l2"),
        fisher="exact",
    )
    waiting: tuple[float, float, Tensor, Tensor] | None = None
    found = set()
    for k in range(24):
        x, y = data(k, 6)  # few examples: steps follow the noise of their batch
        g, C, mean_loss = dense(model, x, y)

        def loss(theta: Tensor, of: Callable[[Tensor], Tensor] = mean_loss) -> Tensor:
            return of(theta) + 0.5 * decay * theta @ theta

        before = flat(model.parameters())
        g, C = g + decay * before, C + decay * torch.eye(len(g)).double()
        step(model, optimizer, x, y, closure)
        operators = [p.estimator.operator() for p in optimizer.preconditioners.values()]
        mean = float(sum(op.trace() for op in operators)) / sum(op.shape[0] for op in operators)
        if waiting is not None:
            promised, ratio, start, end = waiting
            fallen = float(loss(start) - loss(end)) / promised
            if fallen < 0:
                lam, how = max(lam, min(2 * lam, bound * mean)), "raised" if 2 * lam < bound * mean else "bounded"
            elif fallen >= 0.25 and ratio > 0.75:
                lam, how = max(lam / 2, min(lam, 1e-4 * mean)), "lowered"
            else:
                how = "left"
            found.add(how)
        waiting = None
        if k % every == 0:
            m = flat(model.parameters()) - before
            promised = -float(g @ m + 0.5 * m @ C @ m)
            ratio = float(loss(before) - loss(before + m)) / promised
            if not ratio >= 0.25:
                lam *= 2
                found.add("by its own")
            else:
                waiting = promised, ratio, before, before + m
        assert optimizer.param_groups[0]["damping"] == pytest.approx(lam, rel=1e-9)
    assert {"raised", "lowered", "left"} <= found, found


def test_the_bound_of_what_the_next_batch_raises_is_no_bound_elsewhere() -> None:
    rule = LevenbergMarquardt(relative_maximum=2.0)
    assert rule.after_next(1.0, 1.0, -0.1, mean=1.0) == 2.0
    assert rule.after_next(1.0, 1.0, float("nan"), mean=1.0) == 2.0
    assert rule.after_next(5.0, 1.0, -0.1, mean=1.0) == 5.0
    assert rule.after_next(1.0, 1.0, -0.1) == 3.0  # where no estimate of C is kept
    assert rule.after_next(1.0, 0.5, 1.0) == rule.after_next(1.0, 1.0, 0.1) == 1.0
    assert rule.after_next(3.0, 1.0, 0.25) == 1.0
    for options in ({"next_batch": True}, {"relative_maximum": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            KFAC(network(), nn.MSELoss(), lr=1.0, damping=0.1, damping_rule=LevenbergMarquardt(**options))
    with pytest.raises(ValueError, match="relative_maximum"):
        KFAC(
            network(),
            nn.MSELoss(),
            lr=1.0,
            damping=0.1,
            step_size=QuadraticModel(),
            damping_rule=LevenbergMarquardt(next_batch=False, relative_maximum=2.0),
        )


def test_the_adapted_damping_is_the_one_of_the_next_inverse() -> None:
    model = network()
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=0.1, damping=0.5, damping_rule=SLOW, inverse_update_period=1)
    for k in range(3):
        step(model, optimizer, *data(k))
    lam = optimizer.param_groups[0]["damping"]
    assert lam != 0.5
    step(model, optimizer, *data(3))
    preconditioner = next(iter(optimizer.preconditioners.values()))
    expected = FactoredTikhonov(lam)(preconditioner.estimator.operator()).to_dense()
    found = preconditioner.inverse.to_dense() @ expected
    torch.testing.assert_close(found, torch.eye(len(found)).double(), rtol=0, atol=1e-9)


def test_the_damping_stops_at_a_fraction_of_the_mean_eigenvalue() -> None:
    """A model that promises too little at every step would drive the damping to nothing."""
    model, (x, y) = linear(), data(0)
    rule = LevenbergMarquardt(decrease=0.1, upper=-10.0, lower=-20.0, relative_minimum=0.01)
    optimizer: Any = EKFAC(
        model, nn.MSELoss(), lr=0.01, damping=0.1, damping_rule=rule, curvature_ema=0.0, fisher="exact"
    )
    for _ in range(6):
        step(model, optimizer, x, y, False)
    _, C, _ = dense(model, x, y)  # the Gauss-Newton matrix of a linear model is the same everywhere
    (block,) = (p.estimator.operator().to_dense() for p in optimizer.preconditioners.values())
    mean = float(torch.linalg.eigvalsh(block).mean())
    assert mean == pytest.approx(float(torch.linalg.eigvalsh(C).mean()), rel=1e-9)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.01 * mean, rel=1e-9)


def test_a_step_that_raises_the_loss_is_taken_back() -> None:
    model, other = network(), network()
    for net, reject in ((model, True), (other, False)):
        rule = replace(SLOW, reject_steps=reject)
        optimizer: Any = KFAC(net, nn.MSELoss(), lr=80.0, kl_clip=None, damping_rule=rule, damping=0.1)
        before, (x, y) = flat(net.parameters()), data(0)
        step(net, optimizer, x, y)
        assert torch.equal(flat(net.parameters()), before) == reject
        assert optimizer.param_groups[0]["damping"] == 0.1 * 1.25
        assert any("momentum_buffer" in s for s in optimizer.state.values()) != reject
    assert nn.MSELoss()(other(x), y).item() > 10 * nn.MSELoss()(model(x), y).item()


def test_a_resumed_run_continues_bit_for_bit() -> None:
    def make(net: nn.Module) -> KFAC:
        return KFAC(net, nn.MSELoss(), lr=1.0, damping=0.3, step_size=QuadraticModel(), damping_rule=SLOW)

    whole, first, second = network(), network(), network(1)
    optimizers = make(whole), make(first), make(second)
    for k in range(6):
        step(whole, optimizers[0], *data(k))
    for k in range(3):
        step(first, optimizers[1], *data(k))
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizers[1].state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second.load_state_dict(saved["model"])
    optimizers[2].load_state_dict(saved["optimizer"])
    twin, travelled = copy.deepcopy((second, optimizers[2]))
    for k in range(3, 6):
        step(second, optimizers[2], *data(k))
        step(twin, travelled, *data(k))
    assert torch.equal(flat(second.parameters()), flat(whole.parameters()))
    assert torch.equal(flat(twin.parameters()), flat(whole.parameters()))


# The batch once more -------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, batch norm, and logits ``(N, S, V)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).reshape(len(x), 2, 3)


@pytest.mark.parametrize("way", ["loop", "closure"])
def test_the_batch_repeats_itself_and_nothing_changes(way: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = Noisy().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10, 2))
    state = torch.get_rng_state()

    def evaluate() -> Tensor:
        model.zero_grad()
        loss = 0.5 * loss_fn(model(x).reshape(-1, 3), y.flatten()) + 0.25 * loss_fn(
            model(-x).flatten(0, 1), y.flatten()
        )
        loss.backward()
        return loss

    tape = Tape(model, loss_fn, lambda: dict(model.named_parameters()))
    tape.repeats = True
    loop = LoopReplay(tape, loss_fn)
    replay = loop if way == "loop" else ClosureReplay(evaluate, model, loss_fn, [state], Moment(model))
    torch.set_rng_state(state)
    value = evaluate().detach()
    kept = [p.grad for p in model.parameters()]
    before = torch.get_rng_state(), copy.deepcopy(model.state_dict()), [g.clone() for g in kept]  # type: ignore[union-attr]
    loop.take()
    torch.testing.assert_close(replay.value(), value, rtol=1e-12, atol=0)
    parts, again = replay.parts()
    torch.testing.assert_close(again, value, rtol=1e-12, atol=0)
    outputs = [part.value for part in parts]
    gradients = torch.autograd.grad(outputs, list(model.parameters()), outputs)
    assert len(parts) == 2 and all(bool(g.isfinite().all()) for g in gradients)
    assert [part.scale for part in parts] == pytest.approx([0.5 / 20, 0.25 / 20])
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before[1].values(), model.state_dict().values(), strict=True))
    assert all(
        p.grad is g and torch.equal(g, old)  # type: ignore[arg-type]
        for p, g, old in zip(model.parameters(), kept, before[2], strict=True)
    )
    tape.close()
    assert not model._forward_hooks and not loss_fn._forward_hooks and not model._forward_pre_hooks


def test_accumulated_batches_are_one_batch() -> None:
    found = []
    for pieces in (1, 4):
        model = network()
        optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, fisher="exact", step_size=QuadraticModel())
        for k in range(3):
            x, y = data(k)
            optimizer.zero_grad()
            for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (optimizer.loss_fn(model(a), b) / pieces).backward()
            optimizer.step()
        found.append(flat(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_steps_without_new_statistics_have_their_batch_too() -> None:
    model = network()
    options: Any = {"step_size": QuadraticModel(), "curvature_update_period": 3}
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, damping=1e-3, **options)
    for k in range(5):
        x, y = data(k)
        g, C, _ = dense(model, x, y)
        before = flat(model.parameters())
        step(model, optimizer, x, y)
        m = flat(model.parameters()) - before
        assert abs((g + C @ m + 1e-3 * m) @ m) < 1e-10 * g.norm() * m.norm()


def test_minimiser_is_scale_free_and_takes_the_shortest() -> None:
    V = torch.tensor([[1.0, 2.0, 0.5], [1e-9, 3e-9, 1e-9]], dtype=torch.float64)
    s = V @ torch.tensor([1.0, -1.0, 2.0]).double()
    c = minimiser(V @ V.T, s)
    torch.testing.assert_close(c, -torch.linalg.solve(V @ V.T, s), rtol=1e-7, atol=0)
    ones = torch.ones(2, 2).double()
    torch.testing.assert_close(minimiser(ones, ones[0]), -ones[0] / 2, rtol=1e-12, atol=0)
    assert torch.equal(minimiser(torch.zeros(1, 1).double(), torch.zeros(1).double()), torch.zeros(1).double())


def test_examples_that_cannot_be_picked_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mT

    model = Turned()
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, damping=0.1, step_size=QuadraticModel(fraction=0.5))
    x, y = data(0)
    with pytest.raises(ValueError, match="first axis"):
        step(model, optimizer, x, y.mT)
    optimizer = KFAC(network(), nn.MSELoss(), lr=1.0, damping=0.1, step_size=QuadraticModel(fraction=0.5))
    with pytest.raises(ValueError, match="plain loop"):
        step(optimizer.model, optimizer, x, y, closure=True)
    with pytest.raises(ValueError, match="fraction"):
        QuadraticModel(fraction=0.0)
    with pytest.raises(ValueError, match="period must be a whole number of steps, at least 1, got 0"):
        LevenbergMarquardt(period=0)


def test_what_cannot_be_served_is_refused() -> None:
    model, loss_fn = network(), nn.MSELoss()
    with pytest.raises(TypeError, match="step_size needs the loss module that the loop calls, not function"):
        KFAC(model, lambda z, y: 0, lr=1.0, fisher="empirical", step_size=QuadraticModel())
    with pytest.raises(ValueError, match="KFAC: attempts=3 of its damping_rule has no effect on it"):
        KFAC(model, loss_fn, lr=1.0, damping_rule=replace(SLOW, attempts=3))
    with pytest.raises(ValueError, match="both a function of the step count and adapted by damping_rule"):
        KFAC(model, loss_fn, lr=1.0, damping_rule=SLOW, damping=lambda step: 1.0)
    with pytest.raises(ValueError, match="step_size and damping_rule minimise"):
        KFAC(model, loss_fn, lr=1.0, damping_rule=SLOW, maximize=True)
    with pytest.raises(ValueError, match="needs a damping in units of C"):
        EKFAC(model, loss_fn, lr=1.0, damping=RelativeTikhonov(0.1), step_size=QuadraticModel())
    sized: Any = {"lr": 1.0, "step_size": QuadraticModel()}
    with pytest.raises(ValueError, match=r"KFAC: momentum=0\.9 has no effect with step_size=QuadraticModel\(\)"):
        KFAC(model, loss_fn, momentum=0.9, **sized)
    with pytest.raises(ValueError, match=r"kl_clip=0\.1 and QuadraticModel\(.*\) both bound the move"):
        KFAC(model, loss_fn, kl_clip=0.1, lr=1.0, step_size=QuadraticModel(max_kl=0.1))
    with pytest.raises(ValueError, match="no bound before momentum"):
        KFAC(model, loss_fn, kl_clip=TrustRegion(0.1, of="direction"), **sized)
    KFAC(model, loss_fn, momentum=0.0, kl_clip=None, **sized).detach()  # these say what is so
    with pytest.raises(ValueError, match="max_kl must be positive"):
        QuadraticModel(max_kl=0.0)
    optimizer: Any = KFAC(model, loss_fn, lr=1.0, step_size=QuadraticModel())
    x, y = data(0)
    loss_fn(2 * model(x), y).backward()
    with pytest.raises(RuntimeError, match="not called on the model's output as it is"):
        optimizer.step()


def test_precondition_leaves_the_step_to_others_and_forgets_the_batch() -> None:
    model = network()
    optimizer: Any = KFAC(model, nn.MSELoss(), lr=1.0, step_size=QuadraticModel(), damping_rule=SLOW, damping=0.1)
    plain: Any = KFAC(copy.deepcopy(model), nn.MSELoss(), lr=1.0, damping=0.1)
    for k in range(3):
        for opt in (optimizer, plain):
            opt.zero_grad()
            opt.loss_fn(opt.model(data(k)[0]), data(k)[1]).backward()
            opt.precondition()
        assert torch.equal(flat(p.grad for p in model.parameters()), flat(p.grad for p in plain.model.parameters()))
        assert not optimizer._step_model._loop._passes and optimizer.coefficients is None
    assert optimizer.param_groups[0]["damping"] == 0.1
