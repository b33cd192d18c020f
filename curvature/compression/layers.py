"""The matrices of a model that can be compressed, each with its curvature."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.coverage import coverage
from curvature.estimation.dataset import estimate
from curvature.layers.block import Block, BlockPlace
from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.losses.signals import FisherKind
from curvature.matrices.request import WHOLE, Structure
from curvature.model.arguments import Check, a, count, one_of, optional, real
from curvature.model.data import Data, Output
from curvature.model.parameters import Parameters
from curvature.structures.by_name import BLOCKS, curvature_of, kind_of
from curvature.structures.estimator import Curvature
from curvature.structures.kfac import KroneckerFisher
from solvers import BlockDiagonal, Dense, Diagonal, Eigen, Kronecker, LinearOperator
from solvers.outcome.arguments import flag, instance

_EMBEDDINGS = ("embedding", "embedding_bag")


def check_layers(name: str, value: Any) -> Any:
    """Names or globs of parameters or modules; None for all."""
    entries = [] if value is None or isinstance(value, str) else value
    if not isinstance(entries, Iterable) or isinstance(entries, (Tensor, nn.Module)):
        raise TypeError(f"{name} holds names of parameters or modules, not {value!r}.")
    if isinstance(entries, Sequence):
        if value is not None and not isinstance(value, str) and not entries:
            raise ValueError(f"{name} is empty; leave it out to take every layer.")
        for entry in entries:
            instance(f"each of {name}", entry, str, "the name of a parameter or module")
    return value


#: Checks of what quantising and pruning take beside the names that all functions share.
CHECKS: dict[str, Check] = {
    "loss_fn": check_loss,
    "structure": a((str, Curvature, Mapping, BlockDiagonal), "the name of a structure, a Curvature or an operator"),
    "kind": optional(one_of(FisherKind)),
    "samples": count(),
    "bias": one_of(("joint", "separate")),
    "sequential": flag,
    "damping": real(low=0.0),
    "layers": check_layers,
    "embeddings": flag,
    "measure": flag,
}


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model, part of a block of its curvature.

    Attributes:
        name: Name of the parameter; with the segment or the group where it is not all of it.
        block: The block: how parameters become the matrix.
        index: Which matrix of a block that is a stack (a grouped convolution); ``None`` otherwise.
        operator: Curvature of the matrix, on ``(d_out, d_in + free)``.
        free: Number of further columns (a bias in the same block) that compression leaves off the grid.
    """

    name: str
    block: Block
    index: int | None
    operator: LinearOperator
    free: int

    @property
    def parameter(self) -> str:
        """Name of the parameter that it is all or a part of."""
        return self.block.parts[0].name

    def choice(self, given: Mapping[str, Any], default: Any) -> Any:
        """What was chosen for this matrix, by its own name or by that of its parameter."""
        return given.get(self.name, given.get(self.parameter, default))

    def read(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``(d_out, d_in + free)``, float32 at least."""
        value = self.block.read({name: parameters[name].detach() for name in self.block.names})
        value = value if self.index is None else value[self.index]
        return value.to(torch.promote_types(value.dtype, torch.float32)).clone()

    def write(self, value: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Write the matrix into the parameters, in place."""
        tensors = {name: parameters[name].detach() for name in self.block.names}
        whole = self.block.read(tensors).clone()
        if self.index is None:
            whole = value.to(whole.dtype)
        else:
            whole[self.index] = value.to(whole.dtype)
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous in memory; call .contiguous() on it first.")
        self.block.write(whole, tensors)


@dataclass(frozen=True)
class Selection:
    """Which parameters of a model are compressed.

    Attributes:
        names: Names of their blocks, as an estimate with the same ``bias=`` makes them.
        parameters: Names of the parameters of these blocks.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]


def select(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    layers: str | Iterable[str] | None,
    embeddings: bool,
    joint: bool,
    **read: Any,
) -> Selection:
    """The matrices of layers, found by what the model does with its parameters.

    Args:
        model: The model.
        loss_fn: Its loss.
        data: Data, of which the first batch is looked at.
        layers: Names or globs of parameters or modules; ``None`` takes every matrix of a layer.
        embeddings: Also take embeddings, and heads that are tied to one.
        joint: Whether a layer's bias belongs to its block.
        read: How the data are read, see :func:`curvature.coverage`.

    Raises:
        ValueError: If a name fits no matrix of a layer, or there is none.
    """
    wanted = [] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for entry in wanted:
        if not any(_fits(entry, name) for name in names):
            raise ValueError(f"layers= names {entry!r}, which fits no parameter. There are: {', '.join(names)}.")
    table = coverage(model, loss_fn, data, curvature=KroneckerFisher(bias="joint" if joint else "separate"), **read)
    found = {}
    for row in table:
        used = set(row.why.split(", "))
        if not row.ruled or row.structure != "kronecker" or len(row.shape) < 2:
            continue
        if used & set(_EMBEDDINGS) and not embeddings:
            continue
        found[row.parameter] = row.block.split(", ")
    if layers is not None:
        for entry in wanted:
            if not any(_fits(entry, name) for name in found):
                raise ValueError(
                    f"layers= names {entry!r}, which fits no matrix of a layer. There are: {', '.join(found) or 'none'}"
                    f"{'' if embeddings else ' (and embeddings, with embeddings=True)'}."
                )
        found = {name: blocks for name, blocks in found.items() if any(_fits(entry, name) for entry in wanted)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with a weight matrix that a rule covers, so there is nothing to "
            "compress. curvature.coverage(model, loss_fn, data) shows what was found."
        )
    chosen = tuple(dict.fromkeys(block for blocks in found.values() for block in blocks))
    parameters = dict.fromkeys(row.parameter for row in table if set(row.block.split(", ")) & set(chosen))
    return Selection(chosen, tuple(parameters))


def _fits(entry: str, name: str) -> bool:
    return entry == name or name.startswith(f"{entry}.") or fnmatch.fnmatchcase(name, entry)


@dataclass(frozen=True, eq=False)
class CalibrationSource:
    """Where the curvature of the layers comes from: the arguments of a call."""

    loss_fn: Any
    data: Data
    structure: Structure | BlockDiagonal
    kind: Any
    samples: int
    bias: str
    output: Output | None
    class_dim: ClassDim
    batch_dim: BatchDim
    generator: torch.Generator | None
    progress: bool | None

    @property
    def read(self) -> dict[str, Any]:
        """How the data are read."""
        return {"output": self.output, "class_dim": self.class_dim, "batch_dim": self.batch_dim}

    def curvature(self) -> Curvature:
        """What is estimated.

        Raises:
            ValueError: If the structure has no block for each layer.
        """
        assert not isinstance(self.structure, BlockDiagonal)
        if isinstance(self.structure, str) and self.structure in WHOLE:
            raise ValueError(
                f"structure={self.structure!r} has no block for each layer. Use 'kfac', 'ekfac', 'foof' or 'diagonal'."
            )
        kind = kind_of(self.structure, self.kind, "mc")
        if not isinstance(self.structure, str):
            return curvature_of(self.structure, kind)
        options: dict[str, Any] = {}
        if self.structure in BLOCKS and issubclass(BLOCKS[self.structure], KroneckerFisher):
            options["bias"] = self.bias
        return curvature_of(self.structure, kind, self.samples, **options)

    @property
    def joint(self) -> bool:
        """Whether a layer's bias belongs to its block."""
        if isinstance(self.structure, BlockDiagonal):
            return any(len(place.block.parts) > 1 for place in _places(self.structure))
        return self.curvature().joint

    def of(self, model: nn.Module, params: Iterable[str]) -> BlockDiagonal:
        """The curvature of some parameters, or the operator that was given."""
        if isinstance(self.structure, BlockDiagonal):
            size = Parameters(model).size
            if self.structure.size != size:
                raise ValueError(
                    f"the operator acts on {self.structure.size} numbers, but the model has {size} trainable ones."
                )
            return self.structure
        return estimate(
            model,
            self.loss_fn,
            self.data,
            self.curvature(),
            params=list(params),
            **self.read,
            generator=self.generator,
            progress=self.progress,
            fisher=None,  # the Gauss-Newton matrix where the loss is no likelihood
        )


def matrices(op: BlockDiagonal, names: Iterable[str] | None = None) -> Iterator[Matrix]:
    """The matrices of the blocks of these names, or of all that are weight matrices, in the operator's order."""
    wanted = None if names is None else set(names)
    for block, place in zip(op.blocks, _places(op), strict=True):
        shape = place.block.shape
        if len(shape) not in (2, 3) or (wanted is not None and place.block.name not in wanted):
            continue
        factored = isinstance(block, Kronecker) or (isinstance(block, Eigen) and isinstance(block.basis, Kronecker))
        if wanted is None and not factored and not isinstance(block, Diagonal):
            continue  # scale and shift, and the like
        first = place.block.parts[0]
        free = shape[-1] - first.shape[-1]
        whole = first.numel == place.sizes[0]
        name = first.name if whole else f"{first.name}[{first.start}:{first.start + first.numel}]"
        if len(shape) == 2:
            yield Matrix(name, place.block, None, block, free)
            continue
        for index in range(shape[0]):
            yield Matrix(f"{name}[group {index}]", place.block, index, _of_stack(block, index), free)


def parameters_of(names: Iterable[str]) -> list[str]:
    """The parameters that matrices of these names are parts of."""
    return list(dict.fromkeys(name.partition("[")[0] for name in names))


def _of_stack(op: LinearOperator, index: int) -> LinearOperator:
    """One operator of a stack."""
    match op:
        case Kronecker():
            return op.map(lambda factor: _of_stack(factor, index))
        case Eigen(basis=Kronecker() as basis, values=values):
            return Eigen(basis.map(lambda factor: _of_stack(factor, index)), values[index])
        case Dense(matrix=matrix):
            return Dense(matrix[index], is_gram=op.is_gram)
        case Diagonal(values=values):
            return Diagonal(values[index])
    return op


def _places(op: BlockDiagonal) -> list[BlockPlace]:
    places = [place for place in op.places if isinstance(place, BlockPlace)]
    if len(places) != len(op.places):
        raise ValueError(
            "the operator's blocks do not say which parameters they hold. Give one of curvature.fisher or "
            "curvature.ggn with structure='kfac', 'ekfac', 'foof' or 'diagonal'."
        )
    return places
