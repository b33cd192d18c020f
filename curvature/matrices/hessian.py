"""The Hessian of a loss over a data set."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from curvature.estimation.finite import refuse_nonfinite
from curvature.losses import BatchDim, ClassDim
from curvature.losses.loss import check_loss
from curvature.matrices.dataset_operator import MEMORY, DatasetOperator, MatrixArguments, Product
from curvature.matrices.problem import Evaluation, Problem, gradient_of
from curvature.model.arguments import checked, one_of
from curvature.model.data import Data, Output
from curvature.model.parameters import Parameters
from curvature.model.pullback import Pullback, refuse_differentiated_once, refuse_outside_of_autograd
from solvers import BlockDiagonal, Dense, Diagonal, LinearOperator, Segment

HessianStructure = Literal["full", "dense", "layer", "diagonal"]


class Hessian(DatasetOperator):
    """Matrix-free Hessian on the flat parameter vector, by reverse over reverse; made by :func:`hessian`."""

    title = "Hessian"

    def record(self, evaluation: Evaluation) -> Product:
        return second_derivative(self.gradient(evaluation), self.rows, self.columns)

    def gradient(self, evaluation: Evaluation) -> dict[str, Tensor]:
        """Gradient with respect to the columns, with its graph; zeros for parameters the loss does not use."""
        loss = evaluation.loss()
        if evaluation.first:
            if evaluation.terms is not None:
                evaluation.terms.refuse_undefined()
            refuse_outside_of_autograd(loss, list(self.columns.values()))
        gradient = gradient_of(loss, self.columns, create_graph=True, numbers=False)
        if evaluation.first:
            refuse_differentiated_once(gradient.values())
        return gradient

    def exact_diagonal(self) -> Tensor:
        """Exact diagonal ``(P,)``, by one product per parameter, each within its tensor.

        Costs one pass over the data, with P second backward passes per batch: meant for small models. An estimate at a
        chosen cost is ``solvers.diagonal(op)``.
        """
        tensors = [Parameters(self.problem.model, name) for name in self._square()]
        return torch.cat(self._within(tensors, diagonal=True))

    def blocks(self) -> dict[str, Tensor]:
        """Dense diagonal blocks of the modules, ``{module name: (n, n)}``; costs P products within the modules.

        A block holds the parameters that a module owns, in the order of the flat vector.
        """
        modules = {
            module: Parameters(self.problem.model, list(names))
            for module, names in groupby(self._square(), key=lambda name: name.rpartition(".")[0])
        }
        return dict(zip(modules, self._within(list(modules.values()), diagonal=False), strict=True))

    def _square(self) -> Parameters:
        if not self.symmetric:
            raise ValueError(f"{self!r} is a block off the diagonal: it has no diagonal of its own.")
        return self.rows

    def _within(self, groups: list[Parameters], diagonal: bool) -> list[Tensor]:
        """Diagonal blocks of groups of parameters, or their diagonals only."""
        out = [
            torch.zeros(group.size if diagonal else (group.size, group.size), dtype=self.dtype, device=self.device)
            for group in groups
        ]

        def visit(evaluation: Evaluation) -> None:
            gradient, step = self.gradient(evaluation), self.chunk(evaluation.nbytes)
            for group, result in zip(groups, out, strict=True):
                product = second_derivative(gradient, group, group)
                for start in range(0, group.size, step):
                    stop = min(group.size, start + step)
                    unit = torch.zeros(stop - start, group.size, dtype=group.dtype, device=self.device)
                    unit.diagonal(start).fill_(1)
                    image = product([v.to(group[name].dtype) for name, v in group.unflatten(unit).items()], True)
                    columns = group.flatten(dict(zip(group, image, strict=True)))
                    result[start:stop] += columns.diagonal(start) if diagonal else columns

        total = self.problem.visit(visit, "Hessian within blocks", count=True)
        self.problem.shares.sum(*out)
        for result, group in zip(out, groups, strict=True):
            refuse_nonfinite(result, "the Hessian", group, self.again)
        return [result / total for result in out]


def second_derivative(gradient: dict[str, Tensor], rows: Parameters, columns: Parameters) -> Product:
    """Product with the derivative of ``gradient`` (of the columns) with respect to the rows.

    Args:
        gradient: Gradient with its graph, for the columns at least.
        rows: Parameters of the result.
        columns: Parameters of the vectors.

    Returns:
        Function from tensors ``(*shape)`` of the columns, or ``(k, *shape)``, to such tensors of the rows.
    """
    return Pullback([gradient[name] for name in columns], list(rows.values()))


@overload
def hessian(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: Literal["full"] = ..., **options: Unpack[MatrixArguments]
) -> Hessian: ...
@overload
def hessian(
    model: nn.Module, loss_fn: Any, data: Data, *, structure: HessianStructure, **options: Unpack[MatrixArguments]
) -> LinearOperator: ...
@checked(loss_fn=check_loss, structure=one_of(HessianStructure))
def hessian(
    model: nn.Module,
    loss_fn: Any,
    data: Data,
    *,
    structure: HessianStructure = "full",
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
    keep_graph: bool | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
    process_group: Any = None,
) -> LinearOperator:
    r"""Hessian of the loss over the data with respect to the parameters, at their current values.

    .. math:: H = \nabla^2_\theta L, \qquad L = \text{the loss of all data as one batch}

    Batches are weighted by their share of the divisor of a mean loss (valid tokens, class weights), so the result
    does not depend on how the data are split. The model is evaluated in its current mode; in train mode a batch norm
    makes examples of a batch interact, and dropout is held at one draw of its masks.

    ``"full"`` is matrix-free: a product costs 2.5 to 3.5 gradients, or 1.4 to 2.5 with the graph kept, and a block of
    vectors one pass over the data. The other structures are stored and exact: ``"dense"`` (P products, P^2 numbers),
    ``"layer"`` (dense blocks of the modules; P products, each within a module) and ``"diagonal"`` (P products, each
    within a parameter), which is meant for small models; ``solvers.diagonal`` estimates the diagonal of ``"full"``.

    Args:
        model: Any module.
        loss_fn: The loss. With one batch of data, any function of output and target that returns a scalar.
        data: One batch ``(x, y)`` or a re-iterable of batches.
        structure: ``"full"``, ``"dense"``, ``"layer"`` or ``"diagonal"``.
        params: Names, globs or tensors that restrict the parameters; ``op.block(rows, columns)`` cuts out blocks.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open; by key for a sum of losses.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        keep_graph: Keep the graph of the gradient between products, so that they need no forward pass; it holds the
            activations of the forward pass and of the backward pass, several times the memory of a training step,
            as long as the operator lives. By default it is kept if the data are one batch.
        memory: Bytes that intermediate results of a block of vectors may take.
        progress: Show a progress bar; by default on passes of more than a few seconds.
        process_group: Processes whose data together are the data; every one of them makes the same calls, and gets
            the matrix of all data. ``torch.distributed.group.WORLD`` for all.

    Returns:
        Symmetric operator on the flat parameter vector, in float32 at least.

    Raises:
        ValueError: If the structure is unknown or the loss does not depend on the parameters.
        TypeError: If the data can be seen only once.
        UnknownLossError: If the loss is unknown, and neither a mean nor a sum over examples that joins batches.
        RuntimeError: In products, if parameters changed since, the data differ between passes, or the model has no
            second derivative.

    References:
        Pearlmutter (1994), "Fast exact multiplication by the Hessian".
    """
    problem = Problem(
        model,
        loss_fn,
        data,
        params=params,
        output=output,
        class_dim=class_dim,
        batch_dim=batch_dim,
        progress=progress,
        opaque=True,
        process_group=process_group,
    )
    full = Hessian(problem, keep_graph=keep_graph, memory=memory)
    match structure:
        case "full":
            return full
        case "dense":
            return Dense(full.to_dense())
        case "diagonal":
            return Diagonal(full.exact_diagonal())
    blocks = [Dense(matrix) for matrix in full.blocks().values()]
    starts = torch.tensor([0] + [len(block.matrix) for block in blocks]).cumsum(0).tolist()
    places = [Segment(start, block.in_shape) for start, block in zip(starts, blocks, strict=False)]
    return BlockDiagonal(blocks, places, problem.parameters.size)
