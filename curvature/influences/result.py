"""The result of an influence computation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Influence:
    r"""How much each training example did to each query.

    Attributes:
        scores: :math:`\langle g_q, (C + \lambda I)^{-1} g_n \rangle`, ``(Q, N)``. Positive where the example lowered
            the loss of the query: without example n it would change by about ``scores[q, n] / total``.
        by_block: The same, split by block (a layer's weight and bias), ``{name: (Q, N)}``; they add up to ``scores``.
        by_position: If asked for, the blocks of matrices split further by the positions s (tokens) of the training
            example at which the layer was used, ``{name: (Q, N, S)}``.
        total: Divisor of the training loss: the number of terms of a mean loss, 1 for a sum.
        dropped: With ``query_rank``: norms of what truncation took from the preconditioned gradient of each query,
            ``{name: (Q,)}``; zero for blocks that were kept whole. No score is off by more than
            :math:`\sum_b \text{dropped}_{bq} \|g_{nb}\|` over the blocks b, with the norms that
            :func:`curvature.per_sample_norms` gives (squared).
        kept: With ``query_rank``: norms of what was kept.
    """

    scores: Tensor
    by_block: dict[str, Tensor]
    by_position: dict[str, Tensor]
    total: float
    dropped: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def top(self, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k largest scores of each query and their examples, ``(Q, k)`` each."""
        values, examples = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return values, examples

    @property
    def by_token(self) -> Tensor:
        """Influence of each token of the training examples, ``(Q, N, S)``: the blocks of :attr:`by_position` added up.

        Layers without matrices (scale and shift of a norm, a table of positions) contribute to ``scores`` alone.

        Raises:
            ValueError: If ``by_position`` was not asked for, or the layers count different positions.
        """
        shapes = {name: tuple(split.shape) for name, split in self.by_position.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(
                f"the positions of the blocks are no common tokens: {shapes or 'none were kept'}. Ask for "
                "by_position=True, and restrict params= to layers that see the same positions."
            )
        return torch.stack(list(self.by_position.values())).sum(0)

    @property
    def truncation(self) -> Tensor:
        """Share of the preconditioned gradient of each query that ``query_rank`` dropped, by norm, ``(Q,)``.

        Raises:
            ValueError: If nothing was truncated.
        """
        if not self.dropped:
            raise ValueError("no query was truncated: that is what query_rank= does.")
        dropped, kept = (torch.stack(list(norms.values())).square().sum(0) for norms in (self.dropped, self.kept))
        return (dropped / (dropped + kept).clamp(min=torch.finfo(kept.dtype).tiny)).sqrt()
