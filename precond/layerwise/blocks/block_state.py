"""Blocks in a checkpoint: under the number of their first parameter, beside torch's own state of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart
from curvature.model.data import to_device
from curvature.structures.estimator import Form
from precond.layerwise.blocks.by_name import Preconditioners
from precond.layerwise.blocks.preconditioner import Preconditioner
from precond.step.loading import require_finite, require_same_tree, unfit
from solvers.outcome.memory import is_out_of_memory


def add_blocks(
    saved: dict[str, Any],
    blocks: Preconditioners,
    numbers: Mapping[str, int],
    mixing: Iterable[str],
    states: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Add the states of blocks to an optimizer's ``state_dict``.

    Args:
        saved: The ``state_dict``, in torch's layout; changed.
        blocks: The blocks.
        numbers: Parameter's name -> its number in the ``state_dict``.
        mixing: Blocks whose rows do not belong to single examples. The findings of the first pass are kept: a
            resumed run looks at its passes as this one does.
        states: The state of each block, where other processes keep some of them.
    """
    for name, preconditioner in blocks.items():
        block = preconditioner.estimator.block
        saved["state"].setdefault(numbers[block.names[0]], {}).setdefault("blocks", {})[name] = {
            "parts": block.state(),
            "outer": preconditioner.form == "outer",
            "mixing": dict.fromkeys(mixing, True),
            **(preconditioner.state_dict() if states is None else states[name]),
        }


def split_blocks(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A ``state_dict`` without blocks, because torch would cast them to the dtype of the parameter, and the blocks."""
    blocks: dict[str, Any] = {}
    plain = {**saved, "state": {}}
    for key, entries in saved["state"].items():
        blocks.update(entries.get("blocks", {}))
        plain["state"][key] = {name: value for name, value in entries.items() if name != "blocks"}
    return plain, blocks


def saved_form(block: dict[str, Any]) -> Form:
    """How samples reached a saved block."""
    return "outer" if block["outer"] else "per_sample"


def saved_block(name: str, saved: dict[str, Any], parameters: Mapping[str, Tensor], whose: str) -> Block:
    """The block that a saved state is of.

    Raises:
        ValueError: If its parameters are not among the model's, or of other shapes.
    """
    try:
        block = Block.from_state(name, saved["parts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unfit(whose, f"does not say which parameters it is of ({error!r})") from error
    for part in block.parts:
        if part.name not in parameters:
            raise unfit(whose, f"is of {part.name}, which is no parameter of this optimizer")
        p = parameters[part.name]
        if not _fits(part, p):
            raise unfit(
                whose, f"is of another shape: {list(part.split)} of {part.name}, whose shape is {list(p.shape)}"
            )
    return block


def _fits(part: BlockPart, p: Tensor) -> bool:
    """Whether a segment is all of a parameter, or some of its rows."""
    if (part.start, part.numel) == (0, p.numel()):
        return len(part.split) != 2 or p.ndim != 2 or part.split == tuple(p.shape)
    if part.start + part.numel > p.numel() or p.ndim < 2 or len(part.split) < 2:
        return False
    return part.numel // part.split[0] == p.numel() // p.shape[0]


def load_block(preconditioner: Preconditioner, saved: dict[str, Any], whose: str) -> None:
    """Restore a preconditioner that was just made.

    Raises:
        ValueError: If the state is that of another method, does not fit the block, or is not finite.
    """
    parts = {name: saved[name] for name in ("estimate", "inverse") if name in saved}
    require_finite(parts, whose)
    try:
        preconditioner.load_state_dict(saved)
        again = preconditioner.state_dict()
        operators = [preconditioner.estimator.operator()] if preconditioner.estimator.ready else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise unfit(whose, f"cannot be read as one of this method ({type(error).__name__}: {error})") from error
    require_same_tree(parts, {name: again[name] for name in ("estimate", "inverse") if name in again}, whose)
    numel = preconditioner.estimator.block.numel
    if preconditioner.inverse is not None:
        operators.append(preconditioner.inverse)
    for operator in operators:
        if math.prod(operator.in_shape) != numel:
            raise unfit(whose, f"is of another shape: {operator!r} for a block of {numel} numbers")


def copied(blocks: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of saved blocks on a device."""
    return to_device(copy.deepcopy(blocks), device)
