"""Vector-Jacobian products through a graph that is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


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
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # users need no warning about operations that vmap loops over
                    return self._grad(live, True)
            except RuntimeError:  # an operation that cannot be vectorised; one by one it works, or raises its own error
                self.batched = False
        each = [self._grad([c[i] for c in live], False) for i in range(k)]
        return [_stacked(column) for column in zip(*each, strict=True)]

    def _grad(self, cotangents: list[Tensor], batched: bool) -> list[Tensor | None]:
        if not cotangents:
            return [None] * len(self._inputs)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            self._outputs, self._inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return list(found)


def _stacked(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    """Gradients of one input under k cotangents, ``(k, *)``; ``None`` if none arrived."""
    arrived = next((g for g in gradients if g is not None), None)
    if arrived is None:
        return None
    if len(gradients) == 1:
        return arrived.unsqueeze(0)
    return torch.stack([torch.zeros_like(arrived) if g is None else g for g in gradients])


def refuse_differentiated_once(tensors: Iterable[Tensor]) -> None:
    """Refuse gradients that cannot be differentiated again.

    PyTorch marks them by a node that raises, but never reaches it where gradients are taken with respect to given
    inputs: their derivative would silently be zero.

    Raises:
        RuntimeError: If there is such a node in the graph of ``tensors``.
    """
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "the model contains an operation that can be differentiated only once (an autograd.Function whose "
                "backward is marked once_differentiable, as custom kernels are), so second derivatives do not exist. "
                "Replace it by an implementation in plain torch operations."
            )
        following = [before for before, _ in node.next_functions if before is not None and before not in seen]
        seen.update(following)
        waiting.extend(following)
