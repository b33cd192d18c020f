"""Gauss-Newton for least squares."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from curvature.model.inner_backward import gradients_kept
from curvature.residuals.points import PointwiseResidual
from curvature.residuals.residual_rows import residual_rows
from precond.closure.damped import Bent, DampedOptimizer
from precond.closure.geodesic import curved
from precond.closure.layered import LayeredLeastSquares
from precond.closure.residuals import DenseLeastSquares, LeastSquares, MatrixFreeLeastSquares
from precond.closure.solver_choice import SolverChoice, cheapest
from precond.step.adapt import LevenbergMarquardt
from precond.step.base import MomentumOptions
from precond.step.graph import Closure, CurvedOutput, GaussNewtonMatrix, flatten, jacobian_rows, unflatten
from precond.step.methods import Taxonomy
from solvers import CG, Nystrom
from solvers.outcome.arguments import flag, number

log = logging.getLogger(__name__)

SolverName = Literal["auto", "cholesky", "woodbury", "kfac", "cg", "nystrom"]

# The matrix-free solvers by name. With Nystrom's preconditioner the steps are inexact, as those of Hessian-free: the
# damping rule judges them all the same.
_CG = CG(rtol=1e-8, progress=False)
_INEXACT = CG(rtol=1e-8, max_steps=500, stop="progress", progress=False)
_BY_LAYERS = CG(rtol=1e-2, max_steps=100, stop="progress", progress=False)
_NYSTROM = Nystrom(100)

# Transtrum and Sethna (2012), section 4: any decrease counts as success ("delayed gratification", with 2 and 5). The
# first damping may be wrong by some powers of ten, and is found by doubling all the same: growing it faster (Nielsen)
# ended above the least that serves, and cost ten steps where points are redrawn.
_RULE = LevenbergMarquardt(decrease=0.2, increase=2.0, lower=0.0, upper=0.0, attempts=30)


class GaussNewton(DampedOptimizer):
    r"""Gauss-Newton and Levenberg-Marquardt for least squares, such as physics-informed networks.

    For :math:`L = \tfrac12 \lVert r(\theta) \rVert^2` with residuals r and their Jacobian J,

    .. math:: d = (J^\top J + \lambda D^2)^{-1} (J^\top r + \lambda \mu D^2 d_{previous})

    The closure returns the *residuals*, a tensor or a list of tensors of any shapes and of
    :class:`PointwiseResidual`; scale them so that L is the intended loss (``N ** -0.5`` for a mean of squares,
    halved). ``step`` returns L.

    Under the default ``damping_rule`` a step that does not lower L is rejected and tried again with twice the damping,
    and any other one divides the damping by five. Narrow curved valleys, frequent in such problems, are then followed
    along their curvature (``acceleration``): the step is a parabola instead of a line,

    .. math:: \theta \leftarrow \theta - d + \tfrac12 a, \qquad
        a = -(J^\top J + \lambda D^2)^{-1} J^\top \frac{\partial^2 r}{\partial d^2}

    with the second derivative from one more evaluation of the residuals, a tenth of the step away; it is left out
    where ``|D a| > 0.75 |D d|``, too far for a parabola. Where J is factored, up to eight more evaluations follow the
    curve beyond the parabola, as long as each of them brings the residuals nearer to those of the linear model.

    With ``scaled``, :math:`\lambda` is a plain number. ``scaled=True`` takes for :math:`D^2` the largest diagonal of
    :math:`J^\top J` seen so far, which makes the method blind to the units of single parameters. But parameters that
    hardly count yet are then hardly damped, and where points are redrawn such steps were the slower ones. The default
    lies between that and D = I: the geometric mean of each entry of the diagonal and the mean of all,

    .. math:: D_i^2 = \big(\delta_i \, \tfrac1P \textstyle\sum_j \delta_j\big)^{1/2}, \qquad
        \delta = \max_{t} \operatorname{diag}(J_t^\top J_t)

    Prefer it for smooth deterministic problems solved to high accuracy, with up to some thousands of
    parameters or residuals, and in float64. With R residuals a step costs the Jacobian, and ``R P min(R, P)``, and
    ``min(R, P)^3 / 3`` for each damping that is tried: by Cholesky, in the size of the parameters if ``P <= R`` and in
    that of the residuals (Woodbury) if ``R < P``; or some products under CG. Memory ``R P``, or the graph of the
    residuals under CG.

    ========================================================= ==================================================
    paper                                                     here
    ========================================================= ==================================================
    Marquardt: :math:`(J^\top J + \lambda D^2)^{-1} J^\top r` ``residuals.DenseLeastSquares.fit``
    Marquardt: damping by the outcome, rejection              ``damped_direction``: ``_RULE``
    Moré, section 4: D under ``scaled=True``                  ``_scale``
    Transtrum and Sethna, section 2: a, and beyond            ``geodesic.curved``
    Mueller and Zeinhofer: J of a network at points           ``PointwiseResidual.value_and_jacobian``
    Goldshlager et al.: SPRING                                ``directions``: ``solve``
    Dangel et al.: K-FAC of residuals                         ``layered``
    ========================================================= ==================================================

    Args:
        params: The model, or parameters, groups, or named parameters.
        lr: Step length.
        damping: :math:`\lambda`, relative to :math:`J^\top J`, or in its units where not ``scaled``; where it starts,
            under a rule.
        solver: ``"cholesky"`` in the size of the parameters, ``"woodbury"`` in that of the residuals; ``"kfac"``, of
            :class:`PointwiseResidual` of networks whose parameters are all in linear layers: CG with products from the
            rows of the layers, preconditioned by K-FAC, to a hundredth of the residual; ``"nystrom"`` or a
            :class:`~solvers.Nystrom` for the same by any residuals, preconditioned from a sketch of ``rank`` products
            (100); ``"cg"`` or a :class:`~solvers.CG` without a preconditioner. ``"auto"`` is the cheaper of the first
            two, or, where J would hold more than 2^29 numbers, ``"kfac"`` if it can be had and ``"nystrom"`` if not.
            ``optimizer.choice`` has the solver of the last step, and why.
        damping_rule: The rule above, another :class:`LevenbergMarquardt`, or ``None`` for a fixed damping and no
            rejection.
        scaled: ``"balanced"``, ``True`` or ``False`` as above. ``None`` is ``"balanced"`` wherever J is formed (CG does
            not form it), but ``False`` with ``spring``, which has no scaling in its paper.
        acceleration: Follow the curve, as above; only under a rule.
        spring: :math:`\mu`, momentum inside the solve (SPRING), in [0, 1).
        options: See :class:`SecondOrderOptimizer`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Marquardt (1963); Moré (1978), section 4 (scaling); Transtrum and Sethna (2012), sections 2 and 4
        (acceleration, and the rule), https://arxiv.org/abs/1201.5885; Mueller and Zeinhofer (2023),
        https://arxiv.org/abs/2302.13163; Dangel, Mueller and Zeinhofer (2024), https://arxiv.org/abs/2405.15603
        (K-FAC); Goldshlager, Abrahamsen and Lin (2024), SPRING,
        https://arxiv.org/abs/2401.10190
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="GGN of a sum of squares",
        structure="dense, low rank or matrix-free",
        solver="Cholesky, Woodbury, or CG with Nystrom's preconditioner",
        matrices=("GGN",),
        forms=("dense", "low rank", "matrix-free"),
        step="the Jacobian of R residuals, 2RP min(R, P) + min(R, P)³/3",
        refresh="none",
        memory="RP",
        paper="https://arxiv.org/abs/2302.13163",
    )

    # Of the step that is on its way; copies of the optimizer begin without.
    _jacobian: Tensor | None = None
    _residual: Tensor | None = None
    _layers: LayeredLeastSquares | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1e-3,
        solver: SolverName | CG | Nystrom = "auto",
        damping_rule: LevenbergMarquardt | None = _RULE,
        scaled: bool | Literal["balanced"] | None = None,
        acceleration: bool = True,
        spring: float = 0.0,
        **options: Unpack[MomentumOptions],
    ) -> None:
        if not isinstance(solver, (CG, Nystrom)) and solver not in get_args(SolverName):
            raise ValueError(f"solver is one of {', '.join(get_args(SolverName))}, a CG or a Nystrom; got {solver!r}.")
        number("spring", spring)
        if not 0 <= spring < 1:
            raise ValueError(f"spring is the weight of the previous step, in [0, 1); got {spring}.")
        if scaled != "balanced":
            if isinstance(scaled, str):
                raise ValueError(f"scaled is 'balanced', True or False, not {scaled!r}.")
            flag("scaled", scaled, optional=True)
        flag("acceleration", acceleration)
        self.solver = solver
        free = isinstance(solver, (CG, Nystrom)) or solver in ("kfac", "cg", "nystrom")
        if scaled and free:
            raise ValueError(f"scaled={scaled!r} needs the diagonal of J^T J, which CG never forms; use scaled=False.")
        usual: bool | Literal["balanced"] = False if free or spring else "balanced"
        self.scaled = usual if scaled is None else scaled
        self.scaled_asked = bool(scaled)
        #: The solver of the last step, and why it was taken.
        self.choice: SolverChoice | None = None
        self.chosen_for: tuple[Any, ...] = ()  # sizes
        self.rule = self.ruled(damping_rule, judges=True)
        if damping_rule is None and acceleration and "acceleration" in self.given:
            raise ValueError("acceleration=True needs a damping_rule, which judges the bent step; leave it out.")
        self.acceleration, self.spring = acceleration, spring
        params = params.parameters() if isinstance(params, nn.Module) else params
        super().__init__(params, lr=lr, defaults={"damping": damping}, **options)

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if options["decay"] == "l2":
            raise ValueError(
                "L2 weight decay adds a term that the residuals do not hold; let the closure also return "
                "weight**0.5 * p."
            )

    @property
    def matrix_free(self) -> bool:
        """Whether J was used by products only."""
        return self.choice is not None and self.choice.solver in ("kfac", "cg", "nystrom")

    def _choose(self, residuals: list[Tensor | PointwiseResidual], params: list[Tensor]) -> None:
        """Settle the solver of the step."""
        parameters = sum(p.numel() for p in params)
        sizes = (parameters, *(r.shape if isinstance(r, Tensor) else r.points.shape for r in residuals))
        if self.choice is not None and sizes == self.chosen_for:
            return
        if self.solver == "auto":
            choice = cheapest(sum(r.numel() for r in residuals), parameters)
            pointwise = all(isinstance(r, PointwiseResidual) for r in residuals)
            if choice.solver == "nystrom" and pointwise and not self.scaled_asked:
                choice = replace(choice, solver="kfac")
        else:
            name = self.solver if isinstance(self.solver, str) else "cg" if isinstance(self.solver, CG) else "nystrom"
            choice = SolverChoice(name, f"solver={self.solver!r} was asked for")
        log.info("%s: %s, since %s.", type(self).__name__, choice.solver, choice.reason)
        if choice.solver == "nystrom" and self.scaled_asked:
            raise ValueError(
                f"scaled={self.scaled!r} needs the diagonal of J^T J, and J is too large to be formed "
                f"({choice.reason}); use scaled=False, or solver='cholesky' or 'woodbury' all the same."
            )
        self.choice, self.chosen_for = choice, sizes

    def release(self) -> None:
        super().release()
        self._jacobian = self._residual = self._layers = None

    def objective(self, closure: Closure) -> Tensor:
        return sum((0.5 * r.detach().square().sum() for r in self._tensors(closure)), torch.zeros(()))

    def _tensors(self, closure: Closure) -> list[Tensor]:
        with torch.enable_grad():
            return _values(self._residuals(closure), graph=False)

    def _residuals(self, closure: Closure) -> list[Tensor | PointwiseResidual]:
        given, called = self.run(closure)
        if any(given is loss for loss in called):
            raise TypeError(
                "the closure of GaussNewton called backward() on what it returned, which is a loss, as trainers do. It "
                "must return residuals: tensors, of which the optimizer minimises half the sum of squares."
            )
        found = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]
        for r in found:
            if not isinstance(r, (Tensor, PointwiseResidual)) or (isinstance(r, Tensor) and not r.requires_grad):
                what = "a tensor without graph" if isinstance(r, Tensor) else type(r).__name__
                raise TypeError(
                    "the closure of GaussNewton must return residuals, tensors with their graph or PointwiseResidual, "
                    f"not {what}. The loss that is minimised is half their sum of squares."
                )
        if not found:
            raise TypeError("the closure of GaussNewton returned no residuals.")
        return found

    @torch.enable_grad()
    def _evaluate(self, closure: Closure | None) -> Any:
        assert closure is not None
        self._closure, params = closure, self.parameters()
        residuals = self._residuals(closure)
        self._choose(residuals, params)
        if self.choice is not None and self.choice.solver == "kfac":
            self._layers = self._by_layers(residuals, params)
        if self._layers is not None:
            self._residual = self._layers.values
            slopes = unflatten(self._layers.pull(self._residual), params)
        elif self.matrix_free:
            self._residual = torch.cat([r.reshape(-1) for r in _values(residuals)])
            with gradients_kept([self._residual], params):
                found = torch.autograd.grad(
                    self._residual, params, self._residual.detach(), retain_graph=True, allow_unused=True
                )
            slopes = dict(zip(params, found, strict=True))
        else:
            self._residual, self._jacobian = _linearized(residuals, params)
            slopes = unflatten(self._jacobian.mT @ self._residual, params)
        return self.evaluated(0.5 * self._residual.detach().square().sum(), slopes)

    def _by_layers(
        self, residuals: list[Tensor | PointwiseResidual], params: list[Tensor]
    ) -> LayeredLeastSquares | None:
        """The problem from the rows of layers; where these are not all, another solver is chosen."""
        rows = residual_rows(residuals, params)
        if rows is not None:
            return LayeredLeastSquares(rows, _BY_LAYERS)
        if self.solver == "kfac":
            raise ValueError(
                "solver='kfac' needs residuals at points (PointwiseResidual), of a network whose trained parameters "
                "are all in linear layers, with derivatives by laplacian and directional_derivatives up to the second "
                "order; this one has others. Use solver='nystrom'."
            )
        choice = cheapest(sum(r.numel() for r in residuals), sum(p.numel() for p in params))
        self.choice = replace(choice, reason=f"{choice.reason}; linear layers alone do not explain the residuals")
        log.info("%s: %s, since %s.", type(self).__name__, choice.solver, self.choice.reason)
        return None

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if self.sign < 0:
            raise ValueError("GaussNewton minimises a sum of squares; maximize=True has no meaning for it.")
        params = list(gradients)
        g, problem, residual = flatten(gradients), self._problem(params), self._now()
        old = self.remembered("direction", params)

        def solve(damping: float) -> Tensor:
            if not self.spring:
                return problem.fit(residual, damping)
            previous = self.spring * old
            return previous + problem.fit(residual - problem.push(previous), damping)

        def residuals(move: Tensor) -> Tensor:
            with self.moved(unflatten(move, params)):
                found = self._tensors(self.required_closure())
            return torch.cat([r.detach().reshape(-1) for r in found]).to(g.dtype)

        def bend(move: Tensor, damping: float, predicted: float) -> Bent:
            return curved(problem, residuals, residual, move, damping, predicted, self.rates(params) > 0)

        direction = self.damped_direction(
            self.rule, g, solve, lambda v: problem.push(v).square().sum(), bend if self.acceleration else None
        )
        if self.spring:
            self.remember("direction", direction, params)
        return unflatten(direction, params)

    def _now(self) -> Tensor:
        assert self._residual is not None
        return self._residual.detach()

    def _problem(self, params: list[Tensor]) -> LeastSquares:
        assert self._residual is not None and self.choice is not None
        if self._layers is not None:
            return self._layers
        if self.matrix_free:
            matrix = GaussNewtonMatrix([CurvedOutput(self._residual, lambda x: x)], params)
            if self.choice.solver == "cg":
                return MatrixFreeLeastSquares(matrix, self.solver if isinstance(self.solver, CG) else _CG)
            sketch = self.solver if isinstance(self.solver, Nystrom) else _NYSTROM
            return MatrixFreeLeastSquares(matrix, _INEXACT, sketch)
        assert self._jacobian is not None
        scale = self._scale(params) if self.scaled else None
        jacobian, self._jacobian = self._jacobian, None  # which is scaled in place
        return DenseLeastSquares(jacobian, scale, self.choice.solver == "woodbury")

    def _scale(self, params: list[Tensor]) -> Tensor:
        """D, from the largest norms of the columns of J seen so far; a parameter without effect gets a small one."""
        assert self._jacobian is not None
        squares = sum(rows.square().sum(0) for rows in self._jacobian.split(64))  # in the cache of the processor
        assert isinstance(squares, Tensor)
        for p, norms in unflatten(squares.sqrt(), params).items():
            state = self.state[p]
            state["scale"] = torch.maximum(state["scale"], norms) if "scale" in state else norms.clone()
        scale = flatten({p: self.state[p]["scale"] for p in params})
        if self.scaled == "balanced":
            scale = (scale * scale.square().mean().sqrt()).sqrt()
        largest = float(scale.max())
        return scale.clamp_min(1e-8 * largest if largest > 0 else 1.0)


def _values(residuals: list[Tensor | PointwiseResidual], graph: bool = True) -> list[Tensor]:
    return [r.value(graph) if isinstance(r, PointwiseResidual) else r for r in residuals]


def _linearized(residuals: list[Tensor | PointwiseResidual], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The values of all residuals, and their Jacobian in one piece of memory."""
    counts = [r.numel() for r in residuals]
    like = flatten({p: p.detach() for p in params})
    jacobian = like.new_empty(sum(counts), len(like))
    values = []
    for residual, out in zip(residuals, jacobian.split(counts), strict=True):
        if isinstance(residual, PointwiseResidual):
            value = residual.value_and_jacobian(params, out)[0]
        else:
            value = residual.reshape(-1)
            out.copy_(jacobian_rows(value, params).detach())
        values.append(value.detach().to(like.dtype))
    return torch.cat(values), jacobian
