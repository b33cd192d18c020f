"""Residuals of equations at points: their derivatives, their rows of layers, and their curvature."""
