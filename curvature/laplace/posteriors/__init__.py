"""Laplace approximations as functions of a state, in the form of the package ``posteriors``.

Each module has ``build``, ``init``, ``update`` and ``sample`` with the arguments and the meaning of the modules of
``posteriors.laplace``, so that they can replace each other: a state has the fields ``params`` (the mean, a dict),
a precision, and ``step``; ``update(state, batch)`` adds the sum over the examples of the batch, never a mean.
``posteriors`` itself is not needed. :mod:`~curvature.laplace.posteriors.kfac_ggn` and
:mod:`~curvature.laplace.posteriors.ekfac_ggn` are additions to it.

References:
    Duffield et al. (2024), posteriors, https://arxiv.org/abs/2406.00104
"""

from curvature.laplace.posteriors import dense_ggn, diag_ggn, ekfac_ggn, kfac_ggn
from curvature.laplace.posteriors.functional import Transform

__all__ = ["Transform", "dense_ggn", "diag_ggn", "ekfac_ggn", "kfac_ggn"]
