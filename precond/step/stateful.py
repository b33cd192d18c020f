"""What an optimizer keeps: state dicts, templates of checkpoints, and work that is undone where something raises."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from precond.distributed.checkpoint import PACKED, asked_by_checkpoint, marked, packed, unpacked
from precond.distributed.sharded import any_sharded, tell, together
from precond.step.loading import SCHEDULED, require_layout
from precond.step.norm_control import is_matrix, radius
from precond.step.scheduled import ScheduledOptimizer
from precond.step.transaction import Transaction
from solvers.precision import working_dtype


class StatefulOptimizer(ScheduledOptimizer):
    """A :class:`ScheduledOptimizer` whose state is saved and loaded whole, and changes whole or not at all."""

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "grad"

    def update_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options of a group for the second half of the step."""
        return group

    @classmethod
    def method_name(cls) -> str:
        """The name of the method in checkpoints: that of its class here, also for classes that users derive from it."""
        return next(base.__name__ for base in cls.__mro__ if base.__module__.split(".")[0] == "precond")

    def apart(self) -> Collection[Tensor]:
        """Parameters whose directions are all there is to their moves but the rate: no momentum, no bound."""
        return ()

    # Whole or not at all

    def mark(self) -> Any:
        """What is kept in objects of the method's own, as it is now, for :meth:`back_to`.

        Attributes, the groups and the state are looked after by :class:`~precond.step.transaction.Transaction`.
        """

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since :meth:`mark`, because something raised."""

    def transaction(self, random: bool = False) -> Transaction:
        """A block in which everything happens or nothing, whatever raises.

        Args:
            random: Whether the global random streams are put back as well, because the user's closure draws from them.
        """
        mark = self.mark()
        device = next(p.device for group in self.param_groups for p in group["params"]) if random else None
        return Transaction(self, lambda: self.back_to(mark), device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with self.transaction():
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, in torch's layout; for ``torch.distributed.checkpoint`` complete as a template."""
        asked = asked_by_checkpoint()
        if asked:
            self.begin_states()
        out = super().state_dict()
        out["state"] = {key: {n: x for n, x in own.items() if n != PACKED} for key, own in out["state"].items()}
        out["state"] = {key: own for key, own in out["state"].items() if own}
        out["state"] = self.spread(out["state"])
        self.complete(out)
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        if asked:
            for group, schedules in zip(self.param_groups, self.schedules, strict=True):
                for p in group["params"]:
                    entries = out["state"].get(numbers[p], {})
                    if not entries and not p.requires_grad:
                        continue  # it is frozen
                    out["state"][numbers[p]] = packed(entries, self._template(p, entries, group, schedules))
        else:  # older files of torch.distributed.checkpoint have no such entry, which a template would ask for
            for group, schedules in zip(out["param_groups"], self.schedules, strict=True):
                group.update({SCHEDULED: ",".join(sorted(schedules))} if schedules else {})
        marked(out, {number for p, number in numbers.items() if p.requires_grad}, self.method_name())
        return out

    def spread(self, states: dict[int, Any]) -> dict[int, Any]:
        """States by number, with what single processes keep laid out over all of them."""
        return states

    def require_fitting(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that was saved under conditions that do not hold any more; nothing has changed yet.

        Raises:
            ValueError: Naming them.
        """

    def gather(self) -> None:
        """After loading: keep what belongs to this process."""

    def complete(self, saved: dict[str, Any]) -> None:
        """Add to a ``state_dict`` what the method keeps elsewhere."""

    def first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Entries that the state of a parameter has from its first step on, as they are before it."""
        return {}

    def _template(
        self, p: Tensor, known: Mapping[str, Any], group: dict[str, Any], schedules: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the state of every parameter holds in a checkpoint, with the values that it has before a first step."""
        # A state without entries before its first step is packed whole, by a fresh optimizer and by one that has run.
        begins = type(self).first_state is not StatefulOptimizer.first_state
        out = dict(self.expected_state(p, group) or {}) if begins else {}
        if not out.keys() <= known.keys():
            out = self.first_state(p, group)
        own = self.update_options({**group, "momentum": 1.0} if "momentum" in schedules else group)
        if own["momentum"] and self.needs != "closure" and p not in self.apart():
            dtype = working_dtype(p) if self.needs == "grad" else p.dtype
            out.setdefault("momentum_buffer", torch.zeros_like(p, dtype=dtype))
        if own.get("lookahead") is not None:
            out |= {"trend": torch.zeros_like(p, dtype=working_dtype(p)), "lookahead": 0.0}
        if own.get("hyperball") and is_matrix(p) and "radius" not in known:
            out["radius"] = radius(p)
        return out

    def begin_states(self) -> None:
        """Give all states their first entries: the flat form of a checkpoint restores those only that are there."""
        for group, schedules in zip(self.param_groups, self.schedules, strict=True):
            for p in group["params"]:
                if p.requires_grad:
                    own = self.state[p]
                    own.update({**self._template(p, own, group, schedules), PACKED: 0, **own})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If entries are missing, or are not those of the parameters; nothing has changed then.
        """
        with self.loading():
            state_dict = unpacked(state_dict, self.method_name())
            require_layout(state_dict, type(self).__name__)
            self.require_fitting(state_dict)
            super().load_state_dict(state_dict)
            self.gather()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """A block that loads whole or not at all; of sharded parameters in all processes that share them, or in none.

        Raises:
            OtherRankFailed: If another process could not load its part.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        with self.transaction() as whole:
            if any_sharded(params):
                whole.tell = partial(tell, params)
            yield
            together(params)

    def same_precision(self, gradients: dict[Tensor, Tensor]) -> None:
        """Take the state along where the model went on in another precision, by ``model.double()``."""
        known = self.__dict__.setdefault("_precisions", {})  # not in __init__, because copies start without it
        for p in gradients:
            if known.get(p, p.dtype) != p.dtype:
                self.convert(p)
        known.update({p: p.dtype for p in gradients})

    def convert(self, p: Tensor) -> None:
        """A parameter is in another precision than before: convert its state."""
        dtype, state = working_dtype(p), self.state[p]
        wide = {k: x for k, x in state.items() if isinstance(x, Tensor) and x.ndim and x.is_floating_point()}
        state.update({name: x.to(dtype) for name, x in wide.items()})
