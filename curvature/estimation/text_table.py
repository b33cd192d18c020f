"""Tables for a terminal: equal layers in one line, columns that fit."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

#: Columns of a terminal that a table keeps to.
WIDTH = 100
# Below this a column is no longer read.
_LEAST_TEXT, _GAP = 20, 2
# A number that is a whole part of a dotted name, as in "blocks.0.attn".
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$|\+)")


@dataclass(frozen=True)
class _Numbered:
    """Names that differ in numbers only: the text between, and the numbers at each place."""

    text: tuple[str, ...]
    numbers: tuple[frozenset[int], ...]
    key: Hashable
    members: tuple[int, ...]

    @property
    def label(self) -> str:
        inner = [spans(found) for found in self.numbers]
        return self.text[0] + "".join(n + t for n, t in zip(inner, self.text[1:], strict=True))


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in a few characters.

    >>> spans([0, 1, 2, 3, 7, 9, 10])
    '0-3,7,9-10'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def equal_but_numbers(items: Sequence[tuple[str, Hashable]]) -> list[tuple[str, tuple[int, ...]]]:
    """Join items whose keys are equal and whose dotted names differ in numbers only.

    >>> equal_but_numbers([("blocks.0.fc", 1), ("head", 2), ("blocks.1.fc", 1), ("blocks.2.fc", 9)])
    [('blocks.0-1.fc', (0, 2)), ('head', (1,)), ('blocks.2.fc', (3,))]

    Args:
        items: Pairs of name and key.

    Returns:
        Pairs of a label for the names, and the places of the items, in the order of the first ones.
    """
    found = [
        _Numbered(tuple(_NUMBER.split(name)), tuple(frozenset([int(n)]) for n in _NUMBER.findall(name)), key, (place,))
        for place, (name, key) in enumerate(items)
    ]
    for position in reversed(range(max((len(entry.numbers) for entry in found), default=0))):
        joined: dict[Hashable, _Numbered] = {}
        for entry in found:
            rest = entry.numbers[:position] + entry.numbers[position + 1 :]
            alone = () if len(entry.numbers) > position else entry.members  # no number there to differ in
            same = (entry.text, rest, entry.key, alone)
            other = joined.get(same)
            if other is not None:
                numbers = list(other.numbers)
                numbers[position] = numbers[position] | entry.numbers[position]
                entry = _Numbered(entry.text, tuple(numbers), entry.key, other.members + entry.members)
            joined[same] = entry
        found = list(joined.values())
    found.sort(key=lambda entry: entry.members[0])
    return [(entry.label, entry.members) for entry in found]


def block_label(names: str) -> str:
    """The parameters of a block with their common module once.

    >>> block_label("attn.qkv.weight+attn.qkv.bias"), block_label("a.weight+b.bias")
    ('attn.qkv.weight+bias', 'a.weight+b.bias')
    """
    first, *others = names.split("+")
    module = first[: first.rfind(".") + 1]
    if not others or any(other[: other.rfind(".") + 1] != module for other in others):
        return names
    return "+".join([first, *(other[len(module) :] for other in others)])


def text_table(
    head: Sequence[str], body: Sequence[Sequence[str]], right: Iterable[int] = (), width: int = WIDTH
) -> str:
    """Columns side by side; where they are too wide together, the last one and then the first run over several lines.

    Args:
        head: Names of the columns.
        body: Rows of cells.
        right: Columns that are set to the right.
        width: Characters in a line.
    """
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    for column in (len(head) - 1, 0):
        over = sum(widths) + _GAP * (len(widths) - 1) - width
        words = (word for row in [head, *body] for word in row[column].split()) if column else head[:1]
        least = max(_LEAST_TEXT, *map(len, words))
        widths[column] -= max(0, min(over, widths[column] - least))
    lines, right = [], set(right)
    for row in [head, ["-" * w for w in widths], *body]:
        cells = [_broken(cell, w) for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            set_ = [
                p.rjust(w) if c in right else p.ljust(w) for c, (p, w) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append((" " * _GAP).join(set_).rstrip())
    return "\n".join(lines)


def _broken(text: str, width: int) -> list[str]:
    """Lines of at most that width, broken after spaces; words that are longer, after dots and plus signs as well."""
    lines = [""]
    for word in re.findall(r"[^ ]+ ?|^$", text):
        for piece in [word] if len(word.rstrip()) <= width else re.findall(r"[^.+]*[.+]|[^.+]+", word):
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
            while len(lines[-1].rstrip()) > width:  # nowhere to break
                lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]
