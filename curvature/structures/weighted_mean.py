"""Averages that carry their weight."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.triangles import gram


def finite_each(witnesses: Sequence[Tensor]) -> Tensor:
    """Which of some 0-d numbers are finite, ``(k,)``; all are looked at together, on the device of the first."""
    kinds = {(n.device, n.dtype) for n in witnesses}
    if len(kinds) > 1:
        witnesses = [n.to(witnesses[0].device, torch.float64) for n in witnesses]
    return torch.isfinite(torch.stack(list(witnesses)))


_OTHER_SHAPE = (
    "an average of shape {} cannot take in statistics of shape {}. Go on with the options (max_dim, max_ratio) that it "
    "was saved with."
)


class _Mark:
    """What a mean was; while it is alive its tensors stay as they are."""

    def __init__(self, mean: WeightedMean) -> None:
        self.values = mean.value, mean.weight, mean._total, mean._since, mean._count
        self.rows = mean._rows, mean._factor


def waits(m: int, d: int) -> bool:
    """Whether m rows of d numbers wait as they are, because their product is longer to keep and to pass over."""
    return 2 * m <= d


def _times(total: Tensor, factor: Tensor | float) -> Tensor:
    """A fresh sum times a number, in place."""
    if isinstance(factor, Tensor):
        return total.mul_(factor.to(total))
    return total if factor == 1 else total.mul_(factor)


def _is_zero(count: Tensor | float) -> bool:
    """Whether a weight is zero; all means of a step have the same tensor as theirs, which is waited for once."""
    if not isinstance(count, Tensor) or count.is_inference():  # which has no version
        return not count
    known: tuple[int, bool] | None = getattr(count, "_was_zero", None)
    if known is None or known[0] != count._version:
        known = count._version, not bool(count)
        setattr(count, "_was_zero", known)  # noqa: B010
    return known[1]


class WeightedMean:
    r"""Mean of batches within a step, and exponential mean over steps, both with their exact weight.

    Within a step, ``add(total, weight)`` sums statistics and their weights, so that 1 x 32 and 4 x 8 examples give the
    same mean. ``commit(ema)`` folds the step in:

    .. math:: w' = \beta w + 1, \qquad m' = (\beta w m + \bar m_{step}) / w'

    With this weight the mean is unbiased from the first step on and has no memory of an initial value.

    A sum that is the Gram matrix of a few rows may wait as these rows (:meth:`add_rows`): their product is then made in
    the pass that makes the new mean, and there is no sum of the step beside the old mean and the new one.

    Args:
        matrix_axes: Number of axes at which a sum is a symmetric matrix on its last two; with fewer it is a diagonal.
    """

    #: Marks that may be alive.
    _marks: weakref.WeakSet[_Mark] | None = None
    #: Whether nobody else has the sum of the step, so that its mean can be made in its place.
    _own = False

    def __init__(self, matrix_axes: int | None = None) -> None:
        self.matrix_axes = matrix_axes
        self.value: Tensor | None = None
        self.weight = 0.0
        self._total: Tensor | None = None
        self._since: Tensor | None = None  # to be added to it, which a mark held
        self._rows: Tensor | None = None  # (m, d): the sum is `_factor` times their Gram matrix
        self._factor: Tensor | float = 1.0
        self._count: Tensor | float = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Without the marks, which are of the original."""
        return {name: value for name, value in vars(self).items() if name != "_marks"}

    def add(self, total: Tensor | None, weight: Tensor | float, own: bool = False) -> None:
        """Add a sum over some of the step's samples (``None``: only the weight) and the weight of those samples.

        With ``own`` it was made for this call, and nobody else will read it.
        """
        if total is not None:
            self._multiply()
            if self._total is None:
                self._total, self._own = total, own
            elif self._total.shape != total.shape:
                raise ValueError(_OTHER_SHAPE.format(tuple(self._total.shape), tuple(total.shape)))
            elif self._since is None and self._held(self._total):
                self._since = total
            elif self._since is None:
                self._total.add_(total)
            else:
                self._since = self._since + total if self._held(self._since) else self._since.add_(total)
        nothing = not isinstance(self._count, Tensor) and self._count == 0
        self._count = weight if nothing else self._count + weight

    def add_rows(self, rows: Tensor, weight: Tensor | float, factor: Tensor | float = 1.0) -> None:
        """Add ``factor`` times the Gram matrix of ``rows (m, d)``, which nobody may change from now on; and a weight.

        Args:
            rows: The rows; where they :func:`wait <waits>`, on the processor, which need not be asked for a factor.
            weight: Of the samples, as for :meth:`add`.
            factor: 0-d or a number.
        """
        if not self.pending and rows.device.type == "cpu" and waits(*rows.shape):
            self._rows, self._factor = rows.detach(), factor
            self._count = self._count + weight
        else:
            self.add(_times(gram(rows), factor), weight)

    def _multiply(self) -> None:
        """Rows that wait become the sum that they stand for."""
        if self._rows is not None:
            self._total, self._rows, self._own = _times(gram(self._rows), self._factor), None, True

    def mark(self) -> Any:
        """The mean and what waits to be committed, as they are now, for :meth:`back_to`.

        What is added while it is alive is kept apart, so that there is no third sum beside the two that are needed.
        """
        if self._since is not None and not self._held(self._total):
            self._join()
        if self._marks is None:
            self._marks = weakref.WeakSet()
        mark = _Mark(self)
        self._marks.add(mark)
        return mark

    def back_to(self, mark: Any) -> None:
        """Forget what was added or committed since a mark."""
        self.value, self.weight, self._total, self._since, self._count = mark.values
        self._rows, self._factor = mark.rows
        self._own = False

    def _held(self, sum_: Tensor | None) -> bool:
        """Whether a mark holds a sum, which must not change then."""
        return any(sum_ is held for mark in self._marks or () for held in mark.values[2:4])

    def _join(self) -> None:
        """One sum of the step."""
        if self._total is not None and self._since is not None:
            held = self._held(self._total)
            self._total = self._total + self._since if held else self._total.add_(self._since)
            self._since = None

    def count(self, weight: Tensor | float) -> None:
        """Count samples of the step whose statistics are zero."""
        self.add(None, weight)

    @property
    def ready(self) -> bool:
        """Whether anything was ever committed."""
        return self.value is not None

    @property
    def pending(self) -> bool:
        """Whether there are uncommitted statistics."""
        return self._total is not None or self._rows is not None

    def step_sum(self) -> tuple[Tensor, Tensor | float]:
        """Sum added since the last commit, and its weight; both add up over parts of the data."""
        self._multiply()
        if self._total is None:
            raise RuntimeError("nothing was added since the last commit.")
        self._join()
        self._own = False
        return self._total, self._count

    def take(self, total: Tensor, count: Tensor | float) -> None:
        """Put another sum and weight in the place of what was added since the last commit."""
        self._total, self._since, self._count, self._rows, self._own = total, None, count, None, False

    def step_mean(self) -> Tensor:
        """Mean of the statistics added since the last commit."""
        total, count = self.step_sum()
        return total if _is_zero(count) else total / count

    def witness(self) -> Tensor:
        """0-d: finite if and only if the uncommitted statistics are free of NaN and inf."""
        if self._rows is not None:
            total = torch.linalg.vector_norm(self._rows).square() * self._factor  # its trace
        elif self._total is None:
            return torch.zeros(())
        else:
            total = self._total.sum()  # one pass without temporaries: NaN and inf survive a sum
        total = total if self._since is None else total + self._since.sum()
        count = self._count
        if isinstance(count, float) and 0 < count < math.inf:
            return total
        nothing = (total == 0) & torch.as_tensor(count == 0)  # masked throughout
        return torch.where(nothing, total, total / count)

    def finite(self) -> Tensor:
        """0-d bool tensor: the uncommitted statistics are free of NaN and inf (no host sync)."""
        return torch.isfinite(self.witness())

    def commit(self, ema: float) -> None:
        """Fold the step's mean into the running mean; a step without data leaves it as it is.

        One whose data are all masked (an expert that only padding was sent to) has a sum, of no weight.
        """
        if not self.pending:
            return
        if self._commit_rows(ema):
            return
        self._multiply()
        assert self._total is not None
        if _is_zero(self._count):
            if self.value is None:  # zero until there are data, which then count alone
                self.value = torch.zeros_like(self._total)
            self.discard()
            return
        total, count = self._total.detach(), self._count  # the graph of a sum would live as long as the average
        if self._since is not None:
            mean = (total + self._since.detach()).div_(count)
        else:  # fresh memory takes longer than the division
            mean = total.div_(count) if self._alone() else total / count
        if self.value is not None and self.value.shape != mean.shape:
            if self.value.dim() != mean.dim() + 1 or self.value.shape[:-1] != mean.shape:
                raise ValueError(_OTHER_SHAPE.format(tuple(self.value.shape), tuple(mean.shape)))
            self.value = self.value.diagonal(dim1=-2, dim2=-1)  # a factor that was kept whole when it was saved
        old = ema * self.weight
        self.weight = old + 1.0
        if self.value is not None:  # a model may go on in another precision
            if self.value.dtype == mean.dtype:
                # Fresh memory costs more than the arithmetic: of large factors three times as much.
                mean = torch.lerp(self.value, mean, 1.0 / self.weight, out=mean)
            else:
                dtype = torch.promote_types(self.value.dtype, mean.dtype)
                mean = self.value.to(dtype).lerp(mean.to(dtype), 1.0 / self.weight)
        self.value = mean
        self.discard()

    def _alone(self) -> bool:
        """Whether the mean can be made in the place of the sum."""
        total = self._total
        if total is None or not self._own or self._held(total) or total.requires_grad or total.is_inference():
            return False
        return total.dim() > 0 and total.is_floating_point() and total.is_contiguous()

    def _commit_rows(self, ema: float) -> bool:
        """:meth:`commit` of rows that wait, in one product with the mean; whether that was possible."""
        rows, before, count = self._rows, self.value, float(self._count) if self._rows is not None else 0.0
        if rows is None or before is None or not count:
            return False
        if before.dtype != rows.dtype or before.shape != (rows.shape[1],) * 2:
            return False
        old = ema * self.weight
        self.weight = old + 1.0
        share = 1.0 / self.weight
        # A factor of the product would go to one side of it, and the mean would not be symmetric to the last bit.
        factor = share * float(self._factor) / count
        rows = rows * math.sqrt(abs(factor))
        self.value = torch.addmm(before, rows.mT, rows, beta=1.0 - share, alpha=math.copysign(1.0, factor))
        self.discard()
        return True

    def discard(self) -> None:
        """Forget the uncommitted statistics."""
        self._total, self._since, self._count, self._rows, self._factor = None, None, 0.0, None, 1.0
        self._own = False

    def state_dict(self) -> dict[str, Tensor | float]:
        """Tensors and numbers, without the uncommitted statistics."""
        return {"weight": self.weight} if self.value is None else {"weight": self.weight, "value": self.value}

    def load_state_dict(self, state: dict[str, Tensor | float]) -> None:
        """Restore :meth:`state_dict`."""
        self.discard()
        self.weight = float(state["weight"])
        value = state.get("value")
        self.value = value if isinstance(value, Tensor) else None
