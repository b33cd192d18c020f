"""Closures whose gradients several processes would have to average: refused, because nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from curvature.model.synchronized import world_size
from precond.distributed.ranks import Ranks


@contextmanager
def parallel_calls() -> Iterator[list[nn.Module]]:
    """A list of the DistributedDataParallel modules that are called inside; empty where there is one process."""
    found: list[nn.Module] = []
    if world_size() == 1:
        yield found
        return

    def note(module: nn.Module, args: object) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.process_group.size() > 1:
            found.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def refuse_closure(method: str, seen: list[nn.Module], ranks: Ranks | None) -> None:
    """Refuse to differentiate the loss of a closure that is one process's share.

    Raises:
        NotImplementedError: Naming the method, and what serves several processes.
    """
    if seen or ranks is not None:
        where = "calls a model in DistributedDataParallel" if seen else "runs in one process of its process_group"
        raise NotImplementedError(
            f"the closure of {method} {where}, and {method} differentiates its loss itself, so that each process would "
            "follow the derivatives of its own data. Methods with a closure run in one process; KFAC, EKFAC and the "
            "methods that use gradients alone run in several."
        )
