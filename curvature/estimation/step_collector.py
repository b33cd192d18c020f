"""The estimates of all blocks in a training step: fed by arriving gradients, in transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature.estimation.arrivals import Arrived, Cache, samples_of, sites_of, valid_positions
from curvature.estimation.collector import Collector
from curvature.estimation.cut_positions import picked_positions
from curvature.estimation.owners import SortedRows, by_row, owners, sorted_rows
from curvature.estimation.plan import Group
from curvature.layers import Site
from curvature.layers.block import Block
from curvature.layers.input_moments import InputMoments
from curvature.layers.recorder import Recorder
from curvature.layers.samples import Outer, PerSample, Samples
from curvature.layers.site import ElementwiseSite
from curvature.losses.signals import Signals, stacked
from curvature.model.backward_hooks import ours
from curvature.model.hooks import At, remove
from curvature.model.parameters import Parameters
from curvature.structures.estimator import CurvatureEstimator, Form
from curvature.structures.whole import Share, WholeEstimator
from solvers.precision import full_float32

#: Block and use -> positions of it whose inputs were counted; ``None`` for all. Block and "aggregated" -> whether all
#: losses of the pass have one term for each example, by which the block treats its positions.
Counted = dict[Any, Any]
#: Block and use -> owners of its rows, and where they go, in the pass at hand.
Sorted = dict[tuple[str, int], tuple[Tensor, SortedRows]]
#: Backward passes up to which a signal is sent back for one example at a time where nothing else keeps them apart.
FEW = 32


class Backward:
    """The gradients of all uses in a backward pass that the user runs."""

    def __init__(self, groups: list[Group], signals: Signals, listens: Callable[[], bool], rows: Sorted) -> None:
        self.groups, self.signals, self._listens, self.rows = groups, signals, listens, rows
        self.gradients: dict[int, Tensor] = {}
        sites = sites_of(groups)
        self.picked = picked_positions(sites, signals.terms.output, signals.probes())  # while the graph stands
        self._handles: list[Any] = []
        for site in sites:
            self._handles.append(ours(site.edge.node.register_prehook(At(self, "_arrived", site))))

    def _arrived(self, site: Site, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[site.edge.output_nr]
        if gradient is not None and self._listens():
            self.gradients[id(site)] = gradient.detach()

    def close(self) -> None:
        """Stop listening."""
        remove(self._handles)


class StepCollector(Collector):
    """Feeds estimates from the passes of a training step.

    Every call of the loss adds ``factor * sum over its terms``; :meth:`settle` divides by what the step asks for. What
    was added since :meth:`mark` can be taken back.

    Args:
        parameters, make, joint: Those of :class:`~curvature.estimation.collector.Collector`.
        forget: Called with the name of a block whose first statistics were taken back.
    """

    sorts_rows: ClassVar = True
    statistics_given: ClassVar = True  # as every K-FAC has it in training
    complete: ClassVar = False  # the samples of every block hold all examples and nothing else

    def __init__(
        self,
        parameters: Parameters,
        make: Callable[[Block, Form], CurvatureEstimator],
        *,
        joint: bool = True,
        forget: Callable[[str], None] = lambda name: None,
    ) -> None:
        super().__init__(parameters, make, joint=joint)
        self.forget_block = forget
        self._factor: Tensor | None = None
        self._linear: Tensor | float | None = None
        self._counted: Counted = {}
        self._sorted: Sorted = {}
        self._drawn: set[str] = set()  # blocks with random signs in some pass of the step

    # Transactions

    def mark(self) -> Any:
        """The step as it is now, for :meth:`back_to`."""
        said = dict(self.notes), set(self._drawn)
        return self.plan.mark(), {name: e.mark() for name, e in self.estimators.items()}, said

    def back_to(self, mark: Any) -> None:
        """Forget whatever was collected since a mark, new blocks included."""
        plan, marks, (self.notes, self._drawn) = mark
        self.plan.back_to(plan)
        for name, estimator in list(self.estimators.items()):
            if name in marks:
                estimator.back_to(marks[name])
            else:
                self.give_up({name})

    def forget(self) -> None:
        super().forget()
        self._drawn = set()

    def discard(self) -> None:
        """Forget the step."""
        for estimator in self.estimators.values():
            estimator.discard()

    def lose(self, blocks: Set[str], mark: Any = None) -> None:
        """Forget whatever was collected for some blocks, since a mark or in the step."""
        marks = {} if mark is None else mark[1]
        for name in blocks & self.estimators.keys():
            estimator = self.estimators[name]
            if name in marks:
                estimator.back_to(marks[name])
            else:
                estimator.discard()
            if not estimator.ready and (mark is None or name not in marks):
                self.give_up({name})

    def join(self, mark: Any) -> None:
        """What was collected since a mark are further blocks of the losses before it, whose gradients came in parts."""

    def give_up(self, blocks: set[str]) -> None:
        for name in blocks:
            del self.estimators[name], self.operations[name], self.forms[name]
            self.forget_block(name)

    def settle(self, weight: Tensor | float, reached: set[str]) -> None:  # type: ignore[override]
        """The step's last loss was seen: divide by its weight."""
        for name in reached:
            self.estimators[name].count(weight)

    # Statistics

    def collect(  # type: ignore[override]
        self,
        recorder: Recorder,
        output: Tensor,
        signals: Signals,
        *,
        counted: Counted,
        factor: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> set[str]:
        """Send the signals of one call of the loss back and update the estimates of the blocks they reach.

        Args:
            recorder: Uses in the forward pass that led to ``output``.
            output: What the loss saw, attached to its graph.
            signals: What is sent back.
            counted: Uses whose inputs counted before, because another loss saw the same pass; extended.
            factor: What the sum of the terms is multiplied by in what is minimised.
            scale: Or the root of that for each entry of the output.

        Returns:
            Names of the blocks that were reached.
        """
        cache: Cache = {}
        groups = self.groups(recorder, output, signals, cache)
        with self.one_look():
            mixing = self.mixing(recorder, groups, output, signals, cache)
            drawn = mixing if signals.kind != "mc" and not self.sends_examples(signals) else set()
            self._say(groups, drawn)
            self._factor, self._linear, self._counted = factor, factor, counted
            together = partial(stacked, iter(signals))
            return self.send(groups, output, signals, together, self.apart(signals), cache, mixing, scale)

    def _say(self, groups: list[Group], drawn: set[str]) -> None:
        """Note of the blocks of a pass whether random signs were drawn in it, or in another one of the step."""
        self._drawn |= drawn
        for name in (group.block.name for group in groups):
            self.notes.pop(name, None)
            if name in self._drawn:
                self.notes[name] = "examples meet in its rows, told apart by random signs"

    def mixing(
        self, recorder: Recorder, groups: list[Group], output: Tensor, signals: Signals, cache: Cache
    ) -> set[str]:
        """Blocks in which examples meet; those whose rows only lie elsewhere are sorted."""
        self._keep_sorted({})
        mixing = super().mixing(recorder, groups, output, signals, cache)
        self.refuse_averages([group for group in groups if group.block.name in mixing], signals.examples)
        return mixing

    def _sort(
        self, groups: list[Group], plain: Arrived, tagged: list[Arrived], signals: Signals, cache: Cache
    ) -> set[str]:
        rows: Sorted = {}
        examples = signals.examples
        for group in groups:
            found = _owners(group, [plain, *tagged], examples, cache)
            if found:
                places = sorted_rows(list(found.values()), examples, self.complete)
                for (source, owner), place in zip(found.items(), places, strict=True):
                    rows[group.block.name, source] = owner, place
        self._keep_sorted(rows)
        return self.by_rows

    def _keep_sorted(self, rows: Sorted) -> None:
        self._sorted, self.by_rows = rows, {name for name, _ in rows}

    def _valid(self, sites: list[Site], output: Tensor, signals: Signals) -> dict[int, Tensor]:
        return self._reached(super()._valid(sites, output, signals), sites, signals.examples)

    def _told_apart(self) -> set[int]:
        return {source for _, source in self._sorted}

    def _reached(self, valid: dict[int, Tensor], sites: list[Site], examples: int) -> dict[int, Tensor]:
        """Positions that count; where rows lie elsewhere, those that belong to an example."""
        serving = {id(site) for site in sites if site.serves_all}
        for (_, source), (owner, _) in self._sorted.items():
            if source in valid:
                every = torch.arange(examples, device=owner.device).unsqueeze(1)
                valid[source] = owner == every if source in serving else (owner >= 0).view_as(valid[source])
        return valid

    def sends_examples(self, signals: Signals) -> bool:
        """Whether :meth:`apart` sends a signal for each example."""
        return signals.examples == 1 or signals.examples * len(signals) <= FEW

    def apart(self, signals: Signals) -> Iterator[Tensor]:
        """Signals for blocks in which examples meet: for one example at a time where these are few.

        Otherwise with a random sign for each example: squares of their sums have no cross terms in expectation.
        """
        if self.sends_examples(signals):
            yield from signals.one_by_one()
            return
        generator = signals.generator or torch.Generator(device=signals.terms.output.device).manual_seed(0)
        for signal in signals:
            sign = torch.randint(0, 2, (signals.examples,), generator=generator, device=generator.device) * 2 - 1
            yield signals.weighted(signal, sign)

    def await_backward(self, recorder: Recorder, signals: Signals, listens: Callable[[], bool]) -> Backward | None:
        """Wait for the user's own backward pass in place of sending a signal, where that tells as much.

        Returns:
            What will hold the gradients of all uses, or ``None`` if some block needs signals of its own.
        """
        output = signals.terms.output
        groups = self.groups(recorder, output, signals, {})
        with self.one_look():
            if self.mixing(recorder, groups, output, signals, {}):
                return None
        known = [self.estimators.get(group.block.name) for group in groups]
        if any(estimator is None or estimator.chooses_sharing for estimator in known):
            _ = signals.aggregated  # while the graphs of the other losses of the pass stand
        return Backward(groups, signals, listens, self._sorted)

    def collect_backward(self, backward: Backward, share: Tensor, counted: Counted) -> set[str]:
        """Update the estimates from the gradients of a backward pass that was waited for.

        Args:
            backward: What :meth:`await_backward` returned, after the pass.
            share: What the sum of the terms was multiplied by in it.
            counted: See :meth:`collect`.

        Returns:
            Names of the blocks that were reached.
        """
        reached: set[str] = set()
        cache: Cache = {}
        mask = backward.signals.mask
        self._moments = InputMoments()
        self._say(backward.groups, set())
        self._keep_sorted(backward.rows)
        # Without a term that counts, the share is 0 and there is nothing to scale.
        self._factor, self._linear, self._counted = torch.where(share == 0, 0, 1 / share), 1.0, counted
        sites, picked, valid = sites_of(backward.groups), backward.picked, {}
        if picked or not bool(mask.all()):
            valid = valid_positions(sites, backward.gradients, mask, picked=picked)
        valid = self._reached(valid, sites, backward.signals.examples)
        for group in backward.groups:
            uses = samples_of(group, backward.gradients, valid, cache, by_rows=group.block.name in self.by_rows)
            if uses:
                self._update(group, uses, True, backward.signals)
                reached.add(group.block.name)
        self._moments = InputMoments()
        return reached

    def _update(
        self, group: Group, uses: list[Outer | PerSample], first: bool, signals: Signals, merge: bool = False
    ) -> None:
        aggregated = self._aggregated_for(group, uses, signals, merge)
        if first:
            uses, first = self._new(group, uses)
        uses = [self._placed(group, use, aggregated) for use in uses]
        scales = self._factor, self._linear, signals.examples, aggregated, self._moments
        samples = Samples(tuple(uses), 0.0, first, merge, *scales)
        with full_float32:
            self.learn(group, samples)

    def _aggregated_for(self, group: Group, uses: list[Outer | PerSample], signals: Signals, merge: bool) -> bool:
        """Whether all losses of the pass have one term for each example, by which a block treats its positions.

        Raises:
            ValueError: If one comes that has several, after the inputs were counted as for those before.
        """
        estimator = self.estimator_of(group)
        if not estimator.chooses_sharing:
            return False
        key, now = (group.block.name, "aggregated"), not merge and signals.aggregated
        before = self._counted.setdefault(key, now)
        if before and not now:
            choose = estimator.chosen_sharing
            several = (use for use in uses if isinstance(use, Outer) and use.positions > 1)
            if any(choose(use, True) != choose(use, False) for use in several):
                raise ValueError(
                    f"two losses of one forward pass ask for different Kronecker factors of {group.block.name}: the "
                    "first had one term for each example ('reduce'), and one that was not known when its gradient "
                    "arrived has several ('expand'). Call all losses of a pass before backward(), by modules rather "
                    "than functions, or give one choice, such as sharing='expand'."
                )
        return before and now

    def _new(self, group: Group, uses: list[Outer | PerSample]) -> tuple[list[Outer | PerSample], bool]:
        """The uses with those positions alone that count and did not before; whether there are any."""
        out: list[Outer | PerSample] = []
        new = False
        for use in uses:
            key = group.block.name, use.source
            valid = use.valid if isinstance(use, Outer) else None
            if key not in self._counted:
                self._counted[key], fresh, new = valid, valid, True
            elif (before := self._counted[key]) is None:
                fresh = None if valid is None else torch.zeros_like(valid)
            else:
                fresh = ~before if valid is None else valid & ~before
                self._counted[key], new = None if valid is None else valid | before, True
            out.append(replace(use, valid=fresh) if isinstance(use, Outer) else use)
        return out, new

    def _placed(self, group: Group, use: Outer | PerSample, aggregated: bool) -> Outer | PerSample:
        """A use with its rows in the places of their examples."""
        if (group.block.name, use.source) not in self._sorted:
            return use
        _, rows = self._sorted[group.block.name, use.source]
        estimator = self.estimator_of(group)
        averages = estimator.averages_positions
        if isinstance(use, Outer):  # sorted, its rows are no table any more
            here = replace(use, serves_all=False, valid=None)
            averages |= estimator.chosen_sharing(here, aggregated) == "reduce"
        return rows.of(use, not averages)


def _owners(group: Group, arrived: list[Arrived], examples: int, cache: Cache) -> dict[int, Tensor] | None:
    """Owners of the rows of every use of a block that was reached; ``None`` where rows hear of several examples."""
    if any(isinstance(u.site, ElementwiseSite) and not u.site.has_rows for u in group.uses):
        return None
    found = {}
    for plain, *tagged in zip(*(samples_of(group, a, {}, cache, by_rows=True) for a in arrived), strict=True):
        owner = owners(by_row(plain), [by_row(use) for use in tagged], examples)
        if owner is None:
            return None
        found[plain.source] = owner
    return found


class ApartCollector(StepCollector):
    """For estimates that need gradients of true sign, of one example at a time, in all blocks."""

    def sends_examples(self, signals: Signals) -> bool:
        return True


class WholeCollector(ApartCollector):
    """Hands the samples of all blocks to one estimate."""

    complete: ClassVar = True

    def __init__(self, parameters: Parameters, whole: WholeEstimator) -> None:
        super().__init__(parameters, lambda block, form: Share(block, self.whole))
        self.whole = whole

    def mark(self) -> Any:
        return super().mark(), self.whole.mark(), self.whole.batches

    def back_to(self, mark: Any) -> None:
        super().back_to(mark[0])
        self.whole.back_to(mark[1])

    def lose(self, blocks: Set[str], mark: Any = None) -> None:
        self.whole.lose(blocks, 0 if mark is None else mark[2])

    def join(self, mark: Any) -> None:
        self.whole.join(mark[2])

    def discard(self) -> None:
        self.whole.discard()

    def settle(self, weight: Tensor | float, reached: set[str]) -> None:  # type: ignore[override]
        self.whole.count(weight)

    def collect(self, *args: Any, **kwargs: Any) -> set[str]:
        self.whole.next_batch()
        return super().collect(*args, **kwargs)

    def collect_backward(self, *args: Any, **kwargs: Any) -> set[str]:
        self.whole.next_batch()
        return super().collect_backward(*args, **kwargs)
