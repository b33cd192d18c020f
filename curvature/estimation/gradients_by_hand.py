"""Gradients that did not come by ``backward()`` alone, known by samples of their entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.gradient_marks import Marks, Samples, lengths

#: Gradients of a step that are kept to tell what was put together of them; later ones are added to the last.
MOST = 32
#: Whole numbers up to this one are told from any others.
_FEW = 64
#: Powers of two from this one that a loss is multiplied by are scales of half precision.
_LARGE = 256
#: Precision from which lengths do not tell whole numbers from others.
_COARSE = 1e-5


@dataclass
class Asked:
    """What ``torch.autograd.grad`` found for parameters, while nobody knows whether it will stand in ``p.grad``.

    Attributes:
        marks: Of the gradients that stood.
        before: Samples of these.
        found: Of what was found.
        brought: The losses, or passes, that it is of.
    """

    marks: Marks
    before: Samples
    found: Samples = field(default_factory=dict)
    brought: Sequence[Any] = ()

    def taken(self, now: Samples, eps: float) -> bool:
        """Whether gradients are now what they were and this, or one multiple of the sum that is none of the first."""
        if (found := self._vectors(now, self.before.keys())) is None:
            return False
        present, before, more = found
        if _spanned(present - before - more, present, [], 8 * eps):
            return bool(present.any() or self.found.keys() <= now.keys())
        return _is_multiple(present, before + more, before, eps)

    def replaced(self, now: Samples, eps: float) -> bool:
        """Whether gradients are now this, or a multiple of it, in the place of others that stood before."""
        if (found := self._vectors(now)) is None:
            return False
        present, before, more = found
        return _is_multiple(present, more, before, eps)

    def _vectors(self, now: Samples, names: Set[str] = frozenset()) -> list[Tensor] | None:
        """The gradients now, those that stood, and what was found, where that is of parameters at all."""
        names = names | now.keys() | self.found.keys()
        return _joined([now, self.before, self.found], names) if self.found else None


def scale_taken_off(now: Samples, was: Samples, weights: Iterable[Tensor], eps: float) -> float:
    """What gradients were divided by since they were written: a scale or a number of batches, and no clipping.

    Args:
        now: The gradients.
        was: They, when they were written.
        weights: Of the losses whose gradients they are, each 0-d.
        eps: Of their dtype.
    """
    both = lengths(now | {f"{name} was": x for name, x in was.items() if name in now})
    ratio, told = _divided_by(both, {name: both[f"{name} was"] for name in now.keys() & was.keys()}, eps)
    if ratio == 1 or (told and _are_quotients(now, was, ratio)):
        return ratio
    scale = max((float(weight) for weight in weights), default=1.0)
    return scale if _LARGE <= scale <= ratio and math.frexp(scale)[0] == 0.5 else 1.0


def divided_in_parts(now: Samples, was: Samples, eps: float) -> bool:
    """Whether some gradients were divided by another number than others since they were written, clipping apart."""
    both = lengths(now | {f"{name} was": x for name, x in was.items() if name in now})
    found = set()
    for name in now.keys() & was.keys():
        if both[name] and both[f"{name} was"]:
            number, told = _divided_by({name: both[name]}, {name: both[f"{name} was"]}, eps)
            found.add(number if told and _are_quotients({name: now[name]}, {name: was[name]}, number) else 1.0)
    return len(found) > 1


def _divided_by(now: Mapping[str, float], was: Mapping[str, float], eps: float) -> tuple[float, bool]:
    """What gradients were divided by since they were written, if it is one number for all that is larger than 1.

    Arguments are their lengths and those when they were written, and the ``eps`` of their dtype.

    Returns:
        The number, 1 for none; and whether it is a power of two or small and whole, as a GradScaler or a loop that
        averages divides, and clipping does not.
    """
    ratios = [x / now[name] if now.get(name) else 0.0 for name, x in was.items() if x]
    if not ratios or not 1.5 < (ratio := max(ratios)) < float("inf"):
        return 1.0, False
    if any(abs(one / ratio - 1) > 32 * eps for one in ratios):
        return 1.0, False
    number = float(round(ratio))
    told = (number <= _FEW or math.frexp(number)[0] == 0.5) and abs(ratio / number - 1) <= 32 * eps
    return (number, True) if told else (ratio, False)


def _are_quotients(now: Samples, was: Samples, number: float) -> bool:
    """Whether gradients of low precision are what division by a number makes of others, to the last bit.

    Their lengths alone do not tell: rounding is as large as the distance of whole numbers there.
    """
    for name in now.keys() & was.keys():
        x, before = now[name], was[name]
        if torch.finfo(x.dtype).eps > _COARSE and x.shape == before.shape:
            found = (before / number, before * (1 / number))
            if not any(torch.equal(x, one.to(x.dtype)) for one in found):
                return False
    return True


class Dropped:
    """Gradients of a step that no statistics are of: zeroed since, or only returned by ``torch.autograd.grad``."""

    def __init__(self) -> None:
        self._found: list[tuple[set[Any], Samples]] = []

    def add(self, of: Set[Any], samples: Samples) -> None:
        """Keep those of some losses, or passes."""
        if not of:
            return
        if len(self._found) < MOST:
            self._found.append((set(of), samples))
            return
        losses, last = self._found[-1]
        both = {n: x + samples[n] for n, x in last.items() if n in samples and samples[n].shape == x.shape}
        self._found[-1] = losses | of, last | samples | both

    def counted(self, losses: Sequence[Any]) -> None:
        """These have brought a gradient that counts."""
        left = ((of.difference(losses), samples) for of, samples in self._found)
        self._found = [(of, samples) for of, samples in left if of]

    def __bool__(self) -> bool:
        return bool(self._found)

    def explain(self, now: Samples, was: Samples, eps: float) -> bool:
        """Whether gradients are now what they were and multiples of these; not, where they are one of the first alone.

        So clipping, noise, and whatever else is done to entries are told from sums of several gradients.
        """
        names = now.keys() | was.keys()
        found = _joined([now, was, *(samples for _, samples in self._found)], names)
        if found is None:
            return False
        present, before, *others = found
        rtol = eps**0.5
        if _spanned(present, present, [before], rtol):
            return False
        return len(present) <= 1 + len(others) or _spanned(present, present, [before, *others], rtol)


def _joined(gradients: Sequence[Mapping[str, Tensor]], names: Set[str]) -> list[Tensor] | None:
    """Samples of several gradients as vectors, zeros where there is none; ``None`` if they are not alike, or empty."""
    out: list[list[Tensor]] = [[] for _ in gradients]
    for name in sorted(names):
        known = [samples.get(name) for samples in gradients]
        shapes = {x.shape for x in known if x is not None}
        if len(shapes) > 1:
            return None
        if shapes:
            (shape,) = shapes
            for pieces, x in zip(out, known, strict=True):
                pieces.append(torch.zeros(shape).double() if x is None else x.detach().cpu().double())
    return [torch.cat(pieces) for pieces in out] if out[0] else None


def _is_multiple(present: Tensor, of: Tensor, but: Tensor, eps: float) -> bool:
    """Whether a vector is a multiple of another one, and of a third it is none."""
    rtol = eps**0.5
    return not _spanned(present, present, [but], rtol) and _spanned(present, present, [of], rtol)


def _spanned(rest: Tensor, whole: Tensor, others: Sequence[Tensor], rtol: float) -> bool:
    """Whether others explain a vector up to a share of another one; NaN is no sign."""
    columns = [other / other.norm() for other in others if bool(other.any())]
    if columns:
        A = torch.stack(columns, 1)
        if not bool(torch.isfinite(A).all() and torch.isfinite(rest).all()):
            return True
        rest = rest - A @ torch.linalg.lstsq(A, rest, rcond=1e-10, driver="gelsd").solution
    return not bool(rest.norm() > rtol * whole.norm())
