"""Do fits and predictions of Laplace approximations stay small, with the numbers of the definition?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

from curvature.laplace import DiagonalPosterior, GGNBackend, LastLayerDiagonalPosterior
from curvature.laplace.backends import base as backend_module
from curvature.laplace.parametric import predictions
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import last_layer, loader_of, toy
from tests.curvature.problems import classes, normal
from tests.peak_memory import peak_of_tensors


def close(got: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "subset,structure",
    [("all", "diagonal"), ("last_layer", "diagonal"), ("last_layer", "kfac"), ("last_layer", "ekfac")],
)
def test_many_outputs_fit_into_little_memory(subset: str, structure: str) -> None:
    """0.7 and 8 GB where Jacobians of all examples, outputs and parameters are formed."""
    torch.manual_seed(0)
    outputs, hidden, examples = (100, 400, 16) if subset == "all" else (800, 64, 24)
    model = nn.Sequential(nn.Linear(40, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()
    x, y = torch.randn(examples, 40, dtype=torch.float64), torch.randint(outputs, (examples,))
    la = Laplace(model, "classification", subset, structure, backend=GGNBackend)
    data = DataLoader(TensorDataset(x, y), batch_size=examples)
    formed = 8 * examples * outputs * (la.n_params if subset == "all" else outputs * (hidden + 1))
    assert 0.6e9 < formed
    assert peak_of_tensors(lambda: la.fit(data)) < formed / 40
    assert peak_of_tensors(lambda: la(x, link_approx="probit")) < formed / 40


def posterior(subset: str, structure: str, task: str = "classification", **options: Any) -> tuple[Any, Tensor]:
    model, x, y = toy(task)
    la = Laplace(model, task, subset, structure, backend=GGNBackend, prior_precision=0.7, **options)
    la.fit(loader_of(x, y))
    return la, x


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("subset,kind", [("all", DiagonalPosterior), ("last_layer", LastLayerDiagonalPosterior)])
def test_diagonal_is_diag_with_other_predictions(subset: str, kind: type, task: str) -> None:
    (ours, x), (theirs, _) = posterior(subset, "diagonal", task), posterior(subset, "diag", task)
    assert type(ours) is kind
    close(ours.posterior_precision, theirs.posterior_precision)
    close(ours.log_marginal_likelihood().detach(), theirs.log_marginal_likelihood().detach())
    for joint in (False, True):
        for got, expected in zip(*(la._glm_predictive_distribution(x, joint) for la in (ours, theirs)), strict=True):
            close(got, expected)
    close(*(la._glm_predictive_distribution(x, diagonal_output=True)[1] for la in (ours, theirs)))
    if task == "classification":
        close(*(la(x, link_approx="probit") for la in (ours, theirs)))
    else:
        for got, expected in zip(*(la(x, diagonal_output=True) for la in (ours, theirs)), strict=True):
            close(got, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "low_rank"])
def test_predictions_in_parts_are_those_in_one(structure: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Of one or two outputs of an example, of some examples, of all; :math:`J \Sigma J^\top` by definition."""
    la, x = posterior("all", structure)
    J = dense.jacobian(la.model(x), list(la.model.parameters()))
    expected = la.functional_variance(J)
    monkeypatch.setattr(predictions, "MEMORY", rows * 8 * J.shape[-1])
    f, variance = la._glm_predictive_distribution(x)
    close(variance, expected)
    close(f, la.model(x).detach())
    close(la._glm_predictive_distribution(x, diagonal_output=True)[1], expected.diagonal(dim1=-2, dim2=-1))


class AlongTheBatch(nn.Module):
    """Examples attend to each other, and share a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift, self.last = nn.Linear(4, 3), nn.Parameter(torch.randn(12, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.shift[: len(x)]
        return self.last((h @ h.T).softmax(-1) @ h)


@pytest.mark.parametrize("rows", [1, 5])
def test_parts_of_examples_that_interact(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = AlongTheBatch().double(), normal(6, 4), classes(6, of=2)
    la = Laplace(model, "classification", "all", "diagonal")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=6))
    J = dense.jacobian(la.model(x), list(la.model.parameters()))
    monkeypatch.setattr(predictions, "MEMORY", rows * 8 * J.shape[-1])
    close(la._glm_predictive_distribution(x)[1], torch.einsum("ncp,p,nkp->nck", J, la.posterior_variance, J))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("bias", [True, False])
def test_full_matrix_of_the_last_layer_needs_no_jacobians(
    task: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()
    x, y = normal(8, 4), classes(8, of=3) if task == "classification" else normal(8, 3)
    P = sum(p.numel() for p in model[2].parameters())
    expected = GGNBackend(model, task).full(x, y)[1][-P:, -P:]
    head = GGNBackend(last_layer(model, x), task, last_layer=True)
    monkeypatch.setattr(head, "_rows", None)  # what it would take otherwise
    close(head.full(x, y)[1], expected)


def test_a_matrix_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = toy()
    P = sum(p.numel() for p in model.parameters())
    backend = GGNBackend(model, "classification")
    monkeypatch.setattr(backend_module, "installed", lambda: 8 * P * P - 1)
    with pytest.raises(ValueError, match=rf"dense matrix of {P} parameters takes .* Use hessian_structure='kfac'"):
        backend.full(x, y)
    monkeypatch.setattr(backend_module, "installed", lambda: 8 * P * P)
    assert backend.full(x, y)[1].shape == (P, P)
