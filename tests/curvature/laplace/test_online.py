"""Is the posterior that is carried from task to task what Bayes' rule and dense matrices say, and does it remember?"""

from __future__ import annotations

import copy
import gc
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace")

from laplace import Laplace
from laplace.curvature import CurvlinopsGGN

from curvature.estimation.checkpoint import CheckpointError
from curvature.laplace import EFBackend, GGNBackend, HessianBackend, OnlineLaplace, load
from tests.curvature.laplace.problems import loader_of, summed, toy
from tests.curvature.problems import F64, normal

STRUCTURES = ["full", "diag", "kron", "kfac"]
PRIOR, STRENGTH, FORGETTING = 1.5, 2.0, 0.7


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def precision(la: Any) -> Tensor:
    P = la.posterior_precision
    return P.to_matrix() if hasattr(P, "to_matrix") else torch.diag(P) if P.dim() == 1 else P


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def move(model: nn.Module, seed: int, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, dtype=p.dtype, generator=generator))


class Factors:
    """Of a network Linear, Tanh, Linear with cross-entropy, from the definition: sums over the examples of one task."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.full = torch.zeros(2 * (len(flat(model)),), dtype=F64)
        self.B, self.A = [0.0, 0.0], [0.0, 0.0]
        first, tanh, last = model
        for example in x:
            pre = first(example).detach().requires_grad_()
            z = last(tanh(pre))
            p = z.detach().softmax(-1)
            H = torch.diag(p) - torch.outer(p, p)
            J = torch.stack([torch.autograd.grad(value, pre, retain_graph=True)[0] for value in z])
            to_parameters = []
            for value in model(example):
                to_parameters.append(
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(value, [*model.parameters()], retain_graph=True)]
                    )
                )
            J_all = torch.stack(to_parameters)
            self.full = self.full + J_all.T @ H @ J_all
            hidden = tanh(pre).detach()
            for layer, (output, inputs) in enumerate(((J.T @ H @ J, example), (H, hidden))):
                self.B[layer] = self.B[layer] + output
                self.A[layer] = self.A[layer] + torch.outer(inputs, inputs)
        self.count = float(len(x))

    def matrix(self, structure: str, older: Factors | None = None) -> Tensor:
        """The curvature of this task and of an older one whose examples count FORGETTING."""
        pairs = [(self, 1.0)] + ([(older, FORGETTING)] if older else [])
        if structure == "full":
            return sum(weight * task.full for task, weight in pairs)  # type: ignore[return-value]
        if structure == "diag":
            return sum(weight * torch.diag(task.full.diagonal()) for task, weight in pairs)  # type: ignore[return-value]
        blocks = []
        count = sum(weight * task.count for task, weight in pairs)
        for layer in range(2):
            B = sum(weight * task.B[layer] for task, weight in pairs)
            A = sum(weight * task.A[layer] for task, weight in pairs) / count
            blocks += [torch.kron(B, A), B]  # type: ignore[arg-type]
        return torch.block_diag(*blocks)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_penalty_and_posterior_by_dense_matrices(structure: str) -> None:
    """Over two tasks of unequal sizes, with strength and forgetting; value, gradient and second derivatives."""
    model, x, y = toy()
    P, eye = len(flat(model)), torch.eye(len(flat(model)), dtype=F64)
    la = Laplace(model, "classification", "all", structure, backend=GGNBackend, prior_precision=PRIOR, temperature=0.9)
    online = OnlineLaplace(la, STRENGTH, FORGETTING)
    start = flat(model)
    close(online.penalty().detach(), 0.5 * PRIOR * start.square().sum())  # of the prior, around zero
    first = Factors(model, x[:5])
    online.update(loader_of(x[:5], y[:5], 2))
    assert online.penalty() == 0 and torch.equal(online.mean, start)
    move(model, 1)
    matrix = STRENGTH / 0.9 * first.matrix(structure) + PRIOR * eye
    _assert_quadratic(online, matrix, flat(model) - start)

    middle, second = flat(model), Factors(model, x[5:])
    online.update(loader_of(x[5:], y[5:], 3))
    move(model, 2)
    H = second.matrix(structure, first)
    _assert_quadratic(online, STRENGTH / 0.9 * H + PRIOR * eye, flat(model) - middle)
    close(precision(la), H / 0.9 + PRIOR * eye)
    assert online.tasks == 2 and la.n_data == 12 and len(H) == P


def _assert_quadratic(online: OnlineLaplace, matrix: Tensor, delta: Tensor) -> None:
    penalty = online.penalty()
    close(penalty.detach(), 0.5 * delta @ matrix @ delta)
    parameters = list(online.posterior.model.parameters())
    grads = torch.autograd.grad(penalty, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in grads])
    close(gradient.detach(), matrix @ delta)
    direction = normal(len(delta))
    second = torch.autograd.grad(gradient @ direction, parameters)
    close(torch.cat([g.flatten() for g in second]), matrix @ direction)


def test_a_linear_model_learns_from_tasks_what_it_learns_from_all_the_data() -> None:
    """Bayes' rule is exact here: the same mean, the same precision, whatever the order and the sizes of the tasks."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y, noise = normal(20, 4), normal(20, 2), 0.6
    la = Laplace(model, "regression", "all", "full", backend=GGNBackend, prior_precision=PRIOR, sigma_noise=noise)
    online = OnlineLaplace(la)

    def solve(objective: Any) -> None:
        """One step of Newton's method, exact for a quadratic function."""
        parameters = list(model.parameters())
        grads = torch.autograd.grad(objective(), parameters, create_graph=True)
        g = torch.cat([t.flatten() for t in grads])
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in g]
        H = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
        step = torch.linalg.solve(H, g.detach())
        nn.utils.vector_to_parameters(flat(model) - step, parameters)

    for part in (slice(0, 3), slice(3, 14), slice(14, 20)):
        solve(lambda part=part: (model(x[part]) - y[part]).square().sum() / (2 * noise**2) + online.penalty())
        online.update(loader_of(x[part], y[part], 4))
    solve(
        lambda: (
            (model(x) - y).square().sum() / (2 * noise**2)
            + PRIOR / 2 * sum(p.square().sum() for p in model.parameters())
        )
    )
    once = Laplace(model, "regression", "all", "full", backend=GGNBackend, prior_precision=PRIOR, sigma_noise=noise)
    once.fit(loader_of(x, y))
    close(online.mean, flat(model))
    close(precision(la), precision(once))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp_mse", "cnn", "encoder_pre_norm"])
@pytest.mark.parametrize("kind", [GGNBackend, EFBackend])
def test_fits_that_are_added_equal_one_fit_of_all_the_data(name: str, structure: str, kind: type) -> None:
    """At the same parameters, in parts and batches of unequal sizes."""
    problem = summed(name)
    task = "regression" if isinstance(problem.loss_fn, nn.MSELoss) else "classification"
    x, y = (torch.cat([batch[i] for batch in problem.data]) for i in (0, 1))
    once, parts = (Laplace(problem.model, task, "all", structure, backend=kind) for _ in range(2))
    for la in (once, parts):
        la.backend.lossfunc = problem.loss_fn
    once.fit(loader_of(x, y, len(x)))
    for start, stop in itertools.pairwise([0, 1, len(x)]):
        parts.fit(loader_of(x[start:stop], y[start:stop], 2), override=start == 0)
    close(precision(parts), precision(once))
    close(parts.loss, once.loss)
    assert parts.n_data == once.n_data == len(x)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_forgetting_it_is_a_fit_that_is_extended(structure: str) -> None:
    model, x, y = toy("regression")
    one, two = (Laplace(model, "regression", "all", structure, backend=GGNBackend, sigma_noise=0.7) for _ in range(2))
    online = OnlineLaplace(one)
    for part in (slice(0, 5), slice(5, 12)):
        online.update(loader_of(x[part], y[part], 2))
        two.fit(loader_of(x[part], y[part], 2), override=part.start == 0)
    close(precision(one), precision(two))
    close(one.log_marginal_likelihood(), two.log_marginal_likelihood())
    close(one(x)[1], two(x)[1])


def test_a_posterior_that_was_fitted_before_is_the_first_task() -> None:
    model, x, y = toy()
    la = Laplace(model, "classification", "all", "kfac", backend=GGNBackend)
    la.fit(loader_of(x, y))
    online = OnlineLaplace(la)
    assert online.tasks == 1 and online.penalty() == 0
    assert repr(online) == "OnlineLaplace(KFACLaplace, tasks=1, examples=12)"
    move(model, 3)
    assert online.penalty() > 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_update_that_fails_leaves_the_posterior_as_it_was(structure: str) -> None:
    model, x, y = toy()
    online = OnlineLaplace(Laplace(model, "classification", "all", structure, backend=GGNBackend), forgetting=0.5)
    for fitted_before in (False, True):
        if fitted_before:
            online.update(loader_of(x, y))
        before = precision(online.posterior) if fitted_before else None
        mean = online.mean
        broken = y.clone()
        broken[8] = 77  # no such class; the first batches are added before it is seen
        move(model, 4)
        with pytest.raises((IndexError, ValueError)):
            online.update(loader_of(x, broken, 3))
        assert torch.equal(online.mean, mean) and online.tasks == int(fitted_before)
        if before is not None:
            assert torch.equal(precision(online.posterior), before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saved_in_the_middle_of_a_task(structure: str, tmp_path: Path) -> None:
    model, x, y = toy()
    la = Laplace(model, "classification", "all", structure, backend=GGNBackend, prior_precision=PRIOR)
    online = OnlineLaplace(la, STRENGTH, FORGETTING)
    with pytest.raises(ValueError, match="not fitted"):
        online.save(tmp_path / "online.safetensors")
    online.update(loader_of(x[:5], y[:5]))
    move(model, 1)
    online.save(tmp_path / "online.safetensors")
    other = copy.deepcopy(model)
    loaded = OnlineLaplace.load(tmp_path / "online.safetensors", other)
    assert (loaded.strength, loaded.forgetting, loaded.tasks) == (STRENGTH, FORGETTING, 1)
    assert torch.equal(loaded.penalty(), online.penalty()) and loaded.penalty() > 0
    assert torch.equal(flat(other), flat(model))
    for each in (online, loaded):
        each.update(loader_of(x[5:], y[5:]))
    assert torch.equal(precision(loaded.posterior), precision(online.posterior))
    with pytest.raises(CheckpointError, match="holds an online posterior, and a posterior was expected"):
        load(tmp_path / "online.safetensors", model)
    with pytest.raises(CheckpointError, match="other trainable parameters"):
        OnlineLaplace.load(tmp_path / "online.safetensors", nn.Linear(4, 3).double())


def test_refusals() -> None:
    model, *_ = toy()

    def laplace(subset: str, structure: str, **options: Any) -> Any:
        return Laplace(model, "classification", subset, structure, **({"backend": GGNBackend} | options))

    with pytest.raises(TypeError, match=r"EKFACLaplace cannot be carried.*eigenbasis of one task"):
        OnlineLaplace(laplace("all", "ekfac"))
    for structure in ("low_rank", "low_rank_diag"):
        with pytest.raises(TypeError, match="eigenvectors of one task"):
            OnlineLaplace(laplace("all", structure))
    with pytest.raises(TypeError, match="requires_grad_"):
        OnlineLaplace(laplace("last_layer", "kfac"))
    with pytest.raises(TypeError, match="Linear cannot be carried"):
        OnlineLaplace(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="damping=True"):
        OnlineLaplace(laplace("all", "kfac", damping=True))
    with pytest.raises(TypeError, match="CurvlinopsGGN are not weighted"):
        OnlineLaplace(laplace("all", "kron", backend=CurvlinopsGGN))
    OnlineLaplace(laplace("all", "full", backend=HessianBackend))
    for strength in (-1.0, math.nan):
        with pytest.raises(ValueError, match="strength"):
            OnlineLaplace(laplace("all", "kfac"), strength=strength)
    for forgetting in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="forgetting"):
            OnlineLaplace(laplace("all", "kfac"), forgetting=forgetting)


def test_frozen_parameters_are_not_in_it() -> None:
    model, x, y = toy()
    first = next(model.parameters()).requires_grad_(False)
    online = OnlineLaplace(Laplace(model, "classification", "all", "kfac", backend=GGNBackend))
    online.update(loader_of(x, y))
    with torch.no_grad():
        first.add_(1)
    assert online.penalty() == 0 and len(online.mean) == sum(p.numel() for p in model.parameters()) - first.numel()


def test_penalties_leave_nothing_behind() -> None:
    """No graph from step to step, and neither gradients nor the random state are touched."""
    model, x, y = toy()
    online = OnlineLaplace(Laplace(model, "classification", "all", "kfac", backend=GGNBackend))
    online.update(loader_of(x, y))
    state = torch.get_rng_state()
    online.penalty()
    gc.collect()
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert not online.mean.requires_grad


def _digits(structure: str | None) -> tuple[list[float], list[float]]:
    """Accuracies on the tasks after the first, and after both: digits, and digits with their pixels permuted."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    order = torch.randperm(64)
    la = Laplace(model, "classification", "all", structure or "diag", backend=GGNBackend)
    online, accuracies = OnlineLaplace(la), []
    for inputs in (x, x[:, order]):
        loader = DataLoader(TensorDataset(inputs[:1200], y[:1200]), batch_size=100, shuffle=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            for a, b in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(a), b)
                (loss + online.penalty() / 1200 if structure else loss).backward()
                optimizer.step()
        online.update(loader)
        with torch.no_grad():
            hits = [model(other[1200:]).argmax(1) == y[1200:] for other in (x, x[:, order])]
        accuracies.append([float(h.float().mean()) for h in hits])
    return accuracies[0], accuracies[1]


def test_the_first_task_is_remembered() -> None:
    pytest.importorskip("sklearn")
    (plain_before, _), (plain_after, _) = _digits(None)
    (before, _), (after, learnt) = _digits("kfac")
    # Measured: 0.92 falls to 0.4 or so without the penalty, and to 0.9 with it, while the second task is learnt.
    assert plain_before > 0.88 and before > 0.88 and learnt > 0.85
    assert plain_after < 0.65 and after > 0.8
