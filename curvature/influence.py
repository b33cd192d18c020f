"""Influence functions: what each training example did to a prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.block import Block, Place
from curvature.collector import Collector
from curvature.data import Data, Output
from curvature.estimator import Form
from curvature.fisher import Structure
from curvature.ggn import ggn
from curvature.losses import ClassDim, widen
from curvature.persample import Examples, KeptSamples, refuse_sums
from curvature.problem import Evaluation, Problem
from curvature.samples import OneHot, Outer, Samples
from curvature.signals import Signals
from solvers import Damping, LinearOperator, RelativeTikhonov, Tikhonov

#: Numbers formed at once where positions are kept apart (16 Mi elements: 64 MiB in float32).
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Influence:
    r"""How much each training example did to each query.

    Attributes:
        scores: :math:`\langle g_q, (C + \lambda I)^{-1} g_n \rangle`, ``(Q, N)``. Positive where the example lowered
            the loss of the query: without example n it would change by about ``scores[q, n] / total``.
        by_block: The same, split by block (a layer's weight and bias), ``{name: (Q, N)}``; they add up to ``scores``.
        by_position: If asked for, the blocks of matrices split further by the positions s (tokens) of the training
            example at which the layer was used, ``{name: (Q, N, S)}``.
        total: What the training loss divides by: the number of terms of a mean loss, 1 for a sum.
    """

    scores: Tensor
    by_block: dict[str, Tensor]
    by_position: dict[str, Tensor]
    total: float

    def top(self, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k largest scores of each query and their examples, ``(Q, k)`` each."""
        values, examples = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return values, examples


def influence(
    model: nn.Module,
    loss_fn: Any,
    train: Data,
    queries: Data,
    *,
    curvature: LinearOperator | Structure = "ekfac",
    damping: float | Damping | None = None,
    query_loss: Any = None,
    by_position: bool = False,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Influence:
    r"""Influence of training examples on queries, at a minimum of the training loss L.

    If example n is given the additional weight :math:`\epsilon`, the minimum moves by
    :math:`-\epsilon\, H^{-1} g_n`, and the loss of a query by :math:`-\epsilon\, \langle g_q, H^{-1} g_n \rangle`, with
    the gradients g of the summed terms of an example (as :func:`per_sample_gradients`, without the 1/N of a mean loss).
    Networks are rarely at a minimum; with the damped Gauss-Newton matrix in place of H the score is that of the
    proximal step of Bae et al. (2022), which stays meaningful.

    Queries are preconditioned, Q vectors as long as the parameters; training examples are streamed, in chunks of
    gradients that are formed layer by layer. Masked targets (``ignore_index``) take no part, in the curvature too.

    Args:
        model: The trained model; evaluated in its current mode.
        loss_fn: The training loss.
        train: One batch ``(x, y)`` or a re-iterable of batches.
        queries: One batch or a re-iterable of batches.
        curvature: A structure of :func:`ggn` that is estimated from ``train`` with sampled labels, or any operator on
            the flat vector of parameters, such as one that was saved by :func:`solvers.state`.
        damping: How to damp it; a number is a shift in units of C. ``None`` takes a tenth of each block's mean
            eigenvalue.
        query_loss: Loss of the queries, where it is not ``loss_fn``.
        by_position: Also split the scores by the positions of the training examples.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        generator: Source of sampled labels.
        progress: Show progress bars.

    Raises:
        ValueError: If the operator does not act on the flat vector of the parameters.
        StructureError: If it has no structural inverse under this damping; pass a structure, or a dense matrix.

    References:
        Koh and Liang (2017), https://arxiv.org/abs/1703.04730; Bae et al. (2022), https://arxiv.org/abs/2209.05364;
        Grosse et al. (2023), https://arxiv.org/abs/2308.03296
    """
    given: dict[str, Any] = {"params": params, "output": output, "class_dim": class_dim, "progress": progress}
    inverse = _inverse(model, loss_fn, train, curvature, damping, generator, given)
    asked = Problem(model, loss_fn if query_loss is None else query_loss, queries, **given)
    _check(inverse, asked)
    preconditioned: list[Tensor] = []
    _for_gradients(asked, "queries", lambda gradients: preconditioned.append(inverse @ gradients.to(inverse.dtype)))
    rows = torch.cat(preconditioned)
    problem = Problem(model, loss_fn, train, **given)
    sizes = {name: p.numel() for name, p in problem.parameters.items()}
    scores: dict[str, list[Tensor]] = {}
    positions: dict[str, list[Tensor]] = {}
    counts: list[int] = []

    def visit(evaluation: Evaluation) -> None:
        examples = Examples.of(evaluation)
        counts.append(examples.number)
        for block, found in _samples(examples):
            at = Place.of(block, problem.parameters.starts, sizes).gather(rows)
            known = scores.setdefault(block.name, [])
            known += [rows.new_zeros(len(rows), n) for n in counts[len(known) : -1]]  # batches that did not use it
            split = _joined([_by_position(samples, at) for samples in found]) if by_position else None
            if split is not None:
                positions.setdefault(block.name, []).append(split)
            parts = [_by_example(samples, at) for samples in found] if split is None else [split.sum(-1)]
            known.append(torch.cat(parts, dim=1))

    total = problem.visit(visit, "influence", recorded=True)
    for known in scores.values():
        known += [rows.new_zeros(len(rows), n) for n in counts[len(known) :]]
    by_block = {name: torch.cat(found, dim=1) for name, found in scores.items()}
    zero = rows.new_zeros(len(rows), sum(counts))
    return Influence(
        sum(by_block.values(), zero),
        by_block,
        {name: _padded(found) for name, found in positions.items() if len(found) == len(counts)},
        float(total),
    )


def self_influence(
    model: nn.Module,
    loss_fn: Any,
    train: Data,
    *,
    curvature: LinearOperator | Structure = "ekfac",
    damping: float | Damping | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Influence of every training example on itself, :math:`\langle g_n, (C + \lambda I)^{-1} g_n \rangle`, ``(N,)``.

    Large for examples that the model fits only because it saw them: mislabelled and unusual ones. Arguments as for
    :func:`influence`.
    """
    given: dict[str, Any] = {"params": params, "output": output, "class_dim": class_dim, "progress": progress}
    inverse = _inverse(model, loss_fn, train, curvature, damping, generator, given)
    problem = Problem(model, loss_fn, train, **given)
    _check(inverse, problem)
    found: list[Tensor] = []

    def add(gradients: Tensor) -> None:
        gradients = gradients.to(inverse.dtype)
        found.append((gradients * (inverse @ gradients)).sum(1))

    _for_gradients(problem, "self-influence", add)
    return torch.cat(found)


def _inverse(
    model: nn.Module,
    loss_fn: Any,
    train: Data,
    curvature: LinearOperator | Structure,
    damping: float | Damping | None,
    generator: torch.Generator | None,
    given: dict[str, Any],
) -> LinearOperator:
    damping = RelativeTikhonov(0.1) if damping is None else damping
    if isinstance(curvature, str):
        curvature = ggn(model, loss_fn, train, structure=curvature, kind="mc", generator=generator, **given)
    return curvature.inverse(damping if isinstance(damping, Damping) else Tikhonov(damping))


def _check(inverse: LinearOperator, problem: Problem) -> None:
    size = problem.parameters.size
    if inverse.in_shape != (size,):
        raise ValueError(
            f"the curvature acts on {inverse.in_shape}, the model has {size} parameters that count. Pass the same "
            "params= to both, and an operator on the flat vector, as curvature.ggn returns it."
        )
    refuse_sums(problem)


def _for_gradients(problem: Problem, title: str, use: Callable[[Tensor], Any]) -> None:
    """Hand over the per-sample gradients of every batch, ``(n, P)``."""

    def visit(evaluation: Evaluation) -> None:
        examples = Examples.of(evaluation)
        use(examples.gradients([examples.terms.gradient()])[0])

    problem.visit(visit, title, recorded=True)


def _samples(examples: Examples) -> list[tuple[Block, list[Samples]]]:
    """What the gradients of the examples are made of, block by block, weight and bias together."""
    kept: list[KeptSamples] = []

    def make(block: Block, form: Form) -> KeptSamples:
        kept.append(KeptSamples(block))
        return kept[-1]

    signals = Signals.of(examples.terms, "empirical", batch=examples.batch, given=(examples.terms.gradient(),))
    Collector(examples.parameters, make).collect(examples.recorder, examples.output, signals)
    return [(entry.block, entry.samples) for entry in kept]


def _by_example(samples: Samples, rows: Tensor) -> Tensor:
    """Inner products ``(Q, n)`` of the per-sample gradients with ``rows (Q, *block)``."""
    if any(isinstance(use, Outer) and isinstance(use.a, OneHot) for use in samples.uses):
        split = _by_position(samples, rows)  # a gradient would be a whole table for every example
        if split is not None:
            return split.sum(-1)
    flat = rows.flatten(1)
    return torch.cat([flat @ chunk.flatten(1).to(flat.dtype).T for chunk in samples.gradients()], dim=1)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Examples that came apart, together again."""
    found = [part for part in parts if part is not None]
    return torch.cat(found, dim=1) if len(found) == len(parts) else None


def _padded(parts: list[Tensor]) -> Tensor:
    """Examples of different lengths ``(Q, n, s)`` in one tensor."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[-1])) for part in parts], dim=1)


def _by_position(samples: Samples, rows: Tensor) -> Tensor | None:
    """Inner products ``(Q, n, s)`` at each position; ``None`` where the uses do not keep positions apart."""
    uses = samples.uses
    if samples.merge or not all(isinstance(use, Outer) for use in uses):
        return None
    if len({(use.examples, use.positions) for use in uses}) != 1:  # type: ignore[union-attr]
        return None
    total: Tensor | None = None
    for use in uses:
        assert isinstance(use, Outer)
        part = _contracted(use, rows.mT if use.flipped else rows)
        total = part if total is None else total + part
    return total


def _contracted(use: Outer, rows: Tensor) -> Tensor:
    r""":math:`g_{ns}^\top R_q a_{ns}` for matrices ``R (Q, *, o, i)``: ``(Q, n, s)``, a chunk of examples at a time."""
    queries, stacked = rows.shape[0], use.g.dim() > 4
    step = max(1, CHUNK_ELEMENTS // max(1, queries * use.positions * use.g.shape[-1]))
    out = []
    for start in range(0, use.examples, step):
        at = slice(start, start + step)
        g = widen(use.g[..., 0, at, :, :]).to(rows.dtype)  # (*, n, s, o)
        if isinstance(use.a, OneHot):
            reached = rows.mT[:, use.a.index[at]]  # (Q, n, s, o)
            if use.a.keep is not None:
                reached = reached * use.a.keep[at].unsqueeze(-1)
        else:
            a = use.rows[..., at, :, :].to(rows.dtype)
            spec = "q...oi,...nsi->q...nso"
            reached = torch.einsum(spec, rows, a)
        part = (reached * g).sum(-1)
        out.append(part.sum(1) if stacked else part)
    return torch.cat(out, dim=1)
