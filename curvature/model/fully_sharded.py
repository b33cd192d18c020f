"""Models under ``fully_shard``: parameters are ``DTensor`` shards between passes, and whole tensors inside.

A forward pass uses whole parameters, which exist from the pass of their layers to the end of the backward pass; in the
modules they stand in the place of the shards meanwhile. Gradients arrive at them, and are handed to the shards.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from curvature.model.hooks import nothing

_PACKAGE = "torch.distributed.fsdp"
#: The node by which ``fully_shard`` notices the end of a layer's backward pass; it hands gradients on as they are.
_NODE = "RegisterPostBackwardFunctionBackward"
#: What is read and set here of torch's own objects, which are not documented: of a group, and of a parameter in it.
_OF_GROUP = (
    *("fsdp_params", "is_unsharded", "post_backward", "post_forward_mesh_info", "reshard", "unshard"),
    *("wait_for_unshard", "_partial_reduce_output"),
)
#: What a pass leaves there, of which passes of our own leave nothing.
_OF_PASSES = (
    *("iter_forward_root", "post_backward", "post_forward_mesh_info", "post_forward_order"),
    *("_post_forward_indices", "_training_state"),
)
_OF_PARAMETER = ("sharded_param", "unsharded_accumulated_grad")
#: What tells a gradient from an earlier one: which tensors hold it, and their versions.
Mark = tuple[Any, ...]


class FullyShard:
    """The parameter groups of a model's layers under ``fully_shard``.

    Args:
        model: The model.

    Raises:
        NotImplementedError: If this version of torch keeps them in another way than is known here.

    Attributes:
        groups: The groups, as torch has them.
        modules: The modules that ``fully_shard`` was called on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if is_fully_sharded(module)]
        self.groups: list[Any] = [group for state in self._states() for group in _groups(state)]
        _require_known(self.groups)
        self._entries: dict[int, tuple[Any, Any]] = {}  # by ``id`` of the parameter
        self._waiting: list[tuple[Any, Any]] = []  # groups whose setting was changed for a pass, and the setting
        self._whole: list[Any] = []  # groups that were kept whole

    @staticmethod
    def of(model: nn.Module) -> FullyShard | None:
        """Those of a model; ``None`` where ``fully_shard`` was not called on any part of it."""
        found = FullyShard(model) if _PACKAGE in sys.modules else None
        return found if found is not None and found.modules else None

    def _known(self, parameter: Tensor) -> tuple[Any, Any]:
        """Group and entry of a parameter, ``None`` where it has none; a model that moves gets new parameters."""
        found = self._entries.get(id(parameter))
        if found is None or found[1].sharded_param is not parameter:
            self._entries = {id(p.sharded_param): (group, p) for group in self.groups for p in group.fsdp_params}
            found = self._entries.get(id(parameter))
        return found or (None, None)

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter belongs to a group."""
        return self._known(parameter)[1] is not None

    def whole(self, parameter: Tensor) -> nn.Parameter:
        """The tensor that passes use in the place of a parameter; it itself where that never was made."""
        return cast(nn.Parameter, getattr(self._known(parameter)[1], "_unsharded_param", parameter))

    def sharded(self) -> dict[int, nn.Parameter]:
        """``id`` of each tensor that passes use -> the parameter in whose place it stands."""
        entries = (p for group in self.groups for p in group.fsdp_params)
        return {id(p._unsharded_param): p.sharded_param for p in entries if hasattr(p, "_unsharded_param")}

    def mark(self, parameter: Tensor) -> Mark:
        """What tells the gradient of a parameter from others; empty where it has none.

        That of passes without a reduction (``set_requires_gradient_sync(False)``) is where torch keeps it.
        """
        given = parameter.grad
        out = [] if given is None else [(id(given), shard_of(given)._version)]
        return (*out, *((id(t), t._version) for t in self._pending(parameter)))

    def waits(self, parameter: Tensor) -> bool:
        """Whether a gradient of a parameter was not reduced over the processes yet."""
        return bool(self._pending(parameter))

    def _pending(self, parameter: Tensor) -> list[Tensor]:
        group, known = self._known(parameter)
        if known is None:
            return []
        whole = getattr(known, "_unsharded_param", None)
        parts = (None if whole is None else whole.grad, known.unsharded_accumulated_grad, group._partial_reduce_output)
        return [t for t in parts if t is not None]

    # Passes

    def keep_whole(self) -> None:
        """Keep the parameters of the forward pass that begins whole until its backward pass has used them."""
        self.forward_ended()
        self._waiting = [(group, group.post_forward_mesh_info) for group in self.groups]
        for group in self.groups:
            group.post_forward_mesh_info = None

    def forward_ended(self) -> None:
        """The forward pass ended, whichever way: put the settings back."""
        for group, setting in self._waiting:
            group.post_forward_mesh_info = setting
        if self._waiting:
            self._whole = [group for group in self.groups if group.is_unsharded]
        self._waiting = []

    def release(self) -> None:
        """Give up whole parameters, those of a pass whose backward pass never came: the next one needs new ones.

        Torch keeps those of the outermost module, whatever optimizer moves their shards.
        """
        for group in self.groups:
            if group.is_unsharded:
                group.reshard()
        self._whole = []

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For backward passes that write no gradients: no layer takes its end for the end of the user's pass.

        Parameters that an earlier backward pass has given up come back for as long, in all processes.
        """
        lacking = [group for group in self._whole if not group.is_unsharded]
        changed = [group for group in self.groups if "post_backward" not in vars(group)]
        try:
            for group in lacking:
                group.unshard(async_op=False)
                group.wait_for_unshard()
            for group in changed:
                group.post_backward = nothing
            yield
        finally:
            for group in changed:
                vars(group).pop("post_backward", None)
            for group in lacking:
                group.reshard()

    @contextlib.contextmanager
    def made_whole(self, values: Mapping[Tensor, Tensor] | None = None) -> Iterator[None]:
        """Whole parameters in all layers, for passes of our own that write no gradients; all processes call it.

        Args:
            values: The part of this process, of parameters that have other values inside.
        """
        own = [(shard_of(p), shard_of(p).detach().clone(), value) for p, value in (values or {}).items()]
        kept = [(part, self._settings(part)) for part in self._changing()]
        try:
            for part, _, value in own:
                part.copy_(value)
            for group in self.groups:
                if group.is_unsharded:  # maybe from before the parameters moved
                    group.reshard()
                group.unshard(async_op=False)
                group.wait_for_unshard()
                group.post_forward_mesh_info, group.post_backward = None, nothing
            yield
        finally:
            for part, settings in kept:
                vars(part).pop("post_backward", None)
                vars(part).update(settings)
            for group in self.groups:
                group.reshard()
            for part, before, _ in own:
                part.copy_(before)

    def _changing(self) -> list[Any]:
        """Torch's own objects in which a pass writes."""
        states = self._states()
        shared = (getattr(one, name, None) for one in (*states, *self.groups) for name in ("_state_ctx", "comm_ctx"))
        contexts = {id(context): context for context in shared if context is not None}
        return [*states, *self.groups, *contexts.values()]

    def _states(self) -> list[Any]:
        return list(dict.fromkeys(module._get_fsdp_state() for module in self.modules))  # type: ignore[operator]

    @staticmethod
    def _settings(part: Any) -> dict[str, Any]:
        """What passes change in torch's own objects."""
        known = {name: value for name, value in vars(part).items() if name in _OF_PASSES}
        return {name: list(value) if isinstance(value, list) else value for name, value in known.items()}


def call_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``model.forward`` without the hooks on the model itself, but for those by which ``fully_shard`` casts."""
    given: tuple[Any, dict[str, Any]] = (args, dict(kwargs))
    for hook in [h for h in model._forward_pre_hooks.values() if notices_passes(h)]:
        given = hook(model, *given)
    result = model.forward(*given[0], **given[1])
    for hook in [h for h in model._forward_hooks.values() if notices_passes(h)]:
        result = hook(model, given[0], result)
    return result


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    return hasattr(type(module), "_get_fsdp_state")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model as optimizers have them, also while a pass uses whole ones in their place."""
    shards = FullyShard.of(model)
    known = {} if shards is None else shards.sharded()
    for name, p in model.named_parameters():
        yield name, known.get(id(p), p)


def shard_of(x: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return cast(Tensor, x.to_local()) if hasattr(x, "to_local") else x


def is_custom(kind: type) -> bool:
    """Whether nodes of a type belong to a custom function, of which nobody knows what it does."""
    return issubclass(kind, BackwardCFunction) and kind.__name__ != _NODE


def notices_passes(hook: Any) -> bool:
    """Whether a hook is one by which ``fully_shard`` notices a backward pass, and leaves gradients as they are."""
    return type(getattr(hook, "__self__", None)).__module__.startswith(_PACKAGE)


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # of newer versions of torch
    if several is None and not hasattr(state, "_fsdp_param_group"):
        raise _unknown("_fsdp_param_group")
    one = state._fsdp_param_group if several is None else None
    return [one] if one is not None else list(several or ())


def _require_known(groups: list[Any]) -> None:
    for group in groups[:1]:
        for name in _OF_GROUP:
            if not hasattr(group, name):
                raise _unknown(name)
        for name in _OF_PARAMETER:
            if any(not hasattr(p, name) for p in group.fsdp_params[:1]):
                raise _unknown(name)


def _unknown(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"a model under fully_shard is not served by torch {torch.__version__}, whose objects have no {name}; it is by "
        "torch 2.13. Wrap the model in DistributedDataParallel, or take another version of torch."
    )
