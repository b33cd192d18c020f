"""Everything about the curvature of a model in one call, and on one page."""

from curvature.reports.call import report
from curvature.reports.document import Plan, PlanRow, Report
from curvature.reports.results import (
    Condition,
    Cost,
    DensityResult,
    Distance,
    DistancesResult,
    Eigenvalue,
    EigenvaluesResult,
    LayersResult,
    LossResult,
    NoiseResult,
    Number,
    Refusal,
    TraceResult,
)
from curvature.reports.run import SECTIONS

__all__ = [
    "SECTIONS",
    "Condition",
    "Cost",
    "DensityResult",
    "Distance",
    "DistancesResult",
    "Eigenvalue",
    "EigenvaluesResult",
    "LayersResult",
    "LossResult",
    "NoiseResult",
    "Number",
    "Plan",
    "PlanRow",
    "Refusal",
    "Report",
    "TraceResult",
    "report",
]
