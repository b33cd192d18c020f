"""Curvature for laplace-torch: one class for each matrix."""
