"""A site: one use of parameters in a forward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature.layers.axes.calls import Handle
from curvature.layers.block import Block, BlockPart
from curvature.layers.samples import OneHot, Outer, PerSample
from curvature.model.moment import writes


@dataclass(frozen=True)
class Ref:
    """A parameter as an operation received it: all of it, or a contiguous segment, possibly transposed.

    Attributes:
        name: Name of the parameter.
        start: First element of the segment in the flattened parameter.
        shape: Shape of the segment before transposition.
        transposed: The operation saw the (2-D) transpose.
        whole: The segment is the whole parameter.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    transposed: bool = False
    whole: bool = True

    @property
    def numel(self) -> int:
        """Elements in the segment."""
        return math.prod(self.shape)

    @property
    def key(self) -> tuple[str, int, int]:
        """Identity of the segment, whatever its orientation."""
        return (self.name, self.start, self.numel)

    @property
    def label(self) -> str:
        """Name for block names and messages."""
        return self.name if self.whole else f"{self.name}[{self.start}:{self.start + self.numel}]"

    def part(self, shape: tuple[int, ...], split: tuple[int, ...] = (), permutation: tuple[int, ...] = ()) -> BlockPart:
        """The segment as a :class:`BlockPart` of block shape ``shape``."""
        split = split or self.shape
        return BlockPart(self.name, self.start, split, permutation or tuple(range(len(split))), shape)


@dataclass(frozen=True)
class RowLayout:
    """How the leading dimensions of an activation hold examples.

    Attributes:
        batch: Number of examples of the pass, or ``None`` where unknown.
        batched: Whether the activation depends on the example at all (a table of positions does not).
        time_major: Positions come before examples, as inside ``nn.MultiheadAttention``.
    """

    batch: int | None
    batched: bool = True
    time_major: bool = False

    def rows(self, x: Tensor, lead: int) -> Tensor:
        """``(*free, *leading dimensions, d)`` to ``(*free, n, s, d)``; ``lead`` counts the leading dimensions."""
        extra = x.dim() - lead - 1
        free, shape, d = x.shape[:extra], x.shape[extra:-1], x.shape[-1]
        total = math.prod(shape)
        batch = shape[0] if self.batch is None and shape else self.batch
        if not self.batched or not batch or total % batch:
            return x.reshape(*free, 1, total, d)
        if self.time_major:
            return x.reshape(*free, total // batch, batch, d).transpose(-3, -2)
        if shape and shape[0] % batch:
            return x.reshape(*free, 1, total, d)
        return x.reshape(*free, batch, total // batch, d)


@dataclass(frozen=True)
class ViewOfBase:
    """Where the entries of a view are in its base, which has memory of its own.

    Attributes:
        shape: Shape of the view.
        base_shape: Shape of the base.
        strides: Strides of the view and of the base; ``None`` where the view keeps the order of all entries.
        start: Place of the first entry in the base's memory.
    """

    shape: torch.Size
    base_shape: torch.Size
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None
    start: int

    @classmethod
    def of(cls, view: Tensor, base: Tensor) -> ViewOfBase | None:
        """The places of a view's entries; ``None`` where they cannot be told apart, or the base is no result."""
        if base.grad_fn is None or base.dtype != view.dtype or base.is_complex():
            return None
        if not (_one_place_each(view) and _one_place_each(base)):
            return None
        plain = view.numel() == base.numel() and view.is_contiguous() and base.is_contiguous()
        start = int(view.storage_offset() - base.storage_offset())
        return cls(view.shape, base.shape, None if plain else (view.stride(), base.stride()), start)

    def read(self, gradient: Tensor, k: int) -> Tensor:
        """Gradients of the view, ``(k, *shape)``, from those of the base, ``(k, *base_shape)``."""
        if self.strides is None:
            return gradient.reshape(k, *self.shape)
        strides, base_strides = self.strides
        size = _reach(self.base_shape, base_strides)
        memory = gradient.new_empty_strided((k, *self.base_shape), (size, *base_strides))
        memory.copy_(gradient.reshape(k, *self.base_shape))
        return memory.as_strided((k, *self.shape), (size, *strides), self.start)


def _reach(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Numbers from the first entry in memory to the last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


def _one_place_each(tensor: Tensor) -> bool:
    """Whether all entries have places of their own in memory, as far as strides that nest tell."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


@dataclass
class Site(ABC):
    """One use of parameters: where they were used, on what, and where the gradient of the result is found."""

    weight: Ref | None
    bias: Ref | None
    layout: RowLayout
    operation: str
    edge: GradientEdge = field(init=False)
    output_shape: torch.Size = field(init=False)
    view: ViewOfBase | None = field(default=None, init=False)
    place: Handle | None = field(default=None, init=False)  # of the output among the activations of the pass
    packed: bool = field(default=False, init=False)  # used where saved tensors are packed, as in a checkpoint
    _saved: list[tuple[Tensor, int]] = field(default_factory=list, init=False)

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The tracked parameters of this use."""
        return tuple(ref for ref in (self.weight, self.bias) if ref is not None)

    def watch(self, output: Tensor, inputs: Iterable[Tensor] = ()) -> None:
        """Remember where the gradient of ``output`` will be found.

        Many functions return a view of what they computed (a Linear with bias on a 3-D input, an einsum); after an
        in-place activation only the edge of its base is still in the graph. A view of one of the ``inputs``, whose
        gradient has other contributions, is found at its own edge, and so is one whose entries share memory.
        """
        self.packed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        base = output._base
        if base is not None and not any(base is t or base is t._base for t in inputs):
            self.view = ViewOfBase.of(output, base)
        self.edge = get_gradient_edge(output if base is None or self.view is None else base)
        self.output_shape = output.shape

    def arrived(self, gradient: Tensor, k: int = 1) -> Tensor:
        """Gradients of the output, ``(k, *output_shape)``, from what arrived at the edge under k signals."""
        return gradient.reshape(k, *self.output_shape) if self.view is None else self.view.read(gradient, k)

    def save(self, tensor: Tensor) -> Tensor:
        """Keep a tensor for later, and notice if it is modified in place in between."""
        kept = tensor.detach()
        self._saved.append((kept, writes(kept)))
        return kept

    def check_saved(self) -> None:
        """Raise if a saved tensor was modified in place after its use."""
        for tensor, version in self._saved:
            if writes(tensor) != version:
                raise RuntimeError(
                    f"the input of {self.operation} ({', '.join(r.label for r in self.refs)}) was modified in place "
                    "after its use, so its statistics would be wrong. Use an out-of-place operation there."
                )

    @abstractmethod
    def blocks(self, joint: bool) -> list[tuple[str, Block]]:
        """The blocks this use contributes to, as ``(piece, block)``; ``joint`` keeps weight and bias together."""

    @abstractmethod
    def use(
        self, piece: str, gradient: Tensor, valid: Tensor | None, cache: dict[tuple[int, str], Tensor | OneHot]
    ) -> Outer | PerSample:
        """Samples of one piece from output gradients ``(k, *output_shape)``.

        Args:
            piece: As given by :meth:`blocks`.
            gradient: Gradients with respect to the output.
            valid: ``(n, s)`` positions that count, ``None`` for all; of each example where the rows serve all.
            cache: Inputs already prepared in this pass, by site and piece.
        """

    @abstractmethod
    def keeps_examples(self, examples: int) -> bool:
        """Whether the output has a row (or several) for each of the examples."""

    @property
    def serves_all(self) -> bool:
        """Whether each row serves all examples, as those of a table of positions that is looked up once."""
        return False

    def row_gradients(self, gradient: Tensor) -> Tensor | None:
        """Output gradients as ``(k, n, s, o)``, where positions have a meaning; ``None`` elsewhere."""
        return None


class Observer(Protocol):
    """What a rule needs of the :class:`~curvature.layers.recorder.Recorder` that watches a forward pass.

    Attributes:
        batch: Number of examples, the leading dimension of the model's inputs; ``None`` where unknown.
        examples_interact: Some outputs depend on several examples, or it cannot be told that they do not.
    """

    batch: int | None
    examples_interact: bool

    def resolve(self, tensor: Any) -> Ref | None:
        """The tracked parameter that ``tensor`` is, or is a contiguous segment or the transpose of."""
        ...

    def layout(self, tensor: Tensor) -> RowLayout:
        """How the leading dimensions of ``tensor`` hold examples."""
        ...

    def add(self, site: Site, output: Tensor) -> None:
        """Record a use whose result is ``output``."""
        ...


class OuterSite(Site):
    r"""A use of the form :math:`y_{ns} = W a_{ns} + b`."""

    groups: int = 1

    @property
    def dense(self) -> bool:
        """Whether the layer is a dense one, whose positions are neither patches that overlap nor steps in time."""
        return False

    @abstractmethod
    def inputs(self) -> Tensor | OneHot:
        """Inputs ``(*, n, s, i)`` without the bias column."""

    @abstractmethod
    def gradients(self, gradient: Tensor) -> Tensor:
        """Output gradients ``(k, *output_shape)`` as ``(*, k, n, s, o)``."""

    @abstractmethod
    def weight_part(self) -> BlockPart:
        """The weight (segment) as block columns ``(*, o, i)``."""

    def bias_part(self) -> BlockPart:
        """The bias as a block column ``(*, o, 1)``."""
        assert self.bias is not None
        d = self.bias.numel
        shape = (d, 1) if self.groups == 1 else (self.groups, d // self.groups, 1)
        return self.bias.part(shape, split=(d,))

    def blocks(self, joint: bool) -> list[tuple[str, Block]]:
        if joint and self.weight is not None and self.bias is not None:
            name = f"{self.weight.label}+{self.bias.label}"
            return [("joint", Block(name, (self.weight_part(), self.bias_part())))]
        out = []
        if self.weight is not None:
            out.append(("weight", Block(self.weight.label, (self.weight_part(),))))
        if self.bias is not None:
            out.append(("bias", Block(self.bias.label, (self.bias_part(),))))
        return out

    def use(
        self, piece: str, gradient: Tensor, valid: Tensor | None, cache: dict[tuple[int, str], Tensor | OneHot]
    ) -> Outer:
        g = self.gradients(gradient)
        key = (id(self), "bias" if piece == "bias" else "weight")
        if key not in cache:
            cache[key] = self._prepared(piece, g)
        by_example = valid is not None and len(valid) != g.shape[-3]
        serves_all = not self.layout.batched and not by_example
        ones = piece == "joint"
        return Outer(cache[key], g, valid, ones=ones, serves_all=serves_all, source=id(self), dense=self.dense)

    def _prepared(self, piece: str, g: Tensor) -> Tensor | OneHot:
        if piece == "bias":
            return g.new_ones(*g.shape[:-4], *g.shape[-3:-1], 1)
        self.check_saved()
        a = self.inputs()
        return a.to(g.dtype) if isinstance(a, Tensor) else a

    def keeps_examples(self, examples: int) -> bool:
        return self._layout_of_rows[0] == examples

    @property
    def serves_all(self) -> bool:
        return not self.layout.batched and self.keeps_examples(1)

    @property
    def positions(self) -> int:
        """Number of rows of each example, as they are laid out."""
        return self._layout_of_rows[1]

    @property
    def _layout_of_rows(self) -> tuple[int, int]:
        n, s, _ = self.gradients(torch.empty(self.output_shape, device="meta").unsqueeze(0)).shape[-3:]
        return n, s

    def row_gradients(self, gradient: Tensor) -> Tensor | None:
        g = self.gradients(gradient)
        return g if self.groups == 1 else g.movedim(0, -2).flatten(-2)


class ElementwiseSite(Site):
    """A use that hands over per-sample gradients: scale and shift, broadcast parameters."""

    @abstractmethod
    def per_sample(self, piece: str, gradient: Tensor) -> Tensor:
        """Per-sample gradients ``(k, n, *block.shape)`` from output gradients ``(k, *output_shape)``."""

    def per_row(self, piece: str, gradient: Tensor) -> Tensor | None:
        """The same as the contributions of all rows of the output, ``(k, m, *block.shape)``.

        From these, gradients are formed where rows do not lie as the examples do; ``None`` if the rows are not known.
        """
        return None

    def use(
        self, piece: str, gradient: Tensor, valid: Tensor | None, cache: dict[tuple[int, str], Tensor | OneHot]
    ) -> PerSample:
        self.check_saved()
        return PerSample(self.per_sample(piece, gradient), id(self))

    @property
    def has_rows(self) -> bool:
        """Whether :meth:`per_row` is given."""
        return type(self).per_row is not ElementwiseSite.per_row

    def rows(self, piece: str, gradient: Tensor) -> PerSample | None:
        """Samples by :meth:`per_row`."""
        self.check_saved()
        gradients = self.per_row(piece, gradient)
        return None if gradients is None else PerSample(gradients, id(self))

    def keeps_examples(self, examples: int) -> bool:
        return self.layout.batched and self.layout.batch == examples
