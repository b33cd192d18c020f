"""Are inverses that are renewed as one those that each block would have found by itself?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import KFAC
from precond.layerwise.blocks import together
from precond.layerwise.blocks.together import shared_out
from precond.step.loss_level import FollowingDamping
from solvers import FactoredTikhonov, NotPositiveDefiniteError


class Twice(nn.Module):
    """Layers of three shapes, each several times; norms, and bare vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        self.wide = nn.ModuleList([nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False)])
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])
        self.scales = nn.ParameterList([torch.ones(6), torch.ones(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for norm, scale in zip(self.norms, self.scales, strict=True):
            x = norm(x) * scale
        return self.wide[0](x) + self.wide[1](x.square())


def trained(steps: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[KFAC, list[Tensor]]:
    torch.manual_seed(0)
    model, loss_fn = Twice().to(dtype), nn.MSELoss()
    optimizer = KFAC(
        model, loss_fn, lr=0.1, fisher="empirical", curvature_update_period=1, inverse_update_period=1, **options
    )
    for _ in range(steps):
        x, y = torch.randn(32, 6, dtype=dtype), torch.randn(32, 9, dtype=dtype)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return optimizer, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("damping", [None, 1e-2])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_blocks_of_a_shape_have_the_inverses_and_lengths_that_each_finds_by_itself(
    damping: float | None, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"momentum": momentum} | ({} if damping is None else {"damping": damping})
    renewed: list[int] = []
    renew = together.renew

    def counted(blocks: Any, *arguments: Any, **others: Any) -> Any:
        renewed.append(len(blocks))
        return renew(blocks, *arguments, **others)

    monkeypatch.setattr("precond.layerwise.blocks.by_name.renew", counted)
    one, values = trained(**options)
    assert renewed == 4 * [3, 2, 2, 2]  # layers, wide ones, norms and bare vectors, in each step
    monkeypatch.setattr("precond.layerwise.blocks.together.LONGEST", -1)
    renewed.clear()
    each, alone = trained(**options)
    assert not renewed
    for a, b in zip(values, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for name, kept in one.preconditioners.items():
        other = each.preconditioners[name]
        assert kept.inverse is not None and other.inverse is not None
        assert repr(kept.inverse) == repr(other.inverse) and kept.unseen == other.unseen == 0
        torch.testing.assert_close(kept.inverse.to_dense(), other.inverse.to_dense(), rtol=1e-12, atol=1e-12)
        for parameter in kept.estimator.block.names:
            a, b = one.state[one.parameters[parameter]], each.state[each.parameters[parameter]]
            assert ("length" in a) == ("length" in b) == (momentum > 0)
            if "length" in a:
                torch.testing.assert_close(a["length"], b["length"], rtol=1e-12, atol=1e-16)


def test_a_damping_that_follows_the_loss_has_a_floor_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is nothing, the floor is a fraction of the curvature of each block, in a stack as alone."""
    found = []
    damping = FollowingDamping(FactoredTikhonov(1e-7))
    for longest in (256, -1):
        monkeypatch.setattr(together, "LONGEST", longest)
        blocks = trained(steps=1)[0].preconditioners
        for k, kept in enumerate(blocks.values()):
            for mean in kept.estimator.parts():
                mean.value.mul_(100.0**k)  # type: ignore[union-attr]
        blocks.refresh({name: {"damping": damping} for name in blocks})
        found.append({name: kept.inverse.to_dense() for name, kept in blocks.items() if kept.inverse is not None})
    assert len(found[0]) == len(found[1]) == 9
    for name, inverse in found[0].items():
        torch.testing.assert_close(inverse, found[1][name], rtol=1e-9, atol=0)


def test_a_block_that_fails_leaves_the_others_their_new_inverses() -> None:
    optimizer, _ = trained()
    blocks = optimizer.preconditioners
    names = [name for name in blocks if name.startswith("layers")]
    before = {name: blocks[name].inverse for name in names}
    bad = blocks[names[1]]
    for mean in bad.estimator.parts():
        mean.value.neg_()  # type: ignore[union-attr]
    metrics: list[tuple[tuple[str, ...], Any]] = []
    damping = FactoredTikhonov(1e-3)
    due = {name: {"damping": damping} for name in names}
    found = blocks.refresh(due, lambda names, metric: metrics.append((tuple(names), metric)))
    assert found == {names[0], names[2]}
    assert blocks[names[1]].inverse is before[names[1]] and blocks[names[1]].failures == 1
    assert all(blocks[name].inverse is not before[name] and blocks[name].failures == 0 for name in found)
    assert metrics[0][0] == tuple(names) and [each for each, _ in metrics[1:]] == [(name,) for name in names]
    with pytest.raises(NotPositiveDefiniteError, match=r"block layers\.1\.weight.*failures in a row"):
        for _ in range(9):
            blocks.refresh(due)


def test_large_blocks_and_more_than_a_cache_holds_are_not_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = trained(steps=1)
    blocks = optimizer.preconditioners
    damping = FactoredTikhonov(1e-3)
    due = {name: {"damping": damping} for name in blocks if name.startswith("layers")}
    assert [len(refresh.names) for refresh in shared_out(blocks, due)] == [3]
    monkeypatch.setattr(together, "NUMBERS", 2 * (6 * 6 + 7 * 7))
    assert [len(refresh.names) for refresh in shared_out(blocks, due)] == [2, 1]
    monkeypatch.setattr(together, "LONGEST", 6)
    assert [len(refresh.names) for refresh in shared_out(blocks, due)] == [1, 1, 1]


def test_inverses_found_together_share_no_memory() -> None:
    optimizer, _ = trained()
    seen: set[int] = set()
    for kept in optimizer.preconditioners.values():
        for factor in getattr(kept.inverse, "factors", ()):
            memory = factor.matrix.untyped_storage()
            assert memory.data_ptr() not in seen and memory.nbytes() == factor.matrix.nbytes
            seen.add(memory.data_ptr())


def test_grouped_convolutions_are_stacks_already_and_stay_by_themselves() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 1, groups=groups) for groups in (2, 2, 1, 1)]
    model, loss_fn = nn.Sequential(*layers, nn.Flatten()).double(), nn.MSELoss()
    optimizer = KFAC(model, loss_fn, lr=0.1, momentum=0.9, inverse_update_period=1, curvature_update_period=1)
    for _ in range(2):
        optimizer.zero_grad()
        z = model(torch.randn(8, 4, 2, 2).double())
        loss_fn(z, torch.randn_like(z)).backward()
        optimizer.step()
    damping = FactoredTikhonov(1e-3)
    due = {name: {"damping": damping} for name in optimizer.preconditioners}
    assert sorted(len(refresh.names) for refresh in shared_out(optimizer.preconditioners, due)) == [1, 1, 2]
