"""The canonical samples of a block, from which structures are estimated.

Axes: ``*`` stack (groups of a grouped layer), ``k`` backward signals, ``n`` examples, ``s`` positions within an
example (sequence, space, several calls), ``o`` output, ``i`` input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curvature.layers.input_moments import InputMoments
from solvers.pages import product
from solvers.triangles import gram

# Elements of a per-sample gradient formed at once (16 Mi elements: 64 MiB in float32); on a CPU what its caches hold.
CHUNK_ELEMENTS = 1 << 24
CACHED_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class OneHot:
    """Rows that are unit vectors, by index: the input of an embedding, never formed.

    Attributes:
        index: ``(n, s)`` positions of the ones.
        size: Length of the vectors.
        keep: ``(n, s)`` 0/1 weights of the rows (0 for ``padding_idx``), or ``None``.
    """

    index: Tensor
    size: int
    keep: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows themselves, ``(n, s, size)``."""
        rows = torch.zeros(*self.index.shape, self.size, dtype=dtype, device=self.index.device)
        one = torch.ones_like(self.index, dtype=dtype) if self.keep is None else self.keep.to(dtype)
        return rows.scatter_(-1, self.index.unsqueeze(-1), one.unsqueeze(-1))

    def merged(self) -> OneHot:
        """All examples as positions of one."""
        return OneHot(self.index.reshape(1, -1), self.size, None if self.keep is None else self.keep.reshape(1, -1))


@dataclass(frozen=True)
class Outer:
    r"""One use of a layer :math:`y_{ns} = W a_{ns}`; its gradient is :math:`\sum_s g_{ns} a_{ns}^\top`.

    Attributes:
        a: Inputs ``(*, n, s, i)``.
        g: Output gradients ``(*, k, n, s, o)``.
        valid: ``(n, s)`` 0/1 weights of the positions, or ``None`` where all count. Where the rows serve all examples
            (n = 1 in a and g), one row of weights for each example, for which they count.
        flipped: The block tensor is the transpose ``a g^T``, as for an embedding that shares its matrix with a head.
        ones: The block holds a bias: a one is appended to every input, in mind only until :attr:`rows` is asked for.
        serves_all: Whether each row counts for all examples where ``valid`` does not tell: those of a table of
            positions, which is looked up once per batch.
        source: What tells the uses of a pass apart.
        dense: The layer is a dense one, whose positions are neither patches that overlap nor steps in time.
    """

    a: Tensor | OneHot
    g: Tensor
    valid: Tensor | None = None
    flipped: bool = False
    ones: bool = False
    serves_all: bool = False
    source: int = 0
    dense: bool = False

    @property
    def examples(self) -> int:
        """Number of examples n (1 where the use has no batch axis)."""
        return self.g.shape[-3]

    @property
    def signals(self) -> int:
        """Number of signals k."""
        return self.g.shape[-4]

    @property
    def is_table(self) -> bool:
        """Whether the rows are those of no example, but serve all."""
        return self.serves_all or (self.valid is not None and len(self.valid) != self.examples)

    def only(self, chosen: slice | Tensor) -> Outer:
        """The same use under some of the signals."""
        return replace(self, g=self.g[..., chosen, :, :, :])

    @property
    def positions(self) -> int:
        """Number of positions s."""
        return self.g.shape[-2]

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block tensor."""
        d_in = self.a.size if isinstance(self.a, OneHot) else self.a.shape[-1] + self.ones
        d_out = self.g.shape[-1]
        return (*self.g.shape[:-4], *((d_in, d_out) if self.flipped else (d_out, d_in)))

    @property
    def rows(self) -> Tensor:
        """Inputs ``(*, n, s, i)`` with the appended one."""
        assert isinstance(self.a, Tensor)
        return _with_one(self.a) if self.ones else self.a

    @property
    def inputs(self) -> Tensor | OneHot:
        """Inputs without the appended one, as :attr:`valid` counts them: rows that serve all examples once for each."""
        if self.valid is None or len(self.valid) == self.examples:
            return self.a
        n = len(self.valid)
        if isinstance(self.a, Tensor):
            return self.a.expand(*self.a.shape[:-3], n, *self.a.shape[-2:])
        keep = None if self.a.keep is None else self.a.keep.expand(n, -1)
        return OneHot(self.a.index.expand(n, -1), self.a.size, keep)

    def transposed(self) -> Outer:
        """The same use for a block that is the transpose of the layer's matrix."""
        return replace(self, flipped=not self.flipped)

    def merged(self) -> Outer:
        """All examples as positions of one."""
        if self.examples == 1:
            return self
        a = self.a.merged() if isinstance(self.a, OneHot) else self.a.flatten(-3, -2).unsqueeze(-3)
        valid = None if self.valid is None else self.valid.reshape(1, -1)
        return replace(self, a=a, g=self.g.flatten(-3, -2).unsqueeze(-3), valid=valid)

    def abs(self) -> Outer:
        """The sizes of all terms."""
        return replace(self, a=self.a if isinstance(self.a, OneHot) else self.a.abs(), g=self.g.abs())

    def total(self) -> Tensor:
        """The gradient of one signal, all examples together, in block shape."""
        return self.merged().gradient(0, 1)[0, 0]

    def gradient(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients of examples ``start:stop``, ``(k, n, *block_shape)``."""
        g = self.g[..., start:stop, :, :]
        if isinstance(self.a, OneHot):
            index = self.a.index[start:stop].expand(g.shape[:-1])
            if self.a.keep is not None:
                g = g * self.a.keep[start:stop].unsqueeze(-1)
            out = g.new_zeros(*g.shape[:-2], self.a.size, g.shape[-1])
            out.scatter_add_(-2, index.unsqueeze(-1).expand_as(g), g)
            return out if self.flipped else out.mT
        few = self.positions <= self.g.shape[-1]  # the appended one goes where it makes the smaller copy
        a = self.a[..., start:stop, :, :].unsqueeze(-4)
        a = _with_one(a) if self.ones and few else a
        grad = product(a.mT, g) if self.flipped else product(g.mT, a)
        if self.ones and not few:
            bias = g.sum(-2).unsqueeze(-2 if self.flipped else -1)
            grad = torch.cat([grad, bias], dim=-2 if self.flipped else -1)
        return grad.movedim((-4, -3), (0, 1))


@dataclass(frozen=True)
class PerSample:
    """Gradients of layers of another shape (scale and shift, bare parameters).

    Attributes:
        gradients: ``(k, n, *block_shape)``.
        source: What tells the uses of a pass apart.
    """

    gradients: Tensor
    source: int = 0

    @property
    def examples(self) -> int:
        """Number of examples n (1 where the use has no batch axis)."""
        return self.gradients.shape[1]

    @property
    def signals(self) -> int:
        """Number of signals k."""
        return self.gradients.shape[0]

    def only(self, chosen: slice | Tensor) -> PerSample:
        """The same use under some of the signals."""
        return replace(self, gradients=self.gradients[chosen])

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block tensor."""
        return tuple(self.gradients.shape[2:])

    def transposed(self) -> PerSample:
        """The same gradients for a block that is the transpose."""
        return replace(self, gradients=self.gradients.mT)

    def merged(self) -> PerSample:
        """All examples as one."""
        return replace(self, gradients=self.gradients.sum(1, keepdim=True))

    def abs(self) -> PerSample:
        """The sizes of all terms."""
        return replace(self, gradients=self.gradients.abs())

    def total(self) -> Tensor:
        """The gradient of one signal, all examples together, in block shape."""
        return self.merged().gradient(0, 1)[0, 0]

    def gradient(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients of examples ``start:stop``, ``(k, n, *block_shape)``."""
        return self.gradients[:, start:stop]


@dataclass(frozen=True)
class Samples:
    """All uses of one block in one pass over a batch.

    Attributes:
        uses: One entry per use; their per-sample gradients add up.
        weight: Divisor that these samples bring to a mean loss (0-d); the estimators divide by its sum.
        first: Whether this is the first backward pass of its batch; inputs and weights count once per batch.
        merge: The examples count as one in per-sample gradients: what each signal reached belongs to a single example,
            wherever it was found, or has no cross terms in expectation.
        factor: What products of two gradients are multiplied by, 0-d; ``None`` for one.
        linear: What makes a gradient that of the loss of the step; ``None`` where its terms have weights of their own.
        examples: Number of examples of the batch.
        aggregated: The loss has one term for each example: whatever positions there are, the model aggregates them.
            False where the estimate does not choose by it.
        moments: Of inputs that other blocks read too in this pass.
    """

    uses: tuple[Outer | PerSample, ...]
    weight: Tensor | float
    first: bool = True
    merge: bool = False
    factor: Tensor | None = None
    linear: Tensor | float | None = 1.0
    examples: int = 1
    aggregated: bool = False
    moments: InputMoments = field(default_factory=InputMoments)

    def times(self, use: Outer) -> int:
        """How often the inputs of a use count."""
        return self.examples if use.serves_all else 1

    def scaled(self, total: Tensor) -> Tensor:
        """A sum of products of two gradients in its true scale; may work in place."""
        return total if self.factor is None else total.mul_(self.factor.to(total))

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block tensor."""
        return self.uses[0].block_shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the gradients."""
        return self._first_gradients.dtype

    @property
    def device(self) -> torch.device:
        """Device of the gradients."""
        return self._first_gradients.device

    @property
    def _first_gradients(self) -> Tensor:
        use = self.uses[0]
        return use.g if isinstance(use, Outer) else use.gradients

    @property
    def _at_a_time(self) -> int:
        """Number of gradients of the block in one chunk."""
        elements = CACHED_ELEMENTS if self.device.type == "cpu" else CHUNK_ELEMENTS
        return max(1, elements // max(1, math.prod(self.block_shape)))

    def chunks(self) -> Iterator[Tensor]:
        """As :meth:`gradients`, in chunks that are no larger for many signals: of some of them at a time."""
        signals, step = self.uses[0].signals, self._at_a_time
        for start in range(0, signals, step):
            part = slice(start, start + step)
            few = self if signals <= step else replace(self, uses=tuple(use.only(part) for use in self.uses))
            yield from few.gradients()

    def gradients(self) -> Iterator[Tensor]:
        """Per-sample gradients, a chunk ``(k * n, *block_shape)`` at a time, of all signals."""
        uses = self.aligned()
        n = uses[0].examples
        step = max(1, self._at_a_time // uses[0].signals)
        for start in range(0, n, step):
            stop = min(n, start + step)
            total = uses[0].gradient(start, stop)
            for use in uses[1:]:
                total = total + use.gradient(start, stop)
            yield total.flatten(0, 1)

    def summed(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of ``of(chunk)`` over :meth:`chunks`."""
        chunks = self.chunks()
        total = of(next(chunks))
        for chunk in chunks:
            total.add_(of(chunk))
        return total

    def square_sum(self) -> Tensor:
        """Sum over signals and examples of the squared per-sample gradients, in block shape."""
        uses = self.aligned()
        if len(uses) == 1 and isinstance(use := uses[0], Outer):
            # One position: (g a^T)^2 = g^2 (a^2)^T, and no per-sample gradient is formed.
            if isinstance(use.a, Tensor) and use.positions == 1:
                left = use.g.squeeze(-2).square().sum(-3)
                right = use.rows.squeeze(-2).square()
                return right.mT @ left if use.flipped else left.mT @ right
            if isinstance(use.a, OneHot):
                return _one_hot_square_sum(use.a, use.g, use.flipped)
        return self.summed(lambda chunk: chunk.square().sum(0))

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Sums of the squared entries of each per-sample gradient times weights of block shape, ``(k * n,)``."""
        uses = self.aligned()
        use = uses[0]
        plain = len(uses) == 1 and isinstance(use, Outer) and isinstance(use.a, Tensor) and use.g.dim() == 4
        if plain and isinstance(use, Outer) and use.positions == 1:
            left = use.g.squeeze(-2).square() @ (weights.mT if use.flipped else weights)  # (k, n, i)
            return (left * use.rows.squeeze(-2).square()).sum(-1).flatten()
        k = use.signals
        parts = [(chunk.square() * weights).flatten(1).sum(1).reshape(k, -1) for chunk in self.gradients()]
        return torch.cat(parts, dim=1).flatten()

    def aligned(self) -> tuple[Outer | PerSample, ...]:
        """The uses with a common axis of examples, along which their gradients add up."""
        if self.merge or len({use.examples for use in self.uses}) > 1:
            return tuple(use.merged() for use in self.uses)
        return self.uses


def _with_one(a: Tensor) -> Tensor:
    """Rows with a one appended to each."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def _one_hot_square_sum(a: OneHot, g: Tensor, flipped: bool) -> Tensor:
    """Squares of an embedding's per-sample gradients: rows with the same id within an example add up first."""
    k, n, s, d = g.shape
    rows = (g if a.keep is None else g * a.keep.unsqueeze(-1)).reshape(k * n * s, d)
    example = torch.arange(k * n, device=g.device).repeat_interleave(s)
    key = example * a.size + a.index.expand(k, n, s).reshape(-1)
    unique, inverse = torch.unique(key, return_inverse=True)
    merged = g.new_zeros(len(unique), d).index_add_(0, inverse, rows)
    total = g.new_zeros(a.size, d).index_add_(0, unique % a.size, merged.square_())
    return total if flipped else total.mT.contiguous()


def second_moment(rows: Tensor, max_dim: int) -> Tensor:
    """Gram matrix of ``rows (*, m, d)``, or its diagonal where d exceeds ``max_dim``."""
    return rows.square().sum(-2) if rows.shape[-1] > max_dim else gram(rows)
