"""Do copies, pickles, forked and spawned processes of public objects compute what the objects do?"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import curvature
import solvers
from precond import KFAC, SOAP
from tests.faults.test_files import CE, data, model, report

F64 = torch.float64


def kron() -> solvers.LinearOperator:
    return curvature.ggn(model(), CE, data(), structure="kfac")


def ones(op: Any) -> Tensor:
    return op @ torch.ones(op.shape[1], dtype=op.dtype)


#: Name -> makes an object, and what is computed with it.
OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "Dense": (lambda: solvers.Dense(torch.eye(3, dtype=F64)), ones),
    "Kronecker": (kron, ones),
    "EKFAC": (lambda: curvature.ggn(model(), CE, data(), structure="ekfac"), ones),
    "inverse": (lambda: kron().inverse(damping=0.1), ones),
    "shifted": (lambda: solvers.Diagonal(torch.ones(4, dtype=F64)).shift(0.5), ones),
    "estimate": (lambda: solvers.trace(kron(), samples=3), lambda e: (e.value, e.stderr)),
    "eigenpairs": (lambda: solvers.eigsh(kron(), 2), lambda e: (e.values, e.vectors)),
    "curvature": (lambda: curvature.KroneckerFisher("exact"), repr),
    "solver": (lambda: solvers.CG(rtol=1e-9), repr),
    "damping": (lambda: solvers.Tikhonov(0.1), repr),
    "report": (report, lambda r: r.to_json() + repr(r.eigenvectors["ggn"].tolist())),
    "coverage": (lambda: curvature.coverage(model(), CE, data()[0]), str),
    "influence": (lambda: curvature.influence(model(), CE, data(), data()[0]), lambda i: i.scores),
    "per-sample gradients": (lambda: curvature.per_sample_gradients(model(), CE, data()[0]), dict),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_is_the_same_and_its_own(name: str, kind: str) -> None:
    make, use = OBJECTS[name]
    made = make()
    expected = use(made)
    copied = copy.deepcopy(made) if kind == "deepcopy" else pickle.loads(pickle.dumps(made))
    assert type(copied) is type(made)
    if isinstance(expected, str):
        assert use(copied) == expected
    else:
        torch.testing.assert_close(use(copied), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_a_copied_matrix_of_a_model_belongs_to_the_copied_model(name: str) -> None:
    made = model()
    op = getattr(curvature, name)(made, CE, data())
    early, product = copy.deepcopy(op), ones(op)
    late = copy.deepcopy(op)
    with torch.no_grad():
        made[0].weight.mul_(2)
    assert torch.equal(ones(early), product) and torch.equal(ones(late), product)
    for stale in (ones, copy.deepcopy):
        with pytest.raises(RuntimeError, match="was changed after this operator was made"):
            stale(op)


def loop(optimizer: Any, trained: nn.Module, loader: Any, epochs: int = 2) -> list[Tensor]:
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            CE(trained(x), y).backward()
            optimizer.step()
    return [p.detach().clone() for p in trained.parameters()]


class Rows(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*data(), strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("method", ["KFAC", "SOAP"])
def test_workers_that_are_forked_while_an_optimizer_lives(method: str) -> None:
    def run(workers: int) -> list[Tensor]:
        trained = model()
        optimizer = KFAC(trained, CE, lr=0.1) if method == "KFAC" else SOAP(trained.parameters(), lr=0.01)
        options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
        return loop(optimizer, trained, DataLoader(Rows(), batch_size=3, num_workers=workers, **options))

    assert all(torch.equal(a, b) for a, b in zip(run(2), run(0), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_curvature_over_forked_workers_is_that_over_a_list() -> None:
    loader = DataLoader(Rows(), batch_size=3, num_workers=2, multiprocessing_context="fork")
    rows = list(DataLoader(TensorDataset(Rows().x, Rows().y), batch_size=3))
    for structure in ("kfac", "full"):
        found, expected = (curvature.ggn(model(), CE, d, structure=structure) for d in (loader, rows))
        assert torch.equal(ones(found), ones(expected))


def child(queue: Any, op: Any, trained: nn.Module) -> None:
    torch.set_num_threads(1)
    result = torch.cat([ones(op), ones(curvature.hessian(trained, CE, data()))])
    queue.put(result.tolist())


def test_a_spawned_process_computes_with_what_it_is_given() -> None:
    context = multiprocessing.get_context("spawn")
    queue, op, trained = context.Queue(), kron(), model()
    optimizer = KFAC(trained, CE, lr=0.1)
    loop(optimizer, trained, data(), 1)
    expected = torch.cat([ones(op), ones(curvature.hessian(trained, CE, data()))]).tolist()
    process = context.Process(target=child, args=(queue, op, trained))
    process.start()
    assert queue.get(timeout=120) == expected
    process.join()
    assert process.exitcode == 0
