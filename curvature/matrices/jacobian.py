"""The Jacobian of a model's output, as products both ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from curvature.estimation.dataset import record
from curvature.estimation.finite import refuse_nonfinite
from curvature.layers.recorder import Recorder
from curvature.matrices.examples import Examples
from curvature.matrices.problem import gradient_of
from curvature.model.arguments import checked, one_of
from curvature.model.data import Output, call, refuse_complex, resolve_output, to_device
from curvature.model.parameters import Parameters, tensor_of_its_own, with_values
from curvature.model.pullback import (
    NoSecondDerivativeError,
    Pullback,
    pull_back,
    quiet_loops,
    refuse_differentiated_once,
    refuse_hidden,
    refuse_outside_of_autograd,
)
from curvature.model.settings import refuse_changes, settings, versions
from curvature.model.streams import random_state, set_random_state
from solvers import LinearOperator, StructureError
from solvers.outcome.finite import is_finite
from solvers.outcome.memory import is_out_of_memory
from solvers.precision import Autocast, working_dtype

Mode = Literal["auto", "forward", "reverse"]


class Linearization:
    """A model's output on one batch as a function of its parameters, to first order.

    Reverse mode takes Jacobian-vector products as the derivative of vector-Jacobian products in their cotangent, which
    are linear in it; the graph serves any number of products. Forward mode runs the model again on dual numbers, and
    serves operations that can be differentiated only once.

    Args:
        model: The model.
        x: Its inputs.
        output: Its output, attached to the graph.
        pick: The output tensor from what the model returns.
        rows: Parameters for which vector-Jacobian products are taken.
        columns: Parameters for which Jacobian-vector products are taken.
        mode: ``"auto"`` takes reverse mode unless the model has no second derivative; the attribute then says which.
        random: State of the random generators before the model ran.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        output: Tensor,
        pick: Callable[[Any], Tensor],
        rows: Parameters,
        columns: Parameters,
        mode: Mode,
        random: list[Tensor],
    ) -> None:
        if not output.requires_grad:
            raise ValueError(
                "the output does not depend on the model's parameters: the model runs under no_grad, or its output is "
                "detached."
            )
        self.model, self.x, self.output, self.pick = model, x, output, pick
        self.rows, self.columns, self.mode, self.random = rows, columns, mode, random
        self._pullback = Pullback([output], list(rows.values()))
        self._pushforward: Pullback | None = None
        self._checked = False

    def pull(self, cotangents: Tensor) -> Tensor:
        """Vector-Jacobian products: ``(k, *output.shape)`` to ``(k, rows.size)``."""
        return self.rows.flatten(dict(zip(self.rows, self.vjp(cotangents, True), strict=True)))

    def push(self, vectors: Tensor) -> Tensor:
        """Jacobian-vector products: ``(k, columns.size)`` to ``(k, *output.shape)``."""
        pieces = self.columns.unflatten(vectors)
        return self.jvp([pieces[name].to(p.dtype) for name, p in self.columns.items()], True)

    def vjp(self, cotangents: Tensor, block: bool) -> list[Tensor]:
        """:meth:`pull` of one cotangent or a block of them, to a tensor per parameter."""
        return self._pullback([cotangents], block)

    def jvp(self, vectors: Sequence[Tensor], block: bool) -> Tensor:
        """:meth:`push` of one vector or a block of them, given as a tensor per parameter."""
        vectors = [tensor_of_its_own(v) for v in vectors]
        if self.mode == "forward":
            return self._push_forward(vectors, block)
        try:
            result = self._push_reverse(vectors, block)
        except RuntimeError as error:
            if self.mode == "reverse" or self._checked or is_out_of_memory(error):
                raise
            self.mode = "forward"
            try:
                return self._push_forward(vectors, block)
            except RuntimeError as second:
                self.mode = "auto"
                if is_out_of_memory(second):
                    raise
                raise NoSecondDerivativeError(
                    f"Jacobian-vector products of this model cannot be taken. (a) By two backward passes: {error} "
                    f"(b) By dual numbers: {second}"
                ) from second
        self.mode, self._checked = "reverse", True
        return result

    def _push_reverse(self, vectors: Sequence[Tensor], block: bool) -> Tensor:
        if self._pushforward is None:
            if not self._checked:
                refuse_outside_of_autograd(self.output, list(self.columns.values()))
            cotangent = torch.zeros_like(self.output, requires_grad=True)
            with torch.enable_grad():
                gradient = gradient_of(self.output, self.columns, cotangent, create_graph=True, numbers=False)
            refuse_differentiated_once(gradient.values())
            self._pushforward = Pullback(list(gradient.values()), [cotangent])
        return self._pushforward(vectors, block)[0]

    def _push_forward(self, vectors: Sequence[Tensor], block: bool) -> Tensor:
        if not self._checked:
            self._check_forward()
            self._checked = True
        tangents = dict(zip(self.columns, vectors, strict=True))
        if not block:
            return self._dual(tangents)[1]
        try:
            with quiet_loops():
                return vmap(lambda tangent: self._dual(tangent)[1], randomness="same")(tangents)
        except RuntimeError as error:  # an operation that cannot be vectorised
            if is_out_of_memory(error):
                raise
            k = len(vectors[0])
            return torch.stack([self._dual({name: v[i] for name, v in tangents.items()})[1] for i in range(k)])

    def _dual(self, tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The output and its derivative in one direction."""
        set_random_state(self.random, self.output.device)  # the masks of the recorded pass
        values = {name: p.detach() for name, p in self.columns.items()}
        pair: tuple[Tensor, Tensor] = jvp(self._run, (values,), (tangent,))  # type: ignore[assignment]
        return pair

    def _run(self, values: dict[str, Tensor]) -> Tensor:
        """The output as a function of the columns; statistics that the model updates go to copies."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return self.pick(with_values(self.model, {**buffers, **values}, lambda: call(self.model, self.x)))

    def _check_forward(self) -> None:
        """Compare forward mode with reverse mode in a random direction.

        Forward mode replaces parameters by name, and goes through ``detach`` and an embedding's
        ``padding_idx``, so it may count too little or too much.
        """
        generator = torch.Generator().manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

        u, tangent = noise(self.output.detach()), {name: noise(p.detach()) for name, p in self.columns.items()}
        gradient = pull_back([self.output], list(self.columns.values()), [u])
        products = [
            (g * tangent[name]).sum().double() for name, g in zip(tangent, gradient, strict=True) if g is not None
        ]
        primal, derivative = self._dual(tangent)
        tolerance = torch.finfo(self.output.dtype).eps ** 0.5
        scale = (u * derivative).abs().sum().double() + torch.stack(products).abs().sum()
        same = torch.allclose(primal, self.output.detach(), rtol=tolerance, atol=tolerance)
        if not same or abs((u * derivative).sum().double() - torch.stack(products).sum()) > tolerance * scale:
            raise RuntimeError(
                "forward mode gives other numbers than backward passes through the model: (a) a parameter is used "
                "through a reference that replacing it by name does not reach, (b) gradients stop somewhere that "
                "tangents do not (detach, no_grad, padding_idx). Use mode='reverse'."
            )


class Jacobian(LinearOperator):
    """Matrix-free Jacobian ``(P,) -> output shape``; made by :func:`jacobian`.

    Attributes:
        linearization: The recorded pass; its attribute ``mode`` says how products with vectors are taken.
    """

    def __init__(self, linearization: Linearization, recorder: Recorder, adjoint: bool = False) -> None:
        self.linearization = linearization
        self.recorder = recorder
        self._adjoint = adjoint
        self._versions = versions(linearization.model)
        self._autocast = Autocast()  # of the pass, should it run again

    @property
    def mode(self) -> Mode:
        """How products with vectors are taken; ``"auto"`` before the first."""
        return self.linearization.mode

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.linearization.output.shape) if self._adjoint else (self.linearization.columns.size,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.linearization.columns.size,) if self._adjoint else tuple(self.linearization.output.shape)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.linearization.columns)

    @property
    def device(self) -> torch.device:
        return self.linearization.columns.device

    def adjoint(self) -> Jacobian:
        other = copy.copy(self)
        other._adjoint = not self._adjoint
        return other

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Jacobian:
        if dtype in (None, self.dtype) and (device is None or torch.device(device) == self.device):
            return self
        raise StructureError(f"{self!r} runs where and as the model is. Convert the model and make it anew.")

    def apply(self, x: Tensor) -> Tensor:
        line = self.linearization
        refuse_changes(line.model, self._versions)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        with settings(line.model, line.random, self.device), self._autocast():
            if self._adjoint:
                result = line.pull(x.reshape(math.prod(batch), *self.in_shape).to(line.output.dtype))
            else:
                result = line.push(x.reshape(math.prod(batch), *self.in_shape))
        if not is_finite(result) and is_finite(x):
            refuse_nonfinite(result, "a product with the Jacobian")
        return result.to(self.dtype).reshape(*batch, *self.out_shape)

    def to_dense(self) -> Tensor:
        """The matrix, by one backward pass per output of an example; ``(outputs, P)``."""
        line = self.linearization
        if line.output.dim() == 0:
            return super().to_dense()
        refuse_changes(line.model, self._versions)
        examples = self.examples()
        with settings(line.model, line.random, self.device), self._autocast():
            rows = examples.gradients(examples.unit_signals())  # (outputs of an example, n, P)
        matrix = rows.transpose(0, 1).reshape(line.output.numel(), -1).to(self.dtype)
        return matrix.mT if self._adjoint else matrix

    def examples(self, axis: int = 0) -> Examples:
        """The recorded pass by examples, which lie along an axis of the output."""
        return Examples.along(self.linearization.output, self.linearization.columns, self.recorder, axis)

    def __repr__(self) -> str:
        return f"Jacobian({self.shape[0]}x{self.shape[1]})"


@checked(mode=one_of(Mode))
def jacobian(
    model: nn.Module, x: Any, *, params: Any = None, output: Output | None = None, mode: Mode = "auto"
) -> Jacobian:
    r"""Jacobian of the model's output on ``x`` with respect to the parameters.

    .. math:: J_{(n, c), p} = \partial f(x)_{nc} / \partial \theta_p

    The model runs once, now, in its current mode; its graph is kept as long as the operator lives. ``J @ v`` costs
    about one forward pass more, ``J.adjoint() @ u`` a backward pass.

    Args:
        model: Any module.
        x: Inputs of one batch: a tensor, a tuple of positional inputs, or a mapping.
        params: Names, globs or tensors that restrict the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        mode: ``"reverse"`` (double backward), ``"forward"`` (dual numbers), or ``"auto"``: reverse unless the model
            cannot be differentiated twice.

    Returns:
        Operator from the flat parameter vector ``(P,)`` to tensors of the output's shape.

    Raises:
        ValueError: If the output does not depend on the parameters, or the mode is unknown.
        TypeError: If the output is complex.
    """
    parameters = Parameters(model, params)
    device = parameters.device
    random = random_state(device)
    x = to_device(x, device)

    def pick(result: Any) -> Tensor:
        return resolve_output(result, output)

    with settings(model, random, device):
        result, recorder = record(model, parameters, x)
        refuse_complex(z := pick(result))
        refuse_hidden(z)
    return Jacobian(Linearization(model, x, z, pick, parameters, parameters, mode, random), recorder)


def check_mode(mode: str) -> None:
    """Refuse an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
