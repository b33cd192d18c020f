"""Optimizers in several processes."""
