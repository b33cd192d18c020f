"""The structures of blocks, by name."""

from __future__ import annotations

from curvature.structures.diagonal import DiagonalFisher
from curvature.structures.ekfac import EigenbasisFisher
from curvature.structures.estimator import Curvature
from curvature.structures.foof import InputKronecker
from curvature.structures.kfac import KroneckerFisher
from curvature.structures.layer import LayerFisher
from curvature.structures.tnt import TensorNormal
from curvature.structures.unit import UnitFisher

#: Name -> its estimator, on data sets and in training. A new structure is one estimator file and one line here.
BLOCKS: dict[str, type[Curvature]] = {
    "layer": LayerFisher,
    "unit": UnitFisher,
    "diagonal": DiagonalFisher,
    "kfac": KroneckerFisher,
    "ekfac": EigenbasisFisher,
    "tnt": TensorNormal,
    "foof": InputKronecker,
}
