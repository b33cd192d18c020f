"""Make files that later versions must still read: ``python -m tests.compatibility.make_fixtures 0.1``.

Run at a release, with the code of that release. It writes the folder ``files/<name>``, which then stays for good and is
not written again: what counts about the files is that an older version made them. The network, the losses and the
options here are those that the files belong to, so add to them and change none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature
from precond import EKFAC, KFAC, SOAP
from solvers import Eigenpairs

FILES = Path(__file__).parent / "files"
F64 = torch.float64
CE = nn.CrossEntropyLoss()

Batch = tuple[Tensor, Tensor]
Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]

STEPS = 5
#: They are saved after that many steps. Then KFAC, which draws labels, takes a step without draws, the same for all
#: versions of torch; EKFAC takes one with new statistics and a new basis.
OPTIMIZERS: dict[str, Make] = {
    "kfac": lambda model, loss_fn: KFAC(
        model, loss_fn, lr=0.1, weight_decay=0.01, curvature_update_period=2, inverse_update_period=2
    ),
    "ekfac": lambda model, loss_fn: EKFAC(model, loss_fn, lr=0.1, fisher="exact", inverse_update_period=1),
    "soap": lambda model, _: SOAP(model.parameters(), lr=0.01, weight_decay=0.01, inverse_update_period=2),
}
#: Structures of which sums are kept -> function and kind.
SUMS: dict[str, tuple[Callable[..., Any], str]] = {
    "kfac": (curvature.ggn, "exact"),
    "ekfac": (curvature.fisher, "empirical"),
}
POSTERIORS = ("kron", "ekfac", "low_rank")


def network(values: dict[str, Tensor] | None = None) -> nn.Module:
    """The network of all files."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    if values is not None:
        model.load_state_dict(values)
    return model


def step(model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of a plain loop."""
    x, y = batch
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()


def sums(model: nn.Module, batches: list[Batch], structure: str, resume: Path | None = None) -> Tensor:
    """A structure as a dense matrix."""
    make, kind = SUMS[structure]
    op = make(model, CE, batches, structure=structure, kind=kind, resume=resume)
    return op.to_dense()


def eigenpairs(model: nn.Module, batches: list[Batch], resume: Path) -> Eigenpairs:
    """The largest eigenvalues of a Hessian."""
    return curvature.resumable_eigsh(curvature.hessian(model, CE, batches), resume, 3, rtol=1e-10)


def posterior(model: nn.Module, batches: list[Batch], structure: str) -> Any:
    """A posterior of all parameters."""
    from laplace import Laplace

    from curvature.laplace import GGNBackend

    precision = torch.tensor([1.5], dtype=F64)
    la: Any = Laplace(model, "classification", "all", structure, backend=GGNBackend, prior_precision=precision)
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    la.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    return la


def predictions(la: Any, x: Tensor) -> dict[str, Tensor]:
    """What a posterior says."""
    found = {"probabilities": la(x), "evidence": la.log_marginal_likelihood()}
    return {name: value.detach() for name, value in found.items()}


def main(name: str) -> None:
    """Write a folder.

    Raises:
        FileExistsError: If it is there.
    """
    from curvature.laplace import save

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def batch(n: int) -> Batch:
        return normal(n, 4), torch.randint(3, (n,), generator=generator)

    folder = FILES / name
    folder.mkdir(parents=True)
    values = {key: normal(*value.shape) / 2 for key, value in network().state_dict().items()}
    values["1.weight"] += 1
    batches, queries = [batch(n) for n in (4, 5, 3)], batch(2)
    targets = [normal(len(x), 3) for x, _ in batches]
    torch.save({"values": values, "batches": batches, "targets": targets, "queries": queries}, folder / "problem.pt")

    for kind, make in OPTIMIZERS.items():
        model, loss_fn = network(values), nn.CrossEntropyLoss()
        optimizer = make(model, loss_fn)
        for _ in range(STEPS):
            step(model, loss_fn, optimizer, batch(6))
        file: dict[str, Any] = {"optimizer": optimizer.state_dict(), "batch": batch(6)}
        file["before"] = {key: value.clone() for key, value in model.state_dict().items()}
        torch.save(file, folder / f"{kind}.pt")  # before the step, which changes some tensors in place
        step(model, loss_fn, optimizer, file["batch"])
        torch.save(torch.load(folder / f"{kind}.pt") | {"after": dict(model.state_dict())}, folder / f"{kind}.pt")

    model, expected = network(values), dict[str, Any]()
    curvature.report(model, CE, batches, matrix="ggn", k=3).save(folder / "report_exact.json")
    pairs = [(x, target) for (x, _), target in zip(batches, targets, strict=True)]
    estimated = {"matrix": "hessian", "exact": False, "products": 300, "sections": ("loss", "eigenvalues", "trace")}
    curvature.report(model, nn.MSELoss(), pairs, k=2, **estimated).save(folder / "report_estimated.json")  # type: ignore[call-overload]

    for structure in SUMS:
        expected[f"sums_{structure}"] = sums(model, batches, structure, folder / f"sums_{structure}.pt")
    found = eigenpairs(model, batches, folder / "eigenpairs.pt")
    expected["eigenpairs"] = {"values": found.values, "vectors": found.vectors}
    influence = curvature.influence(model, CE, batches, queries, store=folder / "influence")
    expected["influence"] = dict(influence.by_block)

    for structure in POSTERIORS:
        la = posterior(network(values), batches, structure)
        save(la, folder / f"posterior_{structure}.safetensors")
        expected[f"posterior_{structure}"] = predictions(la, queries[0])
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    main(sys.argv[1])
