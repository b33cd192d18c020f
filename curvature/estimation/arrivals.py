"""What arrived at the uses of blocks in a backward pass, as samples; and which examples and positions it tells of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvature.estimation.plan import Group
from curvature.layers import Site
from curvature.layers.samples import OneHot, Outer, PerSample
from curvature.layers.site import ElementwiseSite

#: Gradients by the ``id`` of the site at whose edge they arrived.
Arrived = Mapping[int, Tensor | None]
#: Inputs of the uses in one pass, prepared once for all signals: by site and piece.
Cache = dict[tuple[int, str], Tensor | OneHot]


def sites_of(groups: list[Group]) -> list[Site]:
    """All sites of the groups, once each."""
    return list({id(use.site): use.site for group in groups for use in group.uses}.values())


def mixes(group: Group, examples: int) -> bool:
    """Whether the rows of a use do not fall into the examples, as far as shapes tell."""
    return not group.uses or any(not use.site.keeps_examples(examples) for use in group.uses)


def _by_example(use: Outer | PerSample) -> Tensor:
    """What arrived for each example, ``(n, *)``."""
    if isinstance(use, Outer):
        return use.g.movedim(-3, 0).flatten(1)
    return use.gradients.movedim(1, 0).flatten(1)


def valid_positions(
    sites: list[Site],
    gradients: Mapping[int, Tensor],
    mask: Tensor,
    by_example: Mapping[int, Tensor] | None = None,
    picked: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Positions of each site that count: not masked or left out, or reached by the gradients all the same.

    What is left of terms that cancel (the softmax over a single position) is no signal.

    Args:
        sites: The sites.
        gradients: What arrived at their edges.
        mask: Terms of the loss that count, ``(n, positions)``.
        by_example: What arrived from each example, ``(n, *shape)``, where the rows of a site serve all examples.
        picked: Positions that what follows picks, of sites of which it leaves some out; see
            :func:`~curvature.estimation.cut_positions.picked_positions`.
    """
    by_example, picked = by_example or {}, picked or {}
    out: dict[int, Tensor] = {}
    full = bool(mask.all())
    for site in sites:
        gradient, each = gradients.get(id(site)), by_example.get(id(site))
        if gradient is None:
            continue
        g = site.row_gradients(site.arrived(gradient) if each is None else site.arrived(each, len(each)))
        if g is None:
            continue
        size = (g if each is None else g.movedim(-3, 0))[0].abs().amax(-1)  # (n, s)
        reached = size > min(16 * torch.finfo(g.dtype).eps, 1e-5) * (size.max() if size.numel() else 0)
        counts = torch.ones_like(reached)
        if not full:
            same, rows = reached.shape == mask.shape, reached.shape[0] == mask.shape[0]
            counts &= mask if same else mask.any(-1, keepdim=True) if rows else False
        if (left := picked.get(id(site))) is not None and left.shape[1] == counts.shape[1]:
            counts &= left.to(counts.device)
        out[id(site)] = reached | counts
    return out


def meet(group: Group, plain: Arrived, tagged: list[tuple[Tensor, Arrived]], cache: Cache) -> bool:
    """Whether what arrived in the rows of an example has not grown by its weight."""
    for weights, arrived in tagged:
        pairs = zip(samples_of(group, plain, {}, cache), samples_of(group, arrived, {}, cache), strict=True)
        if not all(have_grown(_by_example(use), weights, _by_example(weighted)) for use, weighted in pairs):
            return True
    return False


def have_grown(rows: Tensor, weights: Tensor, now: Tensor) -> bool:
    """Whether rows ``(n, *)`` are now what they were times a weight each, up to rounding."""
    expected = rows * weights.to(rows).unsqueeze(1)
    off = torch.linalg.vector_norm(now - expected, dim=1)
    return bool((off <= torch.finfo(rows.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected, dim=1)).all())


def samples_of(
    group: Group, gradients: Arrived, valid: Mapping[int, Tensor], cache: Cache, k: int = 1, by_rows: bool = False
) -> list[Outer | PerSample]:
    """Samples of the group's uses, from the gradients of their outputs under k signals; of single rows if asked."""
    samples: list[Outer | PerSample] = []
    for use in group.uses:
        gradient = gradients.get(id(use.site))
        if gradient is None:
            continue
        gradient = use.site.arrived(gradient, k)
        sample: Outer | PerSample | None = None
        if by_rows and isinstance(use.site, ElementwiseSite):
            sample = use.site.rows(use.piece, gradient)
        if sample is None:
            sample = use.site.use(use.piece, gradient, valid.get(id(use.site)), cache)
        samples.append(sample.transposed() if use.flipped else sample)
    return samples
