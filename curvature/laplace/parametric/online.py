"""Learning tasks one after the other: the posterior of each is the prior of the next."""

from __future__ import annotations

import os
from typing import Any

import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace, LowRankLaplace
from laplace.curvature import CurvatureInterface
from laplace.lllaplace import LLLaplace
from laplace.subnetlaplace import SubnetLaplace
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curvature.laplace.backends.base import Backend
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.factors.sums import OuterSums, Sums
from curvature.laplace.parametric import archive
from curvature.laplace.parametric.definite import refuse_indefinite
from curvature.laplace.parametric.files import posterior_of, state_of
from curvature.laplace.parametric.posterior import EKFACLaplace
from solvers.outcome.arguments import number

_KIND = "an online posterior"


class OnlineLaplace:
    r"""A Gaussian over the parameters that is carried from task to task.

    After t tasks it has the mean :math:`\mu_t`, where training on task t ended, and the precision

    .. math::
        \Lambda_t = \tfrac{1}{\sigma^2 T} \bar H_t + \Delta, \qquad \bar H_t = \gamma \bar H_{t-1} + H_t(\mu_t),

    with the curvature H of the summed loss of a task at its own optimum, noise :math:`\sigma`, temperature T, prior
    precision :math:`\Delta`, and the forgetting factor :math:`\gamma`. Training on the next task minimises

    .. math::
        -\log p(D_{t+1} | \theta) + \tfrac12 (\theta - \mu_t)^\top
        \bigl(\tfrac{\lambda}{\sigma^2 T} \bar H_t + \Delta\bigr) (\theta - \mu_t),

    whose second term :meth:`penalty` is. With :math:`\lambda = \gamma = 1` this is Bayes' rule, exact for a linear
    model with squared error and ``"full"``. Before the first task the penalty is that of the prior, around its mean.
    ``"kron"`` and ``"kfac"`` add the factors of the tasks and not their products, as if all examples were of one data
    set (with :math:`\gamma` as the weight of the older ones); ``"diag"`` is elastic weight consolidation with one
    penalty for all earlier tasks.

    Args:
        posterior: laplace-torch posterior of all trainable parameters with ``hessian_structure`` ``"full"``,
            ``"diag"``, ``"kron"`` or ``"kfac"``; not fitted, or to the first task.
        strength: :math:`\lambda`, how much the curvature of earlier tasks counts in the penalty. Above 1 it remembers
            more and learns less.
        forgetting: :math:`\gamma`, in (0, 1]; 1 forgets nothing. The prior is never discounted.

    Raises:
        TypeError: For a posterior that does not add up, with the reason.
        ValueError: If a number is out of range.

    References:
        Ritter, Botev and Barber (2018), https://arxiv.org/abs/1805.07810; Kirkpatrick et al. (2017), EWC,
        https://arxiv.org/abs/1612.00796; forgetting: Schwarz et al. (2018), https://arxiv.org/abs/1805.06370
    """

    def __init__(self, posterior: Any, strength: float = 1.0, forgetting: float = 1.0) -> None:
        _check(posterior)
        number("strength", strength, low=0)
        number("forgetting", forgetting, low=0, high=1, open_low=True, unit="1 forgets nothing.")
        self.posterior, self.strength, self.forgetting = posterior, strength, forgetting
        self.tasks = 1 if posterior.n_data else 0
        self._form = _quadratic_form(posterior)

    @property
    def mean(self) -> Tensor:
        """Where the penalty is zero: the optimum of the last task, or the prior's mean; ``(P,)``."""
        la = self.posterior
        return la.mean if self.tasks else la.prior_mean.expand(la.n_params)

    def penalty(self) -> Tensor:
        """Term to add to the **summed** loss of the task at hand, 0-d, with its graph to the model's parameters.

        For the mean over N examples of the task, divide it by N. Exact, with exact derivatives of every order; a
        factor of K-FAC takes one product forwards and one backwards.

        Raises:
            ValueError: If the shapes of the model's parameters have changed.
        """
        la = self.posterior
        delta = torch.cat([p.reshape(-1) for p in la.params]) - self.mean
        prior = (la.prior_precision_diag.detach() * delta.square()).sum()
        factor = self.strength * la._H_factor.detach()
        return 0.5 * (prior if self._form is None else prior + factor * self._form(delta))

    def update(self, loader: DataLoader, progress_bar: bool = False) -> None:
        """Add a task's curvature at the model's parameters, taken as the task's optimum.

        The model is in evaluation mode afterwards, as after ``fit``. If something fails, the posterior is as before.

        Args:
            loader: Batches of the task; ``loader.dataset`` gives their number, as laplace-torch needs it.
            progress_bar: Show one.

        Raises:
            IndefinitePosteriorError: If curvature plus prior is not positive definite (a Hessian off a minimum).
        """
        la = self.posterior
        before = {name: getattr(la, name) for name in ("H", "H_facs", "mean", "loss", "n_data") if hasattr(la, name)}
        try:
            if self.tasks:
                _discount(la, self.forgetting)
            la.fit(loader, override=not self.tasks, progress_bar=progress_bar)
            if not isinstance(la, KronLaplace):
                refuse_indefinite(la)
        except BaseException:
            vars(la).update(before)
            raise
        self.tasks += 1
        la._posterior_scale = None
        self._form = _quadratic_form(la)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file as :func:`curvature.laplace.save` does.

        Raises:
            ValueError: Before the first task.
        """
        numbers = {"strength": self.strength, "forgetting": self.forgetting, "tasks": self.tasks}
        archive.write(path, _KIND, {"posterior": state_of(self.posterior), "online": numbers})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, backend: type[CurvatureInterface] | None = None
    ) -> OnlineLaplace:
        """Read a file of :meth:`save`.

        Args:
            path: The file.
            model: The model; its parameters may have moved on from the mean, as in the middle of a task.
            backend: As for :func:`curvature.laplace.load`.

        Raises:
            CheckpointError: If the file is damaged, or belongs to another model.
        """
        saved = archive.read(path, _KIND, next(model.parameters()).device)
        numbers = saved["online"]
        online = cls(posterior_of(saved["posterior"], model, backend), numbers["strength"], numbers["forgetting"])
        online.tasks = numbers["tasks"]
        return online

    def __repr__(self) -> str:
        seen = f"tasks={self.tasks}, examples={self.posterior.n_data}"
        return f"OnlineLaplace({type(self.posterior).__name__}, {seen})"


def _check(la: Any) -> None:
    if isinstance(la, (LLLaplace, SubnetLaplace)):
        raise TypeError(
            f"{type(la).__name__} is over a part of the parameters; an online posterior is over all that are "
            "trainable. Freeze the others with requires_grad_(False) and take subset_of_weights='all'."
        )
    if isinstance(la, EKFACLaplace) or not isinstance(la, (FullLaplace, DiagLaplace, KronLaplace)):
        why = ""
        if isinstance(la, EKFACLaplace):
            why = ", since eigenvalues in the eigenbasis of one task do not add to those in the basis of another"
        elif isinstance(la, LowRankLaplace):
            why = ", since eigenvectors of one task do not add to those of another"
        raise TypeError(
            f"{type(la).__name__} cannot be carried from task to task{why}. Take hessian_structure='full', 'diag', "
            "'kron' or 'kfac'."
        )
    if getattr(la, "damping", False):
        raise TypeError("damping=True puts the prior into the Kronecker factors; an online posterior adds it to them.")
    if la._backend_kwargs.get("process_group") is not None:
        raise TypeError(
            "an online posterior is extended task by task, in one process: leave process_group out of backend_kwargs."
        )
    if isinstance(la, KronLaplace) and not issubclass(la._backend_cls, Backend):
        raise TypeError(
            f"the factors of {la._backend_cls.__name__} are not weighted by their examples, so tasks of other sizes "
            "do not add up. Take backend=GGNBackend or EFBackend of curvature.laplace."
        )


def _discount(la: Any, weight: float) -> None:
    """Let each example count for ``weight`` examples; existing tensors stay unchanged."""
    if isinstance(la, KronLaplace):
        kron: Any = la.H_facs
        sums = {block: _discounted(s, weight) for block, s in kron.sums.items()}
        la.H_facs = BlockKron(kron.tensors, sums, weight * kron.examples, weight * kron.size)
    else:
        la.H = weight * la.H
    la.loss = weight * la.loss


def _discounted(sums: Sums, weight: float) -> Sums:
    """As :meth:`scaled`, and the inputs of a layer too, whose mean over all tasks is a weighted one then."""
    if isinstance(sums, OuterSums):
        return OuterSums({side: (weight * g, weight * a, weight * n) for side, (g, a, n) in sums.sides.items()})
    return sums.scaled(weight)


def _quadratic_form(la: Any) -> Any:
    """The function ``x^T H x`` of vectors ``(P,)``; ``None`` before the first curvature."""
    if not la.n_data:
        return None
    if not isinstance(la, KronLaplace):
        H = la.H
        return lambda x: x @ (H @ x) if H.dim() == 2 else (H * x.square()).sum()
    kron: Any = la.H_facs
    terms = kron.terms

    def form(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for place, op in terms:
            piece = place.gather(x.to(op.dtype))
            total = total + (piece * (op @ piece)).sum()
        return total

    return form
