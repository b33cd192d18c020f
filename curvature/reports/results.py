"""The contents of a report: plain numbers, each with its error."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from curvature.estimation.coverage import Coverage

Matrix = str
"""``"hessian"`` or ``"ggn"``."""


@dataclass(frozen=True)
class Number:
    """A number with its error.

    Attributes:
        value: The number.
        error: Standard error: the truth lies within ``value +- 2 error`` in 95 % of runs. 0 where the value is exact
            up to rounding.
        samples: Random vectors, or examples, it rests on; 0 for exact numbers.
    """

    value: float
    error: float = 0.0
    samples: int = 0

    @property
    def exact(self) -> bool:
        """Whether rounding is the only error."""
        return self.error == 0


@dataclass(frozen=True)
class LossResult:
    """The loss and its gradient over all the data; exact.

    Attributes:
        value: The loss L of all the data as one batch.
        gradient_norm: Euclidean norm of its gradient.
        batches: Number of batches.
    """

    value: float
    gradient_norm: float
    batches: int


@dataclass(frozen=True)
class NoiseResult:
    r"""Gradients of single examples, scaled so that their mean is the gradient of the loss.

    Attributes:
        examples: Number N of examples.
        percentiles: Percentiles 0, 1, ..., 100 of their norms.
        largest: ``(number of the example in the order of the data, norm)`` of the longest ones; empty where that order
            is drawn anew in each pass.
        covariance_trace: Trace of the examples' covariance, with divisor N - 1.
        squared_gradient: Unbiased estimate of the squared norm of the expected gradient,
            :math:`|\bar g|^2 - \operatorname{tr} \Sigma / N`. It can come out negative.
        scale: Their ratio, the simple noise scale in examples; None if the gradient is lost in the noise.
    """

    examples: int
    percentiles: tuple[float, ...]
    largest: tuple[tuple[int, float], ...]
    covariance_trace: Number
    squared_gradient: Number
    scale: Number | None


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue.

    Attributes:
        value: Its estimate.
        residual: An eigenvalue lies within this distance of ``value``.
        converged: Whether the residual meets the tolerance.
        gradient_share: Share of the squared gradient along its eigenvector, between 0 and 1.
    """

    value: float
    residual: float
    converged: bool
    gradient_share: float


@dataclass(frozen=True)
class EigenvaluesResult:
    """Eigenvalues at the ends of the spectrum.

    Attributes:
        largest: The largest ones, descending.
        smallest: The smallest ones, ascending; empty where they were not computed.
        complete: Whether the search for the largest ended. If not, the values are near eigenvalues, but larger ones may
            exist.
        smallest_complete: The same for the smallest.
        alignment: Share of the squared gradient within the space of the largest ones; its error is a bound, from the
            residuals over the gap to the next eigenvalue. None for a zero gradient, or without
            time for all of them.
        products: Products spent.
    """

    largest: tuple[Eigenvalue, ...]
    smallest: tuple[Eigenvalue, ...]
    complete: bool
    smallest_complete: bool
    alignment: Number | None
    products: int

    @property
    def converged(self) -> bool:
        """Whether all pairs have converged and the searches at both ends are complete."""
        return (
            self.complete and self.smallest_complete and all(pair.converged for pair in (*self.largest, *self.smallest))
        )


@dataclass(frozen=True)
class TraceResult:
    """Sums over the matrix.

    Attributes:
        trace: Sum of the eigenvalues.
        frobenius: Root of the sum of their squares.
        layers: Trace of each layer's diagonal block.
        products: Products spent.
    """

    trace: Number
    frobenius: Number
    layers: dict[str, Number]
    products: int


@dataclass(frozen=True)
class Condition:
    """The condition number of ``C + damping I``, between two bounds.

    Attributes:
        low: At least this.
        high: At most this, if the largest eigenvalue was not missed.
        damping: The shift.
    """

    low: float
    high: float
    damping: float


@dataclass(frozen=True)
class DensityResult:
    r"""The spectral density, and numbers that follow from it.

    Attributes:
        grid: Points, in units of the matrix.
        density: Density at the points; its integral is one.
        stderr: Standard error at each point.
        width: Width of the Gaussian that smooths it; finer detail is not resolved.
        samples: Random vectors; 0 where it comes from all eigenvalues.
        effective_dimension: :math:`\operatorname{tr} C (C + \lambda I)^{-1}` for the damping; None for a matrix that
            is not positive semi-definite.
        damping: :math:`\lambda`.
        condition: Of ``C + damping I``; None for a matrix that is not positive semi-definite.
        products: Products spent.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    stderr: tuple[float, ...]
    width: float
    samples: int
    effective_dimension: Number | None
    damping: float
    condition: Condition | None
    products: int


@dataclass(frozen=True)
class LayersResult:
    """The largest eigenvalue of each layer's diagonal block.

    Attributes:
        largest: By layer; those that the budget did not reach are missing.
        products: Products spent.
    """

    largest: dict[str, Eigenvalue]
    products: int


@dataclass(frozen=True)
class Distance:
    r"""How far a structure is from the GGN, :math:`|S - G|_F / |G|_F`.

    Attributes:
        kind: "exact", or "mc" where the structure was estimated from sampled gradients, whose noise then counts.
        whole: Over the whole matrix, blocks off the diagonal included.
        layers: Over each layer's diagonal block; layers without curvature are missing.
    """

    kind: str
    whole: Number
    layers: dict[str, Number]


@dataclass(frozen=True)
class DistancesResult:
    """Distances of structures to the GGN.

    Attributes:
        structures: By structure.
        products: Products spent.
    """

    structures: dict[str, Distance]
    products: int


@dataclass(frozen=True)
class Refusal:
    """A part that could not be computed.

    Attributes:
        part: Section, and matrix or structure.
        error: Class of the error.
        message: Its message.
    """

    part: str
    error: str
    message: str


@dataclass(frozen=True)
class Cost:
    """Predicted and actual cost of a section.

    Attributes:
        part: Section and matrix.
        predicted: In the unit of the budget, by default seconds.
        seconds: Seconds.
        products: Products, counted in vectors.
    """

    part: str
    predicted: float
    seconds: float
    products: float


@dataclass(frozen=True)
class SensitivityResult:
    """Predicted increase of the loss when one layer's weights are rounded to so many bits, the others left alone.

    Attributes:
        bits: Numbers of bits.
        layers: ``{parameter: increases}``, as many as there are bits.
        kind: Kind of the K-FAC Fisher that predicts them.
    """

    bits: tuple[int, ...]
    layers: dict[str, tuple[float, ...]]
    kind: str


#: Section -> its contents.
RESULTS: dict[str, type] = {
    "loss": LossResult,
    "coverage": Coverage,
    "eigenvalues": EigenvaluesResult,
    "trace": TraceResult,
    "noise": NoiseResult,
    "density": DensityResult,
    "distances": DistancesResult,
    "layers": LayersResult,
    "sensitivity": SensitivityResult,
}
#: Sections that are made only where they are asked for.
ON_REQUEST = ("sensitivity",)


@dataclass(frozen=True)
class Setting:
    """What the numbers belong to: the state of the model, the data, and the software.

    Attributes:
        mode: "eval", "train", or both with the number of modules in each.
        dtype: Of the parameters.
        device: Of the parameters, by name where it has one.
        examples: Number of examples; None where the loss does not tell them apart.
        data: A number that adds up over the examples: equal for equal data, in whatever order and batches.
        kinds: Class of the module of each layer.
        versions: Of the software, by name.
        lr: Learning rate that the eigenvalues are compared with; None where it was not given.
    """

    mode: str
    dtype: str
    device: str
    examples: int | None
    data: float
    kinds: dict[str, str]
    versions: dict[str, str]
    lr: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The curvature of one loss of one model: the contents of a report.

    Attributes:
        model: Class of the model.
        loss_fn: The loss.
        parameters: Number of parameters.
        layers: Number of parameters of each module that owns some.
        loss: Loss and gradient.
        coverage: Which curvature every parameter can get.
        noise: Gradients of single examples.
        eigenvalues: By matrix.
        traces: By matrix.
        densities: By matrix.
        distances: Of structures to the GGN.
        layer_eigenvalues: By matrix.
        formed: Matrices that were formed, so that their numbers are exact.
        refused: Parts that could not be computed, and why.
        cut: Parts that the budget did not reach.
        notes: Other remarks.
        costs: Cost of each part.
        budget: The budget in words; None without one.
        seconds: Time spent in all.
        peak_memory: Bytes in use at most, of the process or of the accelerator; None if unknown.
        k: How many of the largest eigenvalues were asked for.
        damping: The damping that effective dimension and condition belong to.
        rtol: Relative residual asked for.
        seed: Of the random vectors.
        created: Date and time.
        sensitivity: Of the loss to rounding, by layer; only where it was asked for.
        setting: What the numbers belong to; None in files of versions that did not say.
        eigenvectors: Of the largest eigenvalues, ``(k, P)`` by matrix; not in JSON.
        writes: Whether this process writes the files that all are asked for; one of several does.
    """

    model: str
    loss_fn: str
    parameters: int
    layers: dict[str, int]
    loss: LossResult
    coverage: Coverage | None
    noise: NoiseResult | None
    eigenvalues: dict[Matrix, EigenvaluesResult]
    traces: dict[Matrix, TraceResult]
    densities: dict[Matrix, DensityResult]
    distances: DistancesResult | None
    layer_eigenvalues: dict[Matrix, LayersResult]
    formed: tuple[Matrix, ...]
    refused: tuple[Refusal, ...]
    cut: tuple[str, ...]
    notes: tuple[str, ...]
    costs: tuple[Cost, ...]
    budget: str | None
    seconds: float
    peak_memory: int | None
    k: int
    damping: float
    rtol: float
    seed: int
    created: str
    sensitivity: SensitivityResult | None = None
    setting: Setting | None = None
    eigenvectors: dict[Matrix, Tensor] = field(default_factory=dict, repr=False)
    writes: bool = field(default=True, repr=False)
