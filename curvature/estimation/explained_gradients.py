"""Whether the recorded uses of a pass explain its gradients, and what is said of those that they do not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from curvature.estimation import checks
from curvature.estimation.arrivals import Cache, samples_of, sites_of
from curvature.estimation.plan import Group
from curvature.layers.recorder import Recorder
from curvature.losses.signals import Signals
from curvature.model.pullback import pull_back


def unexplained(
    groups: list[Group], output: Tensor, signals: Signals, parameters: Mapping[str, Tensor], cache: Cache
) -> set[str]:
    """Parameters whose gradient is not what their recorded uses add up to.

    A kernel written as a ``torch.autograd.Function`` is not seen by function modes; its parameters must be found
    by what autograd knows.
    """
    sites, items = sites_of(groups), parameters.items()
    targets: list[Any] = [*(site.edge for site in sites), *(p for _, p in items)]
    found = pull_back([output], targets, [signals.probe()])
    arrived = {id(site): g for site, g in zip(sites, found, strict=False)}
    # Rounding is relative to the sizes of the terms, which may cancel.
    sizes = {key: None if g is None else g.abs() for key, g in arrived.items()}
    true = {name: g.to_dense() for (name, _), g in zip(items, found[len(sites) :], strict=True) if g is not None}
    known = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in items}
    bound = {name: torch.zeros_like(zero) for name, zero in known.items()}
    for group in groups:
        if not group.uses:
            known[group.block.name] = true.get(group.block.name, known[group.block.name])
        elif uses := samples_of(group, arrived, {}, cache):
            total = reduce(torch.add, (use.total() for use in uses))
            group.block.write(total, known)
            tolerance = torch.finfo(total.dtype).eps ** 0.5
            size = reduce(torch.add, (use.abs().total().abs() for use in samples_of(group, sizes, {}, cache)))
            group.block.write(tolerance * size.max().expand(group.block.shape), bound)
    return {name for name, g in true.items() if bool(((g - known[name]).abs() > bound[name]).any())}


def structure(
    recorder: Recorder, groups: list[Group], output: Tensor, parameters: Mapping[str, Tensor]
) -> Hashable | None:
    """What passes have in common in which the same rules serve the same operations."""
    found = checks.graph(output, parameters)
    if found is None:
        return None
    graph, numbers = found
    sites = tuple(
        (s.operation, s.refs, s.output_shape, numbers.get(s.edge.node), s.edge.output_nr) for s in recorder.sites
    )
    blocks = tuple((g.block.name, tuple((u.piece, u.flipped) for u in g.uses)) for g in groups)
    return tuple(parameters), blocks, graph, sites, tuple(sorted(recorder.unknown))


def doubt(name: str, parameter: Tensor, groups: list[Group], output: Tensor) -> str:
    """Why the recorded uses of a parameter are not relied on."""
    rules = dict.fromkeys(op for group in groups if name in group.block.names for op in group.operations)
    unseen = ", ".join(checks.custom_functions(output, parameter))
    if not rules:
        return f"no rule for {unseen or 'its use'}"
    return f"rule {', '.join(rules)} does not explain the gradient" + (f", used in {unseen} as well" * bool(unseen))
