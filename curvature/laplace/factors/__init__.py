"""Kronecker factors as laplace-torch keeps them: sums, decompositions, files."""
