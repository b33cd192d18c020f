"""Is the gradient of a use right where the function returned a view of what it computed?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.layers import RULES, OuterSite, rule_for
from curvature.layers.block import Block
from curvature.layers.linear import LinearSite
from curvature.layers.site import ElementwiseSite, RowLayout
from tests.curvature import dense_reference as dense
from tests.curvature.problems import Problem

F64 = torch.float64
LOSS = nn.CrossEntropyLoss()

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "reshape": lambda h: h.reshape(2, 3, 2, 4),
    "transpose": lambda h: h.transpose(0, 1),
    "permute": lambda h: h.permute(2, 0, 1),
    "movedim": lambda h: h.movedim(-1, 0),
    "narrow": lambda h: h.narrow(1, 1, 2),
    "slice with a step": lambda h: h[:, 1:, ::2],
    "select": lambda h: h[:, 2],
    "flatten": lambda h: h.flatten(1),
    "flatten of a permuted one": lambda h: h.permute(1, 0, 2)[:, :1].flatten(1),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "squeeze": lambda h: h[:, :1].squeeze(1),
    "diagonal": lambda h: h[:, :, :3].diagonal(dim1=1, dim2=2),
    "unfold without overlap": lambda h: h.unfold(-1, 2, 3),
    "einsum": lambda h: torch.einsum("abc->cab", h),
    "swapped twice": lambda h: h.mT.transpose(0, 2)[1:],
}
#: Entries of these share memory.
SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda h: h.unsqueeze(1).expand(2, 5, 3, 8),
    "unfold with overlap": lambda h: h.unfold(-1, 3, 2),
}


class Watched(ElementwiseSite):
    """A site of which only the place of its gradient counts."""

    def __init__(self) -> None:
        super().__init__(None, None, RowLayout(None), "nothing")

    def blocks(self, joint: bool) -> list[tuple[str, Block]]:
        return []

    def per_sample(self, piece: str, gradient: Tensor) -> Tensor:
        return gradient


def arrived(view: Callable[[Tensor], Tensor], in_place: bool, channels_last: bool = False) -> tuple[Any, Tensor]:
    """Gradients ``(k, *)`` of the output of a function that returns a view: as the site finds them, and true ones."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(2, 3, 5, dtype=F64, generator=g), torch.randn(5, 8, dtype=F64, generator=g)
    W.requires_grad_()
    base = torch.matmul(x, W)
    if channels_last:  # a result whose memory has another order than its axes
        base = torch.empty_strided((2, 3, 8), (1, 16, 2), dtype=F64).copy_(base)
    output = view(base)
    signals = torch.randn(3, *output.shape, dtype=F64, generator=g)
    leaf = output.detach().clone().requires_grad_()
    site = Watched()
    site.watch(output, (x, W))
    z = output.relu_() if in_place else output.relu()
    found = [torch.autograd.grad(z, [site.edge], s, retain_graph=True, allow_unused=True)[0] for s in signals]
    true = torch.stack([torch.autograd.grad(leaf.relu(), leaf, s)[0] for s in signals])
    return None if found[0] is None else site.arrived(torch.stack(found), 3), true


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("name", VIEWS)
def test_gradients_arrive_in_the_order_of_the_view(name: str, in_place: bool, channels_last: bool) -> None:
    found, true = arrived(VIEWS[name], in_place, channels_last)
    assert torch.equal(found, true)


@pytest.mark.parametrize("name", SHARED)
def test_entries_that_share_memory_have_gradients_of_their_own(name: str) -> None:
    found, true = arrived(SHARED[name], in_place=False)
    assert torch.equal(found, true)


def test_nothing_arrives_where_shared_entries_were_changed_in_place() -> None:
    """PyTorch refuses it for expanded tensors; elsewhere no gradient is better than one of other entries."""
    assert arrived(SHARED["unfold with overlap"], in_place=True)[0] is None
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        arrived(SHARED["expand"], in_place=True)


@pytest.mark.parametrize("seed", range(60))
def test_gradients_of_views_of_views(seed: int) -> None:
    draw = random.Random(seed)

    def view(h: Tensor) -> Tensor:
        for _ in range(draw.randint(1, 4)):
            axis = draw.randrange(h.dim())
            kind = draw.choice(["transpose", "narrow", "step", "unsqueeze", "movedim", "unfold"])
            if kind == "transpose":
                h = h.transpose(axis, draw.randrange(h.dim()))
            elif kind == "narrow" and h.shape[axis] > 1:
                h = h.narrow(axis, 1, h.shape[axis] - 1)
            elif kind == "step":
                h = h[(slice(None),) * axis + (slice(None, None, 2),)]
            elif kind == "unsqueeze":
                h = h.unsqueeze(axis)
            elif kind == "movedim":
                h = h.movedim(axis, 0)
            elif h.shape[axis] > 2:
                h = h.unfold(axis, 2, 2)
        return h

    found, true = arrived(view, in_place=seed % 2 == 1)
    assert torch.equal(found, true)


def test_a_view_of_an_input_is_found_at_its_own_edge() -> None:
    """The gradient of the input has contributions of its other uses."""
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    h = x.tanh()
    output = h.T
    site = Watched()
    site.watch(output, (h,))
    (found,) = torch.autograd.grad((output * 2).sum() + h.square().sum(), [site.edge])
    assert torch.equal(site.arrived(found)[0], torch.full((4, 3), 2.0, dtype=F64))


EQUATIONS = {
    "ni,oi->no": ((6, 4), (5, 4)),
    "nti,oi->nto": ((6, 3, 4), (5, 4)),
    "nti,oi->not": ((6, 3, 4), (5, 4)),
    "nti,oi->ton": ((6, 3, 4), (5, 4)),
}


class Equation(nn.Module):
    """A layer by an einsum, an activation, a sum over positions and a head."""

    def __init__(self, equation: str, in_place: bool) -> None:
        super().__init__()
        self.equation, self.in_place = equation, in_place
        self.weight = nn.Parameter(torch.randn(EQUATIONS[equation][1]))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum(self.equation, x, self.weight)
        h = h.sigmoid_() if self.in_place else h.sigmoid()
        return self.head(torch.einsum(f"{self.equation.split('->')[1]}->no", h))


@pytest.fixture
def einsum_rule() -> Iterator[None]:
    """A rule for the equations above."""

    class Site(LinearSite):
        def __init__(self, equation: str, *args: Any) -> None:
            super().__init__(*args)
            self.order = equation.split("->")[1]

        def gradients(self, gradient: Tensor) -> Tensor:
            target = "".join(sorted(self.order, key="nto".index))
            return super().gradients(torch.einsum(f"k{self.order}->k{target}", gradient))

    @rule_for(torch.einsum)
    def rule(recorder: Any, output: Tensor, args: tuple[Any, ...], kwargs: Any) -> OuterSite | None:
        ref = recorder.resolve(args[2]) if args[0] in EQUATIONS else None
        if ref is None:
            return None
        return Site(args[0], args[1], tuple(args[2].shape), ref, None, recorder.layout(args[1]), "einsum")

    yield
    del RULES[torch.einsum]


@pytest.mark.usefixtures("einsum_rule")
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_rules_for_einsum_are_used_and_right(equation: str, in_place: bool) -> None:
    torch.manual_seed(0)
    model = Equation(equation, in_place).double()
    data = torch.randn(EQUATIONS[equation][0], dtype=F64), torch.randint(3, (6,))
    row = curvature.coverage(model, LOSS, data)["weight"]
    assert (row.structure, row.why) == ("kronecker", "einsum")
    block = curvature.fisher(model, LOSS, data, kind="exact", structure="kfac").blocks[0]
    assert type(block).__name__ == "Kronecker"
    exact = curvature.fisher(model, LOSS, data, kind="exact", structure="diagonal").diagonal()
    torch.testing.assert_close(exact, dense.ggn(Problem(model, LOSS, [data])).diagonal())
