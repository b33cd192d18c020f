"""What is kept of a curvature matrix: one file for each structure, named as the string that chooses it."""
