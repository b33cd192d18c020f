"""Second moments of inputs that several layers read, taken once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Moment = tuple[Tensor, Tensor | float]  # a sum over rows, and how many count


class InputMoments:
    """The moments of one pass, by the memory of the inputs.

    Queries, keys and values of attention read one tensor, as do gate and value of a gated layer. Inputs are the same
    where they lie in the same memory in the same layout, and nothing has written to it in between. Memory is known by a
    weak reference, so it is freed as without this, and what takes its place later is not mistaken for it.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[StorageWeakRef], Tensor, int, Tensor | float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a weak reference of a storage is an address, which a copy would free a second time."""
        return {"_known": {}}

    def of(self, inputs: Tensor, valid: Tensor | None, how: Hashable, make: Callable[[], Moment]) -> Moment:
        """The moment of some inputs.

        Args:
            inputs: Of which it is.
            valid: Weights of the positions.
            how: What else determines it.
            make: Computes it.

        Returns:
            It, for the caller to change in place.
        """
        tensors = [inputs] if valid is None else [inputs, valid]
        if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors):  # without a version
            return make()
        refs = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        key = (how, *((ref.cdata, _layout(t)) for ref, t in zip(refs, tensors, strict=True)))
        found = self._known.get(key)
        if found is not None and found[1]._version == found[2]:
            _, total, _, count = found
            return total.clone(), count
        total, count = make()
        self._known[key] = (refs, total, total._version, count)
        return total, count


def _layout(t: Tensor) -> Hashable:
    return t.dtype, t.device, t.storage_offset(), t.shape, t.stride(), t._version
