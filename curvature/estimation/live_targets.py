"""Targets that depend on the parameters themselves, as those of a second pass do that nobody has detached."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from curvature.model.graph_nodes import below
from curvature.model.trees import tensors_in


def refuse_live_targets(targets: Any, parameters: Mapping[str, Tensor]) -> None:
    """Refuse targets that depend on some parameters: the curvature of a loss of two outputs is not that of one.

    Raises:
        ValueError: Naming some of the parameters.
    """
    known = set(map(id, leaves(tensors_in(targets))))
    found = [name for name, p in parameters.items() if id(p) in known] if known else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"the targets of the loss depend on parameters ({min(found)}{more}), as those that a second pass of the "
            "model gives, so the loss depends on these other than through the output that it was called on, and its "
            "Gauss-Newton and Fisher matrices would leave that out. Detach the targets (target.detach()), where they "
            "are meant to be fixed, or call a function in the place of the module (F.mse_loss) and let only calls of "
            "the module count: loop=Loop(capture='loss')."
        )


def leaves(starts: Iterable[Any]) -> Iterable[Any]:
    """The leaves below some nodes, or tensors."""
    return (leaf for node in below(starts) if (leaf := getattr(node, "variable", None)) is not None)


def has_live_target(node: Any, ends: Container[Any], tracked: Container[int]) -> bool:
    """Whether a loss function got a target that depends on some outputs, or parameters, by their ``id``."""
    target = [before for before, _ in node.next_functions[1:2]]
    return any(one in ends or id(getattr(one, "variable", None)) in tracked for one in below(target, ends))
