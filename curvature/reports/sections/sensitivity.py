"""How much the loss would rise if the weights of a layer were rounded."""

from __future__ import annotations

from curvature.compression.allocation import sensitivity as by_layer
from curvature.matrices.fisher import fisher
from curvature.reports.results import SensitivityResult
from curvature.reports.sections.study import Study
from solvers import BlockDiagonal

_BITS = (2, 3, 4, 8)
_DRAWS = 4


def passes(study: Study) -> float:
    """Cost of the factors, in gradients."""
    return 2.0 + _DRAWS


def sensitivity(study: Study) -> SensitivityResult:
    """Predicted increases for the weight matrices of layers; embeddings are left out."""
    options = {**study.options, "generator": study.generator("sensitivity", "kfac")}
    op = fisher(*study.given, structure="kfac", kind="mc", samples=_DRAWS, **options)
    assert isinstance(op, BlockDiagonal)
    study.budget.count(passes(study))
    table = by_layer(study.given[0], op, bits=_BITS)
    return SensitivityResult(_BITS, {name: tuple(row[b] for b in _BITS) for name, row in table.items()}, "mc")
