"""Posteriors without factors: samples, predictions and evidence by products alone."""
