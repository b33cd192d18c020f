"""The contracts of curvature: the choice of an estimate, and the estimate of one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from curvature.layers.block import Block
from curvature.layers.samples import Outer, PerSample, Samples
from curvature.losses.signals import FisherKind, check_kind
from curvature.structures.weighted_mean import WeightedMean, finite_each
from solvers import LinearOperator
from solvers.outcome.arguments import fields_of, number, whole
from solvers.precision import widen

Form = Literal["outer", "per_sample"]


class CurvatureEstimator(ABC):
    """The estimate of one block of C.

    A step calls :meth:`update` once per backward pass of each batch, then :meth:`commit` (or :meth:`discard`, if the
    step is skipped). :meth:`operator` is the current estimate.
    """

    #: Name of the structure in tables: what :meth:`operator` returns.
    structure: ClassVar[str]
    #: Whether the samples of a step wait as they are, and :meth:`prepare` sums them up.
    sums_late: ClassVar[bool] = False

    @property
    def averages_positions(self) -> bool:
        """Whether the positions of an example are averaged, so that samples must say which belong to one example."""
        return False

    @property
    def chooses_sharing(self) -> bool:
        """Whether the treatment of positions is left to the pass: only then somebody looks what its loss is like."""
        return False

    def chosen_sharing(self, use: Outer | PerSample, aggregated: bool) -> Literal["expand", "reduce"] | None:
        """What is chosen for the positions of a use, where that is left to the pass; ``None`` where it is not.

        Args:
            use: The use.
            aggregated: Whether the loss has one term for each example.
        """
        return None

    def __init__(self, block: Block) -> None:
        self.block = block

    @abstractmethod
    def update(self, samples: Samples) -> None:
        """Add the samples of one backward pass to the current step."""

    def count(self, weight: Tensor | float) -> None:
        """Count examples of the current step that did not reach the block: their gradients are zero."""
        raise NotImplementedError(
            f"block {self.block.name}: only some batches of this step or data set used it, which {type(self).__name__} "
            "does not serve. Take another structure, leave the block out with params=, or put the data in one batch."
        )

    def step_means(self) -> dict[str, WeightedMean]:
        """The means that hold sums of the current step, by name; sums add up over processes.

        Raises:
            NotImplementedError: If the estimate is not made of sums.
        """
        raise NotImplementedError(
            f"block {self.block.name}: {type(self).__name__} keeps the rows of its own batch, which do not add up over "
            "processes. Train in one process, or take a structure of sums ('kfac', 'ekfac', 'layer', 'diagonal')."
        )

    def step_mean(self, name: str) -> WeightedMean:
        """A mean by the name that :meth:`step_means` has for it where it holds something."""
        raise NotImplementedError

    def prepare(self, ema: float) -> bool:
        """Before :meth:`commit`, given the sums of all processes: add the sums that follow from them.

        Returns:
            Whether there are any, which are to be added over processes as well.
        """
        return False

    def shared(self) -> dict[str, Tensor]:
        """What every process needs of an estimate that others keep."""
        return {}

    def take_shared(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  (most need nothing)
        """Take what the process that keeps the estimate has published by :meth:`shared`."""

    @abstractmethod
    def commit(self, ema: float) -> None:
        r"""Fold the step into the running average, in which old values keep the weight ``ema`` (:math:`\beta`)."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the current step."""

    def mark(self) -> Any:
        """The current step as it is now, for :meth:`back_to`."""
        return {name: _marked(value) for name, value in vars(self).items()}

    def back_to(self, mark: Any) -> None:
        """Forget whatever the step has added since a mark."""
        vars(self).clear()
        vars(self).update({name: back() for name, back in mark.items()})

    @abstractmethod
    def finite(self) -> Tensor:
        """0-d bool tensor: the current step is free of NaN and inf."""

    def witnesses(self) -> list[Tensor]:
        """Numbers, 0-d, that are all finite if and only if the current step is :meth:`finite`."""
        return [torch.where(self.finite(), 0.0, torch.nan)]

    @property
    def stored(self) -> int:
        """Numbers the estimate keeps."""
        return self.block.numel

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether anything was ever committed."""

    def no_statistics(self) -> RuntimeError:
        """The error for an estimate that is read before the first commit."""
        return RuntimeError(f"block {self.block.name}: no statistics yet; run a forward and backward pass first.")

    @abstractmethod
    def operator(self) -> LinearOperator:
        """The current C, acting on tensors of the block's shape, in float32 or wider."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    def refresh_basis(self) -> None:  # noqa: B027  (most estimates have no basis)
        """Redo costly decompositions inside the estimate."""

    def means(self, also: Iterable[str] = ()) -> dict[str, WeightedMean]:
        """The means over examples that it is made of, by name, where it is made of such alone.

        Args:
            also: Names of means that are to be there, as those of the same block elsewhere.

        Raises:
            NotImplementedError: If it keeps something else of the data.
        """
        raise NotImplementedError(
            f"block {self.block.name}: {type(self).__name__} keeps more of the data than means, so it cannot be "
            "estimated over a process_group. Take another structure, such as 'kfac', 'ekfac', 'layer' or 'diagonal'."
        )

    def begin_passes(self) -> None:  # noqa: B027  (most estimates need a single pass and nothing to prepare)
        """Announce that a data set follows which can be seen again; training steps cannot."""

    def next_pass(self) -> bool:
        """After a pass over a data set: prepare another one over the same data; False when one was enough."""
        return False


_FIXED = frozenset({type(None), bool, int, float, str, Tensor, Block})


def _marked(value: Any) -> Callable[[], Any]:
    """A function that gives the value as it is now, whatever happens to means and containers in between."""
    if type(value) in _FIXED:  # most are, and matching takes longer
        return lambda: value
    match value:
        case WeightedMean() | CurvatureEstimator():
            mark = value.mark()

            def back() -> Any:
                value.back_to(mark)
                return value

            return back
        case list() | tuple():
            items, kind = [_marked(item) for item in value], type(value)
            return lambda: kind(item() for item in items)
        case dict():
            entries = {key: _marked(item) for key, item in value.items()}
            return lambda: {key: item() for key, item in entries.items()}
        case _ if is_dataclass(value) and not isinstance(value, type) and not value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            parts = {key: _marked(item) for key, item in vars(value).items()}
            return lambda: replace(value, **{key: item() for key, item in parts.items()})
    return lambda: value


class MeansEstimator(CurvatureEstimator):
    """An estimate made of named means over the examples; a part may also be a whole estimate.

    A subclass gives :attr:`names` and, for a function of means, :meth:`totals` and :meth:`of_means`. One with other
    parts makes them in its constructor, and has its own :meth:`update` and :meth:`operator`.
    """

    #: Names of the parts: attributes of the estimate, and keys of its state.
    names: ClassVar[tuple[str, ...]]

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        for name in self.names:
            setattr(self, name, WeightedMean(self.matrix_axes(name)))

    def matrix_axes(self, name: str) -> int | None:
        """Number of axes at which the sums of a mean are symmetric matrices; ``None`` where they never are."""
        return None

    def step_means(self) -> dict[str, WeightedMean]:
        found: dict[str, WeightedMean] = {}
        for name, part in zip(self.names, self.parts(), strict=True):
            if isinstance(part, CurvatureEstimator):
                found |= {f"{name}.{inner}": mean for inner, mean in part.step_means().items()}
            elif part.pending:
                found[name] = part
        return found

    def step_mean(self, name: str) -> WeightedMean:
        first, _, rest = name.partition(".")
        part = getattr(self, first)
        return part.step_mean(rest) if isinstance(part, CurvatureEstimator) else part

    def totals(self, samples: Samples) -> Iterable[Mapping[str, Tensor]]:
        """Contributions of the samples to the numerators of the means, by name; in one piece or several."""
        raise NotImplementedError

    def of_means(self, means: Mapping[str, Tensor]) -> LinearOperator:
        """The estimate for values of the means."""
        raise NotImplementedError

    def parts(self) -> list[WeightedMean | CurvatureEstimator]:
        """All means and estimates it is made of."""
        return [getattr(self, name) for name in self.names]

    def means(self, also: Iterable[str] = ()) -> dict[str, WeightedMean]:
        out: dict[str, WeightedMean] = {}
        for name, part in zip(self.names, self.parts(), strict=True):
            if isinstance(part, WeightedMean):
                out[name] = part
                continue
            inner = [other.removeprefix(f"{name}.") for other in also if other.startswith(f"{name}.")]
            out |= {f"{name}.{key}": mean for key, mean in part.means(inner).items()}
        return out

    @property
    def averages_positions(self) -> bool:
        return any(isinstance(part, CurvatureEstimator) and part.averages_positions for part in self.parts())

    @property
    def chooses_sharing(self) -> bool:
        return any(isinstance(part, CurvatureEstimator) and part.chooses_sharing for part in self.parts())

    def chosen_sharing(self, use: Outer | PerSample, aggregated: bool) -> Literal["expand", "reduce"] | None:
        estimates = (part for part in self.parts() if isinstance(part, CurvatureEstimator))
        return next((choice for part in estimates if (choice := part.chosen_sharing(use, aggregated))), None)

    def update(self, samples: Samples) -> None:
        weight = samples.weight if samples.first else 0.0
        for piece in self.totals(samples):
            for name, total in piece.items():
                getattr(self, name).add(samples.scaled(widen(total)), weight, own=True)
            weight = 0.0

    def count(self, weight: Tensor | float) -> None:
        for part in self.parts():
            part.count(weight)

    def commit(self, ema: float) -> None:
        for part in self.parts():
            part.commit(ema)

    def discard(self) -> None:
        for part in self.parts():
            part.discard()

    def finite(self) -> Tensor:
        witnesses = self.witnesses()
        return finite_each(witnesses).all() if witnesses else torch.tensor(True)

    def witnesses(self) -> list[Tensor]:
        means = [part.witness() for part in self.parts() if isinstance(part, WeightedMean) and part.pending]
        whole = [part.witnesses() for part in self.parts() if isinstance(part, CurvatureEstimator)]
        return [*means, *(number for part in whole for number in part)]

    @property
    def ready(self) -> bool:
        return all(part.ready for part in self.parts())

    def operator(self) -> LinearOperator:
        if not self.ready:
            raise self.no_statistics()
        return self.of_means({name: getattr(self, name).value for name in self.names})

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in zip(self.names, self.parts(), strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discard()
        for name, part in zip(self.names, self.parts(), strict=True):
            part.load_state_dict(state[name])


class MeanEstimator(MeansEstimator):
    """An estimate that is a function of one mean over the examples."""

    names = ("mean",)
    mean: WeightedMean

    @abstractmethod
    def total(self, samples: Samples) -> Tensor:
        """Contribution of the samples to the mean's numerator."""

    @abstractmethod
    def of_mean(self, value: Tensor) -> LinearOperator:
        """The estimate for a value of the mean."""

    def totals(self, samples: Samples) -> Iterable[Mapping[str, Tensor]]:
        return [{"mean": self.total(samples)}]

    def of_means(self, means: Mapping[str, Tensor]) -> LinearOperator:
        return self.of_mean(means["mean"])


@dataclass(frozen=True)
class Curvature(ABC):
    """The choice of an estimate: the matrix and its structure. One object serves all blocks.

    Attributes:
        kind: ``"exact"``, ``"mc"`` (sampled from the model) or ``"empirical"`` (from the targets).
        samples: Draws per batch for ``"mc"``.
    """

    #: Whether estimates read sums of gradients, which the roots of weights of several losses do not leave.
    sums_gradients: ClassVar[bool] = False
    kind: FisherKind = "mc"
    samples: int = 1

    def __new__(cls, *args: Any, **options: Any) -> Curvature:
        """Refuse an old name of an option, naming the new one."""
        if "max_factor" in options and any(field.name == "max_dim" for field in fields(cls)):
            raise TypeError(f"{cls.__name__} takes max_dim=, which was called max_factor before.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the options."""
        fields_of(self)
        for name in ("max_dim", "max_size"):
            whole(name, getattr(self, name, None), optional=True)
        number("max_ratio", getattr(self, "max_ratio", None), low=0, open_low=True, optional=True)
        check_kind(self.kind)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")

    #: What a training step must provide: ``"grad"``, ``"layers"`` or ``"closure"``.
    needs: ClassVar[str] = "layers"
    #: Whether weight and bias of a layer form one block.
    joint: ClassVar[bool] = True
    #: Passes over a data set.
    passes: ClassVar[int] = 1

    def on(self, model: nn.Module) -> Curvature:
        """This curvature for a model; one with rules for modules looks them up."""
        return self

    @abstractmethod
    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        """A fresh estimate for one block.

        Args:
            block: The block.
            form: ``"outer"`` for layers ``y = W a``; ``"per_sample"`` for all others.
        """
