"""Structures of curvature matrices: one file for each, named as the string that chooses it."""
