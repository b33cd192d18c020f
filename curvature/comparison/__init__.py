"""Reports compared: what differs between two of them, or along a training run, with combined errors."""

from curvature.comparison.call import compare
from curvature.comparison.comparability import NotComparableWarning
from curvature.comparison.document import Comparison
from curvature.comparison.quantities import Difference, Measured, Quantity

__all__ = ["Comparison", "Difference", "Measured", "NotComparableWarning", "Quantity", "compare"]
