"""Does the sampled Fisher converge to the exact one, from its own random numbers alone?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import BlockDiagonal
from tests.curvature import dense_reference as dense
from tests.curvature.estimates import estimate
from tests.curvature.problems import PROBLEMS, Problem

SAMPLES, RUNS = 10, 16


def block_traces(operator: BlockDiagonal) -> Tensor:
    pairs = zip(operator.places, operator.blocks, strict=True)
    traces = {place.block.name: block.trace() for place, block in pairs}  # type: ignore[attr-defined]
    return torch.stack([traces[name] for name in sorted(traces)])


def parameter_traces(problem: Problem, diagonal: Tensor) -> Tensor:
    return torch.stack([diagonal[index].sum() for index in dense.flat_indices(problem.model).values()])


def check_mean(draws: list[Tensor], expected: Tensor) -> None:
    values = torch.stack(draws)
    error = (values.mean(0) - expected).abs()
    stderr = values.std(0) / len(values) ** 0.5
    assert (stderr < 0.2 * expected.abs() + 1e-12).all(), "too few draws to tell anything"
    assert (error <= 4 * stderr + 1e-12).all(), (error / stderr).max()


@pytest.mark.parametrize(
    "name",
    [
        "mlp_ce_all_options",
        "mlp_bce",
        "positions_picked_by_a_mask",
        "bare_parameters",
        "unknown_uses",
        "residual_train",
        "language_model",
        "encoder_time_major",
        "cross_attention_inside_time_major",
    ],
)
def test_sampled_diagonal_converges_to_the_exact_one(name: str) -> None:
    problem = PROBLEMS[name]()
    expected = parameter_traces(problem, dense.ggn(problem).diagonal())
    draws = []
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        got = estimate(problem, "diagonal", "mc", samples=SAMPLES, generator=generator)
        draws.append(parameter_traces(problem, got.diagonal()))
    check_mean(draws, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear_on_sequences", {}),
        ("linear_on_images", {"sharing": "reduce"}),
        ("cnn", {"bias": "separate"}),
        ("residual_train", {}),
    ],
    ids=str,
)
def test_sampled_factors_converge_to_the_exact_ones(name: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[name]()
    expected = estimate(problem, "kfac", "exact", **options)
    draws = []
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        draws.append(block_traces(estimate(problem, "kfac", "mc", samples=SAMPLES, generator=generator, **options)))
    check_mean(draws, block_traces(expected))


@pytest.mark.parametrize("name", ["mlp_ce", "bare_parameters"])
def test_sampled_spectrum_has_the_trace_of_the_exact_one(name: str) -> None:
    problem = PROBLEMS[name]()
    draws = []
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        draws.append(estimate(problem, "ekfac", "mc", samples=SAMPLES, generator=generator).trace())
    check_mean(draws, dense.ggn(problem).trace())


def test_number_of_samples_does_not_scale_the_fisher() -> None:
    problem = PROBLEMS["mlp_ce"]()
    kfac = estimate(problem, "kfac", "exact").trace()
    for samples in (1, 4, 100):
        draws = [
            estimate(problem, "kfac", "mc", samples=samples, generator=torch.Generator().manual_seed(seed)).trace()
            for seed in range(100 // samples)
        ]
        assert 0.75 * kfac < torch.stack(draws).mean() < 1.25 * kfac


def test_draws_are_those_of_the_generator_and_of_nothing_else() -> None:
    problem = PROBLEMS["mlp_ce"]()
    state = torch.random.get_rng_state()
    first, again, other = (
        estimate(problem, "kfac", "mc", generator=torch.Generator().manual_seed(seed)).to_dense() for seed in (1, 1, 2)
    )
    default = estimate(problem, "kfac", "mc").to_dense()
    torch.rand(3)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(default, estimate(problem, "kfac", "mc").to_dense())
    torch.random.set_rng_state(state)
    estimate(problem, "kfac", "mc")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:not one loss")
def test_dropout_draws_from_the_global_stream_and_leaves_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)).double()
    problem = Problem(model, torch.nn.MSELoss(), [(torch.ones(4, 3).double(), torch.zeros(4, 2).double())])
    state = torch.random.get_rng_state()
    one, two = (estimate(problem, "ekfac", "exact").to_dense() for _ in range(2))
    assert torch.equal(one, two)  # from the same state
    assert torch.equal(torch.random.get_rng_state(), state)
