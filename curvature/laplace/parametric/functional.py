"""What laplace-torch's posteriors over functions must not take for a classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laplace.baselaplace import ELLA, VaLLA
from laplace.utils.enums import Likelihood

from curvature.laplace.parametric.adopted import in_front_of


@in_front_of(ELLA, VaLLA)
def fit(la: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fit, and refuse a choice among one class.

    Raises:
        ValueError: If a classifier has one output.
    """
    result = plain(*args, **kwargs)
    if la.likelihood == Likelihood.CLASSIFICATION and la.n_outputs == 1:
        raise ValueError(
            "likelihood='classification' chooses among the outputs of the model, which has one: the probability of a "
            "single class is 1, whatever the model says. Give the model one output per class, two for yes and no; one "
            "logit is nn.BCEWithLogitsLoss(), which curvature.laplace.LinearizedLaplace takes as likelihood."
        )
    return result
