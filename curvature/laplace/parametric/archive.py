"""Nested states as one safetensors file: plain tensors, and JSON for everything else, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvature.estimation.checkpoint import CheckpointError, digest
from solvers.files import write_whole
from solvers.outcome.memory import is_out_of_memory
from solvers.tree import Path, map_tree, plain

_VERSION = 1
_KEYS = {"format", "kind", "version", "state"}


def write(path: str | os.PathLike[str], kind: str, state: Mapping[str, Any]) -> None:
    """Write a state; a file of that name is replaced at once, or not at all.

    Each tensor stands in the file under its path in the state (``"curvature/blocks/0/sums/straight/1"``), the rest as
    JSON under ``"state"`` in the metadata, where a tensor is ``{"$tensor": its path}``. A digest of all that is there
    too.

    Args:
        path: The file; its folder must exist.
        kind: Kind of the state; :func:`read` compares it.
        state: Nested dicts (keyed by strings), lists and tuples of tensors, dtypes, numbers, strings, booleans and
            ``None``. Tuples come back as lists.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If something else is in the state.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, tensors)
    metadata = {"format": "curvature.laplace", "kind": kind, "version": str(_VERSION), "state": json.dumps(tree)}
    metadata["digest"] = _digest(metadata, tensors)
    content = _safetensors().torch.save(tensors, metadata)
    write_whole(path, lambda file: file.write(content))


def read(path: str | os.PathLike[str], kind: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file of :func:`write`; every tensor has its values, dtype and order of dimensions in memory.

    Args:
        path: The file.
        kind: The expected kind.
        device: Where the tensors go.

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If the file is damaged, or something else.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, kind)
            # Copies, not views of the mapped file: sums are made in place, and alignment may decide about last bits.
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
        if not _is_whole(metadata, tensors):
            raise CheckpointError(f"{os.fspath(path)} is damaged: its contents are not those that were written.")
        state: dict[str, Any] = _decode(json.loads(metadata["state"]), tensors)
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{os.fspath(path)} is no whole safetensors file ({error}): it was cut off, is damaged, or was written by "
            "something else."
        ) from error
    return state


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    known = {name: metadata[name] for name in sorted(_KEYS)}
    names = sorted(tensors)
    return digest((tensors[name] for name in names), json.dumps([known, names]))


def _is_whole(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds what was written; older versions wrote no digest."""
    if metadata.keys() == _KEYS:
        return True
    return metadata.keys() == _KEYS | {"digest"} and metadata["digest"] == _digest(metadata, tensors)


def _check(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: str) -> None:
    found = metadata.get("kind") if metadata.get("format") == "curvature.laplace" else "something else"
    if found != kind:
        raise CheckpointError(f"{os.fspath(path)} holds {found}, and {kind} was expected.")
    if int(metadata.get("version", 0)) > _VERSION:
        raise CheckpointError(
            f"{os.fspath(path)} is of version {metadata['version']}, and version {_VERSION} is the newest known here. "
            "Update precond."
        )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:  # pragma: no cover
        raise ImportError("posteriors are kept in safetensors files: pip install precond[laplace]") from error
    return safetensors


def _encode(state: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    def stored(piece: Any, path: Path) -> Any:
        if isinstance(piece, Tensor):
            # A transposed matrix comes back as one: products may differ in their last bits by the order in memory.
            order = sorted(range(piece.dim()), key=piece.stride, reverse=True)
            tensors[_name(path)] = piece.detach().permute(order).cpu().contiguous().clone()
            return {"$tensor": _name(path)} | ({} if order == sorted(order) else {"order": order})
        if isinstance(piece, torch.dtype):
            return {"$dtype": str(piece).removeprefix("torch.")}
        if not isinstance(piece, Mapping):
            return plain(piece, path, _name)
        if not all(isinstance(key, str) and not key.startswith("$") for key in piece):
            raise TypeError(f"{_name(path)} has keys {list(piece)}; they must be strings, without '$' in front.")
        return NotImplemented

    return map_tree(stored, state, sequence=list)


def _name(path: Path) -> str:
    return "/".join(map(str, path)) or "state"


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    def restored(piece: Any, path: Path) -> Any:
        if isinstance(piece, dict) and "$tensor" in piece:
            tensor = tensors[piece["$tensor"]]
            order = piece.get("order", range(tensor.dim()))
            return tensor.permute(sorted(range(tensor.dim()), key=lambda axis: order[axis]))
        if isinstance(piece, dict) and "$dtype" in piece:
            return getattr(torch, piece["$dtype"])
        return NotImplemented

    return map_tree(restored, tree)
