"""Optimizers that need gradients only: one file for each method."""
