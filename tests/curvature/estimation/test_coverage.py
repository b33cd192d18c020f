"""The coverage table names every trainable parameter once, and what it says is what is estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import curvature
from curvature.estimation.plan import BlockPlan
from curvature.model.parameters import Parameters
from precond import KFAC


class Mixed(nn.Module):
    """A layer, a norm, attention, a bare parameter without rule, one with, a frozen one and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.temperature = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.frozen(x * self.scale * torch.exp(self.temperature)).mean(1))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(7, (4, 5), generator=g), torch.randint(3, (4,), generator=g)


def test_every_trainable_parameter_has_one_row() -> None:
    model = Mixed()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for table in (
        curvature.coverage(model, nn.CrossEntropyLoss()),
        curvature.coverage(model, nn.CrossEntropyLoss(), batch()),
    ):
        assert [row.parameter for row in table] == trainable


def test_rows_say_what_is_estimated() -> None:
    model, loss_fn, (x, y) = Mixed(), nn.CrossEntropyLoss(), batch()
    optimizer = KFAC(model, loss_fn, lr=0.1, structures={nn.Embedding: {}})
    loss_fn(model(x), y).backward()
    optimizer.step()
    told, done = curvature.coverage(model, loss_fn, (x, y)), optimizer.coverage()
    assert {r.parameter: (r.block, r.structure) for r in told} == {r.parameter: (r.block, r.structure) for r in done}
    assert told["attention.in_proj_weight"].structure == "kronecker"
    assert told["norm.bias"].structure == "unit"
    assert told["scale"].structure == "diagonal" and told["scale"].why == "mul"
    assert told["temperature"].why == "no rule for exp: gradients by autograd"
    assert told["unused.weight"].structure == "unused"
    assert told.covered < 1


def test_sizes_are_those_of_the_stored_factors() -> None:
    table = curvature.coverage(Mixed(), nn.CrossEntropyLoss(), batch())
    assert table["head.weight"].size == 3**2 + 9**2
    assert table["embed.weight"].size == 8**2 + 7
    assert table["norm.weight"].size == 8 * 2 * 2


def test_promises_hold_where_types_tell() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    data = (torch.randn(5, 2, 4, 4), torch.randint(3, (5,)))
    promised, seen = (
        curvature.coverage(model, nn.CrossEntropyLoss()),
        curvature.coverage(model, nn.CrossEntropyLoss(), data),
    )
    for a, b in zip(promised, seen, strict=True):
        assert (a.block, a.structure, a.size) == (b.block, b.structure, b.size)


def test_the_loss_is_described() -> None:
    model = nn.Linear(2, 2)
    assert "exact, mc, empirical" in curvature.coverage(model, nn.MSELoss()).loss
    assert "empirical only" in curvature.coverage(model, lambda z, y: (z - y).abs().mean()).loss


def test_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    curvature.coverage(model, nn.MSELoss(), (torch.randn(6, 3, generator=torch.Generator()), torch.zeros(6, 2)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="no trainable parameter 'nope'; there are weight, bias"):
        curvature.coverage(nn.Linear(2, 2), nn.MSELoss())["nope"]


class Kernel(torch.autograd.Function):
    """A product that function modes do not see."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].mT @ x


class Hidden(nn.Module):
    """``also.weight`` goes into a layer and, in one of several views, into a kernel; ``only`` into the kernel alone."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor] = lambda w: w) -> None:
        super().__init__()
        self.view = view
        self.also, self.only, self.head = nn.Linear(4, 4, bias=False), nn.Parameter(torch.eye(4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = Kernel.apply(self.also(x).tanh(), self.view(self.also.weight))  # type: ignore[no-untyped-call]
        return self.head(Kernel.apply(h, self.only).tanh())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "view", [lambda w: w, lambda w: w.t(), lambda w: w.view(16).view(4, 4)], ids=["plain", "t", "view"]
)
def test_a_rule_that_is_not_relied_on_is_told_with_the_reason(view: Any) -> None:
    torch.manual_seed(0)
    model, loss_fn, data = Hidden(view), nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.randint(3, (8,)))
    told = curvature.coverage(model, loss_fn, data)
    assert told["also.weight"].why == (
        "rule linear does not explain the gradient, used in Kernel as well: gradients by autograd"
    )
    assert told["only"].why == "no rule for Kernel: gradients by autograd"
    assert [row.structure for row in told] == ["diagonal", "diagonal", "kronecker", "kronecker"]
    assert told.covered == 15 / 47
    optimizer = KFAC(model, loss_fn, lr=0.1)
    loss_fn(model(data[0]), data[1]).backward()
    optimizer.step()
    assert optimizer.coverage().rows == told.rows
    estimated = curvature.fisher(model, loss_fn, data, structure="kfac").blocks
    assert sorted(type(block).__name__ for block in estimated) == ["Diagonal", "Diagonal", "Kronecker"]


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda x, w: x @ w[:3] + x @ w[1:4], "uses of segments that overlap"),
        (lambda x, w: x @ w[:3] * w[:3].sum(), "no rule for sum"),
        (lambda x, w: x @ w[:3] + (w[:3] * 2).sum(0), "uses of different kinds"),
        (lambda x, w: x @ w[:3] + x.repeat(1, 2) @ w[:3].reshape(6, 2).repeat(1, 2), "no rule for repeat"),
    ],
)
def test_uses_that_fit_no_block_are_told(use: Any, why: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return use(x, self.w)

    row = curvature.coverage(Model(), nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 4)))["w"]
    assert row.structure == "diagonal" and row.why == f"{why}: gradients by autograd" and not row.ruled


def test_before_a_step_nothing_was_seen() -> None:
    optimizer = KFAC(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss(), lr=0.1)
    table = optimizer.coverage()
    assert {row.structure for row in table} == {"unused"} and table.covered == 0
    assert "4 parameters, 0% of the numbers by a layer rule (nothing seen yet)." in str(table)


def test_what_the_loss_does_not_reach_is_unused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.first(x), "other": self.second(x)}

    data = torch.randn(5, 3), torch.randint(2, (5,))
    table = curvature.coverage(Two(), nn.CrossEntropyLoss(), data)
    assert [row.structure for row in table] == ["kronecker"] * 2 + ["unused"] * 2


@pytest.mark.parametrize("frozen", [False, True])
def test_losses_that_are_not_known_and_targets_that_do_not_fit_leave_the_model_to_be_seen(frozen: bool) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = self.first(x), self.second(x)
            return (out[0].detach(), out[1].detach()) if frozen else out

    table = curvature.coverage(Pair(), lambda z, y: z[0].sum(), (torch.randn(5, 3), None))
    assert {row.structure for row in table} == {"unused" if frozen else "kronecker"}


def test_reasons_are_part_of_the_state() -> None:
    parameters = Parameters(nn.Linear(2, 2))
    plan, again, old = (BlockPlan(parameters, joint=True) for _ in range(3))
    plan.assign([], {"weight": {"exp"}})
    again.restore(plan.state())
    assert again.without_rule == {"weight": "no rule for exp"}
    old.restore({name: value for name, value in plan.state().items() if name != "reasons"})
    assert old.without_rule == {"weight": "no rule for its use"}


class Layers(nn.Module):
    """Equal layers within equal blocks, some of them of another width, under names as wrappers make them."""

    def __init__(self) -> None:
        super().__init__()
        wrapped = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}) for _ in range(4)]
        self.base_model_model_model_layers_of_a_wrapper = nn.ModuleList(wrapped)
        self.single = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 4)])
        self.strange = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.base_model_model_model_layers_of_a_wrapper:
            x = sum(expert(x) for expert in block["experts"])
        return self.single[2](x * self.strange.exp()) + self.single[1](x)[:, :4] + self.single[0](x)


def test_equal_layers_share_a_line_that_a_terminal_holds() -> None:
    table = curvature.coverage(Layers(), nn.MSELoss(), (torch.ones(2, 4), torch.zeros(2, 4)))
    lines = str(table).splitlines()
    assert all(len(line) <= 100 for line in lines) and len(table) == 31
    shown = "".join(line.split("  ")[0] for line in lines[2:-2])
    assert "base_model_model_model_layers_of_a_wrapper.0-3.experts.0-2.weight+bias" in shown
    cells = [line.split() for line in lines]
    assert ["single.0,2.weight+bias", "4x4+4", "kronecker", "2", "x", "41", "linear"] in cells
    assert ["single.1.weight+bias", "5x4+5", "kronecker", "50", "linear"] in cells
    assert any("12 x 41" in line for line in lines)
    reason = " ".join(line.split("  ")[-1].strip() for line in lines)
    assert "gradients by autograd" in reason


def test_a_gpt_of_four_layers_fits_a_terminal() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Embedding(7, 8), nn.TransformerEncoder(layer, 4), nn.Linear(8, 7))
    lines = str(curvature.coverage(model, nn.CrossEntropyLoss())).splitlines()
    assert len(lines) < 16 and all(len(line) <= 100 for line in lines)
    assert "1.layers.0-3.self_attn.in_proj_weight+in_proj_bias" in "".join(line.split("  ")[0] for line in lines)
