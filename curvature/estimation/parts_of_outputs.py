"""Which output of a model a loss is called on: parts of one output, cut by rows, are not outputs of their own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from curvature.model.graph_nodes import COPIES, CUTS, PRODUCTS, SHAPES, chain, cut_axis, inputs_of, name_of, shape_of

#: Beginnings of the names of nodes that make an output of what they get, by parameters of their own.
_MAKES = (*PRODUCTS, "Mv", "Embedding", "Native", "Cudnn")
#: What nodes of :data:`CUTS` have saved of where they cut.
_WHERE = ("dim", "index", "start", "end", "step", "split_size", "split_sizes")


def output_of(module: nn.Module, z: Any, target: Any) -> Hashable:
    """What tells the output of which ``z`` is a part.

    Chunks and steps of time are parts of one output, of which each example or position lies in one: it is a key of the
    operation that made it, or, where this has parameters, of these, so that a head that is used once for each item of a
    list counts as one. Columns, cut along the class axis, are outputs of their own, as heads with own parameters are,
    unless the loss compares entry by entry and counts these.

    Args:
        module: The loss.
        z: What a loss was called on.
        target: What it was compared with, if that is a tensor.
    """
    if not isinstance(z, Tensor) or z.grad_fn is None:
        return id(z)
    shape = target.shape if isinstance(target, Tensor) else None
    second, entries = z.dim() > 2 and shape == z.shape[:1] + z.shape[2:], shape == z.shape
    entries &= not isinstance(module, nn.CrossEntropyLoss)
    columns: list[Hashable] = []
    for node, number in chain(z.grad_fn, z.output_nr):
        if node.name().startswith(_MAKES) or any("Accumulate" in before.name() for before in inputs_of(node)):
            break
        if name_of(node).startswith(CUTS) and not entries and (cut := _columns(node, number, second)) is not None:
            columns.append(cut)
    own = frozenset(filter(None, map(_parameter, inputs_of(node))))
    return own or (node._sequence_nr(), number), tuple(columns)


def data_of(z: Tensor) -> set[Hashable]:
    """What tells the numbers that a tensor holds from those of other parts: its memory, and where they were cut from.

    Copies in another precision lie in memory of their own.
    """
    found: set[Hashable] = {(z.untyped_storage().data_ptr(), z.storage_offset(), z.shape)}
    cuts: list[Hashable] = []
    for node, number in chain(z.grad_fn, z.output_nr):
        name = name_of(node)
        if name.startswith(CUTS):
            cuts.append((name, number, *(str(getattr(node, f"_saved_{key}", "")) for key in _WHERE)))
        elif name.startswith(SHAPES):
            cuts.append((name, *shape_of(node)))
        elif not name.startswith(COPIES):
            return found | {(node._sequence_nr(), number, *cuts)}
    return found


def _columns(node: Any, number: int, second: bool) -> Hashable | None:
    """The part of the class axis, the second or the last, that a node picks; ``None`` where it picks rows."""
    axis, axes = cut_axis(node)
    if axis == 0 or axis != (1 if second and axes > 2 else axes - 1):
        return None
    picked = tuple(getattr(node, f"_saved_{key}", None) for key in ("index", "start", "end"))
    return node.name(), number, picked


def _parameter(node: Any) -> int | None:
    """The leaf that a node hands its gradient to, through transpositions and casts at most."""
    for one, _ in chain(node):
        if (leaf := getattr(one, "variable", None)) is not None:
            return id(leaf)
        if not name_of(one).startswith(("T", "ToCopy", "View", "Permute")) or name_of(one).startswith("Tanh"):
            return None
    return None
