"""Whether a step is taken, which all processes decide together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from torch import Tensor

from precond.distributed.ranks import Ranks

#: Take the step; skip it without a word, as a GradScaler asks; or skip it because a gradient is not finite.
Verdict = Literal["go", "quiet", "broken"]


def verdict(
    ranks: Ranks, params: Iterable[Tensor], present: Collection[Tensor], quiet: bool, finite: Callable[[], bool]
) -> Verdict:
    """Whether a step is taken, by the gradients of all processes.

    Args:
        ranks: The processes.
        params: All parameters, in the order of the groups.
        present: Those with a gradient.
        quiet: Whether a GradScaler has found inf.
        finite: Whether all gradients are fit for a step.

    Raises:
        RuntimeError: If a parameter has a gradient in some processes only.
    """
    ids = {id(p) for p in present}
    mask = bytes(id(p) in ids for p in params)
    table = ranks.together(lambda: (float(quiet), float(not finite() and not quiet), zlib.crc32(mask)), 3)
    if any(row[1] for row in table):
        return "broken"
    if any(row[0] for row in table):
        return "quiet"
    if len({row[2] for row in table}) > 1:
        counts = ranks.numbers([float(len(present))])
        raise RuntimeError(
            f"some parameters have a gradient on some ranks only ({', '.join(f'{int(n)}' for (n,) in counts)} "
            "gradients by rank), so that the ranks would part. Reduce the gradients of all parameters before step(); "
            "where a rank has none, it takes part with zeros."
        )
    return "go" if any(mask) else "quiet"
