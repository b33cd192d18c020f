"""The edge of stability against dense eigenvalues, and against optimizers that run on both sides of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.model.parameters import Parameters
from curvature.training.dynamics import Dynamics, dynamics, kernel_eigenvalues
from curvature.training.step_rule import gradient_descent, root_of, rule_of
from precond import EKFAC, KFAC, NaturalGradient
from solvers import Dense, Diagonal, Kronecker
from tests.curvature.landscape.test_surface import assert_untouched, snapshot, theta_of
from tests.curvature.problems import PROBLEMS

F64 = torch.float64


def quadratic() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
    x, y = (torch.randn(9, n, dtype=F64, generator=generator) for n in (4, 2))
    return model, nn.MSELoss(), (x, y)


def dense(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    """Hessian by autograd, in the order of the flat vector."""
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss_fn(model(data[0]), data[1]), params, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in gradient]):
        rows.append(torch.cat([r.flatten() for r in torch.autograd.grad(entry, params, retain_graph=True)]))
    return torch.stack(rows)


def frozen_moments(optimizer: Any) -> None:
    """Second moments that stay as they are, far from the beginning, different for each entry."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            square = torch.linspace(0.5, 3, p.numel(), dtype=F64).reshape(p.shape)
            optimizer.state[p] = {
                "step": torch.tensor(1e15), "exp_avg": torch.zeros_like(p), "exp_avg_sq": square.clone(),
                "square_avg": square.clone(), "grad_avg": torch.full_like(p, 0.1),
                "momentum_buffer": torch.zeros_like(p),
            }  # fmt: skip


KEEP = 1 - 1e-14
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "dampening": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.7, dampening=0.5),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8, nesterov=True),
    "l2": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5, weight_decay=0.3),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, KEEP)),
    "adam_l2": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.5, KEEP), weight_decay=0.3),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, KEEP), weight_decay=0.2, eps=0.1),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, alpha=KEEP, momentum=0.5, centered=True),
}


def make(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    if "adam" in name or name == "rmsprop":
        frozen_moments(optimizer)
    return optimizer


def growth(name: str, lr: float, steps: int = 150) -> tuple[float, float]:
    """By what factor the distance of two runs on the quadratic grows, at the end and at most; shifts of both cancel."""
    model, loss_fn, (x, y) = quadratic()
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 1e-3
    runs = [(one, make(name, one, lr)) for one in (model, other)]
    distances = [(theta_of(model) - theta_of(other)).norm()]
    for _ in range(steps):
        for one, optimizer in runs:
            optimizer.zero_grad()
            loss_fn(one(x), y).backward()
            optimizer.step()
        distances.append((theta_of(model) - theta_of(other)).norm())
    return float(distances[-1] / distances[0]), float(max(distances) / distances[0])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_diverges_just_above_the_edge_and_not_just_below(name: str) -> None:
    model, loss_fn, data = quadratic()
    found = dynamics(model, loss_fn, data, make(name, model, 0.05), rtol=1e-8, progress=False)
    assert found.critical_lr is not None and found.stable
    assert growth(name, 0.95 * found.critical_lr)[0] < 1
    # at most: adaptive methods that have gone far enough divide by what they see, and come back
    assert growth(name, 1.05 * found.critical_lr)[1] > 100
    at = dynamics(model, loss_fn, data, make(name, model, found.critical_lr), rtol=1e-8, progress=False)
    assert at.ratio == pytest.approx(1, rel=1e-6)
    assert at.sharpness == pytest.approx(found.sharpness, rel=1e-6)


def test_gradient_descent_is_lr_times_sharpness_over_two() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, y = problem.data[0]
    sharpness = torch.linalg.eigvalsh(dense(problem.model, problem.loss_fn, (x, y)))[-1].item()
    found = dynamics(problem.model, problem.loss_fn, (x, y), lr=0.1, rtol=1e-9, progress=False)
    assert found.ratio == pytest.approx(0.1 * sharpness / 2)
    assert found.sharpness == pytest.approx(sharpness)
    assert found.critical_lr == pytest.approx(2 / sharpness)
    assert found.ratio_error < 1e-6 and found.converged and found.stable
    heavy = dynamics(problem.model, problem.loss_fn, (x, y), lr=0.1, momentum=0.9, rtol=1e-9, progress=False)
    assert heavy.threshold == pytest.approx(3.8)
    nesterov = dynamics(problem.model, problem.loss_fn, (x, y), lr=0.1, momentum=0.9, nesterov=True, progress=False)
    assert nesterov.threshold == pytest.approx(3.8 / 2.8)
    above = dynamics(problem.model, problem.loss_fn, (x, y), lr=3 / sharpness, progress=False)
    assert above.stable is False and "unstable" in str(above)


@pytest.mark.parametrize("method", [KFAC, EKFAC, NaturalGradient])
def test_a_preconditioned_step_is_measured_in_its_own_metric(method: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=generator, dtype=F64), torch.randint(2, (9,), generator=generator)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = method(model, loss_fn, lr=0.1, damping=1e-2, momentum=0.5, kl_clip=None)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    parameters = Parameters(model)
    columns = []
    for e in torch.eye(parameters.size, dtype=F64):  # P^-1, column by column, by the optimizer's own hands
        pieces = {name: piece.clone() for name, piece in parameters.unflatten(e).items()}
        for preconditioner in optimizer.preconditioners.values():
            block = preconditioner.estimator.block
            block.write(preconditioner @ block.read(pieces), pieces)
        columns.append(parameters.flatten(pieces))
    S = 0.1 * torch.stack(columns, 1)
    H = dense(model, loss_fn, (x, y))
    values = torch.linalg.eigvals(S @ H).real
    found = dynamics(model, loss_fn, (x, y), optimizer, rtol=1e-10, progress=False)
    assert found.eigenvalue == pytest.approx(values.max().item(), rel=1e-6)
    assert found.ratio == pytest.approx(values.max().item() / 3, rel=1e-6)
    torch.testing.assert_close(S @ (H @ found.vector), found.eigenvalue * found.vector, atol=1e-5, rtol=1e-5)
    assert not found.clipped
    optimizer.param_groups[0]["kl_clip"] = 1e-3
    assert dynamics(model, loss_fn, (x, y), optimizer, progress=False).clipped
    compiled = dynamics(torch.compile(model, backend="eager"), loss_fn, (x, y), optimizer, rtol=1e-10, progress=False)  # type: ignore[arg-type]
    assert compiled.eigenvalue == pytest.approx(found.eigenvalue)
    with pytest.raises(ValueError, match="made for another model"):
        dynamics(nn.ModuleDict({"inner": model}), loss_fn, (x, y), optimizer)
    with pytest.raises(ValueError, match="no preconditioner yet"):
        dynamics(model, loss_fn, (x, y), method(model, loss_fn, lr=0.1))
    optimizer.step_size = object()
    with pytest.raises(TypeError, match="no fixed edge"):
        dynamics(model, loss_fn, (x, y), optimizer)


def test_a_given_preconditioner_is_one() -> None:
    model, loss_fn, data = quadratic()
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(10, 10, dtype=F64, generator=generator)
    P = root @ root.T + torch.eye(10, dtype=F64)
    found = dynamics(model, loss_fn, data, lr=0.2, preconditioner=Dense(P), rtol=1e-10, progress=False)
    expected = torch.linalg.eigvals(P @ dense(model, loss_fn, data)).real.max().item()
    assert found.sharpness == pytest.approx(expected, rel=1e-7)


def test_adam_counts_its_bias_corrections() -> None:
    model, _, _ = quadratic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 1 - 1e-9), eps=1e-3)
    frozen_moments(optimizer)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(3.0)
    rule = rule_of(optimizer, model, Parameters(model))
    before, g = theta_of(model).clone(), torch.linspace(-1, 1, 10, dtype=F64)
    for p, piece in zip(model.parameters(), g.split([8, 2]), strict=True):
        p.grad = piece.reshape(p.shape).clone()
    optimizer.step()
    torch.testing.assert_close(before - rule.root(rule.root(g)), theta_of(model), rtol=1e-9, atol=1e-12)


def test_learning_rates_of_groups() -> None:
    model, loss_fn, data = quadratic()
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.4}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scale = torch.cat([torch.full((8,), 0.1), torch.full((2,), 0.4)]).double()
    expected = torch.linalg.eigvals(scale.unsqueeze(1) * dense(model, loss_fn, data)).real.max().item()
    found = dynamics(model, loss_fn, data, optimizer, rtol=1e-10, progress=False)
    assert found.eigenvalue == pytest.approx(expected)
    assert found.sharpness is None and found.critical_lr is None
    only = dynamics(model, loss_fn, data, optimizer, params="bias", rtol=1e-10, progress=False)
    assert only.sharpness == pytest.approx(torch.linalg.eigvalsh(dense(model, loss_fn, data)[8:, 8:])[-1].item())
    optimizer.param_groups[1]["momentum"] = 0.9
    with pytest.raises(ValueError, match="groups of SGD differ"):
        dynamics(model, loss_fn, data, optimizer)


@pytest.mark.parametrize("split", [False, True])
def test_the_kernel_is_that_of_the_jacobian(split: bool) -> None:
    problem = PROBLEMS["mlp_ce"]()
    xs = [x for x, _ in problem.data]
    batches: Any = problem.data if split else (torch.cat(xs), torch.cat([y for _, y in problem.data]))
    z = problem.model(torch.cat(xs)).flatten()
    params = list(problem.model.parameters())
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in z])
    values = torch.linalg.eigvalsh(J @ J.T).flip(0)
    found = kernel_eigenvalues(problem.model, batches, k=3, progress=False)
    torch.testing.assert_close(found.values, values[:3])
    torch.testing.assert_close(J @ (J.T @ found.vectors[0]), values[0] * found.vectors[0], rtol=1e-5, atol=1e-5)
    assert (found.residuals < 1e-6 * values[0]).all()


def test_linearised_outputs_move_by_the_training_dynamics_matrix() -> None:
    problem = PROBLEMS["mlp_mse"]()
    x, y = problem.data[0]
    z = problem.model(x)
    params = list(problem.model.parameters())
    J = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in z.flatten()]
    )
    K = J @ J.T * (2 / z.numel())  # kernel times the Hessian of the mean squared error in its outputs
    found = dynamics(problem.model, problem.loss_fn, (x, y), lr=0.5, matrix="ggn", rtol=1e-10, progress=False)
    assert found.eigenvalue == pytest.approx(0.5 * torch.linalg.eigvalsh(K)[-1].item())


def test_an_earlier_result_is_a_start() -> None:
    problem = PROBLEMS["cnn"]()
    options: Any = {"lr": 0.1, "class_dim": problem.class_dim, "progress": False, "rtol": 1e-6}
    cold = dynamics(problem.model, problem.loss_fn, problem.data, **options)
    warm = dynamics(problem.model, problem.loss_fn, problem.data, previous=cold, **options)
    assert warm.products < cold.products
    assert warm.eigenvalue == pytest.approx(cold.eigenvalue)


def test_errors_leave_the_answer_open() -> None:
    fields: Any = dict(
        eigenvalue=2.0, threshold=2.0, sharpness=None, critical_lr=None, vector=torch.ones(1), matrix="ggn",
        converged=True, products=1, optimizer="SGD", start=torch.ones(1),
    )  # fmt: skip
    assert Dynamics(ratio=1.01, ratio_error=0.02, clipped=False, **fields).stable is None
    assert Dynamics(ratio=1.05, ratio_error=0.02, clipped=False, **fields).stable is False
    assert Dynamics(ratio=1.05, ratio_error=0.02, clipped=True, **fields).stable is None
    assert Dynamics(ratio=0.9, ratio_error=0.02, clipped=True, **fields).stable is True


def test_nothing_changes() -> None:
    problem = PROBLEMS["cnn"]()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    before = snapshot(problem.model)
    dynamics(problem.model, problem.loss_fn, problem.data, optimizer, class_dim=problem.class_dim, progress=False)
    kernel_eigenvalues(problem.model, problem.data, progress=False)
    assert_untouched(before, problem.model)
    assert not optimizer.state


def test_roots_square_to_their_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (
        (r @ r.T + torch.eye(n, dtype=F64)) for n in (3, 4) for r in [torch.randn(n, n, dtype=F64, generator=generator)]
    )
    for op in (Dense(A), Kronecker(A, B), Diagonal(A), Dense(torch.stack([A, 2 * A]))):
        root = root_of(op)
        x = torch.randn(op.in_shape, dtype=F64, generator=generator)
        torch.testing.assert_close(root @ (root @ x), op @ x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of optimizer= and lr="),
        ({"lr": -1.0}, "lr is a finite number above 0"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum is a finite number at least 0 and below 1"),
        ({"lr": 0.1, "matrix": "fisher"}, "matrix is one of hessian, ggn"),
        ({"lr": 0.1, "preconditioner": Dense(torch.eye(3))}, "must act on .10,."),
        ({"optimizer": lambda p: torch.optim.Adam(p)}, "no state of weight yet"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, "steps of LBFGS are not known"),
        ({"optimizer": lambda p: torch.optim.SGD(p, maximize=True)}, "maximises"),
        ({"optimizer": lambda p: torch.optim.SGD(list(p)[:1])}, "bias is not among the parameters"),
        ({"optimizer": lambda p: torch.optim.SGD(p), "momentum": 0.5}, "those of an optimizer are its own"),
    ],
)
def test_nonsense_is_refused(options: Any, message: str) -> None:
    model, loss_fn, data = quadratic()
    if "optimizer" in options:
        options = {**options, "optimizer": options["optimizer"](model.parameters())}
    with pytest.raises((ValueError, TypeError), match=message):
        dynamics(model, loss_fn, data, **options)


def test_a_rule_without_an_optimizer_scales_by_the_learning_rate() -> None:
    model, _, _ = quadratic()
    rule = gradient_descent(Parameters(model), 0.25)
    x = torch.ones(2, 10, dtype=F64)
    assert torch.equal(rule.root(x), 0.5 * x)
    assert rule.threshold == 2 and rule.lr == 0.25
