"""Messages between processes, and what one that never comes looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class ProcessLost(RuntimeError):
    """Another process of the group has ended, or has not answered within the group's timeout."""


@contextmanager
def answered(group: Any) -> Iterator[None]:
    """A message to all processes of a group, inside: say what it means where it does not come through.

    Raises:
        ProcessLost: In place of the errors of ``torch.distributed``, which name addresses.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessLost(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} got no answer from the others: one of them "
            "has ended, has raised an error of its own, or took longer than the group's timeout. Its output says why. "
            "This group cannot go on: start all processes again, from the last checkpoint. How long is waited says "
            f"init_process_group(timeout=datetime.timedelta(...)). (torch.distributed: {reason})"
        ) from error
