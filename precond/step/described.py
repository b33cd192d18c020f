"""An optimizer in words: its groups, and the options that they share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from curvature.estimation.text_table import WIDTH, equal_but_numbers, text_table

#: Entries of a group that say nothing of their own: the parameters, the step count, and what belongs to another entry.
_SILENT = frozenset({"params", "param_names", "steps", "name", "first_lr", "initial_lr", "max_lr"})


def described(
    method: str,
    steps: int,
    groups: Sequence[Mapping[str, Any]],
    schedules: Sequence[Mapping[str, Callable[[int], Any]]],
) -> str:
    """Options that all groups share on some lines, then a table of the groups and of what differs.

    Args:
        method: Name of the optimizer's class.
        steps: Steps taken.
        groups: Its parameter groups.
        schedules: Options of each that follow functions of the step; their values are those of now.
    """
    names = [name for name in groups[0] if name not in _SILENT] if groups else []
    names += sorted({name for group in groups for name in group} - set(names) - _SILENT)
    missing = object()
    shared = [n for n in names if all(_same(group.get(n, missing), groups[0].get(n, missing)) for group in groups)]
    differing = [name for name in names if name not in shared]
    options = ", ".join(f"{name}={_shown(groups[0][name])}{_until(name, schedules)}" for name in shared)
    total = sum(p.numel() for group in groups for p in group["params"])
    tensors = sum(len(group["params"]) for group in groups)
    head = f"{method}: step {steps}, {tensors} parameters, {total:,} numbers"
    lines = [head, *textwrap.wrap(options, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if len(groups) > 1:
        body = [
            (
                str(group.get("name", index)),
                *(_shown(group[name]) if name in group else "" for name in differing),
                f"{sum(p.numel() for p in group['params']):,}",
                _parameters(group),
            )
            for index, group in enumerate(groups)
        ]
        columns = ["group", *differing, "numbers", "parameters"]
        lines.append(textwrap.indent(text_table(columns, body, right=[len(differing) + 1], width=WIDTH - 2), "  "))
    return "\n".join(lines)


def _parameters(group: Mapping[str, Any]) -> str:
    """Their names, equal layers once; their number where they have none."""
    names = group.get("param_names")
    if not names:
        return str(len(group["params"]))
    return ", ".join(label for label, _ in equal_but_numbers([(name, None) for name in names]))


def _until(name: str, schedules: Sequence[Mapping[str, Callable[[int], Any]]]) -> str:
    """What a value follows, where it is one of now."""
    followed = {str(own[name]) for own in schedules if name in own}
    if not followed:
        return ""
    rule = followed.pop()
    return " now, by a function of the step" if followed or rule.startswith("<") else f" now, by {rule}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and _shown(a) == _shown(b))
    return type(a) is type(b) and bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():g}" if value.numel() == 1 else f"tensor{tuple(value.shape)}"
    return f"{value:g}" if isinstance(value, float) else str(value)
