"""From one forward pass to statistics: signals back to every use, samples to every block's estimate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.estimation import checks, snapshot
from curvature.estimation.arrivals import Arrived, Cache, meet, mixes, samples_of, sites_of, valid_positions
from curvature.estimation.cut_positions import picked_positions
from curvature.estimation.explained_gradients import doubt, structure, unexplained
from curvature.estimation.flat_operator import flat_operator
from curvature.estimation.owners import by_row, owners
from curvature.estimation.plan import BlockPlan, Group
from curvature.estimation.shared_rows import Meeting, SharedRows
from curvature.estimation.shared_sums import add_shares
from curvature.layers import Site
from curvature.layers.block import Block
from curvature.layers.input_moments import InputMoments
from curvature.layers.recorder import Recorder
from curvature.layers.samples import Outer, PerSample, Samples
from curvature.layers.site import OuterSite
from curvature.losses.picked import ExampleTerms
from curvature.losses.signals import SAY_WHICH, Signals, stacked
from curvature.model.fixed_norms import statistics_given
from curvature.model.parameters import Parameters
from curvature.model.pullback import Pullback, pull_back
from curvature.model.shares import Shares
from curvature.structures.estimator import CurvatureEstimator, Form, MeansEstimator
from solvers import BlockDiagonal
from solvers.precision import full_float32

#: Bytes of output gradients that a vectorised backward pass of several signals may bring back, by type of device: it
#: saves the overhead of its calls. Four times the size of the parameters may come back in any case: where a signal
#: brings less than they take, the statistics of all signals are written once in the place of once for each.
VECTORISED = {"cpu": 1 << 22, "cuda": 1 << 28}


class StartAgain(RuntimeError):
    """A batch showed that some parameters must be taken by autograd, or apart from others, from the first batch on."""

    def __init__(self, blocks: Iterable[str], reasons: Mapping[str, str]) -> None:
        super().__init__(
            f"{', '.join(sorted(blocks))} was estimated by the rule of its layer before, and a later batch uses it in "
            "another way, without its bias or by no rule of a layer. If that use takes no part in the loss, put it "
            "under torch.no_grad() or detach the parameter; otherwise put the data in one batch, or leave this "
            "parameter out with params=."
        )
        self.reasons = dict(reasons)


class Collector:
    """The estimates of all blocks of a model, fed pass by pass.

    Args:
        parameters: The tracked parameters.
        make: Called once per block, when it is first seen, for its estimate.
        joint: Keep weight and bias of a layer in one block.
        vectorised: Send several signals through one vectorised pass where they are small; the estimates get samples of
            several signals at once.
    """

    #: Whether rows that do not lie as the examples do are sorted.
    sorts_rows: ClassVar[bool] = False
    #: Whether statistics that a batch norm takes of its batch count as constants, by which no examples meet.
    statistics_given: ClassVar[bool] = False

    def __init__(
        self,
        parameters: Parameters,
        make: Callable[[Block, Form], CurvatureEstimator],
        *,
        joint: bool = True,
        vectorised: bool = False,
    ) -> None:
        self.parameters = parameters
        self.vectorised = vectorised
        self.make = make
        self.plan = BlockPlan(parameters, joint)
        self.estimators: dict[str, CurvatureEstimator] = {}
        self.operations: dict[str, tuple[str, ...]] = {}  # what each block was used by
        self.forms: dict[str, Form] = {}
        self.notes: dict[str, str] = {}  # what else is to be said about a block
        self._verified = False  # the rules explained the gradients of a pass
        self._moments = InputMoments()
        self.sharing: dict[str, str] = {}  # what was chosen for the positions of a block, where that was to be chosen
        self._batches: list[Tensor | float] = []  # weights of the step's batches so far
        self._seen: dict[str, list[int]] = {}  # which of them reached a block
        self.only: set[str] | None = None  # blocks that still learn, in later passes over a data set
        self.by_rows: set[str] = set()  # blocks of this pass whose samples are single rows
        self._shared: SharedRows | None = None  # uses of this pass whose rows serve all examples, where some are masked
        self._one_each: set[int] = set()  # uses of this pass, not laid out by examples, whose rows belong to one each

    def collect(self, recorder: Recorder, output: Tensor, signals: Signals) -> set[str]:
        """Send the signals of one batch back and update the estimates of the blocks they reach.

        Args:
            recorder: Uses in the forward pass that led to ``output``.
            output: What the loss saw, attached to its graph.
            signals: What is sent back.

        Returns:
            Names of the blocks that were reached.
        """
        self._batches.append(signals.terms.total)
        cache: Cache = {}
        groups = self.groups(recorder, output, signals, cache)
        if self.only is not None:
            groups = [group for group in groups if group.block.name in self.only]
        with self.one_look():
            mixing = self.mixing(recorder, groups, output, signals, cache)
            if not recorder.examples_interact:
                self.refuse_averages([g for g in groups if g.block.name in mixing], signals.examples)
            return self.send(groups, output, signals, signals.stacks, signals.one_by_one(), cache, mixing)

    @contextlib.contextmanager
    def one_look(self) -> Iterator[None]:
        """What :meth:`mixing` finds inside holds inside, so that no graph is kept."""
        try:
            yield
        finally:
            self._shared = None

    def survey(self, recorder: Recorder, output: Tensor, signals: Signals) -> None:
        """Make the estimates of the blocks that a pass reaches, without statistics; arguments as :meth:`collect`."""
        cache: Cache = {}
        groups = self.groups(recorder, output, signals, cache)
        for group, uses in self._back(groups, output, signals.probe().unsqueeze(0), cache, {}):
            if uses:
                estimator = self.estimator_of(group)
                self._tell_sharing(estimator, uses, estimator.chooses_sharing and signals.aggregated)

    def groups(self, recorder: Recorder, output: Tensor, signals: Signals, cache: Cache) -> list[Group]:
        """The blocks of a pass with their uses; parameters with uses that nobody saw are taken by autograd."""
        groups = self.plan.assign(recorder.sites, recorder.unknown)
        if not self._verified:
            trained = all(p.requires_grad for p in self.parameters.values())  # and not frozen since the pass
            self._verified = trained and bool(torch.isfinite(output.detach().sum()))
            proves = self._verified and type(signals) is Signals and bool(signals.mask.any(1).all())
            key = structure(recorder, groups, output, self.parameters) if proves else None
            look = lambda: unexplained(groups, output, signals, self.parameters, cache)  # noqa: E731
            self._distrust(checks.recall(self.parameters, key, look), groups, output)
        self._distrust(recorder.explained.unexplained([output], self.parameters), groups, output)
        if self.plan.changed:
            groups = self.plan.assign(recorder.sites, recorder.unknown)
        self.give_up({name for name in self.plan.lost() if name in self.estimators})
        return groups

    def _distrust(self, names: Iterable[str], groups: list[Group], output: Tensor) -> None:
        new = [name for name in names if name not in self.plan.without_rule]
        self.plan.distrust({name: doubt(name, self.parameters[name], groups, output) for name in new})

    def give_up(self, blocks: set[str]) -> None:
        """Blocks that a later pass uses in a way that no rule covers have statistics of earlier passes.

        Raises:
            StartAgain: Naming the parameters that are to be taken by autograd, or apart, from the first batch on.
        """
        if blocks:
            raise StartAgain(blocks, self.plan.reasons)

    def settle(self, shares: Shares | None = None) -> None:
        """The step's last batch was seen: blocks that some of its batches did not reach count those as well.

        Args:
            shares: Processes whose batches belong to the step too.
        """
        for name, seen in self._seen.items():
            for missed in set(range(len(self._batches))).difference(seen):
                if name in self.estimators:
                    self.estimators[name].count(self._batches[missed])
        if shares is not None and shares.several:
            known = self.estimators, self.forms, self.operations
            add_shares(shares, *known, self.make, self._seen, sum(self._batches), self.parameters.device)
        self.forget()

    def forget(self) -> None:
        """Forget which batches the current step had."""
        self._batches, self._seen = [], {}

    def state(self) -> dict[str, Any]:
        """Everything that the next batch of a data set depends on, as tensors, numbers and strings."""
        return {
            "plan": self.plan.state(),
            "verified": True,
            "batches": self._batches,
            "seen": self._seen,
            "only": None if self.only is None else sorted(self.only),
            "estimators": {
                name: {
                    "block": estimator.block.state(),
                    "form": self.forms[name],
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
        self._seen = saved["seen"]
        self._batches = [b.to(device) if isinstance(b, Tensor) else b for b in saved["batches"]]
        self.only = None if saved["only"] is None else set(saved["only"])
        for name, known in saved["estimators"].items():
            estimator = self.make(Block.from_state(name, known["block"]), known["form"])
            self.operations[name], self.forms[name] = known["operations"], known["form"]
            sums = dict(known["sums"])
            if isinstance(estimator, MeansEstimator) and "means" in sums:  # a pair in files of version 0.1
                sums |= zip(estimator.names, sums.pop("means"), strict=True)
            snapshot.restore(estimator, sums, device)
            self.estimators[name] = estimator

    def commit(self, ema: float) -> None:
        """Fold the current step into all estimates."""
        for estimator in self.estimators.values():
            estimator.commit(ema)

    def operator(self, scale: Tensor | float = 1.0) -> BlockDiagonal:
        """See :func:`~curvature.estimation.flat_operator.flat_operator`."""
        return flat_operator(self.estimators.values(), self.parameters, scale)

    def send(
        self,
        groups: list[Group],
        output: Tensor,
        signals: Signals,
        together: Callable[[int], Iterator[Tensor]],
        apart: Iterator[Tensor],
        cache: Cache,
        mixing: set[str],
        scale: Tensor | None = None,
    ) -> set[str]:
        """Send signals ``together``, but ``apart`` to blocks in which examples meet, unless draws keep these apart."""
        if signals.kind == "mc":
            return self._send(groups, output, signals, together, scale, cache, mixing)
        plain = [group for group in groups if group.block.name not in mixing]
        merged = [group for group in groups if group.block.name in mixing]
        reached = self._send(plain, output, signals, together, scale, cache, mixing)
        return reached | self._send(merged, output, signals, partial(stacked, apart), scale, cache, mixing)

    def _send(
        self,
        groups: list[Group],
        output: Tensor,
        signals: Signals,
        sent: Callable[[int], Iterator[Tensor]],
        scale: Tensor | None,
        cache: Cache,
        merged: set[str],
    ) -> set[str]:
        if not groups:
            return set()
        self._moments = InputMoments()
        valid = self._valid(sites_of(groups), output, signals)
        reached: set[str] = set()
        first = True
        for signal in sent(self._together(groups, output)):
            signal = signal if scale is None else signal * scale.to(signal.dtype)
            for group, uses in self._back(groups, output, signal, cache, valid):
                if not uses:
                    continue
                self._update(group, uses, first, signals, merge=group.block.name in merged)
                if first:
                    reached.add(group.block.name)
            first = False
            self._moments = InputMoments()
        return reached

    def _together(self, groups: list[Group], output: Tensor) -> int:
        """How many signals are sent together."""
        if not self.vectorised:
            return 1
        numbers = output.numel() + sum(math.prod(site.output_shape) for site in sites_of(groups))
        numbers += sum(group.block.numel for group in groups if not group.uses)
        size = self.parameters.dtype.itemsize
        budget = max(VECTORISED.get(self.parameters.device.type, VECTORISED["cuda"]), 4 * size * self.parameters.size)
        return max(1, budget // max(1, numbers * size))

    def _update(
        self, group: Group, uses: list[Outer | PerSample], first: bool, signals: Signals, merge: bool = False
    ) -> None:
        if first:
            self._seen.setdefault(group.block.name, []).append(len(self._batches) - 1)
        aggregated = self.estimator_of(group).chooses_sharing and signals.aggregated
        of_batch: dict[str, Any] = {"examples": signals.examples, "aggregated": aggregated, "moments": self._moments}
        samples = Samples(tuple(uses), self._batches[-1], first, merge, **of_batch)
        with full_float32:
            self.learn(group, samples)

    def learn(self, group: Group, samples: Samples) -> None:
        """Update the estimate of a block."""
        estimator = self.estimator_of(group)
        self._tell_sharing(estimator, samples.uses, samples.aggregated and not samples.merge)
        estimator.update(samples)

    def _tell_sharing(self, estimator: CurvatureEstimator, uses: Iterable[Outer | PerSample], aggregated: bool) -> None:
        several = (use for use in uses if isinstance(use, Outer) and use.positions > 1)
        chosen = dict.fromkeys(c for use in several if (c := estimator.chosen_sharing(use, aggregated)))
        if chosen:
            self.sharing[estimator.block.name] = " and ".join(chosen)

    def _back(
        self, groups: list[Group], output: Tensor, signal: Tensor, cache: Cache, valid: Mapping[int, Tensor]
    ) -> Iterator[tuple[Group, list[Outer | PerSample]]]:
        """Send signals ``(k, *output)`` back; every group with the samples of those of its uses that they reached."""
        by_site, by_name = self._arriving(groups, output, signal)
        last = {id(use.site): group for group in groups for use in group.uses}
        for group in groups:
            if group.uses:
                uses = samples_of(group, by_site, valid, cache, len(signal), group.block.name in self.by_rows)
                for use in group.uses:  # what nobody waits for any more makes room for the sums
                    if last[id(use.site)] is group:
                        by_site.pop(id(use.site), None)
                yield group, [self._as_counted(use) for use in uses]
            else:
                gradient = by_name[group.block.name]
                yield group, [] if gradient is None else [PerSample(gradient.reshape(len(signal), 1, -1))]

    def _as_counted(self, use: Outer | PerSample) -> Outer | PerSample:
        if isinstance(use, Outer) and use.source in self._one_each:
            return replace(use, serves_all=False)
        return use

    def _arriving(
        self, groups: list[Group], output: Tensor, signal: Tensor, meetings: Sequence[Meeting] = ()
    ) -> tuple[dict[int, Tensor | None], Mapping[str, Any]]:
        """What arrives at every site, and at every parameter without uses, under signals ``(k, *output)``."""
        sites: list[Site | Meeting] = [*sites_of(groups), *meetings]
        generic = [g.block.name for g in groups if not g.uses]
        targets: list[Any] = [*(site.edge for site in sites), *(self.parameters[name] for name in generic)]
        if not targets:
            return {}, {}
        pullback = Pullback([output], targets, self.vectorised)
        gradients = pullback.arriving([signal])
        self.vectorised = pullback.batched
        by_site = {id(site): g for site, g in zip(sites, gradients, strict=False)}
        return by_site, dict(zip(generic, gradients[len(sites) :], strict=True))

    def _valid(self, sites: list[Site], output: Tensor, signals: Signals) -> dict[int, Tensor]:
        """Which positions of each site count.

        A position whose loss term is masked out, or that what follows leaves out, counts in no factor if nothing
        depends on it either: if a signal on all valid terms comes back as exact zeros there. Rows that serve all
        examples count for each example by itself.
        """
        probes = signals.probes() if sites else []
        picked = picked_positions(sites, output, probes)
        if not picked and all(bool(mask.all()) for mask, _ in probes):
            return {}
        probes = probes or [(signals.mask, signals.probe())]
        out: dict[int, Tensor] = {}
        shared = self._shared and self._shared.of(site for site in sites if id(site) not in self._told_apart())
        meetings = shared.meetings if shared else []
        places: list[Site | Meeting] = [*sites, *meetings]
        for mask, probe in probes:
            gradients = pull_back([output], [place.edge for place in places], [probe])
            # Zeros everywhere: this loss is one of another part of the model.
            pairs = zip(sites, gradients, strict=False)
            met = {id(m): g for m, g in zip(meetings, gradients[len(sites) :], strict=True)}
            by_example = shared.arriving(probe, met) if shared else {}
            arrived = {id(s): g for s, g in pairs if g is not None and (len(probes) == 1 or bool(g.any()))}
            for key, counts in valid_positions(sites, arrived, mask, by_example, picked).items():
                out[key] = out[key] | counts if key in out else counts
        return out

    def _told_apart(self) -> set[int]:
        """Uses, not laid out by examples, of which each row is known to belong to one."""
        return self._one_each

    def mixing(
        self, recorder: Recorder, groups: list[Group], output: Tensor, signals: Signals, cache: Cache
    ) -> set[str]:
        """Blocks with a use that does not keep the examples apart.

        Shapes tell where a use has no row, or several, for an example, and the operations of the pass where it is
        certain to keep them apart. Weights on the examples tell the rest (statistics over the batch, attention along
        the axis that was taken for the examples, tokens sent to experts), each pass for itself: what arrives in the
        rows of an example must grow by the weight of that example.
        """
        self._one_each, self._shared = set(), None
        if not signals.examples:
            return set()
        mixing = {group.block.name for group in groups if mixes(group, signals.examples)}
        rest = [group for group in groups if group.block.name not in mixing]
        if signals.examples == 1 or not self._may_meet(recorder, rest, signals):
            rest = []  # a single example meets nobody, but may have several rows
        sought = [group for group in groups if group.block.name in mixing and self._seeks(group)]
        if not rest and not sought:
            return mixing
        fixed = recorder.examples_interact and self.statistics_given
        serving = [site for site in sites_of(sought) if site.serves_all]
        if serving and not bool(signals.terms.mask.all()):
            self._shared = SharedRows(output, serving, signals)
        meetings = self._shared.meetings if self._shared else []
        with statistics_given([output]) if fixed else contextlib.nullcontext():
            plain, _ = self._arriving(rest + sought, output, signals.probe().unsqueeze(0), meetings)
            tagged: list[tuple[Tensor, Arrived]] = []
            for weights in signals.tags():
                arrived, _ = self._arriving(rest + sought, output, signals.probe(weights).unsqueeze(0), meetings)
                tagged.append((weights, arrived))
        if self._shared:
            self._shared.check(plain, tagged)
        meeting = [group for group in rest if meet(group, plain, tagged, cache)]
        mixing |= {group.block.name for group in meeting}
        return mixing - self._sort(sought + meeting, plain, [arrived for _, arrived in tagged], signals, cache)

    def _sort(
        self, groups: list[Group], plain: Arrived, tagged: list[Arrived], signals: Signals, cache: Cache
    ) -> set[str]:
        """Names of blocks whose rows will be sorted by the examples that they belong to; none here.

        But rows that hold no example by their making, such as a state that starts at zero, and that belong to one each
        are no table that every example reads. Rows that nothing reaches may be masked out.
        """
        for plain_uses, *tagged_uses in (
            [samples_of(group, arrived, {}, cache) for arrived in (plain, *tagged)] for group in groups
        ):
            for use, *weighted in zip(plain_uses, *tagged_uses, strict=True):
                if isinstance(use, Outer) and use.serves_all:
                    owner = owners(by_row(use), [by_row(other) for other in weighted], signals.examples)
                    if owner is not None and (bool((owner >= 0).all()) or not bool(signals.terms.mask.all())):
                        self._one_each.add(use.source)
        return set()

    def _seeks(self, group: Group) -> bool:
        """Whether to look which examples the rows of a block belong to."""
        if self.sorts_rows:
            return bool(group.uses)
        return any(isinstance(use.site, OuterSite) and not use.site.layout.batched for use in group.uses)

    def _may_meet(self, recorder: Recorder, groups: list[Group], signals: Signals) -> bool:
        """Whether examples may meet in these blocks, as far as the operations of the pass tell."""
        if recorder.examples_interact and not self.statistics_given:
            return True
        output = getattr(signals.terms, "whole", signals.terms.output)
        apart = recorder.keeps_examples(sites_of(groups), output, signals.examples)
        if not apart and not isinstance(signals.terms, ExampleTerms) and recorder.lie_elsewhere(output):
            averages = [g.block.name for g in groups if self.estimator_of(g).averages_positions]
            if signals.together or signals.given is not None or averages:
                raise ValueError(
                    f"the terms of an example add up here, but those of the output, of shape {tuple(output.shape)}, "
                    f"do not have their examples along its first axis. {SAY_WHICH}"
                )
        return not apart or not all(g.uses for g in groups)

    def refuse_averages(self, mixing: list[Group], examples: int) -> None:
        """Averages over the positions of an example need to know them; a table that no example has is one itself.

        Rows of one position each are not averaged.
        """
        for group in mixing:
            outer = [use.site for use in group.uses if isinstance(use.site, OuterSite)]
            if (
                any(site.layout.batched and site.positions > 1 for site in outer)
                and self.estimator_of(group).averages_positions
            ):
                raise ValueError(
                    f"block {group.block.name}: sharing='reduce' averages over the positions of each example, but the "
                    f"rows of this layer do not fall into the {examples} examples along the leading axis (a model with "
                    "time or positions first, or rows picked by a mask). Use sharing='expand', for which it makes no "
                    "difference, or put the examples first (batch_first=True)."
                )

    def estimator_of(self, group: Group) -> CurvatureEstimator:
        name = group.block.name
        known = name in self.estimators and self.estimators[name].block == group.block
        if not known:
            self.estimators[name] = self.make(group.block, group.form)
        if not known or name not in self.operations:  # an estimate that was there before this collector
            self.operations[name], self.forms[name] = group.operations, group.form
        return self.estimators[name]
