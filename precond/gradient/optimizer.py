"""Optimizers whose curvature comes from gradients alone, parameter by parameter."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from precond.distributed import shard_blocks
from precond.distributed.exchange import Exchange, owners
from precond.distributed.sharded import is_sharded, local
from precond.gradient.cautious import cautious
from precond.step.adaptive_rate import CONSTANT, AdaptiveRate, adapted, is_adaptive, rate_entries, rate_state
from precond.step.base import MomentumOptions, SecondOrderOptimizer, UpdateOptions
from precond.step.divergence import TOLERATED_FAILURES, squares_fit
from precond.step.journal import FAILURES, REFRESHES
from precond.step.norm_control import is_matrix
from precond.step.options import Tables, Vectors, choice, tables_entries, vectors_entries
from solvers import SolverError
from solvers.precision import widen, working_dtype

log = logging.getLogger(__name__)

State = dict[str, Any]
Group = dict[str, Any]
Shards = Literal["lossless", "local"]
#: Words in the names of entries that are matrices of an axis, and no moments, which may be square as well.
MATRICES = frozenset({"factor", "basis", "root"})


class GradientOptions(UpdateOptions, total=False):
    """Options that every method of :class:`GradientOptimizer` has."""

    cautious: bool
    vectors: Vectors | None
    tables: Tables | None
    shards: Shards
    adaptive_rate: AdaptiveRate | Literal["auto"] | None


class GradientMomentumOptions(GradientOptions, MomentumOptions, total=False):
    """:class:`GradientOptions`, and ``momentum`` for methods with the default one."""


class GradientOptimizer(SecondOrderOptimizer):
    """Base of the methods that take parameters and use only their gradients.

    A method defines the first state of a parameter and the direction for a gradient. The state holds tensors
    and numbers only, all floating tensors in float32 at least, under flat names, so that ``torch``'s own checkpoints
    keep it and a resumed run continues bit for bit.

    A gradient whose squares overflow is treated as not finite, because every method here squares it. A
    step with zero gradients and zero learning rates, which ``torch.distributed.checkpoint`` takes to create the state,
    leaves all averages at their start.

    A direction is computed on copies of the tensors in the state, which a method may write to: those of the step before
    live until the step has ended, and come back if anything raises.

    Args:
        params: Parameters, groups, or named parameters.
        lr: Learning rate; ``None`` for :attr:`default_lr`, of methods that have one.
        cautious: Let no entry of the direction oppose the gradient (:func:`~precond.gradient.cautious.cautious`).
        vectors: Options of vectors and numbers, where they differ from those of matrices: :class:`~precond.Vectors`.
        tables: Options of matrices with far more rows than columns: :class:`~precond.Tables`; ``None`` for no tables.
        shards: Of parameters that are sharded over processes: ``"lossless"`` sends them to owners, who take the steps
            of one process; ``"local"`` sends nothing, and takes the rows that each process holds for a parameter of
            their own, so that steps depend on the number of processes. Without shards they are one.
        adaptive_rate: A rate for each parameter that finds itself, :class:`~precond.AdaptiveRate`; ``None`` for ``lr``.
            ``"auto"``: in groups that were given an ``lr``, by themselves or by the constructor, the method as it was
            published, with ``None``; in the others :attr:`own_rate`. What schedulers write later does not count.
        defaults: Further options of the parameter groups, of the method's own.
        options: See :class:`SecondOrderOptimizer`.
    """

    shapes_update = True
    #: Whether what has no matrix takes Adam's step, by options ``betas`` and ``eps``.
    has_adam: ClassVar[bool] = False
    #: Learning rate of groups that are given none; ``None`` where the constructor has a number of its own.
    default_lr: ClassVar[float | None] = None
    #: Options that are ``None`` by default: what they are where rates find themselves, and as published.
    by_rate: ClassVar[Mapping[str, tuple[Any, Any]]] = MappingProxyType({})
    #: Tensors that the step has written.
    written: list[Tensor]

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor | None,
        cautious: bool = False,
        vectors: Vectors | None = None,
        tables: Tables | None = None,
        shards: Shards = "lossless",
        adaptive_rate: AdaptiveRate | Literal["auto"] | None = "auto",
        defaults: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        own = {
            "cautious": cautious,
            "shards": shards,
            **vectors_entries(vectors),
            **tables_entries(tables),
            **CONSTANT,
        }
        self.adaptive_rate, self.has_lr = adaptive_rate, lr is not None
        rate = self.default_lr if lr is None else lr
        if rate is None:
            raise TypeError(f"{type(self).__name__}: lr is a number, or a tensor of one; got None. Leave it out.")
        defaults = {**own, **(defaults or {})}
        self.left_out = {name for name in self.by_rate if defaults[name] is None}
        defaults |= {name: self.by_rate[name][1] for name in self.left_out}
        super().__init__(params, lr=rate, defaults=defaults, **options)

    @property
    def own_rate(self) -> AdaptiveRate | None:
        """Rates of the groups that were given no learning rate, where ``adaptive_rate="auto"``."""
        return None

    def group_of(self, given: Any) -> Group:
        """A group, with what follows from whether it was given a learning rate: its own one, and :attr:`by_rate`."""
        group = super().group_of(given)
        if "lr" in group and group["lr"] is None and self.default_lr is not None:
            del group["lr"]
        if "adaptive_rate" in group or not CONSTANT.keys() <= group.keys():  # else of an optimizer
            rate = group.pop("adaptive_rate", self.adaptive_rate)
            if isinstance(rate, str) and rate == "auto":
                rate = None if self.has_lr or "lr" in group else self.own_rate
            group |= rate_entries(rate)
        for name, (found, published) in self.by_rate.items():
            if group.get(name) is None:
                own = found if is_adaptive(group) else published
                group[name] = own if name in self.left_out else self.defaults[name]
        return group

    def check(self, options: Group) -> None:
        super().check(options)
        if choice("shards", options["shards"], Shards) == "local" and not self.takes_shards:
            raise ValueError(
                f"{type(self).__name__} does not take sharded parameters as it is used here, so shards='local' has no "
                "effect. Leave it out."
            )
        if options.get("cautious") and self.update_options(options).get("momentum"):
            raise ValueError(
                f"{type(self).__name__}: cautious=True looks at directions, before momentum={options['momentum']} adds "
                "to them. Give one of the two; the averages of betas and of beta2 are part of a direction."
            )
        if options.get("vector_betas") is not None and len(options["vector_betas"]) != len(options.get("betas", ())):
            has = f"has betas={options['betas']}" if "betas" in options else "has no betas"
            raise ValueError(
                f"{type(self).__name__} {has}, so vectors=Vectors(betas={options['vector_betas']}) does not fit it."
            )

    @abstractmethod
    def initial_state(self, p: Tensor, group: Group) -> State:
        """State of a parameter before its first step, without the count ``step``."""

    @abstractmethod
    def direction(self, p: Tensor, g: Tensor, state: State, group: Group) -> Tensor:
        """Update the state with a gradient and return the direction, both of the parameter's shape.

        Args:
            p: The parameter.
            g: Gradient in float32 at least, not empty; not to be altered.
            state: Its state; ``state["step"]`` is 1 at the first step.
            group: Options.
        """

    def expected_state(self, p: Tensor, options: Group) -> State:
        shape = torch.empty_like(p, device="meta")
        if not self.divides(p, options):
            return self.first_state(shape, options)
        table = shard_blocks.table(p, lambda part: self.first_state(part, options))
        return {"step": 0, **self.shard_state(shape), shard_blocks.TABLE: table}

    def first_state(self, p: Tensor, group: Group) -> State:
        part = self.part(p, group)
        # In a checkpoint the tensors of a part are one entry, which its flat form looks for here.
        cut = {**self.shard_state(p), shard_blocks.TABLE: 0} if part is not p and p.numel() else {}
        if not part.numel():
            return {"step": 0, **cut}
        own = {"step": 0, **(rate_state(state_zeros(part)) if is_adaptive(group) else {})}
        if self.has_adam and is_table(part, group):
            return {**own, "exp_avg": state_zeros(part), "exp_avg_sq": state_zeros(part), **cut}
        return {**own, **self.initial_state(part, group), **cut}

    @staticmethod
    def divides(p: Tensor, group: Group) -> bool:
        """Whether the rows of a parameter that each process holds are a parameter of their own."""
        return group["shards"] == "local" and shard_blocks.is_cut(p)

    def part(self, p: Tensor, group: Group) -> Tensor:
        """What the method takes for a parameter: all of it, or the rows that this process holds."""
        part: Tensor = local(p) if self.divides(p, group) else p
        return part

    def diagonal(self, state: State) -> bool:
        """Whether a parameter, by its state, has no matrix and takes Adam's step."""
        return False

    takes_shards = True

    def shard_state(self, p: Tensor) -> State:
        """Entries of the first state that are cut as a sharded parameter is, and do not lie with its owner."""
        return {}

    def directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        self.written = []
        if (exchange := self._exchange()) is None:
            return self.whole_directions(gradients)
        for p in gradients:  # its clock runs in all processes
            if not exchange.mine(p):
                state = self.state[p]
                state.update({"step": 0, **self.shard_state(p)} if "step" not in state else {})
                state["step"] += not self.idle
        group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        return exchange.through(gradients, self.whole_directions, lambda p: (group_of[p], p.shape, p.dtype))

    def work(self, p: Tensor, group: Group) -> float:
        """Multiplications of the step of a parameter, about: of each matrix ``(n, n)`` a cube, and its products."""
        state = self.expected_state(p, group).items()
        matrices = [x for name, x in state if isinstance(x, Tensor) and x.ndim == 2 and MATRICES & {*name.split(".")}]
        return float(p.numel() + sum(n**3 + n * p.numel() for n in (x.shape[-1] for x in matrices)))

    def _exchange(self) -> Exchange | None:
        """The messages between shards of parameters and their owners; ``None`` where nothing is sharded."""
        key = [(len(group["params"]), group["shards"]) for group in self.param_groups]
        known = self.__dict__.get("_shards")  # not in __init__, because copies start without it
        if known is None or known[0] != key:
            options = self._options_of()
            whole = [[p for p in group["params"] if not self.divides(p, group)] for group in self.param_groups]
            owner = owners(whole, lambda p: self.work(p, options[p]))
            sharded = any(map(is_sharded, options))
            known = self._shards = key, Exchange(owner) if sharded else None
        return known[1]

    def _options_of(self) -> dict[Tensor, Group]:
        """The parameters, in their order, and their groups."""
        return {p: group for group in self.param_groups for p in group["params"]}

    def spread(self, states: dict[int, State]) -> dict[int, State]:
        exchange = self._exchange()
        if exchange is None:
            return states
        options = self._options_of()
        numbers = dict(enumerate(options))
        found = exchange.saved({numbers[number]: entries for number, entries in states.items()})
        divided = {p: entries for p, entries in found.items() if self.divides(p, options[p])}
        meta = {p: torch.empty_like(p, device="meta") for p in divided}
        tables = {p: self.expected_state(p, options[p])[shard_blocks.TABLE] for p in divided}
        found |= shard_blocks.saved(divided, {p: self.first_state(x, options[p]) for p, x in meta.items()}, tables)
        return {number: found[numbers[number]] for number in sorted(states)}  # in one order everywhere

    def gather(self) -> None:
        exchange = self._exchange()
        if exchange is None:
            return
        for p, group in self._options_of().items():
            if p not in self.state or not self.state[p]:
                continue
            if p in exchange.owner:
                first = self.first_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
                whole = first.keys() - self.shard_state(p).keys()
                self.state[p] = exchange.kept(p, self.state[p], whole)
            elif self.divides(p, group):
                first = self.first_state(torch.empty_like(p, device="meta"), group)
                self.state[p] = shard_blocks.kept(p, self.state[p], first)

    def require_fitting(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups", ())
        for own, given in zip(self.param_groups, groups, strict=False):
            ways = own["shards"], given.get("shards", "lossless")
            for p, number in zip(own["params"], given["params"], strict=False):
                entries = state_dict["state"].get(number, {})
                whose = f"{type(self).__name__}: the saved state of {self.name_of(p)} was"
                shard_blocks.require_same_cut(p, entries, ways, whose)

    def whole_directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """:meth:`directions` for whole parameters."""
        out: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            whole: list[Tensor] = []  # with a matrix
            entries: list[Tensor] = []  # Adam's
            for p in group["params"]:
                if p not in gradients:
                    continue
                self.begin(p, group)
                self.state[p]["step"] += bool(p.numel()) and not self.idle
                if self.idle or not gradients[p].numel():
                    out[p] = torch.zeros_like(widen(gradients[p]))
                    continue
                (entries if self.diagonal(self.state[p]) else whole).append(p)
            for params, compute in ((whole, self.several), (entries, self._adam)):
                for some, options, rate in self._by_kind(params, group):
                    raised = [widen(gradients[p]) for p in some]
                    found = compute(some, raised, options)
                    if group["cautious"]:
                        found = cautious(found, raised, stacked=group.get("stacked", False))
                    if is_adaptive(group):
                        found = adapted(found, raised, [self.state[p] for p in some], group)
                    out |= zip(some, found if rate == 1 else torch._foreach_mul(found, rate), strict=True)
        return out

    def _by_kind(self, params: list[Tensor], group: Group) -> list[tuple[list[Tensor], Group, float]]:
        """Parameters with the options that hold for them, and the factor of their rate: matrices, vectors, tables."""
        betas = group.get("vector_betas")
        alike = betas is None and group.get("vector_lr", 1) == 1
        if alike and group.get("table_ratio", math.inf) == math.inf:  # nobody asked for kinds
            return [(params, group, 1.0)] if params else []
        own = {**group, "betas": betas} if betas is not None else group
        kinds: dict[str, list[Tensor]] = {"matrix": [], "vector": [], "table": []}
        for p in params:
            part = self.part(p, group)
            kind = "table" if is_table(part, group) else "matrix" if alike or is_matrix(part) else "vector"
            kinds[kind].append(p)
        rates = {"matrix": 1.0, "vector": group.get("vector_lr", 1.0), "table": group.get("table_lr", 1.0)}
        return [(some, own if kind == "vector" else group, rates[kind]) for kind, some in kinds.items() if some]

    def several(self, params: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        """Directions of some parameters of a group; see :meth:`direction`."""
        for p in params:  # the step works on copies: what was there stays whole until it ends
            state = self.state[p]
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})
            self.written += [value for value in state.values() if isinstance(value, Tensor)]
        return [self.direction(p, g, self.state[p], group) for p, g in zip(params, gradients, strict=True)]

    def _adam(self, params: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        states = [self.state[p] for p in params]
        return adam(gradients, states, group["betas"], group["eps"])  # finite, because the gradients' squares are

    def touched(self) -> list[Tensor]:
        written, self.written = self.written, []
        return [value for value in written if value.is_floating_point()]

    def begin(self, p: Tensor, group: Group) -> None:
        """Create the state of a parameter, unless it exists."""
        if "step" not in self.state[p]:
            self.state[p].update(self.first_state(p, group))

    def takes(self, norm: float, gradients: dict[Tensor, Tensor]) -> bool:
        return squares_fit(norm, gradients.values())

    def refresh(self, p: Tensor, compute: Callable[[], State | None], prefix: str = "") -> None:
        """Replace entries of the state by computed ones; after a failure the last good ones stay.

        Args:
            p: The parameter.
            compute: Returns the new entries, or writes them itself.
            prefix: Of the names in the state, where the parameter has several blocks.

        Raises:
            SolverError: At the first refresh, or after more than three failures in a row.
        """
        state, failures = self.state[p], f"{prefix}failures"
        try:
            state.update(compute() or {})
            state[failures] = 0
            self.events[REFRESHES] += 1
        except SolverError as error:
            where = self.name_of(p) + (f", block {prefix.strip('.')}" if prefix else "")
            first = failures not in state
            state[failures] = state.get(failures, 0) + 1
            self.events[FAILURES] += 1
            if first or state[failures] > TOLERATED_FAILURES:
                raise type(error)(f"{where}: refresh failed {state[failures]} times in a row. {error}") from error
            log.warning("%s keeps its last decomposition: %s", where, error)


def is_table(p: Tensor, group: Group) -> bool:
    """Whether a parameter has far more rows than columns; see :class:`~precond.Tables`."""
    ratio = group.get("table_ratio", math.inf)
    return p.ndim == 2 and is_matrix(p) and p.shape[0] ** 2 > ratio * max(p.numel(), 256)


def state_zeros(p: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Zeros for the state of a parameter, contiguous, in its working precision."""
    return torch.zeros(p.shape if shape is None else shape, dtype=working_dtype(p), device=p.device)


def due(step: int, period: int) -> bool:
    """Whether an event of this period is due at a step: at the first one, and then every ``period`` steps."""
    return step == 1 or step % period == 0


def debiased(average: Tensor, beta: float, step: int) -> Tensor:
    """An exponential average that began at zero, divided by its weight."""
    return average / (1 - beta**step)


def adam(gradients: list[Tensor], states: list[State], betas: tuple[float, float], eps: float) -> list[Tensor]:
    r"""Adam's directions, :math:`\hat m / (\sqrt{\hat v} + \epsilon)`, for parameters without matrix structure.

    All parameters at once, because there may be many small ones. States get new averages, and may have another shape of
    the same size.
    """
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    same = [g if g.shape == m.shape else g.reshape(m.shape) for g, m in zip(gradients, first, strict=True)]
    first = list(torch._foreach_lerp(first, same, 1 - betas[0]))
    second = list(torch._foreach_mul(second, betas[1]))
    torch._foreach_addcmul_(second, same, same, value=1 - betas[1])
    for state, m, v in zip(states, first, second, strict=True):
        state["exp_avg"], state["exp_avg_sq"] = m, v
    roots = torch._foreach_div(second, [1 - betas[1] ** s["step"] for s in states])
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    out = torch._foreach_div(first, [1 - betas[0] ** s["step"] for s in states])
    torch._foreach_div_(out, roots)
    return [d if d.shape == g.shape else d.reshape(g.shape) for d, g in zip(out, gradients, strict=True)]
