r"""Samples of a Laplace posterior by solving a perturbed least-squares problem, where no factor of the curvature fits.

With :math:`\hat H = a P^{-1/2} H P^{-1/2}`, where the prior is a standard normal, :math:`\hat h \sim \mathcal N(0, \hat
H)` and :math:`\eta \sim \mathcal N(0, I)`, the solution of

.. math:: (I + \hat H)\, u = \hat h + \eta \qquad \text{is} \qquad u \sim \mathcal N(0, (I + \hat H)^{-1}) .

It minimises the linearised loss on noise in place of the targets, plus the distance from a sample of the prior (Antoran
et al., 2023). The other objective there, and that of Lin et al. (2023), have the same minimum and gradients of less
noise: a matter of stochastic descent, while conjugate gradients see this one system for all of them.

Axis letters: S samples, P parameters, G numbers of the prior.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvature.laplace.likelihoods.observation import Observation
from curvature.laplace.matrix_free.linearized import LinearizedLaplace
from curvature.laplace.matrix_free.predictive import Predictive
from curvature.laplace.matrix_free.traces import SKETCH, seed_from
from curvature.matrices.jacobian import jacobian
from curvature.model.arguments import a, checked, count, optional
from curvature.model.data import Output
from curvature.model.parameters import Parameters
from solvers import CG, BlockDiagonal, Congruence, Diagonal, Estimate, LinearOperator, LowRank, Nystrom, Woodbury
from solvers.estimates.estimate import Mean
from solvers.outcome.solution import report

Preconditioner = Nystrom | LinearOperator | None


@dataclass(frozen=True, eq=False)
class PosteriorSamples:
    r"""Samples of :math:`\mathcal N(\theta^*, (a H + P)^{-1})`; made by :class:`PosteriorSampler`.

    Attributes:
        model: The model, at :math:`\theta^*`.
        output: Picks the output tensor.
        names: The parameters that the samples are of, in the order of the flat vector.
        mean: :math:`\theta^*`, ``(P,)``.
        deviations: Samples minus :math:`\theta^*`, ``(S, P)``.
        shrinkage: Squared distances of each sample from the sample of the prior that it came from, in units of the
            prior, for each number of the prior, ``(S, G)``.
        residual: Bound on the distance of each sample from the exact solution, in standard deviations of the prior: the
            norm of what its solve left, ``(S,)``.
        products: Products with the curvature that the solve took, counted in vectors.
        observation: What the likelihood says about an observation, given the outputs.
    """

    model: nn.Module
    output: Output | None
    names: tuple[str, ...]
    mean: Tensor
    deviations: Tensor
    shrinkage: Tensor
    residual: Tensor
    products: int
    observation: Observation = field(default_factory=lambda: Observation.from_state(None))

    @property
    def values(self) -> Tensor:
        """The samples, ``(S, P)``."""
        return self.mean + self.deviations

    def effective_dimension(self, total: bool = False) -> Estimate:
        r""":math:`\gamma_g = \operatorname{tr}_g\, a H (a H + P)^{-1}` with its standard error, ``(G,)``, or the sum.

        A posterior sample u and its sample :math:`\eta` of the prior differ by a draw of :math:`\mathcal N(0,
        I - (I + \hat H)^{-1})`, so the mean of :math:`|\eta - u|_g^2` is the effective dimension: positive, and for few
        effective parameters far less noisy than :math:`n_g - |u|_g^2`.
        """
        mean = Mean()
        mean.add(self.shrinkage.sum(1) if total else self.shrinkage)
        return Estimate(mean.value, mean.stderr, mean.count, self.products, torch.zeros_like(mean.value))

    def predict(self, x: Any) -> Predictive:
        r"""Outputs of the linearised model, :math:`f(x) + J(x) (\theta_s - \theta^*)`, by one product for each sample.

        Raises:
            RuntimeError: If the parameters have changed since the posterior was made.
        """
        parameters = Parameters(self.model, list(self.names))
        if not torch.equal(parameters.flatten({name: p.detach() for name, p in parameters.items()}), self.mean):
            raise RuntimeError(
                "the model's parameters are not those that the posterior was made at. Load the parameters of then, or "
                "sample again."
            )
        J = jacobian(self.model, x, params=list(self.names), output=self.output)
        deviations = (J @ self.deviations.to(J.dtype)).detach()
        return Predictive(J.linearization.output.detach(), deviations, self.observation)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names; ``torch.load(weights_only=True)`` reads them."""
        fields = ("mean", "deviations", "shrinkage", "residual", "products")
        kept = {name: getattr(self, name) for name in fields}
        return {"names": list(self.names), "observation": self.observation.state_dict()} | kept

    @classmethod
    def from_state_dict(cls, model: nn.Module, state: dict[str, Any], output: Output | None = None) -> PosteriorSamples:
        """Samples from :meth:`state_dict`, for the same model at the same parameters."""
        device = Parameters(model, list(state["names"])).device
        read: dict[str, Any] = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in state.items()}
        read["names"] = tuple(state["names"])
        read["observation"] = Observation.from_state(state.get("observation"))
        return cls(model, output, **read)


class PosteriorSampler:
    """Draws noise once, and turns it into posterior samples for any hyperparameters, each time by one block solve.

    A sample costs a backward pass over the data, and a product with the curvature for each step of the solve; steps
    grow as the root of ``1 + |H^|``, less with a preconditioner. All samples share the forward passes. Memory: some
    eight vectors as long as the parameters for each sample.

    Args:
        posterior: The posterior.
        samples: Number of samples.
        generator: Where the noise is drawn from; ``None`` draws the same each time.
        solver: Conjugate gradients with their tolerance. The default stops at ``rtol=1e-3`` and raises if that is not
            reached in 1000 steps. Its preconditioner is replaced.
        preconditioner: A :class:`solvers.Nystrom`, which sketches H once and keeps as many vectors as its rank; an
            operator near H that is diagonal, low-rank or block-diagonal (Kronecker factors of ``curvature.ggn``); or
            ``None``.

    Attributes:
        curvature_noise: The draws of ``N(0, H)``, ``(S, P)``.
        products: Products with the curvature that were spent, counted in vectors.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Antoran, Padhy, Barbano, Nalisnick, Janz and Hernandez-Lobato (2023), https://arxiv.org/abs/2210.04994; Lin et
        al. (2023), https://arxiv.org/abs/2306.11589
    """

    @checked(
        posterior=a(LinearizedLaplace, "a LinearizedLaplace"),
        samples=count(),
        solver=optional(a(CG, "a CG")),
        preconditioner=optional(a((Nystrom, LinearOperator), "a Nystrom or an operator")),
    )
    def __init__(
        self,
        posterior: LinearizedLaplace,
        samples: int = 16,
        *,
        generator: torch.Generator | None = None,
        solver: CG | None = None,
        preconditioner: Preconditioner = SKETCH,
    ) -> None:
        self.posterior, self.samples = posterior, samples
        self.solver = CG(rtol=1e-3, max_steps=1000, on_failure="raise") if solver is None else solver
        self._generator = torch.Generator(posterior.curvature.device).manual_seed(seed_from(generator))
        self.curvature_noise = posterior.draw(samples, self._generator)
        self._start = self._generator.get_state()
        self._latest: Tensor | None = None
        self.products = 0
        if isinstance(preconditioner, Nystrom):
            self.products = min(preconditioner.rank, posterior.parameters.size)
            preconditioner = preconditioner.approximate(posterior.curvature)
        self._near = preconditioner

    def prior_noise(self) -> Tensor:
        """Samples of the prior in units of its standard deviations, the same each time, ``(S, P)``."""
        self._generator.set_state(self._start)
        like = self.curvature_noise
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype, device=like.device)

    def __call__(
        self,
        prior_precision: float | Tensor | None = None,
        sigma_noise: float | Tensor | None = None,
        temperature: float | None = None,
    ) -> PosteriorSamples:
        """Samples at the posterior's hyperparameters, or at others.

        Raises:
            NotConvergedError: If the solve does not reach its tolerance and the solver raises; others warn.
        """
        return self.of(self.posterior.at(prior_precision, sigma_noise, temperature))

    def of(self, posterior: LinearizedLaplace) -> PosteriorSamples:
        """Samples of a posterior that differs in hyperparameters only; starts from the samples before."""
        precision = posterior.prior.expand()
        root = precision.sqrt().to(self.curvature_noise.dtype)
        op = posterior.whitened().shift(1.0)
        eta = self.prior_noise()
        b = posterior.scale**0.5 * self.curvature_noise / root + eta
        solver = replace(self.solver, preconditioner=self._preconditioner(posterior, precision))
        solution = solver.run(op, b, None if self._latest is None else self._latest * root)
        report(solution.info, f"sampling from {posterior!r}", solver.on_failure)
        self._latest = solution.x / root
        products = self.samples * (solution.info.iterations + 2)  # and the residuals before and after
        self.products += products
        return PosteriorSamples(
            posterior.model,
            posterior.output,
            tuple(posterior.parameters),
            posterior.mean,
            self._latest,
            posterior.prior.sums((eta - solution.x).square()),
            solution.info.residual,
            products,
            posterior.observation,
        )

    def _preconditioner(self, posterior: LinearizedLaplace, precision: Tensor) -> LinearOperator | None:
        """An operator near ``(I + H^)^-1``."""
        near, a = self._near, posterior.scale
        if near is None:
            return None
        if near.in_shape != self.posterior.curvature.in_shape:
            raise ValueError(f"the preconditioner acts on {near.in_shape}, the curvature on {tuple(precision.shape)}.")
        if isinstance(near, Diagonal):
            return Diagonal((precision / (precision + a * near.values)).to(near.dtype))
        root = precision.sqrt().to(near.dtype)
        if isinstance(near, LowRank):
            return Woodbury().power(LowRank(near.factor @ Diagonal(a**0.5 / root)).shift(1.0), -1)
        if isinstance(near, BlockDiagonal):
            # A Kronecker product takes one number more, so each block has the (geometric) mean of its prior.
            means = [float(place.gather(precision).log().mean().exp()) for place in near.places]
            inverses = tuple((a * block).inverse(p) for block, p in zip(near.blocks, means, strict=True))
            return Congruence(Diagonal(root), BlockDiagonal(inverses, near.places, near.size))
        raise TypeError(f"a preconditioner near the curvature is diagonal, low-rank or block-diagonal, not {near!r}.")
