"""Eigenbases of a stack's factors, one per axis, and the averages that are kept in them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from precond.gradient.matrices import improved_basis, multiply, spectrum
from precond.gradient.optimizer import State
from precond.gradient.stacks import write


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
