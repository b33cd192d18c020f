"""One notion of a loss: what one function takes, every function takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvature
from curvature.__main__ import main
from curvature.laplace import LinearizedLaplace
from curvature.losses import AutogradLoss, CrossEntropy, SumOfLosses, UnknownLossError, loss_for
from curvature.matrices.problem import loss_and_gradient
from tests.curvature.problems import normal


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data() -> list[Any]:
    torch.manual_seed(1)
    return [(normal(n, 3), torch.randint(3, (n,))) for n in (4, 2)]


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, y[:, None]).mean()


class ByHand(nn.Module):
    """A loss module that nobody registered, which says how it joins examples."""

    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return by_hand(z, y)


#: The same loss, in every way to say it.
FORMS: dict[str, Callable[[], Any]] = {
    "function of torch": lambda: F.cross_entropy,
    "a Loss": lambda: CrossEntropy(nn.CrossEntropyLoss()),
    "AutogradLoss of a function": lambda: AutogradLoss(by_hand, reduction="mean"),
    "AutogradLoss of a module": lambda: AutogradLoss(ByHand()),
    "unknown module": ByHand,
    "sum": lambda: SumOfLosses({"only": (1.0, nn.CrossEntropyLoss())}),
    "sum of AutogradLoss": lambda: SumOfLosses({"only": (1.0, AutogradLoss(by_hand, reduction="mean"))}),
}
SINGLE = [name for name in FORMS if not name.startswith("sum")]


def report_of(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    found = curvature.report(model, loss_fn, data, sections=["eigenvalues", "trace", "distances"], k=2)
    assert found.loss is not None and not found.refused, found.refused
    return torch.tensor([found.loss.value, found.traces["ggn"].trace.value, found.eigenvalues["ggn"].largest[0].value])


def monitored(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    row = curvature.Monitor(model, loss_fn, data, max_fraction=None).measure()
    return torch.tensor([row["loss"], row["sharpness"]])


def interpolated(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data *= 1.5
    return curvature.interpolation(model, other, loss_fn, data, points=3).values


def table(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    return torch.tensor([row.size for row in curvature.coverage(model, loss_fn, data).rows])


DOORS: dict[str, Callable[[nn.Module, Any, Any], Tensor]] = {
    "hessian": lambda *given: curvature.hessian(*given).to_dense(),
    "ggn": lambda *given: curvature.ggn(*given).to_dense(),
    "layer": lambda *given: curvature.ggn(*given, structure="layer").to_dense(),
    "kfac": lambda *given: curvature.ggn(*given, structure="kfac").to_dense(),
    "empirical": lambda *given: curvature.fisher(*given, structure="layer", kind="empirical").to_dense(),
    "report": report_of,
    "Monitor": monitored,
    "coverage": table,
}
BY_EXAMPLE: dict[str, Callable[[nn.Module, Any, Any], Tensor]] = {
    "covariance": lambda *given: curvature.gradient_covariance(*given, structure="diagonal").to_dense(),
    "examples": lambda model, loss_fn, data: torch.cat(
        [rows.flatten(1) for rows in curvature.per_sample_gradients(model, loss_fn, data[0]).values()], 1
    ),
    "influence": lambda model, loss_fn, data: (
        curvature.influence(
            model, loss_fn, data, data[1], curvature=curvature.ggn(model, loss_fn, data, structure="layer")
        ).scores
    ),
    "Laplace": lambda *given: LinearizedLaplace(*given).curvature.to_dense(),
    "landscape": interpolated,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("door", DOORS)
def test_every_way_to_say_a_loss_at_every_door(door: str, form: str) -> None:
    expected = DOORS[door](model(), nn.CrossEntropyLoss(), data())
    torch.testing.assert_close(DOORS[door](model(), FORMS[form](), data()), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("form", SINGLE)
@pytest.mark.parametrize("door", BY_EXAMPLE)
def test_and_where_results_belong_to_examples(door: str, form: str) -> None:
    expected = BY_EXAMPLE[door](model(), nn.CrossEntropyLoss(), data())
    torch.testing.assert_close(BY_EXAMPLE[door](model(), FORMS[form](), data()), expected, rtol=1e-7, atol=1e-10)


SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from curvature.losses import AutogradLoss, CrossEntropy, SumOfLosses
torch.manual_seed(0)
model = nn.Linear(3, 2).double()
data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (4, 2)]
def by_hand(z, y):
    return -z.log_softmax(-1).gather(-1, y[:, None]).mean()
def plain(): return model, nn.CrossEntropyLoss(), data
def autograd(): return model, AutogradLoss(by_hand, reduction="mean"), data
def ours(): return model, CrossEntropy(nn.CrossEntropyLoss()), data
def function(): return model, F.cross_entropy, data
def several(): return model, SumOfLosses({"only": (1.0, nn.CrossEntropyLoss())}), data
"""


@pytest.mark.parametrize("form", ["autograd", "ours", "function", "several"])
def test_the_command_line_takes_them(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    found = []
    for name in ("plain", form):
        for command in (["trace", "--matrix", "ggn"], ["report", "-k", "1"]):
            assert main([command[0], f"{tmp_path / 'source.py'}:{name}", *command[1:], "--quiet"]) == 0
            out = capsys.readouterr()
            found.append([line for line in out.out.splitlines() if line.startswith(("trace", "loss"))])
    assert found[0] == found[2]


def test_a_loss_can_be_called_copied_and_moved() -> None:
    loss = AutogradLoss(by_hand, reduction="mean")
    z, y = normal(3, 4), torch.tensor([0, 1, 2])
    assert torch.equal(loss(z, y), by_hand(z, y))
    weighted = CrossEntropy(nn.CrossEntropyLoss(weight=torch.ones(4)))
    assert weighted.double().loss_fn.weight.dtype == torch.float64
    other = copy.copy(weighted)
    other.loss_fn = nn.CrossEntropyLoss(reduction="sum")
    assert weighted.reduction == "mean" and other.reduction == "sum"
    assert loss_for(loss) is loss


# More than a target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("structure", ["full", "dense", "layer", "diagonal"])
def test_the_variance_of_a_normal_likelihood_stands_beside_the_target(structure: Any, kind: Any) -> None:
    """A list is what a loader makes of pairs."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y, variance = normal(5, 3), normal(5, 2), torch.rand(5, 2).double() + 0.1
    batches = [(x[:3], kind((y[:3], variance[:3]))), (x[3:], kind((y[3:], variance[3:])))]
    rows = torch.cat([x, torch.ones(5, 1).double()], 1)
    expected = (rows.square().sum(1, keepdim=True) / variance).sum() / 10
    for given in (batches, kind((x, kind((y, variance))))):
        G = curvature.ggn(net, nn.GaussianNLLLoss(), given, structure=structure)
        torch.testing.assert_close(G.to_dense().trace(), expected)
    H = curvature.hessian(net, nn.GaussianNLLLoss(), batches)
    torch.testing.assert_close(H.to_dense().trace(), expected)
    value, gradient = loss_and_gradient(H.problem)
    loss = nn.GaussianNLLLoss()(net(x), y, variance)
    torch.testing.assert_close(value, loss.detach())
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(gradient, plain)
    per_example = curvature.per_sample_gradients(net, nn.GaussianNLLLoss(), batches[0])
    assert len(per_example["weight"]) == 3


def test_other_targets_are_refused_in_words() -> None:
    net, x = nn.Linear(3, 2).double(), normal(4, 3)
    with pytest.raises(TypeError, match="takes an output and a target, got 1 further"):
        curvature.ggn(net, nn.MSELoss(), (x, (normal(4, 2), normal(4, 2)))).to_dense()
    for wrong in ([1, 2, 3], {"a": normal(4, 2)}, "cat", ()):
        with pytest.raises(TypeError, match=r"the target is .* not a tensor\. A batch is \(x, target\)"):
            curvature.ggn(net, nn.MSELoss(), (x, wrong)).to_dense()


# What is not known -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("loss_fn", [nn.SoftMarginLoss(), nn.MultiLabelSoftMarginLoss()], ids=str)
@pytest.mark.parametrize("structure", ["full", "dense", "layer", "diagonal", "low_rank"])
def test_the_empirical_fisher_of_a_loss_without_a_rule(loss_fn: nn.Module, structure: Any) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y = normal(4, 3), torch.randint(2, (4, 2)).double()
    y = 2 * y - 1 if isinstance(loss_fn, nn.SoftMarginLoss) else y
    rows = []
    for n in range(4):
        gradient = torch.autograd.grad(loss_fn(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    expected = torch.stack(rows).T @ torch.stack(rows) / 4
    for given in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        got = curvature.fisher(net, loss_fn, given, kind="empirical", structure=structure).to_dense()
        if structure == "diagonal":
            torch.testing.assert_close(got, expected.diagonal().diag())
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("structure", ["full", "layer"])
def test_messages_name_the_option_of_each_door(structure: Any) -> None:
    with pytest.raises(UnknownLossError, match=r"kind='empirical' \(in optimizers fisher='empirical'\).*AutogradLoss"):
        curvature.ggn(model(), lambda z, y, weight: by_hand(z, y), data(), structure=structure)


# Penalties --------------------------------------------------------------------------------------------------------


def penalised(net: nn.Module) -> AutogradLoss:
    return AutogradLoss(
        lambda z, y: by_hand(z, y) + 0.05 * sum(p.square().sum() for p in net.parameters()), reduction="mean"
    )


class Owner(nn.Module):
    """A loss module that holds the model, whose parameters then are its own as well."""

    reduction = "mean"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return by_hand(z, y) + self.net[0].weight.square().mean()


REFUSED = {
    name: door
    for name, door in (DOORS | BY_EXAMPLE).items()
    if name in ("ggn", "layer", "kfac", "empirical", "covariance", "examples", "influence", "Laplace")
}


@pytest.mark.parametrize("door", REFUSED)
@pytest.mark.parametrize("loss", [penalised, Owner], ids=["closure", "module"])
def test_a_penalty_in_the_loss_is_refused_with_the_way_that_works(door: str, loss: Any) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"parameters \(0\.weight.*other than through .*H\.shift\(weight_decay\)"):
        REFUSED[door](net, loss(net), data())


def test_the_hessian_of_a_penalty_is_exact_and_the_way_that_works_works() -> None:
    net = model()
    plain = curvature.hessian(net, nn.CrossEntropyLoss(), data())
    expected = plain.shift(0.1).to_dense()
    torch.testing.assert_close(curvature.hessian(net, penalised(net), data()).to_dense(), expected)


def test_parameters_of_the_loss_alone_are_no_penalty() -> None:
    class Tempered(nn.Module):
        reduction = "mean"

        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return by_hand(z * self.temperature, y)

    got = curvature.ggn(model(), Tempered(), data()).to_dense()
    torch.testing.assert_close(got, curvature.ggn(model(), nn.CrossEntropyLoss(), data()).to_dense())


# Not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [d for d in DOORS if d not in ("Monitor", "coverage")] + ["examples", "covariance"])
def test_a_loss_that_is_not_finite_is_named(door: str) -> None:
    net, batches = model(), data()
    batches[0][0][1, 0] = float("nan")
    with pytest.raises(ArithmeticError, match=r"The loss is nan .* first at example 1"):
        (DOORS | BY_EXAMPLE)[door](net, nn.CrossEntropyLoss(), batches)
