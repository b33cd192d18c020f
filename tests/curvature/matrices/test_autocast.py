"""Is an operator the same matrix inside ``torch.autocast`` as outside?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvature
import solvers
from solvers import LinearOperator

STRUCTURES = ["full", "dense", "layer", "unit", "diagonal", "kfac", "ekfac", "low_rank", "tnt", "foof"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


#: What is asked of an operator of the size of a vector.
ASKED: dict[str, Callable[[LinearOperator, Tensor], Tensor]] = {
    "product": lambda op, v: op @ v,
    "to_dense": lambda op, v: op.to_dense(),
    "inverse": lambda op, v: op.inverse(damping=0.1, dense=True) @ v,
    "iterative inverse": lambda op, v: op.inverse(damping=0.1, solver=solvers.CG(rtol=1e-2)) @ v,
    "eigsh": lambda op, v: solvers.eigsh(op, k=2, generator=seeded()).values,
    "trace": lambda op, v: torch.as_tensor(solvers.trace(op, generator=seeded()).value),
    "logdet": lambda op, v: torch.as_tensor(solvers.logdet(op, damping=0.1, generator=seeded()).value),
    "shifted": lambda op, v: op.shift(0.1) @ v,
}


def setting() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(12, 4), torch.randint(3, (12,)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_matrix_made_outside(structure: str) -> None:
    model, loss_fn, data = setting()
    op = curvature.ggn(model, loss_fn, data, structure=structure)
    v = torch.randn(op.shape[1], generator=seeded())
    for name, ask in ASKED.items():
        try:
            outside = ask(op, v)
        except solvers.StructureError:
            continue
        with torch.autocast("cpu", torch.bfloat16):
            inside = ask(op, v)
        assert torch.equal(inside, outside), name


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_a_matrix_made_inside_is_that_of_the_passes_there(structure: str) -> None:
    model, loss_fn, data = setting()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = curvature.ggn(model, loss_fn, data, structure=structure)
        inside = rounded.to_dense()
    assert torch.equal(rounded.to_dense(), inside)
    assert not torch.equal(inside, curvature.ggn(model, loss_fn, data, structure=structure).to_dense())
