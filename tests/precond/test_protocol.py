"""Does every method keep the protocol of ``torch.optim``?"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import precond
from precond import Loop, SINGDFisher, WeightDecay, methods
from tests.precond import references as ref

#: Options under which a method that would be idle in a short run is not.
OPTIONS: dict[str, dict[str, Any]] = {
    "KFAC": {"lr": 0.01},
    "EKFAC": {"lr": 0.01},
    "NaturalGradient": {"lr": 0.01, "structure": "dense", "damping": 0.1, "inverse_update_period": 4},
    "SMWNaturalGradient": {"lr": 0.01, "spring": 0.5, "damping": 0.5, "curvature_update_period": 3},
    "TNT": {"lr": 0.01},
    "KBFGS": {"lr": 0.01, "curvature_update_period": 2},
    "SINGD": {"lr": 0.01, "structure": "block", "fisher": SINGDFisher(block_size=2)},
    "MFAC": {"window": 4, "damping": 0.1, "momentum": 0.0},
    "SENG": {"lr": 0.05, "curvature_update_period": 3, "sketch": 3},
    "SOAP": {"inverse_update_period": 4},
    "Shampoo": {"inverse_update_period": 4, "block_size": 3},
    "KLShampoo": {"inverse_update_period": 4},
    "SPlus": {"inverse_update_period": 4, "vector_scale": 1.0},
    "SOAPMuon": {"inverse_update_period": 4},
    "GaLore": {"rank": 2, "inverse_update_period": 4},
    "Sophia": {"curvature_update_period": 4},
    "HessianFree": {"max_steps": 12, "samples": 1},
    "Newton": {"mode": "absolute", "damping": 0.5},
    "GaussNewton": {"damping": 0.5, "spring": 0.5},
    "SSBFGS": {"iterations": 2, "window": 3},
    "SSBroyden": {"iterations": 2},
}
METHODS = {method.name: method for method in methods()}
#: Those that take parameters, in any dtype.
PLAIN = [name for name, method in METHODS.items() if method.needs == "grad"]
CLOSURE = [name for name, method in METHODS.items() if method.needs == "closure"]
#: Whose update is a function of the gradients, so that what a scaling or a sign does is known.
OWN = PLAIN + CLOSURE


class Training:
    """A model, its method, and one step of the loop that the method asks for."""

    def __init__(self, name: str, params: Any = None, **options: Any) -> None:
        self.name, self.method = name, METHODS[name]
        self.model, self.loss_fn = ref.SmallModel(), nn.MSELoss()
        self.options = {**OPTIONS.get(name, {}), **options}
        self.optimizer = self.make(self.model.parameters() if params is None else params(self.model))

    def make(self, params: Any) -> torch.optim.Optimizer:
        if self.method.needs == "layers":
            return self.method.cls(self.model, self.loss_fn, params=list(params), **self.options)
        if self.name in ("HessianFree", "CurveBall"):
            return self.method.cls(params, self.loss_fn, **self.options)
        return self.method.cls(params, **self.options)

    def loss(self, step: int) -> Tensor:
        x, y = ref.batch(step)
        out = self.model(x)
        return (out - y).flatten() * 0.2 if self.name == "GaussNewton" else self.loss_fn(out, y)

    def step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        optimizer = optimizer or self.optimizer
        if self.method.needs == "closure":
            return optimizer.step(lambda: self.loss(step))
        optimizer.zero_grad()
        self.loss(step).backward()
        return optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [10, 9])  # 9: between two refreshes
def test_a_resumed_run_continues_bit_for_bit(name, stop):
    first = Training(name)
    for step in range(stop):
        first.step(step)
    buffer = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = Training(name)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    for step in range(stop, 14):
        second.step(step)
    assert same(uninterrupted(name), second.values())
    assert not same(uninterrupted(name), first.values())


@cache
def uninterrupted(name: str) -> list[Tensor]:
    training = Training(name)
    for step in range(14):
        training.step(step)
    return training.values()


@pytest.mark.parametrize("name", OWN)
def test_state_is_tensors_and_numbers(name):
    training = Training(name)
    for step in range(5):
        training.step(step)
    for state in training.optimizer.state_dict()["state"].values():
        for key, value in state.items():
            assert isinstance(key, str) and isinstance(value, (Tensor, int, float)), f"{key}: {type(value)}"


@pytest.mark.parametrize("name", METHODS)
def test_state_dict_round_trip(name):
    training = Training(name)
    for step in range(3):
        training.step(step)
    saved = training.optimizer.state_dict()
    training.optimizer.load_state_dict(copy.deepcopy(saved))
    again = training.optimizer.state_dict()
    assert saved["param_groups"] == again["param_groups"]
    for key, state in saved["state"].items():
        for entry, value in state.items():
            if isinstance(value, Tensor):
                other = again["state"][key][entry]
                assert torch.equal(value, other) and value.dtype == other.dtype, entry
            elif not isinstance(value, dict):
                assert value == again["state"][key][entry]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_continues_alike(name, through):
    training = Training(name)
    scheduler = lr_scheduler.StepLR(training.optimizer, 3)  # it wraps step()
    for step in range(4):
        training.step(step)
        scheduler.step()
    twin = Training(name)
    twin.model, twin.optimizer, twin.loss_fn = through((training.model, training.optimizer, training.loss_fn))
    if name in ("HessianFree", "CurveBall"):
        twin.loss_fn = twin.optimizer.loss_fn
    for step in range(4, 7):
        training.step(step)
        twin.step(step)
    assert same(training.values(), twin.values())


@pytest.mark.parametrize("name", [*PLAIN, "AdaHessian", "Sophia"])
def test_groups_have_their_own_options(name):
    def halves(model):
        params = list(model.parameters())
        return [{"params": params[:3]}, {"params": params[3:], "lr": 0.0, "weight_decay": 0.5}]

    training = Training(name, halves)
    before = training.values()
    for step in range(3):
        training.step(step)
    after = training.values()
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert same(before[3:], after[3:])


@pytest.mark.parametrize("name", [*PLAIN, "AdaHessian", "Sophia"])
def test_a_group_may_come_later(name):
    training = Training(name, lambda model: list(model.parameters())[:3])
    training.step(0)
    before = training.values()
    training.optimizer.add_param_group({"params": list(training.model.parameters())[3:]})
    for step in range(1, 6):
        training.step(step)
    assert not any(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))


@pytest.mark.parametrize("name", OWN)
def test_named_parameters_are_taken(name):
    plain, named = Training(name), Training(name, lambda model: model.named_parameters())
    for step in range(3):
        plain.step(step)
        named.step(step)
    assert same(plain.values(), named.values())


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    lambda o: lr_scheduler.ConstantLR(o),
    lambda o: lr_scheduler.LinearLR(o),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.PolynomialLR(o),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=10, cycle_momentum=False),
    lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False),
    lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.LinearLR(o)], [2]),
]


@pytest.mark.parametrize("name", METHODS)
def test_every_scheduler_runs(name):
    # What a schedule writes is of the groups, and so of all methods: one of each kind meets them all.
    for make in SCHEDULERS if name in ("KFAC", "SOAP", "Newton") else SCHEDULERS[::6]:
        training = Training(name)
        start = training.optimizer.param_groups[0]["lr"]
        scheduler, rates = make(training.optimizer), set()
        for step in range(2):
            training.step(step)
            scheduler.step()
            rates.add(float(training.optimizer.param_groups[0]["lr"]))
        assert rates != {start}
    training = Training(name)
    scheduler = lr_scheduler.ReduceLROnPlateau(training.optimizer, patience=0)
    for step in range(3):
        training.step(step)
        scheduler.step(1.0)
    assert training.optimizer.param_groups[0]["lr"] < start


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_as_learning_rate_is_a_number(name):
    rate = OPTIONS.get(name, {}).get("lr", 0.01)
    plain, tensor = Training(name, lr=rate), Training(name, lr=torch.tensor(rate, dtype=torch.float64))
    for step in range(3):
        plain.step(step)
        tensor.step(step)
    for a, b in zip(plain.values(), tensor.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("GaussNewton", "HessianFree", "CurveBall")])
def test_maximize_is_to_minimise_the_negative(name):
    down, up = Training(name), Training(name, maximize=True)
    loss = up.loss
    up.loss = lambda step: -loss(step)
    for step in range(6):
        down.step(step)
        up.step(step)
    for a, b in zip(down.values(), up.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PLAIN)
def test_a_closure_gives_the_loss_and_the_plain_step(name):
    plain, closed = Training(name), Training(name)
    for step in range(3):
        plain.step(step)

        def closure(step=step):
            closed.optimizer.zero_grad()
            loss = closed.loss(step)
            loss.backward()
            return loss

        before = closed.loss(step).item()
        assert closed.optimizer.step(closure).item() == before
    assert same(plain.values(), closed.values())


@pytest.mark.parametrize("name", METHODS)
def test_hooks_run_around_a_step(name):
    training, calls = Training(name), []
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    training.step(0)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("name", PLAIN)
def test_precondition_then_any_optimizer(name):
    training = Training(name, lr=0.5)
    plain = torch.optim.SGD(training.model.parameters(), lr=0.5)
    twin = Training(name, lr=0.5)
    for step in range(3):
        training.optimizer.zero_grad()
        training.loss(step).backward()
        training.optimizer.precondition()
        plain.step()
        twin.step(step)
    if name != "SPlus":
        for a, b in zip(training.values(), twin.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OWN)
def test_parameters_without_gradient_and_frozen_ones_stay(name):
    training = Training(name)
    extra = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    training.model.unused = extra
    training.model.out.bias.requires_grad_(False)
    training.optimizer = training.make(training.model.parameters())
    bias = training.model.out.bias.clone()
    for step in range(3):
        training.step(step)
    assert extra.eq(1).all() and torch.equal(training.model.out.bias, bias)


@pytest.mark.parametrize(
    "name", ["SOAP", "Shampoo", "KLShampoo", "SPlus", "Muon", "SOAPMuon", "GaLore", "PSGD", "MFAC"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_resumes_bit_for_bit(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole, first, second = (Training(name, weight_decay=WeightDecay(growing, "corrected")) for _ in range(3))
    for step in range(8):
        whole.step(step)
    for step in range(5):
        first.step(step)
    saved = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    second.model.load_state_dict(first.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, saved, options=options)
    assert second.optimizer.steps == 5
    for step in range(5, 8):
        second.step(step)
    assert same(whole.values(), second.values())


def growing(step: int) -> float:
    return 0.1 * step


# Gradients of every kind


def trained(name: str, gradients: list[Tensor], **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = METHODS[name].cls([p], **{**OPTIONS.get(name, {}), **options})
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (1, 1), (1, 6), (6, 1), (4, 3), (2, 3, 4), (3, 2, 2, 2), (0,), (3, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_shape_and_dtype_moves(name, shape, dtype, generator):
    gradients = [torch.randn(shape, generator=generator).abs().to(dtype) for _ in range(6)]
    p, optimizer = trained(name, gradients, lr=0.05)
    assert p.dtype == dtype and p.isfinite().all()
    assert not p.numel() or (p != 1).any()
    for key, value in optimizer.state[p].items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype == torch.promote_types(dtype, torch.float32) or key == "inner.step", key


@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_parameters_keep_their_state_through_a_checkpoint(name, generator):
    gradients = [torch.randn(4, 3, generator=generator).bfloat16() for _ in range(8)]
    whole, _ = trained(name, gradients, lr=0.05)
    p, optimizer = trained(name, gradients[:5], lr=0.05)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = METHODS[name].cls([p], **{**OPTIONS.get(name, {}), "lr": 0.05})
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for key, value in optimizer.state[p].items():
        assert not isinstance(value, Tensor) or value.dtype == again.state[p][key].dtype, key
    for g in gradients[5:]:
        p.grad = g.clone()
        again.step()
    assert torch.equal(p, whole)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gradients_leave_finite_bounded_steps(name, dtype):
    rank_one = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 5)).to(dtype)
    for g in (torch.zeros(6, 4, dtype=dtype), rank_one, rank_one * 1e-30, rank_one * 1e15):
        p, _ = trained(name, [g] * 9, lr=1e-3)
        assert p.isfinite().all()
        assert (p - 1).abs().max() < 0.5, f"moved {(p - 1).abs().max()} for gradients of {g.abs().max()}"
        if not g.any():
            assert p.eq(1).all()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradients_that_are_not_finite_or_overflow_are_skipped(name, bad, generator):
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(6)]
    clean, _ = trained(name, gradients)
    broken = gradients[2].clone()
    broken[1, 1] = bad
    with pytest.warns(RuntimeWarning, match="skips a step"):
        p, optimizer = trained(name, [*gradients[:3], broken, *gradients[3:]])
    assert torch.equal(p, clean) and optimizer.skipped == 1
    with pytest.raises(FloatingPointError, match="Nothing was changed"):
        trained(name, [broken], loop=Loop(nonfinite="raise"))


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_that_only_creates_the_state_changes_nothing(name, generator):
    # torch.distributed.checkpoint does this: gradients of zero and a learning rate of zero.
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(6)]
    expected, _ = trained(name, gradients)
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = METHODS[name].cls([p], **OPTIONS.get(name, {}))
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"], p.grad = 0.0, torch.zeros(4, 3)
    optimizer.step()
    assert optimizer.state[p]
    optimizer.param_groups[0]["lr"] = rate
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    assert torch.equal(p, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_the_global_random_state_is_not_used(name):
    before = torch.get_rng_state()
    trained(name, [torch.ones(3, 2)] * 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CLOSURE)
def test_the_global_random_state_is_not_used_by_closures(name):
    training, before = Training(name), torch.get_rng_state()
    training.step(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PLAIN)
def test_a_gradient_scaler_leaves_the_same_steps(name):
    plain, scaled = Training(name), Training(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        plain.step(step)
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss(step)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    for a, b in zip(plain.values(), scaled.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# Refusals


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be a non-negative finite number, got -1.0"),
        ({"lr": math.nan}, "lr must be a non-negative finite number, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a non-negative finite number"),
        ({"loop": {"nonfinite": "ignore"}}, "nonfinite must be 'skip' or 'raise'"),
    ],
)
def test_refuses_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        Training(name, **{key: Loop(**value) if key == "loop" else value for key, value in options.items()})


@pytest.mark.parametrize("name", ["SOAP", "Shampoo", "Muon", "SOAPMuon", "KLShampoo", "SPlus", "AdaHessian", "Sophia"])
def test_refuses_betas_out_of_range(name):
    with pytest.raises(ValueError, match=r"betas are weights of old values, each in \[0, 1\); got \(1.0, 0.9\)"):
        Training(name, betas=(1.0, 0.9))


@pytest.mark.parametrize("name", OWN)
def test_refuses_no_parameters_complex_and_repeated_ones(name):
    training = Training(name)
    with pytest.raises(ValueError, match="empty parameter list"):
        training.make([])
    with pytest.raises(TypeError, match=r"is complex .* Train torch.view_as_real"):
        training.make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        training.make([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError):
        training.make(p)


@pytest.mark.parametrize("name", PLAIN)
def test_refuses_sparse_gradients(name):
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"has a sparse gradient, .* Use sparse=False"):
        METHODS[name].cls(table.parameters(), **OPTIONS.get(name, {})).step()


# The list of methods


def test_the_list_names_every_exported_method():
    exported = {
        name
        for name in precond.__all__  # each is loaded when it is asked for
        if isinstance(value := getattr(precond, name), type) and issubclass(value, torch.optim.Optimizer)
    }
    assert exported - {"SecondOrderOptimizer", "PreconditionedOptimizer"} == set(METHODS)
    assert [method.name for method in methods()] == sorted(METHODS), "a method is listed twice, or out of order"
    for method in METHODS.values():
        assert method.needs in ("grad", "layers", "closure")
        assert method.curvature and method.structure and method.solver
        assert method.paper.startswith("https://")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_the_loss(name):
    training = Training(name)

    def value():
        return sum(training.loss_fn(training.model(ref.batch(i)[0]), ref.batch(i)[1]).item() for i in range(5))

    before = value()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(25):
            training.step(step % 5)
    assert value() < before
