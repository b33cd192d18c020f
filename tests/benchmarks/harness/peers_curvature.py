"""Curvature of one batch by other libraries and by a few lines of torch.

What a library computes once for a model is made outside the timing; what depends on the values of the parameters is
inside, but for entries "(graph kept)".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peers_optim import without_marks
from registry import register
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset
from workloads import epoch_data

Named = Mapping[str, Tensor]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unit_vector(w: Any) -> list[Tensor]:
    """A vector for products: one tensor per parameter."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, generator=generator) for p in w.params]


def _named(w: Any, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in w.model.named_parameters()), tensors, strict=True))


def _columns(w: Any) -> dict[str, Tensor]:
    """Ten vectors."""
    v, sizes = flat(unit_vector(w)), [p.numel() for p in w.params]
    pieces = torch.stack([v.roll(i) for i in range(10)]).split(sizes, dim=1)
    return _named(w, (t.reshape(10, *p.shape) for t, p in zip(pieces, w.params, strict=True)))


def _function(w: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    return lambda p, x: functional_call(w.model, p, (x,)), _named(w, (p.detach() for p in w.params))


def _rows(r: Named) -> Tensor:
    return torch.cat([t.flatten(1) for t in r.values()], 1)


def _per_sample(w: Any) -> Callable[[], dict[str, Tensor]]:
    f, params = _function(w)
    each = vmap(grad(lambda p, x, y: w.loss_fn(f(p, x[None]), y[None])), in_dims=(None, 0, 0))
    return lambda: each(params, w.x, w.y)


@register("torch.func", "curvature", op="per-sample gradients")
def _(w: Any) -> Any:
    return _per_sample(w), lambda r: torch.cat([t[:4].flatten(1) for t in r.values()], 1)


@register("torch.func", "curvature", op="diag empirical Fisher")
def _(w: Any) -> Any:
    each = _per_sample(w)
    return lambda: {k: t.square().mean(0) for k, t in each().items()}, lambda r: flat(r.values())


@register("torch.func", "curvature", op="HVP")
def _(w: Any) -> Any:
    f, params = _function(w)
    v, gradient = _named(w, unit_vector(w)), grad(lambda p: w.loss_fn(f(p, w.x), w.y))
    return lambda: jvp(gradient, (params,), (v,))[1], lambda r: flat(r.values())


@register("torch.func", "curvature", op="HVP, 10 vectors")
def _(w: Any) -> Any:
    f, params = _function(w)
    V, gradient = _columns(w), grad(lambda p: w.loss_fn(f(p, w.x), w.y))
    return lambda: vmap(lambda v: jvp(gradient, (params,), (v,))[1])(V), _rows


@register("double backward", "curvature", op="HVP")
def _(w: Any) -> Any:
    v = unit_vector(w)

    def run() -> Any:
        g = torch.autograd.grad(w.loss(), w.params, create_graph=True)
        return torch.autograd.grad(g, w.params, v)

    return run, flat


@register("double backward (graph kept)", "curvature", op="HVP")
def _(w: Any) -> Any:
    v, g = unit_vector(w), torch.autograd.grad(w.loss(), w.params, create_graph=True)
    return lambda: torch.autograd.grad(g, w.params, v, retain_graph=True), flat


@register("double backward", "curvature", op="Hessian trace, 30 vectors")
def _(w: Any) -> Any:
    def run() -> Tensor:
        g, total = torch.autograd.grad(w.loss(), w.params, create_graph=True), torch.zeros(())
        for _ in range(30):
            v = [torch.randint_like(p, 2) * 2 - 1 for p in w.params]
            product = torch.autograd.grad(g, w.params, v, retain_graph=True)
            total = total + sum((a * b).sum() for a, b in zip(v, product, strict=True))
        return total / 30

    return run


def _func_ggn(w: Any) -> tuple[Callable[[Named], dict[str, Tensor]], dict[str, Tensor]]:
    f, params = _function(w)

    def product(v: Named) -> dict[str, Tensor]:
        z, u = jvp(lambda p: f(p, w.x), (params,), (v,))
        p = z.softmax(1)
        u = (p * u - p * (p * u).sum(1, keepdim=True)) / len(z)
        result: dict[str, Tensor] = vjp(lambda q: f(q, w.x), params)[1](u)[0]
        return result

    return product, params


@register("torch.func", "curvature", op="GGN-VP")
def _(w: Any) -> Any:
    product, v = _func_ggn(w)[0], _named(w, unit_vector(w))
    return lambda: product(v), lambda r: flat(r.values())


@register("torch.func", "curvature", op="GGN-VP, 10 vectors")
def _(w: Any) -> Any:
    product, V = vmap(_func_ggn(w)[0]), _columns(w)
    return lambda: product(V), _rows


@register("torch.func", "curvature", op="NTK, 64 samples")
def _(w: Any) -> Any:
    f, params = _function(w)

    def run() -> Tensor:
        J = [j.flatten(2) for j in jacrev(f)(params, w.x[:64]).values()]  # n, class, P
        total = sum(torch.einsum("ncp,mdp->ncmd", j, j) for j in J)
        assert isinstance(total, Tensor)
        return total

    return run, lambda r: r


@register("torch.func", "curvature", op="dense GGN")
def _(w: Any) -> Any:
    f, params = _function(w)

    def run() -> Tensor:
        J = torch.cat([j.flatten(2) for j in jacrev(f)(params, w.x).values()], 2)
        p = f(params, w.x).softmax(1)
        H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        return J.flatten(0, 1).T @ (H @ J).flatten(0, 1) / len(w.x)

    return run, lambda r: r


# BackPACK -------------------------------------------------------------------------------------------------------------


def _backpack(w: Any, extension: str, **options: Any) -> Callable[[], None]:
    import backpack

    if not isinstance(w.model, nn.Sequential):
        raise NotImplementedError("BackPACK converts the graph of this model and fails")
    backpack.extend(w.model)
    loss_fn = backpack.extend(nn.CrossEntropyLoss())
    made = getattr(backpack.extensions, extension)(**options)

    def run() -> None:
        for p in w.params:
            p.grad = None
        with backpack.backpack(made):
            loss_fn(w.model(w.x), w.y).backward()

    return run


def _by_backpack(op: str, extension: str, field: str = "", rows: bool = False, **options: Any) -> None:
    @register("BackPACK", "curvature", op=op)
    def _(w: Any) -> Any:
        run = _backpack(w, extension, **options)
        if rows:
            return run, lambda _: torch.cat([getattr(p, field)[:4].flatten(1) for p in w.params], 1)
        return (run, lambda _: flat(getattr(p, field) for p in w.params)) if field else run


_by_backpack("per-sample gradients", "BatchGrad", "grad_batch", rows=True)
_by_backpack("diag GGN exact", "DiagGGNExact", "diag_ggn_exact")
_by_backpack("diag GGN MC", "DiagGGNMC", mc_samples=1)
_by_backpack("diag empirical Fisher", "SumGradSquared", "sum_grad_squared")
_by_backpack("KFAC factors MC", "KFAC", mc_samples=1)
_by_backpack("KFAC factors exact", "KFLR")


@register("BackPACK (graph kept)", "curvature", op="GGN-VP")
def _(w: Any) -> Any:
    from backpack.hessianfree.ggnvp import ggn_vector_product

    v, out = unit_vector(w), w.model(w.x)
    loss = w.loss_fn(out, w.y)
    return lambda: ggn_vector_product(loss, out, w.model, v), flat


# ASDL -----------------------------------------------------------------------------------------------------------------


def _by_asdl(op: str, kind: str, shape: str) -> None:
    @register("ASDL", "curvature", op=op)
    def _(w: Any) -> Any:
        from asdl.fisher import FisherConfig, get_fisher_maker

        without_marks()
        config = FisherConfig(fisher_type=kind, fisher_shapes=[shape], loss_type="cross_entropy", data_size=len(w.x))
        maker = get_fisher_maker(w.model, config)
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(w.model, w.x), w.y)
        return lambda: maker.forward_and_backward()


_by_asdl("diag GGN exact", "fisher_exact", "diag")
_by_asdl("diag GGN MC", "fisher_mc", "diag")
_by_asdl("diag empirical Fisher", "fisher_emp", "diag")
_by_asdl("KFAC factors MC", "fisher_mc", "kron")
_by_asdl("KFAC factors empirical", "fisher_emp", "kron")
_by_asdl("KFAC factors exact", "fisher_exact", "kron")


# Curvlinops -----------------------------------------------------------------------------------------------------------


def _curvlinops(w: Any, cls: str, **options: Any) -> Any:
    import curvlinops

    params = w.params
    if "KFAC" in cls:  # it takes parameters of these layers only
        known = [m for m in w.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        params = [p for m in known for p in m.parameters(recurse=False)]
    data = [(w.x, w.y)]
    return getattr(curvlinops, cls)(w.model, w.loss_fn, params, data, check_deterministic=False, **options)


def _by_curvlinops(op: str, cls: str) -> None:
    @register("Curvlinops", "curvature", op=op)
    def _(w: Any) -> Any:
        A, v = _curvlinops(w, cls), unit_vector(w)
        return lambda: A @ v, flat

    @register("Curvlinops", "curvature", op=f"{op}, 10 vectors")
    def _(w: Any) -> Any:
        A, v = _curvlinops(w, cls), flat(unit_vector(w))
        V = torch.stack([v.roll(i) for i in range(10)], 1)
        return lambda: A @ V, lambda r: r.T


_by_curvlinops("HVP", "HessianLinearOperator")
_by_curvlinops("GGN-VP", "GGNLinearOperator")


def _factors_by_curvlinops(op: str, fisher: str, cls: str = "KFACLinearOperator") -> None:
    @register("Curvlinops", "curvature", op=op)
    def _(w: Any) -> Any:
        def run() -> Any:
            A = _curvlinops(w, cls, fisher_type=fisher, separate_weight_and_bias=False)
            A.compute_kronecker_factors()
            if cls.startswith("E"):
                A.compute_eigenvalue_correction()
            return A

        return run


_factors_by_curvlinops("KFAC factors MC", "mc")
_factors_by_curvlinops("KFAC factors empirical", "empirical")
_factors_by_curvlinops("KFAC factors exact", "type-2")
_factors_by_curvlinops("EKFAC MC", "mc", "EKFACLinearOperator")


@register("Curvlinops", "curvature", op="KFAC inverse + solve")
def _(w: Any) -> Any:
    from curvlinops import KFACInverseLinearOperator

    A = _curvlinops(w, "KFACLinearOperator", fisher_type="empirical", separate_weight_and_bias=False)
    A.compute_kronecker_factors()
    v = torch.ones(A.shape[1])
    return lambda: KFACInverseLinearOperator(A, damping=1e-3, use_heuristic_damping=True) @ v


@register("Curvlinops and SciPy", "curvature", op="top-10 Hessian eigenvalues")
def _(w: Any) -> Any:
    from scipy.sparse.linalg import eigsh

    def run() -> Tensor:
        found = eigsh(_curvlinops(w, "HessianLinearOperator").to_scipy(), k=10, tol=1e-3, return_eigenvectors=False)
        return torch.as_tensor(found)

    return run, _nine_largest


def _nine_largest(values: Tensor) -> Tensor:
    """Of ten; the tenth may be either of two that are nearly as large, at opposite ends."""
    return values[values.abs().argsort(descending=True)[:9]].sort().values


# laplace-torch --------------------------------------------------------------------------------------------------------


def _fit(structure: str, module: str, backend: str) -> None:
    @register(backend, "laplace", op=f"Laplace fit {structure}")
    def _(w: Any) -> Any:
        import importlib

        from laplace import Laplace

        found = getattr(importlib.import_module(f"laplace.curvature.{module}"), backend)
        loader = DataLoader(TensorDataset(*epoch_data(w, 1000)), batch_size=250)

        def run() -> Any:
            fitted = Laplace(w.model, "classification", "all", structure, backend=found)
            fitted.fit(loader)
            return fitted

        return run


for _structure in ("diag", "kron"):
    for _module, _backend in (
        ("curvlinops", "CurvlinopsEF"),
        ("backpack", "BackPackGGN"),
        ("asdl", "AsdlGGN"),
        ("asdl", "AsdlEF"),
    ):
        _fit(_structure, _module, _backend)
