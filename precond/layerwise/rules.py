"""Other structures, or none, for parts of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from curvature import Curvature
from curvature.estimation.coverage import Row
from curvature.structures.mixed import Mixed, Rule, label, nearness
from curvature.structures.whole import WholeFisher

#: Rule (a module, a class of modules, a name or a glob) -> structure, or options that differ from the default's.
Rules = Mapping[Any, str | Curvature | Mapping[str, Any]]


def with_rules(curvature: Curvature, rules: Rules | None) -> Curvature:
    """The curvature with other structures for parts of the model.

    Args:
        curvature: For all that no rule fits.
        rules: See :class:`~curvature.structures.mixed.Mixed`; a dict of options stands for ``curvature`` with these.

    Raises:
        ValueError: If the curvature is one matrix for the whole model, or an option is not one of it.
    """
    if not rules:
        return curvature
    if isinstance(curvature, WholeFisher):
        raise ValueError("one matrix over the whole model has no rules for its parts; take a structure of blocks.")
    chosen: dict[Any, str | Curvature] = {"*": curvature}
    for rule, value in rules.items():
        if isinstance(value, Mapping):
            try:
                chosen[rule] = replace(curvature, **value)
            except TypeError as error:
                raise ValueError(
                    f"the rule {label(rule)} gives {sorted(value)}, but these are not options of {curvature!r}."
                ) from error
        else:
            chosen[rule] = value
    return Mixed(chosen, curvature.kind, curvature.samples)


def ignored_names(model: nn.Module, ignore: Sequence[Rule]) -> frozenset[str]:
    """Names of the parameters that get no curvature; of a tied one, all its names.

    Args:
        model: The model.
        ignore: Modules, classes of modules, names or globs.

    Raises:
        ValueError: If an entry fits nothing.
    """
    if isinstance(ignore, str):
        raise ValueError(f"ignore= is a list of rules: ignore=[{ignore!r}].")
    every = list(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for rule in ignore:
        fitting = {id(p) for name, p in every if nearness(rule, name, model) is not None}
        if not fitting:
            raise ValueError(
                f"ignore= holds {label(rule)}, but nothing in {type(model).__name__} fits it. There are "
                f"{', '.join([name for name, _ in every][:3])}."
            )
        found |= fitting
    return frozenset(name for name, p in every if id(p) in found)


def ignored_row(name: str, p: Tensor) -> Row:
    """The row of such a parameter in the coverage table."""
    return Row(name, tuple(p.shape), "-", "ignored", 0, "no rule: ignore=, trained by its plain gradient")
