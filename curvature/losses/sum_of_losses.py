"""Weighted sums of losses, on several outputs of a model or on one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from curvature.losses.loss import Loss, loss_for, register_loss
from curvature.losses.terms import Layout, Terms

#: Class axis of the output, or for a sum of losses those of the outputs by key; ``None`` where shapes tell.
ClassDim = int | Mapping[Any, int] | None
#: Axis of the output that counts the examples, or for a sum of losses by key; ``None`` for the first.
BatchDim = int | Mapping[Any, int] | None


class SumOfLosses(nn.Module):
    r"""A weighted sum of losses, :math:`L = \sum_k w_k L_k(z_k, y_k)`, each on its own output or all on one.

    Outputs and targets are mappings, tuples, or objects with attributes (dataclasses), indexed by the keys of the
    losses; a plain tensor is seen by all of them. Curvature is linear in it: the GGN, and every kind of Fisher, is the
    weighted sum of those of the losses. For the empirical Fisher that is a definition: terms of different losses count
    as different terms, even if they belong to one example. A mean divides each loss by its own terms.

    Args:
        losses: ``{key: (weight, loss function)}``; all with ``reduction="mean"`` or all with ``"sum"``. Functions that
            take more than a target find a tuple in the targets.

    Raises:
        ValueError: If losses are missing, a weight is negative or not finite, or the reductions differ.
        UnknownLossError: If the derivatives of a loss are not known.

    Example:
        >>> loss_fn = SumOfLosses({"label": (1.0, nn.CrossEntropyLoss()), "depth": (0.5, nn.MSELoss())})
        >>> outputs = {"label": torch.zeros(4, 3), "depth": torch.zeros(4, 2)}
        >>> loss_fn(outputs, {"label": torch.tensor([0, 1, 2, 0]), "depth": torch.ones(4, 2)})
        tensor(1.5986)
    """

    def __init__(self, losses: Mapping[Any, tuple[float, Any]]) -> None:
        super().__init__()
        if not losses:
            raise ValueError("SumOfLosses needs a loss at least: {key: (weight, loss function)}.")
        self.weights: dict[Any, float] = {}
        self.losses: dict[Any, Loss] = {}
        for key, (weight, loss_fn) in losses.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of loss {key!r} must be finite and not negative, got {weight}.")
            if isinstance(loss_fn, SumOfLosses):
                raise ValueError(f"loss {key!r} is a sum of losses itself. Write its losses into this one.")
            self.weights[key], self.losses[key] = float(weight), loss_for(loss_fn)
        found = {key: loss.reduction for key, loss in self.losses.items()}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"the losses have different reductions ({found}), so their ratio would depend on how many examples a "
                "batch holds. Give all of them the same one, and put what is left into the weights."
            )
        # Registered, so that class weights follow the module to its device.
        self._parts = nn.ModuleList(
            loss.loss_fn for loss in self.losses.values() if isinstance(loss.loss_fn, nn.Module)
        )

    @property
    def reduction(self) -> str:
        """``"mean"`` or ``"sum"``, that of all the losses."""
        return next(iter(self.losses.values())).reduction

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """The sum, 0-d."""
        total: Any = 0.0
        for key, loss, output, given in self.each(outputs, targets):
            total = total + self.weights[key] * loss.evaluate(output, *given)
        return total

    def each(self, outputs: Any, targets: Any) -> Iterator[tuple[Any, Loss, Tensor, tuple[Any, ...]]]:
        """Key, loss, output, and target with the loss's further arguments."""
        for key, loss in self.losses.items():
            given = _pick(targets, key, "targets")
            given = tuple(given) if isinstance(given, (tuple, list)) else (given,)
            yield key, loss, _pick(outputs, key, "outputs"), given


class JoinedTerms(Terms):
    """The terms of several losses, on one vector that holds all outputs.

    Args:
        parts: ``{key: (scale, terms)}``: what the terms of each loss are multiplied by in the sum over all terms, and
            the terms.
        reduction: Of the losses. The divisor is that of the first.
    """

    def __init__(self, parts: Mapping[Any, tuple[Tensor, Terms]], reduction: str) -> None:
        self.parts = dict(parts)
        each = [terms for _, terms in parts.values()]
        with torch.enable_grad():  # the outputs have a graph even under no_grad
            output = torch.cat([terms.output.reshape(-1) for terms in each])
        mask = torch.cat([terms.mask.reshape(1, -1) for terms in each], dim=1)
        super().__init__(output, Layout(output.shape, ()), mask, each[0].total, reduction)
        self.hessian_is_fisher = all(terms.hessian_is_fisher for terms in each)

    @property
    def empty(self) -> bool:
        """Whether no term of any loss counts."""
        return all(terms.empty for _, terms in self.parts.values())

    def beyond_output(self) -> Tensor | None:
        found = [terms.beyond_output() for _, terms in self.parts.values()]
        values = [value for value in found if value is not None]
        return torch.stack(values).sum() if values else None

    def pieces(self, x: Tensor) -> list[Tensor]:
        """``(..., size)`` to one ``(..., *output.shape)`` per loss."""
        shapes = [terms.output.shape for _, terms in self.parts.values()]
        split = x.split([shape.numel() for shape in shapes], dim=-1)
        return [piece.reshape(*x.shape[:-1], *shape) for piece, shape in zip(split, shapes, strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`pieces`."""
        pairs = zip(pieces, self.parts.values(), strict=True)
        flat = [piece.reshape(*piece.shape[: piece.dim() - terms.output.dim()], -1) for piece, (_, terms) in pairs]
        return torch.cat(flat, dim=-1)

    def embed(self, key: Any, piece: Tensor) -> Tensor:
        """A signal of one loss, zero on the outputs of the others."""
        zeros = [piece if k == key else torch.zeros_like(terms.output.detach()) for k, (_, terms) in self.parts.items()]
        return self.join(zeros)

    def refuse_undefined(self) -> None:
        for _, terms in self.parts.values():
            terms.refuse_undefined()

    def indefinite(self) -> bool:
        return any(terms.indefinite() for _, terms in self.parts.values())

    def fisher(self, strict: bool = True) -> JoinedTerms:
        """Loss by loss, see :meth:`Terms.fisher`."""
        return self.change(lambda _, terms: terms.fisher(strict))

    def only(self, counts: Tensor) -> JoinedTerms:
        """See :meth:`Terms.only`; one number for the terms of all losses."""
        return self.change(lambda _, terms: terms.only(counts))

    def change(self, change: Callable[[Any, Terms], Terms]) -> JoinedTerms:
        """The same with the terms of each loss, called with its key, in another form on the same output."""
        other = copy.copy(self)
        other.parts = {key: (scale, change(key, terms)) for key, (scale, terms) in self.parts.items()}
        each = [terms for _, terms in other.parts.values()]
        other.mask = torch.cat([terms.mask.reshape(1, -1) for terms in each], dim=1)
        other.hessian_is_fisher = all(terms.hessian_is_fisher for terms in each)
        return other

    def value(self) -> Tensor:
        return torch.stack([scale * terms.value() for scale, terms in self.parts.values()]).sum()

    def values(self) -> Tensor:
        """Scaled terms of all losses, ``(1, T)``."""
        return torch.cat([(scale * terms.values()).reshape(1, -1) for scale, terms in self.parts.values()], dim=1)

    def gradient(self) -> Tensor:
        return self.join([terms.gradient() * scale for scale, terms in self.parts.values()])

    def hessian_product(self, v: Tensor) -> Tensor:
        pairs = zip(self.parts.values(), self.pieces(v), strict=True)
        return self.join([terms.hessian_product(piece) * scale.to(v.dtype) for (scale, terms), piece in pairs])

    def sample(self, generator: torch.Generator) -> Tensor:
        """Independent draws for all losses."""
        return self.join([terms.sample(generator) * scale.sqrt() for scale, terms in self.parts.values()])

    def sqrt_column(self, c: int) -> Tensor:
        """Refused: each loss has columns of its own."""
        self._refuse()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Refused: outputs of different losses are not of one shape."""
        self._refuse()

    def rows(self, x: Tensor) -> Tensor:
        """Refused: outputs of different losses are not of one shape."""
        self._refuse()

    def unrows(self, rows: Tensor) -> Tensor:
        """Refused: outputs of different losses are not of one shape."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"the terms of a sum of losses ({', '.join(map(repr, self.parts))}) are not of one shape, as this needs. "
            "Take the losses one by one, with output= to pick what each of them sees."
        )


@register_loss(SumOfLosses)
class WeightedSum(Loss):
    """:class:`SumOfLosses` as a loss with derivatives.

    Attributes:
        divisors: Divisor of each loss over all the data; ``None`` for a batch that is all of it.
    """

    loss_fn: SumOfLosses
    divisors: Mapping[Any, Tensor] | None = None

    def __init__(self, loss_fn: SumOfLosses) -> None:
        super().__init__(loss_fn)
        self.zero_when_perfect = all(loss.zero_when_perfect for loss in loss_fn.losses.values())

    def over(self, divisors: Mapping[Any, Tensor]) -> WeightedSum:
        """The same loss of batches that are parts of data with these divisors."""
        other = copy.copy(self)
        other.divisors = divisors
        return other

    def reads(self, result: Any) -> bool:
        """Always: each loss picks its part."""
        return True

    def joined(self, output: Any) -> Tensor:
        """The vector of all outputs, as in :class:`JoinedTerms`."""
        parts = [(loss, _pick(output, key, "outputs")) for key, loss in self.loss_fn.losses.items()]
        return torch.cat([(loss.joined(z) if loss.reads(z) else z).reshape(-1) for loss, z in parts])

    def terms(
        self,
        output: Any,
        target: Any,
        *extra: Tensor,
        class_dim: ClassDim = None,
        mask: Tensor | None = None,
        as_called: bool = False,
        check: bool = False,
    ) -> JoinedTerms:
        """See :meth:`Loss.terms`; outputs and targets as :class:`SumOfLosses` takes them, ``class_dim`` by key."""
        self.refuse_extra(extra)
        if mask is not None:
            raise TypeError("a sum of losses takes no mask=: use ignore_index or the targets of each loss.")
        found: dict[Any, Terms] = {}
        for key, loss, z, (y, *rest) in self.loss_fn.each(output, target):
            axis = class_dim.get(key) if isinstance(class_dim, Mapping) else class_dim
            found[key] = loss.terms(z, y, *rest, class_dim=axis, as_called=as_called, check=check)
        if check and self.divisors is None and self.reduction == "mean" and not all(t.empty for t in found.values()):
            for terms in found.values():
                terms.check()  # the mean of one loss would be 0/0, and so would the sum
        totals = self.divisors or {key: terms.total for key, terms in found.items()}
        first = next(iter(totals.values()))
        parts = {}
        for key, terms in found.items():
            ratio = first / totals[key] if self.reduction == "mean" else torch.ones_like(terms.total)
            weight = self.loss_fn.weights[key]
            parts[key] = (weight * ratio, terms if weight else terms.only(torch.zeros_like(terms.mask)))
        return JoinedTerms(parts, self.reduction)


def _pick(tree: Any, key: Any, what: str) -> Any:
    """The part of the outputs or targets that a loss sees."""
    if isinstance(tree, Tensor):
        return tree
    try:
        return tree[key] if isinstance(tree, Mapping) or isinstance(key, int) else getattr(tree, str(key))
    except (KeyError, IndexError, TypeError, AttributeError):
        if isinstance(tree, Mapping):
            there = f"the keys {list(tree)}"
        elif isinstance(tree, Sequence):
            there = f"{len(tree)} entries"
        else:
            there = f"the fields {[f.name for f in fields(tree)]}" if is_dataclass(tree) else "no such attribute"
        raise ValueError(
            f"SumOfLosses has a loss for {key!r}, but the {what}, a {type(tree).__name__}, have {there}. Name the "
            "losses after what the model returns, or pick it with output=."
        ) from None
