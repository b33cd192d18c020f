"""Curvature along the training of a model."""
