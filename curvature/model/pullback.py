"""Vector-Jacobian products through a graph that is kept."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from curvature.model.backward_hooks import muted, of_leaves
from curvature.model.graph_nodes import below
from curvature.model.inner_backward import entered_by, gradients_kept, leads_to_custom
from curvature.model.parameters import tensor_of_its_own
from curvature.model.unread import Unread
from solvers.outcome.memory import is_out_of_memory

_ONCE = (
    ", or take what needs first derivatives only: ggn and fisher with another structure than 'full', or an optimizer "
    "such as KFAC or SOAP."
)


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
    batched: bool = False,
    numbers: bool = True,
) -> list[Tensor | None]:
    """What ``torch.autograd.grad`` gives, ``None`` where nothing arrives, for cotangents of the outputs' shapes.

    Nothing arrives at tensors that require no gradient.

    Hooks on parameters among the inputs are not run.

    To compare the shapes, torch loads a package for symbolic mathematics, which takes most of a second: while nothing
    else has loaded it, its engine is called without the comparison.

    With ``numbers=False`` what is returned has its graph (``create_graph``) and numbers that nobody may read: what
    only they take is not computed, unless custom functions are on the way, which may read memory themselves.

    Raises:
        NoSecondDerivativeError: If an operation cannot be differentiated once more.
        InnerBackwardError: If a custom function runs a backward pass of its own, which writes to ``.grad``.
    """
    with torch._C.DisableTorchFunction():  # what is asked of tensors here is no call of the user's
        frozen = [isinstance(x, Tensor) and not x.requires_grad for x in inputs]  # since the graph was made
        given = tuple(tensor_of_its_own(c) for c in cotangents)
        hooks = list(of_leaves(inputs))
    if any(frozen):
        rest = [x for x, out in zip(inputs, frozen, strict=True) if not out]
        options = {"create_graph": create_graph, "retain_graph": retain_graph, "batched": batched, "numbers": numbers}
        arrived = iter(pull_back(outputs, rest, cotangents, **options) if rest else ())
        return [None if out else next(arrived) for out in frozen]
    unread = None if numbers or not create_graph or leads_to_custom(outputs) else Unread()

    found: tuple[Tensor | None, ...]
    with differentiated_twice(), gradients_kept(outputs, inputs), muted(hooks), unread or nullcontext():
        if batched or "torch.fx.experimental.symbolic_shapes" in sys.modules:
            found = torch.autograd.grad(
                list(outputs),
                list(inputs),
                list(given),
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
        else:
            found = torch.autograd._engine_run_backward(  # type: ignore[attr-defined]
                tuple(outputs), given, retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
            )
    if unread is not None:
        unread.close(found)
    return list(found)


class _Loops:
    """The filter for warnings about loops, how many threads need it, and where it was put."""

    lock = threading.Lock()
    users = 0
    entry: Any = None


@contextmanager
def quiet_loops() -> Iterator[None]:
    """Users need no warning about operations that vmap loops over.

    The filters of :mod:`warnings` belong to the process: one is added, for these warnings alone, and taken out again.
    """
    with _Loops.lock:
        _Loops.users += 1
        if _Loops.users == 1:
            warnings.filterwarnings("ignore", message="There is a performance drop because")
            _Loops.entry = warnings.filters[0]
    try:
        yield
    finally:
        with _Loops.lock:
            _Loops.users -= 1
            if not _Loops.users and _Loops.entry in warnings.filters:
                warnings.filters.remove(_Loops.entry)  # type: ignore[attr-defined]


class Pullback:
    """The transposed Jacobian of a recorded function: cotangents of its outputs to cotangents of its inputs.

    Args:
        outputs: Tensors with a graph (those without contribute nothing).
        inputs: Tensors of that graph, or edges of it.
        batched: Pull back a block of cotangents at once; becomes False where an operation cannot be vectorised.
    """

    def __init__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor | GradientEdge], batched: bool = True
    ) -> None:
        self._live = [i for i, output in enumerate(outputs) if output.requires_grad]
        self._outputs = [outputs[i] for i in self._live]
        self._inputs: list[Any] = list(inputs)  # torch's annotations ask for either sort
        self.batched = batched

    def __call__(self, cotangents: Sequence[Tensor], block: bool = True) -> list[Tensor]:
        """Pull back one cotangent per output, or a block of them, to inputs that are tensors.

        Args:
            cotangents: One ``(*output.shape)`` per output; for a block ``(k, *output.shape)``.
            block: Whether they are blocks.

        Returns:
            One ``(*input.shape)`` per input, or ``(k, *input.shape)``; the graph stays.
        """
        lead = cotangents[0].shape[:1] if block else ()
        found = self.arriving(cotangents) if block else self._grad([cotangents[i] for i in self._live], False)
        pairs = [(x, g) for x, g in zip(self._inputs, found, strict=True) if isinstance(x, Tensor)]
        return [x.new_zeros(*lead, *x.shape) if g is None else g for x, g in pairs]

    def arriving(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients under a block of cotangents, ``(k, *input.shape)`` per input; ``None`` for inputs not reached."""
        live = [cotangents[i] for i in self._live]
        k = len(cotangents[0])
        if k > 1 and self.batched:
            try:
                with quiet_loops():
                    return self._grad(live, True)
            except RuntimeError as error:  # an operation that cannot be vectorised; one by one it works, or tells why
                if is_out_of_memory(error):
                    raise
                self.batched = False
        each = [self._grad([c[i] for c in live], False) for i in range(k)]
        return [_stacked(column) for column in zip(*each, strict=True)]

    def _grad(self, cotangents: list[Tensor], batched: bool) -> list[Tensor | None]:
        if not cotangents:
            return [None] * len(self._inputs)
        return pull_back(self._outputs, self._inputs, cotangents, batched=batched)


def _stacked(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    """Gradients of one input under k cotangents, ``(k, *)``; ``None`` if none arrived."""
    arrived = next((g for g in gradients if g is not None), None)
    if arrived is None:
        return None
    if len(gradients) == 1:
        return arrived.unsqueeze(0)
    return torch.stack([torch.zeros_like(arrived) if g is None else g for g in gradients])


class NoSecondDerivativeError(RuntimeError):
    """The model holds an operation that PyTorch can differentiate only once."""


@contextmanager
def differentiated_twice() -> Iterator[None]:
    """Say in words which operation has no second derivative, where PyTorch says which kernel."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
        if found is None:
            raise
        raise NoSecondDerivativeError(
            f"the model holds an operation that PyTorch can differentiate only once ({found[1]}), so second "
            f"derivatives do not exist. Replace it by an implementation in plain torch operations{_ONCE}"
        ) from error


def refuse_differentiated_once(tensors: Iterable[Tensor]) -> None:
    """Refuse gradients that cannot be differentiated again.

    PyTorch marks them by a node that raises, but never reaches it where gradients are taken with respect to given
    inputs: their derivative would silently be zero.

    Raises:
        NoSecondDerivativeError: If there is such a node in the graph of ``tensors``.
    """
    if any(node.name() == "torch::autograd::Error" for node in below(tensors)):
        raise NoSecondDerivativeError(
            "the model contains an operation that can be differentiated only once (an autograd.Function whose "
            "backward is marked once_differentiable, as custom kernels are), so second derivatives do not exist. "
            f"Replace it by an implementation in plain torch operations{_ONCE}"
        )


def refuse_hidden(output: Tensor) -> None:
    """Refuse custom functions that run a backward pass of their own: what they hide would count as zero.

    Costs a backward pass, where there are custom functions.

    Raises:
        InnerBackwardError: If one wrote to the ``.grad`` of a parameter.
    """
    if output.requires_grad and (entered := entered_by([output])):
        pull_back([output], entered, [torch.ones_like(output)])


def refuse_outside_of_autograd(value: Tensor, inputs: Sequence[Tensor]) -> None:
    r"""Refuse operations whose backward autograd cannot follow.

    Functions of the user's may take it to NumPy, ``detach``, or another library, and products with sparse tensors lose
    the derivative of their entries; derivatives would silently be zero. :math:`\langle J^\top u, v \rangle` is linear
    in u, so that its derivative in u must give it back. Costs two backward passes, where there is such an operation.

    Args:
        value: What is differentiated, with its graph.
        inputs: With respect to what.

    Raises:
        NoSecondDerivativeError: If the derivative is lost.
    """
    custom = {n.name() for n in below([value]) if isinstance(n, BackwardCFunction) or "Sparse" in n.name()}
    if not custom:
        return
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.detach())

    with torch.enable_grad():
        u = noise(value).requires_grad_()
        pairs = [(g, noise(g)) for g in pull_back([value], inputs, [u], create_graph=True) if g is not None]
        refuse_differentiated_once(g for g, _ in pairs)
        products = [(g * v).sum() for g, v in pairs]
        total = torch.stack([x.double() for x in products]).sum() if products else value.new_zeros(())
        (image,) = pull_back([total], [u], [torch.ones_like(total)]) if total.requires_grad else [None]
    found = 0.0 if image is None else float((image * u).detach().double().sum())
    size = sum(float((g * v).detach().abs().double().sum()) for g, v in pairs)
    if abs(found - float(total.detach())) > torch.finfo(value.dtype).eps ** 0.5 * size:
        raise NoSecondDerivativeError(
            f"the backward of {', '.join(sorted(custom))} leaves autograd (by NumPy, detach, another library, or in a "
            "product with a sparse tensor whose entries depend on parameters), so that its derivative would be lost "
            f"without a word. Write it in torch operations on dense tensors{_ONCE}"
        )
