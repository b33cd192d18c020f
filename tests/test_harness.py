"""Does the harness run, does it see a result that is wrong, and does the page take its tables?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("curvlinops")
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import gradient_floors, scale
from tests.benchmarks.harness import tables

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


@pytest.mark.parametrize("op", ["diag GGN exact", "GGN-VP", "KFAC factors exact"])
def test_ours_stands_beside_the_others_of_its_operation(op: str) -> None:
    lines = list(tables.curvature(["mlp-tiny"], op, 0.01))[2:]
    assert lines and all(line.startswith(f"| {op}") and "| mlp-tiny |" in line for line in lines)
    for line in lines:
        _, _, _, ours, beside, _ = line.split("|")
        assert "n=" in ours and "n=" in beside and "fails" not in beside


def test_an_entry_that_computes_something_else_is_told() -> None:
    known: dict[str, torch.Tensor] = {}
    tables._agree("op", "mlp", "one", torch.tensor([1.0, 0.0]), known)
    tables._agree("op", "mlp", "two", torch.tensor([2.0, 0.0]), known)
    with pytest.raises(tables.DisagreementError, match="three and one"):
        tables._agree("op", "mlp", "three", torch.tensor([1.0, 0.1]), known)
    with pytest.raises(tables.DisagreementError):
        tables._agree("op", "mlp", "four", torch.ones(3), known)


def test_steps_of_ours_and_of_sgd_are_timed() -> None:
    lines = list(tables.steps(["mlp-tiny"], "SGD", 0.01))
    assert lines[0] == "| optimizer | refresh every | mlp-tiny |" and "n=" in lines[2]
    kfac = next(e for e in tables.registered() if e.name == "precond KFAC")
    row, result = tables.measured(kfac, "mlp-tiny", 0.01, interval=10)
    assert row.low <= row.median <= row.high and row.n >= 3 and result is None


def test_the_memory_of_steps_is_measured_and_a_peer_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(w: object, interval: int) -> None:
        raise RuntimeError("no")

    kfac = next(e for e in tables.registered() if e.name == "precond KFAC")
    monkeypatch.setattr(tables, "ENTRIES", [kfac, replace(kfac, name="other KFAC", build=broken)])
    lines = list(tables.memory(["mlp-small"], "KFAC", 0.01))
    assert lines[0] == "| optimizer | refresh every | mlp-small |"
    assert float(lines[2].split("|")[3]) > 1 and lines[3] == "| other KFAC | 1 | fails |"


def test_what_fails_is_named_unless_it_is_ours() -> None:
    def broken(w: object) -> None:
        raise RuntimeError("no")

    entry = next(e for e in tables.registered() if e.meta.get("op") == "HVP" and not tables.is_ours(e))
    assert tables._tried(replace(entry, build=broken), "mlp-tiny", 0.01) == ("fails", None)
    broken.__module__ = "ours"
    with pytest.raises(RuntimeError, match="no"):
        tables._tried(replace(entry, build=broken), "mlp-tiny", 0.01)


def test_a_table_goes_between_its_marks_and_keeps_rows_it_does_not_measure() -> None:
    lines = ["| operation | workload |", "| --- | --- |", "| HVP | mlp | 1 |", "| HVP | cnn | 2 |"]
    page = "before\n<!-- steps: begin -->\nold\n<!-- steps: end -->\nafter\n"
    table = "\n".join(lines)
    once = tables.put(page, "steps", lines)
    assert once == f"before\n<!-- steps: begin -->\n\n{table}\n\n<!-- steps: end -->\nafter\n"
    assert tables.put(once, "steps", lines) == once
    again = tables.put(once, "steps", [*lines[:2], "| HVP | mlp | 3 |", "| GGN | mlp | 4 |"])
    assert again == once.replace("| 1 |", "| 3 |").replace("| 2 |", "| 2 |\n| GGN | mlp | 4 |")
    with pytest.raises(ValueError, match="no marks"):
        tables.put("nothing", "steps", lines)


@pytest.mark.parametrize("method", scale.METHODS)
def test_every_method_of_the_scales_takes_steps_on_a_small_model(method: str) -> None:
    torch.manual_seed(0)
    assert len(scale.steps(scale.METHODS[method], scale.CASES["small"](), 2)) == 2


def test_what_exceeds_its_limit_is_named() -> None:
    assert scale.in_a_process("small", "SGD", 1, 12.0) == "over 1 s"  # importing torch alone takes longer
    found = scale.in_a_process("small", "KFAC", 60, 12.0)
    assert isinstance(found, dict) and len(found["seconds"]) == 3 and found["peak"] > 0


def test_floors_are_the_parts_that_a_step_needs_and_stand_beside_ours() -> None:
    found = gradient_floors.measured("SOAP", "mlp-tiny", rounds=1, periods=(1, 2))
    refresh = sum(found.parts[part] for part in ("A Q", "QR", "momentum turned"))
    assert found.floor[1] == pytest.approx(found.plain + sum(found.parts.values()))
    assert found.floor[1] - found.floor[2] == pytest.approx(refresh / 2)
    assert found.ours.keys() == {1, 2} and min(found.ours.values()) > 0
    assert [line.split()[2] for line in found.lines("mlp-tiny, SOAP")[1:3]] == ["floor", "ours"]
    muon = gradient_floors.measured("Muon", "mlp-tiny", rounds=1)
    assert muon.ours.keys() == muon.floor.keys() == {1}


def test_floors_make_the_products_of_the_shapes_of_the_model() -> None:
    def flops(method: str, part: str) -> int:
        kernels = gradient_floors.PARTS[method](gradient_floors.make("mlp-tiny"))[part]
        with FlopCounterMode(display=False) as counter:
            kernels.run()
        return counter.get_total_flops()

    shapes = [(32, 20), (24, 32), (10, 24)]  # of the weights
    turns = sum(2 * m * n * (m + n) for m, n in shapes)
    cubes = sum(2 * (m**3 + n**3) for m, n in shapes)
    assert flops("SOAP", "rotations") == 2 * turns and flops("SOAP", "A Q") == cubes
    assert flops("PSGD", "P h") == turns
    assert flops("Shampoo", "Gram matrices") == turns + sum(2 * m * m for m, _ in shapes)  # and of the biases
    assert flops("PSGD", "the step of Q, and its turn") == 3 * cubes
    with_bias = sum(2 * (m**3 + (n + 1) ** 3) for m, n in shapes)
    assert flops("SINGD", "A K, and K m") == 2 * with_bias
