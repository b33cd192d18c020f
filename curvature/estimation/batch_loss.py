"""The loss of one batch as the user means it: the targets beside the outputs, or what the model makes of its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.losses import AmbiguousClassAxisError, BatchDim, ClassDim, Loss, Terms, UnknownLossError, WeightedSum
from curvature.losses.picked import along
from curvature.model.data import Collated, Output, loss_in, refuse_complex, resolve_output
from solvers.outcome.memory import is_out_of_memory

#: Targets in words -> the targets.
Reading = tuple[str, Any]


def terms_of(
    loss: Loss,
    result: Any,
    x: Any,
    y: Any,
    output: Output | None,
    class_dim: ClassDim,
    check: bool = False,
    batch_dim: BatchDim = None,
) -> Terms:
    """The terms of a loss, from what the model returned: a tensor picked from it, or all that a sum of losses sees.

    Where the model computed a loss of its own from the labels of the batch, that is the loss: the labels are read as
    the model reads them.

    Args:
        loss: The user's loss.
        result: What the model returned.
        x: Inputs of the model.
        y: Targets, with further arguments of the loss in a tuple or list.
        output: Picks the output tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        check: Also look at the values.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.

    Raises:
        UnknownLossError: If ``output`` picks several tensors for a loss of one.
        ValueError: If the model's own loss is another one.
        TypeError: If the output is complex.
    """
    picked = result if output is None else output(result)
    joined = isinstance(loss, WeightedSum)
    if isinstance(class_dim, Mapping) and not joined:
        raise TypeError(f"class_dim={class_dim!r} is for sums of losses; for {loss!r} pass one axis.")
    read = joined or loss.reads(picked)
    if output is not None and not (read or isinstance(picked, Tensor)):
        raise UnknownLossError(
            f"output= must return a tensor, got {type(picked).__name__}: no derivatives are known for a loss of "
            f"several outputs, as {loss.loss_fn!r} here. Where it is a sum, each on its own output, write it as "
            "curvature.losses.SumOfLosses; curvature.hessian on one batch takes any."
        )
    z = picked if read else resolve_output(result, output)
    refuse_complex(z)

    def terms(targets: Any, axis: ClassDim) -> Terms:
        if isinstance(loss, WeightedSum):
            return loss.terms(z, targets, class_dim=axis, check=check)
        assert not isinstance(axis, Mapping)
        return loss.terms(z, *arguments(targets), class_dim=axis, check=check)

    own = own_loss(result, x)
    found = terms(y, class_dim) if own is None else _as_the_model_does(own, result, z, y, class_dim, loss, terms)
    return along(found, batch_dim, class_dim)


def arguments(y: Any) -> tuple[Any, ...]:
    """The arguments of a loss after the output: a target, or a tuple or list of the target and more.

    Raises:
        TypeError: If the target is no tensor.
    """
    given = tuple(y) if isinstance(y, (tuple, list)) else (y,)
    if not given or not isinstance(given[0], Tensor):
        what = type(given[0]).__name__ if given else "an empty tuple"
        raise TypeError(
            f"the target is a {what}, not a tensor. A batch is (x, target), or (x, (target, ...)) where the loss takes "
            "more, such as the variance of nn.GaussianNLLLoss; for several losses take SumOfLosses."
        )
    return given


def own_loss(result: Any, x: Any) -> Tensor | None:
    """The loss that a model computed itself from the labels among its inputs; ``None`` where it did not."""
    if isinstance(x, Collated):
        found = loss_in(result)
        return x.found if found is None else found
    return loss_in(result) if isinstance(x, Mapping) and "labels" in x else None


def read_for(loss_fn: Callable[[Any, Any], Tensor], result: Any, x: Any, z: Any, y: Any) -> Any:
    """The targets for a loss of which only the function is known, as the model reads them.

    Raises:
        ValueError: If the model's own loss is another one.
    """
    own = own_loss(result, x)
    if own is None:
        return y
    base = _compared_at(result, z)
    tried = {}
    for words, targets in _readings(y, z if isinstance(z, Tensor) else base, loss_fn):
        try:
            value = loss_fn(z, targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            continue  # of another shape
        if _agree(own, value, base):
            return targets
        tried[words] = float(value.detach())
    raise _another_loss(own, loss_fn, tried)


def require_terms(total: Tensor | float) -> None:
    """Refuse data of which no term counts, so that their mean loss would be 0/0.

    Args:
        total: Divisor of the mean loss over all the data.

    Raises:
        ValueError: If it is not positive.
    """
    if not total > 0:
        raise ValueError(
            f"No term of the loss counts in any batch: their total weight is {float(total):g}, so the loss is not "
            "defined. Check ignore_index, the class weights and the labels."
        )


def refuse_unreduced(terms: Terms) -> None:
    """Refuse a loss that returns one number per term.

    Raises:
        ValueError: If it does.
    """
    if terms.reduction == "none":
        raise ValueError("the loss has reduction='none', so it is no scalar. Use 'mean' or 'sum'.")


def refuse_beyond_outputs(terms: Terms, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a loss that depends on parameters other than through the model's output, such as one with a penalty.

    Raises:
        ValueError: Naming some of the parameters.
    """
    with torch.enable_grad():
        value = terms.beyond_output()
    if value is None:
        return
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    names = [name for name, g in zip(trained, found, strict=True) if g is not None]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"the loss depends on parameters ({names[0]}{more}) other than through the model's output, as one with a "
            "penalty on them does. Gauss-Newton and Fisher matrices and gradients of single examples see the output "
            "only, and would leave that part out. Take it out of the loss, and add its curvature to the matrix: that "
            "of (weight_decay / 2) * |theta|^2 is H.shift(weight_decay); optimizers take weight_decay=."
        )


def _as_the_model_does(
    own: Tensor,
    result: Any,
    z: Any,
    y: Any,
    class_dim: ClassDim,
    loss: Loss,
    terms: Callable[[Any, ClassDim], Terms],
) -> Terms:
    base = _compared_at(result, z)
    tried: dict[str, float] = {}
    reasons: list[Exception] = []
    for words, targets in _readings(y, z if isinstance(z, Tensor) else base, loss.loss_fn):
        for axis in (class_dim,) if class_dim is not None else (None, -1, 1):
            try:
                found = terms(targets, axis)
            except AmbiguousClassAxisError:
                continue  # the model knows which
            except (ValueError, TypeError) as error:
                reasons.append(error)
                break
            value = torch.where(found.mask, found.values(), 0.0).sum() / found.total
            if (found.empty and not bool(own.detach() > 0)) or _agree(own, value, base):
                return found
            tried[words] = float(value.detach())
            if axis is None:
                break
    raise _another_loss(own, loss.loss_fn, tried) from (reasons[0] if reasons else None)


def _compared_at(result: Any, z: Any) -> Tensor:
    """The tensor at which the derivatives of two losses are compared."""
    try:
        return resolve_output(result)
    except TypeError:
        if isinstance(z, Tensor):
            return z
        raise


def _readings(y: Any, output: Tensor, loss_fn: Any) -> Iterator[Reading]:
    """Ways in which models read labels, the plainest first."""
    yield "as they stand", y
    if not isinstance(y, Tensor):
        return
    if y.shape != output.shape and y.numel() == output.numel():
        yield "in the shape of the output", y.reshape(output.shape)
    if y.is_floating_point() or y.dim() != 2 or output.dim() != 3:
        return
    ignored = getattr(loss_fn, "ignore_index", -100)
    ahead = output.shape[1] - y.shape[1]
    if ahead == -1:  # output= left out the last position
        yield "of the next position", y[:, 1:]
    if ahead < 0:
        return
    placed = F.pad(y, (ahead, 0), value=ignored)  # positions of a learned prompt come first, and have no label
    if ahead:
        yield "after a prompt", placed
    yield "of the next position", F.pad(placed[:, 1:], (0, 1), value=ignored)


def _agree(own: Tensor, value: Tensor, base: Tensor) -> bool:
    """Whether two losses have the same value, and the same gradient at ``base``.

    The value alone does not tell: an untrained head gives every reading of the labels the same one.
    """
    a, b = own.detach().reshape(()).double(), value.detach().double()
    eps = torch.finfo(own.dtype).eps
    if not bool(torch.isfinite(a) & torch.isfinite(b)):
        return not bool(torch.isfinite(a) | torch.isfinite(b))  # refused elsewhere
    if not torch.isclose(a, b, rtol=max(1e-5, 4 * eps), atol=1e-12):
        return False
    if not (own.requires_grad and base.requires_grad and value.requires_grad):
        return True
    g, h = (
        torch.autograd.grad(v.sum(), base, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for v in (own, value)
    )
    slack = max(1e-4, 4 * torch.finfo(base.dtype).eps)
    dtype = torch.promote_types(g.dtype, torch.float32)
    off, size = (torch.linalg.vector_norm(v, dtype=dtype) for v in (g - h, g))
    return bool(off <= slack * size)


def _another_loss(own: Tensor, loss_fn: Any, tried: Mapping[str, float]) -> ValueError:
    shown = "; ".join(f"{value:.6g} with the labels {words}" for words, value in tried.items())
    return ValueError(
        f"the model computes its own loss from the labels of the batch, {float(own.detach()):.6g}, and {loss_fn!r} of "
        f"its outputs is another one ({shown or 'the labels do not fit the outputs'}). Pass the loss that the model "
        "computes. Or, for another loss, pass pairs (inputs, targets) without labels among the inputs: then the "
        "targets are those that loss_fn sees, at the positions of the outputs."
    )
