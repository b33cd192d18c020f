"""A pass that is run again is the pass that was: in its modes, its buffers, its own random numbers, what it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from curvature.estimation.tape import Tape
from precond import KFAC, LevenbergMarquardt, Loop, QuadraticModel
from precond.layerwise.step_size import StepModel
from tests.curvature.loops import assert_same, batch, silently, statistics, watching

LOSS = nn.CrossEntropyLoss()


class Warming(nn.Module):
    """Grows with the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


class Centred(nn.Module):
    """Subtracts a centre, which the loop moves after the pass, and which the pass moves by its name and by another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.other_name = [self.seen]

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.centre) * (1 + self.seen)
        self.seen += 1
        self.other_name[0] *= 2
        return x


def iterating() -> nn.Module:
    """Spectral norm far from the end of its power iteration, which goes on in buffers."""
    layer = parametrizations.spectral_norm(nn.Linear(5, 5), n_power_iterations=1)
    with torch.no_grad():
        layer.parametrizations.weight[0]._u.copy_(torch.eye(5)[0])
        layer.parametrizations.weight[0]._v.copy_(torch.eye(5)[1])
    return layer


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "dropout": nn.Dropout,
    "batch norm": lambda: nn.BatchNorm1d(5, momentum=0.5),
    "power iteration": iterating,
    "attribute": Warming,
    "generator": Noisy,
    "buffers": Centred,
}


def model(name: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), MIDDLES[name](), nn.Tanh(), nn.Linear(5, 3)).double()


def loop(net: nn.Sequential, optimizer: Any, evaluates: bool) -> list[dict[str, Tensor]]:
    """Two steps of two micro-batches; what the loop changes before ``step()`` is no part of the passes."""
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for number in range(2):
            net.train(not (evaluates and number))  # fine-tuning with frozen statistics
            for seed in (2, 3):
                x, y = batch(6, seed=seed + 2 * number)
                LOSS(net(x), y).backward()
            net.train(not net.training)  # validation between backward and step, say
            net(batch(6)[0])
            if isinstance(net[1], Centred):
                net[1].centre += 1.0
            silently(optimizer.step)
            optimizer.zero_grad()
            found.append(statistics(optimizer))
    return found


@pytest.mark.parametrize("name", MIDDLES)
def test_repeated_passes_are_those_that_were(name: str) -> None:
    found = {}
    for capture in ("loss", "shadow"):
        net = model(name)
        optimizer = watching(net, LOSS, "kfac", "exact", curvature_ema=0.0, capture=capture, eval_mode=True)
        found[capture] = loop(net, optimizer, evaluates=name == "batch norm")
    for got, expected in zip(found["shadow"], found["loss"], strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("name", MIDDLES)
def test_a_closure_that_is_called_again_finds_the_model_as_it_was(name: str) -> None:
    net = model(name)
    steps = StepModel(KFAC(net, LOSS, step_size=QuadraticModel()), QuadraticModel(), None, False)
    x, y = batch(6)
    loss = steps.evaluated(lambda: LOSS(net(x), y))
    assert steps.replay.value() == loss
    assert steps.replay.value() == loss


def test_a_buffer_that_is_gone_is_refused_once_and_kept_from_then_on() -> None:
    net = model("buffers")
    tape = Tape(net, LOSS, lambda: dict(net.named_parameters()))
    tape.records = True  # and no pass is expected to be run again
    x, _ = batch(6)
    for number in range(2):
        expected = net(x)
        net[1].centre += 1.0
        (origin,) = tape.passes
        if number == 0:
            with pytest.raises(RuntimeError, match="the buffer 'centre' of a Centred was written since"):
                tape.repeat(origin).__enter__()
            tape.clear()
        else:
            with tape.repeat(origin) as again:
                assert torch.equal(again.output, expected)


class OwnLoss(nn.Module):
    """Returns a loss of two parts, and logits without their graph; hides a layer while told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3)
        self.hides = False

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        inner = lambda z: self.drop(self.first(z).tanh())  # noqa: E731
        x = checkpoint(inner, x.requires_grad_(), use_reentrant=True) if self.hides else inner(x)
        z = self.last(x)
        losses = [F.cross_entropy(z, labels), F.cross_entropy(z[:3], labels[:3])]
        return {"loss": 0.5 * losses[0] + 0.1 * losses[1], "logits": z.detach()}


@pytest.mark.parametrize("how", ["shadow", "compiled", "hidden"])
def test_detached_logits_beside_an_own_loss(how: str) -> None:
    found = []
    for capture in ("plain", how):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = OwnLoss().double()
            net.hides = capture == "hidden"
            called = torch.compile(net, backend="eager") if capture == "compiled" else net
            mode = "shadow" if capture == "shadow" else "auto"
            optimizer = watching(called, LOSS, "kfac", "exact", curvature_ema=0.0, capture=mode)
            for seed in (1, 2):
                (called(*batch(6, seed=seed))["loss"] / 2).backward()
            silently(optimizer.step)
            found.append(statistics(optimizer))
    assert_same(found[1], found[0])


class Quantized(nn.Module):
    """Losses inside, one of detached codes; what is hidden calls another one, for a log."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.codes, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.hides = False

    def inner(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.log = F.mse_loss(self.codes(h), h.detach()).detach()
        return h

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = checkpoint(self.inner, x.requires_grad_(), use_reentrant=True) if self.hides else self.inner(x)
        q = self.codes(h)
        near, code = F.mse_loss(q.detach(), h), F.mse_loss(q, h.detach())
        z = self.last(h + (q - h).detach())
        return {"loss": F.cross_entropy(z, labels) + code + 0.25 * near, "logits": z.detach()}


def test_losses_inside_are_told_from_others_that_a_repeated_pass_calls() -> None:
    found = []
    for hides in (False, True):
        torch.manual_seed(0)
        net = Quantized().double()
        net.hides = hides
        optimizer = watching(net, LOSS, "kfac", "exact", curvature_ema=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            net(*batch(6, seed=1))["loss"].backward()
            silently(optimizer.step)
        found.append(statistics(optimizer))
    assert_same(found[1], found[0])


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(x).tanh()
        return [head(x) for head in self.heads]


def of_heads(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One head is left out, and one counts half."""
    z = net(x)
    return 0.5 * loss_fn(z[0], y) + loss_fn(z[2], y)


class ActorCritic(nn.Module):
    """Outputs of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, value = self.last(self.body(x).tanh()).split([3, 1], -1)
        return logits, value


def of_the_value(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_fn(net(x)[1].squeeze(-1), y.double())


def of_actions(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Values of the actions that were taken, as in Q-learning."""
    return loss_fn(net(x).gather(1, y[:, None]).squeeze(1), y.double())


def of_some_rows(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_fn(net(x)[1:].flip(0), F.one_hot(y[1:], 3).double())


def of_differences(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Siamese networks."""
    return loss_fn(net(x) - net(x + 1), F.one_hot(y, 3).double())


def at_a_temperature(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_fn(net(x) / 2, y)


def at_a_temperature_in_place(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_fn(net(x).div_(2), y)


def a_view_at_a_temperature_in_place(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_fn(net(x).div_(2).view(-1, 3), y)


def of_a_critic(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The generator's loss."""
    critic = torch.ones(3, 1, dtype=torch.float64)
    return loss_fn((net(x).tanh() @ critic).squeeze(1), y.double())


LOOPS: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], nn.Module, bool]] = {
    "heads": (of_heads, Heads, LOSS, True),
    "a value": (of_the_value, ActorCritic, nn.MSELoss(), True),
    "actions": (of_actions, lambda: model("dropout"), nn.MSELoss(), True),
    "robust actions": (of_actions, lambda: model("dropout"), nn.SmoothL1Loss(), True),
    "some rows": (of_some_rows, lambda: model("dropout"), nn.MSELoss(), True),
    "differences": (of_differences, lambda: model("dropout"), nn.MSELoss(), False),
    "temperature": (at_a_temperature, lambda: model("dropout"), LOSS, False),
    "temperature in place": (at_a_temperature_in_place, lambda: model("dropout"), LOSS, False),
    "temperature in place, a view": (a_view_at_a_temperature_in_place, lambda: model("dropout"), LOSS, False),
    "critic": (of_a_critic, lambda: model("dropout"), nn.BCEWithLogitsLoss(), False),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_the_loss_sees_of_a_repeated_pass(name: str) -> None:
    """Some numbers of what the model returned are found again; what was computed from them outside is refused."""
    loop, make, loss_fn, served = LOOPS[name]
    found = []
    for capture in ("loss", "shadow"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = make().double()
            optimizer = watching(net, loss_fn, "kfac", "exact", curvature_ema=0.0, capture=capture)
            loop(net, loss_fn, *batch(6)).backward()
            if capture == "shadow" and not served:
                with pytest.raises(ValueError, match="was computed from the output outside of the model"):
                    optimizer.step()
                return
            silently(optimizer.step)
            found.append(statistics(optimizer))
    assert_same(found[1], found[0])


def test_a_pass_with_other_values_than_the_parameters_is_not_run_again_with_these() -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), nn.MSELoss()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, loss_fn, loop=Loop(capture="shadow"))
    before = [p.detach().clone() for p in model.parameters()]

    def backward(values: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        loss_fn(torch.func.functional_call(model, values, (x,)), y).backward()

    def refused(first: str) -> None:
        with pytest.raises(ValueError, match=rf"ran with other values in the places of {first}.*functional_call"):
            optimizer.step()

    backward({name: 1.1 * p for name, p in model.named_parameters()})
    refused("0.weight")
    backward({"0.bias": 1.1 * model[0].bias})  # which is frozen
    refused(r"0.bias \(")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    backward(dict(model.named_parameters()))
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, True]


@pytest.mark.parametrize("option", ["damping_rule", "step_size"])
def test_a_batch_whose_output_was_changed_in_place_is_not_evaluated_again_without_the_change(option: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    value = LevenbergMarquardt(period=1) if option == "damping_rule" else QuadraticModel()
    optimizer, before = KFAC(model, loss_fn, **{option: value}), model.weight.detach().clone()
    x, y = batch(6)
    loss_fn(model(x).div_(2), y).backward()
    with pytest.raises(RuntimeError, match="output as it is, unchanged, or as a view of it"):
        optimizer.step()
    assert torch.equal(model.weight, before)
