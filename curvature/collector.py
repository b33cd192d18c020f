"""From one forward pass to statistics: signals back to every use, samples to every block's estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.block import Block, Part, Place
from curvature.estimator import CurvatureEstimator, Form
from curvature.parameters import Parameters
from curvature.plan import Group, Plan
from curvature.recorder import Recorder
from curvature.samples import OneHot, Outer, PerSample, Samples
from curvature.signals import Signals
from solvers import BlockDiagonal, Diagonal, LinearOperator

Apart = Literal["one by one", "signs"]


class Collector:
    """The estimates of all blocks of a model, fed pass by pass.

    Args:
        parameters: The tracked parameters.
        make: Called once per block, when it is first seen, for its estimate.
        joint: Keep weight and bias of a layer in one block.
        apart: How uses that do not keep the examples apart (a table of positions, an operation without a rule) get
            per-sample gradients for ``exact`` and ``empirical`` signals: ``"one by one"``, exact, a backward pass per
            example; or ``"signs"``: one pass with random signs, unbiased. Sampled signals need neither.
    """

    def __init__(
        self,
        parameters: Parameters,
        make: Callable[[Block, Form], CurvatureEstimator],
        *,
        joint: bool = True,
        apart: Apart = "one by one",
    ) -> None:
        self.parameters = parameters
        self.make = make
        self.apart = apart
        self.plan = Plan(parameters, joint)
        self.estimators: dict[str, CurvatureEstimator] = {}
        self.operations: dict[str, tuple[str, ...]] = {}  # what each block was used by

    def collect(
        self,
        recorder: Recorder,
        output: Tensor,
        signals: Signals,
        counted: set[Any] | None = None,
        scale: Tensor | None = None,
    ) -> set[str]:
        """Send the signals of one batch back and update the estimates of the blocks they reach.

        Args:
            recorder: Uses in the forward pass that led to ``output``.
            output: What the loss saw, attached to its graph.
            signals: What is sent back.
            counted: Uses whose inputs and weight counted before, because another loss saw the same pass; extended.
            scale: Factor for all signals (the divisors of several losses differ).

        Returns:
            Names of the blocks that were reached.
        """
        counted = set() if counted is None else counted
        groups = self.plan.assign(recorder.sites, recorder.unknown)
        mixed = signals.kind != "mc" and (signals.examples > 1)
        interact = recorder.examples_interact and self.apart == "one by one"
        together = [g for g in groups if not (mixed and (interact or self._mixes(g, signals.examples)))]
        apart = [g for g in groups if g not in together]
        reached: set[str] = set()
        if together:
            reached |= self._send(together, output, signals, iter(signals), counted, scale, merge=False)
        if apart:
            sent = signals.one_by_one() if self.apart == "one by one" else self._signed(signals)
            reached |= self._send(apart, output, signals, sent, counted, scale, merge=True)
        return reached

    def commit(self, ema: float) -> None:
        """Fold the current step into all estimates."""
        for estimator in self.estimators.values():
            estimator.commit(ema)

    def operator(self, scale: Tensor | float = 1.0) -> BlockDiagonal:
        """All blocks, times ``scale``, on the flat parameter vector; parameters that were never used count zero."""
        sizes = {name: p.numel() for name, p in self.parameters.items()}
        blocks: list[LinearOperator] = []
        places: list[Place] = []
        for estimator in self.estimators.values():
            operator = estimator.operator()
            blocks.append(operator if isinstance(scale, float) and scale == 1.0 else operator * scale)
            places.append(Place.of(estimator.block, self.parameters.starts, sizes))
        dtype = blocks[0].dtype if blocks else torch.float32
        for operator in blocks:
            dtype = torch.promote_types(dtype, operator.dtype)
        blocks = [operator.to(dtype) for operator in blocks]
        for block in self._uncovered():
            zeros = torch.zeros(block.shape, dtype=dtype, device=self.parameters.device)
            blocks.append(Diagonal(zeros))
            places.append(Place.of(block, self.parameters.starts, sizes))
        return BlockDiagonal(tuple(blocks), tuple(places), self.parameters.size)

    def _uncovered(self) -> list[Block]:
        """Segments of parameters that belong to no block."""
        covered: dict[str, list[tuple[int, int]]] = {name: [] for name in self.parameters}
        for estimator in self.estimators.values():
            for part in estimator.block.parts:
                covered[part.name].append((part.start, part.start + part.numel))
        gaps = []
        for name, spans in covered.items():
            position = 0
            for start, stop in [*sorted(spans), (self.parameters[name].numel(),) * 2]:
                if start > position:
                    n = start - position
                    gaps.append(Block(f"{name}[{position}:{start}]", (Part(name, position, (n,), (0,), (n,)),)))
                position = max(position, stop)
        return gaps

    def _send(
        self,
        groups: list[Group],
        output: Tensor,
        signals: Signals,
        sent: Iterator[Tensor],
        counted: set[Any],
        scale: Tensor | None,
        merge: bool,
    ) -> set[str]:
        sites = list({id(use.site): use.site for group in groups for use in group.uses}.values())
        generic = [self.parameters[g.block.name] for g in groups if not g.uses]
        targets: list[Any] = [*(site.edge for site in sites), *generic]
        valid = self._valid(sites, output, signals)
        cache: dict[tuple[int, str], Tensor | OneHot] = {}
        reached: set[str] = set()
        new = {group.block.name for group in groups if not _keys(group) <= counted}
        for index, signal in enumerate(sent):
            signal = signal if scale is None else signal * scale.to(signal.dtype)
            gradients = torch.autograd.grad(output, targets, signal, retain_graph=True, allow_unused=True)
            by_site = {id(site): g for site, g in zip(sites, gradients, strict=False)}
            by_name = dict(zip([g.block.name for g in groups if not g.uses], gradients[len(sites) :], strict=True))
            for group in groups:
                uses = self._uses(group, by_site, by_name, valid, cache)
                if not uses:
                    continue
                if merge or len({use.examples for use in uses}) > 1:
                    uses = [_merged(use) for use in uses]
                estimator = self._estimator(group)
                first = index == 0 and group.block.name in new
                estimator.update(Samples(tuple(uses), signals.terms.total, first))
                if index == 0:
                    reached.add(group.block.name)
                    counted |= _keys(group)
        return reached

    def _uses(
        self,
        group: Group,
        by_site: Mapping[int, Tensor | None],
        by_name: Mapping[str, Tensor | None],
        valid: dict[int, Tensor | None],
        cache: dict[tuple[int, str], Tensor | OneHot],
    ) -> list[Outer | PerSample]:
        if not group.uses:
            gradient = by_name[group.block.name]
            return [] if gradient is None else [PerSample(gradient.reshape(1, 1, -1))]
        uses: list[Outer | PerSample] = []
        for entry in group.uses:
            site, gradient = entry.site, by_site[id(entry.site)]
            if gradient is None:
                continue
            sample = site.use(entry.piece, gradient.reshape(1, *site.output_shape), valid.get(id(site)), cache)
            if entry.flipped:
                outer = isinstance(sample, Outer)
                sample = replace(sample, flipped=True) if outer else PerSample(sample.gradients.mT)
            uses.append(sample)
        return uses

    def _valid(self, sites: list[Any], output: Tensor, signals: Signals) -> dict[int, Tensor | None]:
        """Which positions of each site count.

        A position whose loss term is masked out counts in no factor if nothing depends on it either: if a signal on
        all valid terms comes back as exact zeros there.
        """
        mask = signals.mask
        if bool(mask.all()) or not sites:
            return {}
        rows = signals.terms.rows(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output))
        probe = signals.terms.unrows(rows * signals.terms.mask.unsqueeze(-1))
        gradients = torch.autograd.grad(
            output, [site.edge for site in sites], probe, retain_graph=True, allow_unused=True
        )
        out: dict[int, Tensor | None] = {}
        for site, gradient in zip(sites, gradients, strict=True):
            if gradient is None:
                continue
            g = site.row_gradients(gradient.reshape(1, *site.output_shape))
            if g is None:
                continue
            reached = (g != 0).any(-1)[0]  # (n, s)
            if reached.shape == mask.shape:
                reached = reached | mask
            elif reached.shape[0] == mask.shape[0]:
                reached = reached | mask.any(-1, keepdim=True)
            out[id(site)] = reached
        return out

    def _mixes(self, group: Group, examples: int) -> bool:
        """Whether some use of the block does not keep the examples apart."""
        return not group.uses or any(not use.site.keeps_examples(examples) for use in group.uses)

    def _signed(self, signals: Signals) -> Iterator[Tensor]:
        """Signals with a random sign per example: squares of their sums have no cross terms in expectation."""
        generator = signals.generator or torch.Generator(device=signals.terms.output.device).manual_seed(0)
        for signal in signals:
            rows = signals.terms.rows(signal).reshape(signals.examples, -1)
            sign = torch.randint(0, 2, (signals.examples, 1), generator=generator, device=generator.device) * 2 - 1
            yield signals.terms.unrows((rows * sign.to(rows)).reshape(signals.terms.shape))

    def _estimator(self, group: Group) -> CurvatureEstimator:
        name = group.block.name
        if name not in self.estimators:
            self.estimators[name] = self.make(group.block, group.form)
            self.operations[name] = group.operations
        return self.estimators[name]


def _keys(group: Group) -> set[Any]:
    """What tells whether the uses of a group were counted before."""
    return {id(use.site) for use in group.uses} or {group.block.name}


def _merged(use: Outer | PerSample) -> Outer | PerSample:
    """A use whose examples count as one: what each signal reached belongs to a single example, or is unbiased."""
    if isinstance(use, PerSample):
        return PerSample(use.gradients.sum(1, keepdim=True))
    a = use.a
    if isinstance(a, OneHot):
        keep = None if a.keep is None else a.keep.reshape(1, -1)
        a = OneHot(a.index.reshape(1, -1), a.size, keep)
    else:
        a = a.flatten(-3, -2).unsqueeze(-3)
    valid = None if use.valid is None else use.valid.reshape(1, -1)
    return replace(use, a=a, g=use.g.flatten(-3, -2).unsqueeze(-3), valid=valid)
