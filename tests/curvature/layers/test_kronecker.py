"""Are Kronecker factors of less common layers exact where theory says so?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import fisher
from tests.curvature import dense_reference as dense
from tests.curvature.problems import Problem


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def bag(mode: str) -> tuple[nn.Module, Any]:
    return nn.EmbeddingBag(6, 3, mode=mode, padding_idx=0), torch.tensor([[0, 1, 1], [4, 4, 5], [2, 0, 3], [1, 2, 5]])


# One layer under a squared error: every output gradient has the same second moment, so B (x) A is the whole GGN.
LINEAR: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "transposed 1d": lambda: (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), normal(4, 2, 3)),
    "transposed 2d": lambda: (nn.ConvTranspose2d(2, 2, (2, 3), stride=(1, 2), dilation=(2, 1)), normal(3, 2, 2, 2)),
    "transposed 3d": lambda: (nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), normal(2, 2, 1, 2, 1)),
    "transposed groups": lambda: (nn.ConvTranspose2d(4, 6, 2, groups=2), normal(3, 4, 2, 1)),
    "transposed without bias": lambda: (nn.ConvTranspose1d(2, 3, 2, bias=False), normal(3, 2, 2)),
    "bag sum": lambda: bag("sum"),
    "bag mean": lambda: bag("mean"),
    "bilinear": lambda: (nn.Bilinear(2, 3, 4), (normal(5, 2), normal(5, 3))),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", LINEAR)
def test_one_linear_layer_is_exact(name: str, structure: Any) -> None:
    model, x = LINEAR[name]()
    model.double()
    with torch.no_grad():
        y = model(*x) if isinstance(x, tuple) else model(x)
    data = (x, y + 1)
    got = fisher(model, nn.MSELoss(), data, kind="exact", structure=structure).to_dense()
    torch.testing.assert_close(got, jacobian_square(model, x, y.numel()), rtol=1e-10, atol=1e-12)


def jacobian_square(model: nn.Module, x: Any, entries: int) -> Tensor:
    """``2 / entries * J^T J``, the GGN of a mean squared error."""
    z = model(*x) if isinstance(x, tuple) else model(x)
    J = dense.jacobian(z.flatten(), list(dense.trainable(model).values()))
    return 2 / entries * J.T @ J


class Steps(nn.Module):
    """Last output of a recurrent layer, to logits."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


RECURRENT: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "rnn": lambda: (nn.RNN(2, 3, batch_first=True), 3),
    "lstm": lambda: (nn.LSTM(2, 2, batch_first=True), 2),
    "gru": lambda: (nn.GRU(2, 2, batch_first=True, bidirectional=True), 4),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_one_example_and_one_step_are_exact(name: str) -> None:
    layer, width = RECURRENT[name]()
    model = Steps(layer, width).double()
    x, y = normal(1, 1, 2), torch.tensor([1])
    got = fisher(model, nn.CrossEntropyLoss(), (x, y), kind="exact", structure="kfac").to_dense()
    full = dense.ggn(Problem(model, nn.CrossEntropyLoss(), [(x, y)]))
    index = dense.flat_indices(model)
    for suffix in ["_l0", "_l0_reverse"][: 1 + (name == "gru")]:
        for side in "ih", "hh":
            at = torch.cat([index[f"layer.{kind}_{side}{suffix}"].flatten() for kind in ("weight", "bias")])
            torch.testing.assert_close(got[at][:, at], full[at][:, at], rtol=1e-10, atol=1e-14)


def test_steps_are_positions_of_one_block() -> None:
    """An LSTM's hidden weight: B sums gate gradients over examples and steps, A averages the states before them."""
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, batch_first=True).double()
    x, n, t = normal(2, 4, 2), 2, 4
    data, loss_fn = (x, torch.zeros(n, 3, dtype=torch.float64)), nn.MSELoss(reduction="sum")
    got = fisher(lstm, loss_fn, data, kind="exact", structure="kfac", output=lambda r: r[0][:, -1]).to_dense()
    w_ih, w_hh, b_ih, b_hh = lstm.all_weights[0]
    h = c = torch.zeros(n, 3, dtype=torch.float64)
    gates, states = [], []
    for step in range(t):
        states.append(h)
        gates.append(x[:, step] @ w_ih.T + b_ih + h @ w_hh.T + b_hh)
        i, f, g, o = gates[-1].split(3, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    B, A = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for m in range(n):
        for unit in range(3):
            for d in torch.autograd.grad(h[m, unit], gates, retain_graph=True):
                B += 2 * torch.outer(d[m], d[m])
        for state in states:
            a = torch.cat([state[m].detach(), torch.ones(1, dtype=torch.float64)])
            A += torch.outer(a, a) / (n * t)
    # The block is [W, b] row by row.
    index = dense.flat_indices(lstm)
    at = torch.cat([index["weight_hh_l0"], index["bias_hh_l0"].unsqueeze(1)], 1).flatten()
    torch.testing.assert_close(got[at][:, at], torch.kron(B, A), rtol=1e-10, atol=1e-14)
