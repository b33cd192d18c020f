"""Influence functions: the effect of each training example on a prediction."""

from curvature.influences.call import influence, self_influence
from curvature.influences.result import Influence

__all__ = ["Influence", "influence", "self_influence"]
