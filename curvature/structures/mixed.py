"""Different structures for different parts of a model."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from curvature.layers.block import Block
from curvature.losses.signals import FisherKind
from curvature.structures.blocks import BLOCKS
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form

#: A module, a class of modules, or a name or glob of modules or parameters.
Rule = str | type[nn.Module] | nn.Module
#: Rule (see above) -> structure, by name or with its options.
Rules = Mapping[Any, str | Curvature]


@dataclass(frozen=True, init=False)
class Mixed(Curvature):
    """A structure for each part of a model, by rule.

    A rule is a module of the model, a class of modules, or a name (a glob) of modules or parameters; a module stands
    for everything inside it. Where several rules fit a parameter, a module goes before a class, a class before a name,
    and a name before the default ``"*"``; the module or class nearest to the parameter wins, and of several names the
    last one in ``rules``. A tied parameter counts under all of its names.

    Example:
        >>> import curvature
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> mixed = Mixed({"*": "kfac", nn.LayerNorm: "diagonal", model[2]: "layer"})
        >>> [row.structure for row in curvature.coverage(model, nn.MSELoss(), curvature=mixed)]
        ['kronecker', 'kronecker', 'diagonal', 'diagonal', 'dense', 'dense']

    Args:
        rules: ``{rule: structure}``, a structure being a name (``"kfac"``) or, with options, a curvature
            (``KroneckerFisher(sharing="reduce")``) of the same kind and number of samples.
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``, for all of them.
        samples: Draws per batch for ``"mc"``.

    Raises:
        ValueError: If a structure is unknown, of another kind, or some join weight and bias and others do not; when
            used with a model, if a rule fits nothing in it, a parameter has no rule, or parameters that form one block
            have different ones.
    """

    rules: Rules = field(default_factory=dict)
    #: Structure of each parameter, once there is a model.
    chosen: Mapping[str, Curvature] | None = None

    def __init__(self, rules: Rules, kind: FisherKind = "mc", samples: int = 1) -> None:
        for name, value in (("rules", dict(rules)), ("kind", kind), ("samples", samples), ("chosen", None)):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rules:
            raise ValueError("Mixed needs a rule at least: Mixed({'*': 'kfac'}).")
        if len({curvature.joint for curvature in self._structures()}) > 1:
            raise ValueError(
                "some of the structures join weight and bias of a layer in one block, and others keep them apart "
                "(bias='separate'). Blocks are those of the model: give bias= to all of them alike."
            )

    def _structures(self) -> Iterator[Curvature]:
        return (self._curvature(rule) for rule in self.rules)

    def _curvature(self, rule: Rule) -> Curvature:
        value = self.rules[rule]
        if isinstance(value, str):
            if value not in BLOCKS:
                raise ValueError(
                    f"the structure of a rule must be one of {sorted(BLOCKS)} or a Curvature, got {value!r} for "
                    f"{label(rule)}. Structures of the whole matrix cannot be mixed."
                )
            return BLOCKS[value](self.kind, self.samples)
        if not isinstance(value, Curvature) or isinstance(value, Mixed):
            raise ValueError(f"the structure of {label(rule)} must be a name or a Curvature, got {value!r}.")
        if (value.kind, value.samples) != (self.kind, self.samples):
            raise ValueError(
                f"{label(rule)} asks for kind={value.kind!r} with samples={value.samples}, but all structures see the "
                f"same signals, here of kind={self.kind!r} with samples={self.samples}. Give Mixed the kind."
            )
        return value

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """Whether weight and bias of a layer form one block."""
        return next(self._structures()).joint

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Passes over a data set: as many as the most demanding structure takes."""
        return max(curvature.passes for curvature in self._structures())

    def on(self, model: nn.Module) -> Mixed:
        """These rules applied to a model."""
        curvatures = {rule: self._curvature(rule) for rule in self.rules}
        best: dict[int, tuple[tuple[int, int], Rule]] = {}
        names: dict[int, str] = {}
        fitting: set[Rule] = set()
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)
            for rule in self.rules:
                rank = nearness(rule, name, model)
                if rank is not None and rank[0] == BY_NAME:
                    rank = (BY_NAME, list(self.rules).index(rule))
                if rank is None:
                    continue
                fitting.add(rule)
                known = best.get(id(p))
                if known is None or rank > known[0]:
                    best[id(p)] = (rank, rule)
                elif rank == known[0] and curvatures[rule] != curvatures[known[1]]:
                    raise ValueError(
                        f"{names[id(p)]} is {name} as well, and the rules {label(known[1])} and {label(rule)} fit it "
                        "equally. Give both the same structure, or name the module that decides."
                    )
        if idle := [label(rule) for rule in self.rules if rule not in fitting]:
            raise ValueError(
                f"nothing in {type(model).__name__} fits {', '.join(idle)}. A rule is a module of this very model, a "
                "class of modules that hold parameters, or a name or glob of modules or parameters, such as "
                f"{', '.join(list(names.values())[:3])}."
            )
        if bare := [name for key, name in names.items() if key not in best]:
            raise ValueError(f"no rule fits {', '.join(bare[:3])}. Add a default: '*'.")
        bound = copy.copy(self)
        object.__setattr__(bound, "chosen", {name: curvatures[best[key][1]] for key, name in names.items()})
        return bound

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if self.chosen is None:
            raise RuntimeError("Mixed has rules for modules and must be applied to a model first: mixed.on(model).")
        if missing := [name for name in block.names if name not in self.chosen]:
            raise RuntimeError(
                f"{', '.join(missing)} came to the model after the rules were applied to it. Make the optimizer anew."
            )
        first, *others = (self.chosen[name] for name in block.names)
        if any(other != first for other in others):
            which = ", ".join(f"{name}: {self.chosen[name]}" for name in block.names)
            raise ValueError(
                f"the parameters of block {block.name} form one block, but have different structures ({which}). Write "
                "rules for modules, or keep weight and bias apart with bias='separate'."
            )
        return first.estimator(block, form)


#: Sort of a rule that is a name or a glob.
BY_NAME = 1


def nearness(rule: Rule, name: str, model: nn.Module) -> tuple[int, int] | None:
    """How well a rule fits a parameter of a model: (sort of rule, depth of the module); ``None`` if not at all."""
    if rule == "*":
        return (0, 0)
    path = name.split(".")
    prefixes = [".".join(path[:depth]) for depth in range(len(path))]
    if isinstance(rule, str):
        fits = any(fnmatch.fnmatchcase(candidate, rule) for candidate in [*prefixes[1:], name])
        return (BY_NAME, 0) if fits else None
    for depth in reversed(range(len(prefixes))):
        module = model.get_submodule(prefixes[depth])
        if isinstance(rule, nn.Module) and module is rule:
            return (3, depth)
        if isinstance(rule, type) and isinstance(module, rule):
            return (2, depth)
    return None


def label(rule: Rule) -> str:
    """A rule as it is shown in messages."""
    if isinstance(rule, str):
        return repr(rule)
    return rule.__name__ if isinstance(rule, type) else f"the module {type(rule).__name__}"
