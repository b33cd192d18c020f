"""Adaptation of the damping to how well the quadratic model predicts the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Raise the damping where the model promises too much, lower it where the model is trustworthy.

    With the reduction ratio :math:`\rho`, the change of the loss over the change the undamped model predicts:

    .. math:: \lambda \leftarrow a \lambda \text{ if } \rho > \tfrac34, \qquad
        \lambda \leftarrow b \lambda \text{ if } \rho < \tfrac14 \text{ or not a number}

    Args:
        decrease: a, in (0, 1].
        increase: b, at least 1.
        lower: Ratio below which the damping is raised.
        upper: Ratio above which it is lowered.
        minimum: Smallest damping, in units of C.
        relative_minimum: The same as a fraction of the mean eigenvalue of C, where the optimizer keeps an estimate of
            C (layer-based methods). The ratio of a batch that C was estimated from says nothing of other batches: it
            would drive the damping down until the run stalls.
        maximum: Largest damping.
        attempts: Steps that may be rejected before the parameters stay where they are.

    Raises:
        ValueError: If a value is out of range.

    References:
        Marquardt (1963); Martens (2010), section 4.1
    """

    decrease: float = 1 / 3
    increase: float = 3.0
    lower: float = 0.25
    upper: float = 0.75
    minimum: float = 1e-15
    relative_minimum: float = 1e-4
    maximum: float = 1e15
    attempts: int = 12

    def __post_init__(self) -> None:
        """Check the border."""
        if not 0 < self.decrease <= 1 <= self.increase:
            raise ValueError(f"need 0 < decrease <= 1 <= increase; got {self.decrease} and {self.increase}.")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"need 0 < minimum <= maximum; got {self.minimum} and {self.maximum}.")
        if not 0 <= self.relative_minimum < float("inf"):
            raise ValueError(f"relative_minimum must be non-negative and finite; got {self.relative_minimum}.")
        if not self.lower <= self.upper:
            raise ValueError(f"need lower <= upper; got {self.lower} and {self.upper}.")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1; got {self.attempts}.")

    def raised(self, damping: float) -> float:
        """More damping, from the smallest on."""
        return min(max(damping, self.minimum) * self.increase, self.maximum)

    def adapted(self, damping: float, ratio: float, mean: float = 0.0) -> float:
        """The next damping.

        Args:
            damping: The present one.
            ratio: The reduction ratio.
            mean: Mean eigenvalue of C, 0 where it is not known.
        """
        if ratio > self.upper:
            return max(damping * self.decrease, self.minimum, min(damping, self.relative_minimum * mean))
        if ratio >= self.lower:
            return damping
        return self.raised(damping)
