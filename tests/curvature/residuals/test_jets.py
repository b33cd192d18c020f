"""Are value, slopes and Laplacian of one pass those of torch, for what networks are made of?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import hessian, jacrev, vmap

from curvature.residuals.jets import second_order
from precond import PointwiseResidual, directional_derivatives, laplacian

torch.manual_seed(0)
WEIGHT = torch.randn(3, 4, dtype=torch.float64)
PLAIN = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
SMOOTH = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 5), nn.GELU("tanh"), nn.Linear(5, 1), nn.Softplus(2.0))
SMOOTH.double()


def residual_block(x):
    h = torch.sin(F.linear(x, WEIGHT.mT))
    return h + torch.sigmoid(h @ WEIGHT.mT @ WEIGHT)


def asks(x):
    """As models do that take lists too."""
    assert isinstance(x, torch.Tensor) and torch.is_tensor(x) and x.shape == (3,) and x.dtype == torch.float64
    return PLAIN(x.unsqueeze(0)).squeeze(0)


KNOWN = {
    "network": PLAIN,
    "batch of one": lambda x: PLAIN(x.unsqueeze(0)).squeeze(0),
    "smooth": SMOOTH,
    "residual block": residual_block,
    "features": lambda x: torch.cat([torch.sin(x @ WEIGHT), (2 * x @ WEIGHT).cos()], -1).sum(-1),
    "hard boundary": lambda x: x[0] * (1 - x[0]) * PLAIN(x),
    "quotient": lambda x: PLAIN(x) / (2 + x.square().sum()) - 1 / (3 + x[:2]),
    "powers": lambda x: (x**3 + 2.0).sqrt() * x.exp() - x,
    "columns": lambda x: torch.stack([x[..., 0] * x[..., 1], torch.tanh(x[2])], dim=-1),
    "weights first": lambda x: WEIGHT.mT @ torch.tanh(x),
    "parts": lambda x: sum(part.sum() for part in torch.split(torch.tanh(x) * 2, 2)) + x.unbind()[1].mean(),
    "constant beside": lambda x: torch.cat([PLAIN(x), torch.ones(1, dtype=torch.float64)]),
    "number of another precision": lambda x: (
        PLAIN(x) * torch.tensor(0.5) + torch.tensor(2.0) - x.sum() / torch.tensor(3.0)
    ),
    "sum over no axis in particular": lambda x: (x**2).sum(()),
    "shapes": lambda x: torch.flatten(x.reshape(1, 3) * x.view(3, 1)).unsqueeze(-1).squeeze(),
}
# What has no rule, or one that does not fit, is left to nested forward mode.
UNKNOWN = {
    "scaled rows": lambda x: F.rms_norm(PLAIN[0](x), (5,)),
    "sum of an axis of a number": lambda x: (x[0] * x[1]).sum(-1) + x[2] ** 2,
    "in place": nn.Sequential(nn.Linear(3, 2), nn.ELU(1.0, True)).double(),
    "power of powers": lambda x: x**x,
    "scaled sum": lambda x: torch.add(x * x, x, alpha=2),
    "asks for a tensor": asks,
    "hard mask": lambda x: PLAIN[0](x) * (x[0] != 0),
    "two lists of places": lambda x: (x.reshape(1, 3) * x.reshape(3, 1)).unsqueeze(1)[[0, 1], :, [1, 2]].sin(),
    "gradient inside": lambda x: torch.func.grad(lambda q: PLAIN(q).sum())(x),
}


def by_hessian(u, x):
    second = hessian(u)(x)
    return u(x), jacrev(u)(x).movedim(-1, 0), second.diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("name", KNOWN)
def test_one_pass_gives_value_slopes_and_laplacian(name):
    u, x = KNOWN[name], torch.rand(3, dtype=torch.float64) + 0.2
    parts = second_order(u, x, torch.eye(3, dtype=torch.float64))
    assert parts is not None
    value, slopes, second = by_hessian(u, x)
    torch.testing.assert_close(parts[0], value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts[1:-1], slopes, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts[-1], second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_goes_the_general_way(name):
    u, x = UNKNOWN[name], torch.rand(3, dtype=torch.float64) + 0.2
    assert second_order(u, x, torch.eye(3, dtype=torch.float64)) is None
    torch.testing.assert_close(laplacian(u, x), by_hessian(u, x)[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["layer norm", "instance norm", "batch norm", "solve", "determinant"])
def test_what_torch_differentiates_wrongly_by_forward_mode_is_reversed(name):
    matrix = torch.randn(4, 4, dtype=torch.float64) + 4 * torch.eye(4, dtype=torch.float64)
    function = {
        "layer norm": lambda h: F.layer_norm(h, (4,)),
        "instance norm": lambda h: F.instance_norm(h.view(1, 2, 2)).flatten(),
        "batch norm": lambda h: F.batch_norm(h.view(2, 2), None, None, training=True).flatten(),
        "solve": lambda h: torch.linalg.solve(matrix + torch.outer(h, h.sin()), h),
        "determinant": lambda h: torch.linalg.det(matrix + torch.outer(h, h.sin())).reshape(1),
    }[name]

    def u(z):
        return function(z @ WEIGHT)

    x, v = torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(laplacian(u, x), by_hessian(u, x)[2], rtol=1e-9, atol=1e-11)
    slope, expected = (
        jacrev(f)(x) for f in (lambda z: directional_derivatives(u, z, v, 1)[1], lambda z: jacrev(u)(z) @ v)
    )
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-11)


def test_an_axis_that_is_not_there_is_refused_as_by_torch():
    with pytest.raises(IndexError, match="out of range"):
        laplacian(lambda z: z.square().sum().unsqueeze(-3), torch.rand(3, dtype=torch.float64))


def test_the_jacobian_of_a_residual_goes_where_it_is_wanted():
    model, other = SMOOTH, nn.Parameter(torch.ones(2, dtype=torch.float64))
    points, params = torch.rand(6, 3, dtype=torch.float64), [*model.parameters(), other]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def at(u, x):
        return u(x) * laplacian(u, x)

    def naive(values, x):
        def u(z):
            return torch.func.functional_call(model, values, (z,))

        return 0.5 * (u(x) * hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1))

    rows = vmap(jacrev(naive), (None, 0))(weights, points)
    expected = torch.cat([*(block.reshape(6, -1) for block in rows.values()), torch.zeros(6, 2).double()], 1)
    wide = torch.full((8, expected.shape[1]), torch.nan, dtype=torch.float64)
    value, jacobian = PointwiseResidual(model, at, points, 0.5).value_and_jacobian(params, wide[1:7])
    assert jacobian.data_ptr() == wide[1:7].data_ptr() and wide[0].isnan().all() and wide[7].isnan().all()
    torch.testing.assert_close(wide[1:7], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(value, torch.stack([naive(weights, x) for x in points]).flatten(), rtol=1e-12, atol=0)
