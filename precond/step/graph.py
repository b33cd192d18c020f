"""Derivatives through the graph of a loss, of all parameters together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvature.losses import SumOfLosses, Terms, loss_for, module_called
from curvature.model.data import refuse_complex
from curvature.model.graph_nodes import below
from curvature.model.parameters import tensor_of_its_own
from curvature.model.pullback import Pullback, pull_back, refuse_outside_of_autograd
from solvers import Function
from solvers.precision import working_dtype

Vectors = dict[Tensor, Tensor]
Closure = Callable[[], Any]


class BackwardDoesNothing(TorchFunctionMode):
    """``Tensor.backward`` does nothing inside, but for what it is told.

    Args:
        instead: Called with each tensor that is to be differentiated.

    Attributes:
        called: Those tensors.
    """

    def __init__(self, instead: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.called: list[Tensor] = []
        self._instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.backward:
            return func(*args, **kwargs)
        tensor, *others = args
        gradient = others[0] if others else kwargs.get("gradient")
        loss = tensor if gradient is None else (gradient * tensor).sum()
        self.called.append(loss)
        if self._instead is not None:
            self._instead(loss)
        return None


def has_graph(result: Any) -> bool:
    """Whether the result of a closure can be differentiated as a loss."""
    return isinstance(result, Tensor) and result.numel() == 1 and result.requires_grad


def loss_tensor(loss: Any, whose: str, called: Sequence[Tensor] = ()) -> Tensor:
    """The loss of a closure, as a number with its graph.

    Args:
        loss: The closure's result.
        whose: Class that called the closure, for the error.
        called: Tensors on which it called ``backward()``; where the result has no graph, as that of a trainer's
            closure, their sum is the loss.

    Raises:
        TypeError: If it is something else.
    """
    if called and not has_graph(loss):
        return sum((tensor.reshape(()) for tensor in called[1:]), called[0].reshape(()))
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss.reshape(())
    if loss is None:
        raise TypeError(
            f"the closure of {whose} returned None and ran no backward pass: it must compute the loss of one batch and "
            "return it. A trainer that is called without a closure may pass one that does nothing (Lightning's manual "
            "optimization): call step(closure=...) of its optimizer with yours."
        )
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(
        f"the closure of {whose} must return the loss as a tensor with one number and its graph, not {what}"
        f"{' without one' if isinstance(loss, Tensor) and loss.numel() == 1 else ''}. Return the loss itself, not "
        "loss.item() or loss.detach()."
    )


@contextmanager
def parameters_at(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block the parameters have other values; afterwards their own, bit for bit."""
    own = {p: p.data for p in values}
    try:
        for p, value in values.items():  # not in place: graphs refer to the former values
            p.data = value
        yield
    finally:
        for p, data in own.items():
            p.data = data


def reached(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Those of some parameters that the graph of a loss leads to."""
    wanted, found = {id(p) for p in params}, set[int]()
    for node in below([loss]):
        if len(found) == len(wanted):
            break
        if id(getattr(node, "variable", None)) in wanted:
            found.add(id(node.variable))
    return [p for p in params if id(p) in found]


def jacobian_rows(outputs: Tensor, params: list[Tensor], chunk: int = 64) -> Tensor:
    """Jacobian of a vector ``(N,)`` with respect to the concatenated parameters, ``(N, P)``, keeping the graph."""
    pull, blocks = Pullback([outputs], params), []
    for start in range(0, outputs.numel(), chunk):
        stop = min(start + chunk, outputs.numel())
        seeds = torch.zeros(stop - start, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        seeds[:, start:stop].fill_diagonal_(1)
        columns = pull([seeds])
        blocks.append(torch.cat([c.reshape(stop - start, -1).to(working_dtype(c)) for c in columns], 1))
    return torch.cat(blocks)


@torch.enable_grad()
def second_derivatives(slopes: Sequence[Tensor | None], params: list[Tensor], chunk: int = 64) -> Tensor:
    """Hessian on the concatenated parameters, ``(P, P)``, by products with the identity.

    Args:
        slopes: First derivatives with their graph, one for each parameter; ``None`` for zero.
        params: The parameters.
        chunk: Products at once.
    """
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(slopes, params, strict=True)]
    )
    if not flat.requires_grad:
        return torch.zeros(len(flat), len(flat), dtype=working_dtype(flat), device=flat.device)
    rows = jacobian_rows(flat, params, chunk).detach()
    return (rows + rows.mT) / 2


def flatten(vectors: Mapping[Tensor, Tensor]) -> Tensor:
    """Concatenate, each row-major, in the mapping's order, in float32 at least."""
    return torch.cat([v.reshape(-1).to(working_dtype(v)) for v in vectors.values()])


def unflatten(flat: Tensor, params: list[Tensor]) -> Vectors:
    """Inverse of :func:`flatten`."""
    parts = flat.split([p.numel() for p in params])
    return {p: tensor_of_its_own(part.reshape(p.shape)) for p, part in zip(params, parts, strict=True)}


def rademacher(p: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Random signs of the shape of ``p``, a function of seed, step and index alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_003 + index)
    signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
    return signs.to(device=p.device, dtype=p.dtype)


@dataclass(frozen=True, eq=False)
class CurvedOutput:
    """An output of the model, and the Hessian of the loss in it.

    Args:
        value: With its graph.
        hessian: Product of the loss's Hessian with a tensor of the output's shape.
        terms: The loss on this output, where it is one.
        scale: Weight of the sum of its terms in the loss.
    """

    value: Tensor
    hessian: Callable[[Tensor], Tensor]
    terms: Terms | None = None
    scale: float = 1.0


class GaussNewtonMatrix:
    r""":math:`C = \sum_i J_i^\top H_i J_i` on the flat vector of some parameters, by products.

    Jacobian-vector products are derivatives of vector-Jacobian products in their cotangent, so any model that
    backpropagates twice will do. Costs two backward passes to begin with, and about three for each product.

    Args:
        outputs: Outputs and Hessians.
        params: The parameters.

    Raises:
        NoSecondDerivativeError: If derivatives of vector-Jacobian products would be lost, in a custom function.
    """

    def __init__(self, outputs: list[CurvedOutput], params: list[Tensor]) -> None:
        self.outputs, self.params = outputs, params
        self._seeds = [torch.zeros_like(output.value, requires_grad=True) for output in outputs]
        values = [output.value for output in outputs]
        for value in values:
            refuse_outside_of_autograd(value, params)
        self._pullback = Pullback(values, params)
        with torch.enable_grad():
            found = pull_back(values, params, self._seeds, create_graph=True)
        self._images = {p: image for p, image in zip(params, found, strict=True) if image is not None}
        self._pushforward = Pullback(list(self._images.values()), self._seeds)

    def products(self, V: Tensor) -> Tensor:
        """``C v`` for the rows of V ``(k, P)``, in one batch; for Hessians that take a batch."""
        parts = dict(zip(self.params, V.split([p.numel() for p in self.params], 1), strict=True))
        cotangents = [parts[p].reshape(-1, *p.shape).to(p.dtype) for p in self._images]
        images = self._pushforward(cotangents)
        curved = [output.hessian(x) for output, x in zip(self.outputs, images, strict=True)]
        blocks = self._pullback(curved)
        return torch.cat([b.reshape(len(V), -1).to(V) for b in blocks], 1)

    def push(self, v: Tensor) -> list[Tensor]:
        """``J_i v`` for each output."""
        vectors = unflatten(v, self.params)
        images = list(self._images)
        found = pull_back([self._images[p] for p in images], self._seeds, [vectors[p].to(p.dtype) for p in images])
        return [torch.zeros_like(s) if x is None else x for s, x in zip(self._seeds, found, strict=True)]

    def pull(self, cotangents: list[Tensor]) -> Tensor:
        """``sum_i J_i^T u_i``."""
        return flatten(dict(zip(self.params, self._pullback(cotangents, block=False), strict=True)))

    def product(self, v: Tensor) -> Tensor:
        """``C v`` for one vector ``(P,)``."""
        return self.pull([output.hessian(x) for output, x in zip(self.outputs, self.push(v), strict=True)])

    def gram(self, vectors: list[Tensor]) -> Tensor:
        """``V^T C V`` for the vectors as columns of V, in float64: half of a product with C for each."""
        return gram(self.outputs, [self.push(v) for v in vectors])

    def operator(self) -> Function:
        """C as an operator."""
        size = sum(p.numel() for p in self.params)
        example = flatten({p: p.new_empty(p.shape) for p in self.params})
        return Function(
            self.product, (size,), symmetric=True, dtype=example.dtype, device=example.device, batched=False
        )

    def sampled_diagonal(self, samples: int, generator: torch.Generator) -> Tensor:
        """Unbiased estimate of the diagonal of C, non-negative: mean square of pulled-back draws, ``(P,)``."""
        total: Tensor | float = 0.0
        for _ in range(samples):
            draws = []
            for output in self.outputs:
                assert output.terms is not None
                draws.append(output.scale**0.5 * output.terms.sample(generator))
            total = total + self.pull(draws).square()
        return torch.as_tensor(total) / samples


def gram(outputs: list[CurvedOutput], images: list[list[Tensor]]) -> Tensor:
    """``V^T C V`` from the images ``J_i v`` of each vector, in float64."""
    curved = [[output.hessian(x) for output, x in zip(outputs, image, strict=True)] for image in images]
    entries = [[sum((x * y).double().sum() for x, y in zip(a, b, strict=True)) for b in curved] for a in images]
    found = torch.stack([torch.stack([torch.as_tensor(entry) for entry in row]) for row in entries]).cpu()
    return (found + found.mT) / 2


class LossCall(NamedTuple):
    """A call of a loss module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor


@contextmanager
def loss_calls(loss_fn: nn.Module) -> Iterator[list[LossCall]]:
    """A list to which every call of a loss module within the block is added."""
    calls: list[LossCall] = []
    handle = (module_called(loss_fn) or loss_fn).register_forward_hook(
        lambda module, args, kwargs, value: calls.append(LossCall(args, kwargs, value)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def curved_outputs(loss_fn: nn.Module, calls: list[LossCall], loss: Tensor, sign: int = 1) -> list[CurvedOutput]:
    """The outputs that a loss module was called on, with the Hessians of the objective in them.

    Args:
        loss_fn: The module.
        calls: Its calls; those whose value is not in the loss are left out.
        loss: With its graph, which stays.
        sign: -1 if the loss is maximised.

    Raises:
        ValueError: See :func:`curved_output`.
    """
    calls = [call for call in calls if call.value.requires_grad]
    values = [call.value for call in calls]
    weights = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True) if values else ()
    return [
        curved_output(loss_fn, call.args, call.kwargs, sign * float(weight.sum()))
        for call, weight in zip(calls, weights, strict=True)
        if weight is not None
    ]


def curved_output(loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: float) -> CurvedOutput:
    """The output that a loss module was called on, with the Hessian of ``weight`` times its value.

    Raises:
        ValueError: If the module gives one value per term, or the weight is negative.
        TypeError: If the output is complex.
    """
    given = list(args)
    names = ("outputs", "targets") if isinstance(loss_fn, SumOfLosses) else ("input", "target")
    given += [kwargs[name] for name in names[len(args) :]]
    refuse_complex(given[0])
    terms = loss_for(loss_fn).terms(*given, as_called=True)
    if terms.reduction == "none":
        raise ValueError(f"{loss_fn!r} returned one value per term, but its Hessian needs reduction='mean' or 'sum'.")
    terms.refuse_undefined()
    scale = weight / (float(terms.total) if terms.reduction == "mean" else 1.0)
    if scale < 0:
        raise ValueError(
            f"what is minimised holds a negative multiple of {loss_fn!r}, whose Gauss-Newton matrix is not positive "
            "semi-definite. maximize=True and a negated loss both turn signs."
        )
    value = terms.output if isinstance(loss_fn, SumOfLosses) else given[0]  # all outputs of a sum in one vector
    return CurvedOutput(value, lambda x: scale * terms.hessian_product(x), terms, scale)
