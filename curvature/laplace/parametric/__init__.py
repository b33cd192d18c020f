"""Posteriors of laplace-torch's interface in our structures, and their files."""

# These put themselves in front of methods of laplace-torch, see ``adopted``.
from curvature.laplace.parametric import definite, functional, outputs, subnetwork

__all__ = ["definite", "functional", "outputs", "subnetwork"]
