"""Do splits of the data, the reduction, and what the loss ignores change a result only as the loss says?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solvers import LinearOperator
from tests.curvature import dense_reference as dense
from tests.curvature.estimates import estimate
from tests.curvature.problems import F64, PROBLEMS, Fn, LanguageModel, Problem, classes, mlp, normal
from tests.curvature.structures.test_exact_kfac import check_layers

STRUCTURES = ["kfac", "ekfac", "diagonal"]


def close(first: LinearOperator, second: LinearOperator | Tensor) -> None:
    a, b = (x if isinstance(x, Tensor) else x.to_dense() for x in (first, second))
    assert a.norm() > 0
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(a.abs().max()))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "name", ["mlp_ce_all_options", "mlp_ce_sum", "mlp_mse", "mlp_ce_probabilities", "linear_on_sequences"]
)
def test_splitting_the_data_changes_nothing(name: str, structure: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    x, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    whole = estimate(replace(problem, data=[(x, y)]), structure, kind)
    close(estimate(problem, structure, kind), whole)
    close(estimate(replace(problem, data=list(zip(x.split(2), y.split(2), strict=True))), structure, kind), whole)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp_ce_all_options", "mlp_mse", "mlp_bce", "language_model"])
def test_mean_and_sum_differ_by_the_divisor(name: str, structure: str) -> None:
    problem = PROBLEMS[name]()
    z, y = dense.dataset_outputs(problem, problem.model)
    mean = estimate(problem, structure)
    close(
        estimate(problem.with_loss(dense.summed(problem.loss_fn)), structure), mean / dense.term_weight(problem, z, y)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_an_ignored_example_counts_nowhere(structure: str, kind: str) -> None:
    torch.manual_seed(0)
    model, loss = mlp().double(), nn.CrossEntropyLoss(ignore_index=-7)
    x, y = normal(4, 4), torch.tensor([0, 2, -7, 1])
    kept = y != -7
    garbage = torch.where(kept[:, None], x, 1e3)
    without = estimate(Problem(model, loss, [(x[kept], y[kept])]), structure, kind)
    for data in ([(x, y)], [(garbage, y)], [(garbage[1:], y[1:]), (garbage[:1], y[:1])]):
        close(estimate(Problem(model, loss, data), structure, kind), without)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_positions_with_dead_units_count_beside_an_ignored_example(sharing: str) -> None:
    """No gradient arrives at them either, but they are no padding: their example has a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), Fn(lambda h: h.sum(1)), nn.Linear(2, 3)).double()
    x, y = normal(3, 4, 3), torch.tensor([0, 1, 2])
    dead = (model[:2](x) == 0).all(-1)
    assert dead.any() and not dead.all()
    ignored = (torch.cat([x, normal(1, 4, 3)]), torch.cat([y, torch.tensor([-100])]))
    with_it, without = (
        estimate(Problem(model, nn.CrossEntropyLoss(), [data]), "kfac", sharing=sharing) for data in (ignored, (x, y))
    )
    close(with_it, without)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_padding_counts_nowhere(structure: str, kind: str, sharing: str) -> None:
    """However long the padding and whatever stands in it: nothing that counts depends on it in a causal model."""
    options = {} if structure == "diagonal" else {"sharing": sharing}
    torch.manual_seed(0)
    model = LanguageModel(length=6).double()
    ids, y = torch.tensor([[1, 2, 3], [4, 4, 2]]), torch.tensor([[2, 3, -100], [4, 2, 1]])
    problem = Problem(model, nn.CrossEntropyLoss(), [(ids, y)], class_dim=-1)
    plain = estimate(problem, structure, kind, **options)
    longer = nn.functional.pad(y, (0, 3), value=-100)
    for filling in (0, 3):
        padded = nn.functional.pad(ids, (0, 3), value=filling)
        close(estimate(replace(problem, data=[(padded, longer)]), structure, kind, **options), plain)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_padded_model_follow_the_definition(sharing: str) -> None:
    problem = PROBLEMS["language_model"]()
    factors = dense.kfac(problem, "exact", sharing)
    del factors["head"]  # tied: see test_exact_kfac
    check_layers(problem, estimate(problem, "kfac", "exact", sharing=sharing), factors, joint=True)


def test_a_masked_position_that_others_read_counts() -> None:
    """No loss at the first position, but the second depends on it: its input is part of the factor."""
    torch.manual_seed(0)
    model = LanguageModel(length=2).double()
    problem = Problem(model, nn.CrossEntropyLoss(), [(torch.tensor([[1, 2]]), torch.tensor([[-100, 3]]))], class_dim=-1)
    factors = dense.kfac(problem, "exact")
    assert factors["v"][1].shape == (1, 4, 4) and torch.linalg.matrix_rank(factors["v"][1][0]) == 2
    del factors["head"]
    check_layers(problem, estimate(problem, "kfac", "exact"), factors, joint=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_loss_options_change_the_result(structure: str) -> None:
    """No option is dropped: the dense references hold the values, this holds that the options matter here."""
    torch.manual_seed(0)
    model, data = mlp().double(), [(normal(5, 4), classes(5, of=3))]
    weight = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    plain = estimate(Problem(model, nn.CrossEntropyLoss(), data), structure, "empirical").to_dense()
    for loss in (
        nn.CrossEntropyLoss(weight=weight),
        nn.CrossEntropyLoss(label_smoothing=0.3),
        nn.CrossEntropyLoss(ignore_index=int(data[0][1][0])),
        nn.CrossEntropyLoss(reduction="sum"),
    ):
        other = estimate(Problem(model, loss, data), structure, "empirical").to_dense()
        assert torch.dist(other, plain) > 0.05 * plain.norm()


def test_a_loader_and_a_list_of_its_batches_agree() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    close(estimate(replace(problem, data=loader), "ekfac"), estimate(replace(problem, data=list(loader)), "ekfac"))


def test_a_mapping_with_labels_is_a_batch() -> None:
    problem = PROBLEMS["mapping_inputs"]()
    x, y = problem.data[0]
    data: Any = {**x, "labels": y}
    close(estimate(replace(problem, data=data), "kfac"), estimate(replace(problem, data=[(x, y)]), "kfac"))
