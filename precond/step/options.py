"""Checks of the options of parameter groups."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from precond.step.update import Decay


def check_options(options: dict[str, Any]) -> None:
    """Refuse options outside their range.

    Raises:
        ValueError: Naming the option, its value and the range.
    """
    rate = options.get("lr")
    if isinstance(rate, Tensor) and rate.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(rate.shape)}; use groups for several rates.")
    for name in ("lr", "momentum", "weight_decay", "damping", "eps"):
        value = options.get(name)
        if isinstance(value, Tensor):
            value = value.item() if value.device.type == "cpu" else 0.0
        if isinstance(value, (int, float)) and not (0 <= value < float("inf")):
            raise ValueError(f"{name} must be a non-negative finite number, got {value}.")
    if options.get("decay", "decoupled") not in get_args(Decay):
        raise ValueError(f"decay is one of {', '.join(get_args(Decay))}; got {options['decay']!r}.")
    betas = options.get("betas", ())
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are weights of old values, each in [0, 1); got {betas}.")
    ema = options.get("curvature_ema")
    if ema is not None and not 0 <= ema <= 1:
        raise ValueError(f"curvature_ema is the weight of old statistics, in [0, 1]; got {ema}.")
    for name in ("curvature_update_period", "inverse_update_period"):
        if name in options:
            period(name, options[name])
    if options.get("nesterov") and not options.get("momentum"):
        raise ValueError("nesterov=True needs a momentum above zero.")
    clip = options.get("kl_clip")
    if clip is not None and not clip > 0:
        raise ValueError(f"kl_clip must be positive, or None for no bound; got {clip}.")


def period(name: str, value: int) -> int:
    """A period in steps, checked."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of steps, at least 1, got {value!r}.")
    return value
