"""Eigenbases of a stack's factors, one per axis, and the averages that are kept in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from precond.gradient.matrices import eigenbasis, improved_basis, multiply
from precond.gradient.optimizer import State, state_zeros


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


def eigenbases(state: State, axes: Iterable[int]) -> State:
    """The eigenvectors of each ``factor.k``, as ``basis.k``; see :func:`~precond.gradient.matrices.eigenbasis`.

    Raises:
        SolverError: If a decomposition fails.
    """
    return {f"basis.{k}": eigenbasis(state[f"factor.{k}"]) for k in axes}


def improve_bases(state: State, axes: Iterable[int]) -> State:
    """One step of orthogonal iteration on every ``basis.k``; ``exp_avg``, which is kept in these bases, turns along.

    Raises:
        SolverError: If a factorisation fails.
    """
    old = {k: state[f"basis.{k}"] for k in axes}
    new = {k: improved_basis(state[f"factor.{k}"], basis) for k, basis in old.items()}
    average = state["exp_avg"]
    per_axis = {k: average[0].numel() // basis.shape[-1] for k, basis in old.items()}
    # From one basis to the other by their product (n, n), or by way of the parameter's own axes: what costs less.
    far = {k for k, others in per_axis.items() if others < old[k].shape[-1]}
    average = multiply(average, {k: old[k] for k in far})
    turns = {k: basis if k in far else torch.bmm(old[k].mT, basis) for k, basis in new.items()}
    return {"exp_avg": multiply(average, turns, transpose=True), **{f"basis.{k}": basis for k, basis in new.items()}}
