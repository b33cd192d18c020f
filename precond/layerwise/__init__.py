"""Optimizers that look at the model's layers: one file for each method."""
