"""Products with real architectures and their default attention kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature
from tests.curvature import dense_reference as dense
from tests.curvature.problems import normal

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.curvature.estimation.test_transformers import MODELS, _float64, built, reference

__all__ = ["_float64"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_hessian_products(name: str) -> None:
    model, batch = built(name)
    H = curvature.hessian(model, nn.CrossEntropyLoss(), batch)
    v = normal(2, H.shape[1])
    problem, parameters = reference(model, batch), list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        z, y = dense.dataset_outputs(problem, problem.model)
        gradient = torch.autograd.grad(problem.loss_fn(z, y), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    for i in range(2):
        product = torch.autograd.grad(flat @ v[i], parameters, retain_graph=True, materialize_grads=True)
        expected = torch.cat([p.flatten() for p in product])
        torch.testing.assert_close((H @ v)[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_fisher_products(name: str, kind: Any) -> None:
    model, batch = built(name)
    F = curvature.fisher(model, nn.CrossEntropyLoss(), batch, kind=kind, structure="full")
    v = normal(2, F.shape[1])
    expected = v @ dense.curvature(reference(model, batch), kind)
    torch.testing.assert_close(F @ v, expected, rtol=1e-9, atol=1e-12)
