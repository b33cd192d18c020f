"""Fits of laplace-torch's posteriors to data that are shared out over processes.

``backend_kwargs={"process_group": group}`` makes the loader of each process its share of the data. What a fit adds up
over batches it adds up over processes, so that all of them end with the posterior of all data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from laplace import LowRankLaplace
from laplace.baselaplace import ELLA, VaLLA
from torch import Tensor

from curvature.laplace.backends.shared_sums import over_processes
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.parametric.adopted import in_front_of

Plain = Callable[..., Any]


@contextmanager
def shared_fit(la: Any, train_loader: Any, override: bool) -> Iterator[None]:
    """A fit, inside: an error in one process is one in all of them.

    Raises:
        ValueError: If a process has no data, or a posterior is to be extended.
    """
    shares = la.backend.shares
    if not shares.several:
        yield
        return
    if not override:
        raise ValueError(
            "override=False extends the posterior of one process. With process_group= fit to all data at once, or "
            "leave process_group out."
        )
    with shares.together():
        if not len(train_loader):
            raise ValueError("train_loader has no batches in this process: fit needs data in each of them.")
        yield


def add_processes(la: Any) -> None:
    """Add up what a fit has added up over batches: the curvature, the loss, and the number of examples."""
    shares, device = la.backend.shares, la.mean.device
    if not shares.several:
        return
    numbers = {"loss": torch.as_tensor(la.loss, device=device), "examples": torch.tensor(la.n_data, device=device)}
    dense = {"curvature": la.H} if isinstance(la.H, Tensor) else {}
    found = shares.add_up(numbers | dense, device)
    la.loss, la.n_data = found["loss"], int(found["examples"])
    if isinstance(la.H, BlockKron):
        la.H = over_processes(la.H, shares, device)
    else:
        la.H = found["curvature"]


@in_front_of(LowRankLaplace)
def fit(la: Any, plain: Plain, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
    """Fit; the backend has the eigenvectors of all data."""
    with shared_fit(la, train_loader, override):
        plain(train_loader, override=override, progress_bar=progress_bar)
    la.n_data = sum(la.backend.shares.gather(la.n_data))


def _refuse(la: Any, plain: Plain, *args: Any, **kwargs: Any) -> Any:
    if la.backend.shares.several:
        raise NotImplementedError(
            f"{type(la).__name__} keeps features of single examples, and is fitted in one process: leave "
            "process_group out of backend_kwargs. 'full', 'diag', 'kron', 'kfac', 'ekfac' and 'low_rank' take it."
        )
    return plain(*args, **kwargs)


_refuse.__name__ = "fit"
in_front_of(ELLA, VaLLA)(_refuse)
