"""Pictures of results: one function for each kind of result object, which takes it and returns matplotlib axes.

Needs the extra ``plot`` (matplotlib), which is imported when a picture is made. Every function draws into the axes it
is given, or into a new figure. Nothing global is changed: colours, fonts and sizes come from ``matplotlib.rcParams``,
so a dark style or your own style sheet carries over.
"""

from curvature.plots.compression import loss_against_bits, sensitivity
from curvature.plots.history import monitor
from curvature.plots.landscape import barriers, interpolation, layer_paths, surface, surface_3d
from curvature.plots.layers import bars, distances, gradient_norms, shares
from curvature.plots.spectrum import density, eigenvalues
from curvature.plots.training import dynamics, subspace

__all__ = [
    "barriers",
    "bars",
    "density",
    "distances",
    "dynamics",
    "eigenvalues",
    "gradient_norms",
    "interpolation",
    "layer_paths",
    "loss_against_bits",
    "monitor",
    "sensitivity",
    "shares",
    "subspace",
    "surface",
    "surface_3d",
]
