"""From one forward pass to statistics: signals back to every use, samples to every block's estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.estimation import checks, snapshot
from curvature.estimation.plan import BlockPlan, Group
from curvature.layers import Site
from curvature.layers.block import Block, BlockPart, BlockPlace
from curvature.layers.recorder import Recorder
from curvature.layers.samples import OneHot, Outer, PerSample, Samples
from curvature.losses.signals import Signals, stacked
from curvature.model.data import inspecting
from curvature.model.parameters import Parameters
from curvature.model.pullback import Pullback
from curvature.structures.estimator import CurvatureEstimator, Form
from solvers import BlockDiagonal, Diagonal, LinearOperator

Apart = Literal["one by one", "signs"]
#: Inputs of the uses in one pass, prepared once for all signals: by site and piece.
Cache = dict[tuple[int, str], Tensor | OneHot]
#: Bytes of output gradients that a vectorised backward pass of several signals may bring back, by type of device. It
#: saves the overhead of its calls; where a signal brings more by itself, there is nothing to save.
VECTORISED = {"cpu": 1 << 22, "cuda": 1 << 28}


class Backward:
    """The gradients of all uses in a backward pass that somebody else runs."""

    def __init__(self, groups: list[Group], signals: Signals) -> None:
        self.groups, self.signals = groups, signals
        self.gradients: dict[int, Tensor] = {}
        self._handles = []
        for site in _sites(groups):
            hook = partial(self._note, id(site), site.edge.output_nr)
            self._handles.append(site.edge.node.register_prehook(hook))

    def _note(self, key: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None and not inspecting():
            self.gradients[key] = gradient.detach()

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()


class Collector:
    """The estimates of all blocks of a model, fed pass by pass.

    Args:
        parameters: The tracked parameters.
        make: Called once per block, when it is first seen, for its estimate.
        joint: Keep weight and bias of a layer in one block.
        apart: How uses that do not keep the examples apart (a table of positions, an operation without a rule) get
            per-sample gradients for ``exact`` and ``empirical`` signals: ``"one by one"``, exact, a backward pass per
            example; or ``"signs"``: one pass with random signs, unbiased. Sampled signals need neither.
        vectorised: Send several signals through one vectorised pass where they are small; the estimates get samples of
            several signals at once.
    """

    def __init__(
        self,
        parameters: Parameters,
        make: Callable[[Block, Form], CurvatureEstimator],
        *,
        joint: bool = True,
        apart: Apart = "one by one",
        vectorised: bool = False,
    ) -> None:
        self.parameters = parameters
        self.vectorised = vectorised
        self.make = make
        self.exact = apart == "one by one"
        self._verified = False
        self.mixed_blocks: set[str] | None = None  # in training: blocks whose first pass mixed the examples
        self.plan = BlockPlan(parameters, joint)
        self.estimators: dict[str, CurvatureEstimator] = {}
        self.operations: dict[str, tuple[str, ...]] = {}  # what each block was used by
        self._forms: dict[str, Form] = {}
        self._batches: list[Tensor | float] = []  # weights of the step's batches so far
        self._seen: dict[str, list[int]] = {}  # which of them reached a block
        self.only: set[str] | None = None  # blocks that still learn, in later passes over a data set

    def collect(
        self,
        recorder: Recorder,
        output: Tensor,
        signals: Signals,
        counted: set[Any] | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> set[str]:
        """Send the signals of one batch back and update the estimates of the blocks they reach.

        Args:
            recorder: Uses in the forward pass that led to ``output``.
            output: What the loss saw, attached to its graph.
            signals: What is sent back.
            counted: Uses whose inputs and weight counted before, because another loss saw the same pass; extended.
            scale: Factor for all signals (the divisors of several losses differ).
            weight: Weight of the batch; by default what the loss divides by.

        Returns:
            Names of the blocks that were reached.
        """
        counted = set() if counted is None else counted
        new = not counted
        if new:
            self._batches.append(signals.terms.total if weight is None else weight)
        reached = self._collect(recorder, output, signals, counted, scale)
        if new and not reached and not self.exact:
            self._batches.pop()  # in training a loss of something else
        return reached

    def _collect(
        self, recorder: Recorder, output: Tensor, signals: Signals, counted: set[Any], scale: Tensor | None
    ) -> set[str]:
        cache: Cache = {}
        structure = self._structure(recorder, output, signals)
        groups = self._trusted(recorder, output, signals, structure, cache)
        if self.only is not None:
            groups = [group for group in groups if group.block.name in self.only]
        interact = recorder.examples_interact
        mixing = self._recall(
            "mixing", structure, groups, lambda: self._mixing(groups, output, signals, cache, interact)
        )
        if self.exact and not recorder.examples_interact:
            self._refuse_averages([g for g in groups if g.block.name in mixing], signals.examples)
        # In training examples may interact (a batch norm), and then it matters which root of the Hessian is sent.
        all_of_them = signals.stacks if self.exact else partial(stacked, iter(signals))
        if signals.kind == "mc" or not mixing:
            return self._send(groups, output, signals, all_of_them, counted, scale, cache, mixing)
        together = [g for g in groups if g.block.name not in mixing]
        apart = [g for g in groups if g.block.name in mixing]
        sent = partial(stacked, signals.one_by_one() if self.exact else self.signed(signals))
        reached = self._send(together, output, signals, all_of_them, counted, scale, cache, set())
        return reached | self._send(apart, output, signals, sent, counted, scale, cache, mixing)

    def survey(self, recorder: Recorder, output: Tensor, signals: Signals) -> None:
        """Make the estimates of the blocks that a pass reaches, without statistics; arguments as :meth:`collect`."""
        cache: Cache = {}
        groups = self._trusted(recorder, output, signals, self._structure(recorder, output, signals), cache)
        for group, uses in self._back(groups, output, signals.probe().unsqueeze(0), cache, {}):
            if uses:
                self._estimator(group)

    def _trusted(
        self, recorder: Recorder, output: Tensor, signals: Signals, structure: Hashable | None, cache: Cache
    ) -> list[Group]:
        """The blocks of a pass; uses that do not explain the gradients of the first one are not relied on."""
        groups = self.plan.assign(recorder.sites, recorder.unknown)
        if self._verified:
            return groups
        self._verified = True
        unexplained = self._recall(
            "unexplained", structure, groups, lambda: self._unexplained(groups, output, signals, cache)
        )
        if not self.plan.distrust({name: self._doubt(name, groups, output) for name in unexplained}):
            return groups
        return self.plan.assign(recorder.sites, recorder.unknown)

    def _doubt(self, name: str, groups: list[Group], output: Tensor) -> str:
        """Why the recorded uses of a parameter are not relied on."""
        rules = dict.fromkeys(op for group in groups if name in group.block.names for op in group.operations)
        unseen = ", ".join(checks.custom_functions(output, self.parameters[name]))
        if not rules:
            return f"no rule for {unseen or 'its use'}"
        return f"rule {', '.join(rules)} does not explain the gradient" + (f", used in {unseen} as well" * bool(unseen))

    def _structure(self, recorder: Recorder, output: Tensor, signals: Signals) -> Hashable | None:
        """What equal passes have in common as far as :mod:`.checks` goes; ``None`` for one by itself."""
        if not self.exact or type(signals) is not Signals or not bool(signals.mask.any(1).all()):
            return None
        found = checks.graph(output, self.parameters)
        if found is None:
            return None
        graph, numbers = found
        sites = tuple(
            (s.operation, s.refs, s.layout, s.output_shape, numbers.get(s.edge.node), s.edge.output_nr)
            for s in recorder.sites
        )
        terms = (type(signals.terms), signals.terms.shape, tuple(output.shape), signals.examples)
        return graph, sites, tuple(sorted(recorder.unknown)), recorder.examples_interact, terms

    def _recall(
        self, what: str, structure: Hashable | None, groups: list[Group], look: Callable[[], set[str]]
    ) -> set[str]:
        """What was found in a pass of this structure, or is found now."""
        if structure is None:
            return look()
        blocks = tuple((g.block.name, tuple((u.piece, u.flipped) for u in g.uses)) for g in groups)
        return checks.recall(self.parameters, (what, tuple(self.parameters), blocks, structure), look)

    def await_backward(self, recorder: Recorder, signals: Signals) -> Backward | None:
        """Wait for the user's own backward pass in place of sending a signal, where that tells as much.

        Returns:
            What will hold the gradients of all uses, or ``None`` if some block needs signals of its own.
        """
        groups = self.plan.assign(recorder.sites, recorder.unknown)
        if signals.kind != "empirical" or self.mixed_blocks is None:
            return None  # the first pass is looked at closely
        if any(_mixes(group, signals.examples) or group.block.name in self.mixed_blocks for group in groups):
            return None
        return Backward(groups, signals)

    def collect_backward(self, backward: Backward, factor: Tensor | float, counted: set[Any]) -> set[str]:
        """Update the estimates from the gradients of a backward pass that was waited for.

        Args:
            backward: What :meth:`await_backward` returned, after the pass.
            factor: Turns its gradients into those of the sum of all terms.
            counted: See :meth:`collect`.

        Returns:
            Names of the blocks that were reached.
        """
        square = torch.as_tensor(factor).square()
        if not counted:
            self._batches.append(backward.signals.terms.total)
        reached: set[str] = set()
        cache: Cache = {}
        mask = backward.signals.mask
        valid = {} if bool(mask.all()) else _valid(_sites(backward.groups), backward.gradients, mask)
        for group in backward.groups:
            uses = _samples(group, backward.gradients, valid, cache)
            if uses:
                first = not _keys(group) <= counted
                self._update(group, uses, first, factor=square)
                reached.add(group.block.name)
                counted |= _keys(group)
        return reached

    def settle(self) -> None:
        """The step's last batch was seen: blocks that some of its batches did not reach count those as well."""
        for name, seen in self._seen.items():
            for missed in set(range(len(self._batches))).difference(seen):
                if name in self.estimators:
                    self.estimators[name].count(self._batches[missed])
        self.forget()

    def forget(self) -> None:
        """Forget which batches the current step had."""
        self._batches, self._seen = [], {}

    def state(self) -> dict[str, Any]:
        """Everything that the next batch of a data set depends on, as tensors, numbers and strings."""
        return {
            "plan": self.plan.state(),
            "verified": self._verified,
            "batches": self._batches,
            "seen": self._seen,
            "only": None if self.only is None else sorted(self.only),
            "estimators": {
                name: {
                    "block": estimator.block.state(),
                    "form": self._forms[name],
                    "operations": self.operations[name],
                    "sums": snapshot.take(estimator),
                }
                for name, estimator in self.estimators.items()
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up :meth:`state`; the tensors move to the parameters' device."""
        device = self.parameters.device
        self.plan.restore(saved["plan"])
        self._verified, self._seen = saved["verified"], saved["seen"]
        self._batches = [b.to(device) if isinstance(b, Tensor) else b for b in saved["batches"]]
        self.only = None if saved["only"] is None else set(saved["only"])
        for name, known in saved["estimators"].items():
            self.estimators[name] = self.make(Block.from_state(name, known["block"]), known["form"])
            self.operations[name], self._forms[name] = known["operations"], known["form"]
            snapshot.restore(self.estimators[name], known["sums"], device)

    def commit(self, ema: float) -> None:
        """Fold the current step into all estimates."""
        for estimator in self.estimators.values():
            estimator.commit(ema)

    def operator(self, scale: Tensor | float = 1.0) -> BlockDiagonal:
        """All blocks, times ``scale``, on the flat parameter vector; parameters that were never used count zero."""
        sizes = {name: p.numel() for name, p in self.parameters.items()}
        blocks: list[LinearOperator] = []
        places: list[BlockPlace] = []
        for estimator in sorted(self.estimators.values(), key=lambda e: self.parameters.starts[e.block.parts[0].name]):
            operator = estimator.operator()
            blocks.append(operator if isinstance(scale, float) and scale == 1.0 else operator * scale)
            places.append(BlockPlace.of(estimator.block, self.parameters.starts, sizes))
        dtype = blocks[0].dtype if blocks else torch.float32
        for operator in blocks:
            dtype = torch.promote_types(dtype, operator.dtype)
        blocks = [operator.to(dtype) for operator in blocks]
        for block in self._uncovered():
            zeros = torch.zeros(block.shape, dtype=dtype, device=self.parameters.device)
            blocks.append(Diagonal(zeros))
            places.append(BlockPlace.of(block, self.parameters.starts, sizes))
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
                    gaps.append(Block(f"{name}[{position}:{start}]", (BlockPart(name, position, (n,), (0,), (n,)),)))
                position = max(position, stop)
        return gaps

    def _send(
        self,
        groups: list[Group],
        output: Tensor,
        signals: Signals,
        sent: Callable[[int], Iterator[Tensor]],
        counted: set[Any],
        scale: Tensor | None,
        cache: Cache,
        merged: set[str],
    ) -> set[str]:
        if not groups:
            return set()
        valid = self._valid(_sites(groups), output, signals)
        reached: set[str] = set()
        new = {group.block.name for group in groups if not _keys(group) <= counted}
        first = True
        for signal in sent(self._together(groups)):
            signal = signal if scale is None else signal * scale.to(signal.dtype)
            for group, uses in self._back(groups, output, signal, cache, valid):
                if not uses:
                    continue
                name = group.block.name
                self._update(group, uses, first and name in new, merge=name in merged)
                if first:
                    reached.add(name)
                    counted |= _keys(group)
            first = False
        return reached

    def _together(self, groups: list[Group]) -> int:
        """How many signals are sent together."""
        if not self.vectorised:
            return 1
        numbers = sum(math.prod(site.output_shape) for site in _sites(groups))
        numbers += sum(group.block.numel for group in groups if not group.uses)
        budget = VECTORISED.get(self.parameters.device.type, VECTORISED["cuda"])
        return max(1, budget // max(1, numbers * self.parameters.dtype.itemsize))

    def _update(self, group: Group, uses: list[Outer | PerSample], first: bool, **options: Any) -> None:
        if first:
            self._seen.setdefault(group.block.name, []).append(len(self._batches) - 1)
        self._estimator(group).update(Samples(tuple(uses), self._batches[-1], first, **options))

    def _back(
        self, groups: list[Group], output: Tensor, signal: Tensor, cache: Cache, valid: Mapping[int, Tensor]
    ) -> Iterator[tuple[Group, list[Outer | PerSample]]]:
        """Send signals ``(k, *output)`` back; every group with the samples of those of its uses that they reached."""
        sites = _sites(groups)
        generic = [g.block.name for g in groups if not g.uses]
        targets: list[Any] = [*(site.edge for site in sites), *(self.parameters[name] for name in generic)]
        if not targets:
            return
        pullback = Pullback([output], targets, self.vectorised)
        gradients = pullback.arriving([signal])
        self.vectorised = pullback.batched
        by_site = {id(site): g for site, g in zip(sites, gradients, strict=False)}
        by_name = dict(zip(generic, gradients[len(sites) :], strict=True))
        for group in groups:
            if group.uses:
                yield group, _samples(group, by_site, valid, cache, len(signal))
            else:
                gradient = by_name[group.block.name]
                yield group, [] if gradient is None else [PerSample(gradient.reshape(len(signal), 1, -1))]

    def _valid(self, sites: list[Site], output: Tensor, signals: Signals) -> dict[int, Tensor]:
        """Which positions of each site count.

        A position whose loss term is masked out counts in no factor if nothing depends on it either: if a signal on
        all valid terms comes back as exact zeros there.
        """
        probes = signals.probes() if sites else []
        if all(bool(mask.all()) for mask, _ in probes):
            return {}
        out: dict[int, Tensor] = {}
        for mask, probe in probes:
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                output, [site.edge for site in sites], probe, retain_graph=True, allow_unused=True
            )
            # Zeros everywhere: this loss is one of another part of the model.
            pairs = zip(sites, gradients, strict=True)
            arrived = {id(s): g for s, g in pairs if g is not None and (len(probes) == 1 or bool(g.any()))}
            for key, counts in _valid(sites, arrived, mask).items():
                out[key] = out[key] | counts if key in out else counts
        return out

    def _mixing(self, groups: list[Group], output: Tensor, signals: Signals, cache: Cache, interact: bool) -> set[str]:
        """Blocks with a use that does not keep the examples apart.

        Shapes tell where a use has no row, or several, for an example. Where the numbers must be exact, weights on the
        examples tell the rest (statistics over the batch, attention along the axis that was taken for the examples,
        tokens sent to experts): what arrives in the rows of an example must grow by the weight of that example.
        Training looks at its first pass only, and takes batch norms in train mode as if their statistics were fixed.
        """
        if signals.examples <= 1:
            return set()
        mixing = {group.block.name for group in groups if _mixes(group, signals.examples)}
        rest = [group for group in groups if group.block.name not in mixing]
        if not self.exact and (self.mixed_blocks is not None or interact):
            self.mixed_blocks = self.mixed_blocks or set()
            return mixing | self.mixed_blocks
        back = self._back(rest, output, signals.probe().unsqueeze(0), cache, {})
        plain = {group.block.name: [_by_example(use) for use in uses] for group, uses in back}
        for weights in signals.tags():
            for group, uses in self._back(rest, output, signals.probe(weights).unsqueeze(0), cache, {}):
                for use, rows in zip(uses, plain[group.block.name], strict=True):
                    expected = rows * weights.to(rows).unsqueeze(1)
                    off = torch.linalg.vector_norm(_by_example(use) - expected, dim=1)
                    tolerance = torch.finfo(rows.dtype).eps ** 0.5
                    if not (off <= tolerance * torch.linalg.vector_norm(expected, dim=1)).all():
                        mixing.add(group.block.name)
        if not self.exact:
            self.mixed_blocks = mixing
        return mixing

    def _refuse_averages(self, mixing: list[Group], examples: int) -> None:
        """Averages over the positions of an example need to know them; a table that no example has is one itself."""
        for group in mixing:
            if any(use.site.layout.batched for use in group.uses) and self._estimator(group).averages_positions:
                raise ValueError(
                    f"block {group.block.name}: sharing='reduce' averages over the positions of each example, but the "
                    f"rows of this layer do not fall into the {examples} examples along the leading axis (a model with "
                    "time or positions first, or rows picked by a mask). Use sharing='expand', for which it makes no "
                    "difference, or put the examples first (batch_first=True)."
                )

    def _unexplained(self, groups: list[Group], output: Tensor, signals: Signals, cache: Cache) -> set[str]:
        """Parameters whose gradient is not what their recorded uses add up to.

        A kernel written as a ``torch.autograd.Function`` is not seen by function modes; its parameters must be found
        by what autograd knows.
        """
        sites, items = _sites(groups), self.parameters.items()
        targets: list[Any] = [*(site.edge for site in sites), *(p for _, p in items)]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            output, targets, signals.probe(), retain_graph=True, allow_unused=True
        )
        arrived = {id(site): g for site, g in zip(sites, found, strict=False)}
        # Rounding is relative to the sizes of the terms, which may cancel.
        sizes = {key: None if g is None else g.abs() for key, g in arrived.items()}
        true = {name: g.to_dense() for (name, _), g in zip(items, found[len(sites) :], strict=True) if g is not None}
        known = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in items}
        bound = {name: torch.zeros_like(zero) for name, zero in known.items()}
        for group in groups:
            if not group.uses:
                known[group.block.name] = true.get(group.block.name, known[group.block.name])
            elif uses := _samples(group, arrived, {}, cache):
                total = _sum(use.total() for use in uses)
                group.block.write(total, known)
                tolerance = torch.finfo(total.dtype).eps ** 0.5
                size = _sum(use.abs().total().abs() for use in _samples(group, sizes, {}, cache))
                group.block.write(tolerance * size.max().expand(group.block.shape), bound)
        return {name for name, g in true.items() if bool(((g - known[name]).abs() > bound[name]).any())}

    def signed(self, signals: Signals) -> Iterator[Tensor]:
        """Signals with a random sign per example: squares of their sums have no cross terms in expectation."""
        generator = signals.generator or torch.Generator(device=signals.terms.output.device).manual_seed(0)
        for signal in signals:
            sign = torch.randint(0, 2, (signals.examples,), generator=generator, device=generator.device) * 2 - 1
            yield signals.weighted(signal, sign)

    def _estimator(self, group: Group) -> CurvatureEstimator:
        name = group.block.name
        known = name in self.estimators and self.estimators[name].block == group.block
        if not known:
            self.estimators[name] = self.make(group.block, group.form)
        if not known or name not in self.operations:  # an estimate that was there before this collector
            self.operations[name], self._forms[name] = group.operations, group.form
        return self.estimators[name]


def _keys(group: Group) -> set[Any]:
    """What tells whether the uses of a group were counted before."""
    return {id(use.site) for use in group.uses} or {group.block.name}


def _sites(groups: list[Group]) -> list[Site]:
    """All sites of the groups, once each."""
    return list({id(use.site): use.site for group in groups for use in group.uses}.values())


def _mixes(group: Group, examples: int) -> bool:
    return not group.uses or any(not use.site.keeps_examples(examples) for use in group.uses)


def _by_example(use: Outer | PerSample) -> Tensor:
    """What arrived for each example, ``(n, *)``."""
    if isinstance(use, Outer):
        return use.g.movedim(-3, 0).flatten(1)
    return use.gradients.movedim(1, 0).flatten(1)


def _valid(sites: list[Site], gradients: Mapping[int, Tensor], mask: Tensor) -> dict[int, Tensor]:
    """Positions of each site that count: not masked out, or reached by the gradients all the same."""
    out: dict[int, Tensor] = {}
    full = bool(mask.all())
    for site in sites:
        gradient = gradients.get(id(site))
        g = None if gradient is None else site.row_gradients(site.arrived(gradient))
        if g is None:
            continue
        reached = (g != 0).any(-1)[0]  # (n, s)
        if full:
            reached = torch.ones_like(reached)
        elif reached.shape == mask.shape:
            reached = reached | mask
        elif reached.shape[0] == mask.shape[0]:
            reached = reached | mask.any(-1, keepdim=True)
        out[id(site)] = reached
    return out


def _samples(
    group: Group, gradients: Mapping[int, Tensor | None], valid: Mapping[int, Tensor], cache: Cache, k: int = 1
) -> list[Outer | PerSample]:
    """Samples of the group's uses, from the gradients of their outputs under k signals."""
    samples: list[Outer | PerSample] = []
    for use in group.uses:
        gradient = gradients.get(id(use.site))
        if gradient is None:
            continue
        sample = use.site.use(use.piece, use.site.arrived(gradient, k), valid.get(id(use.site)), cache)
        samples.append(sample.transposed() if use.flipped else sample)
    return samples


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
