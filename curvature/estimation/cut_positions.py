"""Which positions of a layer's use the rest of a model picks, or masks, by the graph alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from curvature.estimation.reached_entries import reached_entries
from curvature.layers.site import OuterSite, Site
from curvature.model.graph_nodes import shape_of


def picked_positions(
    sites: Iterable[Site], output: Tensor, probes: Sequence[tuple[Tensor, Tensor]] = ()
) -> dict[int, Tensor]:
    """Positions of some uses that what follows picks, ``(n, s)`` by use; none for uses of which it takes all.

    A classification token, the last token of a text, or pooling with a mask leave out positions as a loss leaves out
    terms. What lies between may still lead from a position that is not picked to the output (attention does), which
    only a signal tells. Of passes with checkpoints nothing is read that was saved, since that may be asked for once.

    Args:
        sites: The uses.
        output: Of the model.
        probes: For each loss its terms that count, ``(n, positions)``, and a signal on these. They are looked at where
            no use has the positions of the loss, as where a term is a row of an image.
    """
    sites = list(sites)
    if output.grad_fn is None or not sites:
        return {}
    packed = any(site.packed for site in sites)
    reached = reached_entries(output.grad_fn, output.output_nr, packed, seen=_seen_entries(sites, probes))
    out: dict[int, Tensor] = {}
    for site in sites:
        found = reached.get((site.edge.node, site.edge.output_nr))
        if found is None or not len(site.output_shape) or bool(found.all()):
            continue
        rows = site.row_gradients(site.arrived(found.expand(shape_of(site.edge.node, site.edge.output_nr))))
        if rows is None:
            continue
        rowwise = isinstance(site, OuterSite) and site.dense and not site.operation.startswith("conv")
        alike = rowwise and found.shape[-1] == 1  # all units of a row
        mask = rows[0, ..., 0] if alike else rows[0].any(-1)
        if not bool(mask.all()):
            out[id(site)] = mask
    return out


def _seen_entries(sites: Iterable[Site], probes: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The entries of an output that losses see; ``None`` for all, or where their positions are those of some use."""
    shapes = {mask.shape for mask, _ in probes if not bool(mask.all())}
    rows = ((*site.output_shape[:1], site.positions) for site in sites if isinstance(site, OuterSite))
    if not shapes or any(row in shapes for row in rows):
        return None
    seen = torch.stack([signal != 0 for _, signal in probes]).any(0)
    return None if bool(seen.all()) else seen
