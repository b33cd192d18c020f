"""Averages of the parameters over the steps, and evaluation under them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvature.model.wrappers import unwrapped_optimizer
from solvers.outcome.arguments import instance, number
from solvers.precision import working_dtype


@torch.no_grad()
def update_average(average: Tensor, value: Tensor, decay: float, step: int) -> None:
    r"""Fold a value into an exponential average that is unbiased from the first step on, in place.

    .. math:: a_t = a_{t-1} + \frac{1 - \beta}{1 - \beta^t} (\theta_t - a_{t-1})
    """
    average.lerp_(value.to(average.dtype), (1 - decay) / (1 - decay**step))


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the block each parameter holds the value beside it; its own afterwards, exceptions included."""
    pairs = list(pairs)
    own = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for p, value in pairs:
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(pairs, own, strict=True):
                p.copy_(value)


class IterateAverage:
    r"""Debiased exponential average of the iterates of any ``torch.optim`` optimizer.

    .. math:: \bar\theta_t = \frac{(1 - \beta) \sum_{s \le t} \beta^{t - s} \theta_s}{1 - \beta^t}

    The average is often better than the last iterate, by as much as a decayed learning rate would gain. Watches
    ``optimizer.step()``; costs one pass over the parameters and one copy of them, in float32 at least.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> average = IterateAverage(optimizer, decay=0.5)
        >>> for _ in range(2):
        ...     p.grad = torch.tensor([1.0])
        ...     optimizer.step()
        >>> with average.applied():
        ...     print(round(p.item(), 4))
        -0.6667
        >>> p.item()
        -1.0

    Args:
        optimizer: Whose steps to average; in a trainer's wrapper or not.
        decay: :math:`\beta`, in [0, 1).

    Raises:
        ValueError: If the decay is out of range.

    References:
        Polyak and Juditsky (1992); Martens and Grosse (2015), section 14, https://arxiv.org/abs/1503.05671
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.99) -> None:
        optimizer = unwrapped_optimizer(optimizer)
        instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        number("decay", decay, low=0, high=1, open_high=True, unit="It is the weight of the old average.")
        self.optimizer, self.decay, self.steps = optimizer, decay, 0
        self._averages: dict[Tensor, Tensor] = {}
        self._handle = optimizer.register_step_post_hook(self._update)

    def _update(self, *_: Any) -> None:
        self.steps += 1
        for p in self._params():
            if p not in self._averages:  # the first step, or a parameter added later
                self._averages[p] = p.detach().to(working_dtype(p), copy=True)
            update_average(self._averages[p], p.detach(), self.decay, self.steps)

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextmanager
    def applied(self, share: float = 1.0) -> Iterator[None]:
        r"""Within the block the parameters hold their averages, or a blend :math:`(1 - s) \theta + s \bar\theta`.

        At the end of a schedule the last iterates are good already, and a part of the average is better than all of it.

        Args:
            share: s, in [0, 1]; Track 3 of modded-nanogpt has 0.65
                (https://github.com/KellerJordan/modded-nanogpt/pull/328).

        Raises:
            RuntimeError: If no step was taken yet.
        """
        number("share", share, low=0, high=1)
        if not self._averages:
            raise RuntimeError("there is no average before the first step of the optimizer.")
        pairs = self._averages.items()
        blends = ((p, a if share == 1 else torch.lerp(p.detach().to(a.dtype), a, share)) for p, a in pairs)
        with swapped(blends):
            yield

    def close(self) -> None:
        """Stop watching; the average stays."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, parameters by their place in the groups."""
        averages = {i: self._averages[p] for i, p in enumerate(self._params()) if p in self._averages}
        return {"steps": self.steps, "decay": self.decay, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        params = self._params()
        self.steps, self.decay = int(state_dict["steps"]), float(state_dict["decay"])
        self._averages = {
            params[int(i)]: value.detach().clone().to(params[int(i)].device)
            for i, value in state_dict["averages"].items()
        }
