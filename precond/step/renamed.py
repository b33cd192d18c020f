"""Option names from before 0.2, which are still accepted with a warning that shows the new spelling."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from inspect import Signature
from typing import Any

from precond.step.adapt import LevenbergMarquardt
from precond.step.loop import Loop
from precond.step.options import Momentum, Refresh, WeightDecay

#: Old name -> the options that may hold it now, and the field of their object; no field where the option itself was
#: renamed.
RENAMED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "nesterov": (("momentum",), "nesterov"),
    "decay": (("weight_decay",), "form"),
    "stagger": (("inverse_update_period",), "stagger"),
    "burn_in": (("inverse_update_period",), "burn_in"),
    "rule": (("damping_rule",), None),
    "adapt": (("damping_rule",), None),
    "adapt_period": (("damping_rule",), "period"),
    "update_period": (("inverse_update_period",), None),
    "reject_steps": (("damping_rule",), "reject_steps"),
    "rules": (("structures", "curvature"), "rules"),
    "ignore": (("structures", "curvature"), "ignore"),
    "samples": (("fisher",), "samples"),
    "bias": (("fisher",), "bias"),
    "max_factor": (("fisher", "curvature"), "max_dim"),
    "max_size": (("fisher",), "max_size"),
    "block_size": (("fisher",), "block_size"),
    "factor_lr": (("fisher",), "factor_lr"),
    "factor_momentum": (("fisher",), "factor_momentum"),
    "initial": (("fisher", "curvature"), "initial"),
    "coupled": (("fisher",), "coupled"),
    "mu": (("curvature",), "mu"),
    # All but batch_dim, which never was an option by itself.
    **{name: (("loop",), name) for name in (field.name for field in fields(Loop)) if name != "batch_dim"},
}

#: Object that a number means as one of these options.
_PLAIN: dict[str, type] = {"momentum": Momentum, "weight_decay": WeightDecay, "inverse_update_period": Refresh}
#: Values that exclude old names.
_OBJECTS = {**_PLAIN, "loop": Loop, "damping_rule": LevenbergMarquardt, "structures": Mapping}


def fold(method: type, signature: Signature, options: dict[str, Any]) -> dict[str, Any]:
    """Options in the present spelling.

    Args:
        method: The class that is called; says what a ``fisher`` is there by ``fisher_types``.
        signature: Of its constructor.
        options: Keywords as they were given.

    Raises:
        TypeError: If an old name is given together with the object that has taken its place.
    """
    known = signature.parameters
    out, folded = dict(options), dict[str, dict[str, tuple[str | None, Any]]]()
    for old in options:
        if old not in known and old in RENAMED:
            places, field = RENAMED[old]
            new = next((place for place in places if place in known), None)
            if new is not None:
                folded.setdefault(new, {})[old] = (field, out.pop(old))
    for new, given in folded.items():
        said = ", ".join(f"{old}={spelled(value)}" for old, (_, value) in given.items())
        structure = options.get("structure", known["structure"].default if "structure" in known else None)
        value = _joined(method, new, out.get(new, known[new].default), given, structure, known[new].default)
        meant = f"{new}={spelled(value)}"
        if new in out and _is_whole(new, out[new], given):
            raise TypeError(f"{method.__name__}: {said} and {new}={spelled(out[new])} say it twice; write {meant}.")
        verb = "is" if len(given) == 1 else "are"
        warnings.warn(f"{method.__name__}: {said} {verb} {meant} now.", DeprecationWarning, stacklevel=3)
        out[new] = value
    return out


def _is_whole(new: str, value: Any, given: Mapping[str, Any]) -> bool:
    """Whether the value of an option can hold the old names' values."""
    if new == "fisher":
        return not isinstance(value, str)
    if new == "curvature":
        return isinstance(value, Mapping) or not given.keys() <= {"rules", "ignore"}
    return isinstance(value, _OBJECTS[new])


def _joined(
    method: type, new: str, start: Any, given: Mapping[str, tuple[str | None, Any]], structure: str | None, default: Any
) -> Any:
    """The value of an option, equivalent to the old ones."""
    changes = {field: value for field, value in given.values() if field is not None}
    start = next((value for field, value in given.values() if field is None), start)
    if new == "damping_rule" and not isinstance(start, LevenbergMarquardt):  # adapt=True or False, rule=None
        start = None if start is False else default or (LevenbergMarquardt() if start else None)
    if "rules" in changes or "ignore" in changes:
        ignored = changes.get("ignore") or ()
        parts = {**(changes.get("rules") or {}), **dict.fromkeys([ignored] if isinstance(ignored, str) else ignored)}
        if isinstance(start, Mapping):
            return {**start, **parts}
        return parts if new == "structures" else {"*": start, **parts}
    if not changes:
        return start
    if new == "fisher" and isinstance(start, str):
        types: Mapping[Any, Any] = method.fisher_types  # type: ignore[attr-defined]
        return types.get(structure, next(iter(types.values())))(start, **changes)
    if new == "damping_rule" and start is None:
        if any(value != getattr(LevenbergMarquardt, name) for name, value in changes.items()):
            raise ValueError(
                f"{method.__name__}: {' and '.join(given)} need a rule that changes the damping: "
                f"damping_rule={spelled(LevenbergMarquardt(**changes))}."
            )
        return None
    if new in _PLAIN and not isinstance(start, _PLAIN[new]):
        start = _PLAIN[new](start)
    return replace(start, **changes)


def spelled(value: Any) -> str:
    """An object as one would write it: without the fields that have their defaults."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelled(key)}: {spelled(own)}" for key, own in value.items()) + "}"
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    parts = []
    for index, field in enumerate(fields(value)):
        own = getattr(value, field.name)
        if index == 0 and field.name in ("strength", "period"):
            parts.append(spelled(own))
        elif field.default is MISSING or own != field.default:
            parts.append(f"{field.name}={spelled(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"
