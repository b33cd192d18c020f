"""Backward signals: cotangents of the outputs whose gradients' outer products sum to a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.losses import JoinedTerms, Terms
from curvature.losses.picked import ApartTerms, ExampleTerms, GatheredTerms

FisherKind = Literal["exact", "mc", "empirical"]
KINDS: tuple[FisherKind, ...] = ("exact", "mc", "empirical")
#: Weights that tell examples apart are powers of two with exponents below this: half the range of float32 is left.
TAG_BASE = 32
#: How to mend outputs whose examples do not lie where they are looked for.
SAY_WHICH = (
    "Say which axis of the output counts the examples (batch_dim=1; loop=Loop(batch_dim=1) for an optimizer, "
    "backend_kwargs={'batch_dim': 1} for laplace-torch), or return outputs with the examples first, and the targets "
    "alike."
)


def check_kind(kind: str) -> FisherKind:
    """The kind itself if it is one of ``"exact"``, ``"mc"``, ``"empirical"``; a ValueError otherwise."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    return kind


@dataclass(frozen=True)
class Signals:
    r"""The signals ``v_k`` of one batch, output-shaped, with :math:`C = \frac{1}{total} \sum_k J^\top v_k v_k^\top J`.

    ``exact`` sends one column of a square root of the loss's Hessian per pass, and the positions of an example one by
    one where an example has several: their gradients must not be added before they are squared. ``mc`` draws all
    terms at once, since independent draws with mean zero have no cross terms in expectation. ``empirical`` sends the
    gradients of the terms, one position at a time, or ``together``.

    Args:
        terms: The loss of the batch.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        samples: Number of draws for ``mc``.
        generator: Source of the draws.
        batch: Number of examples of the model, where the loss was called on flattened examples and positions.
        together: For ``empirical``: add up the terms of an example, as one backward pass of the loss does.
        given: Signals that were made before, in the place of those of ``kind``.
        others_aggregated: Tells whether every other loss of the same pass has one term for each example.
    """

    terms: Terms
    kind: FisherKind
    samples: int = 1
    generator: torch.Generator | None = None
    batch: int | None = None
    together: bool = False
    given: tuple[Tensor, ...] | None = None
    others_aggregated: Callable[[], bool] = lambda: True

    @staticmethod
    def of(terms: Terms, kind: FisherKind, *options: Any, **named: Any) -> Signals:
        """The signals of one loss or of a sum of losses; arguments as for the class."""
        made: type[Signals] = Signals
        if isinstance(terms, JoinedTerms):
            joined: dict[type[Terms], type[Signals]] = {GatheredTerms: GatheredSignals, ApartTerms: ApartSignals}
            made = joined.get(type(terms), JointSignals)
        return made(terms, kind, *options, **named)

    @cached_property
    def examples(self) -> int:
        """Number of examples.

        Raises:
            ValueError: If the output has them along its second axis.
        """
        n, r, _ = self.terms.shape
        if isinstance(self.terms, ExampleTerms):
            return n
        if self.batch and self.batch == r != n and r > 1:
            raise ValueError(
                f"the inputs hold {self.batch} examples along their first axis, but the output, of shape "
                f"{tuple(self.terms.output.shape)}, has {n} rows there, and the examples seem to lie along its second "
                f"axis. {SAY_WHICH}"
            )
        return self.batch if self.batch and (n * r) % self.batch == 0 and n % self.batch == 0 else n

    @property
    def positions(self) -> int:
        """Terms per example."""
        n, r, _ = self.terms.shape
        return n * r // max(1, self.examples)

    @cached_property
    def aggregated(self) -> bool:
        """Whether one term of each example counts at most, in all losses of the pass: the model aggregates positions.

        Slicing the other positions away, masking them and ignoring their targets are one loss. Where an example has
        several terms the device is asked, once, so that nobody should ask who does not choose by the answer.
        """
        return self.others_aggregated() and self.one_term_each

    @cached_property
    def one_term_each(self) -> bool:
        """The same of this loss alone."""
        return self.tell_one_term_each()()

    def tell_one_term_each(self) -> Callable[[], bool]:
        """What tells that later, of which only the mask stays alive until then."""
        mask = None if self.positions == 1 else self.mask
        return lambda: mask is None or bool((mask.sum(-1) <= 1).all())

    @property
    def mask(self) -> Tensor:
        """Valid terms, ``(examples, positions)``."""
        return self.terms.mask.reshape(self.examples, self.positions)

    def __len__(self) -> int:
        """Number of backward passes."""
        if self.given is not None:
            return len(self.given)
        return self.samples if self.kind == "mc" else self._number()

    def _number(self) -> int:
        if self.kind == "empirical":
            return 1 if self.together else self.positions
        return self.positions * self.terms.columns

    def __iter__(self) -> Iterator[Tensor]:
        """All signals, examples together."""
        if self.given is not None:
            yield from self.given
        else:
            yield from self._draws() if self.kind == "mc" else self._made()

    def _made(self) -> Iterator[Tensor]:
        """Those that are no draws."""
        if self.kind == "empirical":
            gradient = self.terms.gradient()
            yield from [gradient] if self.together else self._by_position(gradient)
        else:
            for c in range(self.terms.columns):
                yield from self._by_position(self.terms.sqrt_column(c))

    def stacks(self, size: int) -> Iterator[Tensor]:
        """All signals, up to ``size`` of them at once: ``(k, *output)``; of the shortest root where there are columns.

        Valid where examples and their positions are independent: every root then gives the same curvature.
        """
        if self.kind != "exact" or self.given is not None or self.positions > 1:
            yield from stacked(iter(self), size)
            return
        rank = self.terms.rank
        for start in range(0, rank, size):
            yield self.terms.root(start, min(rank, start + size))

    def one_by_one(self) -> Iterator[Tensor]:
        """All signals, for one example at a time: for uses of parameters that do not keep examples apart."""
        for signal in self:
            for one in torch.eye(self.examples, device=signal.device):
                yield self.weighted(signal, one)

    def weighted(self, signal: Tensor, weights: Tensor) -> Tensor:
        """A signal times one number per example."""
        rows = self.terms.rows(signal).reshape(self.examples, -1)
        return self.terms.unrows((rows * weights.to(rows).reshape(-1, 1)).reshape(self.terms.shape))

    def probe(self, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        """A signal without symmetries (random, always the same) on all valid terms, times a weight per example."""
        shape = (self.examples, self.positions, self.terms.columns)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = noise.to(self.terms.output.detach()) * self.mask.unsqueeze(-1)
        signal = self.terms.unrows(rows.reshape(self.terms.shape))
        return signal if weights is None else self.weighted(signal, weights)

    def probes(self) -> list[tuple[Tensor, Tensor]]:
        """For each loss its mask, and a signal on its valid terms; nothing if every term of one loss counts."""
        return [] if bool(self.mask.all()) else [(self.mask, self.probe())]

    def tags(self) -> Iterator[Tensor]:
        """Weights ``(examples,)`` that tell examples apart: any two examples differ in some of theirs.

        Powers of two, so that a backward pass that keeps examples apart scales with them exactly; as many sets of
        weights as the number of the last example has digits to the base :data:`TAG_BASE`.
        """
        number = torch.arange(self.examples)
        while True:
            yield 2.0 ** (number % TAG_BASE)
            number = number // TAG_BASE
            if not number.any():
                return

    def _draws(self) -> Iterator[Tensor]:
        if self.generator is None:
            raise ValueError("sampling needs a generator=torch.Generator(); the global random state is never used.")
        for _ in range(self.samples):
            yield self.terms.sample(self.generator) / self.samples**0.5

    def _by_position(self, signal: Tensor) -> Iterator[Tensor]:
        """The parts of a signal that start at each position of every example."""
        if self.positions == 1:
            yield signal
            return
        rows = self.terms.rows(signal).reshape(self.examples, self.positions, -1)
        for position in range(self.positions):
            only = torch.zeros_like(rows)
            only[:, position] = rows[:, position]
            yield self.terms.unrows(only.reshape(self.terms.shape))


def stacked(signals: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Signals, up to ``size`` of them at once: ``(k, *output)``."""
    while some := list(islice(signals, size)):
        yield torch.stack(some) if len(some) > 1 else some[0].unsqueeze(0)


@dataclass(frozen=True)
class JointSignals(Signals):
    """The signals of a sum of losses, on the vector that joins their outputs.

    Draws of all losses are sent together, since they are independent; other signals loss by loss, so that C is the
    weighted sum of theirs.
    """

    @property
    def parts(self) -> list[Signals]:
        """The signals of each loss."""
        options = (self.kind, self.samples, self.generator, self.batch, self.together)
        return [Signals(terms, *options) for _, terms in self._joined.parts.values()]

    @cached_property
    def examples(self) -> int:
        found = {key: part.examples for key, part in zip(self._joined.parts, self.parts, strict=True)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"the losses see different numbers of examples ({found}), so their gradients cannot be told apart by "
                "example. The first axis of every output must count the same examples."
            )
        return next(iter(found.values()))

    def tell_one_term_each(self) -> Callable[[], bool]:
        found = [part.tell_one_term_each() for part in self.parts]
        return lambda: all(tell() for tell in found)

    def _number(self) -> int:
        return sum(map(len, self.parts))

    def stacks(self, size: int) -> Iterator[Tensor]:
        return stacked(iter(self), size)

    def _made(self) -> Iterator[Tensor]:
        for (key, (scale, _)), part in zip(self._joined.parts.items(), self.parts, strict=True):
            for signal in part:
                yield self._joined.embed(key, signal * scale.sqrt())

    def weighted(self, signal: Tensor, weights: Tensor) -> Tensor:
        pairs = zip(self.parts, self._joined.pieces(signal), strict=True)
        return self._joined.join([part.weighted(piece, weights) for part, piece in pairs])

    def probes(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._joined.parts, self.parts, strict=True)
        return [(part.mask, self._joined.embed(key, part.probe())) for key, part in pairs]

    def probe(self, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        return self._joined.join([part.probe(weights, seed + k) for k, part in enumerate(self.parts)])

    @property
    def _joined(self) -> JoinedTerms:
        assert isinstance(self.terms, JoinedTerms)
        return self.terms


@dataclass(frozen=True)
class GatheredSignals(JointSignals):
    """The signals of several calls of a loss on parts of one output."""

    @property
    def mask(self) -> Tensor:
        return torch.stack([part.mask for part in self.parts]).any(0)

    def tell_one_term_each(self) -> Callable[[], bool]:
        mask = self.mask  # of all parts together: one at each step of time is many
        return lambda: bool((mask.sum(-1) <= 1).all())

    def probes(self) -> list[tuple[Tensor, Tensor]]:
        return Signals.probes(self)


@dataclass(frozen=True)
class ApartSignals(JointSignals):
    """The signals of several calls of a loss on outputs of their own."""

    def probes(self) -> list[tuple[Tensor, Tensor]]:
        return [] if bool(torch.stack([part.mask.all() for part in self.parts]).all()) else super().probes()
