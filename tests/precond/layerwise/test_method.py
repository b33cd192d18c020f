"""Does `fisher=` take the object of its method, with the plain options beside it, and no other?"""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from torch import nn

from curvature import (
    Curvature,
    DiagonalFisher,
    EigenbasisFisher,
    GramFisher,
    InputKronecker,
    KroneckerFisher,
    LayerFisher,
    SINGDFisher,
    SketchedFisher,
    TensorNormal,
)
from precond import (
    EKFAC,
    KBFGS,
    KFAC,
    SENG,
    SINGD,
    TNT,
    Loop,
    NaturalGradient,
    SMWNaturalGradient,
    WholeFisher,
    methods,
)


def made(cls: Any, **options: Any) -> Curvature:
    return cls(nn.Linear(3, 2), nn.CrossEntropyLoss(), lr=0.1, **options).curvature


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (KFAC, {"fisher": "exact", "sharing": "reduce"}, KroneckerFisher("exact", sharing="reduce")),
        (KFAC, {"fisher": KroneckerFisher("exact", 2, "reduce")}, KroneckerFisher("exact", 2, "reduce")),
        (KFAC, {"fisher": KroneckerFisher(samples=2), "sharing": "reduce"}, KroneckerFisher("mc", 2, "reduce")),
        (EKFAC, {"fisher": EigenbasisFisher(bias="separate")}, EigenbasisFisher(bias="separate")),
        (TNT, {"fisher": TensorNormal("empirical")}, TensorNormal("empirical")),
        (
            SINGD,
            {"fisher": SINGDFisher(coupled=False), "structure": "block"},
            SINGDFisher(factor="block", coupled=False),
        ),
        (
            SENG,
            {"fisher": SketchedFisher("mc"), "sketch": 9, "loop": Loop(seed=4)},
            SketchedFisher("mc", size=9, seed=4),
        ),
        (NaturalGradient, {}, LayerFisher()),
        (NaturalGradient, {"fisher": DiagonalFisher("exact")}, DiagonalFisher("exact")),
        (NaturalGradient, {"structure": "dense", "fisher": WholeFisher(max_size=9)}, WholeFisher(max_size=9)),
        (SMWNaturalGradient, {}, WholeFisher("empirical", gram=True)),
        (SMWNaturalGradient, {"fisher": WholeFisher("mc", 3)}, WholeFisher("mc", 3, gram=True)),
        (SMWNaturalGradient, {"fisher": GramFisher("mc", 3)}, GramFisher("mc", 3)),
    ],
)
def test_a_name_or_the_object(cls: Any, options: dict[str, Any], expected: Curvature) -> None:
    assert made(cls, **options) == expected


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (
            KFAC,
            {"fisher": EigenbasisFisher()},
            TypeError,
            r"^KFAC: fisher is .* or KroneckerFisher\(...\), not EigenbasisF",
        ),
        (KFAC, {"fisher": InputKronecker()}, TypeError, r"PreconditionedOptimizer\(curvature=...\) takes any"),
        (EKFAC, {"fisher": KroneckerFisher()}, TypeError, r"^EKFAC: fisher is .* or EigenbasisFisher\(...\)"),
        (TNT, {"fisher": KroneckerFisher()}, TypeError, r"^TNT: fisher is .* or TensorNormal\(...\)"),
        (
            KBFGS,
            {"curvature": KroneckerFisher()},
            TypeError,
            r"^KBFGS: curvature is a KroneckerBFGS\(...\), not Kronecker",
        ),
        (
            NaturalGradient,
            {"structure": "unit", "fisher": LayerFisher()},
            TypeError,
            r"^NaturalGradient: fisher is .* or UnitFisher",
        ),
        (NaturalGradient, {"fisher": WholeFisher(gram=True)}, ValueError, "keeps the matrix itself"),
        (
            SINGD,
            {"structure": "block", "fisher": SINGDFisher(factor="diagonal")},
            ValueError,
            "^SINGD: factor is 'block', but 'diagonal' in SINGDFisher.*give one value",
        ),
        (SMWNaturalGradient, {"structure": "unit"}, ValueError, "structure is one of dense, layer, not 'unit'"),
    ],
)
def test_another_object_is_refused(cls: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(cls, **options)


@pytest.mark.parametrize("cls", [NaturalGradient, SMWNaturalGradient])
def test_the_whole_matrix_is_dense(cls: Any) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^{cls.__name__}: structure='full' is structure='dense' now\.$"):
        old = made(cls, structure="full")
    assert old == made(cls, structure="dense")


LAYERWISE = [method.cls for method in methods() if method.needs == "layers"]


def found(name: str) -> bool:
    """Whether there is something of this name, below one of the packages."""
    for package in ("curvature", "solvers", "precond"):
        parts = f"{package}.{name}".split(".")
        for end in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            if all((value := getattr(value, part, None)) is not None for part in parts[end:]):
                return True
            break
    return False


@pytest.mark.parametrize("cls", LAYERWISE)
def test_the_table_beside_the_paper_names_what_exists(cls: Any) -> None:
    _, _, table, *_ = re.split(r"^ *=+ =+$", cls.__doc__.partition("    Args:")[0][-2500:], flags=re.M)[-4:]
    names = re.findall(r"``([\w.]*[A-Z.]\w[\w.]*)``", table)
    assert len(names) > 2
    assert [name for name in names if not found(name)] == []
