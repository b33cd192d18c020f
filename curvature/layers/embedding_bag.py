"""Bags of embeddings: a dense layer on the (weighted) counts of ids in each bag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.block import BlockPart
from curvature.layers.embedding import table_part
from curvature.layers.rules import bind, rule_for
from curvature.layers.site import Observer, OuterSite, Ref, RowLayout
from solvers.precision import working_dtype


class EmbeddingBagSite(OuterSite):
    r"""One use of :math:`y_n = E^\top a_n` with the counts :math:`a_n = \sum_{j \in \text{bag } n} w_j e_{id(j)}`.

    The counts ``(n, 1, V)`` are formed; with a mean they are divided by the size of the bag, in which ``padding_idx``
    does not count.

    Args:
        index: ``(j,)`` ids of all bags, one after the other.
        bag: ``(j,)`` the bag each id is in.
        factor: ``(j,)`` weights within the bag, or ``None``.
        bags: Number of bags.
        table: Shape of ``E (V, d)``.
        dtype: Dtype of the counts.
    """

    def __init__(
        self,
        index: Tensor,
        bag: Tensor,
        factor: Tensor | None,
        bags: int,
        table: tuple[int, int],
        weight: Ref,
        padding_idx: int | None,
        mean: bool,
        layout: RowLayout,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, None, layout, "embedding bag")
        self.index, self.bag = self.save(index), bag
        self.factor = None if factor is None else self.save(factor)
        self.bags, self.table, self.padding_idx, self.mean, self.dtype = bags, table, padding_idx, mean, dtype

    def inputs(self) -> Tensor:
        factor = torch.ones_like(self.index, dtype=self.dtype) if self.factor is None else self.factor.to(self.dtype)
        if self.padding_idx is not None:
            factor = factor.masked_fill(self.index == self.padding_idx, 0)
        counts = factor.new_zeros(self.bags, self.table[0])
        counts.index_put_((self.bag, self.index), factor, accumulate=True)
        if self.mean:
            counts = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return self.layout.rows(counts, 1)

    def gradients(self, gradient: Tensor) -> Tensor:
        return self.layout.rows(gradient, 1)

    def weight_part(self) -> BlockPart:
        assert self.weight is not None
        return table_part(self.weight, self.table)


_ARGUMENTS = (
    *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)


@rule_for(F.embedding_bag, modules={nn.EmbeddingBag: "kronecker"})
def embedding_bag(
    recorder: Observer, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> EmbeddingBagSite | None:
    """``F.embedding_bag`` in modes sum and mean; a maximum is left to the fallback, as are tracked sample weights."""
    call = bind(_ARGUMENTS, args, kwargs)
    weight, factor, mode = recorder.resolve(call["weight"]), call.get("per_sample_weights"), call.get("mode", "mean")
    if weight is None or call.get("scale_grad_by_freq") or mode == "max" or recorder.resolve(factor) is not None:
        return None
    index, bags, padding = call["input"], output.shape[0], call.get("padding_idx")
    positions = torch.arange(index.numel(), device=index.device)
    if index.dim() == 2:
        bag = positions // max(1, index.shape[1])
    else:
        starts = call["offsets"][:bags].to(positions.dtype)  # include_last_offset appends the end of the last bag
        bag = torch.searchsorted(starts, positions, right=True) - 1
    return EmbeddingBagSite(
        index.reshape(-1),
        bag,
        None if factor is None else factor.reshape(-1),
        bags,
        tuple(call["weight"].shape),
        weight,
        None if padding is None else padding % call["weight"].shape[0],
        mode == "mean",
        recorder.layout(output),
        working_dtype(output),
    )
