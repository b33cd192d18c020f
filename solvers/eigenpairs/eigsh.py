"""Eigenpairs of symmetric operators known by their products."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from solvers.eigenpairs.lobpcg import LOBPCG
from solvers.eigenpairs.result import Eigenpairs, Wanted, Which, check_search, finish
from solvers.eigenpairs.storage import Storage
from solvers.eigenpairs.thick_restart import ThickRestart
from solvers.estimates.probes import FlatProduct, default_batch, flat_product, normals, own_generator, require_symmetric
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import flag, function, instance, whole
from solvers.outcome.progress import progress_bar
from solvers.outcome.solution import OnFailure
from solvers.precision import without_autocast, working_dtype

_METHODS = ("lanczos", "lobpcg")


@without_autocast
def eigsh(
    op: LinearOperator,
    k: int = 10,
    which: Which = "LA",
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_products: int | None = None,
    basis_size: int | None = None,
    preconditioner: LinearOperator | None = None,
    method: Literal["lanczos", "lobpcg"] | None = None,
    search_copies: bool = True,
    v0: Tensor | None = None,
    storage: str | os.PathLike[str] | None = None,
    state: dict[str, Tensor] | None = None,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> Eigenpairs:
    r"""Eigenpairs at the ends of the spectrum, with true residuals.

    * "lanczos": thick-restart Lanczos with full reorthogonalisation; one product per step, memory for
      ``basis_size + 1`` vectors. Repeated eigenvalues are found as often as they occur: a final search from a
      random vector finds what the first run may have missed.
    * "lobpcg": for the smallest ones with a ``preconditioner`` near the inverse; memory for about ``10 k`` vectors.
      With a good one the number of products does not grow with the condition.

    >>> from solvers import Diagonal
    >>> pairs = eigsh(Diagonal(torch.arange(1000.0)), k=2, rtol=1e-4)
    >>> pairs.values.round(), bool(pairs.converged.all())
    (tensor([999., 998.]), True)

    Args:
        op: Symmetric operator.
        k: How many pairs, at most the dimension.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude, "BE" from both ends (one more from the upper).
        rtol: A pair has converged when ``|A v - lam v| <= max(rtol |lam|, atol)``, or rounding allows no better:
            ``40 eps |A|``. The eigenvalue is then far better, by the square of the residual over the gap. None takes
            ``sqrt(eps) / 2``.
        atol: See ``rtol``; in units of the operator.
        max_products: Products at most; None takes ``max(1000, 10 n)``.
        basis_size: Vectors that Lanczos keeps; more take fewer products. None takes ``max(3 k, 2 k + 20)``.
        preconditioner: Symmetric positive definite operator near ``op^-1``, for "SA".
        method: One of the above; None takes "lobpcg" where there is a preconditioner.
        search_copies: Whether Lanczos searches for repeated eigenvalues. False saves those products, where it is known
            that there are none.
        v0: Vectors to start from, ``(*in_shape)`` or ``(j, *in_shape)``, such as those of a nearby operator. Lanczos
            starts from their sum.
        storage: Folder for vectors that do not fit in memory: Lanczos keeps its basis, and the eigenvectors it returns,
            in files there that vanish with their tensors. The result is the same, bit for bit; memory holds a few
            vectors only. On the CPU, whatever the device of the operator.
        state: Of earlier :class:`~solvers.Eigenpairs` for the same operator, k and which: goes on where they stopped,
            to the identical result. All else that shaped them (basis size, start) comes with it; tolerances may differ.
        checkpoint: Called with the state after every tenth step, to be kept where a crash does not reach.
        generator: Where random vectors are drawn from; None draws the same ones each time.
        on_failure: Whether to "warn" or to "raise" if a pair misses its tolerance; never silent.
        progress: True shows a progress bar, False never, None after a second.

    Raises:
        ValueError: If the operator is not square, has fewer than k eigenvalues, or an argument is out of range.
        NotSymmetricError: If the operator is not known to be symmetric.
        NonFiniteError: If a product holds NaN or infinity.
        NotPositiveDefiniteError: If the preconditioner is seen not to be positive definite.
        NotConvergedError: If a pair misses its tolerance and ``on_failure`` is "raise".
        OSError: If ``storage`` is not a folder or lacks room.

    References:
        Wu and Simon (2000), https://doi.org/10.1137/S0895479898334605; Knyazev (2001),
        https://doi.org/10.1137/S1064827500366124
    """
    require_symmetric(op, "eigsh")
    whole("k", k)
    check_search(rtol, atol, max_products, basis_size, generator, on_failure, progress)
    instance("preconditioner", preconditioner, LinearOperator, "a LinearOperator", optional=True)
    flag("search_copies", search_copies)
    instance("v0", v0, Tensor, "a tensor", optional=True)
    instance("storage", storage, (str, os.PathLike), "the path of a folder", optional=True)
    instance("state", state, dict, "the state of earlier Eigenpairs", optional=True)
    function("checkpoint", checkpoint, optional=True)
    n = op.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"{op!r} has {n} eigenvalues; k={k} is not between 1 and {n}.")
    eps = torch.finfo(op.dtype).eps
    wanted = Wanted(k, which, eps**0.5 / 2 if rtol is None else rtol, atol, eps)
    if method is None:
        method = "lanczos" if preconditioner is None else "lobpcg"
    _check_method(op, method, which, preconditioner)
    most = max(1000, 10 * n) if max_products is None else max_products
    if most < 2 * k:
        raise ValueError(f"max_products={most} cannot give {k} pairs and their residuals; allow at least {2 * k}.")
    if state is not None:
        _check_state(state, op, k, which, method)
        if generator is not None:
            raise ValueError("state brings its own random numbers; leave generator out.")
    if storage is not None and method != "lanczos":
        raise ValueError("storage= serves Lanczos; LOBPCG works on all of its vectors at once. Leave one of them out.")
    rows = Storage(n, working_dtype(op), op.device, None if storage is None else Path(storage))
    product, random = _product(op, rows.home), own_generator(op, generator)
    run: ThickRestart | LOBPCG
    if method == "lanczos":
        if state is not None:
            run = ThickRestart.resume(op, product, wanted, rows, state)
        else:
            start = normals(op, 1, random)[0] if v0 is None else _vectors(op, v0).sum(0)
            run = ThickRestart.start(op, product, wanted, rows, random, _basis_size(n, k, basis_size), start)
        run.search = search_copies
    else:
        precondition = _same if preconditioner is None else flat_product(preconditioner)
        if state is not None:
            run = LOBPCG.resume(op, product, precondition, wanted, state)
        else:
            start = normals(op, min(n, k + max(2, k // 4)), random)  # a few more than are wanted speed all of them up
            if v0 is not None:
                start = torch.cat([_vectors(op, v0), start])[: len(start)]
            run = LOBPCG.start(op, product, precondition, wanted, start)
    identity = {
        "method": torch.tensor(_METHODS.index(method)),
        "k": torch.tensor(k),
        "which": torch.tensor(list(which.encode())),
    }
    with progress_bar(None, f"eigsh, {k} pairs", progress) as bar:
        done, step = run.settled(), 0
        while not done and (run.products + k < most or _too_few(run, k)):
            before = run.products
            done = run.step()
            bar.update(run.products - before)
            step += 1
            if checkpoint is not None and step % 10 == 0:
                checkpoint(identity | run.state())
    vectors, size = run.result()
    return finish(op, product, rows, vectors, wanted, size, run.products, identity | run.state(), done, on_failure)


def _product(op: LinearOperator, home: torch.device) -> FlatProduct:
    """Products with vectors that are kept on another device."""
    product = flat_product(op, default_batch(op, None))
    return product if home == op.device else lambda x: product(x.to(op.device)).to(home)


def _same(x: Tensor) -> Tensor:
    return x


def _too_few(run: ThickRestart | LOBPCG, k: int) -> bool:
    return isinstance(run, ThickRestart) and run.count < k


def _check_method(op: LinearOperator, method: str, which: Which, preconditioner: LinearOperator | None) -> None:
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method is 'lanczos' or 'lobpcg', not {method!r}.")
    if method == "lanczos" and preconditioner is not None:
        raise ValueError("Lanczos has no use for a preconditioner. Leave method out, or the preconditioner.")
    if method == "lobpcg" and which != "SA":
        raise ValueError(
            f"LOBPCG finds the smallest eigenvalues, not {which!r}. Take which='SA', of -op for the largest; an "
            "approximate inverse helps with the smallest only."
        )
    if preconditioner is not None and preconditioner.in_shape != op.in_shape:
        raise ValueError(f"The preconditioner acts on {preconditioner.in_shape}, {op!r} on {op.in_shape}.")


def _basis_size(n: int, k: int, basis_size: int | None) -> int:
    if basis_size is None:
        basis_size = max(3 * k, 2 * k + 20)
    elif basis_size < k + 2 and basis_size < n:
        raise ValueError(f"basis_size={basis_size} leaves no room beside {k} pairs; take at least {k + 2}.")
    return min(basis_size, n)


def _vectors(op: LinearOperator, v0: Tensor) -> Tensor:
    """``(*in_shape)`` or ``(j, *in_shape)`` as rows."""
    if tuple(v0.shape) not in (op.in_shape, (*v0.shape[:1], *op.in_shape)):
        raise ValueError(f"v0 for {op!r} has the shape {op.in_shape} or (j, *{op.in_shape}), not {tuple(v0.shape)}.")
    return v0.detach().reshape(-1, op.shape[1]).to(op.device, working_dtype(op))


def _check_state(state: dict[str, Tensor], op: LinearOperator, k: int, which: Which, method: str) -> None:
    stored = (int(state["k"]), bytes(state["which"].tolist()).decode(), _METHODS[int(state["method"])])
    if stored != (k, which, method):
        raise ValueError(
            f"The state is that of k={stored[0]}, which={stored[1]!r}, method={stored[2]!r}; it cannot go on with "
            f"k={k}, which={which!r}, method={method!r}."
        )
    length = state["basis" if method == "lanczos" else "x"].shape[1]
    if length != op.shape[1]:
        raise ValueError(f"The state is that of an operator of size {length}, not of {op!r}.")
