"""The Laplace posterior of a model too large for any factor, by products alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from curvature.laplace.likelihoods.observation import Observation, observation
from curvature.laplace.likelihoods.summed import Likelihood, check_likelihood, summed
from curvature.laplace.matrix_free.prior import Prior, number_or_tensor
from curvature.losses.squared_error import SquaredError
from curvature.losses.terms import Layout
from curvature.matrices.full import GaussNewtonOperator
from curvature.matrices.problem import Evaluation, Problem
from curvature.model.arguments import checked, real
from curvature.model.data import Data, Output
from curvature.model.pullback import Pullback
from solvers import Congruence, Diagonal, Estimate, LinearOperator
from solvers.precision import working_dtype


class LinearizedLaplace:
    r"""Laplace posterior :math:`\mathcal N(\theta^*, (a H + P)^{-1})` of a model, matrix-free.

    H is the Gauss-Newton matrix of the summed negative log-likelihood with unit noise, P the diagonal prior precision,
    and :math:`a = 1 / (\sigma^2 T)`, as in laplace-torch. Linearised at :math:`\theta^*` the model has exactly this
    posterior. Nothing as large as a factor is formed: :func:`evidence` and :class:`PosteriorSampler` need products with
    H alone, each about two gradients over the data.

    Args:
        model: The trained model, evaluated in its current mode (call ``eval()`` first).
        likelihood: ``"regression"`` (``nn.MSELoss``; the likelihood is normal with standard deviation ``sigma_noise``),
            ``"classification"`` (``nn.CrossEntropyLoss``), or such a loss with its options, or another that is a
            negative log-likelihood. Its terms are summed, whatever its reduction.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        prior_precision: One number, one per parameter tensor, or one per parameter.
        sigma_noise: Standard deviation of the noise in regression.
        temperature: T above; more than 1 widens the posterior.
        prior_mean: A number, or ``(P,)``.
        params: Names, globs or tensors that restrict the parameters; the others stay where they are.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first.
        keep_graph: See :class:`curvature.matrices.dataset_operator.DatasetOperator`.
        progress: Show progress bars.
        process_group: Processes whose data together are the data, see :func:`curvature.hessian`.

    Attributes:
        curvature: H, an operator on the flat parameter vector.
        prior: P.
        sigma_noise, temperature: As given.

    Raises:
        ValueError: If a hyperparameter is out of range, noise is given for a likelihood without noise, or the
            likelihood is a sum of losses.
        UnknownLossError: If the derivatives of the loss are not known.

    References:
        Immer, Korzepa and Bauer (2021), https://arxiv.org/abs/2008.08400; Daxberger et al. (2021),
        https://arxiv.org/abs/2106.14806
    """

    @checked(
        likelihood=check_likelihood,
        prior_precision=number_or_tensor(low=0.0, open_low=True),
        sigma_noise=number_or_tensor(low=0.0, open_low=True),
        temperature=real(low=0.0, open_low=True),
        prior_mean=number_or_tensor(),
    )
    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        data: Data,
        *,
        prior_precision: float | Tensor = 1.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        prior_mean: float | Tensor = 0.0,
        params: Any = None,
        output: Output | None = None,
        class_dim: int | None = None,
        batch_dim: int | None = None,
        keep_graph: bool | None = None,
        progress: bool | None = None,
        process_group: Any = None,
    ) -> None:
        self.model, self.output = model, output
        self._loss = loss = summed(likelihood)
        self.regression = isinstance(loss, SquaredError)
        self._factor = 0.5 if self.regression else 1.0  # the squared error is twice the normal log-density
        read = {"params": params, "output": output, "class_dim": class_dim, "batch_dim": batch_dim}
        self._problem = Problem(model, loss, data, progress=progress, process_group=process_group, **read)
        self.parameters = self._problem.parameters
        self._ggn = GaussNewtonOperator(self._problem, "exact", keep_graph=keep_graph)
        self.curvature: LinearOperator = self._factor * self._ggn
        self.mean = self.parameters.flatten({name: p.detach() for name, p in self.parameters.items()}).clone()
        origin = torch.as_tensor(prior_mean, dtype=torch.float64, device=self.mean.device)
        self._offset = self.mean.double() - origin
        self._found: list[tuple[Tensor, int]] = []  # the loss and the observations of each batch; shared by copies
        self._layouts: list[Layout] = []  # of the outputs of a batch; shared by copies
        self._set(prior_precision, sigma_noise, temperature)

    def _set(self, prior_precision: float | Tensor, sigma_noise: float | Tensor, temperature: float) -> None:
        sizes = tuple(p.numel() for p in self.parameters.values())
        self.prior = Prior.of(prior_precision, sizes, self.parameters.device)
        self.sigma_noise, self.temperature = float(sigma_noise), float(temperature)
        for name in ("sigma_noise", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is positive and finite, not {getattr(self, name):g}.")
        if self.sigma_noise != 1 and not self.regression:
            raise ValueError(
                f"sigma_noise={self.sigma_noise:g} is for regression (nn.MSELoss); this likelihood has no such noise. "
                "temperature= widens or narrows any posterior."
            )

    def at(
        self,
        prior_precision: float | Tensor | None = None,
        sigma_noise: float | Tensor | None = None,
        temperature: float | None = None,
    ) -> LinearizedLaplace:
        """The posterior with other hyperparameters; the passes over the data that were made are shared."""
        other = copy.copy(self)
        other._set(
            self.prior.values if prior_precision is None else prior_precision,
            self.sigma_noise if sigma_noise is None else sigma_noise,
            self.temperature if temperature is None else temperature,
        )
        return other

    @property
    def scale(self) -> float:
        """``a``, the multiplier of H."""
        return 1 / (self.sigma_noise**2 * self.temperature)

    @property
    def precision(self) -> LinearOperator:
        """``a H + P`` on the flat parameter vector."""
        return self.scale * self.curvature + Diagonal(self.prior.expand().to(self.curvature.dtype))

    def whitened(self) -> LinearOperator:
        r""":math:`a\, P^{-1/2} H P^{-1/2}`: the curvature where the prior is a standard normal."""
        root = (self.scale / self.prior.expand()).sqrt().to(self.curvature.dtype)
        return Congruence(Diagonal(root), self.curvature)

    @property
    def observation(self) -> Observation:
        """What the likelihood says about an observation, given the outputs of the model."""
        if not self._layouts:
            self._seen()
        return observation(self._loss, self._layouts[0], self.sigma_noise)

    @property
    def log_likelihood(self) -> Tensor:
        """``log p(D | theta*)`` under noise and temperature as laplace-torch has it, 0-d, float64."""
        constant = self.observations * math.log(math.sqrt(2 * math.pi) * self.sigma_noise) if self.regression else 0.0
        return -self.scale * self.loss - constant

    @property
    def loss(self) -> Tensor:
        """The summed negative log-likelihood at unit noise without its constant, 0-d, float64."""
        return self._factor * torch.stack([loss for loss, _ in self._seen()]).sum()

    @property
    def observations(self) -> int:
        """Number of observations: the numbers that the likelihood compares with outputs."""
        return sum(number for _, number in self._seen())

    def scatter(self) -> Tensor:
        """Squared distance from the prior mean by number of the prior, without the precision, ``(G,)``."""
        return self.prior.sums(self._offset.square())

    def prior_gradient(self, effective_dimension: Estimate) -> Estimate:
        r"""Derivative of the log evidence in the logarithm of the prior precision.

        It is :math:`(\gamma_g - p_g |\theta^* - \mu_0|_g^2) / 2` with the effective dimension
        :math:`\gamma_g = \operatorname{tr}_g\, a H (a H + P)^{-1}`; MacKay (1992).

        Args:
            effective_dimension: :math:`\gamma`, ``(G,)``; or its sum, 0-d, for a factor common to all numbers.
        """
        pull = self.prior.values * self.scatter()
        return moved(effective_dimension, 0.5, -0.5 * (pull if effective_dimension.value.dim() else pull.sum()))

    def noise_gradient(self, effective_dimension: Estimate) -> Estimate | None:
        r"""Derivative of the log evidence in the logarithm of the noise; ``None`` without noise.

        It is :math:`2 a \ell - N + \gamma` with the loss :math:`\ell` at unit noise and N observations.

        Args:
            effective_dimension: The sum over all parameters, 0-d.
        """
        if not self.regression:
            return None
        return moved(effective_dimension, 1.0, 2 * self.scale * self.loss - self.observations)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        r"""Draws of :math:`\mathcal N(0, H)`: :math:`J^\top S \xi` with the output Hessian :math:`S S^\top`.

        One pass over the data, with a backward pass for each draw. Returns ``(count, P)``.

        Args:
            count: Number of draws.
            generator: Where :math:`\xi` is drawn from, ``(count, N, R, columns)`` of each batch in turn; several
                processes draw for their own data.
        """
        params = list(self.parameters.values())
        generator = self._problem.shares.draws(generator)
        out = torch.zeros(count, self.parameters.size, dtype=self.curvature.dtype, device=self.parameters.device)

        def visit(evaluation: Evaluation) -> None:
            terms = evaluation.terms
            assert terms is not None
            self._layouts[:] = [terms.layout]
            pull, dtype = Pullback([evaluation.output], params), working_dtype(terms.output)
            shape = (count, *terms.shape[:2], terms.columns)
            noise = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(out.device)
            step = self._ggn.chunk(evaluation.nbytes)
            for start in range(0, count, step):
                part = slice(start, start + step)
                back = pull([terms.sqrt_product(noise[part]).to(terms.output.dtype)])
                out[part] += self.parameters.flatten(dict(zip(self.parameters, back, strict=True)))

        self._problem.visit(visit, "draws of the curvature", count=True)
        self._problem.shares.sum(out)
        self._agree()
        return self._factor**0.5 * out

    def _seen(self) -> list[tuple[Tensor, int]]:
        if not self._found:

            def visit(evaluation: Evaluation) -> None:
                assert evaluation.terms is not None
                self._layouts[:] = [evaluation.terms.layout]
                with torch.no_grad():
                    self._found.append((evaluation.terms.value().double(), evaluation.output.numel()))

            self._problem.visit(visit, "likelihood")
            everyone = self._problem.shares.gather(self._found)
            self._found[:] = [(loss.to(self.mean.device), number) for found in everyone for loss, number in found]
            self._agree()
        return self._found

    def _agree(self) -> None:
        """Let a process without data know the axes of the outputs, too."""
        everyone = self._problem.shares.gather(self._layouts)
        self._layouts[:] = next((layouts for layouts in everyone if layouts), [])

    def __repr__(self) -> str:
        prior = (
            f"{float(self.prior.values):.3g}" if len(self.prior.values) == 1 else f"{len(self.prior.values)} numbers"
        )
        return f"LinearizedLaplace({self.parameters.size} parameters, prior {prior}, noise {self.sigma_noise:.3g})"


def moved(estimate: Estimate, factor: float, offset: Tensor) -> Estimate:
    """``factor * estimate + offset``."""
    stderr, systematic = abs(factor) * estimate.stderr, abs(factor) * estimate.systematic
    return Estimate(factor * estimate.value + offset, stderr, estimate.samples, estimate.products, systematic)
