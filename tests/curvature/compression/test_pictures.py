"""Pictures and pages of compressed models show the numbers they are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvature
from curvature import plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def _problem():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))


def test_sensitivity_is_a_line_for_each_layer() -> None:
    model, loss_fn, data = _problem()
    op = curvature.fisher(model, loss_fn, data, kind="exact", structure="kfac")
    table = curvature.sensitivity(model, op, bits=(2, 4))
    assert table == {n: {b: r[b] for b in (2, 4)} for n, r in curvature.allocate(model, op, bits=4).table.items()}
    ax = plots.sensitivity(table, most=1)
    drawn = {tuple(float(v) for v in line.get_ydata()) for line in ax.lines}
    assert drawn == {(row[2], row[4]) for row in table.values()}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [max(table, key=lambda n: table[n][2])]
    with pytest.raises(ValueError, match="no layer"):
        plots.sensitivity({})
    matplotlib.pyplot.close("all")


def test_loss_against_bits_marks_the_original() -> None:
    model, loss_fn, data = _problem()
    found = {
        name: [curvature.quantize(model, loss_fn, data, bits=bits, structure=name) for bits in (4, 2)]
        for name in ("kfac", "foof")
    }
    ax = plots.loss_against_bits(found)
    for line, results in zip(ax.lines, found.values(), strict=False):
        assert list(line.get_xdata()) == [2, 4]
        assert list(line.get_ydata()) == [results[1].loss_after, results[0].loss_after]
    assert float(ax.lines[2].get_ydata()[0]) == found["kfac"][0].loss_before
    with pytest.raises(ValueError, match="measure=False"):
        plots.loss_against_bits([curvature.quantize(model, loss_fn, data, measure=False)])
    matplotlib.pyplot.close("all")


def test_a_report_has_the_section_where_it_is_asked_for() -> None:
    model, loss_fn, data = _problem()
    found = curvature.report(model, loss_fn, data, sections=["sensitivity"], matrix="ggn")
    assert found.sensitivity is not None and not found.refused
    assert list(found.sensitivity.layers) == ["0.weight", "2.weight"] and found.sensitivity.bits == (2, 3, 4, 8)
    assert all(list(row) == sorted(row, reverse=True) for row in found.sensitivity.layers.values())
    assert "Predicted increase of the loss" in str(found) and "Sensitivity to rounding" in found.to_html()
    assert curvature.Report.from_json(found.to_json()).sensitivity == found.sensitivity
    content = found.to_dict()
    del content["sensitivity"]  # as earlier versions wrote it
    assert curvature.Report.from_dict(content).sensitivity is None
    assert curvature.report(model, loss_fn, data, matrix="ggn", k=2, sections=["loss"]).sensitivity is None
