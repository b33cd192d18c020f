"""A loss on several passes side by side, or on parts of one, is that on all of them in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KBFGS, TNT, NaturalGradient
from tests.curvature.loops import assert_same, batch, mlp, statistics, watching

CE = nn.CrossEntropyLoss()
X, Y = batch(6)
S, L = torch.linspace(-2, 2, 72).sin().reshape(6, 3, 4).double(), torch.arange(18).reshape(6, 3) % 3
Loop = Callable[[nn.Module], Tensor]

JOINED: dict[str, Loop] = {
    "halves": lambda m: CE(torch.cat([m(X[:3]), m(X[3:])]), Y),
    "unequal": lambda m: CE(torch.cat([m(X[:1]), m(X[1:3]), m(X[3:])]), Y),
    "stacked": lambda m: CE(torch.stack([m(X[:3]), m(X[3:])]).flatten(0, 1), Y),
    "one by one": lambda m: CE(torch.stack([m(x) for x in X.unsqueeze(1)]).squeeze(1), Y),
    "crops": lambda m: CE(torch.cat([m(x) for x in (X, X)]), torch.cat([Y, Y])),
    "in another order": lambda m: CE(torch.cat([m(X[3:]), m(X[:3])])[[3, 4, 5, 0, 1, 2]], Y),
}
PARTS: dict[str, Loop] = {
    "halves": lambda m: (CE((z := m(X))[:2], Y[:2]) * 2 + CE(z[2:], Y[2:]) * 4) / 6,
    "rows": lambda m: torch.stack([CE(z, y) for z, y in zip(m(X), Y, strict=True)]).mean(),
}


def curvature(loop: Loop, kind: str, structure: str) -> dict[str, Tensor]:
    model = mlp()
    optimizer = watching(model, CE, structure, kind, curvature_ema=0.0)
    loop(model).backward()
    optimizer.step()
    return statistics(optimizer)


#: Of crops the exact matrix has more signals than are sent one by one: random signs tell their examples apart.
CASES = [(how, kind) for how in JOINED for kind in ("empirical", "exact") if (how, kind) != ("crops", "exact")]


@pytest.mark.parametrize(("how", "kind"), CASES)
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_passes_side_by_side_are_one_pass(how: str, structure: str, kind: str) -> None:
    assert_same(curvature(JOINED[how], kind, structure), curvature(lambda m: CE(m(X), Y), kind, structure))


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_sequences_of_several_passes_keep_their_examples(structure: str) -> None:
    joined = curvature(lambda m: CE(torch.cat([m(S[:2]), m(S[2:])]).flatten(0, 1), L.flatten()), "empirical", structure)
    assert_same(joined, curvature(lambda m: CE(m(S).flatten(0, 1), L.flatten()), "empirical", structure))


def test_a_mean_of_outputs_has_the_examples_of_one() -> None:
    found = curvature(lambda m: CE((m(X) + m(X)) / 2, Y), "empirical", "diagonal")
    assert_same(found, curvature(lambda m: CE(m(X), Y), "empirical", "diagonal"))


def run(cls: Any, loop: Loop, **options: Any) -> Tensor:
    model = mlp()
    optimizer = cls(model, CE, lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loop(model).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("cls", [EKFAC, TNT, NaturalGradient])
def test_steps_on_passes_side_by_side_are_those_on_one(cls: Any) -> None:
    found, expected = (run(cls, loop, fisher="empirical") for loop in (JOINED["unequal"], lambda m: CE(m(X), Y)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("how", PARTS)
def test_kbfgs_learns_from_parts_of_an_output_as_from_all(how: str) -> None:
    torch.testing.assert_close(run(KBFGS, PARTS[how]), run(KBFGS, lambda m: CE(m(X), Y)), rtol=1e-9, atol=1e-11)
