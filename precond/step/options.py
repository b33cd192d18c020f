"""Options that are objects, and the checks of the entries of parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, Literal, get_args

from torch import Tensor

from precond.step.adaptive_rate import rate_entries
from precond.step.lookahead import EMANesterov
from precond.step.norm_control import check_norm_control, norm_control_entries
from precond.step.schedules import Scheduled, ScheduledInt
from precond.step.update import Decay
from solvers.outcome.arguments import flag, number, whole


@dataclass(frozen=True)
class Momentum:
    r"""Momentum on the preconditioned gradient, :math:`v \leftarrow \mu v + d`; a number stands for ``strength``.

    Args:
        strength: :math:`\mu`.
        nesterov: Look ahead along the momentum: move along :math:`d + \mu v` in place of v.
    """

    strength: Scheduled = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not callable(self.strength):
            number("strength", self.strength)
        flag("nesterov", self.nesterov)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"momentum": self.strength, "nesterov": self.nesterov}


@dataclass(frozen=True)
class WeightDecay:
    """Weight decay; a number stands for ``strength``, decoupled.

    Args:
        strength: How much.
        form: How it acts: ``"decoupled"`` multiplies parameters by ``1 - lr * strength``; ``"l2"`` adds
            ``strength * p`` to the gradient before it is preconditioned; ``"independent"``, ``"corrected"`` and
            ``"cautious"`` are explained at :func:`precond.step.update.decay_rate`.

    Raises:
        ValueError: If the form is unknown.
    """

    strength: Scheduled
    form: Decay = "decoupled"

    def __post_init__(self) -> None:
        """Validate the form."""
        if not callable(self.strength):
            number("strength", self.strength)
        _check_form("form", self.form)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"weight_decay": self.strength, "decay": self.form}


@dataclass(frozen=True)
class Vectors:
    """Options of vectors and numbers among the parameters of a group, as ``vectors``: biases, scales, shifts.

    Their second moment, of few noisy entries, wants a longer memory than that of matrices.

    Args:
        betas: Decay of their averages; those of the group if ``None``.
        lr: Their learning rate as a multiple of the group's.

    References:
        Track 3 of modded-nanogpt (2026), https://github.com/KellerJordan/modded-nanogpt/pull/321
    """

    betas: tuple[float, float] | None = None
    lr: Scheduled = 1.0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.betas is not None:
            check_betas("betas of Vectors", self.betas)
        if not callable(self.lr):
            number("lr of Vectors", self.lr, low=0)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"vector_betas": self.betas, "vector_lr": self.lr}


@dataclass(frozen=True)
class Tables:
    r"""Options of tables among the matrices of a group, as ``tables``: a row for each word, user or item.

    A matrix ``(rows, columns)`` is taken for one if ``rows`` is more than ``ratio`` times ``columns``, one of less than
    256 numbers as if it had 256. Its rows have gradients of their own, so it takes Adam's step in the methods that give
    vectors that; and entries of the size of one want larger steps than weights that are summed over.

    Args:
        lr: Learning rate of tables as a multiple of the group's.
        ratio: Least rows for each column; ``inf`` for no tables.

    Raises:
        ValueError: If a number is out of range.
    """

    lr: Scheduled = 3.0
    ratio: float = 4.0

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not callable(self.lr):
            number("lr of Tables", self.lr, low=0)
        if not (isinstance(self.ratio, float) and self.ratio == inf):
            number("ratio of Tables", self.ratio, low=0)

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"table_lr": self.lr, "table_ratio": self.ratio}


def tables_entries(given: Any) -> dict[str, Any]:
    """The entries of a parameter group for ``tables=``.

    Raises:
        TypeError: If it is no :class:`Tables`.
    """
    if not (given is None or isinstance(given, Tables)):
        raise TypeError(f"tables is a Tables(lr, ratio), or None to treat them as other matrices; got {given!r}.")
    return (Tables(1.0, inf) if given is None else given).in_groups()


def vectors_entries(given: Any) -> dict[str, Any]:
    """The entries of a parameter group for ``vectors=``.

    Raises:
        TypeError: If it is no :class:`Vectors`.
    """
    if not (given is None or isinstance(given, Vectors)):
        raise TypeError(f"vectors is a Vectors(betas, lr), or None for the options of the group; got {given!r}.")
    return (Vectors() if given is None else given).in_groups()


def check_betas(name: str, betas: Any) -> None:
    """Refuse what are no two weights of old values.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If there are no numbers.
    """
    if not (isinstance(betas, (tuple, list)) and all(isinstance(b, Real) and not isinstance(b, bool) for b in betas)):
        raise TypeError(f"{name} are numbers such as (0.9, 0.999), not {betas!r}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name} are weights of old values, each in [0, 1); got {betas}.")


Bounded = Literal["move", "direction"]
#: What a bound or a damping is a multiple of.
Unit = Literal["curvature", "loss"]


@dataclass(frozen=True)
class TrustRegion:
    r"""Bound on the move m of a step; a number c as ``kl_clip`` stands for ``TrustRegion(c)``.

    .. math:: m^\top C m \le c\, (\eta / \bar\eta)^2

    with the learning rate :math:`\eta` and a reference :math:`\bar\eta`: the left side is twice the divergence (KL)
    that the curvature C predicts for the whole move, momentum and learning rate included, with C as it was damped and
    inverted last. Decoupled weight decay comes on top; decay in the gradient (``"l2"``) is within. A learning rate that
    decays, or warms up, shortens bound steps as it does others.

    Methods that learn an inverse and keep no C (``SINGD``, ``KBFGS``, ``SENG``), or have none (gradient-only methods,
    closures), carry the length of the momentum on from step to step as if their preconditioner were the same.

    Args:
        kl: c.
        lr: :math:`\bar\eta`. ``None`` for the learning rate that the group began with (the peak, as schedulers of
            ``torch`` write it as ``initial_lr`` or ``max_lr``): c is then the bound of the first step whatever the
            learning rate is, so that another one to begin with changes nothing where the bound is active. A number lets
            the learning rate keep its effect there.
        of: ``"move"``; or ``"direction"`` for the bound that other libraries have, of :math:`\eta^2 \langle d, g
            \rangle` before momentum, which may exceed it up to :math:`(1 - \mu)^{-2}` times.

        unit: ``"curvature"`` for a bound as above; ``"loss"`` for c times the level of the loss
            (:class:`~precond.step.loss_level.LossLevel`), an average over some ten steps: the share of it that a move
            may change, which is more of a loss that falls fast. It follows the scale of targets and of reductions by
            itself. Of methods that see the loss: the layer-based ones.

    Raises:
        ValueError: If a value is out of range.

    References:
        Ba, Grosse and Martens (2017), section 5, https://openreview.net/forum?id=SkkTMpjex
    """

    kl: Scheduled
    lr: float | None = None
    of: Bounded = "move"
    unit: Unit = "curvature"

    def __post_init__(self) -> None:
        """Validate what is not validated in the groups."""
        choice("of", self.of, Bounded)
        choice("unit", self.unit, Unit)
        number("lr of a TrustRegion", self.lr, low=0, open_low=True, optional=True)
        if self.lr is not None and self.of == "direction":
            raise ValueError("TrustRegion(of='direction') bounds by the learning rate at hand; leave lr out.")

    def in_groups(self) -> dict[str, Any]:
        """The entries of a parameter group."""
        return {"kl_clip": self.kl, "kl_lr": self.lr, "kl_of": self.of, "kl_unit": self.unit}


@dataclass(frozen=True)
class LossDamping:
    r"""Damping that is a fraction of the loss, :math:`\lambda = \varphi\, \ell`, as ``damping`` of layer-based methods.

    With the level :math:`\ell` of :class:`~precond.step.loss_level.LossLevel`. A loss that is multiplied by a number
    has gradients, curvature and damping multiplied by it, so that steps stay the same: a mean or a sum over outputs,
    targets of thousands. As the loss falls the damping does. It enters in the form that a number has
    for the method (:class:`~solvers.Tikhonov` or :class:`~solvers.FactoredTikhonov`).

    Args:
        fraction: :math:`\varphi`.
    """

    fraction: Scheduled = 1e-2

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if not callable(self.fraction):
            number("fraction", self.fraction, low=0)


@dataclass(frozen=True)
class Refresh:
    """Times at which inverses are renewed; a number, or a function of the step count, stands for ``period``.

    Args:
        period: Steps between decompositions and inverses, of the statistics at hand. May be a function of the step
            count, such as :class:`~precond.Doubling`.
        stagger: Spread the refreshes of the blocks over the period, by their cost, so that no step stalls
            (:func:`precond.layerwise.blocks.refresh.slots`); otherwise all are due when the period divides the step
            count. ``None`` leaves it to the method.
        burn_in: Steps at the start that only collect statistics, so that the first inverses rest on more
            than one batch (kfac-jax's ``num_burnin_steps``; Distributed Shampoo moves by a grafted method meanwhile,
            whose step has another scale). Before another optimizer, ``precondition()`` gives zeros meanwhile.

    Raises:
        ValueError: If ``burn_in`` is not a whole number of steps.
    """

    period: ScheduledInt
    stagger: bool | None = None
    burn_in: int = 0

    def __post_init__(self) -> None:
        """Validate the burn-in."""
        if not callable(self.period):
            whole("period", self.period, low=-(2**63))  # its range is checked with the groups, by the name it has there
        flag("stagger", self.stagger, optional=True)
        if not isinstance(self.burn_in, int) or isinstance(self.burn_in, bool) or not 0 <= self.burn_in < 2**63:
            raise ValueError(f"burn_in is a whole number of steps, at least 0; got {self.burn_in!r}.")

    @classmethod
    def of(cls, given: ScheduledInt | Refresh) -> Refresh:
        """The object itself, or the one made from a period."""
        if not (isinstance(given, Refresh) or callable(given)):
            period("inverse_update_period", given)
        return given if isinstance(given, Refresh) else cls(given)


def in_groups(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group, objects replaced by the plain entries that groups hold."""
    out = dict(options)
    clip: Any = options.get("kl_clip")
    if "kl_clip" in options and "kl_lr" not in options and not isinstance(clip, TrustRegion):
        out |= TrustRegion(clip).in_groups()
    if "momentum" in options and "nesterov" not in options:
        out["nesterov"] = False  # which a number means; an object says it below
    for value in options.values():
        if isinstance(value, (Momentum, WeightDecay, TrustRegion, EMANesterov)):
            out |= value.in_groups()
    for name, entries in (
        ("norm_control", norm_control_entries),
        ("vectors", vectors_entries),
        ("tables", tables_entries),
        ("adaptive_rate", rate_entries),
    ):
        if name in options:
            out |= entries(out.pop(name))
    return out


def check_options(options: dict[str, Any]) -> None:
    """Refuse options outside their range.

    Raises:
        ValueError: Naming the option, its value and the range.
    """
    _check_types(options)
    rate = options.get("lr")
    if isinstance(rate, Tensor) and rate.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(rate.shape)}; use groups for several rates.")
    for name in ("lr", "momentum", "weight_decay", "damping", "eps"):
        value = options.get(name)
        if isinstance(value, Tensor):
            value = value.item() if value.device.type == "cpu" else 0.0
        if isinstance(value, (int, float)) and not (0 <= value < float("inf")):
            raise ValueError(f"{name} must be a non-negative finite number, got {value}.")
    _check_form("decay", options.get("decay", "decoupled"))
    for name in ("betas", "vector_betas"):
        if options.get(name) is not None:
            check_betas(name, options[name])
    if options.get("lookahead") is not None:
        number("lookahead", options["lookahead"], low=0)
        number("lookahead_decay", options["lookahead_decay"], low=0, high=1, open_high=True)
    check_norm_control(options)
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
    for name in _NUMBERS & options.keys():  # what the ranges above let pass
        if not isinstance(options[name], Tensor):
            number(name, options[name], optional=True)
    for name in ("vector_scale", "vector_lr", "table_lr", "scale", "max_ratio"):
        if options.get(name) is not None:
            number(name, options[name], low=0)


#: Options of groups by the kind of their values; those with None as a value among them in the last set.
_NUMBERS = frozenset(
    {
        *("lr", "momentum", "weight_decay", "kl_clip", "damping", "eps", "curvature_ema", "exponent", "max_rms"),
        *("preconditioner_lr", "average_decay", "vector_scale", "scale", "gamma", "hessian_power", "max_ratio"),
        *("update_floor", "brake_outward", "brake_inward", "lookahead", "lookahead_decay", "vector_lr"),
        "table_lr",
        "row_normalization",
        *("rate_growth", "rate_least", "rate_most"),
    }
)
_WHOLE = frozenset({"max_dim", "merge_dims", "block_size", "rank", "start_step"})
_FLAGS = frozenset(
    {
        *("nesterov", "maximize", "rotate_vectors", "eigenvalue_correction", "orthogonalize", "stacked"),
        *("hyperball", "floor_rows", "cautious"),
    },
)
_OPTIONAL = frozenset(
    {
        *("kl_clip", "curvature_ema", "exponent", "max_rms", "merge_dims", "max_ratio"),
        *("lookahead", "row_normalization"),
    }
)


def _check_types(options: dict[str, Any]) -> None:
    """Refuse values of another type than the option's; the ranges follow."""
    for name, value in options.items():
        if value is None and name in _OPTIONAL:
            continue
        if name in _NUMBERS and not (isinstance(value, Tensor) and value.numel() == 1):
            if isinstance(value, (bool, Tensor)) and not (name == "lr" and isinstance(value, Tensor)):
                raise TypeError(f"{name} is a number, not {value!r}.")
            if not isinstance(value, (Real, Tensor)):
                raise TypeError(f"{name} is a number, not {value!r}.")
        elif name in _WHOLE:
            whole(name, value, low=-(2**63))
            if name != "rank" and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}.")
        elif name in _FLAGS:
            flag(name, value)
        elif name == "betas":
            check_betas(name, value)


def choice(name: str, value: Any, of: Any) -> Any:
    """One of the values of a ``Literal``, checked."""
    if value not in get_args(of):
        raise ValueError(f"{name} is one of {', '.join(get_args(of))}, not {value!r}.")
    return value


def period(name: str, value: int) -> int:
    """A period in steps, checked."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
        raise ValueError(f"{name} must be a whole number of steps, at least 1, got {value!r}.")
    return value


def _check_form(name: str, form: Any) -> None:
    if form not in get_args(Decay):
        raise ValueError(f"{name} is one of {', '.join(get_args(Decay))}; got {form!r}.")


#: Default of the layer-based methods that keep a Kronecker product.
NESTEROV = Momentum(0.9, nesterov=True)
#: Default of the layer-based methods that learn an inverse: before it is learned it says nothing about large losses.
CURVATURE_REGION = TrustRegion(1e-2, lr=0.1)
#: Default of the layer-based methods with whole blocks.
WHOLE_REGION = TrustRegion(1e-2, lr=0.1, unit="loss")
#: Default of the layer-based methods that keep a Kronecker product.
TRUST_REGION = TrustRegion(3e-3, lr=0.1, unit="loss")
