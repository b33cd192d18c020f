"""Do the benchmarks run, are their references right, and do the claims made from them hold in a reduced form?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import precond
from precond import GaussNewton, LevenbergMarquardt, Newton
from tests.benchmarks import autoencoder, convex, pinn, training
from tests.curvature import dense_reference

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", ["breast_cancer", "digits"])
def test_newton_solves_logistic_regression_in_fifteen_steps(name):
    problem = convex.load(name)
    reference = convex.dense_newton(problem)
    assert reference.norm < 1e-10
    found = convex.solve(
        problem, lambda m: Newton(m.parameters(), damping=1e-3, damping_rule=LevenbergMarquardt()), seconds=60
    )
    assert found.norm < convex.GOAL and found.steps <= 15
    # The smallest eigenvalue of the Hessian is the ridge, so the distance is at most the norm divided by it.
    assert (found.weights - reference.weights).norm() <= (found.norm + reference.norm) / convex.RIDGE
    model = problem.model()
    torch.nn.utils.vector_to_parameters(found.weights, model.parameters())
    for _ in range(2):
        Newton(model.parameters()).step(lambda: problem.loss(model))
    polished = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(polished, reference.weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", pinn.EQUATIONS)
def test_both_forms_of_an_equation_are_one(name):
    equation = pinn.EQUATIONS[name]()
    model, points = equation.network(0), pinn.Points(equation, 0)
    points.inner, points.outer = points.inner[:40], points.outer[:20]
    total = sum(0.5 * part.value().square().sum() for part in points.residuals(model))
    assert total.item() == pytest.approx(points.loss(model).item(), rel=1e-10)


def test_exact_solutions_solve_their_equations():
    for equation in (pinn.EQUATIONS["poisson"](), pinn.EQUATIONS["5d 449"](), pinn.burgers()):
        for x in equation.inner(torch.Generator().manual_seed(0))[:5]:
            assert abs(equation.at(lambda z, exact=equation.exact: exact(z[None]), x).item()) < 1e-9
    start = torch.stack([torch.linspace(-1, 1, 60).double(), torch.full((60,), 1e-12).double()], 1)
    expected = -torch.sin(math.pi * start[:, 0])
    torch.testing.assert_close(pinn.cole_hopf(start), expected, rtol=0, atol=1e-5)


def test_gauss_newton_solves_poisson_to_four_digits_in_forty_steps():
    equation = pinn.EQUATIONS["poisson"]()
    model, points = equation.network(0), pinn.Points(equation, 0)
    points.inner = points.inner[:300]  # a third of the points, a third of the time
    optimizer = GaussNewton(model)
    for _ in range(40):
        optimizer.step(lambda: points.residuals(model))
    assert equation.error(model) < 1e-3


def test_every_method_has_a_place_in_the_table():
    assert {m.name for m in precond.methods()} == set(training.SETTINGS) | set(training.ABSENT)


def test_sgd_needs_twice_the_steps(monkeypatch):
    monkeypatch.setitem(training.TARGET, "autoencoder", 2.5)
    steps = {
        name: training.trial("autoencoder", name, training.SETTINGS[name], seed=0, limit=400).steps
        for name in ("SOAP", "Muon", "KFAC")
    }
    # The best rate of the grid at this target, and its neighbours.
    sgd = min(training.trial("autoencoder", "SGD", {"lr": lr}, seed=0, limit=1000).steps for lr in (1.0, 3.0))
    assert max(steps.values()) <= 0.5 * sgd < math.inf, (steps, sgd)


def test_a_trial_repeats_and_its_row_says_what_happened(monkeypatch):
    monkeypatch.setitem(training.TARGET, "language model", 3.3)
    first, second = (training.trial("language model", "AdamW", {"lr": 1e-2}, seed=1, limit=40) for _ in range(2))
    assert first.steps == second.steps < 40 and first.best == second.best <= 3.3
    never = training.Run(math.inf, 3.5, 0.001)
    row = training.Row("AdamW", {"lr": 1e-2}, [first, never, never])
    assert row.markdown(100.0) == f"| `AdamW` | lr=0.01 | not (best 3.5) | {first.steps:.0f} - - | - | 1.0 |"


def test_the_settings_of_the_autoencoder_are_ones_that_the_methods_take():
    problem = autoencoder.autoencoder(0, logits=True)
    for name, grid in autoencoder.GRIDS.items():
        for settings in grid:
            autoencoder.make(problem, name, settings)


def test_the_autoencoder_learns_in_the_time_of_a_hundred_steps():
    course = autoencoder.run("SOAP", {"lr": 1e-2}, budget=100, seed=0, decay=0.9)
    assert course.error < 4.0 and course.reached == math.inf and course.steps > 5


def laplace_benchmarks() -> tuple[Any, Any]:
    """Those that need laplace-torch."""
    pytest.importorskip("laplace")
    from tests.benchmarks import laplace_digits, laplace_support

    return laplace_digits, laplace_support


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of laplace-torch, transformers and peft
@pytest.mark.parametrize("matrix", ["GGN", "empirical Fisher", "Hessian"])
def test_our_backends_are_right_on_every_model_of_the_support_table(matrix, monkeypatch):
    support = laplace_benchmarks()[1]
    pytest.importorskip("peft")
    ours = {name: backend for name, backend in support.BACKENDS[matrix].items() if name == "ours"}
    monkeypatch.setitem(support.BACKENDS, matrix, ours)
    page = (Path(__file__).parents[1] / "docs" / "reference" / "laplace-support.md").read_text(encoding="utf-8")
    for title in support.CASES:
        (words,) = support.row(title, matrix)
        assert set(words.split(", ")) <= {"right", "fits"}, (title, words)
        assert f"| {title} | {words} |" in page, "the table in the documentation is of other code"


def laplace_methods() -> Any:
    pytest.importorskip("laplace")
    from tests.benchmarks import laplace_methods

    return laplace_methods


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("subset,structure", [("all", "kfac"), ("last_layer", "full"), ("subnetwork", "full")])
def test_methods_of_laplace_torch_do_what_their_table_says(subset, structure):
    methods = laplace_methods()
    page = (Path(__file__).parents[1] / "docs" / "reference" / "laplace-methods.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {subset}\n")[2].partition("\n## ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    column = header.index(f"`{structure}`") + (len(rows[0]) - len(header))
    quick = [
        "`posterior_precision`",
        "`log_likelihood`, `scatter`, `log_det_ratio`, `log_marginal_likelihood`",
        "`square_norm`, `log_prob`",
        '`la(x, pred_type="nn", link_approx="mc")`',
        "`fit(override=False)` with more data",
        "`copy.deepcopy`",
    ]
    found = methods.verdicts(subset, structure, quick)
    said = {row[0]: row[column] for row in rows}
    for title, cells in found.items():
        words = {one.word for one in cells.values()}
        assert words <= {"works", "refused", "laplace-torch refuses", "laplace-torch has none"}, (title, cells)
        assert ("works" in words) == said[title].startswith("works"), (title, said[title])
        assert (words == {"works"}) == (said[title] == "works"), (title, said[title])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_that_are_wrong_are_called_wrong():
    """The table's own checks see a factor of 1.001 in the precision, and a refusal is told from a defect."""
    methods = laplace_methods()
    subject = methods.Subject.fitted("regression", "GGN", "all", "full")
    subject.la.H = 1.001 * subject.la.H
    assert methods.verdict(lambda: methods.METHODS["`posterior_precision`"](subject)).word == "wrong"
    assert methods.verdict(lambda: methods.same(torch.ones(2), torch.ones(3))).word == "wrong"
    assert methods.verdict(lambda: [][0]).word == "error"
    refused = methods.verdict(lambda: methods.BACKENDS["GGN"](torch.nn.Linear(1, 1), "regression", max_dim=0))
    assert refused.word == "refused" and "max_dim is at least 1" in refused.message


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_of_a_gpt2_predict_from_mappings():
    """From the fit to the probabilities, against the formulas with dense matrices."""
    support = laplace_benchmarks()[1]
    pytest.importorskip("peft")
    case = support.CASES["LoRA on GPT-2, mappings"]()
    got = support.fitted(case, support.GGNBackend, "kron")({"input_ids": case.x}, link_approx="probit")
    model, expected = case.reference.model, support.reference(case, "GGN").kron
    z = model(case.x)
    J = dense_reference.jacobian(z, list(dense_reference.trainable(model).values()))
    covariance = torch.linalg.inv(expected + torch.eye(len(expected), dtype=z.dtype))
    variances = torch.einsum("ncp,pq,ncq->nc", J, covariance, J)
    assert variances.min() > 0
    torch.testing.assert_close(got, (z.detach() / (1 + math.pi / 8 * variances).sqrt()).softmax(1))


def test_the_support_table_tells_right_from_wrong(monkeypatch):
    support = laplace_benchmarks()[1]
    case = support.CASES["MLP"]()
    reference = support.reference(case, "GGN")
    assert reference.verdict("full", reference.full) == "right"
    assert reference.verdict("diag", 1.25 * reference.full.diagonal()) == "0.25 off"
    assert reference.verdict("full", 0 * reference.full) == "1 off"
    assert reference.verdict("kron", math.nan * reference.kron) == "nan off"
    # Kronecker factors are no exact matrix, even of a network whose layers are used once.
    assert reference.verdict("kron", reference.full).endswith("off")
    tied = support.reference(support.CASES["tied weights"](), "GGN")
    assert tied.verdict("kron", tied.kron) == "fits"
    assert support.cell(case, None.__class__, "full", reference) == "error"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_linearised_predictions_are_better_than_sampled_networks():
    laplace = laplace_benchmarks()[0]
    posteriors = (("all", "kron"), ("all", "diag"), ("last_layer", "full"))
    found = laplace.trials(0, (1.0, 100.0), posteriors, hidden=10)
    nll = {key: max(trials, key=laplace.CRITERIA["validation"]).test.nll for key, trials in found.items()}
    for structure in ("kron", "diag"):
        assert nll["glm", "all", structure] < nll["nn", "all", structure]
    assert nll["glm", "all", "kron"] < nll["glm", "all", "diag"]
    # The network is linear in its last layer: what is left is the error of 100 draws.
    assert nll["glm", "last_layer", "full"] == pytest.approx(nll["nn", "last_layer", "full"], abs=0.02)
    table = laplace.table([found, found], "evidence")
    assert table.count("\n") == 1 + len(found) and "| plain network | - | - | 0." in table and "± 0.000" in table


def test_scores_of_predictions():
    laplace = laplace_benchmarks()[0]
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    scores = laplace.Scores.of(p, torch.tensor([0, 1, 1, 1]))
    assert scores.nll == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.5)) / 4)
    assert scores.accuracy == 0.5  # of two equal probabilities the first is chosen
    # Bins: 0.75 twice, one right; 0.5, wrong; 1, right.
    assert scores.ece == pytest.approx((2 * 0.25 + 0.5 + 0) / 4)


def test_digits_are_split_once():
    laplace = laplace_benchmarks()[0]
    parts = laplace.split(0)
    assert [len(y) for _, y in parts] == [1258, 269, 270]
    assert not torch.equal(parts[0][0], laplace.split(1)[0][0])
    assert torch.equal(parts[2][0], laplace.split(0)[2][0])
