"""Are the steps of TNT those of the formulas, written out?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import TNT
from tests.precond import layer_references as ref

DAMPING, EMA, LR = 0.05, 0.8, 0.05
LOSS = nn.CrossEntropyLoss()


class Shared(nn.Module):
    """A layer used at three positions, then one at a single position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x.unflatten(-1, (3, 2)))).sum(-2))


def model() -> Shared:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Shared().double()


def by_the_book(data: list[ref.Batch], kind: str) -> Any:
    net = model()
    where = ref.spans(net)
    L: dict[str, Any] = {}
    R: dict[str, Any] = {}
    weight = 0.0

    def direction(step: int, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        nonlocal weight
        U = ref.rows(net, x, y, kind)
        d = torch.zeros_like(g)
        for name in ("inner", "out"):
            w, b = where[f"{name}.weight"], where[f"{name}.bias"]
            units = b.stop - b.start
            G = torch.cat([U[:, w].reshape(len(U), units, -1), U[:, b, None]], 2)  # one matrix per row
            new_L, new_R = (G @ G.mT).sum(0) / len(x), (G.mT @ G).sum(0) / len(x)
            for means, new in ((L, new_L), (R, new_R)):
                means[name] = (EMA * weight * means[name] + new) / (EMA * weight + 1) if step else new
            B, A = L[name], R[name] / L[name].trace()
            pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
            B = B + DAMPING**0.5 / pi * torch.eye(len(B)).double()
            A = A + DAMPING**0.5 * pi * torch.eye(len(A)).double()
            step_matrix = torch.cat([g[w].reshape(units, -1), g[b, None]], 1)
            D = torch.linalg.inv(B) @ step_matrix @ torch.linalg.inv(A)
            d[w], d[b] = D[:, :-1].reshape(-1), D[:, -1]
        weight = EMA * weight + 1
        return d

    return ref.walk(net, data, LOSS, direction, LR)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_twenty_steps_are_those_of_the_formula(kind: Any) -> None:
    net, data = model(), ref.batches(20)
    optimizer = TNT(
        net,
        LOSS,
        lr=LR,
        damping=DAMPING,
        kl_clip=None,
        fisher=kind,
        curvature_ema=EMA,
        momentum=0.0,
        curvature_update_period=1,
        inverse_update_period=1,
    )
    ref.assert_follows(net, optimizer, by_the_book(data, kind), data, LOSS)


def test_huge_damping_leaves_the_gradient_divided_by_it() -> None:
    net, plain, data = model(), model(), ref.batches(3)
    ref.train(net, TNT(net, LOSS, lr=1e15, damping=1e16, momentum=0.0, kl_clip=None), data, LOSS)
    ref.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, LOSS)
    torch.testing.assert_close(ref.flat(net.parameters()), ref.flat(plain.parameters()), rtol=1e-5, atol=1e-6)
