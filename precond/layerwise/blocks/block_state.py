"""Blocks in a checkpoint: under the number of their first parameter, beside torch's own state of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from curvature.model.data import to_device
from curvature.structures.estimator import Form
from precond.layerwise.blocks.by_name import Preconditioners


def add_blocks(
    saved: dict[str, Any], blocks: Preconditioners, numbers: Mapping[str, int], mixing: Iterable[str]
) -> None:
    """Add the states of blocks to an optimizer's ``state_dict``.

    Args:
        saved: The ``state_dict``, in torch's layout; changed.
        blocks: The blocks.
        numbers: Parameter's name -> its number in the ``state_dict``.
        mixing: Blocks whose rows do not belong to single examples. The findings of the first pass are kept: a
            resumed run looks at its passes as this one does.
    """
    for name, preconditioner in blocks.items():
        block = preconditioner.estimator.block
        saved["state"].setdefault(numbers[block.names[0]], {}).setdefault("blocks", {})[name] = {
            "parts": block.state(),
            "outer": preconditioner.form == "outer",
            "mixing": dict.fromkeys(mixing, True),
            **preconditioner.state_dict(),
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


def copied(blocks: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of saved blocks on a device."""
    return to_device(copy.deepcopy(blocks), device)
