"""Layer rules: what a call of a torch function with a parameter means for the curvature.

One file per family; importing this package registers them.
"""

from curvature.layers import conv, elementwise, embedding, linear, norm
from curvature.layers.site import MODULES, RULES, ElementwiseSite, Layout, OuterSite, Ref, Site, bind, rule_for

__all__ = [
    "MODULES",
    "RULES",
    "ElementwiseSite",
    "Layout",
    "OuterSite",
    "Ref",
    "Site",
    "bind",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "rule_for",
]
