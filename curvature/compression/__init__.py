"""Quantise and prune a trained model with the curvature of its loss."""

from curvature.compression.allocation import Allocation, allocate, sensitivity
from curvature.compression.grid import Codes, Grid
from curvature.compression.pruning import prune
from curvature.compression.quantization import quantize
from curvature.compression.result import CompressedLayer, Compression

__all__ = [
    "Allocation",
    "Codes",
    "CompressedLayer",
    "Compression",
    "Grid",
    "allocate",
    "prune",
    "quantize",
    "sensitivity",
]
