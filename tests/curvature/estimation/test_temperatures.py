"""The module called on an output at a temperature: C is that of the loss, through the division, by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.curvature.estimation.test_loops_people_write import diagonals
from tests.curvature.loops import watching
from tests.curvature.problems import classes, normal

SCALE = nn.Parameter(torch.tensor(-0.9, dtype=torch.float64))  # of its logarithm, trained outside of the model
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": lambda z: z / 0.07,
    "multiplied": lambda z: z * 0.4,
    "by a method": lambda z: z.div(2.5),
    "in place": lambda z: z.div_(2.5),
    "learned": lambda z: SCALE.exp() * z,
    "by class": lambda z: z * torch.tensor([0.3, 0.5, 0.2]).double(),
    "by example": lambda z: z / torch.arange(1, 7).double()[:, None],
    "of some rows": lambda z: z[:4] / 2.5,
}
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {
    "labels": (nn.CrossEntropyLoss(), F.cross_entropy),
    "squares": (nn.MSELoss(), F.mse_loss),
    "binary": (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits),
}


def dense(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], kind: str) -> dict[str, Tensor]:
    """The diagonals of the Gauss-Newton matrix, or of the empirical Fisher, of a loss that is a mean over rows."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    run = lambda values: functional_call(net, values, (x,))  # noqa: E731
    z = run(named).requires_grad_()
    J = {name: j.reshape(*z.shape, -1) for name, j in jacrev(run)(named).items()}  # (n, c, p)
    if kind == "exact":
        H = torch.autograd.functional.hessian(lambda v: loss(v.clone()), z.detach())
        return {name: torch.einsum("ncp,ncmd,mdp->p", j, H, j) for name, j in J.items()}
    (g,) = torch.autograd.grad(loss(z.clone()), z)
    return {name: torch.einsum("nc,ncp->np", g, j).square().sum(0) for name, j in J.items()}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_a_module_at_a_temperature(way: str, which: str, kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, (loss_fn, function) = normal(6, 4), LOSSES[which]
    y = (
        classes(6, of=3)
        if which == "labels"
        else normal(6, 3)
        if which == "squares"
        else normal(6, 3).sigmoid().round()
    )
    y = y[:4] if way == "of some rows" else y
    optimizer = watching(net, loss_fn, "diagonal", kind, curvature_ema=0.0)
    expected = dense(net, x, lambda z: function(WAYS[way](z), y), kind)
    terms = len(y) if which == "labels" else y.numel()  # that a mean divides by; those of a row are one sample
    loss_fn(WAYS[way](net(x)), y).backward()
    optimizer.step()
    for name, block in diagonals(optimizer, net).items():
        weight = 1 if kind == "exact" else terms
        torch.testing.assert_close(block.flatten(), weight * expected[name], rtol=1e-9, atol=1e-12)
