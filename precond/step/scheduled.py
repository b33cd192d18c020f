"""Parameter groups whose options may change with the steps, and their state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from precond.distributed.sharded import refuse, refuse_several_meshes
from precond.step.given import group_of, listed, require_parameters
from precond.step.loading import meant_before, not_of_a_moment, require_fit, require_layout, require_own
from precond.step.options import check_options, in_groups
from precond.step.schedules import FIXED, numbers_at, split
from precond.step.update import SCHEDULED_DECAY


class ScheduledOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose groups hold checked numbers at all times.

    Every numeric option but ``lr``, of the optimizer or of one group, may be a function of the number of steps taken
    before, such as ``damping=lambda step: max(0.1 * 0.99**step, 1e-4)``. The groups hold numbers at all times; before a
    step the functions write them. They are copied and pickled with the optimizer (a lambda cannot be pickled), but
    stay out of ``state_dict``, which holds the number of steps, from which a resumed run continues, and their names.

    Args:
        params: Parameters, groups, or named parameters.
        defaults: Options of the groups, some of them functions.
    """

    #: Options that must not change from step to step.
    fixed: ClassVar[frozenset[str]] = FIXED
    #: Whether parameters may be shared out over processes, as DTensors.
    takes_shards: bool = False
    #: Options of groups that are not in ``defaults``, from which torch's schedulers tell what a method has.
    reserved: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.schedules: list[dict[str, Callable[[int], Any]]] = []  # of each group
        self._resolved(defaults)
        super().__init__(listed(params, type(self).__name__), defaults)

    @property
    def steps(self) -> int:
        """Steps taken; in the groups, where every kind of checkpoint finds it."""
        groups = getattr(self, "param_groups", None)
        return int(groups[0]["steps"]) if groups else 0

    def check(self, options: dict[str, Any]) -> None:
        """Refuse options of a group outside their range; called again whenever a schedule changes one.

        Raises:
            ValueError: Naming the option, its value and the range.
        """
        check_options(options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group = self.group_of(param_group)
        param_group["params"] = require_parameters(param_group["params"], type(self).__name__)
        plain, schedules = self._resolved({**self.reserved, **self.defaults, **in_groups(param_group)})
        if plain["decay"] in SCHEDULED_DECAY and "initial_lr" not in plain:
            if not float(plain["lr"]) > 0:
                raise ValueError(
                    f"decay={plain['decay']!r} compares lr with the value it begins with, which must be positive, "
                    f"got {plain['lr']}. Begin with the peak and lower it by a scheduler."
                )
            plain["initial_lr"] = float(plain["lr"])
        plain.setdefault("first_lr", float(plain["lr"]))
        if self.takes_shards:
            others = [p for group in self.param_groups for p in group["params"]]
            refuse_several_meshes([*others, *param_group["params"]], type(self).__name__)
        super().add_param_group({**plain, "steps": self.steps})
        self.schedules.append(schedules)
        for p in self.param_groups[-1]["params"]:
            refuse(p, type(self).__name__, self.takes_shards)
            if p.is_complex():
                self.param_groups.pop()
                self.schedules.pop()
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} is complex ({p.dtype}), which {type(self).__name__} does "
                    "not take. Train torch.view_as_real(p), of which p is a view, in its place."
                )

    def group_of(self, given: Any) -> dict[str, Any]:
        """A group of parameters, or a refusal of what is none, see :func:`precond.step.given.group_of`."""
        return group_of(given, type(self), {**self.reserved, **self.defaults})

    def apply_schedules(self) -> None:
        """Write the options of the coming step into the groups, where they are functions of the step count.

        Raises:
            ValueError: If one is out of range; all groups are then as they were.
        """
        pairs = list(zip(self.param_groups, self.schedules, strict=True))
        numbers = [numbers_at(group, schedules, self.steps, self._check_what_changed) for group, schedules in pairs]
        for group, found in zip(self.param_groups, numbers, strict=True):
            group.update(found)

    def _check_what_changed(self, options: dict[str, Any]) -> None:
        """:meth:`check`, unless nothing but the steps and a learning rate within its range has changed since."""
        lr, known = options.get("lr"), self.__dict__.setdefault("_checked", [])
        rest = {name: value for name, value in options.items() if name not in ("lr", "steps", "params")}
        plain = type(lr) is float and 0 <= lr < math.inf and not any(isinstance(x, Tensor) for x in rest.values())
        if not (plain and rest in known):
            self.check(options)
            self.__dict__["_checked"] = [*known, rest][-len(self.param_groups) :] if plain else []

    def _resolved(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[[int], Any]]]:
        """Numbers for the coming step, checked, and the schedules that gave some of them."""
        plain, schedules = split(options, self.fixed)
        if not schedules:
            self.check(plain)
        return {**plain, **numbers_at(plain, schedules, self.steps, self.check)}, schedules

    def name_of(self, parameter: Tensor) -> str:
        """The name given with a parameter, or its place and shape."""
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is parameter:
                    given = group.get("param_names")
                    return given[i] if given else f"parameter {i} of group {index}, shape {tuple(p.shape)}"
        return f"a parameter of shape {tuple(parameter.shape)}"

    def expected_state(self, p: Tensor, options: dict[str, Any]) -> Mapping[str, Any] | None:
        """Entries of a parameter's state in a checkpoint, such as at its first step; values do not count.

        Args:
            p: The parameter.
            options: Of its group, as saved.

        Returns:
            ``None`` where every tensor of it has the parameter's shape.
        """
        return None

    def _take(self, given: dict[str, Any], final: dict[str, Any]) -> None:
        require_layout(given, type(self).__name__)
        me = type(self).__name__
        require_own(given, me)
        require_fit(given, self.param_groups, self.expected_state, self.check, self.name_of, me)
        final.update(given)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the state of a half-precision parameter keeps the precision it was saved with.

        Options are those that were saved, but for those that follow a function of the step, here or where they were
        saved: these stay as they are here.

        Raises:
            ValueError: If names, shapes or kinds of the entries are not those of the parameters, or one is not finite;
                nothing has changed then.
        """
        require_layout(state_dict, type(self).__name__)
        owned = [dict(group) for group in self.param_groups]  # the checkpoint may be older than an option
        final: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, given: self._take(given, final))  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved_ids = [i for group in final["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            for key, value in final["state"].get(i, {}).items():
                # torch casts floating state to the dtype of the parameter, counts in tensors included.
                narrow = p.dtype.itemsize < 4 or (isinstance(value, Tensor) and value.ndim == 0)
                if isinstance(value, Tensor) and value.is_floating_point() and narrow:
                    self.state[p][key] = value.detach().clone().to(p.device)
        for group, own in zip(self.param_groups, owned, strict=True):
            if "kl_of" not in group:  # until 0.1 every bound was one before momentum, with which the run goes on
                group.update({"kl_lr": None, "kl_of": "direction"})
            before = {**own, **meant_before(own)}
            group.update({name: value for name, value in before.items() if name not in group})
            group.update(not_of_a_moment(group, own))
        self.apply_schedules()
