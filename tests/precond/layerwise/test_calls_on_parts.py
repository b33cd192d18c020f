"""One call of the loss for each part of an output has the curvature of one call, and is sent back with the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature.estimation.gathered_calls import GatheredCalls
from curvature.estimation.step_collector import StepCollector
from precond import KFAC, Loop, NaturalGradient
from tests.curvature.loops import assert_same, statistics

N, T = 4, 5
MEAN, SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


class Decoder(nn.Module):
    """A state that goes from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.state(h))
            out.append(self.last(h))
        return torch.stack(out, 1)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, T, 3).double(), torch.randint(3, (N, T))


#: The loss of all steps, and what it is equal to as one call.
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": (
        MEAN,
        lambda z, y: torch.stack([MEAN(z[:, t], y[:, t]) for t in range(T)]).mean(),
        lambda z, y: MEAN(z.flatten(0, 1), y.flatten()),
    ),
    "sum": (
        SUM,
        lambda z, y: torch.stack([SUM(z[:, t], y[:, t]) for t in range(T)]).sum(),
        lambda z, y: SUM(z.flatten(0, 1), y.flatten()),
    ),
    "unequal, some ignored": (
        MEAN,
        lambda z, y: (2 * MEAN(z[:, :2].flatten(0, 1), y[:, :2].flatten()) + MEAN(z[:, 4], y[:, 4])) / 3,
        lambda z, y: MEAN(
            z.flatten(0, 1), y.masked_fill(torch.tensor([0, 0, 1, 1, 0]).bool().expand(N, T), -100).flatten()
        ),
    ),
}


def learnt(loss: Callable[[Tensor, Tensor], Tensor], loss_fn: nn.Module, kind: str, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Decoder().double()
    options = {"structure": "layer", "curvature_ema": 0.0, "kl_clip": None, "loop": Loop(seed=seed)}
    optimizer = NaturalGradient(model, loss_fn, lr=0.0, fisher=kind, **options)
    x, y = batch()
    loss(model(x), y).backward()
    optimizer.step()
    optimizer.detach()
    return statistics(optimizer)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_have_the_curvature_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn, parts, whole = LOSSES[name]
    times = []
    collect = StepCollector.collect
    monkeypatch.setattr(StepCollector, "collect", lambda *a, **k: (times.append(1), collect(*a, **k))[1])
    found = learnt(parts, loss_fn, "exact")
    assert len(times) == 1
    assert_same(found, learnt(whole, loss_fn, "exact"), rtol=1e-10)


class Steps(Decoder):
    """Returns a list, or the loss, of outputs that it lays side by side or not."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, x: Tensor, y: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        h, outputs = x.new_zeros(len(x), 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.state(h))
            outputs.append(self.last(h))
        if "apart" not in self.returns:
            outputs = list(torch.stack(outputs, 1).unbind(1))
        return outputs if "list" in self.returns else of_steps(outputs, y)


def of_steps(outputs: list[Tensor], y: Tensor) -> Tensor:
    return torch.stack([SUM(z, t) for z, t in zip(outputs, y.unbind(1), strict=True)]).sum() / (N * T)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("returns", ["list", "list, apart", "loss", "loss, apart"])
def test_calls_in_lists_and_in_forward_are_gathered(returns: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as one call on all; gradients of calls as those of each by itself."""
    times: list[int] = []
    collect = StepCollector.collect
    monkeypatch.setattr(StepCollector, "collect", lambda *a, **k: (times.append(1), collect(*a, **k))[1])

    def step(method: type[KFAC], right: bool) -> dict[str, Tensor]:
        x, y = batch()
        if method is NaturalGradient and kind == "exact":
            y[0, 0] = -100
        torch.manual_seed(0)
        model = Steps("list" if right and kind == "exact" else returns).double()
        structure = {"structure": "layer"} if method is NaturalGradient else {}
        optimizer = method(model, SUM, lr=0.0, fisher=kind, kl_clip=None, **structure)
        result = model(x, y)
        if right and kind == "exact":
            result = SUM(torch.stack(result, 1).flatten(0, 1), y.flatten()) / (N * T)
        (of_steps(result, y) if isinstance(result, list) else result).backward()
        optimizer.step()
        optimizer.detach()
        return statistics(optimizer)

    found = [step(method, right=False) for method in (NaturalGradient, KFAC)]
    assert len(times) == 2
    if kind == "empirical":
        monkeypatch.setattr(GatheredCalls, "may_take", staticmethod(lambda passes, call: False))
    for one, method in zip(found, (NaturalGradient, KFAC), strict=True):
        assert_same(one, step(method, right=True), rtol=1e-10)
    assert len(times) == 2 + 2 * (T if kind == "empirical" else 1)


def test_draws_have_the_right_mean() -> None:
    """Within four standard errors of it."""
    loss_fn, parts, whole = LOSSES["mean"]
    right = learnt(whole, loss_fn, "exact")
    drawn = [learnt(parts, loss_fn, "mc", seed) for seed in range(40)]
    for name, block in right.items():
        traces = torch.stack([found[name].trace() for found in drawn])
        assert abs(traces.mean() - block.trace()) < 4 * traces.std() / 40**0.5


def test_a_part_that_is_dropped_leaves_no_trace() -> None:
    """One whose gradient does not arrive, and a backward pass that raises between the calls and the output."""
    torch.manual_seed(0)
    model = Decoder().double()
    optimizer = NaturalGradient(model, MEAN, lr=0.0, fisher="exact", structure="layer", curvature_ema=0.0, kl_clip=None)
    x, y = batch()

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("simulated")

    z = model(x)
    middle = z * 1.0  # calls above, the output below
    middle.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        (MEAN(z[:, 0], y[:, 0]) + MEAN(z[:, 1], y[:, 1]) + middle.sum()).backward()
    optimizer.zero_grad()
    z = model(x)
    MEAN(z[:, 2], y[:, 2])
    (2 * MEAN(z[:, :2].flatten(0, 1), y[:, :2].flatten()) + MEAN(z[:, 4], y[:, 4])).div(3).backward()
    optimizer.step()
    optimizer.detach()
    assert_same(statistics(optimizer), learnt(LOSSES["unequal, some ignored"][2], MEAN, "exact"), rtol=1e-10)


@pytest.mark.parametrize("cap", [None, 30.0], ids=["gathered", "not gathered"])
def test_a_loss_for_each_step_of_time_is_several_terms_of_an_example(cap: float | None) -> None:
    """By which K-FAC chooses how positions count: not as one term of an example that the model aggregates."""
    x, y = batch()

    def capped(z: Tensor) -> Tensor:
        return z if cap is None else cap * torch.tanh(z / cap)

    found = []
    for loss in (
        lambda z: MEAN(capped(z).flatten(0, 1), y.flatten()),
        lambda z: torch.stack([MEAN(capped(z[:, t]), y[:, t]) for t in range(T)]).mean(),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = KFAC(model, MEAN, fisher="exact", kl_clip=None)
        loss(model(x)).backward()
        optimizer.step()
        found.append(statistics(optimizer))
        optimizer.detach()
    assert_same(found[1], found[0], rtol=1e-10)


def test_parts_of_different_widths_are_sent_one_by_one() -> None:
    """A column, and some rows whole."""
    loss_fn = nn.MSELoss()
    x = batch()[0][:, 0]
    t = torch.arange(12.0).reshape(N, 3).double().sin()
    mask = torch.zeros(N, 3).double()
    mask[:, 0] += 1 / N
    mask[:3] += 1 / 9

    def step(loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3).double()
        optimizer = NaturalGradient(model, loss_fn, lr=0.0, fisher="exact", structure="layer", kl_clip=None)
        loss(model(x)).backward()
        optimizer.step()
        optimizer.detach()
        return statistics(optimizer)

    found = step(lambda z: loss_fn(z[:, 0], t[:, 0]) + loss_fn(z[:3], t[:3]))
    (block,) = found.values()
    X = torch.cat([x, torch.ones(N, 1).double()], 1)
    J = torch.einsum("ij,nb->nijb", torch.eye(3).double(), X).reshape(N, 3, -1)  # d z_i / d (row j, column b)
    dense = 2 * torch.einsum("nia,ni,nib->ab", J, mask, J)
    torch.testing.assert_close(block.trace(), dense.trace(), rtol=1e-10, atol=0)
