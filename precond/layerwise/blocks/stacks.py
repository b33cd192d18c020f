"""Small blocks of one shape, to which their inverses are applied together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.layers.block import Block, BlockPart
from precond.layerwise.blocks.preconditioner import Preconditioner
from solvers import LinearOperator
from solvers.operators.stacked import Stacked, kind

#: Largest number of entries of a block that is stacked; in larger ones the products outweigh the calls.
LARGEST = 2**15


@dataclass(frozen=True)
class BlockStack:
    """Blocks whose inverses are one operator.

    Attributes:
        need: What they have in common.
        parts: Block -> its parts, each of them a whole parameter.
        inverses: Those of the blocks.
    """

    need: object
    parts: dict[str, tuple[BlockPart, ...]]
    inverses: Stacked

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """``P g`` of every parameter by its name; ``None`` where one has no gradient."""
        columns = [[part.name for part in column] for column in zip(*self.parts.values(), strict=True)]
        if not all(name in gradients for names in columns for name in names):
            return None
        first = next(iter(self.parts.values()))
        stacks = [torch.stack([gradients[name] for name in names]) for names in columns]
        pieces = [stack.view(len(stack), *part.shape) for stack, part in zip(stacks, first, strict=True)]
        g = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        operator = self.inverses.operator
        d = operator @ g.to(operator.dtype)
        results = [d] if len(pieces) == 1 else d.split_with_sizes([part.shape[-1] for part in first], dim=-1)
        out: dict[str, Tensor] = {}
        for names, stack, result in zip(columns, stacks, results, strict=True):
            # In one piece, since what follows reads the directions several times.
            out |= zip(names, result.to(stack.dtype).contiguous().view(stack.shape).unbind(), strict=True)
        return out


def read_together(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Tensor:
    """Blocks of one shape gathered (:meth:`Block.read`) into a stack ``(k, *shape)``."""
    columns = zip(*(block.parts for block in blocks), strict=True)
    pieces = [torch.stack([part.of(tensors[part.name]) for part in column]) for column in columns]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


class BlockStacks:
    """The stacks of a model, renewed where its blocks or the kinds of their inverses change."""

    def __init__(self) -> None:
        self._stacks: list[BlockStack] = []
        self._inverses: list[LinearOperator | None] = []  # of all blocks, as the stacks have them
        self._needs: dict[str, tuple[LinearOperator | None, object]] = {}

    def of(self, blocks: Mapping[str, Preconditioner], parameters: Mapping[str, Tensor]) -> list[BlockStack]:
        """The stacks of blocks, with their present inverses.

        Args:
            blocks: By name.
            parameters: By name.
        """
        inverses = [p.inverse for p in blocks.values()]
        if len(inverses) != len(self._inverses) or any(
            a is not b for a, b in zip(inverses, self._inverses, strict=True)
        ):
            self._inverses = []  # until all is done
            self._renew(blocks, parameters)
            self._inverses = inverses
        return self._stacks

    def _renew(self, blocks: Mapping[str, Preconditioner], parameters: Mapping[str, Tensor]) -> None:
        needs, together = {}, defaultdict[object, list[str]](list)
        for name in sorted(blocks):
            inverse = blocks[name].inverse
            seen, need = self._needs.get(name, (None, None))
            needs[name] = inverse, _need(blocks[name], parameters) if seen is not inverse else need
            together[needs[name][1]].append(name)
        before = {(stack.need, *stack.parts): stack for stack in self._stacks}
        self._stacks, self._needs = [], needs
        for need, names in together.items():
            if need is None or len(names) == 1:
                continue
            inverses = [inverse for name in names if (inverse := blocks[name].inverse) is not None]
            stack = before.get((need, *names))
            if stack is None:
                stack = BlockStack(need, {n: blocks[n].estimator.block.parts for n in names}, Stacked(inverses))
            stack.inverses.take(inverses)
            self._stacks.append(stack)


def _need(block: Preconditioner, parameters: Mapping[str, Tensor]) -> object:
    """What blocks of one stack have in common; ``None`` for those that stay by themselves."""
    form, inverse = block.estimator.block, block.inverse
    if inverse is None or form.numel > LARGEST or not all(part.covers(parameters[part.name]) for part in form.parts):
        return None
    common = kind(inverse)
    layout = [(part.shape, parameters[part.name].shape, parameters[part.name].dtype) for part in form.parts]
    return None if common is None else (common, *layout)
