"""The plots of a report as inline SVG, whose colours are the page's own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from curvature import plots
from curvature.plots.spectrum import lowest_shown
from curvature.plots.style import colour, ink, library, prepare
from curvature.reports.pages.view import NAMES, named
from curvature.reports.results import DensityResult, EigenvaluesResult, Findings, NoiseResult, Number
from solvers import Density, Eigenpairs, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for those of the page until the SVG is written. Shapes do not use them otherwise.
_INK = "#010203"
_CYCLE = ("#0a0b0c", "#0d0e0f", "#1a1b1c", "#1d1e1f")
_WIDTH = 4.6  # inches: at the width of a phone, letters keep about their size
_MOST = 12  # layers in a plot
_LONGEST = 22  # letters of a layer's name
_NEAR = 3.0  # a 2 / lr within so many times the largest eigenvalue is drawn


#: Title, sentence, height in inches, and the drawing function.
Drawing = tuple[str, str, float, Callable[["Axes"], object]]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        title: Its subject.
        plain: One sentence for newcomers.
        svg: The picture.
    """

    title: str
    plain: str
    svg: str


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        library()
    except ModuleNotFoundError:
        return False
    return True


def figures(report: Findings, name: str) -> list[Plot]:
    """The plots that a chapter calls by this name: none, or one for each matrix."""
    makers: dict[str, Callable[[Findings], Iterator[Drawing]]] = {
        "density": _densities,
        "eigenvalues": _eigenvalues,
        "shares": _shares,
        "distances": _distances,
        "norms": _norms,
        "sensitivity": _sensitivity,
    }
    return drawn(name, makers[name](report))


def drawn(name: str, drawings: Iterable[Drawing]) -> list[Plot]:
    """Plots of drawings, whose identifiers begin with a name."""
    return [
        Plot(title, plain, svg(draw, f"{name}-{number}", f"{title}. {plain}", height))
        for number, (title, plain, height, draw) in enumerate(drawings)
    ]


def svg(draw: Callable[[Axes], object], name: str, title: str, height: float) -> str:
    """Draw into new axes and return SVG for a page.

    Args:
        draw: Draws.
        name: Makes the identifiers in the SVG those of this plot.
        title: Text for screen readers.
        height: In inches.
    """
    with page_style(name):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), name, title)


@contextmanager
def page_style(name: str) -> Iterator[None]:
    """Matplotlib's settings for a plot of the page; the user's own do not apply, and are restored afterwards."""
    library()
    import matplotlib
    from cycler import cycler

    style: dict[Any, Any] = {
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.prop_cycle": cycler(color=list(_CYCLE)),
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9.5,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def _inline(content: str, name: str, title: str) -> str:
    content = content[content.index("<svg") :]
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    content = re.sub(r'\bid="', f'id="{name}-', content)
    content = re.sub(r"url\(#", f"url(#{name}-", content)
    content = re.sub(r'xlink:href="#', f'href="#{name}-', content)
    box = re.search(r'viewBox="[^"]*"', content)
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{_escape(title)}">'
    content = head + content[content.index(">") + 1 :]
    for place, placeholder in (("ink", _INK), *((f"c{i}", c) for i, c in enumerate(_CYCLE))):
        content = content.replace(placeholder, f"var(--{place})")
    return content.strip()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


# The plots ------------------------------------------------------------------------------------------------------------


def _densities(report: Findings) -> Iterator[Drawing]:
    found = {matrix: as_density(result) for matrix, result in report.densities.items()}
    floor = min(map(lowest_shown, found.values()), default=None)
    draws = [partial(plots.density, result, floor=floor) for result in found.values()]
    for matrix, draw in zip(found, with_common_limits(draws), strict=True):
        plain = (
            "How many directions have which curvature: most are near zero, and the few far to the right are the steep "
            "ones. The scale is logarithmic, or those would be invisible."
        )
        yield f"{NAMES[matrix]}: spectral density", plain, 2.9, draw


def as_density(found: DensityResult) -> Density:
    """The density as :mod:`curvature.plots` takes it."""
    grid, density, stderr = (torch.tensor(x, dtype=torch.float64) for x in (found.grid, found.density, found.stderr))
    nothing = torch.zeros(4, dtype=torch.float64)
    moments = Estimate(nothing, nothing, found.samples, found.products, nothing)
    return Density(grid, density, stderr, moments, found.width, found.samples, found.products)


def _eigenvalues(report: Findings) -> Iterator[Drawing]:
    lr = None if report.setting is None else report.setting.lr
    draws = [
        partial(_ranked, found, None if lr is None or matrix != "hessian" else 2 / lr)
        for matrix, found in report.eigenvalues.items()
    ]
    for matrix, draw in zip(report.eigenvalues, with_common_limits(draws), strict=True):
        plain = (
            "The steepest directions, one dot each; bars show how far off a value can be, most of them too short to "
            "see."
        )
        if matrix == "hessian" and lr is not None and _is_near(2 / lr, report.eigenvalues[matrix]):
            plain += " Dashed: 2 / lr, above which gradient descent diverges."
        yield f"{NAMES[matrix]}: largest eigenvalues", plain, 2.9, draw


def _ranked(found: EigenvaluesResult, edge: float | None, ax: Axes) -> None:
    columns = [torch.tensor([getattr(pair, name) for pair in found.largest]) for name in ("value", "residual")]
    done = torch.tensor([pair.converged for pair in found.largest])
    plots.eigenvalues(Eigenpairs(columns[0], torch.empty(0), columns[1], done, found.complete, found.products, {}), ax)
    if edge is None:
        return
    if _is_near(edge, found):
        ax.axhline(edge, color=ink(0.7), linewidth=0.9, linestyle="--")
        ax.text(1, edge, "2 / lr", transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize="small")
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.1 * edge))
    else:  # the eigenvalues would lie flat on the axis below it
        ax.text(1, 1, f"2 / lr = {edge:.3g} is far above", transform=ax.transAxes, ha="right", fontsize="small")


def _is_near(edge: float, found: EigenvaluesResult) -> bool:
    return edge <= _NEAR * max(pair.value + pair.residual for pair in found.largest)


def with_common_limits(draws: Sequence[Callable[[Axes], object]]) -> list[Callable[[Axes], object]]:
    """The same drawings on axes of the same limits, so that equal values stand at equal places side by side."""
    if len(draws) < 2:
        return list(draws)
    from matplotlib.figure import Figure

    limits = []
    with page_style(""):
        for draw in draws:
            ax = Figure().subplots()
            draw(ax)
            limits.append((*ax.get_xlim(), *ax.get_ylim()))
    lefts, rights, lows, highs = zip(*limits, strict=True)

    def within(draw: Callable[[Axes], object], ax: Axes) -> None:
        draw(ax)
        ax.set_xlim(min(lefts), max(rights))
        ax.set_ylim(min(lows), max(highs))

    return [partial(within, draw) for draw in draws]


def _shares(report: Findings) -> Iterator[Drawing]:
    names = _short(report)
    for matrix, found in report.traces.items():
        if sum(part.value for part in found.layers.values()) <= 0:
            continue
        values = {names[layer]: _estimate(x) for layer, x in found.layers.items()}
        plain = "How the total curvature is shared out among the layers; thin lines are errors."
        draw = partial(plots.shares, values, label="share of trace", most=_MOST)
        yield f"{NAMES[matrix]}: share of each layer", plain, _height(len(values)), draw


def _distances(report: Findings) -> Iterator[Drawing]:
    assert report.distances is not None
    names, found = _short(report), report.distances.structures
    values: dict[str, dict[str, Estimate | torch.Tensor | float]] = {
        "whole matrix": {s: _percent(d.whole) for s, d in found.items()}
    }
    for layer in report.layers:
        values[names[layer]] = {s: _percent(d.layers[layer]) for s, d in found.items() if layer in d.layers}
    values = {layer: row for layer, row in values.items() if row}
    plain = "How much of the GGN each form leaves out, layer by layer: the further to the left, the better."
    draw = partial(plots.distances, values, label="relative distance (%)", most=_MOST)
    yield "Distance of each structure to the GGN", plain, 0.5 + _height(len(values)), draw


def _norms(report: Findings) -> Iterator[Drawing]:
    if report.noise is not None:
        plain = (
            "All examples in order of the length of their gradient: a steep rise at the right end means that a few of "
            "them pull far harder than the rest."
        )
        yield "Lengths of the examples' gradients", plain, 2.9, partial(_percentiles, report.noise)


def _percentiles(noise: NoiseResult, ax: Axes) -> None:
    ax = prepare(ax)
    values = noise.percentiles
    ax.plot(range(len(values)), values, color=colour(0), linewidth=1.4)
    ax.axhline(values[50], color=ink(0.6), linewidth=0.8, linestyle="--")
    ax.text(0, values[50], " median", va="bottom", fontsize="small", color=ink(0.8))
    if values[0] > 0 and values[-1] > 20 * values[0]:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlim(0, 100)
    ax.set_xlabel("examples with shorter gradients (%)")
    ax.set_ylabel("norm")


def _estimate(x: Number) -> Estimate:
    value, error = (torch.tensor(number, dtype=torch.float64) for number in (x.value, x.error))
    return Estimate(value, error, x.samples, 0, torch.zeros_like(value))


def _percent(x: Number) -> Estimate:
    return _estimate(Number(100 * x.value, 100 * x.error, x.samples))


def _height(rows: int) -> float:
    return 0.8 + 0.26 * min(rows, _MOST)


def _short(report: Findings) -> dict[str, str]:
    """Names of layers that fit beside a plot, all different; the index of the layer where names leave it open."""
    names = {layer: _fitting(named(report, layer)) for layer in report.layers}
    if len(set(names.values())) < len(names):
        names = {layer: f"{i}: {name[: _LONGEST - 5]}" for i, (layer, name) in enumerate(names.items())}
    return names


def _fitting(name: str) -> str:
    """A dotted name with its parts shortened to a letter and their number, from the left, as far as needed."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > _LONGEST and not part.isdigit():
            number = re.search(r"\d*$", part)
            parts[i] = part[0] + (number[0] if number else "")
    short = ".".join(parts)
    return short if len(short) <= _LONGEST else f"{short[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _sensitivity(report: Findings) -> Iterator[Drawing]:
    found = report.sensitivity
    if found is None or not found.layers:
        return
    short = [_fitting(name.removesuffix(".weight")) for name in found.layers]
    names = short if len(set(short)) == len(short) else list(found.layers)
    rows = (dict(zip(found.bits, row, strict=True)) for row in found.layers.values())
    table = dict(zip(names, rows, strict=True))
    yield (
        "Sensitivity to rounding",
        "The predicted increase of the loss when a layer's weights get so few bits; higher lines need more bits.",
        3.2,
        lambda ax: plots.sensitivity(table, ax, most=4),
    )
