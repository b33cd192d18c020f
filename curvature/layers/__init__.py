"""Layer rules: how calls of torch functions use parameters.

One file per family; importing this package registers them.
"""

from curvature.layers import (
    bilinear,
    conv,
    elementwise,
    embedding,
    embedding_bag,
    linear,
    norm,
    prelu,
    recurrent,
    transposed,
)
from curvature.layers.rules import MODULES, REPLACEMENTS, RULES, bind, replacement_for, rule_for
from curvature.layers.site import ElementwiseSite, Observer, OuterSite, Ref, RowLayout, Site

__all__ = [
    "MODULES",
    "REPLACEMENTS",
    "RULES",
    "ElementwiseSite",
    "RowLayout",
    "OuterSite",
    "Ref",
    "Site",
    "Observer",
    "bilinear",
    "bind",
    "conv",
    "elementwise",
    "embedding",
    "embedding_bag",
    "linear",
    "norm",
    "prelu",
    "recurrent",
    "replacement_for",
    "rule_for",
    "transposed",
]
