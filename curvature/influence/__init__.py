"""Influence functions: what each training example did to a prediction."""

from curvature.influence.call import influence, self_influence
from curvature.influence.result import Influence

__all__ = ["Influence", "influence", "self_influence"]
