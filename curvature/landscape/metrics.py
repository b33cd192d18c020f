"""The numbers computed at each point: the loss, or others of a model and its data, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

#: A number of a model and its data; ``None`` stands for the loss.
Metric = Callable[[nn.Module, Any], Any]
Metrics = Metric | Mapping[str, Metric | None] | None


class ByMetric:
    """A result (a frozen dataclass) that holds numbers by the name of their metric, and shows one of them."""

    metrics: Mapping[str, Tensor]
    metric: str

    @property
    def values(self) -> Tensor:
        """The numbers of :attr:`metric`."""
        return self.metrics[self.metric]

    def of(self, metric: str) -> Self:
        """The same result, showing another of its metrics.

        Raises:
            KeyError: If the name is unknown.
        """
        if metric not in self.metrics:
            raise KeyError(f"there is no metric {metric!r}; there are {', '.join(self.metrics)}.")
        return replace(self, metric=metric)  # type: ignore[type-var]


def check_metric(name: str, value: Any) -> Any:
    """Refuse what is no metric, as :func:`by_name` does."""
    by_name(value)
    return value


def by_name(metric: Metrics) -> dict[str, Metric | None]:
    """The metrics of an argument ``metric=``.

    Raises:
        TypeError: If it is empty or holds something that cannot be called.
    """
    if metric is None:
        return {"loss": None}
    found = dict(metric) if isinstance(metric, Mapping) else {getattr(metric, "__name__", "metric"): metric}
    wrong = {name: value for name, value in found.items() if not (value is None or callable(value))}
    if wrong or not found:
        raise TypeError(
            f"metric must be a function of model and data, or a mapping of such functions (None for the loss), got "
            f"{wrong or metric!r}."
        )
    return {str(name): value for name, value in found.items()}
