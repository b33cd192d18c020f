"""Solvers that factorise: one file each."""
