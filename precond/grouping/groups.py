"""Parameter groups for an optimizer: roles, weight decay, and the method's own treatment of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from curvature.model.data import Data
from curvature.model.parameters import Parameters, Restriction
from curvature.model.wrappers import unwrapped
from precond.grouping.roles import ROLES, Role, knows_head, roles_by_type, roles_by_use
from precond.step.base import SecondOrderOptimizer
from precond.step.options import WeightDecay
from precond.step.schedules import Scheduled
from solvers.outcome.arguments import instance

#: What is not decayed unless asked for.
UNDECAYED: tuple[Role, ...] = ("embedding", "norm", "bias", "vector")


def param_groups(
    model: nn.Module,
    method: type[SecondOrderOptimizer] | None = None,
    data: Data | None = None,
    *,
    weight_decay: Scheduled | WeightDecay = 0.0,
    undecayed: Collection[Role] = UNDECAYED,
    options: Mapping[Role, Mapping[str, Any]] | None = None,
    roles: Mapping[Role, Any] | None = None,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters by what they do: one for each role, with its options.

    =============== ==================================================================================================
    ``"matrix"``    multiplies activations: linear layers, projections of attention, convolutions, recurrent layers
    ``"experts"``   the same, several matrices in one tensor along its first axis, used one at a time or in a batch
    ``"embedding"`` rows of it are picked by an index; also where it is used as a matrix as well (tied)
    ``"head"``      a matrix whose product is the model's output, up to functions entry by entry
    ``"norm"``      scales and shifts of normalisation layers
    ``"bias"``      added to the product of a matrix
    ``"vector"``    all others that meet activations entry by entry: scales, positions, class tokens, numbers
    =============== ==================================================================================================

    Names of parameters play no part. The types of modules tell most roles; a pass of ``data`` through the model tells
    all of them by the uses that it shows, in layers of one's own as well. Where the types leave something open that
    the groups depend on, this asks for ``data``.

    The groups are those of any ``torch.optim`` optimizer, too, with names, and the role as ``name`` (which loggers of
    learning rates show). Frozen parameters are left out.

    >>> model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7))
    >>> for group in param_groups(model, weight_decay=0.1):
    ...     print(group["name"], [name for name, _ in group["params"]], group["weight_decay"])
    embedding ['0.weight'] 0.0
    head ['2.weight'] 0.1
    norm ['1.weight', '1.bias'] 0.0
    bias ['2.bias'] 0.0

    Args:
        model: The model; wrappers of ``torch.compile`` and DDP are looked through.
        method: The class of the optimizer. Some treat parameters by their role, as their authors do
            (:attr:`SecondOrderOptimizer.by_role`): ``Muon`` gives embeddings and vectors AdamW's step.
        data: One batch ``(x, y)``, or batches, of which the first is passed through the model; nothing is changed.
        weight_decay: Strength of the decay, or :class:`~precond.WeightDecay`.
        undecayed: Roles without decay. Rows of an embedding that a batch does not use would shrink without a gradient;
            scales and shifts have a meaning of their own at zero.
        options: Role -> options of its group, over all others: ``{"head": {"lr": 1e-3}}``.
        roles: Role -> names, globs, tensors or modules that have it, whatever is found.

    Returns:
        Dicts with ``params`` (pairs of name and tensor), ``name``, ``weight_decay`` and the options, in the order of
        the table; roles that nothing has are left out.

    Raises:
        ValueError: If a role cannot be told, or there is no such role.
    """
    model = unwrapped(model)
    if not (method is None or (isinstance(method, type) and issubclass(method, SecondOrderOptimizer))):
        raise TypeError(
            f"param_groups(model, method) takes an optimizer class of precond such as Muon, not {method!r}; leave it "
            "out for others. A batch is the third argument, data=."
        )
    _check_roles("undecayed", undecayed)
    for name, mapping in (("options", options), ("roles", roles)):
        instance(name, mapping, Mapping, "a mapping of roles", optional=True)
        _check_roles(name, mapping or ())
    treatment: Mapping[str, Mapping[str, Any]] = {} if method is None else method.by_role
    parameters = Parameters(model)
    found = _found(model, parameters, data, roles or {}, needs_head="head" in treatment or "head" in (options or {}))
    groups = []
    for role in ROLES:
        params: list[tuple[str, Tensor]] = [(name, p) for name, p in parameters.items() if found[name] == role]
        if params:
            decay = _strength(weight_decay, 0.0) if role in undecayed else weight_decay
            own = {**treatment.get(role, {}), **(options or {}).get(role, {})}
            groups.append({"params": params, "name": role, "weight_decay": decay, **own})
    return groups


def _strength(weight_decay: Scheduled | WeightDecay, strength: float) -> Scheduled | WeightDecay:
    """The same form of decay at another strength."""
    return WeightDecay(strength, weight_decay.form) if isinstance(weight_decay, WeightDecay) else strength


def _check_roles(name: str, given: Collection[str]) -> None:
    unknown = [role for role in ([given] if isinstance(given, str) else given) if role not in ROLES]
    if unknown or isinstance(given, str):
        what = f"the string {given!r}" if isinstance(given, str) else f"{unknown[0]!r}"
        raise ValueError(f"{name}= of param_groups is about the roles {', '.join(ROLES)}, got {what}.")


def _found(
    model: nn.Module, parameters: Parameters, data: Data | None, given: Mapping[Role, Any], needs_head: bool
) -> dict[str, Role]:
    """The role of every parameter."""
    said = {name: role for role, which in given.items() for name in Parameters(model, _some(which))}
    by_type, unread = roles_by_type(model, parameters), dict[str, set[str]]()
    found = dict(by_type)
    if data is not None:
        by_use, unread = roles_by_use(model, parameters, data)
        # A norm of torch's that runs as other functions shows its scale, and not what it belongs to.
        found |= {
            name: "norm" if role == "vector" and by_type.get(name) == "norm" else role for name, role in by_use.items()
        }
    found |= said
    if open_ := [name for name in parameters if name not in found]:
        shapes = ", ".join(f"{name} ({'x'.join(map(str, parameters[name].shape))})" for name in open_[:3])
        more = f" and {len(open_) - 3} more" if len(open_) > 3 else ""
        why, mend = "the types of their modules", "pass data=(x, y), a batch that shows their use, or "
        if data is not None:
            calls = sorted({call for name in open_ for call in unread.get(name, ())})
            why, mend = f"their uses by {', '.join(calls)}" if calls else "a batch that does not use them", ""
        raise ValueError(
            f"param_groups cannot tell from {why} what {shapes}{more} of {type(model).__name__} do: {mend}say it, as "
            f"roles={{'matrix': {open_[0]!r}}} or roles={{'vector': {open_[0]!r}}}."
        )
    if needs_head and data is None and "head" not in given and not knows_head(model):
        raise ValueError(
            f"the groups depend on which matrix makes the output, and {type(model).__name__} does not show it by the "
            "types of its modules: pass data=(x, y), a batch to look at, or name it, as roles={'head': 'fc.weight'}."
        )
    return found


def _some(which: Any) -> list[Restriction]:
    return [which] if isinstance(which, (str, Tensor, nn.Module)) else list(which)
