"""Nested values (dicts, lists and tuples of tensors, numbers and strings): changed, walked and checked piece by piece.

Every stored state is encoded and decoded here. Callers only say how single pieces change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

from torch import Tensor

#: Keys and indices that lead from the whole to a piece.
Path = tuple[Any, ...]
#: ``change(piece, path)`` gives the piece's replacement, or ``NotImplemented`` to keep it and go on with its contents.
Change = Callable[[Any, Path], Any]


def map_tree(change: Change, tree: Any, path: Path = (), sequence: type | None = None) -> Any:
    """Copy a nested value with some of its pieces replaced; a container is looked at before its contents.

    >>> map_tree(lambda piece, path: -piece if isinstance(piece, int) else NotImplemented, {"a": [1, (2, "b")]})
    {'a': [-1, (-2, 'b')]}

    Args:
        change: Replaces pieces. Replacements are taken as they are.
        tree: Nested mappings, lists and tuples; the copy has dicts in place of mappings.
        path: Where ``tree`` stands in a larger one.
        sequence: ``list`` or ``tuple``: what lists and tuples become; ``None`` keeps each.
    """
    changed = change(tree, path)
    return map_inside(change, tree, path, sequence) if changed is NotImplemented else changed


def map_inside(change: Change, tree: Any, path: Path = (), sequence: type | None = None) -> Any:
    """The same for the contents of ``tree``, which is a container or stays as it is."""
    if isinstance(tree, Mapping):
        return {key: map_tree(change, item, (*path, key), sequence) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = (map_tree(change, item, (*path, index), sequence) for index, item in enumerate(tree))
        kind = sequence or type(tree)
        return getattr(kind, "_make", kind)(items)  # named tuples take their fields one by one
    return tree


def pieces(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All pieces with their paths, a container before its contents."""
    yield path, tree
    contents = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, item in contents:
        yield from pieces(item, (*path, key))


def place(path: Path) -> str:
    """A path as it is written in Python: ``state['blocks'][0]``."""
    return "state" + "".join(f"[{key!r}]" for key in path)


def plain(piece: Any, path: Path, place: Callable[[Path], str] = place) -> Any:
    """A change that keeps every piece, and refuses those that ``torch.load(weights_only=True)`` cannot read.

    Args:
        piece: What stands at ``path``.
        path: Keys and indices.
        place: How messages write a path.

    Raises:
        TypeError: If the piece, or a key of it, cannot be stored.
    """
    keys = [part for key in piece for _, part in pieces(key)] if isinstance(piece, dict) else []
    for what, part in (("", piece), *(("a key of ", part) for part in keys)):
        # Subclasses of numbers, such as NumPy's, cannot be read either.
        if not (isinstance(part, (Tensor, dict, list, tuple, NoneType)) or type(part) in (bool, int, float, str)):
            raise TypeError(
                f"{what}{place(path)} is a {type(part).__name__}. A checkpoint holds tensors, numbers, strings, and "
                "dicts, lists and tuples of them."
            )
    return NotImplemented
