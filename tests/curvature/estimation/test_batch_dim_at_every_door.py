"""``batch_dim=`` at every door that counts examples: as if the outputs had them first, or the same refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import precond
from curvature.cli import main
from curvature.laplace import EFBackend, GGNBackend, HessianBackend, LinearizedLaplace
from curvature.losses import SumOfLosses
from precond import Loop
from solvers import Dense
from tests.curvature.estimation.test_batch_dim import TimeMajorOutput as TimeMajor

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
SIZES = [(2, 4), (4, 2), (3, 3)]  # times and examples; equal numbers leave nothing to shapes


class ExamplesFirst(TimeMajor):
    """The same function with its outputs ``(N, T, 3)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


def pair(T: int, N: int, first: bool, loss: nn.Module) -> tuple[Any, Any, Any, Any]:
    """A time-major model and its batch; the same with the examples first."""
    models = []
    for cls, order in ((TimeMajor, first), (ExamplesFirst, True)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models.append(cls(order).double())
    g = torch.Generator().manual_seed(T + 10 * N)
    x = torch.randn(N, T, 3, dtype=torch.float64, generator=g)
    y = torch.randint(3, (T, N), generator=g)
    if loss is MSE:
        y = torch.randn(T, N, 3, dtype=torch.float64, generator=g)
    return models[0], (x if first else x.transpose(0, 1), y), models[1], (x, y.transpose(0, 1))


def rows_of(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the summed terms of each example of a time-major model, by a loop."""
    one = nn.functional.cross_entropy if loss is CE else nn.functional.mse_loss
    rows = []
    for n in range(y.shape[1]):
        value = one(model(x)[:, n], y[:, n], reduction="sum")
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    return torch.stack(rows)


def noise(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    report = curvature.report(model, loss, data, sections=("noise", "coverage"), progress=False, **options)
    found = report.noise
    if found is None:
        raise ValueError(report.refused[0].message)
    assert not report.refused
    moments = found.covariance_trace.value, found.squared_gradient.value
    return torch.tensor([float(found.examples), *found.percentiles, *moments])


def quantized(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    found = curvature.quantize(model, loss, data, structure="ekfac", kind="exact", progress=False, **options)
    return torch.cat([p.flatten() for p in found.model.parameters()])


def laplace(make: Any, method: str) -> Callable[..., Tensor]:
    def door(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
        likelihood = "classification" if loss is CE else "regression"
        if loss is MSE:
            options.pop("class_dim", None)
        found = getattr(make(model, likelihood, **options), method)(*data, **({"N": 5} if method == "kron" else {}))
        if method == "kron":
            return torch.cat([F.flatten() for factors in found[1].kfacs for F in factors])
        return found[0] if method == "gradients" else found[1]

    return door


def trained(make: Any, **own: Any) -> Callable[..., Tensor]:
    """Two steps of an optimizer, and where they lead."""

    def door(model: nn.Module, loss: Any, data: Any, class_dim: int | None = None, **options: Any) -> Tensor:
        loop = Loop(**options) if options else None
        optimizer = make(model, loss, lr=0.1, **own, **({} if loop is None else {"loop": loop}))
        x, y = data
        for _ in range(2):
            optimizer.zero_grad()
            z = model(x)
            (loss(z.flatten(0, 1), y.flatten()) if loss is CE else loss(z, y)).backward()
            optimizer.step()
        optimizer.detach()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    return door


def dense(function: Any, **own: Any) -> Callable[..., Tensor]:
    return lambda model, loss, data, **options: function(model, loss, data, **own, **options).to_dense()


def ends(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    monitor = curvature.Monitor(model, loss, data, quantities=("sharpness", "trace"), rtol=1e-9, **options)
    row = monitor.measure()
    return torch.tensor([row["loss"], row["sharpness"], row["trace"]])


def subspace(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    return curvature.subspace(model, loss, data, 2, matrix="ggn", rtol=1e-9, **options).update().values


def edge(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    return torch.tensor(curvature.dynamics(model, loss, data, lr=0.1, rtol=1e-9, **options).ratio)


EXACT: dict[str, Any] = {"curvature": curvature.EigenbasisFisher("exact"), "damping": 0.1}


def near(model: nn.Module) -> dict[str, Any]:
    """A curvature that is known, so that scores are inner products of the gradients of examples."""
    size = sum(p.numel() for p in model.parameters())
    return {"curvature": Dense(torch.eye(size, dtype=torch.float64)), "damping": 0.0}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in found.values()], 1)


DOORS: dict[str, Callable[..., Tensor]] = {
    "hessian": dense(curvature.hessian),
    "hessian, layer": dense(curvature.hessian, structure="layer"),
    "ggn": dense(curvature.ggn, structure="dense"),
    "ggn, ekfac": dense(curvature.ggn, structure="ekfac"),
    "fisher, ekfac": dense(curvature.fisher, structure="ekfac", kind="exact"),
    "gradient_covariance": dense(curvature.gradient_covariance, structure="dense"),
    "per_sample_gradients": lambda *args, **options: flat(curvature.per_sample_gradients(*args, **options)),
    "influence": lambda m, f, d, **options: curvature.influence(m, f, d, d, **near(m), **options).scores,
    "influence, ekfac": lambda m, f, d, **options: curvature.influence(m, f, d, d, **EXACT, **options).scores,
    "self_influence": lambda m, f, d, **options: curvature.self_influence(m, f, d, **near(m), **options),
    "report": noise,
    "Monitor": ends,
    "subspace": subspace,
    "dynamics": edge,
    "quantize": quantized,
    "GGNBackend, kron": laplace(GGNBackend, "kron"),
    "GGNBackend, diag": laplace(GGNBackend, "diag"),
    "GGNBackend, gradients": laplace(GGNBackend, "gradients"),
    "EFBackend, full": laplace(EFBackend, "full"),
    "HessianBackend, full": laplace(HessianBackend, "full"),
    "LinearizedLaplace": lambda m, f, d, **options: LinearizedLaplace(m, f, d, **options).curvature.to_dense(),
    "KFAC": trained(precond.KFAC, fisher="exact"),
    "KFAC, reduce": trained(precond.KFAC, fisher="empirical", sharing="reduce"),
    "EKFAC": trained(precond.EKFAC, fisher="exact"),
    "NaturalGradient": trained(precond.NaturalGradient, fisher="empirical", structure="layer"),
    "SENG": trained(precond.SENG),
    "SMW": trained(precond.SMWNaturalGradient),
    "TNT": trained(precond.TNT, fisher="exact"),
}


@pytest.mark.parametrize(("T", "N", "loss"), [(2, 4, CE), (3, 3, MSE)], ids=["classes", "numbers"])
@pytest.mark.parametrize("door", DOORS)
def test_as_if_the_outputs_had_the_examples_first(door: str, T: int, N: int, loss: nn.Module) -> None:
    for first in (True, False):
        model, data, other, other_data = pair(T, N, first, loss)
        axis: dict[str, Any] = {"class_dim": -1} if loss is CE else {}
        expected = DOORS[door](other, loss, other_data, **axis)
        found = DOORS[door](model, loss, data, **axis, batch_dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("loss", [CE, MSE], ids=["classes", "numbers"])
@pytest.mark.parametrize(("T", "N"), SIZES)
def test_gradients_of_examples_wherever_they_are_asked_for(T: int, N: int, loss: nn.Module) -> None:
    model, (x, y), _, _ = pair(T, N, True, loss)
    rows = rows_of(model, loss, x, y)
    axis: dict[str, Any] = {"batch_dim": 1, **({"class_dim": -1} if loss is CE else {})}
    found = curvature.influence(model, loss, (x, y), (x, y), **near(model), **axis).scores
    torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-10, atol=1e-12)
    own = curvature.self_influence(model, loss, (x, y), **near(model), **axis)
    torch.testing.assert_close(own, rows.square().sum(1), rtol=1e-10, atol=1e-12)
    likelihood = "classification" if loss is CE else "regression"
    found, _ = EFBackend(model, likelihood, **axis).gradients(x, y)
    torch.testing.assert_close(found, rows, rtol=1e-10, atol=1e-12)
    if N > 2:
        norms = curvature.report(model, loss, (x, y), sections="noise", progress=False, **axis).noise
        assert norms is not None
        expected = rows.norm(dim=1).sort(descending=True).values * N / y.numel()
        torch.testing.assert_close(torch.tensor([norm for _, norm in norms.largest], dtype=torch.float64), expected)


@pytest.mark.parametrize("door", DOORS)
def test_an_axis_that_is_none_is_refused_in_the_same_words(door: str) -> None:
    model, data, _, _ = pair(2, 4, True, CE)
    with pytest.raises(ValueError, match="batch_dim=3 is no axis of an output with 3 axes"):
        DOORS[door](model, CE, data, class_dim=-1, batch_dim=3)


class TwoHeads(TimeMajor):
    """Classes of every time, ``(T, N, 3)``, and two numbers of every example, ``(N, 2)``."""

    def __init__(self, first: bool = True) -> None:
        super().__init__(first)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.inp(x.transpose(0, 1) if self.first else x).tanh().cumsum(0)
        return {"label": self.out(h), "depth": self.head(h[-1])}


class TwoHeadsExamplesFirst(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return {"label": found["label"].transpose(0, 1), "depth": found["depth"]}


@pytest.mark.parametrize(("T", "N"), SIZES)
def test_sums_of_losses_take_the_axis_by_key(T: int, N: int) -> None:
    loss = SumOfLosses({"label": (1.0, CE), "depth": (0.5, MSE)})
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, 3, dtype=torch.float64, generator=g)
    y, d = torch.randint(3, (T, N), generator=g), torch.randn(N, 2, dtype=torch.float64, generator=g)
    models = []
    for cls in (TwoHeads, TwoHeadsExamplesFirst):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models.append(cls().double())
    plain, ordered = (x, {"label": y, "depth": d}), (x, {"label": y.T, "depth": d})
    options: dict[str, Any] = {"class_dim": {"label": -1}, "kind": "exact", "structure": "ekfac"}
    by_key = {"label": 1}
    expected = curvature.fisher(models[1], loss, ordered, **options).to_dense()
    found = curvature.fisher(models[0], loss, plain, **options, batch_dim=by_key).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    with pytest.raises(ValueError, match="names the loss 'colour'"):
        curvature.fisher(models[0], loss, plain, **options, batch_dim={"colour": 1})
    with pytest.raises(TypeError, match="is for sums of losses"):
        curvature.per_sample_gradients(
            models[0], CE, (x, y), output=lambda o: o["label"], class_dim=-1, batch_dim={"label": 1}
        )


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(("T", "N"), SIZES)
def test_training_on_a_sum_of_losses_takes_the_axis_by_key(T: int, N: int, fisher: Any) -> None:
    loss = SumOfLosses({"label": (1.0, MSE), "depth": (0.5, MSE)})
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(N, T, 3, dtype=torch.float64, generator=g), torch.randn(N, 2, dtype=torch.float64, generator=g)
    y = torch.randn(T, N, 3, dtype=torch.float64, generator=g)
    ends = []
    for cls, target, loop in (
        (TwoHeads, y, Loop(batch_dim={"label": 1})),
        (TwoHeadsExamplesFirst, y.transpose(0, 1), Loop()),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls().double()
        optimizer = precond.EKFAC(model, loss, lr=0.1, fisher=fisher, loop=loop)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(x), {"label": target, "depth": d}).backward()
            optimizer.step()
        optimizer.detach()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-10)


class TimeByExample(TimeMajor):
    """A number for each time and example, ``(T, N)``: its last axis is not the class axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 0]


@pytest.mark.parametrize("loss", [MSE, nn.BCEWithLogitsLoss()], ids=["squares", "logits"])
@pytest.mark.parametrize(("T", "N"), SIZES)
def test_outputs_of_one_number_for_each_time_and_example(T: int, N: int, loss: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TimeByExample().double()
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(N, T, 3, dtype=torch.float64, generator=g), torch.rand(T, N, dtype=torch.float64, generator=g)
    one = nn.functional.mse_loss if loss is MSE else nn.functional.binary_cross_entropy_with_logits
    parameters = [p for name, p in model.named_parameters()]
    expected = []
    for n in range(N):
        gradients = torch.autograd.grad(
            one(model(x)[:, n], y[:, n], reduction="sum"), parameters, materialize_grads=True, allow_unused=True
        )
        expected.append(torch.cat([part.flatten() for part in gradients]))
    found = flat(curvature.per_sample_gradients(model, loss, (x, y), batch_dim=1))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="batch_dim=1 is the class axis"):
        curvature.per_sample_gradients(model, loss, (x, y), batch_dim=1, class_dim=1)


@pytest.mark.parametrize(("T", "N"), SIZES)
def test_kernels_and_jacobians(T: int, N: int) -> None:
    model, (x, _), other, _ = pair(T, N, True, CE)
    torch.testing.assert_close(curvature.ntk(model, x, batch_dim=1), curvature.ntk(other, x), rtol=1e-10, atol=1e-12)
    z = model(x).flatten()
    rows = [torch.autograd.grad(entry, list(model.parameters()), retain_graph=True) for entry in z]
    expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    torch.testing.assert_close(curvature.jacobian(model, x).to_dense(), expected, rtol=1e-10, atol=1e-12)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "problem.py"
    source.write_text(
        "from tests.curvature.estimation.test_batch_dim_at_every_door import CE, pair\n\n"
        "def made(axis=1):\n"
        "    model, data, _, _ = pair(2, 4, True, CE)\n"
        '    return {"model": model, "loss_fn": CE, "data": data, "class_dim": -1, "batch_dim": axis}\n\n'
        "def wrong():\n"
        "    return made(3)\n"
    )
    assert main(["report", f"{source}:made", "--budget", "60", "--out", str(tmp_path / "found.json")]) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["noise"]["examples"] == 4
    assert main(["coverage", f"{source}:made"]) == 0
    for command in ("eigs", "trace", "coverage"):
        assert main([command, f"{source}:wrong"]) == 1
        assert "batch_dim=3 is no axis" in capsys.readouterr().err


def test_a_batch_of_queries_whose_examples_lie_elsewhere_is_not_cut() -> None:
    model, data, _, _ = pair(3, 3, True, CE)
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="cannot be split"):
        curvature.influence(model, CE, data, data, **near(model), class_dim=-1, batch_dim=1, memory=8 * size)


def test_a_penalty_is_refused_with_a_named_axis_as_without() -> None:
    model, data, other, other_data = pair(2, 4, True, MSE)
    for m, d, axis in ((model, data, {"batch_dim": 1}), (other, other_data, {})):
        weight = next(m.parameters())
        loss = curvature.losses.AutogradLoss(
            lambda z, y, weight=weight: (z - y).square().sum(-1) + weight.square().sum(), reduction="none"
        ).summed()
        with pytest.raises(ValueError, match="other than through the model's output"):
            curvature.fisher(m, loss, d, kind="empirical", structure="layer", class_dim=-1, **axis)
