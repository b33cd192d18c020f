"""Solvers that take products only: one file each."""
