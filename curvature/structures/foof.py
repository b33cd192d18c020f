"""Kronecker products of the inputs alone (FOOF): the identity in the place of the gradients' factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvature.layers.block import Block
from curvature.layers.samples import Samples
from curvature.structures.estimator import CurvatureEstimator, Form, MeanEstimator
from curvature.structures.kfac import KroneckerEstimator, KroneckerFisher
from solvers import Diagonal, LinearOperator


class IdentityEstimator(MeanEstimator):
    """The identity, for blocks without structure: their step is the plain gradient's."""

    structure: ClassVar[str] = "identity"

    def total(self, samples: Samples) -> Tensor:
        return torch.zeros(self.block.shape, dtype=samples.dtype, device=samples.device)

    def of_mean(self, value: Tensor) -> LinearOperator:
        return Diagonal(torch.ones_like(value))


@dataclass(frozen=True)
class InputKronecker(KroneckerFisher):
    r"""FOOF: ``I (x) A`` for a layer ``y = W a``, with the second moment A of its inputs; no gradients enter.

    .. math:: C = I \otimes \tfrac{1}{\#(n,s)} \sum_{n,s} a a^\top

    is the Hessian of :math:`\tfrac12 \mathbb E |W a - t|^2` for any targets t of the layer's outputs, so a step with
    its inverse moves every layer's outputs along their own gradient: gradient descent on neurons. It does not scale
    with the loss: A is the mean over inputs, so damping is in units of squared inputs and the learning rate in units of
    gradient descent on outputs. (A summed loss counts as many means as a mean loss would divide by.) Blocks other than
    layers get the identity.

    In training ``kind="empirical"`` costs no extra backward pass. Options as for :class:`KroneckerFisher`, which
    takes the gradients in as well.

    References:
        Benzing (2022), "Gradient descent on neurons and its link to approximate second-order optimization",
        https://arxiv.org/abs/2201.12250
    """

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        if form == "outer":
            return KroneckerEstimator(block, self.sharing, self.largest(block), gradient_factor="identity")
        return IdentityEstimator(block)
