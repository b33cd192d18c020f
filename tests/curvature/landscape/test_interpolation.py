"""The straight way between two models, against a loop over copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.landscape.interpolation import barrier, interpolation
from curvature.landscape.surface import surface
from tests.curvature.landscape.test_surface import assert_untouched, at, batch_norm, snapshot, theta_of
from tests.curvature.problems import PROBLEMS, Problem

F64 = torch.float64


def pair(name: str) -> tuple[Problem, Any]:
    """A problem, and another model for it."""
    problem = PROBLEMS[name]()
    other = copy.deepcopy(problem.model)
    generator = torch.Generator().manual_seed(5)
    for tensor in [*other.parameters(), *other.buffers()]:
        if tensor.is_floating_point():
            tensor.data += torch.randn(tensor.shape, generator=generator, dtype=F64).abs()
    return problem, other


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "mlp_ce_sum", "cnn", "mlp_mse"])
def test_the_segment_is_a_loop_over_copies(name: str) -> None:
    problem, other = pair(name)
    found = interpolation(
        problem.model, other, problem.loss_fn, problem.data, points=5, class_dim=problem.class_dim, buffers="keep"
    )
    a, b = theta_of(problem.model), theta_of(other)
    for t, value in zip(found.t, found.values, strict=True):
        assert value.item() == pytest.approx(at(problem, (1 - t) * a + t * b), rel=1e-12)


def test_the_ends_are_the_models_bit_for_bit() -> None:
    problem, other = pair("mlp_ce")
    x, y = problem.data[0]
    found = interpolation(problem.model, other, problem.loss_fn, (x, y), layerwise=True)
    a, b = (problem.loss_fn(model(x), y).item() for model in (problem.model, other))
    assert found.values[0].item() == a and found.values[-1].item() == b
    for curve in found.from_a.values():
        assert curve["loss"][0].item() == a
    for curve in found.from_b.values():
        assert curve["loss"][-1].item() == b


def test_a_state_dict_stands_for_its_model() -> None:
    problem, other = pair("mlp_ce")
    arguments = (problem.loss_fn, problem.data)
    found = interpolation(problem.model, other.state_dict(), *arguments, points=3)
    assert torch.equal(found.values, interpolation(problem.model, other, *arguments, points=3).values)


def test_wrappers_are_looked_through() -> None:
    problem, other = pair("mlp_ce")
    a: Any = torch.compile(problem.model, backend="eager")
    b: Any = torch.compile(other, backend="eager")
    found = interpolation(a, b, problem.loss_fn, problem.data, points=3, layerwise=True)
    plain = interpolation(problem.model, other, problem.loss_fn, problem.data, points=3, layerwise=True)
    assert torch.equal(found.values, plain.values) and list(found.from_a) == list(plain.from_a)
    plane = surface(a, problem.loss_fn, problem.data, directions=[b], points=3)
    assert torch.equal(
        plane.values, surface(problem.model, problem.loss_fn, problem.data, directions=[other], points=3).values
    )


def test_a_layer_goes_alone() -> None:
    problem, other = pair("mlp_ce")
    found = interpolation(problem.model, other, problem.loss_fn, problem.data, points=5, layerwise=True)
    assert list(found.from_a) == list(found.from_b) == ["0", "2"]
    a, b = theta_of(problem.model), theta_of(other)
    layer = torch.arange(len(a)) < 25  # the first Linear(4, 5)
    for i, t in enumerate(found.t):
        moved = (1 - t) * a + t * b
        for name, mine in (("0", layer), ("2", ~layer)):
            for rest, curves in ((a, found.from_a), (b, found.from_b)):
                expected = at(problem, torch.where(mine, moved, rest))
                assert curves[name]["loss"][i].item() == pytest.approx(expected, rel=1e-12)


def test_between_two_optima_of_relu_layers_with_permuted_units_the_barrier_is_known() -> None:
    # x -> relu(x) - relu(-x) = x as two units; exchanging them gives the same function, halfway the weights are zero
    x = torch.linspace(-1, 1, 8, dtype=F64).unsqueeze(1)
    models: list[Any] = []
    for sign in (1.0, -1.0):
        model: Any = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
        model[0].weight.data = sign * torch.tensor([[1.0], [-1.0]], dtype=F64)
        model[2].weight.data = sign * torch.tensor([[1.0, -1.0]], dtype=F64)
        models.append(model)
    found = interpolation(models[0], models[1], nn.MSELoss(), (x, x), points=5, layerwise=True)
    assert found.values[[0, -1]].tolist() == [0, 0]
    assert found.barrier == pytest.approx(x.square().mean().item())
    # one layer alone negates the function at its end: (1 - t) x - t x, a convex parabola with no barrier
    assert found.barriers("a") == {"0": 0.0, "2": 0.0}


def test_a_convex_problem_has_no_barrier() -> None:
    problem, other = pair("mlp_ce")
    model: Any = problem.model
    data = [(model[:2](x).detach(), y) for x, y in problem.data]
    found = interpolation(model[2], other[2], problem.loss_fn, data)
    assert found.barrier == 0.0


def test_a_barrier_is_the_largest_height_above_the_chord() -> None:
    t = torch.linspace(0, 1, 5, dtype=F64)
    assert barrier(t, torch.tensor([1.0, 5.0, 4.0, 3.0, 3.0], dtype=F64)) == 3.5
    assert barrier(t, torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0], dtype=F64)) == 0.0
    assert barrier(t, torch.tensor([1.0, 0.0, torch.inf, 0.0, 3.0], dtype=F64)) == torch.inf
    assert barrier(t, torch.tensor([1.0, 0.0, torch.nan, 0.0, 3.0], dtype=F64)) != 0


@pytest.mark.parametrize("buffers", ["interpolate", "recompute", "keep"])
def test_running_statistics(buffers: Any) -> None:
    model, loss_fn, data = batch_norm()
    other: Any = copy.deepcopy(model)
    model.eval(), other.eval()
    other[0].weight.data += 1
    other[1].running_mean += 1
    other[1].running_var *= 2
    other[1].num_batches_tracked += 5
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    before = snapshot(model), snapshot(other)
    found = interpolation(model, other, loss_fn, (x, y), points=5, buffers=buffers)
    assert_untouched(before[0], model)
    assert_untouched(before[1], other)
    for t, value in zip(found.t.tolist(), found.values, strict=True):
        here: Any = copy.deepcopy(model)
        here[0].weight.data += t
        if buffers == "interpolate":
            here[1].running_mean, here[1].running_var = torch.full((4,), t).double(), torch.full((4,), 1 + t).double()
        elif buffers == "recompute":
            hidden = here[0](x).detach()
            here[1].running_mean, here[1].running_var = hidden.mean(0), hidden.var(0)
        assert value.item() == pytest.approx(loss_fn(here(x), y).item(), rel=1e-12)
    if buffers == "interpolate":
        assert found.values[-1].item() == loss_fn(other(x), y).item()


def test_several_metrics() -> None:
    problem, other = pair("mlp_ce")

    def first(model: nn.Module, data: Any) -> Tensor:
        return next(model.parameters()).flatten()[0]

    found = interpolation(
        problem.model, other, problem.loss_fn, problem.data, points=3, layerwise=True,
        metric={"loss": None, "first": first},
    )  # fmt: skip
    a, b = (next(m.parameters()).detach().flatten()[0].item() for m in (problem.model, other))
    assert found.of("first").values.tolist() == pytest.approx([a, (a + b) / 2, b])
    assert found.from_a["2"]["first"].tolist() == [a, a, a]
    assert found.of("first").barriers()["0"] == pytest.approx(0, abs=1e-15)
    with pytest.raises(KeyError, match="there are loss, first"):
        found.of("other")


def test_other_architectures_are_refused() -> None:
    problem, other = pair("mlp_ce")
    wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    deeper = nn.Sequential(*copy.deepcopy(other), nn.Linear(3, 3)).double()
    for model, message in ((wider, r"0.weight: \(5, 4\) here, \(6, 4\) there"), (deeper, "3.bias: missing here")):
        with pytest.raises(ValueError, match=message):
            interpolation(problem.model, model, problem.loss_fn, problem.data)
    with pytest.raises(ValueError, match=r"2.bias.*missing.* there"):
        state = {name: p for name, p in other.state_dict().items() if name != "2.bias"}
        interpolation(problem.model, state, problem.loss_fn, problem.data)


def test_frozen_parameters_that_differ_are_refused() -> None:
    problem, other = pair("mlp_ce")
    next(problem.model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"0.weight is frozen"):
        interpolation(problem.model, other, problem.loss_fn, problem.data)
    next(problem.model.parameters()).data = next(other.parameters()).data
    interpolation(problem.model, other, problem.loss_fn, problem.data, points=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"points": 2}, "at least 3"), ({"buffers": "drop"}, "buffers is one of interpolate, recompute, keep")],
)
def test_nonsense_is_refused(options: Any, message: str) -> None:
    problem, other = pair("mlp_ce")
    with pytest.raises(ValueError, match=message):
        interpolation(problem.model, other, problem.loss_fn, problem.data, **options)
    found = interpolation(problem.model, other, problem.loss_fn, problem.data, points=3)
    with pytest.raises(ValueError, match="'a' or 'b'"):
        found.barriers("c")  # type: ignore[arg-type]
