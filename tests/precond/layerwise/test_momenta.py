"""Is the length of the momentum, which the bound rests on, that in the metric of the last refresh?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precond import EKFAC, KFAC, TrustRegion
from precond.layerwise.blocks import rows as rows_of_layers
from precond.layerwise.blocks.preconditioner import triangles_of
from precond.layerwise.momenta import Momenta
from precond.step.trust_region import dot
from precond.step.update import apply_update
from tests.peak_memory import peak_of_tensors
from tests.precond.test_step_operations import Operations


@pytest.mark.parametrize(
    ("method", "examples", "triangles"), [(KFAC, 4, True), (KFAC, 64, False), (EKFAC, 4, False)], ids=str
)
def test_a_momentum_has_its_length_in_the_newest_metric(
    method: type[KFAC], examples: int, triangles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are solved for by triangles, many by inverses, of triangles too; all are renewed in every step here."""
    monkeypatch.setattr(rows_of_layers, "WORTH", 0)
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 20)).double(), nn.MSELoss()
    optimizer = method(
        model, loss_fn, lr=1e-2, damping=0.1, momentum=0.9, fisher="empirical", kl_clip=1e-3, curvature_update_period=1
    )
    for _ in range(4):
        x, y = torch.randn(examples, 30).double(), torch.randn(examples, 20).double()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    for kept in optimizer.preconditioners.values():
        assert (triangles_of(kept.inverse) is not None) == triangles
        states = {name: optimizer.state[optimizer.parameters[name]] for name in kept.estimator.block.names}
        v = kept.estimator.block.read({name: state["momentum_buffer"] for name, state in states.items()}).reshape(-1)
        expected = v @ torch.linalg.solve(kept.inverse.to_dense(), v)
        torch.testing.assert_close(sum(state["length"] for state in states.values()), expected)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_a_bound_on_directions_measures_no_momentum_and_one_on_moves_measures_it_when_it_comes(
    method: type[KFAC], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).double(), nn.MSELoss()
    bound = {"kl_clip": TrustRegion(1e-3, of="direction"), "curvature_update_period": 1, "inverse_update_period": 1}
    optimizer = method(model, loss_fn, lr=1e-2, damping=0.1, momentum=0.9, fisher="empirical", **bound)
    measured, of_block = [], Momenta.of_block

    def watched(self: Momenta, *arguments: Any, **options: Any) -> dict[torch.Tensor, torch.Tensor]:
        measured.append(arguments[0])
        return of_block(self, *arguments, **options)

    monkeypatch.setattr(Momenta, "of_block", watched)
    for step in range(9):
        x, y = torch.randn(4, 7).double(), torch.randn(4, 5).double()
        for group in optimizer.param_groups:
            group["kl_of"] = "move" if step in (4, 5, 8) else "direction"
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        moves = step in (4, 5, 8)
        assert bool(measured) == moves
        measured.clear()
        for kept in optimizer.preconditioners.values():
            states = {name: optimizer.state[optimizer.parameters[name]] for name in kept.estimator.block.names}
            assert all(("length" in state) == moves for state in states.values())
            if moves:
                v = kept.estimator.block.read({name: s["momentum_buffer"] for name, s in states.items()}).reshape(-1)
                expected = v @ torch.linalg.solve(kept.inverse.to_dense(), v)
                torch.testing.assert_close(sum(state["length"] for state in states.values()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_are_taken_in_float64_and_in_little_memory(dtype: torch.dtype) -> None:
    left, right = torch.randn(2, 3, 50_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = (left.double() * right.double()).sum()
    size = (left.double() * right.double()).abs().sum()
    assert (dot(left, right) - exact).abs() <= 1e-14 * size
    assert dot(left, right).dtype == torch.float64
    large = (1e30 * left).float()  # whose squares leave float32
    assert (dot(large, large) / large.double().square().sum() - 1).abs() <= 1e-12
    if dtype == torch.float32:
        assert peak_of_tensors(lambda: dot(left, right)) < left.numel() * 8


@pytest.mark.parametrize("shortened", [1.0, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_takes_one_pass_over_the_memory_unless_it_is_shortened(shortened: float, nesterov: bool) -> None:
    p, d, v = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.0, decay="decoupled", maximize=False)
    state = {"momentum_buffer": v}
    with Operations() as operations:
        (found,) = apply_update([p], [d], [state], group, shortened=shortened)
    momentum = 0.9 * v + shortened * d
    torch.testing.assert_close(state["momentum_buffer"], momentum, rtol=1e-14, atol=1e-15)
    moved = shortened * d + 0.9 * momentum if nesterov else momentum
    torch.testing.assert_close(found, p - 0.1 * moved, rtol=1e-14, atol=1e-15)
    scalings = operations.found["aten._foreach_mul.Scalar"]
    assert scalings == (shortened != 1)
