"""Which models do the backends of laplace-torch serve? ``python -m tests.benchmarks.laplace_support`` runs them to see.

Each cell fits a posterior to five examples in batches of three and two, in float64, and compares its curvature with one
from the definition (``tests/curvature/dense_reference.py``, plain backward passes). *right*: equal within 1e-6 of the
norm; *0.3 off*: the relative error; *error*: an exception; *fits*: no exception, and right wherever there is a
reference, but some parameters have none. One word stands for all structures where they agree.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from laplace import Laplace
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    BackPackEF,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from torch import Tensor

from curvature.laplace import EFBackend, GGNBackend, HessianBackend
from tests.benchmarks.laplace_models import CASES, NOISE, Case
from tests.curvature import dense_reference as dense
from tests.curvature.problems import F64, Problem

#: Matrix -> where a backend comes from -> the backend.
BACKENDS: dict[str, dict[str, Any]] = {
    "GGN": {"ours": GGNBackend, "curvlinops": CurvlinopsGGN, "BackPACK": BackPackGGN, "ASDL": AsdlGGN},
    "empirical Fisher": {"ours": EFBackend, "curvlinops": CurvlinopsEF, "BackPACK": BackPackEF, "ASDL": AsdlEF},
    "Hessian": {"ours": HessianBackend, "curvlinops": CurvlinopsHessian, "ASDL": AsdlHessian},
}
STRUCTURES = {"GGN": ("diag", "kron", "full"), "empirical Fisher": ("diag", "kron", "full"), "Hessian": ("full",)}
KINDS = {"GGN": "exact", "empirical Fisher": "empirical"}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Reference:
    """What the curvature of a case is by definition.

    Attributes:
        full: ``(P, P)``.
        kron: The blocks of K-FAC with the positions expanded, zero elsewhere.
        known: Entries of the flat vector for which ``kron`` says something, ``(P,)``.
    """

    full: Tensor
    kron: Tensor
    known: Tensor

    def verdict(self, structure: str, got: Tensor) -> str:
        """The word for a cell."""
        expected = {"full": self.full, "diag": self.full.diagonal(), "kron": self.kron}[structure]
        if structure == "kron":
            got, expected = (m[self.known][:, self.known] for m in (got, expected))
        error = float((got - expected).norm() / expected.norm()) if expected.numel() else 0.0
        return "fits" if error <= TOLERANCE and structure == "kron" and not self.known.all() else word(error)


def word(error: float) -> str:
    """For a relative error; that of a NaN is large."""
    if error <= TOLERANCE:
        return "right"
    return f"{error:.2g} off"


def reference(case: Case, matrix: str) -> Reference:
    """From the definition.

    A bias of a layer has the factor of the layer's outputs; a parameter that belongs to no layer, its exact block.
    """
    problem = case.reference
    if matrix == "Hessian":
        full = hessian(problem)
        return Reference(full, full, torch.zeros(len(full), dtype=torch.bool))
    full = dense.curvature(problem, KINDS[matrix])
    everything = replace(problem, model=copy.deepcopy(problem.model).requires_grad_(True))
    where = dense.flat_indices(problem.model)
    kron, known = torch.zeros_like(full), torch.zeros(len(full), dtype=torch.bool)

    def put(index: Tensor, block: Tensor) -> None:
        kron[index[:, None], index] = block
        known[index] = True

    for layer, (B, A) in dense.kfac(everything, KINDS[matrix], "expand", joint=False).items():
        if f"{layer}.weight" in where and case.uses(f"{layer}.weight") == 1:
            put(where[f"{layer}.weight"].flatten(), torch.block_diag(*map(torch.kron, B, A)))
        if f"{layer}.bias" in where:
            put(where[f"{layer}.bias"], torch.block_diag(*B))
    for name, index in where.items():
        if index.dim() == 1 and not known[index].any() and case.in_no_layer(name):
            put(index, full[index[:, None], index])
    return Reference(full, kron, known)


def hessian(problem: Problem) -> Tensor:
    """Two backward passes for each parameter."""
    model = copy.deepcopy(problem.model)
    tensors = list(dense.trainable(model).values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z, y = dense.dataset_outputs(problem, model)
    grads = torch.autograd.grad(problem.loss_fn(z, y), tensors, create_graph=True)
    return dense.jacobian(torch.cat([g.flatten() for g in grads]), tensors)


def curvature_of(case: Case, backend: Any, structure: str) -> Tensor:
    """What a fit by laplace-torch makes of a case: ``(P,)`` for a diagonal, else ``(P, P)``."""
    la = fitted(case, backend, structure)
    if structure != "kron":
        return la.H
    precision = la.posterior_precision.to_matrix()
    return precision - torch.eye(len(precision), dtype=precision.dtype)  # the prior's is one


def fitted(case: Case, backend: Any, structure: str) -> Any:
    """A fitted posterior; our Kronecker factors by the name that serves all shapes."""
    name = "kfac" if structure == "kron" and backend in (GGNBackend, EFBackend) else structure
    la: Any = Laplace(copy.deepcopy(case.model), case.likelihood, case.subset, name, backend=backend)
    la.fit(case.loader())
    return la


def cell(case: Case, backend: Any, structure: str, expected: Reference) -> str:
    """Run it and say what happened."""
    return attempt(lambda: expected.verdict(structure, curvature_of(case, backend, structure).detach()))


def noise_cell(case: Case, backend: Any, structure: str) -> str:
    """Is the derivative of the evidence in the noise that of its difference quotient?"""

    def run() -> str:
        la = fitted(case, backend, structure)
        # With so strong a prior the posterior is a Gaussian under an indefinite Hessian as well.
        prior, noise = torch.full((1,), 100.0, dtype=F64), torch.tensor([0.5], dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(la.log_marginal_likelihood(prior, noise), noise)
        ahead, behind = (la.log_marginal_likelihood(prior, torch.tensor([0.5 + h], dtype=F64)) for h in (1e-5, -1e-5))
        return word(abs(float(slope) * 2e-5 / float(ahead - behind) - 1))

    return attempt(run)


def attempt(run: Callable[[], str]) -> str:
    """What it returns, or ``"error"``."""
    try:
        return run()
    except (Exception, SystemExit):  # laplace-torch exits where eigenvalues fail
        return "error"


def row(title: str, matrix: str) -> list[str]:
    """What each backend makes of a model: one word for each structure, or one for all where they agree."""
    case = CASES[title]()
    expected = None if title == NOISE else reference(case, matrix)
    cells = []
    for backend in BACKENDS[matrix].values():
        words = [
            noise_cell(case, backend, structure) if expected is None else cell(case, backend, structure, expected)
            for structure in STRUCTURES[matrix]
        ]
        cells.append(words[0] if len(set(words)) == 1 else ", ".join(words))
    return cells


def table(matrix: str, titles: Iterable[str]) -> str:
    """Markdown, a row for each model and a column for each backend."""
    lines = [f"| {' | '.join(['model', *BACKENDS[matrix]])} |", "| --- |" + " --- |" * len(BACKENDS[matrix])]
    lines += [f"| {' | '.join([title, *row(title, matrix)])} |" for title in titles]
    return "\n".join(lines)


def main() -> None:
    """Print a table for each matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for matrix in options.matrices:
        print(f"\n### {matrix}\n\n{table(matrix, options.models)}", flush=True)


if __name__ == "__main__":
    main()
