"""What a plain function means as a loss: a mean or a sum, as its values tell, or nothing that has terms."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvature
import precond
from curvature.__main__ import main
from curvature.laplace import LinearizedLaplace
from curvature.losses import AutogradLoss, NonFiniteLossError, SumOfLosses, UnknownLossError
from tests.curvature.problems import normal


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(*sizes: int) -> list[Any]:
    torch.manual_seed(1)
    return [(normal(n, 3), torch.randint(3, (n,))) for n in sizes or (4, 2)]


def smooth(z: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=smoothing)


class Object:
    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return smooth(z, y)


class Silent(nn.Module):
    """Does not say how it joins examples."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return smooth(z, y)


#: The loss, and the module that it equals.
MEANS: dict[str, Callable[[], Any]] = {
    "function": lambda: smooth,
    "lambda": lambda: lambda z, y: F.cross_entropy(z, y),
    "partial": lambda: functools.partial(smooth, smoothing=0.0),
    "object": Object,
    "method": lambda: Object().__call__,
    "module": Silent,
}


def total(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + (z @ z.T).logsumexp(-1).mean()


def weighted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0]).to(z))


def flat(found: Any) -> Tensor:
    """What a door returns, as one vector."""
    if isinstance(found, dict):
        return torch.cat([flat(value) for value in found.values()])
    return (
        found.to_dense().flatten() if hasattr(found, "to_dense") and not isinstance(found, Tensor) else found.flatten()
    )


def reported(*given: Any) -> Tensor:
    found = curvature.report(*given, sections=["eigenvalues", "trace", "noise"], k=1, progress=False)
    assert found.loss is not None and not found.refused, found.refused
    top = [found.eigenvalues[name].largest[0].value for name in ("hessian", "ggn")]
    return torch.tensor([found.loss.value, found.traces["ggn"].trace.value, *top], dtype=torch.float64)


def measured(*given: Any) -> Tensor:
    row = curvature.Monitor(*given, max_fraction=None).measure()
    return torch.tensor([row["loss"], row["sharpness"]], dtype=torch.float64)


def influenced(net: nn.Module, loss: Any, batches: Any) -> Tensor:
    """The queries have the loss under a name of their own."""
    C = curvature.ggn(net, loss, batches, structure="layer")
    return curvature.influence(net, loss, batches, batches[1], curvature=C, damping=0.1, query_loss=loss).scores


def on_itself(net: nn.Module, loss: Any, batches: Any) -> Tensor:
    C = curvature.ggn(net, loss, batches, structure="layer")
    return curvature.self_influence(net, loss, batches, curvature=C, damping=0.1)


def moved(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.data *= 1.5
    return other


def compressed(found: Any) -> Tensor:
    return torch.tensor([found.loss_before, found.loss_after], dtype=torch.float64)


#: By the public name that takes a loss.
DOORS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "hessian": curvature.hessian,
    "ggn": curvature.ggn,
    "ggn, kfac": lambda *given: curvature.ggn(*given, structure="kfac"),
    "ggn, layer": lambda *given: curvature.ggn(*given, structure="layer"),
    "ggn, low_rank": lambda *given: curvature.ggn(*given, structure="low_rank"),
    "fisher": lambda *given: curvature.fisher(*given, kind="empirical", structure="layer"),
    "gradient_covariance": lambda *given: curvature.gradient_covariance(*given, structure="diagonal"),
    "gradient_second_moment": curvature.gradient_second_moment,
    "gradient_variance": curvature.gradient_variance,
    "per_sample_gradients": lambda net, loss, batches: curvature.per_sample_gradients(net, loss, batches[0]),
    "per_sample_norms": lambda net, loss, batches: curvature.per_sample_norms(net, loss, batches[0]),
    "activation_hessian": lambda net, loss, batches: curvature.activation_hessian(net, loss, batches[0], "1"),
    "influence": influenced,
    "self_influence": on_itself,
    "report": reported,
    "Monitor": measured,
    "Subspace": lambda *given: curvature.Subspace(*given, k=1, matrix="ggn").update().values,
    "dynamics": lambda *given: torch.tensor([curvature.dynamics(*given, lr=0.1).ratio]),
    "coverage": lambda *given: torch.tensor([row.size for row in curvature.coverage(*given).rows]),
    "interpolation": lambda net, loss, batches: (
        curvature.interpolation(net, moved(net), loss, batches, points=3).values
    ),
    "surface": lambda *given: curvature.surface(*given, points=2).values,
    "quantize": lambda *given: compressed(curvature.quantize(*given, kind="exact")),
    "prune": lambda *given: compressed(curvature.prune(*given, kind="exact", rtol=1e-10)),
    "LinearizedLaplace": lambda *given: LinearizedLaplace(*given).curvature,
}


def test_every_door_stands_in_the_table() -> None:
    public = {name: getattr(curvature, name) for name in curvature.__all__}
    doors = [
        n for n, f in public.items() if inspect.isfunction(f) or (inspect.isclass(f) and not issubclass(f, Exception))
    ]
    takes = {name for name in doors if {"model", "loss_fn", "data"} <= set(inspect.signature(public[name]).parameters)}
    assert {"hessian", "Monitor", "quantize"} <= takes
    assert takes - {"subspace"} <= {door.split(",")[0] for door in DOORS}  # which makes a Subspace


@pytest.mark.parametrize("door", DOORS)
def test_a_function_is_the_mean_that_it_computes(door: str) -> None:
    expected = flat(DOORS[door](model(), nn.CrossEntropyLoss(), data()))
    torch.testing.assert_close(flat(DOORS[door](model(), smooth, data())), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("door", DOORS)
def test_or_the_sum(door: str) -> None:
    expected = flat(DOORS[door](model(), nn.CrossEntropyLoss(reduction="sum"), data()))
    torch.testing.assert_close(flat(DOORS[door](model(), total, data())), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("form", MEANS)
@pytest.mark.parametrize("door", ["ggn", "ggn, kfac", "per_sample_gradients"])
def test_whatever_is_called(door: str, form: str) -> None:
    expected = flat(DOORS[door](model(), nn.CrossEntropyLoss(), data()))
    torch.testing.assert_close(flat(DOORS[door](model(), MEANS[form](), data())), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (1, 3), (5,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("door", ["hessian", "ggn", "ggn, kfac", "fisher"])
def test_one_example_tells_it_too(door: str, reduction: str, sizes: tuple[int, ...]) -> None:
    expected = flat(DOORS[door](model(), nn.CrossEntropyLoss(reduction=reduction), data(*sizes)))
    got = flat(DOORS[door](model(), smooth if reduction == "mean" else total, data(*sizes)))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_values_tell_in_any_precision_and_scale(scale: float, dtype: torch.dtype) -> None:
    """Only the rounding of a mean of thousands of terms is near that of their sum."""
    z, y = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(4096) % 3
    for function, reduction in ((smooth, "mean"), (total, "sum")):
        loss = AutogradLoss.compared(lambda z, y, function=function: scale * function(z, y))
        assert loss.open and loss.terms(z, y).reduction == reduction and loss.reduction == reduction


NO_TERMS = {"examples interact": contrastive, "weighted by the batch": weighted}


@pytest.mark.parametrize("loss", NO_TERMS)
@pytest.mark.parametrize("door", [d for d in DOORS if d not in ("coverage", "activation_hessian")])
def test_a_function_without_terms_is_refused_in_words(door: str, loss: str) -> None:
    with pytest.raises(
        UnknownLossError, match=r"neither the mean nor the sum .* Examples may interact .*hessian on one"
    ):
        DOORS[door](model(), NO_TERMS[loss], data())


def test_which_a_hessian_on_one_batch_takes() -> None:
    for loss in NO_TERMS.values():
        net, (x, y) = model(), data()[0]
        params = list(net.parameters())
        slopes = torch.autograd.grad(loss(net(x), y), params, create_graph=True)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(s, params, retain_graph=True, materialize_grads=True)])
            for s in torch.cat([g.flatten() for g in slopes])
        ]
        torch.testing.assert_close(curvature.hessian(net, loss, (x, y)).to_dense(), torch.stack(rows))


@pytest.mark.parametrize("door", ["hessian", "ggn", "ggn, kfac", "report"])
def test_a_later_batch_that_is_no_mean_is_refused(door: str) -> None:
    """The first batch has one class alone, so that the weights cancel in it."""
    (x, _), second = data()
    with pytest.raises(ValueError, match=r"is not the 'mean' of its terms.*weighted by the batch"):
        flat(DOORS[door](model(), weighted, [(x, torch.full((4,), 1)), second]))


def hinge(z: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(z - 100 * F.one_hot(y, 3) * -1, y)


@pytest.mark.parametrize("door", ["ggn", "ggn, kfac", "fisher", "per_sample_gradients"])
def test_a_loss_that_is_zero_does_not_tell(door: str) -> None:
    with pytest.raises(
        UnknownLossError, match=r"whether it is a mean or a sum .*AutogradLoss\(loss_fn, reduction='mean'"
    ):
        DOORS[door](model(), hinge, data())


@pytest.mark.parametrize("door", ["ggn", "ggn, kfac", "report", "per_sample_gradients"])
def test_what_is_no_number_is_refused_as_ever(door: str) -> None:
    with pytest.raises(ValueError, match="reduction='none', so it is no scalar"):
        flat(DOORS[door](model(), lambda z, y: F.cross_entropy(z, y, reduction="none"), data()))
    with pytest.raises(TypeError, match="returned a float, not a tensor"):
        DOORS[door](model(), lambda z, y: F.cross_entropy(z, y).item(), data())
    batches = data()
    batches[0][0][1, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"The loss is nan .* first at example 1"):
        DOORS[door](model(), smooth, batches)


class Ragged:
    """Knows how many examples there are, as a function that holds the lengths of sequences does."""

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(
            z.log_softmax(-1).unsqueeze(0).expand(2, -1, -1), y[:, None], torch.tensor([2] * 4), torch.tensor([1] * 4)
        )


@pytest.mark.parametrize("door", ["hessian", "ggn", "ggn, kfac", "report"])
def test_a_function_for_one_number_of_examples_is_refused_in_words(door: str) -> None:
    batches = [(x, y.clamp(min=1)) for x, y in data(4, 4)]
    with pytest.raises(
        UnknownLossError, match=r"cannot be taken example by example: on another number .* RuntimeError"
    ):
        DOORS[door](model(), Ragged(), batches)


@pytest.mark.parametrize("options", [{}, {"structure": "kfac"}], ids=["full", "kfac"])
def test_a_function_of_several_outputs_is_refused_in_words(options: dict[str, Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.net(-x)

    def pulled(z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cosine_embedding_loss(*z, y - 1)

    with pytest.raises(
        UnknownLossError, match=r"output= must return a tensor, got tuple.*curvature.losses.SumOfLosses"
    ):
        curvature.ggn(Two(), pulled, data(), output=lambda result: result, **options)


def test_other_arguments_are_no_output_and_target() -> None:
    for loss, words in ((lambda z, y, w: z.sum(), "It takes z, y, w"), (lambda z: z.sum(), "No derivatives are known")):
        with pytest.raises(UnknownLossError, match=words):
            curvature.ggn(model(), loss, data())
    with pytest.raises(UnknownLossError, match=r"works as curvature\.losses\.AutogradLoss"):
        SumOfLosses({"only": (1.0, smooth)})  # without data, nothing tells


SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
model = nn.Linear(3, 2).double()
data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (4, 2)]
def module(): return model, nn.CrossEntropyLoss(), data
def function(): return model, lambda z, y: F.cross_entropy(z, y), data
"""


def test_the_command_line_takes_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    found = []
    for name in ("module", "function"):
        for command in (["trace", "--matrix", "ggn"], ["report", "-k", "1"]):
            assert main([command[0], f"{tmp_path / 'source.py'}:{name}", *command[1:], "--quiet"]) == 0
            lines = capsys.readouterr().out.splitlines()
            found.append([line for line in lines if line.startswith(("trace", "loss"))][:1])
    assert found[0] and found[1] and found[:2] == found[2:]


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    expected = curvature.ggn(model(), nn.CrossEntropyLoss(), data(), structure="kfac").to_dense()
    for _ in range(2):
        got = curvature.ggn(model(), smooth, data(), structure="kfac", resume=tmp_path / "sums.pt").to_dense()
        torch.testing.assert_close(got, expected)


# In a training loop the calls of a function are not seen -----------------------------------------------------------


def optimizers() -> dict[str, Any]:
    found = {}
    for name in precond.__all__:
        method = getattr(precond, name)
        if isinstance(method, type) and issubclass(method, torch.optim.Optimizer) and name != "PreconditionedOptimizer":
            parameters = inspect.signature(method).parameters
            if "loss_fn" in parameters:
                found[name] = functools.partial(method, **({"lr": 0.1} if "lr" in parameters else {}))
    return found


@pytest.mark.parametrize("form", ["function", "module"])
@pytest.mark.parametrize("name", optimizers())
def test_optimizers_say_what_to_call(name: str, form: str) -> None:
    net, (x, y), loss = model(), data()[0], MEANS[form]()
    try:
        optimizer = optimizers()[name](net, loss)
        loss(net(x), y).backward()
        optimizer.step()
    except (TypeError, ValueError) as error:
        assert re.search(r"AutogradLoss\((loss_fn|smooth), reduction='mean'\)", str(error)), error
    else:
        assert form == "module"  # whose calls are seen, and an empirical Fisher needs no more
