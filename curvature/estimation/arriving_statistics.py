"""Statistics of a training step, computed while the user's gradients arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.called_losses import CalledLosses, has_no_example, weighed
from curvature.estimation.gathered_calls import GatheredCalls
from curvature.estimation.joined_passes import number_of_examples
from curvature.estimation.output_gradient import OutputGradient
from curvature.estimation.passes import Pass, Reader, TapedLoss, merged
from curvature.estimation.places import in_their_places
from curvature.estimation.step import Step, Weight
from curvature.estimation.step_collector import Backward, StepCollector
from curvature.estimation.tape import Tape
from curvature.estimation.unseen_losses import NotYetTold
from curvature.estimation.weights_of_unseen_losses import not_told
from curvature.layers.recorder import Recorder
from curvature.losses import BatchDim, NoCurvatureError, Terms
from curvature.losses.from_gradient import gradient_terms
from curvature.losses.picked import ApartTerms, GatheredTerms, PickedTerms
from curvature.losses.signals import JointSignals, Signals
from curvature.model.backward_hooks import ours
from curvature.model.backward_under_way import only_way
from curvature.model.hooks import At
from curvature.model.inner_backward import hiding
from curvature.structures.estimator import Curvature
from solvers.outcome.finite import is_finite


class ArrivingStatistics(Reader):
    """Feeds a collector from the events of a tape, in transactions: what it keeps is of backward passes that ended.

    Arguments are those of :class:`~curvature.estimation.statistics.Statistics`, which closes the step.

    Attributes:
        step: The account of the losses.
        now: Blocks that the backward pass under way reached.
        hidden: A pass was seen that hides parts of the model.
        settled: A pass was seen that hides none.
        sealed: Parameters that not even repeated passes of the step show.
        elsewhere: Parameters that are used outside the model's forward pass.
    """

    def __init__(
        self,
        tape: Tape,
        loss_fn: Any,
        collector: StepCollector,
        curvature: Curvature,
        class_dim: int | None = None,
        batch_dim: BatchDim = None,
    ) -> None:
        self.tape, self.collector, self.curvature = tape, collector, curvature
        self.class_dim, self.batch_dim = class_dim, batch_dim
        self._losses = CalledLosses(tape, loss_fn, curvature.kind, batch_dim)
        self.loss = self._losses.own
        empirical, told, plain = curvature.kind == "empirical", tape.mode == "auto", tape.mode == "gradient"
        self._at_output = OutputGradient(self.loss, tape.loss_module, told, class_dim, empirical, plain)
        device = collector.parameters.device
        self.generator = torch.Generator(device="cpu" if device.type == "meta" else device)  # nothing is drawn there
        self.level: Tensor | None = None
        self.armed = False
        self.hidden = False
        self._opaque = False  # a pass of the backward pass under way has custom functions, which may hide any
        self.now: set[str] = set()
        self.sealed: set[str] = set()
        self.settled = False
        self.elsewhere: set[str] = set()
        self.step = Step()
        self._mark: tuple[Any, Any] | None = None  # the step when the backward pass under way began
        self._before: tuple[Any, Any] | None = None  # when the last one that ended did
        self._seed = 0  # of the draws of this step
        self._waiting: list[tuple[Backward, list[Pass], Tensor]] = []  # with what its sum of terms is multiplied by
        self._gathered = GatheredCalls()
        self._refusal: Exception | None = None  # of what a gradient brought, if it turns out to count
        tape.reader = self

    @property
    def batches(self) -> int:
        return self.step.batches

    @property
    def reached(self) -> set[str]:
        return self.step.reached

    def arm(self, seed: int) -> None:
        """Collect from the passes that follow; ``seed`` starts the draws of this step."""
        self.armed = self.tape.records = True
        self._seed = seed
        self.tape.cautious = self.hidden or not self.settled
        self.generator.manual_seed(seed)
        self.forget()

    def disarm(self) -> None:
        """Stop collecting."""
        self.armed = self.tape.records = self.tape.cautious = False
        self.forget()

    def forget(self) -> None:
        """A new step begins."""
        self._stop_waiting()
        self.step, self._mark, self._before, self.level = Step(), None, None, None
        self.collector.forget()
        self.tape.clear()

    # Events of the tape

    def called(self, call: TapedLoss) -> None:
        if self._losses.of(call) is None and isinstance(call.output, Tensor):
            for origin in call.passes:
                origin.handles.append(ours(call.output.register_hook(self.tape.at_input(call))))

    def mark(self) -> Any:
        """The step as it is now, but for the estimates, for :meth:`back_to`."""
        return self.step.copy(), self.generator.get_state()

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since a mark, draws included."""
        self.step, state = mark
        self.generator.set_state(state)

    def begin(self) -> None:
        self._gathered.clear()
        self._before = None  # one mark at a time: each holds sums of the step
        self._mark, self._refusal = (self.mark(), self.collector.mark()), None
        self._opaque, self.now = False, set()

    def arrived(self, call: TapedLoss, gradient: Tensor) -> None:
        passes = self._open(call.passes)
        loss = self._losses.of(call)
        if not passes or loss is None or has_no_example(call.output):
            return
        try:
            terms = self._losses.terms(loss, call, self.collector.parameters)
        except NoCurvatureError:
            if call.module is self.tape.loss_module:
                raise
            return  # something the model computes by the way
        level = call.value.detach() if loss.zero_when_perfect else torch.ones_like(call.value)
        value = (gradient.abs() * level).sum()
        self.step.values.append(torch.where(terms.total > 0, value, 0))  # a mean over no terms is 0/0
        share = self.step.share(terms, gradient, call.place)
        self._take_or_gather(passes, weighed(terms, gradient), share, call)

    def _take_or_gather(self, passes: list[Pass], terms: Terms, share: Weight, call: TapedLoss) -> None:
        """Take a call of the loss now, or with others on parts of the same output, when all of these have arrived."""
        apart = self.curvature.sums_gradients
        if share.factor is not None and not apart and self._gathered.may_take(passes, call):
            with self.tape.own_pass(passes, call.output):
                terms = in_their_places(terms, passes, self.batch_dim)
            if self._gathered.take(passes[0], terms, share.factor, call, At(self, "_ready", passes[0])):
                return
        self.take(passes, terms, share, [call])

    def _ready(self, origin: Pass, gradients: Any) -> None:
        if self.tape.under_way:
            self.arrives_at_output(origin)

    def arrives_at_output(self, origin: Pass) -> None:
        if found := self._gathered.pop(origin):
            self.take([origin], *found, waits=False)  # its own node may be the one that is executed now

    def arrived_at_input(self, call: TapedLoss, gradient: Tensor) -> None:
        """A gradient arrived at what a loss of unknown type was called on."""
        passes = self._open(call.passes)
        if not passes or call.arriving is None or has_no_example(call.output):
            return
        if call.arriving.dim() > 0:
            raise ValueError(
                "an empirical Fisher of a loss of unknown type needs the loss as one number: use reduction='mean' or "
                f"'sum', not a result of shape {tuple(call.arriving.shape)}."
            )
        reduction = getattr(call.module, "reduction", "mean")
        terms = gradient_terms(call.output, gradient, call.arriving, reduction)
        self.take(passes, terms, self.step.share(terms, call.arriving, call.place), [call])

    def arrived_at_output(self, origin: Pass, gradient: Tensor) -> None:
        if has_no_example(gradient) or not is_finite(gradient):
            return  # nothing can be read off it, and the step will be skipped
        passes = self._open([origin, *self.tape.feeding([origin])])
        if origin not in passes:
            return
        try:
            found = self.read(origin, origin.output, gradient)
        except NotYetTold:
            if origin.form is not None and self.tape.shards is not None:
                origin.left_out = True  # no pass is repeated there
            elif any(call.arriving is not None for call in origin.calls):
                self.not_told()  # these have been counted, and would be once more
            else:
                origin.recorder, origin.again = None, True
            return
        except (TypeError, ValueError) as error:
            self._refusal = error  # no matter for a gradient that is not for the parameters
            return
        if found is not None:
            self.take(passes, *found, [])

    def not_told(self) -> None:
        self._refusal = not_told()

    def keep(self, written: Collection[str], known: Sequence[TapedLoss | Pass]) -> None:
        if self._refusal is not None:
            raise self._refusal
        waiting, self._waiting = self._waiting, []
        for backward, passes, share in waiting:
            backward.close()
            self._note(self.collector.collect_backward(backward, share, self.step.counted_in(passes)))
        if self._opaque and self.tape.mode == "auto" and not self.shadows:
            found = {name: self.tape.parameters()[name].grad for name in written}
            unseen = self.missing({name: g for name, g in found.items() if g is not None}, self.now)
            if unseen:
                self._repeat_later(unseen)
        self._keep_written(written, known)
        self._before, self._mark = self._mark if self.tape.earlier else None, None

    def _keep_written(self, written: Collection[str], known: Sequence[TapedLoss | Pass]) -> None:
        """Take back what was collected for blocks without a gradient, as of ``backward(inputs=...)``.

        A loss whose gradient comes in parts, each for other parameters, counts once, also where these share a block.
        """
        assert self._mark is not None
        step, estimates = self._mark
        kept = {name for name in self.now if not self.names_of([name]).isdisjoint(written)}
        parts = [one for one in known if one.brought and one.brought.isdisjoint(written)]
        begun = frozenset[str]().union(*(one.brought for one in parts))
        again = {name for name in kept if not self.names_of([name]).isdisjoint(begun)}
        if again and len(parts) < len(known):
            raise ValueError(
                f"the gradients of {', '.join(sorted(self.names_of(again)))} were asked for in parts, and the parts "
                "are of different losses: their block has no curvature of one loss. Give all parameters of a layer to "
                "one backward(inputs=...), or a block to each (bias='separate')."
            )
        if left := self.now - kept | again:
            self.collector.lose(left, estimates)
            self.step.lose(left, step)
        if parts and len(parts) == len(known):
            self.step = self.step.with_account_of(step)
            self.collector.join(estimates)
            for one in known:
                one.arriving = None

    def drop(self) -> None:
        self._stop_waiting()
        self._undo(self._mark)
        self._mark = None

    def gone(self, left: Collection[str]) -> None:
        lost = {name for name in self.reached if self.names_of([name]).isdisjoint(left)}
        self.collector.lose(lost)
        self.step.lose(lost)

    def take_back(self) -> None:
        self._undo(self._before)
        self._before = None

    def _undo(self, since: tuple[Any, Any] | None) -> None:
        if since is not None:
            step, estimates = since
            self.back_to(step)
            self.collector.back_to(estimates)

    def clear(self) -> None:
        self._stop_waiting()
        self.start_again()
        self._mark = self._before = None

    # From a loss to the collector

    def _open(self, passes: list[Pass]) -> list[Pass]:
        """Those to collect from now; where passes hide something, they are repeated at the end of the step instead."""
        if self.shadows:
            for origin in passes:
                if origin in self.tape.passes:
                    origin.recorder, origin.again = None, True
        return [origin for origin in passes if origin.recorder is not None]

    def read(self, origin: Pass, output: Tensor, gradient: Tensor) -> tuple[Terms, Weight] | None:
        """What the gradient at the output of a pass tells of losses that nobody saw."""
        return self._at_output.read(self.step, origin, output, gradient)

    def take(self, passes: list[Pass], terms: Terms, share: Weight, calls: list[TapedLoss], waits: bool = True) -> None:
        """Collect from some passes the curvature of a loss.

        Args:
            passes: Those that led to it.
            terms: Of the loss.
            share: How it enters what is minimised.
            calls: Those that it consists of, where somebody saw them.
            waits: Whether the user's own backward pass may bring it.
        """
        recorder = merged([origin.recorder for origin in passes if origin.recorder is not None])
        hooked = [o for o in passes if o.recorder is not None and o.recorder.hooks.look([terms.output])]
        kind, end = self.curvature.kind, terms.output.grad_fn
        with self._open_graph(passes, terms.output):
            if not isinstance(terms, (PickedTerms, GatheredTerms, ApartTerms)):
                terms = in_their_places(terms, passes, self.batch_dim)
            signals = Signals.of(
                terms if kind == "empirical" else terms.fisher(strict=False),
                *(kind, self.curvature.samples, self.generator),
                batch=number_of_examples(passes, terms.output, recorder.batch),
                together=True,
                others_aggregated=partial(self._losses.others_aggregated, passes, calls, self.collector.parameters),
            )
            tell = signals.tell_one_term_each() if calls else None
            for call in calls:
                call.tell = tell
            # What hooks make of gradients on their way is no matter of curvature.
            if waits and calls and not hooked and self._waits(passes, recorder, end, signals, share):
                return self._refuse_hidden(recorder)
            scale = None if share.entries is None else share.entries.sqrt()
            counted = self.step.counted_in(passes)
            reached = self.collector.collect(
                recorder, signals.terms.output, signals, counted=counted, scale=scale, factor=share.factor
            )
            self._refuse_hidden(recorder)
            self._refuse_partial(reached, terms.output)
            self._note(reached)

    def _note(self, reached: set[str]) -> None:
        self.step.note(reached)
        self.now |= reached

    def _refuse_hidden(self, recorder: Recorder) -> None:
        """Raise what a reentrant checkpoint raises where a signal passes through it; one may also end there."""
        self._opaque |= bool(recorder.explained.custom)
        hides = "CheckpointFunctionBackward" in recorder.explained.custom
        if hides and self.tape.mode == "auto" and self._mark is not None:
            raise RuntimeError("a checkpoint with use_reentrant=True hides parameters")

    def _refuse_partial(self, reached: set[str], output: Tensor) -> None:
        """Refuse blocks with uses that were seen, and others in the inner backward pass of a custom function."""
        known = [self.tape.seen()[name] for name in sorted(self.names_of(reached))] if self.tape.concealed else []
        if both := [p for p in known if id(p) in self.tape.concealed]:
            raise hiding(both, [output])

    def _waits(self, passes: list[Pass], recorder: Recorder, end: Any, signals: Signals, share: Weight) -> bool:
        """Whether the user's own backward pass brings empirical statistics, so that none of ours is needed.

        It does not where it brings something besides the loss: that of another loss, of a penalty on activations.
        """
        if signals.kind != "empirical" or share.factor is None or isinstance(signals, JointSignals):
            return False
        sites = {site.edge.node for site in recorder.sites}
        if not only_way(torch._C._current_autograd_node(), end, sites):
            return False
        backward = self.collector.await_backward(recorder, signals, lambda: self.tape.under_way)
        if backward is not None:
            self._waiting.append((backward, passes, share.factor))
        return backward is not None

    def _stop_waiting(self) -> None:
        for backward, *_ in self._waiting:
            backward.close()
        self._waiting = []
        self._gathered.clear()

    @contextlib.contextmanager
    def _open_graph(self, passes: list[Pass], output: Any) -> Iterator[None]:
        """For passes of our own through the user's graph, which a reentrant checkpoint refuses.

        What the user's backward pass has brought so far is taken back then, and its passes are repeated at the end of
        the step; earlier ones of the step keep their part.
        """
        try:
            with self.tape.own_pass(passes, output):
                yield
        except RuntimeError as error:
            if self.tape.mode != "auto" or "use_reentrant" not in str(error) or self._mark is None:
                raise
            self._repeat_later()

    def _repeat_later(self, unseen: set[str] | None = None) -> None:
        """Passes hide something: take back what the backward pass under way has brought, and repeat its passes.

        Args:
            unseen: The parameters, where the backward pass has ended. What was seen of passes whose gradient at the
                output nobody kept stays then; later ones will be repeated.
        """
        self.hidden = self.tape.cautious = True
        arrived = [
            o for o in self.tape.passes if o.arriving is not None or any(c.arriving is not None for c in o.calls)
        ]
        if unseen and not all(o.arriving is not None or any(c.whole for c in o.calls) for o in arrived):
            return
        self.drop()
        self.begin()
        for origin in arrived:
            origin.recorder, origin.again, origin.unseen = None, True, unseen or set()

    # The step so far

    def end(self) -> None:
        """All backward passes of the step have ended, and none is taken back any more."""
        self._before = None
        self._stop_waiting()

    @property
    def shadows(self) -> bool:
        """Whether statistics come from passes that are repeated."""
        return self.tape.shadows or (self.tape.mode == "auto" and (self.hidden or self.tape.is_compiled()))

    def missing(self, gradients: Mapping[str, Tensor], reached: Iterable[str] | None = None) -> set[str]:
        """Parameters with a gradient that no statistics explain; of the blocks ``reached``, by default in the step."""
        found = self.names_of(self.reached if reached is None else reached)
        return {n for n, g in gradients.items() if n not in found | self.elsewhere and bool(g.any())}

    def names_of(self, blocks: Iterable[str]) -> set[str]:
        """The parameters of some blocks."""
        return {part.name for name in blocks for part in self.collector.estimators[name].block.parts}

    def start_again(self) -> None:
        """Forget what was collected in the step, draws included."""
        self.collector.discard()
        self.collector.forget()
        self.step = Step()
        self.generator.manual_seed(self._seed)
