"""Our entries for the harness's curvature operations, in the order of its peers' file; imported by ``ours.py``.

What depends on the parameters' values is inside the timing; entries marked "(graph kept)" keep the graph of the forward
pass between products, as an operator on one batch does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers_curvature import flat, unit_vector
from registry import register
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import epoch_data

import curvature
import solvers
from curvature.estimation.dataset import record
from curvature.model.parameters import Parameters
from solvers import Cholesky, FactoredTikhonov

Run = Callable[[], Any]


def _batch(w: Any) -> tuple[Tensor, Tensor]:
    return w.x, w.y


def _same(result: Tensor) -> Tensor:
    return result


@register("curvature recorded pass", "curvature", op="gradient")
def _(w: Any) -> Run:
    """A gradient from a forward pass whose uses of parameters are recorded, as at a step that learns the curvature."""

    def run() -> Any:
        z, _ = record(w.model, Parameters(w.model), w.x)
        return torch.autograd.grad(w.loss_fn(z, w.y), w.params)

    return run


def _rows(r: dict[str, Tensor]) -> Tensor:
    return torch.cat([g[:4].flatten(1) for g in r.values()], 1)


@register("curvature", "curvature", op="per-sample gradients")
def _(w: Any) -> Any:
    return lambda: curvature.per_sample_gradients(w.model, w.loss_fn, _batch(w)), _rows


def _products(op: str, make: Callable[..., Any]) -> None:
    for kept in (False, True):
        name = "curvature (graph kept)" if kept else "curvature"

        @register(name, "curvature", op=op)
        def _(w: Any, kept: bool = kept) -> Any:
            A, v = make(w.model, w.loss_fn, _batch(w), keep_graph=kept), flat(unit_vector(w))
            return lambda: A @ v, _same

        @register(name, "curvature", op=op + ", 10 vectors")
        def _(w: Any, kept: bool = kept) -> Any:
            A, v = make(w.model, w.loss_fn, _batch(w), keep_graph=kept), flat(unit_vector(w))
            V = torch.stack([v.roll(i) for i in range(10)])
            return lambda: A @ V, _same


def _ggn(*arguments: Any, **options: Any) -> Any:
    return curvature.ggn(*arguments, structure="full", **options)


_products("HVP", curvature.hessian)
_products("GGN-VP", _ggn)


def _structure(op: str, structure: Any, kind: Any, canonical: Callable[[Any], Tensor] | None) -> None:
    """A structure on one batch, built anew each time; sampled ones draw other labels each time."""

    @register("curvature", "curvature", op=op)
    def _(w: Any) -> Any:
        draws = torch.Generator().manual_seed(0)

        def run() -> Any:
            return curvature.fisher(
                w.model, w.loss_fn, _batch(w), kind=kind, structure=structure, generator=draws, progress=False
            )

        return run if canonical is None else (run, canonical)


def _diagonal(r: Any) -> Tensor:
    return r.diagonal()


def _row_sums(r: Any) -> Tensor:
    return r @ torch.ones(r.shape[1])


_structure("diag GGN exact", "diagonal", "exact", _diagonal)
_structure("diag GGN MC", "diagonal", "mc", None)
_structure("diag empirical Fisher", "diagonal", "empirical", _diagonal)
_structure("KFAC factors MC", "kfac", "mc", None)
_structure("KFAC factors empirical", "kfac", "empirical", _row_sums)
_structure("KFAC factors exact", "kfac", "exact", _row_sums)
_structure("EKFAC MC", "ekfac", "mc", None)
_structure("dense GGN", "dense", "exact", lambda r: r.to_dense())


@register("curvature", "curvature", op="KFAC inverse + solve")
def _(w: Any) -> Any:
    A = curvature.fisher(w.model, w.loss_fn, _batch(w), kind="empirical", structure="kfac")
    v = torch.ones(A.shape[1])
    return lambda: A.inverse(FactoredTikhonov(1e-3), Cholesky()) @ v, _same


def _hessian(w: Any) -> Any:
    """Made inside the timing: recording the graph of the gradient is part of the work."""
    return curvature.hessian(w.model, w.loss_fn, _batch(w))


@register("curvature", "curvature", op="top-10 Hessian eigenvalues")
def _(w: Any) -> Any:
    def run() -> Tensor:
        return solvers.eigsh(_hessian(w), k=10, rtol=1e-3, search_copies=False, progress=False).values

    # Of the tenth there may be two that are nearly as large, at opposite ends.
    return run, lambda values: values[values.abs().argsort(descending=True)[:9]].sort().values


@register("curvature", "curvature", op="Hessian trace, 30 vectors")
def _(w: Any) -> Run:
    return lambda: solvers.trace(_hessian(w), "hutchinson", samples=30, progress=False)


@register("Lanczos by hand", "curvature", op="Hessian density, 2 x 20 products")
def _(w: Any) -> Run:
    """What a script does: double backward, and every vector made orthogonal to all before."""
    sizes, shapes = [p.numel() for p in w.params], [p.shape for p in w.params]

    def run() -> None:
        gradient = torch.autograd.grad(w.loss(), w.params, create_graph=True)
        for _ in range(2):
            basis = [torch.randn(sum(sizes))]
            basis[0] /= basis[0].norm()
            for _ in range(20):
                v = [part.view(shape) for part, shape in zip(basis[-1].split(sizes), shapes, strict=True)]
                image = flat(torch.autograd.grad(gradient, w.params, v, retain_graph=True))
                for q in basis:
                    image = image - (q @ image) * q
                basis.append(image / image.norm())

    return run


@register("curvature", "curvature", op="Hessian density, 2 x 20 products")
def _(w: Any) -> Run:
    return lambda: solvers.spectral_density(_hessian(w), samples=2, steps=20, progress=False)


@register("curvature", "curvature", op="NTK, 64 samples")
def _(w: Any) -> Any:
    return lambda: curvature.ntk(w.model, w.x[:64]), lambda r: r.permute(0, 2, 1, 3)  # n, class, m, class


def _laplace(structure: str, kind: str) -> None:
    @register(f"laplace-torch, ours {kind}", "laplace", op=f"Laplace fit {structure}")
    def _(w: Any) -> Run:
        from laplace import Laplace

        from curvature import laplace

        loader = DataLoader(TensorDataset(*epoch_data(w, 1000)), batch_size=250)

        def run() -> Any:
            la = Laplace(w.model, "classification", "all", structure, backend=getattr(laplace, kind))
            la.fit(loader)
            return la

        return run


for _s in ("diag", "kron", "full"):
    for _b in ("GGNBackend", "EFBackend"):
        _laplace(_s, _b)
