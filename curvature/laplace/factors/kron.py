"""Kronecker-factored curvature of all parameters, as laplace-torch adds it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from laplace.utils import Kron
from torch import Tensor

from curvature.laplace.factors.decomposed import BlockKronDecomposed, Eigenpiece
from curvature.laplace.factors.sums import OuterSums, PartSums, Sums
from curvature.laplace.factors.tensors import Tensors
from curvature.layers.block import Block, BlockPart, BlockPlace
from solvers import Diagonal, Eigen, Kronecker, LinearOperator, diagonalize


class BlockKron(Kron):
    r"""Curvature of every trainable parameter, in blocks that are Kronecker products, dense, or diagonal.

    Takes the place of :class:`laplace.utils.Kron`, whose sums, products and decomposition it answers itself. The blocks
    of the parameters, in ``parameters()`` order:

    .. math::
        \text{weight of a layer:}\; B \otimes A, \quad B = \sum_{n, s} g g^\top, \quad
        A = \frac{M}{N}\,\frac{1}{\#(n, s)} \sum_{n, s} a a^\top; \qquad \text{bias:}\; B; \qquad
        \text{others:}\; \sum_n g_n g_n^\top \text{ or its diagonal,}

    with M the examples seen and N the size of the data set. Sums and numbers of rows are kept apart, so that batches of
    any sizes, and positions that are masked in some examples, add up to what one batch of all would give.

    Args:
        tensors: The parameters.
        sums: The sums, by block.
        examples: Number of examples seen, M.
        size: Size of the data set, N.
    """

    # Kron.__init__ is left out on purpose: the list of factors that it stores is made on demand here.
    def __init__(self, tensors: Tensors, sums: Mapping[Block, Sums], examples: float, size: float) -> None:
        self.tensors, self.sums, self.examples, self.size = tensors, dict(sums), examples, size

    @property
    def pieces(self) -> list[tuple[BlockPart, tuple[LinearOperator, ...]]]:
        """Every part of a parameter that has curvature, with the factors of its block."""
        share = self.examples / self.size
        found = [p for block, sums in self.sums.items() for p in sums.factors(block, self.tensors.vectors, share)]
        return sorted(found, key=lambda piece: self.tensors.starts[piece[0].name] + piece[0].start)

    @property
    def terms(self) -> list[tuple[BlockPlace, LinearOperator]]:
        """The blocks as operators, with their places in the flat vector."""
        return [(self.tensors.place(part), _joined(factors)) for part, factors in self.pieces]

    @property
    def kfacs(self) -> list[list[Tensor]]:  # type: ignore[override]
        """Factors in the form of laplace-torch: ``[B, A]`` or ``[H]`` for each parameter; copies, diagonals as vectors.

        A parameter that lacks such a form (several pieces, groups, another order of its entries) gives at least
        three tensors, which :class:`laplace.utils.Kron` refuses to work with.
        """
        found: dict[str, list[tuple[BlockPart, tuple[LinearOperator, ...]]]] = {
            name: [] for name in self.tensors.shapes
        }
        for part, factors in self.pieces:
            found[part.name].append((part, factors))
        return [self._listed(name, pieces) for name, pieces in found.items()]

    def _listed(self, name: str, pieces: list[tuple[BlockPart, tuple[LinearOperator, ...]]]) -> list[Tensor]:
        if not pieces:
            return [torch.zeros(self.tensors.sizes[name], dtype=self.tensors.dtype)]
        matrices = [_matrix(factor).to(self.tensors.dtype) for _, factors in pieces for factor in factors]
        (part, factors), *others = pieces
        if not others and part.numel == self.tensors.sizes[name] and len(part.shape) == len(factors):
            if part.in_order:
                return matrices
            if part.permutation == (1, 0):  # a transposed matrix
                return matrices[::-1]
        return [*matrices, *(torch.empty(0) for _ in range(3 - len(matrices)))]

    def __len__(self) -> int:
        return len(self.tensors.shapes)

    def __add__(self, other: Any) -> BlockKron:
        """The curvature of both sets of data.

        Batches of one pass share its N; a further pass (a second call of ``fit`` with ``override=False``)
        adds its own.
        """
        if other is None or (type(other) is Kron and not any(factor.any() for F in other.kfacs for factor in F)):
            return self  # the zeros that a fit starts from
        if not isinstance(other, BlockKron) or other.tensors != self.tensors:
            raise ValueError(
                f"cannot add {type(other).__name__} to a BlockKron of {len(self)} parameters: both must come from a "
                "backend of curvature.laplace on one model. Factors of another backend, and those of a state_dict from "
                "before it held the sums, do not say how many examples they are of: fit them again."
            )
        sums = dict(self.sums)
        for block, more in other.sums.items():
            sums[block] = sums[block] + more if block in sums else more  # type: ignore[operator]
        examples = self.examples + other.examples
        same_pass = self.size == other.size and examples <= self.size
        return BlockKron(self.tensors, sums, examples, self.size if same_pass else self.size + other.size)

    __radd__ = __add__

    def clone(self) -> BlockKron:
        """The same curvature in an object of its own; no method changes the sums, which are shared."""
        return BlockKron(self.tensors, self.sums, self.examples, self.size)

    def __mul__(self, scalar: float | Tensor) -> BlockKron:
        sums = {block: s.scaled(scalar) for block, s in self.sums.items()}
        return BlockKron(self.tensors, sums, self.examples, self.size)

    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> BlockKronDecomposed:
        """Eigendecomposition of every factor.

        Args:
            damping: Add the square root of a later prior precision to both factors in place of the precision itself.
        """
        known: dict[int, Eigen] = {}

        def eigen(factor: LinearOperator) -> Eigen:
            if id(factor) not in known:  # weight and bias of a layer share one
                known[id(factor)] = _eigen(factor)
            return known[id(factor)]

        pieces, kept = [], self.pieces
        for part, factors in kept:
            parts = [eigen(factor) for factor in factors]
            basis = parts[0].basis if len(parts) == 1 else Kronecker(*(e.basis for e in parts))
            pieces.append(Eigenpiece(part, basis, tuple(e.values for e in parts)))
        return BlockKronDecomposed(self.tensors, pieces, damping=damping)

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """The curvature times vectors ``(..., P)``; same shape.

        Raises:
            ValueError: For another exponent than 1, which needs :meth:`decompose`.
        """
        if exponent != 1:
            raise ValueError(f"only exponent=1 is known before decompose(), got {exponent}.")
        out = torch.zeros_like(W)
        for place, op in self.terms:
            place.scatter((op @ place.gather(W).to(op.dtype)).to(W.dtype), out)
        return out

    def _bmm(self, W: Tensor) -> Tensor:
        return self.bmm(W)

    def logdet(self) -> Tensor:
        """Log-determinant, 0-d; minus infinity where the curvature is singular."""
        return self.decompose().logdet()

    def diag(self) -> Tensor:
        """Diagonal ``(P,)``."""
        out: Tensor | None = None
        for place, op in self.terms:
            diagonal = op.diagonal()
            if out is None:
                out = diagonal.new_zeros(self.tensors.size, dtype=self.tensors.dtype)
            place.scatter(diagonal.to(out.dtype), out)
        return torch.zeros(self.tensors.size, dtype=self.tensors.dtype) if out is None else out

    def to_matrix(self) -> Tensor:
        """Dense matrix ``(P, P)``, for tests and small models."""
        return self.bmm(torch.diag(torch.ones_like(self.diag())))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names."""
        return {
            "shapes": {name: list(shape) for name, shape in self.tensors.shapes.items()},
            "dtype": self.tensors.dtype,
            "examples": self.examples,
            "size": self.size,
            "blocks": [
                {"name": b.name, "parts": b.state(), "sums": s.sides if isinstance(s, OuterSums) else list(s.totals)}
                for b, s in self.sums.items()
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BlockKron:
        """Restore :meth:`state_dict`."""
        tensors = Tensors({name: tuple(shape) for name, shape in state["shapes"].items()}, state["dtype"])
        sums: dict[Block, Sums] = {
            Block.from_state(saved["name"], saved["parts"]): OuterSums(saved["sums"])
            if isinstance(saved["sums"], dict)
            else PartSums(tuple(saved["sums"]))
            for saved in state["blocks"]
        }
        return cls(tensors, sums, state["examples"], state["size"])


def _joined(factors: tuple[LinearOperator, ...]) -> LinearOperator:
    return factors[0] if len(factors) == 1 else Kronecker(*factors)


def _matrix(factor: LinearOperator) -> Tensor:
    """A factor's matrix, or the vector of its diagonal; a copy."""
    return factor.values.clone() if isinstance(factor, Diagonal) else factor.matrix.clone()  # type: ignore[attr-defined]


def _eigen(factor: LinearOperator) -> Eigen:
    """Eigendecomposition; the rounding errors below zero of a Gram matrix are cut off."""
    eigen = diagonalize(factor)
    assert isinstance(eigen, Eigen)
    return Eigen(eigen.basis, eigen.values.clamp(min=0))
