"""Does nonsense get one clear sentence, does one section's trouble stay its own, and is nothing left on the model?"""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature
from curvature.matrices.hessian import Hessian
from curvature.reports import Number, Report, report
from curvature.reports.codec import decode, encode
from curvature.reports.pages.formats import number, plain, with_error
from tests.curvature.estimation.test_untouched import fingerprint, same
from tests.curvature.problems import PROBLEMS, Problem, normal


def made() -> Problem:
    return PROBLEMS["mlp_ce"]()


def run(problem: Problem, **options: Any) -> Report:
    return report(problem.model, problem.loss_fn, problem.data, **{"progress": False, "k": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is at least 1, not 0"),
        ({"k": 2.5}, "k is a whole number of at least 1"),
        ({"damping": 0.0}, "damping is a finite number above 0, not 0.0"),
        ({"rtol": math.nan}, "rtol is a finite number above 0, not nan"),
        ({"matrix": "fisher"}, "matrix are among hessian, ggn; 'fisher' is not"),
        ({"sections": ["traces"]}, "sections are among loss, coverage, .*; 'traces' is not"),
        ({"structures": ["shampoo"]}, "structures are among .*; 'shampoo' is not"),
        ({"sections": "distances", "matrix": "hessian"}, "distances are those to the GGN"),
        ({"budget": -1}, "budget is a finite number above 0, not -1"),
        ({"budget": 10, "products": 10}, "give budget=10 in seconds or products=10, not both"),
        ({"params": "nothing"}, "names 'nothing', which is no trainable parameter"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(made(), **options)


def test_wrong_types() -> None:
    model, loss_fn, data = made().model, made().loss_fn, made().data
    nonsense: Any = 3
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, not 3"):
        report(nonsense, loss_fn, data)
    with pytest.raises(TypeError, match=r"loss_fn is a loss module such as .*, not "):
        report(model, "cross_entropy", data)
    with pytest.raises(TypeError, match="data is one batch"):
        report(model, loss_fn, nonsense)
    with pytest.raises(TypeError, match="one-shot iterator"):
        report(model, loss_fn, iter(data))
    with pytest.raises(TypeError, match="warm_start is an earlier Report"):
        run(made(), warm_start={})


def test_empty_data() -> None:
    with pytest.raises(ValueError, match="data has no batches"):
        report(made().model, made().loss_fn, [])


def test_a_loss_that_is_not_finite() -> None:
    problem = made()
    problem.data[1][0][0, 0] = math.nan
    before = fingerprint(problem.model)
    with pytest.raises((ValueError, ArithmeticError), match=r"(?i)nan"):
        run(problem)
    same(before, fingerprint(problem.model))


def test_matrices_that_are_too_large() -> None:
    with pytest.raises(ValueError, match=r"exact=True would form matrices of 7 GiB for 30,000 parameters"):
        report(nn.Linear(300, 100, bias=False), nn.MSELoss(), (torch.ones(2, 300), torch.ones(2, 100)), exact=True)


def test_a_frozen_model() -> None:
    problem = made()
    problem.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(problem)


def test_active_dropout_is_refused_in_one_sentence() -> None:
    problem = made()
    model = nn.Sequential(problem.model, nn.Dropout(0.5), nn.Linear(3, 3).double())
    with pytest.raises(curvature.NondeterministicError, match=r"dropout is active in 1, .* call model.eval\(\)"):
        report(model, problem.loss_fn, problem.data)
    found = report(model.eval(), problem.loss_fn, problem.data, sections=["trace"], progress=False)
    assert found.notes == ()


@pytest.mark.filterwarnings("ignore:not one loss")
def test_what_depends_on_the_batches_is_noted() -> None:
    problem = PROBLEMS["residual_train"]()
    found = run(problem, sections=["loss"])
    assert len(found.notes) == 1 and "normalise by the statistics of the batch" in found.notes[0]
    assert "statistics of the batch" in str(found)


def test_a_loss_without_terms_has_a_hessian_and_no_more() -> None:
    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        return (output @ output.T).logsumexp(-1).mean() - output.gather(1, target.unsqueeze(1)).mean()

    problem = made()
    found = report(problem.model, contrastive, problem.data[0], k=2, progress=False)
    assert set(found.eigenvalues) == {"hessian"} and set(found.traces) == {"hessian"}
    refused = {refusal.part: refusal for refusal in found.refused}
    assert refused["ggn"].error == "UnknownLossError"
    assert "noise" in refused
    assert "contrastive" in found.loss_fn
    shown = str(found)
    assert "What is missing" in shown and "ggn" in shown


def test_one_structure_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["curvature.reports.sections.distances"]
    genuine = module.ggn

    def fail(*args: Any, structure: str, **options: Any) -> Any:
        if structure == "kfac":
            raise RuntimeError("no room\nfor factors")
        return genuine(*args, structure=structure, **options)

    monkeypatch.setattr(module, "ggn", fail)
    found = run(made())
    assert found.distances is not None and set(found.distances.structures) == {"diagonal", "ekfac"}
    (refusal,) = found.refused
    assert (refusal.part, refusal.error, refusal.message) == ("distances (kfac)", "RuntimeError", "no room for factors")


def test_an_interruption_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    problem = made()
    monkeypatch.setattr(Hessian, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(problem)


# What is left behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_ce", "residual_train", "encoder_pre_norm", "frozen_parts", "bare_parameters"])
def test_nothing_is_left_on_the_model(name: str) -> None:
    problem = PROBLEMS[name]()
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    data, before = copy.deepcopy(problem.data), fingerprint(problem.model)
    found = run(problem, products=150)
    same(before, fingerprint(problem.model))
    assert all(torch.equal(x, old) and torch.equal(y, o) for (x, y), (old, o) in zip(problem.data, data, strict=True))
    assert found.refused == ()


def test_under_no_grad_and_inference_mode() -> None:
    problem = made()
    expected = run(problem, sections=["trace"]).traces
    with torch.no_grad():
        assert run(problem, sections=["trace"]).traces == expected
    with torch.inference_mode():
        assert run(problem, sections=["trace"]).traces == expected


def test_a_restriction_of_the_parameters() -> None:
    problem = made()
    found = run(problem, params="2.*")
    assert found.parameters == 18 and set(found.layers) == {"2"}
    block = curvature.ggn(problem.model, problem.loss_fn, problem.data, params="2.*").to_dense()
    assert found.traces["ggn"].trace.value == pytest.approx(float(block.trace()))


def test_a_gradient_that_is_zero() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    x = normal(6, 2)
    found = report(model, nn.MSELoss(), (x, model(x).detach()), k=1, progress=False)
    assert found.loss.gradient_norm == 0 and found.eigenvalues["ggn"].alignment is None
    assert found.refused == () and found.noise is not None and found.noise.scale is None
    assert "The matrices in numbers" in str(found)


def test_a_model_of_one_parameter() -> None:
    found = report(nn.Linear(1, 1, bias=False), nn.MSELoss(), (torch.ones(4, 1), torch.zeros(4, 1)), progress=False)
    assert found.refused == () and found.eigenvalues["hessian"].largest[0].value == pytest.approx(2)
    assert found.densities["ggn"].condition is not None and found.densities["ggn"].condition.high == pytest.approx(1)


# Plain data -----------------------------------------------------------------------------------------------------------


def test_json_goes_both_ways() -> None:
    found = run(made())
    text = found.to_json()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (content["format"], content["version"]) == ("precond curvature report", 1)
    again = Report.from_json(text)
    assert repr(again) == repr(found) and len(repr(found)) < 100
    assert again.to_json() == text and str(again) == str(found)
    assert again.eigenvalues == found.eigenvalues and again.coverage == found.coverage and again.noise == found.noise


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no curvature report"):
        Report.from_dict({"loss": 1.0})
    content = run(made(), sections=["loss"]).to_dict()
    with pytest.raises(ValueError, match="has the version 7; 1 can be read"):
        Report.from_dict({**content, "version": 7})
    with pytest.raises(ValueError, match="LossResult has the fields"):
        Report.from_dict({**content, "loss": {"value": 1.0}})


def test_codec_keeps_types() -> None:
    assert decode(Number, encode(Number(1.0, 0.5, 3))) == Number(1.0, 0.5, 3)
    assert decode(tuple[tuple[int, float], ...], [[1, 2], [3, 4.5]]) == ((1, 2.0), (3, 4.5))
    assert decode(Number | None, None) is None


def test_saving_by_suffix(tmp_path: Any) -> None:
    found = run(made(), sections=["loss"])
    with pytest.raises(ValueError, match=r"saved as .html, .json or .pt, not '.pdf'"):
        found.save(tmp_path / "report.pdf")
    found.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").to_json() == found.to_json()
    with pytest.raises(ValueError, match=r"loaded from .json or .pt"):
        Report.load(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (2.0810716, 0.0289564, "2.081 ± 0.029"),
        (0.5676796, 1e-16, "0.5677"),
        (0.0211332, 7.8e-7, "0.02113"),
        (0.0211332, 7.8e-6, "0.0211332 ± 0.0000078"),
        (-5.8e-05, 3.6e-05, "(-5.8 ± 3.6)e-05"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1234567.0, 12000.0, "(1.235 ± 0.012)e+06"),
        (36.5, 250.0, "36 ± 250"),
        (0.0, 0.0, "0"),
    ],
)
def test_numbers_are_shown_as_exactly_as_they_are_known(value: float, error: float, shown: str) -> None:
    assert number(Number(value, error, 10)) == shown
    if error:
        assert with_error(value, error) == shown


def test_plain_numbers() -> None:
    assert [plain(x) for x in (0, 1, 12345.678, 0.00123456, 1e-7, -2.5e9)] == [
        *("0", "1.000", "12,346", "0.001235", "1.000e-07", "-2.500e+09")
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("exact", [None, False])
def test_on_an_accelerator(exact: bool | None) -> None:
    problem = made()
    expected = run(problem, exact=True)
    problem.model.cuda()
    found = run(problem, exact=exact)  # the data stay where they are
    assert found.refused == () and found.eigenvectors["ggn"].is_cuda
    top, other = found.eigenvalues["ggn"].largest[0], expected.eigenvalues["ggn"].largest[0]
    assert abs(top.value - other.value) <= top.residual + 1e-9
    assert Report.from_json(found.to_json()).to_json() == found.to_json()


def test_inputs_that_are_mappings() -> None:
    problem = PROBLEMS["mapping_inputs"]()
    found = run(problem, products=400)
    assert found.refused == () and found.noise is not None and found.noise.examples == 5


def test_a_loader_that_shuffles() -> None:
    problem = PROBLEMS["mlp_ce"]()
    x, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    found = run(Problem(problem.model, problem.loss_fn, loader))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    assert found.refused == () and "the loader shuffles" in found.notes[0]
    assert found.loss.batches == 3
    assert found.traces["ggn"].trace.value == pytest.approx(run(problem).traces["ggn"].trace.value)
