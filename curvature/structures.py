"""The names of the structures of blocks."""

from __future__ import annotations

from curvature.dense import LayerFisher
from curvature.diagonal import DiagonalFisher
from curvature.eigenbasis import EigenbasisFisher
from curvature.estimator import Curvature
from curvature.foof import InputKronecker
from curvature.kronecker import KroneckerFisher
from curvature.tnt import TensorNormal
from curvature.unitwise import UnitFisher

#: Name -> what estimates it, on data sets and in training. A new structure is one estimator file and one line here.
BLOCKS: dict[str, type[Curvature]] = {
    "layer": LayerFisher,
    "unit": UnitFisher,
    "diagonal": DiagonalFisher,
    "kfac": KroneckerFisher,
    "ekfac": EigenbasisFisher,
    "tnt": TensorNormal,
    "foof": InputKronecker,
}
