r"""Lengths of momenta in the metric of the curvature, :math:`v^\top M v`, where that metric is new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature import Block
from curvature.model.parameters import Parameters
from precond.layerwise.blocks.preconditioner import Preconditioner, triangles_of
from precond.layerwise.blocks.stacks import read_together
from precond.step.trust_region import dot, reference_lr
from solvers import Eigen, LinearOperator


@dataclass(frozen=True)
class Momenta:
    """The momenta of a step.

    Attributes:
        parameters: Those that have curvature.
        state: Of each parameter; has its ``momentum_buffer``, and its ``length`` where that was measured.
        groups: Parameter groups.
    """

    parameters: Parameters
    state: Mapping[Tensor, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]

    def of_block(
        self,
        preconditioner: Preconditioner,
        metric: Callable[[], LinearOperator | None],
        *,
        renewed: bool,
        counts: bool,
        whole: Mapping[str, Tensor] | None = None,
    ) -> dict[Tensor, Tensor]:
        r"""The length of a block's momentum, where its metric M is new or it was never measured.

        A block counts as a whole, for the first of its parameters with the largest rate.

        Args:
            preconditioner: Of the block.
            metric: Gives M, the damped C, or its inverse as triangles.
            renewed: Whether it is new.
            counts: Whether this process is the one that measures the block.
            whole: The momenta by parameter's name, where those of the state are shards.
        """
        momenta = self._to_measure(preconditioner, renewed)
        if not momenta:
            return {}
        block, names = preconditioner.estimator.block, list(momenta)
        if counts:
            momenta = momenta if whole is None else {n: whole[n] for n in names}
            measure = metric()
            assert measure is not None
            length = _length(block.read(self._with_zeros(block, momenta)), measure)
        else:
            length = torch.zeros((), dtype=torch.float64, device=self.parameters[names[0]].device)
        return self._shares(names, length)

    def of_stack(self, preconditioners: Sequence[Preconditioner], metric: LinearOperator) -> list[dict[Tensor, Tensor]]:
        """:meth:`of_block` of blocks of one shape, whose metrics are new and one operator on a stack ``(k, ...)``."""
        known = [self._to_measure(each, renewed=True) for each in preconditioners]
        if not any(known):
            return [{} for _ in known]
        blocks = [each.estimator.block for each in preconditioners]
        v = {
            n: x
            for block, momenta in zip(blocks, known, strict=True)
            for n, x in self._with_zeros(block, momenta).items()
        }
        lengths = _lengths(read_together(blocks, v), metric).unbind()
        return [self._shares(list(m), length) if m else {} for m, length in zip(known, lengths, strict=True)]

    def _to_measure(self, preconditioner: Preconditioner, renewed: bool) -> dict[str, Tensor]:
        """The momenta of a block by parameter's name, first that which counts; none where they are not measured now."""
        names = preconditioner.estimator.block.names
        states = {name: state for name in names if (state := self.state.get(self.parameters[name])) is not None}
        if not renewed and all("length" in state or "momentum_buffer" not in state for state in states.values()):
            return {}
        momenta = {name: s["momentum_buffer"] for name, s in states.items() if "momentum_buffer" in s}
        if not momenta or preconditioner.absent or not preconditioner.keeps_curvature:
            return {}  # measured with the plain gradients, or carried on from the step before
        if len(self.groups) > 1:
            rate = {p: reference_lr(group) for group in self.groups for p in group["params"]}
            return dict(sorted(momenta.items(), key=lambda entry: -rate[self.parameters[entry[0]]]))
        return momenta

    def _with_zeros(self, block: Block, momenta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: momenta[n] if n in momenta else _zeros(self.parameters[n]) for n in block.names}

    def _shares(self, names: Sequence[str], length: Tensor) -> dict[Tensor, Tensor]:
        """The length of a block for the first of its parameters, and none for the others."""
        rest = torch.zeros_like(length)
        return {self.parameters[name]: rest if i else length for i, name in enumerate(names)}

    def without_curvature(self, preconditioners: Iterable[Preconditioner]) -> dict[Tensor, Tensor]:
        """The lengths of momenta whose gradients go through as they are, where that was never measured."""
        known = {p: self.state[p] for p in self.parameters.values() if p in self.state}
        wanted = {p for p, state in known.items() if "momentum_buffer" in state and "length" not in state}
        for preconditioner in preconditioners if wanted else ():
            if not preconditioner.absent:
                wanted -= {self.parameters[name] for name in preconditioner.estimator.block.names}
        out: dict[Tensor, Tensor] = {}
        for p in wanted:
            v = known[p]["momentum_buffer"]
            out[p] = dot(v, v)
        return out


def _length(x: Tensor, metric: LinearOperator) -> Tensor:
    r""":math:`\langle x, M x \rangle`, by M or by the triangles of its inverse."""
    if (half := _half(x, metric)) is not None:
        return torch.linalg.vector_norm(half).double().square()
    x = x.to(metric.dtype)
    if isinstance(metric, Eigen):  # half the products
        x = metric.basis.adjoint() @ x
        return dot(metric.values * x, x)
    return dot(metric @ x, x)


def _lengths(x: Tensor, metric: LinearOperator) -> Tensor:
    r""":math:`\langle x, M x \rangle` of each of a stack ``(k, ...)``, ``(k,)``, as :func:`_length` takes it."""
    if (half := _half(x, metric)) is not None:
        return torch.linalg.vector_norm(half, dim=(1, 2)).double().square()
    x = x.to(metric.dtype)
    return ((metric @ x).double() * x).flatten(1).sum(1)


def _half(x: Tensor, metric: LinearOperator) -> Tensor | None:
    r""":math:`L_B^\top X L_A`, whose squared norm is the length, where M is known by the triangles of its inverse."""
    if (triangles := triangles_of(metric)) is None:
        return None
    left, right = triangles
    return right.half(left.half(x.to(left.dtype)).mT)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
