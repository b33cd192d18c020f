"""How near an optimizer's steps are to the edge of stability, and the kernel that governs training near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.matrices.by_name import Matrix, matrix_of
from curvature.matrices.jacobian import Jacobian, jacobian
from curvature.model.arguments import a, checked, one_of, optional, real
from curvature.model.data import Data, Output, batches
from curvature.model.order import refuse_another_order
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped
from curvature.training.step_rule import StepRule, gradient_descent, rule_of
from solvers import Eigenpairs, Function, LinearOperator, eigsh
from solvers.outcome.arguments import flag
from solvers.outcome.solution import silenced


@dataclass(frozen=True, eq=False)
class Dynamics:
    r"""Largest eigenvalue of what a step multiplies the gradient's change by, against the value at which it diverges.

    Attributes:
        ratio: ``eigenvalue / threshold``. Above 1, a quadratic with this Hessian diverges along :attr:`vector`,
            changing sign at each step; training at full batch often hovers about 1 for long.
        ratio_error: The true ratio lies within, as far as the eigenvalue goes: it is the residual in these units.
        eigenvalue: Of :math:`S H`, with the step :math:`S g` for a gradient g; learning rates are in S.
        threshold: :math:`2 (1 + \mu)` for momentum :math:`\mu`; see :class:`curvature.training.step_rule.StepRule`.
        sharpness: ``eigenvalue / lr``, of :math:`P^{-1} H` where :math:`S = \eta P^{-1}`; ``None`` where learning rates
            differ. For gradient descent it is the largest eigenvalue of the Hessian, for Adam and dampened momentum P
            includes :math:`1 / (1 - \beta_1)`.
        critical_lr: The learning rate at which the ratio would be 1 with all else as it is; ``None`` where they differ,
            or the largest eigenvalue is not positive.
        vector: The direction that diverges first ``(P,)``, in parameter space, of norm 1.
        matrix: ``"hessian"`` or ``"ggn"``.
        clipped: Whether the optimizer may shorten its steps (``kl_clip``): the ratio is then an upper bound.
        converged: Whether the eigenvalue met its tolerance.
        products: Products with the matrix.
        optimizer: Name of the optimizer.
        start: Eigenvector of the symmetric form ``S^(1/2) H S^(1/2)``, from which a later search may start.
    """

    ratio: float
    ratio_error: float
    eigenvalue: float
    threshold: float
    sharpness: float | None
    critical_lr: float | None
    vector: Tensor
    matrix: str
    clipped: bool
    converged: bool
    products: int
    optimizer: str
    start: Tensor

    @property
    def stable(self) -> bool | None:
        """Whether steps are stable; ``None`` where the error leaves it open."""
        if self.ratio + self.ratio_error < 1:
            return True
        return False if self.ratio - self.ratio_error > 1 and not self.clipped else None

    def __str__(self) -> str:
        """One sentence."""
        words = {True: "stable", False: "unstable: this direction diverges", None: "at the edge, or not to be told"}
        rate = "" if self.critical_lr is None else f"; the edge is at lr = {self.critical_lr:.3g}"
        bound = ", at most, for it may clip its steps" if self.clipped else ""
        return (
            f"{self.optimizer} is at {self.ratio:.3g} ± {self.ratio_error:.1g} of its edge of stability ({self.matrix})"
            f"{bound}: {words[self.stable]}{rate}."
        )


@checked(
    loss_fn=check_loss,
    optimizer=optional(a(torch.optim.Optimizer, "a torch.optim.Optimizer")),
    lr=optional(real(low=0.0, open_low=True)),
    momentum=real(low=0.0, high=1.0, open_high=True),
    nesterov=flag,
    preconditioner=optional(a(LinearOperator, "a LinearOperator")),
    matrix=one_of(Matrix),
    previous=optional(a(Dynamics, "an earlier result of dynamics()")),
)
def dynamics(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    lr: float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    preconditioner: LinearOperator | None = None,
    matrix: Matrix = "hessian",
    rtol: float = 1e-3,
    max_products: int = 1000,
    previous: Dynamics | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Dynamics:
    r"""How near the steps of an optimizer are to divergence, by the largest eigenvalue of :math:`S H`.

    Near a minimum a step :math:`\theta \leftarrow \theta - S \nabla L` multiplies the distance by :math:`I - S H`. It
    contracts while the eigenvalues of :math:`S H` are below 2, with momentum :math:`\mu` below :math:`2 (1 + \mu)`. For
    gradient descent that is ``lr * sharpness < 2``; for preconditioned methods, the sharpness of :math:`P^{-1} H`.
    (Directions of negative curvature, which steps leave whatever their length, are another matter.)

    With ``matrix="ggn"``, :math:`H = J^\top H_L J` shares its eigenvalues with :math:`J J^\top H_L`, the kernel times
    the Hessian of the loss: the outputs, linearised, move by :math:`I - \eta K H_L`, which is the training-dynamics
    matrix of the kernel view (without the model's own curvature).

    The optimizer is read, not stepped. The measurement holds for the data given here: with small batches training
    becomes unstable earlier, from their noise.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = (torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    >>> print(dynamics(model, nn.MSELoss(), data, sgd))  # the Hessian is diag(9, 1)
    SGD is at 0.6 ± ... of its edge of stability (hessian): stable; the edge is at lr = 0.333.

    Args:
        model: Any module; evaluated in its current mode. Wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        optimizer: ``SGD``, ``Adam``, ``AdamW``, ``RMSprop`` of torch, or one of ``precond`` that holds
            ``preconditioners``; see :func:`curvature.training.step_rule.rule_of`. Or, in its place:
        lr: Learning rate of gradient descent.
        momentum: Its momentum.
        nesterov: Whether it looks ahead.
        preconditioner: Positive definite operator :math:`P^{-1}` on the flat vector.
        matrix: ``"hessian"`` or ``"ggn"``.
        rtol: Residual wanted, relative to the eigenvalue.
        max_products: Products at most; what has not converged then says so.
        previous: An earlier result of the same model, from which the search starts.
        params: Names, globs or tensors that restrict the parameters to some that move.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        generator: Source of the first vector; the same one each time by default.
        progress: True shows a progress bar, False never, None after a second.

    Raises:
        TypeError: If the optimizer's steps are not known.
        ValueError: Unless exactly one of optimizer and lr is given, or if the optimizer has not been stepped where its
            state matters.

    References:
        Cohen, Kaur, Li, Kolter and Talwalkar (2021), https://arxiv.org/abs/2103.00065; adaptive methods: Cohen et al.
        (2022), https://arxiv.org/abs/2207.14484
    """
    if (optimizer is None) == (lr is None):
        raise ValueError("say how steps are made by one of optimizer= and lr= (with momentum=, preconditioner=).")
    if optimizer is not None and (momentum or nesterov or preconditioner is not None):
        raise ValueError("momentum, nesterov and preconditioner go with lr=; those of an optimizer are its own.")
    make = matrix_of(matrix)
    model = unwrapped(model)
    parameters = Parameters(model, params)
    if optimizer is not None:
        rule = rule_of(optimizer, model, parameters)
    else:
        assert lr is not None
        rule = gradient_descent(parameters, lr, momentum, nesterov, preconditioner)
    read: dict[str, Any] = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
    H = make(model, loss_fn, data, progress=False, **read)
    start = None if previous is None else previous.start
    options: dict[str, Any] = {"rtol": rtol, "max_products": max_products, "generator": generator, "progress": progress}
    return _judged(rule, largest_of_step(H, rule, v0=start, **options), matrix)


def largest_of_step(H: LinearOperator, rule: StepRule, **options: Any) -> Eigenpairs:
    """Largest eigenvalue of ``S^(1/2) (H + w I) S^(1/2)``, to be compared with the threshold of the rule.

    Args:
        H: Hessian or Gauss-Newton matrix on the flat vector.
        rule: S, and the weight decay w that is part of the gradient.
        options: Of :func:`solvers.eigsh`.
    """

    def product(x: Tensor) -> Tensor:
        y = rule.root(x)
        return rule.root(H @ y + rule.l2 * y)

    op = Function(product, H.in_shape, symmetric=True, dtype=H.dtype, device=H.device)
    with silenced():  # the result says it
        return eigsh(op, 1, search_copies=False, **options)


def _judged(rule: StepRule, pairs: Eigenpairs, matrix: str) -> Dynamics:
    value, residual = float(pairs.values[0]), float(pairs.residuals[0])
    direction = rule.root(pairs.vectors[0])
    return Dynamics(
        ratio=value / rule.threshold,
        ratio_error=residual / rule.threshold,
        eigenvalue=value,
        threshold=rule.threshold,
        sharpness=None if rule.lr is None else value / rule.lr,
        critical_lr=_critical(rule, value),
        vector=direction / torch.linalg.vector_norm(direction),
        matrix=matrix,
        clipped=rule.clipped,
        converged=pairs.complete and bool(pairs.converged.all()),
        products=pairs.products,
        optimizer=rule.name,
        start=pairs.vectors[0],
    )


def _critical(rule: StepRule, value: float) -> float | None:
    """``lr s = (2 - lr w) a`` for the sharpness s, decoupled decay ``lr w`` and ``a = threshold / (2 - lr w)``."""
    if rule.lr is None or value <= 0:
        return None
    factor = rule.threshold / (2 - rule.decay)
    return 2 * factor / (value / rule.lr + factor * rule.decay / rule.lr)


@checked(rtol=optional(real(low=0.0)))
def kernel_eigenvalues(
    model: nn.Module,
    data: Data,
    k: int = 1,
    *,
    rtol: float | None = None,
    params: Any = None,
    output: Output | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""Largest eigenvalues of the empirical neural tangent kernel :math:`K = J J^\top` of all outputs on all data.

    Never formed: a product is one with :math:`J^\top`, then one with J. The linearised model under gradient flow on a
    squared error learns the component along an eigenvector at the rate of its eigenvalue.

    Args:
        model: Any module; evaluated in its current mode.
        data: One batch ``(x, y)`` or batches; targets are not looked at. The graphs of all of them are kept meanwhile.
        k: How many eigenvalues.
        rtol: Residual wanted, relative to the eigenvalue; see :func:`solvers.eigsh`.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        generator: Source of the first vector; the same one each time by default.
        progress: True shows a progress bar, False never, None after a second.

    Returns:
        Eigenvalues with residuals; vectors ``(k, n)`` over the outputs of all batches, each flattened row-major.

    Raises:
        ValueError: If the data come in another order in each pass.

    References:
        Jacot, Gabriel and Hongler (2018), https://arxiv.org/abs/1806.07572
    """
    refuse_another_order(data, "eigenvectors of the kernel")
    pieces: list[Jacobian] = [jacobian(model, x, params=params, output=output) for x, _ in batches(data)()]
    sizes = [J.shape[0] for J in pieces]
    first = pieces[0]

    def product(u: Tensor) -> Tensor:
        lead = u.shape[:-1]
        parts = u.split(sizes, dim=-1)
        along = torch.stack(
            [J.adjoint() @ part.reshape(*lead, *J.out_shape) for J, part in zip(pieces, parts, strict=True)]
        ).sum(0)
        return torch.cat([(J @ along).reshape(*lead, -1) for J in pieces], dim=-1)

    op = Function(product, (sum(sizes),), symmetric=True, dtype=first.dtype, device=first.device)
    return eigsh(op, k, rtol=rtol, generator=generator, progress=progress)
