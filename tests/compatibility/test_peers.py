"""Libraries that the pages of ``docs/migrate`` speak of and that are not pinned: their call and ours, number by number.

Each is installed by itself, beside the environment: ``pip install --no-deps --target FOLDER kronfluence pyhessian
hessian-eigenthings pytorch-optimizer``, and ``PEERS=FOLDER make test-long``. What is not there is skipped.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import curvature
import precond
import solvers

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
LOSS = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if folder := os.environ.get("PEERS"):
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
    yield


def peer(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed; PEERS names a folder with it")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 5).double(), torch.randint(3, (10,))


def halves() -> list[tuple[Tensor, Tensor]]:
    x, y = batch()
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def test_eigenvalues_and_trace_of_pyhessian() -> None:
    computer = peer("pyhessian").hessian(model(), LOSS, data=batch(), cuda=False)
    values, _ = computer.eigenvalues(maxIter=3000, tol=1e-12, top_n=2)
    H = curvature.hessian(model(), LOSS, batch())
    exact = torch.linalg.eigvalsh(H.to_dense())
    exact = exact[exact.abs().argsort(descending=True)][:2]
    ours = solvers.eigsh(H, k=2, which="LM", generator=torch.Generator().manual_seed(0))
    # Power iteration stops when a value changes by a part in 1e12 from one product to the next.
    torch.testing.assert_close(torch.tensor(values).double(), exact, rtol=1e-5, atol=0)
    assert ((ours.values - exact).abs() <= ours.residuals + 1e-12).all()
    draws = torch.tensor(computer.trace(maxIter=400, tol=0.0)).double()  # one for each random vector
    error = float(draws.std() / len(draws) ** 0.5)
    whole = float(H.to_dense().trace())
    assert abs(float(draws.mean()) - whole) < 5 * error
    found = solvers.trace(H, generator=torch.Generator().manual_seed(0))
    assert abs(float(found.value) - whole) <= 5 * float(found.stderr) + 1e-9


def test_matrices_and_eigenvalues_of_hessian_eigenthings() -> None:
    """It weighs batches equally, so they have one size here."""
    things, data = peer("hessian_eigenthings"), halves()
    H = things.HessianOperator(model(), data, things.supervised_loss(LOSS))
    ours = curvature.hessian(model(), LOSS, data)
    dense = torch.stack([H.matvec(row) for row in torch.eye(ours.shape[1]).double()])
    torch.testing.assert_close(dense, ours.to_dense(), rtol=1e-10, atol=1e-13)
    values = things.lanczos(H, k=2, seed=0).eigenvalues
    expected = torch.linalg.eigvalsh(ours.to_dense())[-2:].flip(0)
    torch.testing.assert_close(torch.as_tensor(values), expected, rtol=5e-3, atol=0)  # where its Lanczos stops


def test_scores_of_kronfluence(tmp_path: Path) -> None:
    peer("kronfluence")
    analyzers, arguments = peer("kronfluence.analyzer"), peer("kronfluence.arguments")

    class Task(peer("kronfluence.task").Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    x, y = batch()
    prepared = analyzers.prepare_model(model(), Task())
    analyzer = analyzers.Analyzer(
        analysis_name="run", model=prepared, task=Task(), cpu=True, disable_tqdm=True, output_dir=str(tmp_path)
    )
    wide = torch.float64
    names = ("activation_covariance", "gradient_covariance", "eigendecomposition", "lambda", "per_sample_gradient")
    factors = arguments.FactorArguments(
        strategy="ekfac", use_empirical_fisher=True, **{f"{name}_dtype": wide for name in names}
    )
    analyzer.fit_all_factors("f", dataset=TensorDataset(x, y), per_device_batch_size=10, factor_args=factors)
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        query_dataset=TensorDataset(x[:2], y[:2]),
        train_dataset=TensorDataset(x, y),
        per_device_query_batch_size=2,
        per_device_train_batch_size=10,
        score_args=arguments.ScoreArguments(
            damping_factor=1e-2, score_dtype=wide, per_sample_gradient_dtype=wide, precondition_dtype=wide
        ),
    )
    theirs = analyzer.load_pairwise_scores("s")["all_modules"]
    C = curvature.fisher(model(), LOSS, (x, y), kind="empirical", structure="ekfac")
    found = curvature.influence(model(), LOSS, [(x, y)], (x[:2], y[:2]), curvature=C, damping=1e-2)
    torch.testing.assert_close(found.scores, theirs, rtol=1e-8, atol=1e-10)


def test_soap_of_pytorch_optimizer() -> None:
    """A port of the authors' file: it skips the first step and turns the basis after a step, ours before it.

    Without a basis both are Adam, number by number, once the step that it skips is left out.
    """
    theirs_of = peer("pytorch_optimizer").SOAP
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 4).double(), [torch.randn(5, 4).double() for _ in range(8)]
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0}
    pairs = [
        (theirs, theirs_of([theirs], precondition_frequency=2, max_precondition_dim=1, **options), [gradients[0]]),
        (ours, precond.SOAP([ours], inverse_update_period=2, max_dim=1, **options), []),
    ]
    for p, optimizer, before in pairs:
        for gradient in [*before, *gradients]:
            p.grad = gradient.clone()
            optimizer.step()
    assert (ours - start).norm() > 0.05
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-8)
