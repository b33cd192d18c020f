"""The contract of a linear operator.

An operator acts on one tensor of ``in_shape``; leading dimensions of its input are a batch. Where a matrix is
meant (``to_dense``, ``to_scipy``, ``submatrix``), tensors are flattened row-major.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from solvers.outcome.errors import StructureError
from solvers.precision import without_autocast

if TYPE_CHECKING:
    import scipy.sparse.linalg

Shape = tuple[int, ...]
Scalar = float | Tensor
"""A number or a 0-d tensor; tensors are never read back to the host."""

F = TypeVar("F", bound=Callable[..., Any])
#: Members that compute, beside ``@``: an operator is the same matrix inside an autocast region as outside.
_COMPUTING = (
    *("adjoint", "to_dense", "to", "compose", "submatrix", "shift", "absorb_shift", "plus", "scale", "inverse"),
    *("diagonal", "trace", "logdet", "shifted_logdet", "frobenius_norm"),
)
_answers: dict[str, Callable[..., Any]] = {}


def answers(question: str) -> Callable[[F], F]:
    """Decorator: register the class or function that :func:`answer` calls.

    Sums and shifts are operators themselves and inverses need solvers, so both are defined above the contract, whose
    methods return them: ``compositions.py`` and ``rules.py`` register them when ``solvers`` is imported.
    """

    def register(function: F) -> F:
        _answers[question] = function
        return function

    return register


def answer(question: str, *args: Any) -> Any:
    """Call the function registered for "shift", "plus", "scale", "compose", "submatrix", "inverse" or "bases"."""
    return _answers[question](*args)


class DampingLike(Protocol):
    """A damping as :meth:`LinearOperator.inverse` uses it: any :class:`~solvers.Damping`."""

    def __call__(self, op: LinearOperator, /) -> LinearOperator:
        """The damped operator."""


class SolverLike(Protocol):
    """A solver as :meth:`LinearOperator.inverse` uses it: any :class:`~solvers.Solver`."""

    def power(self, op: LinearOperator, exponent: float, previous: LinearOperator | None = None) -> LinearOperator:
        """``op ** exponent``."""


class LinearOperator(ABC):
    """A linear map from tensors of ``in_shape`` to tensors of ``out_shape``; immutable.

    A new operator defines the four abstract members and ``apply``; everything else works through them;
    override it where the structure allows something exact or cheaper. Whatever the class defines computes in the dtype
    of the operator, also inside ``torch.autocast``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _COMPUTING:
            method = cls.__dict__.get(name)
            if callable(method) and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, without_autocast(method))

    @property
    @abstractmethod
    def in_shape(self) -> Shape:
        """Shape of the tensors the operator acts on, without the batch."""

    @property
    @abstractmethod
    def out_shape(self) -> Shape:
        """Shape of the tensors it returns, without the batch."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of its numbers, of its input and of its output."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of its numbers."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Act on ``x (*batch, *in_shape)``, already checked; ``op @ x`` is the public call."""

    @abstractmethod
    def adjoint(self) -> LinearOperator:
        """The transpose: ``<y, A x> = <A^T y, x>``."""

    def apply_adjoint(self, x: Tensor) -> Tensor:
        """Let the transpose act on ``x (*batch, *out_shape)``, already checked."""
        return self.adjoint().apply(x)

    @property
    def symmetric(self) -> bool:
        """Whether the operator is known to equal its adjoint."""
        return False

    @property
    def block_size(self) -> int | None:
        """Largest useful number of vectors in one product; None where more are always better."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix: ``(prod(out_shape), prod(in_shape))``."""
        return prod(self.out_shape), prod(self.in_shape)

    # Products

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: LinearOperator) -> LinearOperator: ...
    def __matmul__(self, x: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Apply to a tensor ``(*batch, *in_shape)``, or compose with another operator."""
        if isinstance(x, LinearOperator):
            if x.out_shape != self.in_shape:
                raise ValueError(f"{self!r} @ {x!r}: the left takes {self.in_shape}, the right gives {x.out_shape}.")
            return self.compose(x)
        if not isinstance(x, Tensor):
            return NotImplemented
        start = x.ndim - len(self.in_shape)
        if start < 0 or tuple(x.shape[start:]) != self.in_shape:
            raise ValueError(
                f"{self!r} acts on tensors of shape (*batch, {', '.join(map(str, self.in_shape))}), "
                f"not {tuple(x.shape)}. Reshape the input; a batch goes first."
            )
        if x.dtype != self.dtype:
            raise TypeError(
                f"{self!r} is {self.dtype} and the tensor is {x.dtype}. Convert one of them: x.to({self.dtype})."
            )
        return self._product(x)

    @without_autocast
    def _product(self, x: Tensor) -> Tensor:
        return self.apply(x)

    def compose(self, other: LinearOperator) -> LinearOperator:
        """``self @ other`` for operators whose shapes fit; overridden where the product keeps a structure."""
        return answer("compose", self, other)

    # Views

    @without_autocast
    def to_dense(self) -> Tensor:
        """The matrix ``(prod(out_shape), prod(in_shape))``, by one product with the identity."""
        rows, columns = self.shape
        identity = torch.eye(columns, dtype=self.dtype, device=self.device)
        return self.apply(identity.reshape(columns, *self.in_shape)).reshape(columns, rows).mT

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same map on numpy arrays, for SciPy's solvers; products run where the operator lives."""
        import scipy.sparse.linalg  # heavy, and rarely needed

        def on_columns(op: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
            def product(columns: np.ndarray) -> np.ndarray:
                x = torch.as_tensor(np.array(columns.T), dtype=op.dtype, device=op.device)
                y = op @ x.reshape(*x.shape[:-1], *op.in_shape)
                return y.reshape(*x.shape[:-1], op.shape[0]).detach().cpu().numpy().T

            return product

        forward, backward = on_columns(self), on_columns(self.adjoint())
        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=lambda x: forward(np.ravel(x)),
            rmatvec=lambda x: backward(np.ravel(x)),
            matmat=forward,
            rmatmat=backward,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def submatrix(self, rows: Tensor, columns: Tensor | None = None) -> LinearOperator:
        """Rows and columns (default: the same) of the matrix, by flat index.

        Args:
            rows: Flat indices into ``out_shape``, ``(r,)``.
            columns: Flat indices into ``in_shape``, ``(c,)``; ``rows`` if left out.

        Returns:
            Operator from ``(c,)`` to ``(r,)``.
        """
        return answer("submatrix", self, rows, rows if columns is None else columns)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same operator with its tensors in another dtype or on another device."""

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            if isinstance(value, LinearOperator):
                return value.to(dtype, device)
            return tuple(map(convert, value)) if isinstance(value, tuple) else value

        return self.from_fields(**{name: convert(value) for name, value in self.fields().items()})

    def fields(self) -> dict[str, Any]:
        """The parts of the operator by name: tensors, numbers, operators and tuples of them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_fields(cls, **fields: Any) -> Self:
        """Build the operator from the result of :meth:`fields`."""
        return cls(**fields)

    # Arithmetic

    def shift(self, lam: Scalar) -> LinearOperator:
        """``A + lam I``, kept symbolic unless the structure absorbs it."""
        return answer("shift", self, lam)

    def absorb_shift(self, lam: Scalar) -> LinearOperator:
        """``A + lam I`` in the structure of A where that can hold it; formed where :meth:`shift` stays symbolic."""
        return self.shift(lam)

    def plus(self, other: LinearOperator) -> LinearOperator:
        """``self + other`` for operators of equal shapes; overridden where the sum keeps a structure."""
        return answer("plus", self, other)

    def scale(self, scalar: Scalar) -> LinearOperator:
        """``scalar * self``; overridden where a factor absorbs the number."""
        return answer("scale", self, scalar)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Sum of two operators of equal shapes."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if (self.in_shape, self.out_shape) != (other.in_shape, other.out_shape):
            raise ValueError(
                f"{self!r} + {other!r}: {self.in_shape} -> {self.out_shape} cannot be added to "
                f"{other.in_shape} -> {other.out_shape}."
            )
        return self.plus(other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """Difference of two operators of equal shapes."""
        return self + (-other)

    def __mul__(self, scalar: Scalar) -> LinearOperator:
        """Multiple of the operator."""
        if not isinstance(scalar, (int, float, Tensor)) or (isinstance(scalar, Tensor) and scalar.ndim > 0):
            raise TypeError(f"{self!r} * x takes a number or a 0-d tensor; for a product write op @ x.")
        return self.scale(scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> LinearOperator:
        """Multiple of the operator by ``1 / scalar``."""
        return self * (1 / scalar)

    def __neg__(self) -> LinearOperator:
        """``-1`` times the operator."""
        return self * -1.0

    def inverse(
        self, damping: Scalar | DampingLike = 0.0, solver: SolverLike | None = None, *, dense: bool = False
    ) -> LinearOperator:
        """Inverse of the damped operator.

        Args:
            damping: A :class:`~solvers.Damping`; a number ``lam`` means ``Tikhonov(lam)``, that is ``A + lam I``.
            solver: A :class:`~solvers.Solver`; by default the exact one that fits the structure.
            dense: True to form the dense matrix of a part that has no structural inverse, instead of refusing.

        Returns:
            Operator with ``op.inverse(damping) @ (damping(op) @ x) = x``.

        Raises:
            StructureError: If the solver does not serve the structure.
            SingularMatrixError: If the damped operator has no inverse.
        """
        return answer("inverse", self, damping, solver, dense)

    # Exact scalars, where the structure gives them

    def diagonal(self) -> Tensor:
        """Diagonal of the matrix, shaped ``in_shape``; refused unless the structure gives it exactly."""
        raise self.no_exact("diagonal", "solvers.diagonal(op) for an estimate with its error")

    def trace(self) -> Tensor:
        """Sum of the diagonal, 0-d; refused unless the structure gives it exactly."""
        try:
            return self.diagonal().sum()
        except StructureError:
            raise self.no_exact("trace", "solvers.trace(op) for an estimate with its error") from None

    def logdet(self) -> Tensor:
        """Logarithm of the determinant, 0-d; refused unless the structure gives it exactly."""
        raise self.no_exact("logdet", "solvers.logdet(op) for an estimate with its error")

    def shifted_logdet(self, lam: Scalar) -> Tensor:
        """:meth:`logdet` of ``A + lam I``; refused unless the structure absorbs the shift or overrides this."""
        absorbed = self.absorb_shift(lam)
        if type(absorbed) is type(self):
            return absorbed.logdet()
        raise absorbed.no_exact("logdet", "solvers.logdet(op) for an estimate with its error")

    def frobenius_norm(self) -> Tensor:
        """Root of the sum of the squared entries, 0-d; refused unless the structure gives it exactly."""
        raise self.no_exact("frobenius_norm", "solvers.frobenius_norm(op) for an estimate with its error")

    def no_exact(self, quantity: str, way_out: str) -> StructureError:
        """The refusal of an exact scalar."""
        return StructureError(
            f"{self!r} has no exact {quantity}. Use {way_out}, or op.to_dense() if the matrix is small."
        )

    def __repr__(self) -> str:
        """Class and size."""
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]})"
