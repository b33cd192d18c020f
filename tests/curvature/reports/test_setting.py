"""Does a report say what its numbers belong to, and what its marks mean?"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import curvature
from curvature.reports import Report, report
from solvers import __version__
from tests.curvature.problems import PROBLEMS, normal

LR = 0.05


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


X, Y = normal(12, 4), torch.arange(12) % 3


def made(model: nn.Module | None = None, data: Any = (X, Y), **options: Any) -> Report:
    found = report(model or network(), nn.CrossEntropyLoss(), data, **{"k": 3, "progress": False, **options})
    assert isinstance(found, Report)
    return found


def test_the_head_names_mode_precision_device_data_seed_and_versions() -> None:
    found = made(seed=7, data=[(X[:8], Y[:8]), (X[8:], Y[8:])])
    setting = found.setting
    assert setting is not None
    assert (setting.mode, setting.dtype, setting.device, setting.examples) == ("eval", "float64", "cpu", 12)
    assert setting.kinds == {"0": "Linear", "3": "Linear"}
    assert setting.versions["precond"] == __version__ and setting.versions["torch"] == str(torch.__version__)
    head = " ".join(str(found).partition("At a glance")[0].split())
    for said in (
        "examples 12",
        "batches 2",
        "mode eval",
        "dtype float64",
        "device cpu",
        "seed 7",
        f"precond {__version__}",
    ):
        assert said in head
    for name in ("mode", "dtype", "device", "seed", "versions"):
        assert f"<dt>{name}</dt>" in found.to_html()
    assert Report.from_json(found.to_json()).setting == setting


def test_modes_of_modules_that_differ_are_counted() -> None:
    model = network()
    model[0].train()
    assert made(model, sections=["loss"]).setting.mode == "eval, 1 of 5 modules in train mode"  # type: ignore[union-attr]
    model.train()
    model[1].p = 0.0
    assert made(model, sections=["loss"]).setting.mode == "train"  # type: ignore[union-attr]


def test_equal_data_are_told_whatever_their_order_and_batches() -> None:
    def data_of(data: Any) -> float:
        setting = made(data=data, sections=["loss"]).setting
        assert setting is not None
        return setting.data

    whole = data_of((X, Y))
    turned = torch.arange(11, -1, -1)
    assert data_of([(X[turned[:5]], Y[turned[:5]]), (X[turned[5:]], Y[turned[5:]])]) == pytest.approx(whole, rel=1e-12)
    other = X.clone()
    other[3, 1] += 1e-3
    assert abs(data_of((other, Y)) - whole) > 1e-5


def test_a_file_that_does_not_say_its_setting_is_read() -> None:
    content = made(sections=["loss"]).to_dict()
    del content["setting"]
    old = Report.from_dict(content)
    assert old.setting is None and "gradient norm" in str(old) and "<h1>" in old.to_html()


@pytest.mark.parametrize("exact", [None, False])
def test_marks_are_explained_in_the_table_in_which_they_stand(exact: bool | None) -> None:
    problem = PROBLEMS["mlp_ce"]()
    found = report(problem.model, problem.loss_fn, problem.data, k=6, rtol=1e-12, products=400, exact=exact)
    tables = re.findall(r"<table>.*?</table>(?:<p class=.marks.>.*?</p>)?", found.to_html(), re.DOTALL)
    marked = 0
    for table in tables:
        cells, _, said = table.partition("</table>")
        assert ("\u00b1" in said) == ("\u00b1" in cells), cells
        assert ("not converged" in said) == bool(re.search(r"\*</td>", cells)), cells
        marked += "\u00b1" in cells
    assert marked >= (1 if exact is None else 4)
    if exact is False:
        text = str(found)
        assert "one standard error: the truth lies" in text and "a bound: a true eigenvalue lies within it" in text


def test_layers_of_a_sequential_model_go_by_the_class_of_their_module() -> None:
    found = made()
    text = str(found)
    assert re.search(r"^0 \(Linear\) +25", text, re.MULTILINE) and re.search(r"^3 \(Linear\) +18", text, re.MULTILINE)
    assert list(found.layers) == ["0", "3"]  # the keys stay names of modules


def test_the_edge_of_stability_stands_beside_the_largest_eigenvalue() -> None:
    model = network()
    top = float(torch.linalg.eigvalsh(curvature.hessian(model, nn.CrossEntropyLoss(), (X, Y)).to_dense())[-1])
    stable, diverging = (made(model, lr=factor * 2 / top) for factor in (0.5, 2.0))
    for found, share, verdict in ((stable, "0.500", "is stable"), (diverging, "2.00", "diverges in that direction")):
        lr = found.setting.lr  # type: ignore[union-attr]
        text = " ".join(str(found).split())
        assert f"At lr = {lr:g} the edge of stability, 2 / lr, is" in text
        assert f"the largest eigenvalue is {share} of it" in text and verdict in text
        assert f"2 / lr at lr = {lr:g}" in text and "2 / lr" in found.to_html()
    assert "2 / lr" not in str(made(model))


def test_a_rate_that_nothing_is_compared_with_is_refused() -> None:
    for options in ({"matrix": "ggn"}, {"sections": ["loss", "trace"]}):
        with pytest.raises(ValueError, match=r"lr=0\.05 is compared with the eigenvalues of the Hessian"):
            made(lr=LR, **options)
    with pytest.raises(ValueError, match="lr"):
        made(lr=-1.0)
