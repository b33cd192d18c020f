"""A model at one moment: what its modules remember, train or eval mode included, and the values of its buffers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container

import torch
from torch import Tensor, nn

#: Buffers that batch norm writes in train mode without telling their version, and reads in eval mode.
_RUNNING = ("running_mean", "running_var")


class Moment:
    """Attributes and buffers of all modules as they are now, and copies of what a pass may write in place.

    Args:
        model: The model.
        last: An earlier moment, whose copies of buffers that nobody has written since serve again.
        only: Buffers that are copied, by ``id``; all by default.

    Attributes:
        modules: Every module with its attributes and its buffers by name.
        parameters: All parameters by ``id``, or what stands in their places.
        buffers: All buffers by ``id``.
        values: Copies of them, which share memory as the buffers do.
        versions: How often each had been written.
        generators: States of the generators that modules hold.
    """

    def __init__(self, model: nn.Module, last: Moment | None = None, only: Container[int] | None = None) -> None:
        self.modules = [(m, dict(vars(m)), dict(m._buffers.items())) for m in model.modules()]
        self.parameters = {id(p) for p in model.parameters()}
        self.buffers = {id(b): b for *_, buffers in self.modules for b in buffers.values() if b is not None}
        self.versions = {key: writes(b) for key, b in self.buffers.items()}
        running = {id(buffers.get(name)): m.training for m, _, buffers in self.modules for name in _RUNNING}
        then = {} if last is None else last.values
        known = {
            key: b
            for key, b in then.items()
            if last and last.versions[key] == self.versions.get(key) and key not in running
        }
        new = {
            key: b
            for key, b in self.buffers.items()
            if key not in known and (only is None or key in only or running.get(key) is False)
        }
        self.values: dict[int, Tensor] = known | copied(new)
        self.generators = {
            value: value.get_state()
            for _, attributes, _ in self.modules
            if torch.Generator in set(map(type, attributes.values()))
            for value in attributes.values()
            if isinstance(value, torch.Generator)
        }

    def tensors(self) -> list[Tensor]:
        """All buffers and parameters, once each."""
        parameters = {id(p): p for module, *_ in self.modules for p in module.parameters(recurse=False)}
        return [*self.buffers.values(), *parameters.values()]

    def written(self) -> set[int]:
        """Buffers, by ``id``, that were written since."""
        return {key for key, b in self.buffers.items() if writes(b) != self.versions[key]}

    def restore(self, own: dict[int, Tensor] | None = None) -> None:
        """Give the modules the attributes, the states of generators and the buffers that they had.

        Args:
            own: Tensors in the places of the buffers, by ``id`` of these.
        """
        for module, attributes, buffers in self.modules:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            for name, value in attributes.items():
                if now.get(name, now) is not value:
                    now[name] = value
            # One was made or dropped; the buffers of torch.jit cannot be cleared.
            if list(module._buffers.keys()) != list(buffers):
                module._buffers.clear()
            for name, b in buffers.items():
                module._buffers[name] = b if own is None or b is None else own[id(b)]
        for generator, state in self.generators.items():
            generator.set_state(state)

    def had(self) -> dict[int, Tensor]:
        """The buffers as they were, by ``id``: copies that a pass may write.

        Raises:
            RuntimeError: If one was written since that was not copied.
        """
        lost = [b for key, b in self.buffers.items() if key not in self.values and writes(b) != self.versions[key]]
        if lost:
            raise RuntimeError(
                f"this pass is to be run again, and {self.name(lost[0])} was written since, which no pass before had "
                "done. Its value of then is gone. Run the batch again (zero_grad(), forward, backward, step()): from "
                "now on it is kept; or pass loop=Loop(capture='shadow')."
            )
        return copied({key: self.values.get(key, b) for key, b in self.buffers.items()})

    def name(self, buffer: Tensor) -> str:
        """What to call a buffer in a message."""
        for module, _, buffers in self.modules:
            for name, b in buffers.items():
                if b is buffer:
                    return f"the buffer {name!r} of a {type(module).__name__}"
        return "a buffer"


def copied(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Copies of tensors, of which those that share memory share it again."""
    homes = {
        key: t.untyped_storage()._cdata if type(t) is Tensor and t.layout is torch.strided else key
        for key, t in tensors.items()
    }
    count = Counter(homes.values())
    together = {key: t.detach() for key, t in tensors.items() if count[homes[key]] > 1}
    alone = {key: t.detach().clone() for key, t in tensors.items() if key not in together}
    return alone | copy.deepcopy(together)


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as far as torch counts it: not for those of inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0
