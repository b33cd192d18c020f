"""A recorded pass by examples: the factors of their gradients, from which norms and gradients are formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.collector import Collector
from curvature.layers.block import Block, BlockPlace
from curvature.layers.recorder import Recorder
from curvature.layers.samples import OneHot, Outer, Samples
from curvature.losses import Terms, loss_for
from curvature.losses.picked import along, checked_axis
from curvature.losses.signals import Signals
from curvature.matrices.problem import Evaluation
from curvature.model.parameters import Parameters
from curvature.structures.estimator import CurvatureEstimator, Form
from solvers import LinearOperator
from solvers.precision import widen


class KeptSamples(CurvatureEstimator):
    """Keeps the samples of a block instead of estimating anything from them."""

    structure = "samples"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.samples: list[Samples] = []

    def update(self, samples: Samples) -> None:
        self.samples.append(samples)

    def count(self, weight: Tensor | float) -> None:
        """Does nothing: samples are kept, not averaged."""

    def commit(self, ema: float) -> None:
        """Does nothing: samples are kept, not averaged."""

    def discard(self) -> None:
        self.samples = []

    def finite(self) -> Tensor:
        return torch.tensor(True)

    @property
    def ready(self) -> bool:
        return bool(self.samples)

    def operator(self) -> LinearOperator:
        raise NotImplementedError("samples are no operator.")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the state is empty."""


class Keeper:
    """Keeps the samples of every block, batch by batch.

    Args:
        parameters: The tracked parameters.
        joint: Whether weight and bias of a layer form one block.
        vectorised: Samples may hold several signals, which come back together; else each holds one.
    """

    def __init__(self, parameters: Parameters, joint: bool = False, vectorised: bool = False) -> None:
        self._kept: list[KeptSamples] = []
        self._collector = Collector(parameters, self._make, joint=joint, vectorised=vectorised)

    def _make(self, block: Block, form: Form) -> KeptSamples:
        self._kept.append(KeptSamples(block))
        return self._kept[-1]

    def samples(self, examples: Examples, signals: Sequence[Tensor]) -> list[tuple[Block, list[Samples]]]:
        """The factors of each block's gradients; in each, the rows are signals, and examples within a signal."""
        if examples.empty:
            return []
        given = Signals.of(examples.terms, "empirical", batch=examples.batch, given=tuple(signals))
        for entry in self._kept:
            entry.discard()
        self._collector.collect(examples.recorder, examples.output, given)
        self._collector.forget()
        return [(entry.block, entry.samples) for entry in self._kept if entry.samples]


class Examples:
    r"""A recorded pass in which signals can be followed back to the gradient of each example.

    The gradient of example n under a signal v is :math:`J^\top v` with all entries of v but those of n set to zero,
    whether or not the examples interact inside the model.

    Args:
        parameters: The tracked parameters.
        recorder: Their uses.
        output: The model's output, with its graph.
        terms: Which entries of the output belong to which example.
        batch: Number of examples, where the loss took each of their positions for one.
        empty: Whether no term counts: every gradient of the loss is zero.
        axis: Axis of the output along which the examples lie, where all of its entries are followed.
    """

    def __init__(
        self,
        parameters: Parameters,
        recorder: Recorder,
        output: Tensor,
        terms: Terms,
        batch: int | None,
        empty: bool = False,
        axis: int = 0,
    ) -> None:
        self.parameters, self.recorder, self.output, self.terms, self.batch = parameters, recorder, output, terms, batch
        self.empty, self.axis = empty, axis

    @classmethod
    def of(cls, evaluation: Evaluation) -> Examples:
        """The examples of a recorded evaluation."""
        recorder, terms = evaluation.recorder, evaluation.through_output()
        assert recorder is not None
        return cls(evaluation.problem.parameters, recorder, evaluation.output, terms, recorder.batch, evaluation.empty)

    @classmethod
    def along(cls, output: Tensor, parameters: Parameters, recorder: Recorder, axis: int = 0) -> Examples:
        """Each entry along an axis of an output is an example."""
        if output.dim() == 0:
            raise ValueError("the output is a single number: it needs a first axis that counts examples.")
        rows = output.detach()
        terms = loss_for(nn.MSELoss()).terms(output, rows)  # only says which entries belong together
        return cls(parameters, recorder, output, along(terms, axis), None, axis=checked_axis(axis, output.dim()))

    @property
    def number(self) -> int:
        """Number of examples."""
        return Signals.of(self.terms, "empirical", batch=self.batch).examples

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output of one example."""
        return (*self.output.shape[: self.axis], *self.output.shape[self.axis + 1 :])

    def unit_signals(self) -> list[Tensor]:
        """Unit signals, one for each output of an example, in row-major order."""
        eye = torch.eye(math.prod(self.out_shape), dtype=self.output.dtype, device=self.output.device)
        one = eye.reshape(-1, 1, *self.out_shape).expand(-1, self.number, *self.out_shape)
        return list(one.movedim(1, 1 + self.axis).contiguous())

    def samples(self, signals: Sequence[Tensor], vectorised: bool = False) -> list[tuple[Block, list[Samples]]]:
        """The factors of each block's gradients under some output-shaped signals; see :class:`Keeper`."""
        return Keeper(self.parameters, vectorised=vectorised).samples(self, signals)

    def gradients(self, signals: Sequence[Tensor]) -> Tensor:
        """Per-sample gradients ``(len(signals), n, P)``, in the parameters' dtype."""
        return self.kept(signals).rows(slice(0, len(signals)), slice(0, self.number))

    def by_parameter(self, signals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per-sample gradients ``{name: (len(signals), n, *shape)}``."""
        return self.kept(signals).by_parameter(slice(0, len(signals)), slice(0, self.number))

    def kept(self, signals: Sequence[Tensor]) -> KeptGradients:
        """The factors of all per-sample gradients, which can form any of them."""
        blocks = self.samples(signals, vectorised=True)
        return KeptGradients(self.parameters, blocks, len(signals), self.number)

    def norms(self, signals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Squared norms of the gradients with respect to each parameter, ``{name: (len(signals), n)}``."""
        out = {
            name: torch.zeros(len(signals), self.number, dtype=widen(p.new_empty(0)).dtype, device=p.device)
            for name, p in self.parameters.items()
        }
        for block, samples in self.samples(signals):
            rows = torch.cat([squared_norms(entry) for entry in samples])
            out[block.parts[0].name] += _by_signal(rows, len(signals), self.number)
        return out


@dataclass(frozen=True)
class KeptGradients:
    """Per-sample gradients by their factors: inputs of layers, and gradients of their outputs.

    Attributes:
        parameters: The tracked parameters.
        blocks: The factors of the gradients of each block; rows are signals, and examples within a signal.
        signals: Number of signals.
        examples: Number of examples.
    """

    parameters: Parameters
    blocks: list[tuple[Block, list[Samples]]]
    signals: int
    examples: int

    def rows(self, signals: slice, examples: slice) -> Tensor:
        """Gradients ``(k, m, P)`` of some examples under some signals, in the parameters' dtype."""
        p, lead = self.parameters, (signals.stop - signals.start, examples.stop - examples.start)
        out = torch.zeros(*lead, p.size, dtype=p.dtype, device=p.device)
        for block, samples in self.blocks:
            (part,) = block.parts
            start = p.starts[part.name]
            formed = self._formed(samples, signals, examples).to(p.dtype).reshape(*lead, *block.shape)
            part.write(formed, out[..., start : start + p[part.name].numel()])
        return out

    def by_parameter(self, signals: slice, examples: slice) -> dict[str, Tensor]:
        """The same for each parameter, ``{name: (k, m, *shape)}``."""
        lead = (signals.stop - signals.start, examples.stop - examples.start)
        out: dict[str, Tensor] = {}
        for block, samples in self.blocks:
            (part,) = block.parts
            p = self.parameters[part.name]
            rows = self._formed(samples, signals, examples).reshape(*lead, *block.shape)
            if part.numel == p.numel() and part.permutation == tuple(range(len(part.split))):
                out[part.name] = rows.reshape(*lead, *p.shape)  # no copy: these are the largest tensors around
            else:
                if part.name not in out:
                    out[part.name] = rows.new_zeros(*lead, *p.shape)
                part.write(rows, out[part.name].view(*lead, p.numel()))
        return {n: out[n] if n in out else p.new_zeros(*lead, *p.shape) for n, p in self.parameters.items()}

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Sums of the squared entries of every gradient times weights ``(P,)``, ``(signals, examples)``."""
        p = self.parameters
        sizes = {name: parameter.numel() for name, parameter in p.items()}
        total = weights.new_zeros(self.signals, self.examples)
        for block, samples in self.blocks:
            some = BlockPlace.of(block, p.starts, sizes).gather(weights)
            squares = torch.cat([entry.weighted_squares(some) for entry in samples])
            total += _by_signal(squares, self.signals, self.examples).to(total.dtype)
        return total

    def _formed(self, samples: list[Samples], signals: slice, examples: slice) -> Tensor:
        """The rows of one block, ``(k * m, *block shape)``."""
        found, position = [], 0
        for entry in samples:
            uses = entry.aligned()
            k, n = uses[0].signals, uses[0].examples
            if n == self.examples:  # a signal for all examples
                first = position // n
                chosen = slice(max(0, signals.start - first), max(0, min(k, signals.stop - first)))
                uses, part = tuple(use.only(chosen) for use in uses), examples
            else:  # a signal for each example
                row = torch.arange(position, position + k)
                signal, example = row // self.examples, row % self.examples
                inside = (signals.start <= signal) & (signal < signals.stop)
                inside &= (examples.start <= example) & (example < examples.stop)
                uses, part = tuple(use.only(inside.nonzero().flatten()) for use in uses), slice(0, n)
            position += k * n
            if uses[0].signals:
                gradients = (use.gradient(part.start, part.stop) for use in uses)
                found.append(reduce(torch.add, gradients).flatten(0, 1))
        _check_rows(position, self.signals, self.examples)
        return found[0] if len(found) == 1 else torch.cat(found)


def _by_signal(rows: Tensor, signals: int, examples: int) -> Tensor:
    _check_rows(len(rows), signals, examples)
    return rows.reshape(signals, examples, *rows.shape[1:])


def _check_rows(rows: int, signals: int, examples: int) -> None:
    if rows != signals * examples:
        raise RuntimeError(
            f"{rows} gradients came back for {signals} signals on {examples} examples: part of the model returns no "
            "gradient for some signals. Leave its parameters out with params=."
        )


def squared_norms(samples: Samples) -> Tensor:
    r"""Squared norms of the per-sample gradients, ``(k * n,)``.

    For one use of a layer with S positions,
    :math:`\|\sum_s g_s a_s^\top\|^2 = \sum_{s,t} \langle g_s, g_t \rangle \langle a_s, a_t \rangle`, which needs no
    gradient: ``S^2 (o + i)`` operations and ``S^2`` numbers per example. Where the gradient is smaller, it is formed.
    """
    uses = samples.aligned()
    if len(uses) == 1 and isinstance(use := uses[0], Outer):
        i, o, S = use.a.size if isinstance(use.a, OneHot) else use.a.shape[-1], use.g.shape[-1], use.positions
        if S * (i + o) < i * o or isinstance(use.a, OneHot):
            g = widen(use.g)
            total = (inner(g, g) * input_products(use).unsqueeze(-4)).sum((-2, -1))  # (*, k, n)
            return total.reshape(-1, *total.shape[-2:]).sum(0).flatten()
    return torch.cat([widen(chunk).flatten(1).square().sum(1) for chunk in samples.gradients()])


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of positions, ``(..., s, d), (..., t, d)`` to ``(..., s, t)``."""
    return left @ right.mT


def input_products(use: Outer) -> Tensor:
    """Inner products of the inputs at the positions of each example, ``(*, n, s, s)``."""
    if isinstance(use.a, OneHot):
        keep = torch.ones_like(use.a.index) if use.a.keep is None else use.a.keep
        same = use.a.index.unsqueeze(-1) == use.a.index.unsqueeze(-2)
        return same * (keep.unsqueeze(-1) * keep.unsqueeze(-2)).to(widen(use.g).dtype)
    a = widen(use.a)
    return inner(a, a) + float(use.ones)
