"""Linear operators: the contract, one file for each structure, damping, and what can be stored."""
