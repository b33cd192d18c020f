"""Matrix-free ``J^T B J`` over a data set: the Gauss-Newton matrix and the Fisher matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.losses import JoinedTerms, Terms
from curvature.losses.signals import FisherKind
from curvature.matrices.dataset_operator import MEMORY, DatasetOperator, Product
from curvature.matrices.jacobian import Linearization, Mode, check_mode
from curvature.matrices.problem import Evaluation, Problem


class GaussNewtonOperator(DatasetOperator):
    r"""Matrix-free :math:`w \sum_t J_t^\top B_t J_t` over the terms of the loss; made by ``ggn`` and ``fisher``.

    A product costs a Jacobian-vector product, the arithmetic on the outputs, and a vector-Jacobian product: about two
    gradients, less with the graph kept.

    :math:`B_t` is the Hessian of the term in its outputs (``exact``), :math:`l_t' l_t'^\top` (``empirical``), or
    :math:`\frac{1}{M} \sum_m s_{tm} s_{tm}^\top` with draws of mean zero whose covariance is the Hessian (``mc``; each
    pass sees the same draws, so this is one matrix).

    Attributes:
        kind: ``"exact"``, ``"mc"`` or ``"empirical"``.
        mode: How Jacobian-vector products are taken: ``"reverse"`` or ``"forward"``; ``"auto"`` before the first.
    """

    title = "GaussNewton"

    def __init__(
        self,
        problem: Problem,
        kind: FisherKind,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        keep_graph: bool | None = None,
        memory: int = MEMORY,
        mode: Mode = "auto",
    ) -> None:
        check_mode(mode)
        super().__init__(problem, keep_graph=keep_graph, memory=memory)
        self.kind, self.samples, self.mode = kind, samples, mode
        generator = generator or torch.Generator(device=self.device).manual_seed(0)
        # The draws of every pass start here; later draws from the user's generator differ.
        self._start = (problem.shares.draws(generator) if kind == "mc" else generator).get_state()
        self._draws = torch.Generator(device=generator.device)
        if kind == "mc":
            torch.rand((), generator=generator, device=generator.device)

    def begin(self) -> None:
        self._draws.set_state(self._start)

    def record(self, evaluation: Evaluation) -> Product:
        terms = evaluation.through_output()
        if evaluation.first and self.kind != "empirical":
            terms.refuse_undefined()
            if terms.indefinite():
                warnings.warn(
                    f"{terms.loss_name} is not convex in the model's outputs: its Hessian there is indefinite, and so "
                    "may be this Gauss-Newton matrix. Its products are exact, but what needs a positive semi-definite "
                    "matrix (CG, Cholesky, logarithms of determinants) has none here. curvature.fisher gives one: of "
                    "kind 'empirical', and of every kind where the loss is a likelihood.",
                    stacklevel=2,
                )
        model, pick = self.problem.model, self.problem.pick
        line = Linearization(
            model, evaluation.x, evaluation.output, pick, self.rows, self.columns, self.mode, evaluation.random
        )
        on_outputs = self._on_outputs(terms)

        def product(vectors: Sequence[Tensor], block: bool) -> list[Tensor]:
            result = line.vjp(on_outputs(line.jvp(vectors, block)), block)
            self.mode = line.mode
            return result

        return product

    def _on_outputs(self, terms: Terms) -> Callable[[Tensor], Tensor]:
        if isinstance(terms, JoinedTerms):
            joined = terms
            each = [(scale, self._on_outputs(part)) for scale, part in joined.parts.values()]

            def product(u: Tensor) -> Tensor:
                pairs = zip(each, joined.pieces(u), strict=True)
                return joined.join([on_output(piece) * scale.to(u.dtype) for (scale, on_output), piece in pairs])

            return product
        if self.kind == "exact":
            return terms.hessian_product
        if self.kind == "empirical":
            vectors = [terms.gradient()]
        else:
            vectors = [terms.sample(self._draws) for _ in range(self.samples)]
        return lambda u: outer_products(terms, vectors, u)


def outer_products(terms: Terms, vectors: list[Tensor], u: Tensor) -> Tensor:
    r"""Term by term :math:`\frac{1}{M} \sum_m s_m \langle s_m, u \rangle`.

    Args:
        terms: Says which entries of an output belong to one term.
        vectors: M output-shaped tensors ``s_m``.
        u: ``(k, *output.shape)``.

    Returns:
        ``(k, *output.shape)``.
    """
    rows = terms.rows(u)  # (k, N, R, C)
    total = torch.zeros_like(rows)
    for s in map(terms.rows, vectors):
        total += s * (s * rows).sum(-1, keepdim=True)
    return terms.unrows(total / len(vectors))
