"""Are parameters that are updated together updated as each would be alone?"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import PSGD, SOAP, Hyperball, KLShampoo, Muon, Shampoo, SOAPMuon, SPlus, Vectors
from precond.gradient.stacks import Stack, alike

SHAPES = [(4, 4), (5, 3), (4, 4), (3, 2, 4), (4, 4), (7,), (5, 3), (3, 2, 4), (4, 4), ()]
#: Damping above the rounding errors, which a division by themselves would show.
METHODS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SOAP": lambda p: SOAP(p, lr=0.01, inverse_update_period=3, eps=1e-3),
    "SOAP, merged": lambda p: SOAP(p, lr=0.01, inverse_update_period=3, eps=1e-3, merge_dims=8),
    "Shampoo": lambda p: Shampoo(p, lr=0.01, inverse_update_period=3, damping=1e-3),
    "Shampoo, blocks": lambda p: Shampoo(p, lr=0.01, inverse_update_period=3, damping=1e-3, block_size=2),
    "Shampoo, corrected": lambda p: Shampoo(
        p, lr=0.01, inverse_update_period=3, eps=1e-3, block_size=3, eigenvalue_correction=True, grafting=None
    ),
    "KLShampoo": lambda p: KLShampoo(p, lr=0.01, inverse_update_period=3, eps=1e-3),
    "SPlus": lambda p: SPlus(p, lr=0.1, inverse_update_period=3),
    "PSGD": lambda p: PSGD(p, lr=0.01, max_dim=4),
    "Muon": lambda p: Muon(p, lr=0.01),
    "Muon, rows": lambda p: Muon(p, lr=0.01, row_normalization=0.9, vectors=Vectors((0.9, 0.99), 2.0)),
    "SOAPMuon": lambda p: SOAPMuon(p, lr=0.01, inverse_update_period=3, eps=1e-3),
}


def params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, missing: bool) -> list[Tensor | None]:
    """Of every parameter, or of a different half of them at each step; the first one is zero for one of them."""
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    found[2] = found[2] * (step > 0)
    return [None if missing and (i + step) % 3 == 0 else g for i, g in enumerate(found)]


def give_factors(optimizer: Any) -> None:
    """Factors with well separated eigenvalues to begin with."""
    for p in optimizer.param_groups[0]["params"]:
        optimizer.begin(p, optimizer.param_groups[0])
        for key, value in optimizer.state[p].items():
            if key.startswith("factor."):
                x = torch.randn(len(value), len(value), generator=torch.Generator().manual_seed(1), dtype=value.dtype)
                value.copy_(x @ torch.diag(torch.arange(1.0, len(x) + 1, dtype=x.dtype)) @ x.mT)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("missing", [False, True], ids=["all", "some"])
def test_together_is_as_alone(name, missing):
    stacked, single = params(), params()
    together, alone = METHODS[name](stacked), [METHODS[name]([p]) for p in single]
    if name == "SPlus":  # signs in the eigenbasis of a few gradients, which have null directions, are those of rounding
        for optimizer in (together, *alone):
            give_factors(optimizer)
    for step in range(12):
        for p, q, g in zip(stacked, single, gradients(step, missing), strict=True):
            p.grad, q.grad = g, g
        together.step()
        for optimizer in alone:
            optimizer.step()
        for i, (p, q) in enumerate(zip(stacked, single, strict=True)):
            assert (p - q).abs().max() < 1e-12, f"{SHAPES[i]} at step {step}"
    for p, q, begin, optimizer in zip(stacked, single, params(), alone, strict=True):
        assert together.state[p].keys() == optimizer.state[q].keys()
        assert (p - begin).abs().max() > 1e-4


def test_matrices_are_stacked_at_all():
    weights = [nn.Parameter(torch.randn(3, 3)) for _ in range(4)]
    optimizer = SOAP(weights, lr=0.01)
    for p in weights:
        p.grad = torch.randn(3, 3)
    optimizer.step()
    storages = {optimizer.state[p]["basis.0"].untyped_storage().data_ptr() for p in weights}
    assert len(storages) == 1
    before = [optimizer.state[p]["basis.0"] for p in weights]
    optimizer.step()  # copies what it writes to, once for all
    assert all(optimizer.state[p]["basis.0"] is value for p, value in zip(weights, before, strict=True))
    assert len({optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for p in weights}) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["load", "file", "deepcopy", "replaced"])
def test_a_resumed_run_is_the_same_bit_for_bit(name, how):
    run, again = params(torch.float32), params(torch.float32)
    optimizer, resumed = METHODS[name](run), METHODS[name](again)

    def step(optimizer: torch.optim.Optimizer, values: list[nn.Parameter], index: int) -> None:
        for p, g in zip(values, gradients(index, missing=True), strict=True):
            p.grad = None if g is None else g.float()
        optimizer.step()

    for index in range(5):
        step(optimizer, run, index)
    if how == "deepcopy":
        resumed, again = copy.deepcopy((optimizer, run))
        assert all(p is q for p, q in zip(again, resumed.param_groups[0]["params"], strict=True))
    elif how == "replaced":
        for p in run:
            optimizer.state[p].update({k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)})
        resumed, again = copy.deepcopy((optimizer, run))
    else:
        for p, q in zip(run, again, strict=True):
            q.data.copy_(p.data)
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "file":
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(saved)
    for index in range(5, 12):
        step(optimizer, run, index)
        step(resumed, again, index)
    assert all(torch.equal(p, q) for p, q in zip(run, again, strict=True))


def test_parameters_with_different_numbers_of_steps_are_apart():
    weights = [nn.Parameter(torch.eye(3)) for _ in range(3)]
    optimizer = SOAP(weights, lr=0.01)
    for present in ([0, 1, 2], [0, 2], [0, 1, 2], [1], [0, 1, 2]):
        for i, p in enumerate(weights):
            p.grad = torch.full((3, 3), 1.0 + i) + torch.eye(3) if i in present else None
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in weights] == [4, 4, 4]
    assert len({optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for p in weights}) == 1


def test_stacks_are_of_like_tensors_and_limited():
    assert alike(["a", "b", "a", "c", "a"], [4, 3, 4, 4, 4], limit=8) == [[0, 2], [4], [1], [3]]
    assert alike(["a", "a"], [81, 81], limit=8) == [[0], [1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SOAP(p, lr=0.01, momentum=0.9, kl_clip=1e-3),
        lambda p: SOAP(p, lookahead=0.3),
        lambda p: Muon(p, norm_control=Hyperball()),
    ],
    ids=["momentum", "lookahead", "own momentum"],
)
def test_stacks_are_made_once_also_after_a_resume(make, monkeypatch):
    made = []
    first = Stack.__init__
    monkeypatch.setattr(Stack, "__init__", lambda self, *args: (made.append(self), first(self, *args))[1])
    counts = []
    begun = params()
    optimizer = make(begun)
    for _ in range(2):
        for step in range(4):
            for p, g in zip(begun, gradients(step, False), strict=True):
                p.grad = g
            optimizer.step()
        counts.append(len(made))
        made.clear()
        state = optimizer.state_dict()
        begun = [nn.Parameter(p.detach().clone()) for p in begun]
        optimizer = make(begun)
        optimizer.load_state_dict(state)
    assert counts[0] == counts[1] < len(SHAPES)
