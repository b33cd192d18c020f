"""Pictures of compressed models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from curvature.compression import Compression
from curvature.model.arguments import a, anything, checked, count, several
from curvature.plots.style import colour, ink, legend, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONG = 24  # letters of a layer's name


@checked(table=a(Mapping, "a result of sensitivity()"), ax=anything, most=count())
def sensitivity(table: Mapping[str, Mapping[int, float]], ax: Axes | None = None, most: int = 8) -> Axes:
    """Predicted increase of the loss against bits, a line for each layer; the most sensitive ones have names.

    Args:
        table: ``{parameter: {bits: increase}}``, of :func:`curvature.sensitivity` or an
            :class:`~curvature.Allocation`.
        ax: Axes to draw into.
        most: How many layers get a colour and a name.

    Raises:
        ValueError: If the table is empty.
    """
    if not table:
        raise ValueError("there is nothing to draw: the table has no layer.")
    ax = prepare(ax)
    order = sorted(table, key=lambda name: -max(table[name].values()))
    for index, name in enumerate(order):
        points = sorted(table[name].items())
        named = index < most
        ax.plot(
            [bits for bits, _ in points],
            [increase for _, increase in points],
            color=colour(index) if named else ink(0.25),
            marker="o" if named else None,
            markersize=4,
            linewidth=1.2 if named else 0.8,
            zorder=2 if named else 1,
            label=_short(name) if named else None,
        )
    ax.set_yscale("log")
    ax.set_xticks(sorted({bits for row in table.values() for bits in row}))
    ax.minorticks_off()
    ax.set_xlabel("bits")
    ax.set_ylabel("predicted increase of the loss")
    legend(ax)
    return ax


@checked(results=several(Compression, "results of quantize() or prune()"), ax=anything)
def loss_against_bits(
    results: Mapping[str, Sequence[Compression]] | Sequence[Compression], ax: Axes | None = None
) -> Axes:
    """Loss of quantised models against their mean bits, a line for each method; the original's loss is marked.

    Args:
        results: Compressions of one model with their losses measured, by method.
        ax: Axes to draw into.

    Raises:
        ValueError: If there is none, or a loss was not measured.
    """
    methods = results if isinstance(results, Mapping) else {"": results}
    found = [result for entries in methods.values() for result in entries]
    if not found or any(result.loss_after is None for result in found):
        raise ValueError("there is nothing to draw: no compression, or one with measure=False.")
    ax = prepare(ax)
    for index, (name, entries) in enumerate(methods.items()):
        points = sorted((entry.bits, float(entry.loss_after or 0.0)) for entry in entries)
        ax.plot(*zip(*points, strict=True), color=colour(index), marker="o", markersize=4, linewidth=1.2, label=name)
    before = found[0].loss_before
    assert before is not None
    ax.axhline(before, color=ink(0.6), linewidth=0.8, linestyle="--")
    ax.annotate("original", (1, before), xytext=(-2, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize="small", color=ink(0.8))  # fmt: skip
    ax.set_xlabel("mean bits of a weight")
    ax.set_ylabel("loss")
    if any(methods):
        legend(ax)
    return ax


def _short(name: str) -> str:
    return name if len(name) <= _LONG else f"…{name[1 - _LONG :]}"
