"""The Hessian of a loss with respect to an intermediate output of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvature.losses.loss import check_loss
from curvature.matrices.problem import Evaluation, one_batch
from curvature.model.arguments import a, checked
from curvature.model.data import Batch, Output
from curvature.model.pullback import Pullback, pull_back, refuse_differentiated_once
from curvature.model.settings import settings
from solvers import Function


@checked(loss_fn=check_loss, module=a(str, "the name of a module"))
def activation_hessian(
    model: nn.Module,
    loss_fn: Any,
    batch: Batch,
    module: str,
    *,
    output: Output | None = None,
    class_dim: int | None = None,
) -> Function:
    r"""Hessian of the loss of a batch with respect to the output of a module, at fixed parameters.

    .. math:: H = \nabla_h^2 L(h), \qquad h = \text{the module's output on the batch}

    The model runs once, now, and the graph behind the module is kept as long as the operator lives. Where examples do
    not interact H is block-diagonal over them.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss; any function of output and target that returns a scalar.
        batch: One batch ``(x, y)``.
        module: Name of the module in ``model.named_modules()``; it must be called once and return a tensor.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.

    Returns:
        Symmetric operator on tensors of the activation's shape.

    Raises:
        ValueError: If the module is missing, is called several times or not at all, or the loss does not depend
            on what it returns.
        TypeError: If it does not return a tensor.
    """
    modules = dict(model.named_modules())
    if module not in modules:
        raise ValueError(f"the model has no module {module!r}. There are: {', '.join(filter(None, modules))}.")
    problem = one_batch(model, loss_fn, batch, opaque=True, output=output, class_dim=class_dim)
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, result: Any) -> Tensor:
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{module} returns a {type(result).__name__}, and a Hessian is taken with respect to a tensor. Name a "
                "module inside it."
            )
        leaves.append(result.detach().requires_grad_())
        return leaves[-1].clone()  # later calls may work in place, which a leaf forbids

    found: list[Pullback] = []

    def visit(evaluation: Evaluation) -> None:
        if len(leaves) != 1:
            raise ValueError(
                f"{module} was called {len(leaves)} times in one pass; the Hessian is taken with respect to the result "
                "of a single call."
            )
        loss = evaluation.loss() / evaluation.total
        gradient = (
            pull_back([loss], leaves, [torch.ones_like(loss)], create_graph=True)[0] if loss.requires_grad else None
        )
        if gradient is None:
            raise ValueError(f"the loss does not depend on what {module} returns.")
        refuse_differentiated_once([gradient])
        found.append(Pullback([gradient], leaves))

    handle = modules[module].register_forward_hook(cut)
    try:
        problem.visit(visit, "activation")
    finally:
        handle.remove()
    leaf, device = leaves[0], leaves[0].device

    def product(x: Tensor) -> Tensor:
        problem.check_unchanged()
        # One vector at a time: activations are large, and their number is that of the whole batch.
        vectors = x.reshape(-1, *leaf.shape)
        with settings(model, problem.random, problem.parameters.device):
            rows = [found[0]([v.unsqueeze(0)])[0][0] for v in vectors]
        return torch.stack(rows).reshape(x.shape) if rows else torch.zeros_like(x)

    return Function(product, tuple(leaf.shape), symmetric=True, dtype=leaf.dtype, device=device)
