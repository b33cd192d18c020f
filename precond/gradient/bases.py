"""Eigenbases of a stack's factors, one per axis, and the averages that are kept in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from precond.gradient.matrices import improved_basis, multiply, spectrum
from precond.gradient.optimizer import State, state_zeros
from precond.gradient.stacks import write


def initial_bases(p: Tensor, sizes: Mapping[int, int]) -> State:
    """For each axis a factor of zeros and the identity as its basis.

    Args:
        p: The parameter, for precision and device.
        sizes: Axis -> size.
    """
    state: State = {}
    for k, n in sizes.items():
        state[f"factor.{k}"] = state_zeros(p, (n, n))
        state[f"basis.{k}"] = torch.eye(n, dtype=state[f"factor.{k}"].dtype, device=p.device)
    return state


def eigenbases(state: State, axes: Iterable[int]) -> None:
    """Write the eigenvectors of each ``factor.k`` into ``basis.k``.

    Raises:
        SolverError: If a decomposition fails; nothing is written then.
    """
    write(state, {f"basis.{k}": spectrum(state[f"factor.{k}"])[1] for k in axes})


def improve_bases(state: State, axes: Iterable[int]) -> None:
    """One step of orthogonal iteration on every ``basis.k``; ``exp_avg``, which is kept in these bases, turns along.

    Raises:
        SolverError: If a factorisation fails; nothing is written then.
    """
    new = {k: improved_basis(state[f"factor.{k}"], state[f"basis.{k}"]) for k in axes}
    turns = {k: torch.bmm(state[f"basis.{k}"].mT, basis) for k, basis in new.items()}
    turned = multiply(state["exp_avg"], turns, transpose=True)
    write(state, {"exp_avg": turned, **{f"basis.{k}": basis for k, basis in new.items()}})
