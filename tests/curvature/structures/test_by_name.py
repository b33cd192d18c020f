"""Is a structure taken as a name, as a curvature and as a mapping, with one kind?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import (
    Curvature,
    CurvatureEstimator,
    DiagonalFisher,
    EigenbasisFisher,
    KroneckerFisher,
    LayerFisher,
    Mixed,
    SINGDFisher,
    SketchedFisher,
)
from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.structures.blocks import BLOCKS
from curvature.structures.by_name import curvature_of, kind_of
from curvature.structures.estimator import Form, MeanEstimator
from solvers import Diagonal, LinearOperator
from tests.curvature.problems import PROBLEMS

PROBLEM = PROBLEMS["mlp_ce"]()
GIVEN: Any = (PROBLEM.model, PROBLEM.loss_fn, PROBLEM.data)


class ScalarEstimator(MeanEstimator):
    """A multiple of the identity, the mean of the diagonal."""

    structure = "scalar"

    def total(self, samples: Samples) -> Tensor:
        return samples.square_sum().mean()

    def of_mean(self, value: Tensor) -> LinearOperator:
        return Diagonal(value.expand(self.block.shape))


@dataclass(frozen=True)
class ScalarFisher(Curvature):
    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return ScalarEstimator(block)


def test_what_a_structure_stands_for() -> None:
    for name, cls in BLOCKS.items():
        assert curvature_of(name, "exact") == cls("exact")
        assert curvature_of(name) == cls("mc")
        assert curvature_of(name, default="empirical") == cls("empirical")
    assert curvature_of("kfac", "mc", 3, sharing="reduce") == KroneckerFisher("mc", 3, sharing="reduce")
    given = EigenbasisFisher("exact", sharing="reduce")
    assert curvature_of(given) is given
    assert curvature_of(given, "exact", 5) is given  # draws have no meaning for an exact curvature
    rules = {"*": "kfac", "2.*": DiagonalFisher("empirical")}
    assert curvature_of(rules) == Mixed(rules, "empirical")
    assert curvature_of(Mixed(rules, "empirical")) == Mixed(rules, "empirical")


def test_the_kind_is_that_of_the_call_then_of_the_curvature_then_the_default() -> None:
    assert kind_of("kfac", None, "exact") == "exact"
    assert kind_of("kfac", "mc", "exact") == "mc"
    assert kind_of(KroneckerFisher("empirical"), None, "exact") == "empirical"
    assert kind_of({"*": "kfac", "head": KroneckerFisher("empirical")}, None, "exact") == "empirical"
    with pytest.raises(ValueError, match="kind must be one of"):
        kind_of("kfac", "sampled", "exact")  # type: ignore[arg-type]


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call says kind='exact', but KroneckerFisher\(kind='mc'.* kind='mc'. Say it"):
        curvature_of(KroneckerFisher("mc"), "exact")
    with pytest.raises(ValueError, match=r"call says samples=2, but KroneckerFisher.* samples=4. Say it in one place"):
        curvature_of(KroneckerFisher("mc", 4), samples=2)
    with pytest.raises(TypeError, match=r"sharing: options go with a structure given by name.*KroneckerFisher\("):
        curvature_of(KroneckerFisher(), sharing="reduce")
    with pytest.raises(TypeError, match="sharing: options go with"):
        curvature_of({"*": "kfac"}, sharing="reduce")
    with pytest.raises(ValueError, match=r"structure must be one of .*'kfac'.* got 'full'"):
        curvature_of("full")
    with pytest.raises(ValueError, match=r"structure must be one of .* got 3"):
        curvature_of(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"asks for kind='exact'"):
        curvature_of({"*": DiagonalFisher("mc"), "2.*": DiagonalFisher("exact")})


def test_curvatures_are_taken_where_their_names_are() -> None:
    def same(found: LinearOperator, expected: LinearOperator) -> None:
        assert torch.equal(found.to_dense(), expected.to_dense())

    reduce: dict[str, Any] = {"structure": "kfac", "sharing": "reduce"}
    same(curvature.ggn(*GIVEN, structure=KroneckerFisher(sharing="reduce")), curvature.ggn(*GIVEN, kind="mc", **reduce))
    exact = KroneckerFisher("exact", sharing="reduce")
    same(curvature.fisher(*GIVEN, structure=exact), curvature.fisher(*GIVEN, kind="exact", **reduce))
    drawn = curvature.fisher(*GIVEN, structure=DiagonalFisher(samples=3))
    same(drawn, curvature.fisher(*GIVEN, structure="diagonal", samples=3))
    rules: Any = {"*": DiagonalFisher("exact"), "0": KroneckerFisher("exact")}
    same(curvature.ggn(*GIVEN, structure=rules), curvature.ggn(*GIVEN, structure={"*": "diagonal", "0": "kfac"}))
    layers = curvature.gradient_covariance(*GIVEN, structure=LayerFisher("empirical"))
    same(layers, curvature.gradient_covariance(*GIVEN, structure="layer"))
    same(layers, curvature.gradient_covariance(*GIVEN, structure={"*": "layer"}))


def test_a_structure_of_ones_own() -> None:
    """The trace of a multiple of the identity is that of the Fisher."""
    expected = curvature.fisher(*GIVEN, kind="exact", structure="diagonal").trace()
    for options in ({}, {"kind": "exact"}):
        got = curvature.fisher(*GIVEN, structure=ScalarFisher("exact"), **options)
        torch.testing.assert_close(got.trace(), expected)
    x, y = PROBLEM.data[0]
    scalar = curvature.influence(*GIVEN, (x[:2], y[:2]), curvature=ScalarFisher("exact"), damping=0.1)
    given = curvature.influence(*GIVEN, (x[:2], y[:2]), curvature=got, damping=0.1)
    assert torch.equal(scalar.scores, given.scores)


def test_doors_refuse_curvatures_of_another_kind() -> None:
    with pytest.raises(ValueError, match=r"empirical Fisher is no Gauss-Newton matrix"):
        curvature.ggn(*GIVEN, structure=DiagonalFisher("empirical"))
    with pytest.raises(ValueError, match=r"call says kind='empirical', but DiagonalFisher\(kind='mc'"):
        curvature.gradient_covariance(*GIVEN, structure=DiagonalFisher())
    for structure in ("kfac", KroneckerFisher("empirical"), {"*": "diagonal", "0": "kfac"}, ScalarFisher("empirical")):
        with pytest.raises(ValueError, match="cannot be centered"):
            curvature.gradient_covariance(*GIVEN, structure=structure)  # type: ignore[arg-type]
    for inverse in (SINGDFisher(), SketchedFisher()):
        with pytest.raises(ValueError, match=r"Fisher\(.* learns an inverse in training"):
            curvature.fisher(*GIVEN, structure=inverse)


def test_matrix_free_is_the_default_everywhere() -> None:
    for make in (curvature.hessian, curvature.ggn, curvature.fisher):
        assert isinstance(make(*GIVEN), DatasetOperator)
    assert isinstance(curvature.gradient_covariance(*GIVEN, centered=False), DatasetOperator)
    torch.testing.assert_close(curvature.fisher(*GIVEN, kind="exact").to_dense(), curvature.ggn(*GIVEN).to_dense())
    with pytest.raises(ValueError, match="samples is at least 1, not 0"):
        curvature.fisher(*GIVEN, samples=0)


def test_mapping_by_class() -> None:
    mixed = curvature.ggn(*GIVEN, structure={nn.Linear: LayerFisher("exact"), "*": "diagonal"})
    assert torch.equal(mixed.to_dense(), curvature.ggn(*GIVEN, structure="layer").to_dense())
