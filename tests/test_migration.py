"""What the pages for people from other libraries call equal is equal, with the versions that are installed here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
import precond


@pytest.fixture
def problem() -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    x, y = torch.randn(10, 5).double(), torch.randint(3, (10,))
    return model, nn.CrossEntropyLoss(), [(x[:6], y[:6]), (x[6:], y[6:])]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "theirs,ours",
    [
        ("HessianLinearOperator", lambda *args: curvature.hessian(*args)),
        ("GGNLinearOperator", lambda *args: curvature.ggn(*args)),
        ("EFLinearOperator", lambda *args: curvature.fisher(*args, kind="empirical")),
    ],
    ids=["hessian", "ggn", "empirical fisher"],
)
def test_matrices_of_curvlinops(problem: Any, theirs: str, ours: Any) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, loss_fn, data = problem
    found = getattr(curvlinops, theirs)(model, loss_fn, list(model.parameters()), data)
    close(ours(model, loss_fn, data).to_dense(), found @ torch.eye(found.shape[1]).double())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind,name", [("exact", "type-2"), ("empirical", "empirical")])
def test_kfac_of_curvlinops(problem: Any, kind: Any, name: str, separate: bool) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, loss_fn, data = problem
    found = curvlinops.KFACLinearOperator(
        model, loss_fn, list(model.parameters()), data, fisher_type=name, separate_weight_and_bias=separate
    )
    bias: Any = "separate" if separate else "joint"
    ours = curvature.fisher(model, loss_fn, data, kind=kind, structure="kfac", bias=bias)
    close(ours.to_dense(), found @ torch.eye(found.shape[1]).double())


@pytest.mark.filterwarnings("ignore")
def test_quantities_of_backpack(problem: Any) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, loss_fn, data = problem
    x, y = data[0]
    N = len(x)
    gradients = curvature.per_sample_gradients(model, loss_fn, (x, y))
    moment = curvature.gradient_second_moment(model, loss_fn, (x, y))
    variance = curvature.gradient_variance(model, loss_fn, (x, y))
    ggn = curvature.ggn(model, loss_fn, (x, y), structure="diagonal").to_dense().diagonal()
    hessian = curvature.hessian(model, loss_fn, (x, y)).to_dense().diagonal()
    kfac = curvature.ggn(model, loss_fn, (x, y), structure="kfac", bias="separate").to_dense()

    wanted = ("BatchGrad", "DiagGGNExact", "DiagHessian", "SumGradSquared", "Variance", "KFLR")
    extended = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(*(getattr(extensions, name)() for name in wanted)):
        extended[1](extended[0](x), y).backward()
    for name, p in model.named_parameters():
        close(gradients[name], N * p.grad_batch)
        close(moment[name], N * p.sum_grad_squared)
        close(variance[name], N**2 * p.variance)
    close(ggn, torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]))
    close(hessian, torch.cat([p.diag_h.flatten() for p in model.parameters()]))
    blocks = [p.kflr[0] if len(p.kflr) == 1 else torch.kron(*p.kflr) for p in model.parameters()]
    close(kfac, torch.block_diag(*blocks))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_asdl_preconditions(problem: Any) -> None:
    """Biases differ: there they take the damping of their weight's factor."""
    asdl = pytest.importorskip("asdl")
    model, loss_fn, data = problem
    x, y = data[0]
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    config = asdl.PreconditioningConfig(data_size=len(x), damping=1e-2)
    maker = asdl.KfacGradientMaker(theirs, config, fisher_type="fisher_exact")
    maker.setup_loss_call(loss_fn, maker.setup_model_call(theirs, x), y)
    maker.forward_and_backward()
    optimizer = precond.PreconditionedOptimizer(
        ours,
        loss_fn,
        curvature=precond.KroneckerFisher("exact", bias="separate"),
        damping=precond.FactoredTikhonov(1e-2),
        solver=precond.Cholesky(),
        lr=1.0,
    )
    loss_fn(ours(x), y).backward()
    optimizer.precondition()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("weight"):
            close(p.grad, q.grad)


@pytest.mark.parametrize("scaling,adjust", [("spectral", "original"), ("adam", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_muon_of_torch(scaling: Any, adjust: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(*shape).double()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers: list[tuple[Tensor, torch.optim.Optimizer]] = [
        (ours, precond.Muon([ours], lr=0.02, weight_decay=0.1, scaling=scaling, polynomial="quintic")),
        (theirs, torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)),
    ]
    for _ in range(4):
        x = torch.randn(8, shape[1]).double()
        for p, optimizer in optimizers:
            optimizer.zero_grad()
            (x @ p.T).square().mean().backward()
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # torch orthogonalises in bfloat16: 8 bits


def test_what_soap_and_shampoo_were_called_is_what_they_take() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    soap = precond.SOAP([p], curvature_ema=None, max_dim=128, rotate_vectors=True, merge_dims=64)
    assert soap.defaults["inverse_update_period"] == 10
    with pytest.raises(TypeError, match="precondition_frequency"):
        precond.SOAP([p], precondition_frequency=10)  # type: ignore[call-arg]
