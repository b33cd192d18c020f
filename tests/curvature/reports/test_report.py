"""Does every number of a report lie within the error it states?"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import curvature
from curvature.reports import Number, Report
from curvature.reports.sections.budget import Budget
from curvature.reports.sections.density import density
from curvature.reports.sections.distances import distances, root_of_ratio
from curvature.reports.sections.gradients import summarise
from curvature.reports.sections.store import Store
from curvature.reports.sections.study import Study
from curvature.reports.sections.traces import traces
from solvers import Dense
from tests.curvature import dense_reference as reference
from tests.curvature.problems import PROBLEMS, Problem, classes, normal, problem
from tests.curvature.reports.reference import Truth, near, truth, within

LAMBDA = 0.01
NAMES = ("mlp_ce", "report_cnn", "encoder_pre_norm")


@problem
def report_cnn() -> Problem:
    """Small enough for dense algebra, with more examples than classes, in two batches."""
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return Problem(model, nn.CrossEntropyLoss(), [(normal(n, 1, 5, 5), classes(n, of=3)) for n in (6, 5)])


@functools.cache
def known(name: str) -> tuple[Problem, Truth]:
    made = PROBLEMS[name]()
    return made, truth(made)


@functools.cache
def reported(name: str, exact: bool | None = None) -> Report:
    made, _ = known(name)
    options: dict[str, Any] = {"k": 3, "damping": LAMBDA, "exact": exact, "progress": False}
    if exact is False:
        options["sections"] = ("loss", "eigenvalues", "layers")
    return curvature.report(made.model, made.loss_fn, made.data, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exact", [None, False])
def test_loss_gradient_and_eigenvalues(name: str, exact: bool | None) -> None:
    report, (_, true) = reported(name, exact), known(name)
    assert report.refused == () and report.cut == () and report.notes == ()
    assert report.loss.value == pytest.approx(true.loss, rel=1e-12)
    assert report.loss.gradient_norm == pytest.approx(float(true.gradient.norm()), rel=1e-10)
    for matrix, found in report.eigenvalues.items():
        assert found.converged
        values, vectors = torch.linalg.eigh(true.matrices[matrix])
        rounding = 1e-12 * float(values.abs().max())
        for pair, value in zip(found.largest, values.flip(0), strict=False):
            assert abs(pair.value - value) <= pair.residual + rounding
        for pair, value in zip(found.smallest, values, strict=False):
            assert abs(pair.value - value) <= pair.residual + rounding
        along = (true.gradient @ vectors[:, -3:]).square().sum() / true.gradient.square().sum()
        assert found.alignment is not None
        assert abs(found.alignment.value - float(along)) <= found.alignment.error + 1e-9
        assert sum(pair.gradient_share for pair in found.largest) == pytest.approx(found.alignment.value)


@pytest.mark.parametrize("name", NAMES)
def test_small_matrices_are_exact(name: str) -> None:
    report, (_, true) = reported(name), known(name)
    assert report.formed == ("hessian", "ggn")
    for matrix, dense in true.matrices.items():
        found = report.traces[matrix]
        assert near(found.trace, dense.trace()) and near(found.frobenius, dense.norm())
        for layer, index in true.layers.items():
            block = dense[index][:, index]
            assert near(found.layers[layer], block.trace())
            top = report.layer_eigenvalues[matrix].largest[layer]
            assert abs(top.value - torch.linalg.eigvalsh(block)[-1]) <= top.residual + 1e-12
        curve = report.densities[matrix]
        assert curve.samples == 0 and set(curve.stderr) == {0.0}
        assert torch.allclose(doubles(curve.density), smoothed(dense, curve.grid, curve.width), rtol=1e-9)
    values = true.top("ggn")
    ggn = report.densities["ggn"]
    assert ggn.effective_dimension is not None and ggn.condition is not None
    assert near(ggn.effective_dimension, (values / (values + LAMBDA)).sum())
    assert ggn.condition.low == ggn.condition.high
    assert ggn.condition.low == pytest.approx(
        float((values[0] + LAMBDA) / (values[-1].clamp(min=0) + LAMBDA)), rel=1e-9
    )
    assert report.densities["hessian"].effective_dimension is None


def test_structures_are_names_or_curvatures() -> None:
    made, true = known("report_cnn")
    reduced, empirical = curvature.KroneckerFisher("exact", sharing="reduce"), curvature.DiagonalFisher("empirical")
    options: dict[str, Any] = {"matrix": "ggn", "sections": ("loss", "distances")}

    def distances(*structures: Any) -> dict[str, Any]:
        found = curvature.report(made.model, made.loss_fn, made.data, structures=structures, **options)
        assert not found.refused and Report.from_json(found.to_json()).distances == found.distances
        assert found.distances is not None
        return found.distances.structures

    found = distances("kfac", reduced, empirical, curvature.KroneckerFisher("exact"))
    labels = ["KroneckerFisher(kind='exact', sharing='reduce')", "DiagonalFisher(kind='empirical')"]
    assert list(found) == ["kfac", *labels, "KroneckerFisher(kind='exact')"]
    assert found["KroneckerFisher(kind='exact')"] == found["kfac"] == distances("kfac")["kfac"]
    assert [found[name].kind for name in labels] == ["exact", "empirical"]
    for name, structure in zip(labels, (reduced, empirical), strict=True):
        S = curvature.fisher(made.model, made.loss_fn, made.data, structure=structure).to_dense()
        expected = float((S - true.matrices["ggn"]).norm() / true.matrices["ggn"].norm())
        assert found[name].whole.value == pytest.approx(expected, rel=1e-9)
    one = curvature.report(made.model, made.loss_fn, made.data, structures=reduced, **options)
    assert one.distances is not None and list(one.distances.structures) == labels[:1]


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_those_of_the_dense_matrices(name: str) -> None:
    report, (made, true) = reported(name), known(name)
    ggn = true.matrices["ggn"]
    assert report.distances is not None
    for structure, found in report.distances.structures.items():
        if structure == "diagonal":
            dense = ggn.diagonal().diag()
        else:
            options: dict[str, Any] = {"structure": structure}
            dense = curvature.ggn(made.model, made.loss_fn, made.data, **options).to_dense()
        assert near(found.whole, (dense - ggn).norm() / ggn.norm())
        for layer, index in true.layers.items():
            block, other = ggn[index][:, index], dense[index][:, index]
            assert near(found.layers[layer], (other - block).norm() / block.norm())


def doubles(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def smoothed(dense: Tensor, grid: tuple[float, ...], width: float) -> Tensor:
    points = doubles(grid)
    kernels = torch.distributions.Normal(torch.linalg.eigvalsh(dense), width)
    return kernels.log_prob(points.unsqueeze(1)).exp().mean(1)


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_norms_of_the_examples(name: str) -> None:
    report, (_, true) = reported(name), known(name)
    noise, norms = report.noise, true.examples.norm(dim=1)
    assert noise is not None and noise.examples == len(norms)
    percentiles = torch.quantile(norms, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(torch.tensor(noise.percentiles, dtype=torch.float64), percentiles, rtol=1e-9)
    index = norms.argsort(descending=True)[:5]
    assert [i for i, _ in noise.largest] == index.tolist()
    assert [norm for _, norm in noise.largest] == pytest.approx(norms[index].tolist())
    covariance = torch.cov(true.examples.T, correction=1).trace()
    assert noise.covariance_trace.value == pytest.approx(float(covariance))
    unbiased = true.gradient.square().sum() - covariance / len(norms)
    assert noise.squared_gradient.value == pytest.approx(float(unbiased))


def naive_noise(rows: Tensor) -> Tensor:
    trace = torch.cov(rows.T).trace()
    return torch.stack([trace, rows.mean(0).square().sum() - trace / len(rows)])


def without_each(rows: Tensor) -> Tensor:
    return torch.stack([naive_noise(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(len(rows))])


def jackknife(parts: Tensor) -> float:
    n = len(parts)
    return float(((n - 1) / n * (parts - parts.mean()).square().sum()).sqrt())


@pytest.mark.parametrize("name", ["mlp_ce_sum", "mlp_ce_all_options", "mlp_mse", "linear_on_sequences"])
def test_examples_are_weighted_as_in_the_loss(name: str) -> None:
    made = PROBLEMS[name]()
    options: dict[str, Any] = {"sections": ["noise"], "class_dim": made.class_dim, "progress": False}
    found = curvature.report(made.model, made.loss_fn, made.data, **options)
    z, y = reference.dataset_outputs(made, made.model)
    weight = float(reference.term_weight(made, z, y))
    parameters = list(made.model.parameters())
    rows = []
    for x, targets in made.data:
        for n in range(len(x)):
            terms = reference.as_terms(made, made.model(x[n : n + 1]), targets[n : n + 1])
            gradient = torch.autograd.grad(weight * reference.summed(made.loss_fn)(*terms), parameters)
            rows.append(torch.cat([g.flatten() for g in gradient]))
    gradients = len(rows) * torch.stack(rows)
    assert found.noise is not None and found.noise.examples == len(rows)
    assert found.loss.gradient_norm == pytest.approx(float(gradients.mean(0).norm()))
    whole, without = naive_noise(gradients), without_each(gradients)
    for number, index in ((found.noise.covariance_trace, 0), (found.noise.squared_gradient, 1)):
        assert number.value == pytest.approx(float(whole[index]))
        assert number.error == pytest.approx(jackknife(without[:, index]))


def drawn(n: int, mean: float, generator: torch.Generator) -> Tensor:
    """Gradients (n, 5) of an invented model: covariance diag(1, ..., 25), mean in the first direction."""
    spread = torch.arange(1, 6, dtype=torch.float64)
    gradients = torch.randn(n, 5, generator=generator, dtype=torch.float64) * spread
    gradients[:, 0] += mean
    return gradients


def summary(gradients: Tensor) -> Any:
    mean = gradients.mean(0)
    return summarise(gradients.square().sum(1), gradients @ mean, mean.square().sum())


def test_noise_scale_is_that_of_leaving_out_examples() -> None:
    gradients = drawn(40, 6.0, torch.Generator().manual_seed(0))

    found, whole, without = summary(gradients), naive_noise(gradients), without_each(gradients)
    for number, value, parts in (
        (found.covariance_trace, whole[0], without[:, 0]),
        (found.squared_gradient, whole[1], without[:, 1]),
        (found.scale, whole[0] / whole[1], without[:, 0] / without[:, 1]),
    ):
        assert number.value == pytest.approx(float(value), rel=1e-10)
        assert number.error == pytest.approx(jackknife(parts), rel=1e-8)


def test_noise_scale_covers_the_truth() -> None:
    runs = [summary(drawn(200, 6.0, torch.Generator().manual_seed(seed))) for seed in range(200)]
    for name, value in (("covariance_trace", 55.0), ("squared_gradient", 36.0), ("scale", 55 / 36)):
        inside(sum(within(getattr(run, name), value) for run in runs), 200)
    # Unbiased: the mean over the runs is nearer than any single one.
    mean = sum(run.squared_gradient.value for run in runs) / 200
    assert abs(mean - 36) < 3 * runs[0].squared_gradient.error / 200**0.5


def test_gradient_that_is_lost_in_its_noise_has_no_scale() -> None:
    assert summary(drawn(50, 0.0, torch.Generator().manual_seed(1))).scale is None


# Estimates ------------------------------------------------------------------------------------------------------------

SEEDS = 50


def inside(hits: int, runs: int = SEEDS) -> None:
    """Two standard errors hold the truth in 95 % of runs.

    Of a binomial with that probability, fewer hits than the bound come up once in ten thousand times; the seeds are
    fixed, so that a test which passes goes on passing.
    """
    assert hits >= binom.ppf(1e-4, runs, 0.95), f"the truth was within two standard errors in {hits} of {runs} runs"


class Known(Dense):
    """A dense matrix in the place of a matrix over data, so that fifty reports take no time."""

    def __init__(self, matrix: Tensor, layers: dict[str, Tensor], names: dict[str, str]) -> None:
        super().__init__(matrix)
        object.__setattr__(self, "cut", {name: matrix[i][:, i] for name, i in layers.items()})
        object.__setattr__(self, "names", names)

    def block(self, parameters: list[str]) -> Dense:
        return Dense(self.cut[self.names[parameters[0]]])  # type: ignore[attr-defined]


def studies(name: str) -> Iterator[Study]:
    made, true = known(name)
    owners = {p: p.rpartition(".")[0] or type(made.model).__name__ for p, _ in made.model.named_parameters()}
    for seed in range(SEEDS):
        study = Study(
            made.model,
            made.loss_fn,
            made.data,
            budget=Budget(),
            store=Store(),
            k=3,
            damping=LAMBDA,
            rtol=1e-3,
            seed=seed,
            structures=("diagonal", "kfac"),
            exact=False,
        )
        study.first_pass()
        for matrix, dense in true.matrices.items():
            study._operators[matrix] = Known(dense, true.layers, owners)  # type: ignore[assignment]
            study.rates[matrix] = study.block_rates[matrix] = 1e-3
        yield study


@pytest.mark.parametrize("name", ["mlp_ce", "report_cnn"])
@pytest.mark.parametrize("known_pairs", [False, True])
def test_traces_and_densities_cover_the_truth(name: str, known_pairs: bool) -> None:
    _, true = known(name)
    hits: dict[str, int] = {}
    band = []
    for study in studies(name):
        if known_pairs:  # as after the section on eigenvalues
            study.eigenvalues = dict(reported(name, False).eigenvalues)
            study.vectors = dict(reported(name, False).eigenvectors)
        for matrix, dense in true.matrices.items():
            found = traces(study, matrix, float("inf"))
            pairs = [("trace", found.trace, dense.trace()), ("norm", found.frobenius, dense.norm())]
            pairs += [(layer, found.layers[layer], dense[i][:, i].trace()) for layer, i in true.layers.items()]
            for label, number, value in pairs:
                assert number.samples == 64 and number.error > 0
                hits[f"{matrix} {label}"] = hits.get(f"{matrix} {label}", 0) + within(number, value)
        if not known_pairs:
            curve = density(study, "ggn", float("inf"))
            values = true.top("ggn").clamp(min=0)
            assert curve.effective_dimension is not None
            hit = within(curve.effective_dimension, (values / (values + LAMBDA)).sum())
            hits["effective dimension"] = hits.get("effective dimension", 0) + hit
            gap = doubles(curve.density) - smoothed(true.matrices["ggn"], curve.grid, curve.width)
            band.append(float((gap.abs() <= 2 * doubles(curve.stderr) + 1e-9).double().mean()))
            assert curve.condition is not None
            exact = float((values[0] + LAMBDA) / (values[-1] + LAMBDA))
            assert curve.condition.low <= exact * (1 + 1e-9) and curve.condition.high >= exact * (1 - 1e-9)
    for count in hits.values():
        inside(count)
    assert not band or sum(band) / len(band) > 0.9


@pytest.mark.parametrize("name", ["report_cnn"])
def test_distances_cover_the_truth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[distances.__module__], "_SMALL", 4)  # so that larger layers are estimated
    exact = reported(name).distances
    assert exact is not None
    hits: dict[str, int] = {}
    for study in studies(name):
        found = distances(study, float("inf"), None)
        for structure in ("diagonal", "kfac"):
            mine, true = found.structures[structure], exact.structures[structure]
            pairs = {"whole": (mine.whole, true.whole)} | {n: (mine.layers[n], true.layers[n]) for n in true.layers}
            for label, (number, value) in pairs.items():
                assert number.samples == (0 if label == "0" else 32)  # 15 numbers need no estimate
                key = f"{structure} {label}"
                hits[key] = hits.get(key, 0) + within(number, value.value)
    for count in hits.values():
        inside(count)


def test_root_of_a_ratio() -> None:
    below = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    found = root_of_ratio(4 * below, below)
    assert (found.value, found.error) == (2.0, 0.0)  # whatever is drawn, the ratio is the same
    assert root_of_ratio(torch.zeros(4), below) == Number(0.0, 0.0, 4)


@pytest.mark.parametrize("name", NAMES)
def test_largest_eigenvalues_by_layer(name: str) -> None:
    report, (_, true) = reported(name, False), known(name)
    for matrix, found in report.layer_eigenvalues.items():
        for layer, index in true.layers.items():
            values = torch.linalg.eigvalsh(true.matrices[matrix][index][:, index])
            assert found.largest[layer].converged
            assert abs(found.largest[layer].value - values[-1]) <= found.largest[layer].residual + 1e-12


def test_sections_do_not_change_each_others_numbers() -> None:
    made, _ = known("mlp_ce")
    options: dict[str, Any] = {"exact": False, "matrix": "ggn", "progress": False}
    alone = curvature.report(made.model, made.loss_fn, made.data, sections=["trace"], **options)
    others = curvature.report(made.model, made.loss_fn, made.data, sections=["noise", "trace", "layers"], **options)
    assert alone.traces == others.traces
    assert alone.eigenvalues == {} and alone.noise is None and alone.coverage is None
    assert others.noise is not None


@pytest.mark.long
def test_top_eigenvalue_of_a_million_parameters_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 950), nn.Tanh(), nn.Linear(950, 950), nn.Tanh(), nn.Linear(950, 10))
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    y = torch.randint(10, (64,), generator=generator)
    x = torch.randn(64, 100, generator=generator) + 2 * torch.randn(10, 100, generator=generator)[y]
    options: dict[str, Any] = {"sections": ["eigenvalues"], "matrix": "hessian", "k": 2}
    tops = []
    for seed in range(3):
        found = curvature.report(model, nn.CrossEntropyLoss(), (x, y), products=300, seed=seed, **options)
        pairs = found.eigenvalues["hessian"].largest
        tops.append(pairs[0])
    for top in tops:
        assert top.converged and top.residual <= 1e-3 * top.value
        assert abs(top.value - tops[0].value) <= 1e-3 * top.value
    # With too few products they differ by more, and say so: an eigenvalue lies within the residual, maybe not the top.
    short = curvature.report(model, nn.CrossEntropyLoss(), (x, y), products=25, **options).eigenvalues["hessian"]
    assert not short.largest[0].converged and not short.complete
    assert min(abs(short.largest[0].value - pair.value) for pair in pairs) <= short.largest[0].residual + 1e-2
