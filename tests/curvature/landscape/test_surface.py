"""The loss on lines and planes, against a loop over copies of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import curvature
import solvers
from curvature.landscape.directions import random_direction
from curvature.landscape.surface import Surface, surface
from curvature.model.parameters import Parameters
from precond import EKFAC, KFAC
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem

F64 = torch.float64


def at(problem: Problem, theta: Tensor) -> float:
    """The loss of all data at other parameters of a copy."""
    model = copy.deepcopy(problem.model)
    vector_to_parameters(theta, [p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        return float(problem.loss_fn(*reference.dataset_outputs(problem, model)))


def theta_of(model: nn.Module) -> Tensor:
    return parameters_to_vector([p for p in model.parameters() if p.requires_grad]).detach()


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        *[(t.data_ptr(), t._version, t.detach().clone(), t.grad) for t in tensors],
        torch.get_rng_state(),
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    ]


def assert_untouched(before: list[Any], model: nn.Module) -> None:
    now = snapshot(model)
    for old, new in zip(before[:-3], now[:-3], strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(old[2], new[2]) and old[3] is new[3]
    assert torch.equal(before[-3], now[-3])
    assert before[-2:] == now[-2:]


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "mlp_ce_sum", "cnn", "language_model", "mlp_mse"])
def test_a_plane_is_a_loop_over_copies(name: str) -> None:
    problem = PROBLEMS[name]()
    found = surface(problem.model, problem.loss_fn, problem.data, points=3, span=0.5, class_dim=problem.class_dim)
    assert found.betas is not None
    theta, (u, v) = theta_of(problem.model), found.directions
    for i, alpha in enumerate(found.alphas):
        for j, beta in enumerate(found.betas):
            expected = at(problem, theta + alpha * u + beta * v)
            assert found.values[i, j].item() == pytest.approx(expected, rel=1e-12)


def quadratic() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 2).double()
    x, y = (torch.randn(9, n, dtype=F64, generator=generator) for n in (4, 2))
    return model, nn.MSELoss(), (x, y)


def test_on_a_quadratic_it_is_the_parabola_of_gradient_and_hessian() -> None:
    model, loss_fn, data = quadratic()
    H = curvature.hessian(model, loss_fn, data).to_dense()
    loss = loss_fn(model(data[0]), data[1])
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    found = surface(model, loss_fn, data, directions=("gradient", "random"), points=5, span=(-1.0, 3.0))
    assert found.betas is not None
    for i, alpha in enumerate(found.alphas):
        for j, beta in enumerate(found.betas):
            d = alpha * found.directions[0] + beta * found.directions[1]
            assert found.values[i, j].item() == pytest.approx(float((loss + g @ d + d @ H @ d / 2).detach()), rel=1e-12)


def test_along_an_eigenvector_the_second_difference_is_the_eigenvalue() -> None:
    model, loss_fn, data = quadratic()
    values = torch.linalg.eigvalsh(curvature.hessian(model, loss_fn, data).to_dense()).flip(0)
    found = surface(model, loss_fn, data, directions=("eigenvector", "eigenvector"), points=3)
    middle = found.values[1, 1]
    assert (found.values[0, 1] + found.values[2, 1] - 2 * middle).item() == pytest.approx(values[0].item(), rel=1e-6)
    assert (found.values[1, 0] + found.values[1, 2] - 2 * middle).item() == pytest.approx(values[1].item(), rel=1e-6)
    u, v = found.directions
    torch.testing.assert_close(torch.stack([u @ u, v @ v, u @ v]), torch.tensor([1.0, 1.0, 0.0], dtype=F64))


def test_eigenpairs_are_directions() -> None:
    model, loss_fn, data = quadratic()
    pairs = solvers.eigsh(curvature.hessian(model, loss_fn, data), k=3, progress=False)
    found = surface(model, loss_fn, data, directions=pairs, points=3)
    assert torch.equal(found.directions, pairs.vectors[:2])
    assert found.labels[1].startswith(f"eigenvector of {float(pairs.values[1]):.3g}")
    alone = solvers.eigsh(curvature.hessian(model, loss_fn, data), k=1, progress=False)
    assert surface(model, loss_fn, data, directions=alone, points=3).betas is None


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_an_optimizer_that_watches_the_model_does_not_notice(method: Any) -> None:
    model, loss_fn, (x, y) = quadratic()
    other = copy.deepcopy(model)
    for one, look in ((model, True), (other, False)):
        optimizer = method(one, loss_fn, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_fn(one(x), y)
            if look:
                surface(one, loss_fn, (x, y), points=2)
            loss.backward()
            if look:
                surface(one, loss_fn, (x, y), points=2, directions=("gradient", "eigenvector"))
                curvature.interpolation(one, other, loss_fn, (x, y), points=3)
                curvature.dynamics(one, loss_fn, (x, y), lr=0.1, progress=False)
                curvature.subspace(one, loss_fn, (x, y), k=1, progress=False)
            optimizer.step()
    assert torch.equal(theta_of(model), theta_of(other))


def test_in_the_middle_it_is_the_loss_bit_for_bit() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, y = problem.data[0]
    found = surface(problem.model, problem.loss_fn, (x, y), points=5)
    assert found.alphas[2] == 0
    assert found.values[2, 2].item() == problem.loss_fn(problem.model(x), y).item()


def test_the_plane_through_three_models_holds_them_at_true_distances() -> None:
    problem = PROBLEMS["mlp_ce"]()
    others = [copy.deepcopy(problem.model) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for other in others:
        for p in other.parameters():
            p.data += torch.randn(p.shape, generator=generator, dtype=F64)
    a, b, c = (theta_of(m) for m in (problem.model, *others))
    found = surface(problem.model, problem.loss_fn, problem.data, directions=[others[0], others[1].state_dict()])
    u, v = found.directions
    torch.testing.assert_close(u @ v, torch.zeros((), dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(u.norm(), v.norm())
    assert list(found.marks.values())[:2] == [(0.0, 0.0), (1.0, 0.0)]
    s, t = found.marks["checkpoint 2"]
    torch.testing.assert_close(a + u, b)
    torch.testing.assert_close(a + s * u + t * v, c)
    line = surface(problem.model, problem.loss_fn, problem.data, directions=others[0], points=25)
    assert line.alphas[6] == 0 and line.alphas[18] == 1  # from -1/2 to 3/2
    assert line.values[6].item() == pytest.approx(at(problem, a), rel=1e-12)
    assert line.values[18].item() == pytest.approx(at(problem, b), rel=1e-12)


def test_random_directions_are_as_long_as_each_filter() -> None:
    model: Any = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "conv": nn.Conv2d(2, 4, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "norm": nn.BatchNorm2d(4),
            "embedding": nn.Embedding(5, 3),
        }
    ).double()
    parameters = Parameters(model)
    d = parameters.unflatten(random_direction(model, parameters, torch.Generator().manual_seed(0)))
    for name in ("linear", "conv", "embedding"):
        w = model[name].weight
        for i in range(len(w)):
            torch.testing.assert_close(d[f"{name}.weight"][i].norm(), w[i].detach().norm())
    w = model["transposed"].weight.detach()
    for group in range(2):
        for i in range(3):
            mine = d["transposed.weight"][2 * group : 2 * group + 2, i]
            torch.testing.assert_close(mine.norm(), w[2 * group : 2 * group + 2, i].norm())
    for name in ("linear.bias", "norm.weight", "norm.bias"):
        assert not d[name].any()
    moving = parameters.unflatten(random_direction(model, parameters, torch.Generator().manual_seed(0), biases=True))
    torch.testing.assert_close(moving["linear.bias"].norm(), model["linear"].bias.detach().norm())


def test_cliffs_stay_as_they_are() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[0.5]], dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w * x).log()

    data = (torch.ones(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
    found = surface(Log(), nn.MSELoss(), data, directions=torch.ones(1, dtype=F64), span=1.0, points=5)
    assert found.betas is None
    assert found.finite.tolist() == [False, False, True, True, True]
    assert torch.isnan(found.values[0]) and torch.isinf(found.values[1])  # log(-1/2), log(0)^2
    many = surface(Log(), nn.MSELoss(), [data, data], directions=torch.ones(1, dtype=F64), span=1.0, points=5)
    torch.testing.assert_close(found.values, many.values, equal_nan=True)
    assert found.values[2].item() == (torch.tensor(0.5, dtype=F64).log() ** 2).item()  # as called, though it began NaN


def batch_norm() -> tuple[Any, nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3, dtype=F64, generator=generator), torch.randn(n, 2, dtype=F64)) for n in (6, 3)]
    return model, nn.MSELoss(), data


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("buffers", ["keep", "recompute"])
def test_the_model_stays_as_it_is(training: bool, buffers: Any) -> None:
    model, loss_fn, data = batch_norm()
    model.train(training)
    model[4].eval()
    model[0].weight.grad = torch.ones(4, 3, dtype=F64)

    def fails(model: nn.Module, data: Any) -> float:
        model.train()
        raise KeyboardInterrupt

    before = snapshot(model)
    surface(model, loss_fn, data, points=3, buffers=buffers)
    assert_untouched(before, model)
    with pytest.raises(KeyboardInterrupt):
        surface(model, loss_fn, data, points=3, buffers=buffers, metric=fails)
    assert_untouched(before, model)


def test_statistics_are_recomputed_at_each_point() -> None:
    model, loss_fn, data = batch_norm()
    model.eval()
    one = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    found = surface(model, loss_fn, one, directions=("random",), points=3, buffers="recompute")
    for alpha, value in zip(found.alphas, found.values, strict=True):
        other = copy.deepcopy(model)
        vector_to_parameters(theta_of(model) + alpha * found.directions[0], other.parameters())
        hidden = other[0](one[0][0]).detach()
        other[1].running_mean, other[1].running_var = hidden.mean(0), hidden.var(0)
        assert value.item() == pytest.approx(loss_fn(other(one[0][0]), one[0][1]).item(), rel=1e-12)
    kept = surface(model, loss_fn, one, directions=("random",), points=3)
    assert not torch.allclose(kept.values, found.values)


def test_dropout_draws_the_same_masks_at_each_point() -> None:
    model, loss_fn, data = batch_norm()
    nothing = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=F64)
    nothing[0] = 1e-30  # far below rounding: not a bit of the weights changes
    found = surface(model, loss_fn, data, directions=nothing, points=4)
    assert len(set(found.values.tolist())) == 1


def test_metrics_of_the_user() -> None:
    problem = PROBLEMS["mlp_ce"]()

    def accuracy(model: nn.Module, data: Any) -> float:
        hits = [(model(x).argmax(-1) == y).double() for x, y in data]
        return float(torch.cat(hits).mean())

    def norm(model: nn.Module, data: Any) -> Tensor:
        return parameters_to_vector(model.parameters()).norm()

    metrics = {"loss": None, "accuracy": accuracy, "norm": norm}
    found = surface(problem.model, problem.loss_fn, problem.data, metric=metrics, points=3)
    assert found.metric == "loss" and found.of("norm").metric == "norm"
    alone = surface(problem.model, problem.loss_fn, problem.data, points=3)
    assert torch.equal(found.values, alone.values)
    theta = theta_of(problem.model)
    corner = theta - found.directions.sum(0)
    assert found.of("norm").values[0, 0].item() == pytest.approx(corner.norm().item())
    single = surface(problem.model, problem.loss_fn, problem.data, metric=accuracy, points=3)
    assert single.metric == "accuracy" and torch.equal(single.values, found.metrics["accuracy"])
    with pytest.raises(KeyError, match="there are loss, accuracy, norm"):
        found.of("other")


def test_restricted_parameters_alone_move() -> None:
    problem = PROBLEMS["mlp_ce"]()
    found = surface(problem.model, problem.loss_fn, problem.data, params="0.weight", points=3)
    assert found.directions.shape == (2, 20)
    theta = theta_of(problem.model)
    theta[:20] -= found.directions.sum(0)
    assert found.values[0, 0].item() == pytest.approx(at(problem, theta), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "sideways"}, "directions are among"),
        ({"directions": ("random",) * 3}, "one .a line. or two"),
        ({"directions": torch.ones(3)}, "shape .43,. of all parameters"),
        ({"directions": torch.zeros(43)}, "leads nowhere"),
        ({"directions": [torch.ones(43), 2 * torch.ones(43)]}, "parallel"),
        ({"directions": nn.Linear(2, 2)}, "not of one architecture: 0.weight"),
        ({"points": 1}, "at least 2"),
        ({"span": -1.0}, "span is a finite number above 0"),
        ({"directions": "random", "betas": torch.ones(1)}, "Leave betas out"),
        ({"alphas": torch.tensor([1.0, 0.0])}, "ascending"),
        ({"metric": 3}, "metric must be a function"),
        ({"metric": lambda model, data: torch.ones(2)}, "one number"),
        ({"buffers": "guess"}, "buffers is one of keep, recompute"),
    ],
)
def test_nonsense_is_refused(options: Any, message: str) -> None:
    problem = PROBLEMS["mlp_ce"]()
    with pytest.raises((ValueError, TypeError), match=message):
        surface(problem.model, problem.loss_fn, problem.data, progress=False, **options)


def test_the_same_generator_gives_the_same_plane() -> None:
    problem = PROBLEMS["mlp_ce"]()

    def make(seed: int) -> Surface:
        generator = torch.Generator().manual_seed(seed)
        return surface(problem.model, problem.loss_fn, problem.data, points=2, generator=generator)

    assert torch.equal(make(1).values, make(1).values)
    assert not torch.equal(make(1).values, make(2).values)
