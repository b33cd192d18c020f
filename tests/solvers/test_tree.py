"""Nested values piece by piece: the one walk under everything that is stored."""

from __future__ import annotations

import io
from collections import namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solvers.tree import Path, map_inside, map_tree, pieces, place, plain

Pair = namedtuple("Pair", "left right")


def negated(piece: Any, path: Path) -> Any:
    return -piece if isinstance(piece, int) else NotImplemented


def test_pieces_are_replaced_and_containers_kept() -> None:
    tree = {"a": [1, (2, "b")], 3: MappingProxyType({"c": Pair(4, None)})}
    new = map_tree(negated, tree)
    assert new == {"a": [-1, (-2, "b")], 3: {"c": Pair(-4, None)}}
    assert type(new["a"][1]) is tuple and type(new[3]) is dict and type(new[3]["c"]) is Pair
    assert tree["a"][0] == 1


def test_sequences_of_one_kind() -> None:
    tree = {"a": [1, (2,)]}
    assert map_tree(negated, tree, sequence=list) == {"a": [-1, [-2]]}
    assert map_tree(negated, tree, sequence=tuple) == {"a": (-1, (-2,))}


def test_a_container_is_asked_before_its_contents_and_replacements_are_final() -> None:
    seen: list[Path] = []

    def change(piece: Any, path: Path) -> Any:
        seen.append(path)
        return {"list": piece} if isinstance(piece, list) else NotImplemented

    assert map_tree(change, {"a": [1, 2], "b": (3,)}, ("root",)) == {"a": {"list": [1, 2]}, "b": (3,)}
    assert seen == [("root",), ("root", "a"), ("root", "b"), ("root", "b", 0)]


def test_inside_leaves_the_outermost_container_alone() -> None:
    def tagged(piece: Any, path: Path) -> Any:
        return {"tag": map_inside(tagged, piece, path)} if isinstance(piece, dict) else NotImplemented

    assert map_inside(tagged, {"a": {"b": {}}}) == {"a": {"tag": {"b": {"tag": {}}}}}
    assert map_inside(tagged, 3) == 3


def test_walk() -> None:
    tree = {"a": [1, (2,)], "b": {}}
    assert list(pieces(tree)) == [
        ((), tree),
        (("a",), [1, (2,)]),
        (("a", 0), 1),
        (("a", 1), (2,)),
        (("a", 1, 0), 2),
        (("b",), {}),
    ]


def test_paths_read_as_python() -> None:
    assert place(()) == "state" and place(("a", 0, (1, 2))) == "state['a'][0][(1, 2)]"


GOOD = {"a": [1, 2.5, True, None, "b"], (0, "key"): (torch.ones(2), nn.Parameter(torch.zeros(0))), 3: {}}


def test_what_is_plain_passes_and_can_be_read() -> None:
    file = io.BytesIO()
    torch.save(map_tree(plain, GOOD), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert read.keys() == GOOD.keys() and read["a"] == GOOD["a"]
    assert all(isinstance(x, Tensor) for x in read[0, "key"])


class Whole(int):
    """A number that a file would need code for."""


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, nn.Linear(1, 1)]}, r"state\['a'\]\[1\] is a Linear\. A checkpoint holds tensors"),
        ([{"a": 1, (0, len): 2}], r"a key of state\[0\] is a builtin_function_or_method\. A"),
        ((Whole(3),), r"state\[0\] is a Whole\."),
        (MappingProxyType({}), r"state is a mappingproxy\."),
        ({"a": {1j}}, r"state\['a'\] is a set\."),
    ],
)
def test_what_is_not_plain_is_named_with_its_path(tree: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        map_tree(plain, tree)


def test_paths_can_be_written_otherwise() -> None:
    with pytest.raises(TypeError, match=r"^a/0 is a complex\."):
        plain(1j, ("a", 0), lambda path: "/".join(map(str, path)))
