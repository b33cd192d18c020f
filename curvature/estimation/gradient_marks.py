"""What tells whether a backward pass wrote gradients, and whether they still stand when the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from torch import Tensor

from curvature.model.fully_sharded import FullyShard, Mark, shard_of

#: Parameter -> what its gradient is known by; none for those without.
Marks = dict[str, Mark]
#: Parameter -> length of a sample of its gradient, 0-d.
Lengths = dict[str, Tensor]
#: Entries in a sample: each is a look into memory that no cache has.
SAMPLE = 128


class GradientMarks:
    """Marks of the gradients of some parameters.

    A mark tells that a tensor was written through autograd or by its name; what is done through ``.data`` or NumPy
    shows in the numbers alone, of which samples are kept.

    Args:
        parameters: The parameters at this moment, by name.
        shards: Those under ``fully_shard``, if there are any.
    """

    def __init__(self, parameters: Callable[[], Mapping[str, Tensor]], shards: FullyShard | None) -> None:
        self._parameters, self._shards = parameters, shards

    def now(self) -> Marks:
        """What tells whether a gradient was written since."""
        if self._shards is not None:
            marks = {name: self._shards.mark(p) for name, p in self._parameters().items()}
            return {name: mark for name, mark in marks.items() if mark}
        return {name: _mark(p.grad) for name, p in self._parameters().items() if p.grad is not None}

    @torch.no_grad()
    def lengths(self, names: Iterable[str]) -> Lengths:
        """Lengths of samples of the gradients that are there; the host does not wait for the device."""
        if self._shards is not None:
            return {}
        found = {name: g for name in names if (g := self._gradient(name)) is not None}
        return dict(zip(found, torch._foreach_norm([_sample(g) for g in found.values()]), strict=True)) if found else {}

    def gone(self, marks: Marks, lengths: Lengths, now: Mapping[str, float], nonzero: Set[str] | None) -> set[str]:
        """The gradients that are not there any more: set to ``None`` or to zeros since.

        One that has been zero since it was written is there, unless every other one is gone.

        Args:
            marks: Of when they were written.
            lengths: Likewise.
            now: The present lengths.
            nonzero: Parameters under ``fully_shard`` with a gradient that is not zero in some process, where known.
        """
        if self._shards is not None:
            stand = any(self._stands(name, mark, self._shards, nonzero) for name, mark in marks.items())
            return set() if stand else set(marks)
        found = {name: self._gradient(name) for name in marks}
        zero = {
            name for name, g in found.items() if g is not None and now.get(name) == 0 and not bool(_entries(g).any())
        }
        was = numbers({name: lengths[name] for name in zero & lengths.keys()})
        gone = {name for name, g in found.items() if g is None or was.get(name, 0) != 0}
        rest = marks.keys() - gone
        written = {name for name in rest & zero if marks[name] != _mark(self._parameters()[name].grad)}
        return set(marks) if written == rest else gone

    def _gradient(self, name: str) -> Tensor | None:
        parameter = self._parameters().get(name)
        gradient = None if parameter is None else parameter.grad
        return None if gradient is None else shard_of(gradient)

    def _stands(self, name: str, mark: Mark, shards: FullyShard, nonzero: Set[str] | None) -> bool:
        parameter = self._parameters().get(name)
        if parameter is not None:
            if mark == shards.mark(parameter) or shards.waits(parameter):
                return True
            if nonzero is not None:
                return name in nonzero
        gradient = self._gradient(name)
        return gradient is not None and bool(gradient.any())


def numbers(lengths: Lengths) -> dict[str, float]:
    """The lengths as numbers, for which the host waits once."""
    if not lengths:
        return {}
    device = next(iter(lengths.values())).device
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    together = torch.stack([length.to(device, dtype) for length in lengths.values()])
    return dict(zip(lengths, together.tolist(), strict=True))


def proportional(now: Mapping[str, float], was: Mapping[str, float], rtol: float) -> bool:
    """Whether some lengths are one multiple of others, as where gradients were clipped by their norm or unscaled."""
    both = [(now[name], x) for name, x in was.items() if name in now]
    ratios = [y / x for y, x in both if x]
    appeared = any(y and not x for y, x in both)
    return not appeared and (not ratios or not max(ratios) - min(ratios) > rtol * max(ratios))  # NaN is no sign


def _sample(gradient: Tensor) -> Tensor:
    """Entries spread over a gradient, up to twice :data:`SAMPLE` of them; all of one that does not lie in one piece."""
    flat = _entries(gradient)
    if flat.numel() <= SAMPLE or not flat.is_contiguous():
        return flat
    return flat.view(-1)[:: flat.numel() // SAMPLE]


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _mark(gradient: Tensor | None) -> Mark:
    return () if gradient is None else (id(gradient), gradient._version)
