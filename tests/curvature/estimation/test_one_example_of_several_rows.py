"""A batch of one example whose rows a layer sees: a bag, a graph, a document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvature
from precond import EKFAC, NaturalGradient, PreconditionedOptimizer
from tests.curvature.problems import normal

CE = nn.CrossEntropyLoss()


class Bag(nn.Module):
    """Pools its rows, inside or behind a layer that sees them; or treats them as positions of the one example."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.last = how, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.reshape(-1, 4)).tanh()
        if self.how == "pooled inside":
            return self.last(h.mean(0, keepdim=True))
        if self.how == "pooled last":
            return self.last(h).mean(0, keepdim=True)
        return self.last(h.cumsum(0)).unsqueeze(0)  # positions


HOW = ["pooled inside", "pooled last", "positions"]


def problem(how: str) -> tuple[Bag, Tensor, Tensor]:
    torch.manual_seed(0)
    if how == "positions":
        return Bag(how).double(), normal(1, 6, 4), torch.tensor([[0, 2, 1, 1, 0, 2]])
    return Bag(how).double(), normal(6, 4), torch.tensor([1])


def logits(model: Bag, x: Tensor) -> Tensor:
    z = model(x)
    return z.flatten(0, 1) if model.how == "positions" else z


def reference(model: Bag, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """Blocks of ``J^T H J`` of the one example, or of ``g g^T`` times its number of terms, by layer."""
    z, out = logits(model, x), {}
    for name in ("inner", "last"):
        layer = getattr(model, name)
        if kind == "exact":
            rows = []
            for row in z:
                p = row.softmax(0).detach()
                rows += [(row, v) for v in p.sqrt().unsqueeze(1) * (torch.eye(3, dtype=p.dtype) - p)]
        else:  # of all terms of the example together, as one backward pass of the loss brings them
            rows = [(CE(z, y.flatten()) * len(z), None)]
        C: Tensor | float = 0.0
        for value, v in rows:
            W, b = torch.autograd.grad(value, [layer.weight, layer.bias], v, retain_graph=True)
            g = torch.cat([W, b.unsqueeze(1)], 1).flatten()
            C = C + torch.outer(g, g) / len(z)
        assert isinstance(C, Tensor)
        out[name] = C
    return out


def block(optimizer: PreconditionedOptimizer, name: str) -> Tensor:
    """A dense block, its bias as the last column."""
    return optimizer.preconditioners[f"{name}.weight+{name}.bias"].estimator.operator().to_dense()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("how", HOW)
def test_in_training(how: str, kind: str) -> None:
    model, x, y = problem(how)
    expected = reference(model, x, y, kind)
    for method, options in ((NaturalGradient, {"structure": "layer"}), (EKFAC, {})):
        optimizer = method(model, CE, lr=0.0, fisher=kind, curvature_ema=0.0, **options)
        optimizer.zero_grad()
        CE(logits(model, x), y.flatten()).backward()
        optimizer.step()
        optimizer.detach()
        for name, C in expected.items():
            found = block(optimizer, name)
            if method is EKFAC:
                found, C = found.trace(), C.trace()
            else:
                found, C = torch.linalg.eigvalsh(found), torch.linalg.eigvalsh(C)  # whatever the order of entries
            torch.testing.assert_close(found, C, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("how", HOW)
def test_on_data(how: str) -> None:
    model, x, y = problem(how)
    full = curvature.ggn(model, CE, (x, y)).to_dense()
    layers = curvature.ggn(model, CE, (x, y), structure="layer").to_dense()
    ekfac = curvature.ggn(model, CE, (x, y), structure="ekfac").to_dense()
    for part in (slice(0, 25), slice(25, 43)):
        torch.testing.assert_close(layers[part, part], full[part, part], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(ekfac[part, part].trace(), full[part, part].trace(), rtol=1e-10, atol=0)
