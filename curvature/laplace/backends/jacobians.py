"""Jacobians of the outputs and gradients of the loss, for single examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.overrides import TorchFunctionMode

from curvature.laplace.backends.batch import BatchBackend, BatchPass, Inputs
from curvature.matrices.examples import Examples, KeptGradients
from curvature.model.data import refuse_complex, resolve_output
from curvature.model.kernels import differentiable_kernels
from curvature.model.parameters import Parameters
from curvature.model.pullback import pull_back
from curvature.model.trees import tensors_in


class JacobianBackend(BatchBackend):
    """Base of all backends: Jacobians and gradients, which do not depend on the kind of curvature."""

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians of the outputs with respect to the parameters.

        Args:
            x: Inputs.
            enable_backprop: Keep the graph to the inputs.

        Returns:
            ``(M, C, P)`` and the outputs, ``(M, C)``; of outputs with more axes, C counts all entries of an example.
        """
        return self.last_layer_jacobians(x, enable_backprop) if self.last_layer else self._every(x, enable_backprop)

    def _every(self, x: Inputs, enable_backprop: bool) -> tuple[Tensor, Tensor]:
        """Jacobians by backward passes, one per output."""
        if enable_backprop:
            return self._differentiable_jacobians(x)
        with self.run_on(x) as run:
            examples = Examples.along(run.output, run.parameters, run.recorder)
            return self._followed(run, examples, examples.unit_signals())

    def kept_jacobians(self, x: Inputs) -> tuple[KeptGradients, Tensor]:
        """Jacobians by their factors, from which those of some examples and outputs can be formed, and the outputs.

        Args:
            x: Inputs.
        """
        with self.run_on(x) as run:
            examples = Examples.along(run.output, run.parameters, run.recorder)
            return examples.kept(examples.unit_signals()), run.output.detach()

    def last_layer_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The same for the last layer; ``phi (x) I`` where the outputs are linear in features phi."""
        features = self.features(x, enable_backprop)
        if features is None:
            return self._every(x, enable_backprop)
        return self.of_subnetwork(features.jacobians(), self.trainable()), features.output

    def selected_output_jacobians(
        self, x: Inputs, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Jacobians of some outputs of each example, at the cost of those.

        Args:
            x: Inputs.
            outputs: Indices ``(M,)`` or ``(M, K)``.
            enable_backprop: Keep the graph to the inputs.

        Returns:
            ``(M, K, P)`` and all outputs.
        """
        chosen = outputs.reshape(len(outputs), -1).long()
        if enable_backprop:
            Js, f = self._differentiable_jacobians(x)
            self._check_selection(chosen, f)
            return Js.gather(1, chosen.to(Js.device).unsqueeze(-1).expand(-1, -1, Js.shape[-1])), f
        with self.run_on(x) as run:
            self._check_selection(chosen, run.output)
            signals = []
            for column in chosen.to(run.output.device).unbind(1):
                signal = torch.zeros_like(run.output.detach(), memory_format=torch.contiguous_format)
                signal.view(len(signal), -1).scatter_(1, column.unsqueeze(1), 1)
                signals.append(signal)
            return self._followed(run, Examples.along(run.output, run.parameters, run.recorder), signals)

    def _check_selection(self, chosen: Tensor, f: Tensor) -> None:
        if len(chosen) != len(f):
            raise ValueError(f"outputs= has {len(chosen)} rows for a batch of {len(f)}; give one row per example.")

    def _followed(self, run: BatchPass, examples: Examples, signals: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.of_subnetwork(examples.gradients(signals).transpose(0, 1), run.parameters), run.output.detach()

    def _differentiable_jacobians(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Jacobians whose graph leads to the inputs, by vectorised backward passes."""
        parameters = self.trainable()

        def run(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}  # some are updated in train mode
            output = resolve_output(functional_call(self.model, buffers | values, (x,)))
            refuse_complex(output)
            return output.flatten(1), output

        with self.leaving_all(), torch.enable_grad(), differentiable_kernels(), _PlainLayerNorm():
            parts, f = jacrev(run, has_aux=True)(dict(parameters))
            Js = parameters.flatten(parts)
            _check_graph(Js, run(dict(parameters))[0], parameters, [t for t in tensors_in(x) if t.requires_grad])
        return self.of_subnetwork(Js, parameters), f

    functorch_jacobians = jacobians

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``lossfunc`` for each example, without ``factor``.

        Returns:
            ``(M, P)``, and the summed loss.
        """
        with self.run_on(x, y) as run:
            rows = run.examples().gradients([run.loss.gradient()])[0]
            return self.of_subnetwork(rows, run.parameters), run.loss.value().detach().to(run.output.dtype)


class _PlainLayerNorm(TorchFunctionMode):
    """Computes layer norms from their parts.

    The derivative of a vectorised backward pass through the fused kernel is wrong (seen in PyTorch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(axes, keepdim=True)
    y = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _check_graph(Js: Tensor, f: Tensor, parameters: Parameters, inputs: list[Tensor]) -> None:
    """Compare the Jacobians' derivative in the inputs, in random directions, with that of a plain backward pass."""
    if not inputs:
        return
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(shape, generator=generator).to(Js) for shape in (f.shape, Js.shape[-1:]))
    gradient = pull_back([f], list(parameters.values()), [u], create_graph=True)
    pairs = zip(parameters.items(), gradient, strict=True)
    flat = parameters.flatten({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})

    def slopes(value: Tensor) -> list[Tensor]:
        found = pull_back([value], inputs, [torch.ones_like(value)])
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]

    if not flat.requires_grad:
        return
    for plain, vectorised in zip(slopes(flat @ v), slopes((u.unsqueeze(1) @ Js).sum((0, 1)) @ v), strict=True):
        tolerance = torch.finfo(Js.dtype).eps ** 0.5
        if not torch.linalg.vector_norm(plain - vectorised) <= tolerance * (1 + torch.linalg.vector_norm(plain)):
            raise RuntimeError(
                "PyTorch's vectorised backward passes through this model have another derivative in the inputs than "
                "plain ones, so gradients through these Jacobians would be wrong. Use enable_backprop=False, or "
                "replace the fused operation in the model by plain ones."
            )
