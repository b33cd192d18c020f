"""What an optimizer does happens whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from curvature.model.streams import random_state, set_random_state
from precond.distributed.sharded import any_sharded, local
from precond.step.divergence import Diverged

_CONTAINERS = dict, list, set


class Transaction:
    """A part of an optimizer's work that leaves it as it was if anything raises: an error, or an interrupt.

    It holds what the optimizer held at the start: its attributes, and what its dicts, lists and sets contained, two
    levels deep. No tensor is copied: a step makes new ones, and the old ones live until it ends. Going back assigns
    only, so that it needs no memory. Parameters change last, in one operation (:meth:`move`). What was counted and said
    of a step that was refused stays (:class:`~precond.step.divergence.Diverged`).

    A context manager that may be entered several times, for parts of one work.

    Args:
        owner: The optimizer.
        back: Undoes what attributes and containers do not show; called after they were put back.
        device: Where the global random streams are to be put back as well, because the user's code draws from them.

    Attributes:
        tell: Told of what raises, and of what was handled when the work began, as long as other processes wait for a
            word of this one; ``None`` where none does.
    """

    def __init__(self, owner: Any, back: Callable[[], None], device: torch.device | None = None) -> None:
        self._owner, self._back, self._device = owner, back, device
        self.tell: Callable[[BaseException, BaseException | None], None] | None = None
        self._handled: BaseException | None = None
        self._random = [] if device is None else random_state(device)
        self._last: Callable[[], None] | None = None
        self._held = {
            name: (x, _content(x) if isinstance(x, _CONTAINERS) else None)
            for name, x in vars(owner).items()
            if not name.startswith("_optimizer_")
        }
        self._moved: list[tuple[Tensor, int]] = []
        self._done = False
        self._before: list[Tensor] | None = None

    def __enter__(self) -> Transaction:
        self._handled = sys.exc_info()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Diverged):
            return
        if self._done or any(p._version != version for p, version in self._moved):
            if self._before is None:  # interrupted after its last operation
                self.end()
                return
            torch._foreach_copy_([p for p, _ in self._moved], self._before)
        self.go_back()
        if self._device is not None:
            set_random_state(self._random, self._device)
        if self.tell is not None and error is not None:
            self.tell(error, self._handled)

    def end(self) -> None:
        """Do what was left for the end, once."""
        last, self._last = self._last, None
        if last is not None:
            last()

    def go_back(self) -> None:
        """Put everything back but what was moved."""
        own = vars(self._owner)
        for name in [name for name in own if name not in self._held and not name.startswith("_optimizer_")]:
            del own[name]
        for name, (value, content) in self._held.items():
            _refill(value, content)
            own[name] = value
        self._back()

    def move(
        self, pairs: Iterable[tuple[Tensor, Tensor]], last: Callable[[], None], *, more_follows: bool = False
    ) -> None:
        """Write values into tensors, in one operation; nothing that comes after it may fail, unless more follows.

        Args:
            pairs: Parameters, or what else is changed in place, and their new values.
            last: What is to be done at the :meth:`end`; cannot fail.
            more_follows: Whether something that may raise comes before that; costs a copy of the tensors.
        """
        pairs = [(t, value) for t, value in pairs if t.numel()]
        if any_sharded(t for t, _ in pairs):
            pairs = [(local(t), local(value)) for t, value in pairs if local(t).numel()]
        self._before = [t.detach().clone() for t, _ in pairs] if more_follows else None
        self._moved, self._last = [(t, t._version) for t, _ in pairs], last
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [value for _, value in pairs])
        self._done = True  # versions tell it as well, unless a dispatch mode was on


def _content(value: Any) -> Any:
    """Copies of a container and of the containers that it holds."""
    if not value or isinstance(value, set):
        return value.copy(), ()
    items = value.values() if isinstance(value, dict) else value
    return value.copy(), [(item, item.copy()) for item in items if isinstance(item, _CONTAINERS)]


def _refill(value: Any, content: Any) -> None:
    """Let a container hold what it held."""
    if content is None:
        return
    own, inner = content
    for part, before in ((value, own), *inner):
        if isinstance(part, list):
            part[:] = before
        else:
            part.clear()
            part.update(before)
