"""What tells whether a backward pass wrote gradients, and whether they still stand when the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from torch import Tensor

from curvature.model.fully_sharded import FullyShard, Mark, shard_of

#: Parameter -> what its gradient is known by; none for those without.
Marks = dict[str, Mark]
#: Parameter -> entries spread over its gradient.
Samples = dict[str, Tensor]
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

    def samples(self, names: Iterable[str] | None = None) -> Samples:
        """Copies of samples of the gradients that are there; the host does not wait for the device."""
        if self._shards is not None:
            return {}
        known = self._parameters()
        found = {name: known[name].grad for name in (known if names is None else names) if name in known}
        return copied({name: shard_of(g) for name, g in found.items() if g is not None})

    def gone(self, marks: Marks, samples: Samples, now: Mapping[str, float], nonzero: Set[str] | None) -> set[str]:
        """The gradients that are not there any more: set to ``None`` or to zeros since.

        One that has been zero since it was written is there, unless every other one is gone.

        Args:
            marks: Of when they were written.
            samples: Likewise.
            now: The present :func:`lengths`.
            nonzero: Parameters under ``fully_shard`` with a gradient that is not zero in some process, where known.
        """
        if self._shards is not None:
            stand = any(self._stands(name, mark, self._shards, nonzero) for name, mark in marks.items())
            return set() if stand else set(marks)
        found = {name: self._gradient(name) for name in marks}
        zero = {
            name for name, g in found.items() if g is not None and now.get(name) == 0 and not bool(_entries(g).any())
        }
        was = lengths({name: samples[name] for name in zero & samples.keys()})
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


@torch.no_grad()
def copied(gradients: Mapping[str, Tensor]) -> Samples:
    """Samples of some gradients."""
    alike: dict[object, list[str]] = {}
    for name, g in gradients.items():
        alike.setdefault((g.device, g.dtype), []).append(name)
    found: Samples = {}
    for names in alike.values():
        taken = [_sample(gradients[name]) for name in names]
        found |= zip(names, torch.cat(taken).split([x.numel() for x in taken]), strict=True)
    return found


def lengths(samples: Samples) -> dict[str, float]:
    """Their lengths as numbers, for which the host waits once."""
    if not samples:
        return {}
    norms = torch._foreach_norm(list(samples.values()))
    if len({(x.device, x.dtype) for x in norms}) > 1:
        dtype = torch.float64 if norms[0].device.type == "cpu" else torch.float32
        norms = tuple(x.to(norms[0].device, dtype) for x in norms)
    return dict(zip(samples, torch.stack(norms).tolist(), strict=True))


def _sample(gradient: Tensor) -> Tensor:
    """Entries spread over a gradient, up to twice :data:`SAMPLE` of them: the same ones however it lies in memory."""
    entries = _entries(gradient)
    step = max(1, entries.numel() // SAMPLE)
    if entries.is_contiguous():
        if step == 1:
            return entries.view(-1)
        return entries.as_strided((1 + (entries.numel() - 1) // step,), (step,))  # what two views would give
    places = torch.arange(0, entries.numel(), step, device=entries.device)
    return entries[torch.unravel_index(places, entries.shape)]


def _entries(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _mark(gradient: Tensor | None) -> Mark:
    return () if gradient is None else (id(gradient), gradient._version)
