"""Which positions of a layer's use the rest of a model picks, or masks, by the graph alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from curvature.estimation.reached_entries import reached_entries
from curvature.layers.site import OuterSite, Site


def picked_positions(sites: Iterable[Site], output: Tensor) -> dict[int, Tensor]:
    """Positions of some uses that what follows picks, ``(n, s)`` by use; none for uses of which it takes all.

    A classification token, the last token of a text, or pooling with a mask leave out positions as a loss leaves out
    terms. What lies between may still lead from a position that is not picked to the output (attention does), which
    only a signal tells. Of passes with checkpoints nothing is read that was saved, since that may be asked for once.

    Args:
        sites: The uses.
        output: Of the model.
    """
    sites = list(sites)
    if output.grad_fn is None or not sites:
        return {}
    reached = reached_entries(output, any(site.packed for site in sites))
    out: dict[int, Tensor] = {}
    for site in sites:
        found = reached.get((site.edge.node, site.edge.output_nr))
        if found is None or not len(site.output_shape) or bool(found.all()):
            continue
        shape = site.edge.node._input_metadata[site.edge.output_nr].shape
        rows = site.row_gradients(site.arrived(found.expand(shape)))
        if rows is None:
            continue
        rowwise = isinstance(site, OuterSite) and site.dense and not site.operation.startswith("conv")
        alike = rowwise and found.shape[-1] == 1  # all units of a row
        mask = rows[0, ..., 0] if alike else rows[0].any(-1)
        if not bool(mask.all()):
            out[id(site)] = mask
    return out
