"""Traces, diagonals, log-determinants and spectral densities, with their errors."""
