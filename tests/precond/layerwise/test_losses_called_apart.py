"""One loss in several spellings within a step: the module, a function, another module, and the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond import KFAC, Loop

MEAN, SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
with torch.random.fork_rng():
    torch.manual_seed(1)
    X, Y, OTHER = torch.randn(8, 4).double(), torch.randint(3, (8,)), torch.randint(3, (8,))
#: What the loop minimises: of the model's result and the loss module, for both examples of a batch.
Minimised = Callable[[Any, nn.Module], Tensor]


class Heads(nn.Module):
    """Logits; two of them; or a loss of its own beside them, in a tuple or a mapping."""

    def __init__(self, returns: str = "logits") -> None:
        super().__init__()
        self.returns = returns
        self.inner, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.inner(x).tanh()
        z = self.first(h)
        if self.returns == "logits":
            return z
        if self.returns == "two":
            return z, self.second(h)
        loss = F.cross_entropy(z, Y)
        if self.returns == "deep":
            return loss + 0.5 * F.cross_entropy(self.second(h), OTHER), z
        if self.returns == "squares":
            return F.mse_loss(z, X[:, 1:]), z
        return (loss, z) if self.returns == "tuple" else {"loss": loss, "logits": z}


def trained(
    minimised: Minimised, returns: str, loss_fn: nn.Module, kind: str, parts: int = 2, **loop: Any
) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Heads(returns).double()
    optimizer = KFAC(model, loss_fn, lr=0.1, damping=1e-2, kl_clip=None, momentum=0, fisher=kind, loop=Loop(**loop))
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(parts):
            minimised(model(X), loss_fn).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def own(result: Any) -> tuple[Tensor, Tensor]:
    return tuple(result.values()) if isinstance(result, dict) else result


#: What the model returns, the loss module, and one loss in two spellings: apart, and by calls of the module alone.
SPELLINGS: dict[str, tuple[str, nn.Module, Minimised, Minimised]] = {
    "a function": ("logits", MEAN, lambda z, f: F.cross_entropy(z, Y), lambda z, f: f(z, Y)),
    "mixed targets": (
        "logits",
        MEAN,
        lambda z, f: 0.3 * f(z, Y) + 0.7 * F.cross_entropy(z, OTHER),
        lambda z, f: 0.3 * f(z, Y) + 0.7 * f(z, OTHER),
    ),
    "a part": (
        "logits",
        MEAN,
        lambda z, f: f(z[:4], Y[:4]) + 2 * F.cross_entropy(z[4:], Y[4:]),
        lambda z, f: f(z[:4], Y[:4]) + 2 * f(z[4:], Y[4:]),
    ),
    "a view": (
        "logits",
        MEAN,
        lambda z, f: 0.3 * f(z.T.contiguous().T, Y) + 0.7 * F.cross_entropy(z.T.contiguous().T, OTHER),
        lambda z, f: 0.3 * f(z, Y) + 0.7 * f(z, OTHER),
    ),
    "in place": (
        "logits",
        MEAN,
        lambda z, f: F.cross_entropy(z.add_(X[:, :3]), Y),
        lambda z, f: f(z.add_(X[:, :3]), Y),
    ),
    "two functions": (
        "logits",
        MEAN,
        lambda z, f: 0.3 * F.cross_entropy(z, Y) + F.cross_entropy(z, OTHER),
        lambda z, f: 0.3 * f(z, Y) + f(z, OTHER),
    ),
    "mixed targets of a function": (
        "logits",
        MEAN,
        lambda z, f: 2 * F.cross_entropy(z, 0.3 * F.one_hot(Y, 3).to(z) + 0.7 * F.one_hot(OTHER, 3).to(z)),
        lambda z, f: 0.6 * f(z, Y) + 1.4 * f(z, OTHER),
    ),
    "another module": (
        "logits",
        SUM,
        lambda z, f: f(z, Y) + nn.CrossEntropyLoss(reduction="sum")(z, OTHER),
        lambda z, f: f(z, Y) + f(z, OTHER),
    ),
}
for name in ("tuple", "mapping"):
    SPELLINGS |= {
        f"own loss, {name}": (name, MEAN, lambda r, f: own(r)[0], lambda z, f: f(z, Y)),
        f"own loss unused, {name}": (name, MEAN, lambda r, f: F.cross_entropy(own(r)[1], Y), lambda z, f: f(z, Y)),
        f"own loss and the module, {name}": (
            name,
            MEAN,
            lambda r, f: 0.3 * own(r)[0] + f(own(r)[1], OTHER),
            lambda z, f: 0.3 * f(z, Y) + f(z, OTHER),
        ),
        f"own loss and a function, {name}": (
            name,
            MEAN,
            lambda r, f: 0.3 * own(r)[0] + F.cross_entropy(own(r)[1], OTHER),
            lambda z, f: 0.3 * f(z, Y) + f(z, OTHER),
        ),
    }


#: An empirical Fisher takes the gradient of each call, which their sum does not tell.
SUMS_ALONE = ("two functions", "mixed targets of a function")


@pytest.mark.parametrize("capture", ["auto", "shadow"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_equal(name: str, kind: str, capture: str) -> None:
    returns, loss_fn, apart, together = SPELLINGS[name]
    if name == "in place" and capture == "shadow":
        with pytest.raises(ValueError, match="changed in place"):
            trained(apart, returns, loss_fn, kind, capture=capture)
        return
    if kind == "empirical" and name in SUMS_ALONE:
        with pytest.raises(TypeError, match="depends on targets"):
            trained(apart, returns, loss_fn, kind, capture=capture)
        return
    expected = trained(together, "logits", loss_fn, kind)
    for got, p in zip(trained(apart, returns, loss_fn, kind, capture=capture), expected, strict=True):
        torch.testing.assert_close(got, p, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("returns", ["deep", "squares"])
def test_the_own_loss_counts_whole_where_passes_are_repeated(returns: str, kind: str) -> None:
    """Also what does not go through the logits beside it."""
    loss_fn = nn.MSELoss() if returns == "squares" else MEAN

    def module(r: Any, f: nn.Module) -> Tensor:
        return f(r, X[:, 1:]) if returns == "squares" else f(r[0], Y) + 0.5 * f(r[1], OTHER)

    expected = trained(module, "logits" if returns == "squares" else "two", loss_fn, kind)
    for capture in ("auto", "shadow"):
        got = trained(lambda r, f: r[0], returns, loss_fn, kind, capture=capture)
        for p, q in zip(got, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


#: What cannot be read off a gradient: of part of the output, of another output, with another sign, without labels.
REFUSED: dict[str, tuple[str, nn.Module, Minimised]] = {
    "a temperature": ("logits", MEAN, lambda z, f: f(z, Y) + F.cross_entropy(z / 2, OTHER)),
    "another head": ("two", MEAN, lambda z, f: f(z[0], Y) + F.cross_entropy(z[1], OTHER)),
    "smoothed, and a constant": (
        "logits",
        MEAN,
        lambda z, f: 0.3 + f(z, Y) + F.cross_entropy(z, Y, label_smoothing=0.1),
    ),
    "squares": ("logits", nn.MSELoss(), lambda z, f: f(z, X[:, :3]) + F.mse_loss(z, X[:, 1:])),
}
#: The same without any call of the module.
ALONE: dict[str, tuple[str, nn.Module, Minimised]] = {
    "squares of slopes": ("logits", nn.MSELoss(), lambda z, f: F.mse_loss(z.sigmoid(), X[:, 1:])),
    "a column": ("logits", nn.MSELoss(), lambda z, f: F.mse_loss(z[:, 0], X[:, 1])),
    "half a square and a penalty": ("logits", nn.MSELoss(), lambda z, f: F.mse_loss(z, X[:, 1:]) / 2 + z.abs().mean()),
    "added with a factor": ("logits", nn.MSELoss(), lambda z, f: torch.add(z.mean(), F.mse_loss(z, X[:, 1:]), alpha=2)),
    "written out, weighted": (
        "logits",
        nn.MSELoss(),
        lambda z, f: ((z - X[:, 1:]) ** 2 * torch.arange(len(X)).double().unsqueeze(1)).mean(),
    ),
    "written out, a column": ("logits", nn.MSELoss(), lambda z, f: ((z[:, 0] - X[:, 1]) ** 2).mean()),
    "written out, of several targets": (
        "logits",
        nn.MSELoss(),
        lambda z, f: ((z - torch.stack([X[:, 1:], X[:, :-1]])) ** 2).mean(),
    ),
    "written out, a row twice": ("logits", nn.MSELoss(), lambda z, f: ((z[[1, 1, 2]] - X[:3, 1:]) ** 2).mean()),
    "written out, rows, and a penalty on all": (
        "logits",
        nn.MSELoss(),
        lambda z, f: ((z[1:] - X[1:, 1:]) ** 2).mean() + 0.1 * z.abs().mean(),
    ),
    "rows, and a penalty on all": (
        "logits",
        nn.MSELoss(),
        lambda z, f: F.mse_loss(z[1:], X[1:, 1:]) + 0.1 * z.abs().mean(),
    ),
    "written out, clamped": ("logits", nn.MSELoss(), lambda z, f: ((z - X[:, 1:]).clamp(-1, 1) ** 2).mean()),
    "written out, entries": ("logits", nn.MSELoss(), lambda z, f: ((z - X[:, 1:])[X[:, 1:] > 0] ** 2).mean()),
    "written out, slopes": ("logits", nn.MSELoss(), lambda z, f: ((2 * z - X[:, 1:]) ** 2).mean()),
    "written out, half of it and a penalty": (
        "logits",
        nn.MSELoss(),
        lambda z, f: ((z - X[:, 1:]) ** 2).mean() / 2 + z.abs().mean(),
    ),
}


@pytest.mark.filterwarnings("ignore:.*has a gradient but no curvature:UserWarning")
@pytest.mark.parametrize("capture", ["auto", "shadow"])
@pytest.mark.parametrize("name", [*REFUSED, *ALONE])
def test_what_a_gradient_does_not_tell_is_refused(name: str, capture: str) -> None:
    returns, loss_fn, minimised = (REFUSED | ALONE)[name]
    with pytest.raises(TypeError, match=r"a loss like the optimizer's that is no call .* loop=Loop\(capture='loss'\)"):
        trained(minimised, returns, loss_fn, "exact", capture=capture)
    if name not in ALONE:  # as the message says
        trained(minimised, returns, loss_fn, "exact", capture="loss")


@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_a_loss_that_is_taken_away_is_refused(capture: str) -> None:
    with pytest.raises(ValueError, match="holds positive and negative multiples of the loss"):
        trained(
            lambda z, f: f(z, Y) - 0.3 * F.cross_entropy(z, OTHER), "logits", MEAN, "exact", parts=1, capture=capture
        )


#: Squared errors, whose gradient does not tell their weight, but how they enter does: by a function, by the module.
SQUARES: dict[str, tuple[str, Minimised, Minimised]] = {
    "mean": ("mean", lambda z, f: F.mse_loss(z, X[:, 1:]), lambda z, f: f(z, X[:, 1:])),
    "mean of values": (
        "mean",
        lambda z, f: F.mse_loss(z, X[:, 1:], reduction="none").mean(),
        lambda z, f: f(z, X[:, 1:]),
    ),
    "with a penalty": (
        "mean",
        lambda z, f: 0.1 * z.abs().mean() + F.mse_loss(z, X[:, 1:]),
        lambda z, f: f(z, X[:, 1:]) + 0.1 * z.abs().mean(),
    ),
    "a share": ("mean", lambda z, f: F.mse_loss(z, X[:, 1:]) / 2, lambda z, f: f(z, X[:, 1:]) / 2),
    "a product": (
        "mean",
        lambda z, f: torch.tensor(3.0) * (0.2 * F.mse_loss(z, X[:, 1:])),
        lambda z, f: 0.6 * f(z, X[:, 1:]),
    ),
    "half a sum": ("sum", lambda z, f: F.mse_loss(z, X[:, 1:], reduction="sum") / 2, lambda z, f: f(z, X[:, 1:]) / 2),
    "sum": ("sum", lambda z, f: F.mse_loss(z, X[:, 1:], reduction="sum"), lambda z, f: f(z, X[:, 1:])),
    "written out": ("mean", lambda z, f: ((z - X[:, 1:]) ** 2).mean(), lambda z, f: f(z, X[:, 1:])),
    "written out, a product": (
        "mean",
        lambda z, f: ((z - X[:, 1:]) * (z - X[:, 1:])).mean(),
        lambda z, f: f(z, X[:, 1:]),
    ),
    "written out, half of each": (
        "mean",
        lambda z, f: (z - X[:, 1:]).square().sum(1).mean() / 2,
        lambda z, f: 1.5 * f(z, X[:, 1:]),
    ),
    "written out, of each": (
        "mean",
        lambda z, f: (X[:, 1:] - z).pow(2).sum(1).mean() + 0.1 * z.abs().mean(),
        lambda z, f: 3 * f(z, X[:, 1:]) + 0.1 * z.abs().mean(),
    ),
    "written out, sum": ("sum", lambda z, f: ((z - X[:, 1:]) ** 2).sum(), lambda z, f: f(z, X[:, 1:])),
    "written out, of some rows": (
        "mean",
        lambda z, f: (lambda d: (d * d).mean() * 2)(z[1:] - X[1:, 1:]),
        lambda z, f: 2 * f(z[1:], X[1:, 1:]),
    ),
    "written out, the other way round": (
        "mean",
        lambda z, f: ((z.flip(0) - X.flip(0, 1)[:, :-1].flip(1)) ** 2).flip(0, 1).mean() + 0.1 * z.abs().mean(),
        lambda z, f: f(z, X[:, 1:]) + 0.1 * z.abs().mean(),
    ),
    "written out, a dot product": (
        "mean",
        lambda z, f: (lambda d: torch.dot(d, d) / d.numel())((z - X[:, 1:]).flatten()),
        lambda z, f: f(z, X[:, 1:]),
    ),
    "written out, a dot product beside": (
        "sum",
        lambda z, f: (lambda d: d @ d)((z - X[:, 1:]).view(-1)) + 0.1 * z.abs().mean(),
        lambda z, f: f(z, X[:, 1:]) + 0.1 * z.abs().mean(),
    ),
    "sums of means": (
        "mean",
        lambda z, f: F.mse_loss(z, X[:, 1:], reduction="none").sum(1).mean(),
        lambda z, f: 3 * f(z, X[:, 1:]),
    ),
    "sum of values": (
        "sum",
        lambda z, f: nn.MSELoss(reduction="none")(z, X[:, 1:]).sum(),
        lambda z, f: f(z, X[:, 1:]),
    ),
}


@pytest.mark.parametrize("capture", ["auto", "shadow"])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_by_function_are_accumulated_like_those_of_the_module(name: str, capture: str) -> None:
    reduction, apart, together = SQUARES[name]
    loss_fn = nn.MSELoss(reduction=reduction)
    expected = trained(together, "logits", loss_fn, "exact")
    for got, p in zip(trained(apart, "logits", loss_fn, "exact", capture=capture), expected, strict=True):
        torch.testing.assert_close(got, p, rtol=1e-11, atol=1e-12)


def test_one_loss_with_smoothed_labels_by_function_is_a_plain_mean() -> None:
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = trained(lambda z, f: f(z, Y), "logits", smooth, "exact", parts=1)
    got = trained(lambda z, f: F.cross_entropy(z, Y, label_smoothing=0.1), "logits", MEAN, "exact", parts=1)
    for p, q in zip(got, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_losses_by_function_whose_weight_nothing_tells_are_no_more_than_one_of_a_step() -> None:
    with pytest.raises(ValueError, match=r"do not tell the weight of each .* Call the loss module"):
        trained(lambda z, f: (F.cross_entropy(z, torch.full_like(z, 1 / 3)) - 0.1).abs() + 0.1, "logits", MEAN, "exact")


def test_a_function_of_log_probabilities_that_is_no_loss_with_labels_is_refused() -> None:
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        trained(lambda z, f: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(), "logits", MEAN, "exact")


@pytest.mark.filterwarnings("ignore:.*has a gradient but no curvature:UserWarning")
def test_one_of_several_outputs_is_chosen_and_the_others_are_not_forgotten() -> None:
    def first(z: Any, loss_fn: nn.Module) -> Tensor:
        return F.cross_entropy(z[0], Y)

    def both(z: Any, loss_fn: nn.Module) -> Tensor:
        return F.cross_entropy(z[0], Y) + F.cross_entropy(z[1], Y)

    with pytest.raises(RuntimeError, match=r"loop=Loop\(output=lambda result: result\[0\]\)"):
        trained(first, "two", MEAN, "exact")
    trained(first, "two", MEAN, "exact", output=lambda result: result[0])
    with pytest.raises(TypeError, match="a loss like the optimizer's that is no call"):
        trained(both, "two", MEAN, "exact", output=lambda result: result[0])


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


@pytest.mark.parametrize("loss", [F.cross_entropy, MEAN], ids=["function", "module"])
def test_a_pass_on_the_output_of_a_pass_is_a_use_of_the_same_weights(loss: Any) -> None:
    moved = []
    for inside in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = nn.Linear(4, 4).double()
        model = Twice(inner) if inside else inner
        optimizer = KFAC(model, MEAN, lr=0.1, damping=1e-2, kl_clip=None, momentum=0, fisher="exact")
        for _ in range(2):
            optimizer.zero_grad()
            (MEAN if inside else loss)(model(X) if inside else model(model(X)), Y).backward()
            optimizer.step()
        moved.append(inner.weight.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-11, atol=1e-12)


def test_a_share_that_is_hardly_there_is_no_error() -> None:
    """Rounding errors of what is taken away are larger than what is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = KFAC(model, MEAN, lr=0.1, fisher="exact", curvature_update_period=1)
    x = X.float()
    for share in (1 - 1e-7, 1 - 1e-6, 1 - 1e-4, 0.99, 0.05, 1e-4, 1e-7):
        optimizer.zero_grad()
        z = model(x)
        (share * MEAN(z, Y) + (1 - share) * F.cross_entropy(z, OTHER)).backward()
        optimizer.step()


@pytest.mark.parametrize("axis", [2, -1])
def test_a_column_behind_several_axes_is_no_choice_of_rows(axis: int) -> None:
    """Its squared error, written out, is refused however its axis is counted: it was taken for all three columns."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = KFAC(model, nn.MSELoss(), fisher="exact")
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        model(torch.randn(4, 5, 4).double()).select(axis, 0).square().mean().backward()
        optimizer.step()
