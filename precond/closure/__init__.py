"""Optimizers that evaluate the loss again, through a closure: one file for each method."""
