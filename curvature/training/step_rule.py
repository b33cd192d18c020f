"""The step of an optimizer as a linear map and a momentum, which tell where steps become unstable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvature.layers.block import BlockPlace
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped_optimizer
from solvers import Eigh, Kronecker, LinearOperator, SolverError, power
from solvers.precision import working_dtype

# Largest block whose root is taken densely, where its structure has none.
_DENSE = 4096
# Share of an average's weight that may be missing.
_UNSETTLED = 0.01

Root = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepRule:
    r"""Steps :math:`v \leftarrow \mu v + S (\nabla L + w \theta)`, :math:`\theta \leftarrow (1 - r)\, \theta - v`.

    Attributes:
        root: Product with the symmetric root of S on the flat vector, ``(*batch, P)``; S holds the learning rates.
        momentum: mu.
        nesterov: Whether the step looks ahead.
        lr: The learning rate, where all parameters share one, else ``None``.
        l2: w ``(P,)``, weight decay that is part of the gradient.
        decay: r, share of the parameters that decoupled weight decay takes away in a step.
        clipped: Whether the optimizer may shorten its steps (``kl_clip``), so that they are stabler than S says.
        name: Of the optimizer.
        plain: The factor of the whole gradient, where S is a multiple of the identity, else ``None``.
        settled: Whether averages that began at zero hold 99 % of their weight; before, S is about to change.
    """

    root: Root
    momentum: float
    nesterov: bool
    lr: float | None
    l2: Tensor
    decay: float
    clipped: bool
    name: str
    plain: float | None = None
    settled: bool = True

    @property
    def threshold(self) -> float:
        r"""Eigenvalue of :math:`S H` above which a quadratic diverges.

        At the edge the iteration has the root -1, it oscillates with period two:
        :math:`(2 - r)(1 + \mu)`, with Nesterov's momentum divided by :math:`1 + 2 \mu`.
        """
        plain = (2 - self.decay) * (1 + self.momentum)
        return plain / (1 + 2 * self.momentum) if self.nesterov else plain


@dataclass(frozen=True)
class _Group:
    """The rule of one group of parameters; ``scale`` are the entries of S, parameter by parameter."""

    scale: Mapping[str, Tensor]
    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    l2: float = 0.0
    decay: float = 0.0
    settled: bool = True


def gradient_descent(
    parameters: Parameters,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    preconditioner: LinearOperator | None = None,
) -> StepRule:
    """The rule of gradient descent, preconditioned by a positive definite operator on the flat vector, if there is one.

    Raises:
        ValueError: If a number is out of range, or the operator does not act on the flat vector.
    """
    if not (math.isfinite(lr) and lr > 0 and 0 <= momentum < 1):
        raise ValueError(f"lr is a positive number and momentum one in [0, 1), got {lr} and {momentum}.")
    group = _Group(_constant(parameters, list(parameters), lr), lr, momentum, nesterov)
    rule = _combined(parameters, [group], "gradient descent")
    if preconditioner is None:
        return rule
    if preconditioner.in_shape != (parameters.size,):
        raise ValueError(
            f"preconditioner must act on ({parameters.size},), the flat vector; {preconditioner!r} does not."
        )
    root = root_of(preconditioner)
    return replace(rule, plain=None, root=lambda x: math.sqrt(lr) * (root @ x.to(root.dtype)).to(x.dtype))


def rule_of(optimizer: torch.optim.Optimizer, model: nn.Module, parameters: Parameters) -> StepRule:
    r"""The rule of an optimizer at its present state.

    * ``SGD``: :math:`S = \eta (1 - \tau) I` with dampening :math:`\tau`.
    * ``Adam``, ``AdamW``: :math:`S = \eta (1 - \beta_1) P^{-1}`, where P is the diagonal by which the next step would
      divide if the second moments stayed as they are, bias corrections included.
    * ``RMSprop``: :math:`S = \eta P^{-1}` likewise.
    * Optimizers of ``precond`` that hold ``preconditioners``: S is the learning rate times their inverses.

    Args:
        optimizer: The optimizer; what is preconditioned must have been stepped at least once.
        model: The model that it trains.
        parameters: Those of the model that are asked for.

    Raises:
        TypeError: If the optimizer is of another kind, or its steps are not a linear map of the gradient.
        ValueError: If groups differ in momentum, a parameter is in no group, or the state is missing.
    """
    known = {id(p): name for name, p in parameters.items()}
    groups = []
    optimizer = unwrapped_optimizer(optimizer)
    for group in optimizer.param_groups:
        names = [known[id(p)] for p in group["params"] if id(p) in known]
        if names:
            groups.append(_group(optimizer, group, parameters, names))
    missing = set(parameters) - {name for group in groups for name in group.scale}
    if missing:
        raise ValueError(
            f"{sorted(missing)[0]} is not among the parameters of {type(optimizer).__name__} ({len(missing)} are not), "
            "so it does not move. Restrict the question with params= to those that do."
        )
    name = type(optimizer).__name__
    blocks = getattr(optimizer, "preconditioners", None)
    if getattr(optimizer, "step_size", None) is not None:
        raise TypeError(f"{name} chooses the length of each step anew (step_size=), so its steps have no fixed edge.")
    of_model = {n for n, _ in model.named_parameters()}
    if strange := [n for n, p in (blocks or {}).items() if not of_model.issuperset(p.estimator.block.names)]:
        raise ValueError(f"block {strange[0]} of {name} is none of this model's: it was made for another model.")
    if blocks is not None and not blocks:
        raise ValueError(f"{name} holds no preconditioner yet; ask again after its first step.")
    clipped = any(group.get("kl_clip") is not None for group in optimizer.param_groups)
    return _combined(parameters, groups, name, blocks, clipped)


def _group(optimizer: Any, group: Mapping[str, Any], parameters: Parameters, names: list[str]) -> _Group:
    kind = type(optimizer).__name__
    if group.get("maximize"):
        raise ValueError(f"{kind} maximises: it leaves maxima alone, and the edge of stability is one of minima.")
    lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if hasattr(optimizer, "preconditioners"):
        return _of_precond(kind, group, parameters, names, lr, decay)
    momentum = float(group.get("momentum", 0.0))
    match optimizer:
        case torch.optim.SGD():
            scale = lr * (1 - float(group["dampening"])) if momentum else lr
            scales = _constant(parameters, names, scale)
            return _Group(scales, lr, momentum, bool(group["nesterov"]), decay)
        case torch.optim.Adam():  # AdamW is one
            beta1, beta2 = (float(beta) for beta in group["betas"])
            scales, settled = {}, True
            for name in names:
                state = _state(optimizer, parameters[name], name)
                step = float(state["step"]) + 1
                settled &= beta1**step < _UNSETTLED
                square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                divisor = (square / (1 - beta2**step)).sqrt() + float(group["eps"])
                scales[name] = lr * (1 - beta1) / ((1 - beta1**step) * divisor)
            decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
            l2, shrinking = (0.0, lr * decay) if decoupled else (decay, 0.0)
            return _Group(scales, lr, beta1, False, l2, shrinking, settled)
        case torch.optim.RMSprop():
            scales, settled = {}, True
            for name in names:
                state = _state(optimizer, parameters[name], name)
                settled &= float(group["alpha"]) ** float(state["step"]) < _UNSETTLED
                square = state["square_avg"] - (state["grad_avg"].square() if group["centered"] else 0)
                scales[name] = lr / (square.sqrt() + float(group["eps"]))
            return _Group(scales, lr, momentum, False, decay, 0.0, settled)
    raise TypeError(
        f"the steps of {kind} are not known; those of SGD, Adam, AdamW, RMSprop and of optimizers of precond that hold "
        "preconditioners are. Pass lr=, momentum= and preconditioner= (an operator P^-1 on the flat vector) instead."
    )


def _of_precond(
    kind: str, group: Mapping[str, Any], parameters: Parameters, names: list[str], lr: float, decay: float
) -> _Group:
    form = group.get("decay", "decoupled")
    if decay and form not in ("decoupled", "l2"):
        raise TypeError(
            f"{kind} has decay={form!r}, which is no linear map of the parameters; 'decoupled' and 'l2' are."
        )
    l2, decoupled = (decay, 0.0) if form == "l2" else (0.0, lr * decay)
    scales = _constant(parameters, names, lr)
    return _Group(scales, lr, float(group.get("momentum", 0.0)), bool(group.get("nesterov")), l2, decoupled)


def _constant(parameters: Parameters, names: list[str], value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(parameters[name].detach(), value) for name in names}


def _state(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> dict[str, Any]:
    state = optimizer.state.get(p, {})
    if "step" not in state:
        raise ValueError(f"{type(optimizer).__name__} has no state of {name} yet; ask again after its first step.")
    return state


def _combined(
    parameters: Parameters,
    groups: list[_Group],
    name: str,
    blocks: Mapping[str, Any] | None = None,
    clipped: bool = False,
) -> StepRule:
    shared = {(group.momentum, group.nesterov, group.decay) for group in groups}
    if len(shared) > 1:
        raise ValueError(
            f"the groups of {name} differ in (momentum, nesterov, lr * weight decay): {sorted(shared)}, so no one "
            "threshold holds. Restrict the question with params= to one group."
        )
    ((momentum, nesterov, decay),) = shared
    wide = working_dtype(parameters)
    scale = parameters.flatten({n: s for group in groups for n, s in group.scale.items()}).to(wide)
    l2 = {n: torch.full_like(s, group.l2) for group in groups for n, s in group.scale.items()}
    lrs = {group.lr for group in groups}
    root = scale.sqrt()
    places = _places(parameters, blocks or {})

    def product(x: Tensor) -> Tensor:
        y = x.clone()
        for place, op in places:
            place.scatter((op @ place.gather(x).to(op.dtype)).to(y.dtype), y)
        return y * root

    if places and not all(_constant_within(place, scale) for place, _ in places):
        raise ValueError(
            f"{name} has blocks whose parameters have different learning rates; S has no simple root there."
        )
    rate = lrs.pop() if len(lrs) == 1 else None
    plain = float(scale[0]) if not places and bool((scale == scale[0]).all()) else None
    l2_all, settled = parameters.flatten(l2).to(wide), all(group.settled for group in groups)
    return StepRule(product, momentum, nesterov, rate, l2_all, decay, clipped, name, plain, settled)


def _constant_within(place: BlockPlace, scale: Tensor) -> bool:
    values = place.gather(scale)
    return bool((values == values.flatten()[0]).all())


def _places(parameters: Parameters, blocks: Mapping[str, Any]) -> list[tuple[BlockPlace, LinearOperator]]:
    """Where the blocks lie whose parameters are asked for, and the roots of their inverses."""
    sizes = {name: p.numel() for name, p in parameters.items()}
    found = []
    for name, preconditioner in blocks.items():
        block = preconditioner.estimator.block
        inside = [n in sizes for n in block.names]
        if not any(inside):
            continue
        if not all(inside):
            raise ValueError(f"block {name} joins parameters of which params= leaves some out; ask for all of them.")
        if preconditioner.inverse is None:
            raise ValueError(f"block {name} has no inverse yet; ask again after the optimizer's first step.")
        found.append((BlockPlace.of(block, parameters.starts, sizes), root_of(preconditioner.inverse)))
    return found


def root_of(op: LinearOperator) -> LinearOperator:
    """The symmetric root of a positive definite operator, by its structure where it has one.

    Raises:
        ValueError: If it has none and is too large to be formed.
    """
    if isinstance(op, Kronecker) and not op.stack:
        return Kronecker(*(root_of(factor) for factor in op.factors))
    try:
        return power(op, 0.5, Eigh())
    except SolverError:
        size = math.prod(op.in_shape)
        if size > _DENSE:
            raise ValueError(
                f"{op!r} has no root by structure, and is too large to form ({size} > {_DENSE})."
            ) from None
    return power(op, 0.5, Eigh(), dense=True)
