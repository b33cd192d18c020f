"""Pictures show the numbers they are given, with their errors, and leave matplotlib as they found it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import curvature
import solvers
from curvature import plots
from curvature.landscape.interpolation import Interpolation
from curvature.landscape.surface import Surface
from curvature.training.subspace import Overlap, SubspaceRecord
from solvers import Density, Diagonal, Eigenpairs, Estimate

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

F64 = torch.float64


@pytest.fixture(autouse=True)
def _nothing_global_changes() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def estimate(value: float, stderr: float = 0.0) -> Estimate:
    zero = torch.tensor(0.0, dtype=F64)
    return Estimate(torch.tensor(value, dtype=F64), torch.tensor(stderr, dtype=F64), 10, 10, zero)


def spectrum() -> Diagonal:
    return Diagonal(torch.cat([torch.linspace(-0.1, 1, 60, dtype=F64), torch.tensor([5.0], dtype=F64)]))


@pytest.fixture(scope="module")
def density() -> Density:
    return solvers.spectral_density(spectrum(), samples=4, steps=20, progress=False)


@pytest.fixture(scope="module")
def pairs() -> Eigenpairs:
    return solvers.eigsh(spectrum(), k=4, progress=False)


def error_bars(ax: Any) -> list[np.ndarray]:
    """Segments of all error bars, each ``(2, 2)``."""
    return [
        segment
        for container in ax.containers
        if hasattr(container, "has_xerr")
        for collection in container.lines[2]
        for segment in collection.get_segments()
    ]


def draw(ax: Any) -> str:
    """The picture as SVG; drawing is where labels and scales fail."""
    stream = io.StringIO()
    ax.figure.savefig(stream, format="svg")
    return stream.getvalue()


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_text_and_series_take_the_colours_of_the_style(density: Density, style: str) -> None:
    with plt.style.context(style):
        ax: Any = plots.density(density)
        cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        assert matplotlib.colors.same_color(ax.lines[0].get_color(), cycle[0])
        text = matplotlib.colors.to_rgb(plt.rcParams["text.color"])
        assert ax.spines["left"].get_edgecolor()[:3] == text
        assert "<svg" in draw(ax)


def test_a_density_is_drawn_with_two_standard_errors(density: Density) -> None:
    ax: Any = plots.density(density, log=False)
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, density.grid.numpy())
    np.testing.assert_array_equal(y, density.density.numpy())
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(float((density.density + 2 * density.stderr).max()))
    assert ax.get_ylim()[1] >= band[:, 1].max()


def test_the_logarithmic_density_shows_the_lowest_peak(density: Density) -> None:
    ax: Any = plots.density(density)
    at = float(density.density[(density.grid - 5).abs().argmin()])
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] <= at / 9
    draw(ax)


def test_an_eigenvalue_bar_is_its_residual(pairs: Eigenpairs) -> None:
    wide = Eigenpairs(
        pairs.values, pairs.vectors, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([True, True, False, False]),
        False, pairs.products, {},
    )  # fmt: skip
    ax: Any = plots.eigenvalues(wide)
    lengths = sorted(float(segment[1, 1] - segment[0, 1]) for segment in error_bars(ax))
    assert lengths == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["converged", "not converged"]
    assert plots.eigenvalues(pairs).get_legend() is None


@pytest.mark.parametrize(("values", "scale"), [([5.0, 1.0], "log"), ([5.0, -1.0], "symlog"), ([0.0, 0.0], "symlog")])
def test_logarithmic_eigenvalues_of_any_sign(values: list[float], scale: str) -> None:
    done = torch.ones(2, dtype=torch.bool)
    pair = Eigenpairs(torch.tensor(values), torch.eye(2), torch.zeros(2), done, True, 2, {})
    ax: Any = plots.eigenvalues(pair, log=True)
    assert ax.get_yscale() == scale
    draw(ax)


def test_shares_are_per_cent_of_the_sum() -> None:
    ax: Any = plots.shares({"a": estimate(3.0, 0.5), "b": torch.tensor(1.0), "c": 0.0})
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([75, 25, 0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    first = error_bars(ax)[0]
    assert first[:, 0].tolist() == pytest.approx([75 - 25, 75 + 25])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first one on top


def test_of_many_bars_the_largest_are_drawn_in_their_order() -> None:
    ax: Any = plots.bars({f"layer {i}": float((-1) ** i * i) for i in range(50)}, most=3)
    assert [bar.get_width() for bar in ax.patches] == [-47, 48, -49]
    assert "47 smaller ones" in ax.get_xlabel()


def test_bars_that_are_all_zero_begin_at_zero() -> None:
    assert plots.bars({"a": 0.0, "b": 0.0}).get_xlim() == (0, 1)
    assert plots.bars({"a": 2.0}).get_xlim()[0] == 0


def test_distances_of_each_structure() -> None:
    ax: Any = plots.distances({"a": {"kfac": estimate(0.3, 0.05), "diagonal": 0.9}, "b": {"diagonal": 0.8}})
    kfac, diagonal = ax.containers
    assert kfac.lines[0].get_xdata().tolist() == [0.3]
    assert diagonal.lines[0].get_xdata().tolist() == [0.9, 0.8]
    segment = kfac.lines[2][0].get_segments()[0]
    assert segment[:, 0].tolist() == pytest.approx([0.2, 0.4])
    draw(ax)


def test_of_many_layers_the_farthest_are_drawn() -> None:
    ax: Any = plots.distances({f"{i}": {"diagonal": i / 50} for i in range(50)}, most=2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["48", "49"]
    assert "48 nearer layers" in ax.get_xlabel()


def test_every_example_is_in_the_histogram() -> None:
    norms = torch.tensor([1e-3, 1.0, 2.0, 3.0, 1e3], dtype=F64)
    parts = {"weight": norms.square() / 2, "bias": norms.square() / 2}
    ax: Any = plots.gradient_norms(parts)
    assert sum(bar.get_height() for bar in ax.patches) == 5
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xdata()[0] == pytest.approx(2.0)
    linear: Any = plots.gradient_norms(norms.square()[1:4])
    assert linear.get_xscale() == "linear"
    assert sum(bar.get_height() for bar in linear.patches) == 3


def test_zero_and_equal_gradients_are_counted() -> None:
    ax: Any = plots.gradient_norms(torch.tensor([0.0, 0.0, 1.0, 10000.0]))
    assert "2 of 4 are zero" in ax.get_xlabel()
    same: Any = plots.gradient_norms(torch.full((4,), 9.0))
    assert sum(bar.get_height() for bar in same.patches) == 4
    draw(plots.gradient_norms(torch.zeros(3)))


def test_axes_of_the_caller_are_used(pairs: Eigenpairs) -> None:
    figure: Any
    figure, ax = plt.subplots()
    assert plots.eigenvalues(pairs, ax) is ax
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(TypeError, match="ax must be matplotlib axes, got Figure"):
        plots.eigenvalues(pairs, figure)


def landscape(planar: bool, metric: Any = None) -> Surface:
    """The bowl ``(x + 1)^2 + 10 (y + 1)^2`` about (0, 0), or the user's metric there."""
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.ones(1, 2, dtype=F64)
    data = (torch.diag(torch.tensor([1.0, 10**0.5], dtype=F64)), torch.zeros(2, 1, dtype=F64))
    directions = list(torch.eye(2, dtype=F64)) if planar else torch.tensor([1.0, 0.0], dtype=F64)
    return curvature.surface(model, nn.MSELoss(reduction="sum"), data, directions=directions, points=5, metric=metric)


def cliff(model: nn.Module, data: Any) -> float:
    x = float(next(model.parameters())[0, 0])
    return {0.0: float("nan"), 0.5: float("inf")}.get(x, x)


def test_a_plane_has_its_first_direction_along_the_horizontal_axis() -> None:
    result = landscape(True)
    ax: Any = plots.surface(result)
    cells = ax.collections[0].get_array()
    assert cells.shape == (5, 5)
    assert cells[0, 4] == pytest.approx(4)  # alpha = 1, beta = -1: (2)^2 + 10 (0)^2
    assert cells[4, 0] == pytest.approx(40)
    assert ax.get_xlabel() == result.labels[0]
    draw(ax)
    deep: Any = plots.surface_3d(result)
    assert deep.get_zlabel() == "loss"
    draw(deep)


def test_cells_that_are_not_finite_are_crossed_out() -> None:
    result = landscape(True, cliff)
    ax: Any = plots.surface(result)
    crosses = ax.lines[0]
    assert crosses.get_label() == "not finite"
    assert sorted(set(crosses.get_xdata())) == [-1.0, -0.5]
    assert len(crosses.get_xdata()) == 10
    assert ax.collections[0].get_array().mask.sum() == 10
    draw(ax)
    deep: Any = plots.surface_3d(result)
    assert deep.get_zlabel() == "cliff (10 not finite)"
    draw(deep)
    line: Any = plots.surface(landscape(False, cliff))
    assert line.lines[-1].get_xdata().tolist() == [-1.0, -0.5]
    draw(line)


def test_nothing_finite_is_still_a_picture() -> None:
    result = landscape(True, lambda model, data: float("nan"))
    draw(plots.surface(result))
    draw(plots.surface_3d(result))
    draw(plots.surface(landscape(False, lambda model, data: float("nan"))))


def test_a_cliff_takes_a_logarithmic_scale() -> None:
    ax: Any = plots.surface(landscape(False, lambda model, data: 10.0 ** (4 * float(next(model.parameters())[0, 0]))))
    assert ax.get_yscale() == "log"
    gentle: Any = plots.surface(landscape(False))
    assert gentle.get_yscale() == "linear"


def way(metric: Any = None) -> Interpolation:
    """From weights (1, -1) to (-1, 1) of ``x -> relu(w_1 x) - relu(w_2 x)``, whose loss rises by the mean of x^2."""
    x = torch.linspace(-1, 1, 8, dtype=F64).unsqueeze(1)
    models: list[Any] = []
    for sign in (1.0, -1.0):
        model: Any = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
        model[0].weight.data = sign * torch.tensor([[1.0], [-1.0]], dtype=F64)
        model[2].weight.data = sign * torch.tensor([[1.0, -1.0]], dtype=F64)
        models.append(model)
    return curvature.interpolation(*models, nn.MSELoss(), (x, x), points=5, layerwise=True, metric=metric)  # type: ignore[misc,arg-type]


def test_the_barrier_is_drawn_where_it_is() -> None:
    result = way()
    ax: Any = plots.interpolation(result)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.values.numpy())
    assert list(ax.lines[2].get_xdata()) == [0.5, 0.5]
    assert list(ax.lines[2].get_ydata()) == [0, pytest.approx(result.barrier)]
    draw(ax)
    by_layer: Any = plots.barriers(result)
    assert [bar.get_width() for bar in by_layer.patches] == list(result.barriers().values())
    draw(by_layer)


def test_a_row_for_each_layer() -> None:
    result = way()
    ax: Any = plots.layer_paths(result, around="b")
    cells = ax.collections[0].get_array()
    chord = (1 - result.t) * result.from_b["2"]["loss"][0] + result.t * result.from_b["2"]["loss"][-1]
    np.testing.assert_allclose(cells[1], result.from_b["2"]["loss"] - chord, atol=1e-15)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]
    draw(ax)


def test_paths_that_are_not_finite_are_marked() -> None:
    result = way(lambda model, data: float("nan") if float(model[0].weight[0]) == 0 else 1.0)
    for ax in (plots.interpolation(result), plots.layer_paths(result)):
        marked: Any = ax.lines[-1]
        assert marked.get_label() == "not finite"
        assert set(marked.get_xdata()) == {0.5}
        draw(ax)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plots.shares({"a": -1.0}), "Use bars"),
        (lambda: plots.bars({}), "nothing to draw"),
        (lambda: plots.bars({"a": torch.zeros(2)}), r"one number.*\(2,\)"),
        (lambda: plots.distances({"a": {}}), "no layer has a distance"),
        (lambda: plots.surface_3d(landscape(False)), "two directions"),
        (lambda: plots.gradient_norms({}), "at least one example"),
        (lambda: plots.gradient_norms(torch.tensor([-1.0])), "none negative"),
        (lambda: plots.gradient_norms(torch.tensor([torch.nan])), "finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
    assert plt.get_fignums() == []


def test_a_missing_matplotlib_names_the_extra(pairs: Eigenpairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'precond\[plot\]'"):
        plots.eigenvalues(pairs)


def record(step: int, previous: Overlap | None, error: float = 0.0) -> SubspaceRecord:
    first = Overlap(0.5, torch.tensor([0.7]))
    shares = torch.tensor([0.3, 0.2], dtype=F64)
    return SubspaceRecord(step, torch.ones(2), torch.zeros(2), 1.0, shares, previous, first, error, True, 9)


def test_a_subspace_over_time() -> None:
    records = [record(10, None), record(30, Overlap(0.9, torch.tensor([0.3])), error=0.8)]
    ax: Any = plots.subspace(records)
    share, hollow, previous = ax.lines[:3]
    assert share.get_xdata().tolist() == [10, 30]
    assert list(share.get_ydata()) == pytest.approx([0.5, 0.5])
    assert np.isnan(hollow.get_ydata()[0]) and hollow.get_ydata()[1] == 0.5
    assert previous.get_ydata()[1] == 0.9
    draw(ax)


def test_ratios_and_the_edge_over_time() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    data = (torch.eye(2, dtype=F64), torch.zeros(2, 1, dtype=F64))
    measured = {step: curvature.dynamics(model, nn.MSELoss(), data, lr=lr) for step, lr in ((5, 1.0), (9, 3.0))}
    ax: Any = plots.dynamics(measured)
    assert ax.containers[0].lines[0].get_xdata().tolist() == [5, 9]
    assert ax.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0.5, 1.5])
    assert ax.get_ylim()[1] > 1.5
    draw(ax)
    draw(plots.dynamics(list(measured.values())))


def test_no_measurement_is_no_picture() -> None:
    for draw_nothing in (plots.subspace, plots.dynamics):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw_nothing([])
