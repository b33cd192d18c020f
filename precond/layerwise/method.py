"""Base of the named layer-based methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, TypedDict

from torch import nn
from torch.distributed import ProcessGroup

from curvature import Curvature
from curvature.losses.signals import KINDS
from curvature.structures.kfac import Sharing
from precond.layerwise.optimizer import PreconditionedOptimizer
from precond.layerwise.quadratic_model import QuadraticModel
from precond.layerwise.structures import Structures, with_structures
from precond.step.adapt import LevenbergMarquardt
from precond.step.adaptive_rate import AdaptiveRate
from precond.step.loop import Loop
from precond.step.options import WeightDecay
from precond.step.schedules import Scheduled
from solvers.outcome.arguments import choice


class LayerwiseOptions(TypedDict, total=False):
    """Options that the named layer-based methods share; explained at :class:`LayerwiseMethod`."""

    weight_decay: Scheduled | WeightDecay
    adaptive_rate: AdaptiveRate | None
    step_size: QuadraticModel | None
    damping_rule: LevenbergMarquardt | None
    structures: Structures | None
    params: Any
    maximize: bool
    loop: Loop
    process_group: ProcessGroup | None
    memory_fraction: float


class LayerwiseMethod(PreconditionedOptimizer):
    """A :class:`PreconditionedOptimizer` with one curvature for all layers, and others where ``structures`` says so.

    Args:
        model: The model that is trained.
        loss_fn: The loss module the loop calls.
        curvature: Of all layers that ``structures`` does not name.
        structures: ``{layers: structure}`` for parts of the model. Layers are a module, a class of modules, or a name
            or glob of modules or parameters, as for :class:`~curvature.Mixed`. A structure is a name (``"layer"``); a
            curvature object; a dict of options that differ from those of ``curvature``, as ``{"head": {"sharing":
            "reduce"}}``; an :class:`~precond.AdamStep` for Adam's step; or ``None`` for the plain gradient, with the
            momentum, decay and learning rate of its group (as ``skip_layers`` of kfac-pytorch): natural-gradient
            learning rates seldom suit it, so give it a group.
        options: See :class:`PreconditionedOptimizer`.
    """

    #: Meaning of a name as ``fisher``; by ``structure`` where that is a choice.
    fisher_types: ClassVar[Mapping[str | None, type[Curvature]]] = {}

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        *,
        curvature: Curvature,
        structures: Structures | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, curvature=with_structures(curvature, structures), **options)

    @staticmethod
    def sharing_of(fisher: str | Curvature, sharing: Sharing | None) -> Sharing | None:
        """The sharing that is meant: without one ``"auto"``, or that of a ``fisher`` that is an object (``None``)."""
        return "auto" if sharing is None and isinstance(fisher, str) else sharing

    def curvature_of(self, fisher: str | Curvature, structure: str | None = None, **plain: Any) -> Curvature:
        """The curvature that ``fisher=`` means.

        Args:
            fisher: A kind of Fisher by its name, or an object of the type that the method is made for.
            structure: One of :attr:`fisher_types`, where that is a choice.
            plain: Fields that are also options of the method; those options apply where the object has the default,
                and ``None`` leaves a field to the object.

        Raises:
            TypeError: If an object is of another type.
            ValueError: If the object and an option say different things.
        """
        me, made = type(self).__name__, self.fisher_types[structure]
        if isinstance(fisher, str):
            kind: Any = choice("fisher", fisher, KINDS)
            return made(kind, **plain)
        if type(fisher) is not made:
            raise TypeError(
                f"{me}: fisher is 'exact', 'mc', 'empirical' or {made.__name__}(...), not {fisher!r}; "
                "PreconditionedOptimizer(curvature=...) takes any."
            )
        changes = {}
        for field in fields(made):
            own, other = getattr(fisher, field.name), plain.get(field.name, field.default)
            other = own if other is None else other
            if field.default not in (own, other) and own != other:
                raise ValueError(f"{me}: {field.name} is {other!r}, but {own!r} in {fisher!r}; give one value.")
            if own == field.default != other:
                changes[field.name] = other
        return replace(fisher, **changes)
