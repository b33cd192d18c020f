"""Results of estimators and the rule that stops them: means, standard errors and tolerances.

Statistics are float64 for every operator: the square of 1e30 overflows float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf, inf, sqrt

import torch
from torch import Tensor

from solvers.operators.decompositions import power_of_two
from solvers.operators.linear_operator import LinearOperator
from solvers.outcome.arguments import choice, number, whole
from solvers.outcome.errors import NonFiniteError
from solvers.outcome.finite import is_finite
from solvers.outcome.progress import progress_bar
from solvers.outcome.solution import OnFailure, not_converged
from solvers.precision import working_dtype

# Fewer samples than these cannot show that a tolerance is met.
_FEWEST = 20
_TWO_SIGMA = (1 + erf(sqrt(2))) / 2  # the normal distribution below two standard deviations


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its error.

    Attributes:
        value: The estimate, 0-d (or shaped as what is estimated).
        stderr: Standard error of ``value``, shaped alike; 0 where it is exact. For few samples it is widened as
            Student's t is, so that the truth lies within ``value +- 2 stderr`` in 95 % of runs, however many the
            samples. Where a single eigenvalue makes up the number, the estimates are skewed, and ten samples cover some
            87 %, a hundred 95 %. Infinite for a single sample, which has no error estimate.
        samples: Random samples that were spent, as the estimator counts them; 0 where the value is exact.
        products: Products with the operator that were spent, counted in vectors.
        systematic: The part of ``stderr`` that more samples do not reduce (quadrature); 0 for unbiased estimates.
    """

    value: Tensor
    stderr: Tensor
    samples: int
    products: int
    systematic: Tensor

    def __repr__(self) -> str:
        """The number with its error."""
        if self.value.ndim:
            return f"Estimate({tuple(self.value.shape)}, samples={self.samples}, products={self.products})"
        value, stderr = float(self.value), float(self.stderr)
        return f"Estimate({value:.6g} +- {stderr:.2g}, samples={self.samples}, products={self.products})"


class Mean:
    """Running mean of independent samples and its standard error, by chunks (Chan, Golub and LeVeque, 1983).

    Kept in units of the first samples, whose squares may leave the floating range of float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self._unit = torch.zeros((), dtype=torch.float64)  # zero until a sample is not
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # summed squared distances from the mean

    def add(self, samples: Tensor) -> None:
        """Take in ``samples (count, *shape)``."""
        samples = samples.double()
        self._unit = self._unit.to(samples.device)
        here = power_of_two(samples.reshape(1, -1))[0, 0]
        self._unit = torch.where(self._unit == 0, torch.where((samples != 0).any(), here, 0), self._unit)
        samples = samples / torch.where(self._unit == 0, 1, self._unit)
        count, mean = samples.shape[0], samples.mean(0)
        squares = (samples - mean).square().sum(0)
        total = self.count + count
        if self.count:
            gap = mean - self._mean
            squares = squares + self._squares + gap.square() * (self.count * count / total)
            mean = self._mean + gap * (count / total)
        self.count, self._mean, self._squares = total, mean, squares

    @property
    def value(self) -> Tensor:
        """The mean."""
        return self._mean * self._unit

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, widened for few samples; infinite for one."""
        if self.count < 2:
            return torch.full_like(self._mean, inf)
        return widening(self.count) * (self._squares / (self.count * (self.count - 1))).sqrt() * self._unit


def widening(count: int) -> float:
    """Factor for the standard error of ``count`` samples: two of the result hold the truth as two sigma would."""
    from scipy.special import stdtrit  # heavy, and needed by estimates alone

    return float(stdtrit(count - 1, _TWO_SIGMA)) / 2


@dataclass(frozen=True)
class Goal:
    """How exact an estimate is to be, and how much it may cost.

    Args:
        samples: Samples to take; with a tolerance, the fewest.
        rtol: Standard error wanted, relative to the value; for a tensor both in root mean square.
        atol: Standard error wanted at least, absolute.
        max_samples: Samples at most, with a tolerance.
        on_failure: Whether to "warn" or to "raise" if the tolerance is not met.

    Raises:
        ValueError: If a number is out of range.
    """

    samples: int
    rtol: float | None = None
    atol: float | None = None
    max_samples: int = 10_000
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        """Validate the arguments."""
        whole("samples", self.samples)
        number("rtol", self.rtol, low=0, optional=True)
        number("atol", self.atol, low=0, optional=True)
        whole("max_samples", self.max_samples)
        if self.has_tolerance and self.max_samples < self.first:
            raise ValueError(
                f"max_samples={self.max_samples} is below the {self.first} samples that are taken before the tolerance "
                "is looked at. Allow more, or ask for fewer samples."
            )
        choice("on_failure", self.on_failure, OnFailure)

    @property
    def has_tolerance(self) -> bool:
        """Whether the number of samples depends on the error."""
        return self.rtol is not None or self.atol is not None

    @property
    def first(self) -> int:
        """Samples to take before the first check of the error."""
        return max(self.samples, _FEWEST) if self.has_tolerance else self.samples

    @property
    def most(self) -> int:
        """Samples at most."""
        return self.max_samples if self.has_tolerance else self.samples

    def less(self, spent: int) -> Goal:
        """The goal for what is left after ``spent`` samples."""
        return Goal(
            max(1, self.samples - spent), self.rtol, self.atol, max(self.max_samples - spent, _FEWEST), self.on_failure
        )

    def excess(self, value: Tensor, stderr: Tensor) -> float:
        """Standard error over tolerance; the goal is reached at 1 or below, and always without a tolerance."""
        if not self.has_tolerance or value.numel() == 0:
            return 0.0
        error = _rms(stderr)
        tolerance = max((self.rtol or 0.0) * _rms(value), self.atol or 0.0)
        if error == 0:
            return 0.0
        return error / tolerance if tolerance > 0 else inf

    def next_count(self, count: int, value: Tensor, stderr: Tensor) -> int:
        """Number of samples at the next check; ``count`` if they are good enough, or not finite."""
        excess = self.excess(value, stderr)
        if not excess > 1:
            return count
        # Frequent checks would stop on a lucky low error. The error falls as the root of the number of samples.
        wanted = min(max(1.25, 1.05 * excess**2), 4.0) * count
        return min(int(wanted) + 1, self.most)


def _rms(x: Tensor) -> float:
    """Root mean square, also of numbers whose squares leave the floating range."""
    x = x.double()
    unit = power_of_two(x.reshape(1, -1))[0, 0]
    return float((x / unit).square().mean().sqrt() * unit)


def average(
    draw: Callable[[int], Tensor],
    goal: Goal,
    batch: int,
    description: str,
    progress: bool | None = None,
    read: Callable[[Mean], tuple[Tensor, Tensor]] | None = None,
) -> Mean:
    """Mean of independent samples, as many as the goal asks for.

    The error is checked, and read back from an accelerator, only at geometrically growing numbers of samples.

    Args:
        draw: Gives that many samples ``(count, *shape)``.
        goal: When to stop.
        batch: Samples to draw at once.
        description: What is running, for the progress bar.
        progress: True shows a progress bar, False never, None after a second.
        read: Gives the result and its error from the mean; by default the mean's own.
    """
    mean = Mean()
    count = goal.first
    with progress_bar(goal.most, description, progress) as bar:
        while mean.count < count:
            while mean.count < count:
                size = min(batch, count - mean.count)
                mean.add(draw(size))
                bar.update(size)
            value, stderr = (mean.value, mean.stderr) if read is None else read(mean)
            count = goal.next_count(mean.count, value, stderr)
    return mean


def conclude(
    name: str,
    op: LinearOperator,
    goal: Goal,
    value: Tensor,
    stderr: Tensor,
    *,
    samples: int,
    products: int,
    systematic: Tensor | None = None,
    mend: str = "Allow more max_samples, or a larger tolerance.",
) -> Estimate:
    """The estimate in the dtype of the operator, once it is finite and its tolerance has been judged.

    Args:
        name: What was estimated, for messages.
        op: The operator.
        goal: What was asked for.
        value: The estimate, float64.
        stderr: Its statistical error.
        samples: Samples spent.
        products: Products spent.
        systematic: Error beside the statistical one, added in quadrature.
        mend: Advice for the case that the tolerance is missed.

    Raises:
        NonFiniteError: If the estimate is NaN or infinite.
        NotConvergedError: If the tolerance is not met and the goal says so; otherwise it is a warning.
    """
    systematic = torch.zeros_like(stderr) if systematic is None else systematic
    stderr = torch.hypot(stderr, systematic)
    require_finite(name, op, value)
    excess = goal.excess(value, stderr)
    if excess > 1:
        error = _rms(stderr)
        not_converged(
            f"{name} of {op!r} has the standard error {error:.3g} after {samples} samples, {excess:.3g} times what was "
            f"asked for. {mend}",
            goal.on_failure,
            4,
        )
    dtype = working_dtype(op)
    return Estimate(value.to(dtype), stderr.to(dtype), samples, products, systematic.to(dtype))


def exact(name: str, op: LinearOperator, value: Tensor, products: int = 0) -> Estimate:
    """An estimate without error."""
    require_finite(name, op, value)
    value = value.detach().to(working_dtype(op))
    zero = torch.zeros_like(value)
    return Estimate(value, zero, 0, products, zero)


def require_finite(name: str, op: LinearOperator, value: Tensor) -> None:
    """Refuse NaN and infinity by the operator's name."""
    if not is_finite(value):
        raise NonFiniteError(
            f"{name} of {op!r} is not finite: the operator holds NaN or infinity, or overflows {op.dtype}. Leave the "
            "batch that caused it out, or use float64."
        )
